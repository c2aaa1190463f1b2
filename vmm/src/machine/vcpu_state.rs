//! All that a vCPU is, as a record, read from and written to KVM.
//!
//! Invariants: only MSRs that this KVM reads and takes back are in the record, found once per vCPU;
//! the order of writing is the one KVM's documentation and its users agree on (system registers
//! before MSRs, events last).
//!
//! Does not move clocks: a restored time stamp counter is the captured one.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use zerocopy::{FromBytes, IntoBytes};

use super::kvm::KvmError;
use super::record::{Kind, Reader, RecordError, Writer};

const KIND: Kind = Kind {
    name: "vCPU",
    magic: *b"CVCP",
    version: 1,
};
const MSRS_MAX: u32 = 4096;
/// The time stamp counter.
pub(super) const MSR_IA32_TSC: u32 = 0x10;

/// The 4096 bytes of `kvm_xsave`.
const XSAVE_WORDS: usize = 1024;

/// The state of one vCPU, stopped between two instructions.
#[derive(Clone)]
pub struct VcpuState {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    xsave: Box<[u32; XSAVE_WORDS]>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VcpuState {{ rip: {:#x}, .. }}", self.regs.rip)
    }
}

impl PartialEq for VcpuState {
    fn eq(&self, other: &Self) -> bool {
        self.to_bytes() == other.to_bytes()
    }
}

impl VcpuState {
    /// The instruction pointer.
    pub fn rip(&self) -> u64 {
        self.regs.rip
    }

    /// The record, little-endian as the KVM structures are on this architecture.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new(KIND);
        writer.bytes(self.regs.as_bytes());
        writer.bytes(self.sregs.as_bytes());
        writer.bytes(self.xsave.as_bytes());
        writer.bytes(self.xcrs.as_bytes());
        writer.bytes(self.debug.as_bytes());
        writer.bytes(self.events.as_bytes());
        writer.bytes(self.mp_state.as_bytes());
        writer.u32(self.msrs.len() as u32);
        for msr in &self.msrs {
            writer.u32(msr.index);
            writer.u64(msr.data);
        }
        writer.finish()
    }

    /// Reads a record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(KIND, bytes)?;
        let regs = plain(&mut reader)?;
        let sregs = plain(&mut reader)?;
        let xsave = Box::new(plain(&mut reader)?);
        let xcrs = plain(&mut reader)?;
        let debug = plain(&mut reader)?;
        let events = plain(&mut reader)?;
        let mp_state = plain(&mut reader)?;
        let count = reader.u32()?;
        if count > MSRS_MAX {
            return Err(reader.bad("number of MSRs"));
        }
        let mut msrs = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let (index, data) = (reader.u32()?, reader.u64()?);
            msrs.push(kvm_msr_entry {
                index,
                data,
                ..Default::default()
            });
        }
        reader.finish()?;
        Ok(Self {
            regs,
            sregs,
            xsave,
            xcrs,
            debug,
            events,
            mp_state,
            msrs,
        })
    }

    /// Reads everything from a vCPU that is stopped and has no I/O pending.
    pub(super) fn read(fd: &VcpuFd, msrs: &MsrSet) -> Result<Self, KvmError> {
        Ok(Self {
            // First: KVM may still inject an event that changes the rest.
            mp_state: fd
                .get_mp_state()
                .map_err(KvmError::refused("read mp_state"))?,
            regs: fd
                .get_regs()
                .map_err(KvmError::refused("read the registers"))?,
            sregs: fd
                .get_sregs()
                .map_err(KvmError::refused("read the system registers"))?,
            xsave: Box::new(
                fd.get_xsave()
                    .map_err(KvmError::refused("read xsave"))?
                    .region,
            ),
            xcrs: fd.get_xcrs().map_err(KvmError::refused("read xcrs"))?,
            debug: fd
                .get_debug_regs()
                .map_err(KvmError::refused("read the debug registers"))?,
            msrs: read_msrs(fd, &msrs.0)?,
            events: fd
                .get_vcpu_events()
                .map_err(KvmError::refused("read the vCPU events"))?,
        })
    }

    /// Writes everything to a vCPU that is stopped.
    pub(super) fn write(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        fd.set_mp_state(self.mp_state)
            .map_err(KvmError::refused("write mp_state"))?;
        fd.set_sregs(&self.sregs)
            .map_err(KvmError::refused("write the system registers"))?;
        fd.set_regs(&self.regs)
            .map_err(KvmError::refused("write the registers"))?;
        fd.set_xcrs(&self.xcrs)
            .map_err(KvmError::refused("write xcrs"))?;
        let xsave = kvm_xsave {
            region: *self.xsave,
            ..Default::default()
        };
        // SAFETY: the structure is 4096 bytes, which is what KVM reads as long as no dynamic
        // xsave feature was requested for the process, and none is.
        unsafe { fd.set_xsave(&xsave) }.map_err(KvmError::refused("write xsave"))?;
        fd.set_debug_regs(&self.debug)
            .map_err(KvmError::refused("write the debug registers"))?;
        write_msrs(fd, &never_back(fd, &self.msrs)?)?;
        fd.set_vcpu_events(&self.events)
            .map_err(KvmError::refused("write the vCPU events"))
    }
}

/// The same values, but for a TSC that already shows more than the record's: a guest's clock goes
/// forward only (rule 16).
fn never_back(fd: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let present = read_msr(fd, MSR_IA32_TSC)?;
    let mut msrs = msrs.to_vec();
    for tsc in msrs.iter_mut().filter(|m| m.index == MSR_IA32_TSC) {
        tsc.data = tsc.data.max(present);
    }
    Ok(msrs)
}

/// The MSRs that travel.
#[derive(Clone, Debug)]
pub(super) struct MsrSet(Vec<u32>);

impl MsrSet {
    /// Tries all that KVM lists: read, and write the same value back.
    pub(super) fn probe(kvm: &Kvm, fd: &VcpuFd) -> Result<Self, KvmError> {
        let listed = kvm
            .get_msr_index_list()
            .map_err(KvmError::refused("list the MSRs"))?;
        let travels = |index: &u32| {
            let one = entries(&[*index]);
            read_batch(fd, &one).is_some_and(|value| set_batch(fd, &value) == Some(1))
        };
        Ok(Self(
            listed.as_slice().iter().copied().filter(travels).collect(),
        ))
    }
}

/// The value of one MSR.
pub(super) fn read_msr(fd: &VcpuFd, index: u32) -> Result<u64, KvmError> {
    Ok(read_msrs(fd, &[index])?[0].data)
}

/// Sets one MSR.
pub(super) fn write_msr(fd: &VcpuFd, index: u32, data: u64) -> Result<(), KvmError> {
    write_msrs(
        fd,
        &[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }],
    )
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

fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    read_batch(fd, &entries(indices)).ok_or(KvmError::Lacks("an MSR that it lists"))
}

fn write_msrs(fd: &VcpuFd, values: &[kvm_msr_entry]) -> Result<(), KvmError> {
    match set_batch(fd, values) {
        Some(n) if n == values.len() => Ok(()),
        _ => Err(KvmError::Lacks("an MSR of the record")),
    }
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

fn plain<T: FromBytes>(reader: &mut Reader<'_>) -> Result<T, RecordError> {
    let bytes = reader.take(size_of::<T>())?;
    T::read_from_bytes(bytes).map_err(|_| RecordError::Length(KIND.name))
}
