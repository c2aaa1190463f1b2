//! What a vCPU of this host has: sizes, MSRs, ways to set its clock. Found once, when it is made.
//!
//! Invariants: an MSR travels if this KVM reads it and takes it back; those that say what the processor
//! is (KVM's feature MSRs) are compared, never written.
//!
//! Does not hold state.

use std::collections::BTreeMap;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::clock::TscControl;
use super::kvm::KvmError;
use super::vcpu_ioctl::{get_tsc_offset, has_sregs2, set_tsc_offset, xsave_bytes};

/// The time stamp counter.
pub(super) const MSR_IA32_TSC: u32 = 0x10;
/// When the local APIC's timer fires, in TSC ticks.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Microcode revision: may differ between hosts that are otherwise alike.
const MSR_IA32_UCODE_REV: u32 = 0x8b;
/// Hyper-V's interface, which no guest is offered; some are clocks of the host.
const HYPER_V_MSRS: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
/// How far the probe moves a clock.
const PROBE_TICKS: u64 = 1 << 32;

/// The sizes and abilities of a vCPU.
#[derive(Clone, Debug)]
pub(super) struct VcpuShape {
    pub(super) xsave_words: usize,
    pub(super) xsave2: bool,
    pub(super) sregs2: bool,
    /// There is an interrupt controller in the kernel.
    pub(super) lapic: bool,
    pub(super) nested: bool,
    pub(super) tsc_khz: u32,
    pub(super) tsc: TscControl,
    pub(super) msrs: MsrSet,
}

impl VcpuShape {
    /// Tries what this vCPU has. Its clock is where it was afterwards.
    pub(super) fn probe(kvm: &Kvm, vm: &VmFd, fd: &VcpuFd) -> Result<Self, KvmError> {
        let (xsave_bytes, xsave2) = xsave_bytes(vm);
        Ok(Self {
            xsave_words: xsave_bytes / 4,
            xsave2,
            sregs2: has_sregs2(vm),
            lapic: fd.get_lapic().is_ok(),
            nested: vm.check_extension_int(Cap::NestedState) > 0,
            tsc_khz: fd
                .get_tsc_khz()
                .map_err(KvmError::refused("tell the TSC frequency"))?,
            tsc: probe_tsc(fd),
            msrs: MsrSet::probe(kvm, fd)?,
        })
    }
}

/// Whether an offset that is set is an offset that is there.
fn probe_tsc(fd: &VcpuFd) -> TscControl {
    let Ok(before) = get_tsc_offset(fd) else {
        return TscControl::Msr;
    };
    let moved = before.wrapping_add(PROBE_TICKS);
    let taken = set_tsc_offset(fd, moved).is_ok() && get_tsc_offset(fd) == Ok(moved);
    match taken && set_tsc_offset(fd, before).is_ok() {
        true => TscControl::Offset,
        false => TscControl::Fixed,
    }
}

/// The MSRs that travel, in the order in which they are written.
#[derive(Clone, Debug)]
pub(super) struct MsrSet {
    indices: Vec<u32>,
    /// Those that say what the processor is, with what they say.
    features: BTreeMap<u32, u64>,
}

impl MsrSet {
    /// Tries all that KVM lists: read, and write the same value back.
    fn probe(kvm: &Kvm, fd: &VcpuFd) -> Result<Self, KvmError> {
        let listed = kvm
            .get_msr_index_list()
            .map_err(KvmError::refused("list the MSRs"))?;
        let travels = |index: &u32| {
            let one = entries(&[*index]);
            !HYPER_V_MSRS.contains(index)
                && read_batch(fd, &one).is_some_and(|value| set_batch(fd, &value) == Some(1))
        };
        let mut indices: Vec<_> = listed.as_slice().iter().copied().filter(travels).collect();
        // The timer is armed by the clock that it counts: after it.
        indices.sort_by_key(|&index| match index {
            MSR_IA32_TSC => 0,
            MSR_IA32_TSC_DEADLINE => 2,
            _ => 1,
        });
        let listed = kvm.get_msr_feature_index_list();
        let mut features = BTreeMap::new();
        for &index in listed.as_ref().map_or(&[][..], |list| list.as_slice()) {
            if indices.contains(&index) {
                features.insert(index, read_msr(fd, index)?);
            }
        }
        Ok(Self { indices, features })
    }

    pub(super) fn contains(&self, index: u32) -> bool {
        self.indices.contains(&index)
    }

    pub(super) fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether it says what the processor is, and so is never written.
    pub(super) fn is_feature(&self, index: u32) -> bool {
        self.features.contains_key(&index)
    }

    /// What it says, if that has to be the same on both hosts.
    pub(super) fn feature(&self, index: u32) -> Option<u64> {
        let feature = self.features.get(&index).copied();
        feature.filter(|_| index != MSR_IA32_UCODE_REV)
    }

    /// A batch that reads them all, to be used again and again.
    pub(super) fn batch(&self) -> Result<Msrs, KvmError> {
        Msrs::from_entries(&entries(&self.indices))
            .map_err(|_| KvmError::Lacks("room for its MSRs"))
    }
}

/// The value of one MSR.
pub(super) fn read_msr(fd: &VcpuFd, index: u32) -> Result<u64, KvmError> {
    let read = read_batch(fd, &entries(&[index])).ok_or(KvmError::Lacks("an MSR that it lists"))?;
    Ok(read[0].data)
}

/// Sets one MSR.
pub(super) fn write_msr(fd: &VcpuFd, index: u32, data: u64) -> Result<(), KvmError> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    write_msrs(fd, &[entry])
}

/// Sets all of them, or names the one that KVM refuses.
pub(super) fn write_msrs(fd: &VcpuFd, values: &[kvm_msr_entry]) -> Result<(), KvmError> {
    match set_batch(fd, values) {
        Some(n) if n == values.len() => Ok(()),
        Some(n) => Err(KvmError::RefusedMsr {
            index: values[n].index,
            data: values[n].data,
        }),
        None => Err(KvmError::Lacks("the MSRs of the record")),
    }
}

fn entries(indices: &[u32]) -> Vec<kvm_msr_entry> {
    indices
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect()
}

/// All values, or `None` when KVM does not give them all.
fn read_batch(fd: &VcpuFd, wanted: &[kvm_msr_entry]) -> Option<Vec<kvm_msr_entry>> {
    let mut batch = Msrs::from_entries(wanted).ok()?;
    let read = fd.get_msrs(&mut batch).ok()?;
    (read == wanted.len()).then(|| batch.as_slice().to_vec())
}

/// How many KVM took.
fn set_batch(fd: &VcpuFd, values: &[kvm_msr_entry]) -> Option<usize> {
    fd.set_msrs(&Msrs::from_entries(values).ok()?).ok()
}
