//! All that a vCPU is, read from and written to KVM.
//!
//! Invariants: reading into a state that was made for the vCPU takes no memory; the order of writing is
//! the one that KVM's parts need: system registers and nested state before registers, XCR0 before
//! xsave, the local APIC before the MSRs, the clock before the timer that it runs, events last.
//!
//! Does not know the bytes of a record; `vcpu_record` does. Does not decide what time it is; `clock`
//! does.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};

use super::clock::{TscControl, TscState, realtime_ns};
use super::kvm::KvmError;
use super::vcpu_ioctl::{
    get_sregs2, get_tsc_offset, get_xsave2, set_sregs2, set_tsc_offset, set_xsave,
};
use super::vcpu_shape::{MSR_IA32_TSC, VcpuShape, write_msrs};

/// Nested virtualisation is in use: VMX on (CR4), SVM on (EFER).
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// MSRs through which a guest gives its hypervisor memory (kvmclock, steal time, asynchronous page
/// faults, end of interrupt): the KVM documentation, `msr.rst`.
const PARAVIRTUAL_MSRS: [u32; 2] = [0x11, 0x12];
const PARAVIRTUAL_MSR_RANGE: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// The state of one vCPU, stopped between two instructions.
#[derive(Clone)]
pub struct VcpuState {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs2,
    pub(super) xsave: Vec<u32>,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debug: kvm_debugregs,
    pub(super) events: kvm_vcpu_events,
    pub(super) mp_state: kvm_mp_state,
    /// Without the time stamp counter, which is in `tsc`.
    pub(super) msrs: Vec<kvm_msr_entry>,
    pub(super) tsc: TscState,
    /// Where the interrupt controller is in the kernel.
    pub(super) lapic: Option<Box<kvm_lapic_state>>,
    /// Where the guest is a hypervisor itself.
    pub(super) nested: Option<Box<KvmNestedStateBuffer>>,
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

/// What a restored vCPU does with its clock.
#[derive(Clone, Copy, Debug)]
pub(super) enum TscTarget {
    /// This offset to the host's.
    Offset(u64),
    /// The MSR, where there is no offset to be set.
    Value(u64),
    /// It stays: it cannot be set, or nobody will look at it.
    Leave,
}

impl VcpuState {
    /// All zeroes, with room for what a vCPU has.
    pub(super) fn empty(shape: &VcpuShape) -> Self {
        Self {
            regs: kvm_regs::default(),
            sregs: kvm_sregs2::default(),
            xsave: vec![0; shape.xsave_words],
            xcrs: kvm_xcrs::default(),
            debug: kvm_debugregs::default(),
            events: kvm_vcpu_events::default(),
            mp_state: kvm_mp_state::default(),
            msrs: Vec::with_capacity(shape.msrs.len()),
            tsc: TscState::default(),
            lapic: shape.lapic.then(Box::default),
            nested: None,
        }
    }

    /// The instruction pointer.
    pub fn rip(&self) -> u64 {
        self.regs.rip
    }

    /// Changes a register, for tests of who looks for changes.
    #[cfg(test)]
    pub(crate) fn nudge_register(&mut self) {
        self.regs.r13 ^= 1;
    }

    /// Makes it one that KVM refuses: long mode without paging.
    #[cfg(test)]
    pub(crate) fn spoil(&mut self) {
        self.sregs.cr0 = 0x11;
    }

    /// Changes an MSR, likewise.
    #[cfg(test)]
    pub(crate) fn nudge_msr(&mut self, index: u32) {
        let msr = self.msrs.iter_mut().find(|msr| msr.index == index);
        msr.expect("an MSR that travels").data ^= 1;
    }

    /// Changes the clock, likewise.
    #[cfg(test)]
    pub(crate) fn nudge_clock(&mut self) {
        self.tsc.value += 1;
        self.tsc.realtime_ns += 1;
    }

    /// A state of its own.
    pub(super) fn read(fd: &VcpuFd, shape: &VcpuShape) -> Result<Self, KvmError> {
        let mut state = Self::empty(shape);
        state.read_from(fd, shape, &mut shape.msrs.batch()?)?;
        Ok(state)
    }

    /// Reads everything from a vCPU that is stopped and has no I/O pending. `self` and `batch` were made
    /// for `shape`.
    pub(super) fn read_from(
        &mut self,
        fd: &VcpuFd,
        shape: &VcpuShape,
        batch: &mut Msrs,
    ) -> Result<(), KvmError> {
        // First: KVM may still inject an event that changes the rest.
        self.mp_state = fd
            .get_mp_state()
            .map_err(KvmError::refused("read mp_state"))?;
        self.regs = fd
            .get_regs()
            .map_err(KvmError::refused("read the registers"))?;
        self.sregs = read_sregs(fd, shape)?;
        self.read_xsave(fd, shape)?;
        self.xcrs = fd.get_xcrs().map_err(KvmError::refused("read xcrs"))?;
        self.debug = fd
            .get_debug_regs()
            .map_err(KvmError::refused("read the debug registers"))?;
        if let Some(lapic) = &mut self.lapic {
            **lapic = fd
                .get_lapic()
                .map_err(KvmError::refused("read the local APIC"))?;
        }
        self.read_msrs(fd, shape, batch)?;
        self.read_nested(fd, shape)?;
        self.events = fd
            .get_vcpu_events()
            .map_err(KvmError::refused("read the vCPU events"))?;
        Ok(())
    }

    fn read_xsave(&mut self, fd: &VcpuFd, shape: &VcpuShape) -> Result<(), KvmError> {
        let refused = KvmError::refused("read xsave");
        if shape.xsave2 {
            return get_xsave2(fd, &mut self.xsave).map_err(refused);
        }
        self.xsave
            .copy_from_slice(&fd.get_xsave().map_err(refused)?.region);
        Ok(())
    }

    fn read_msrs(
        &mut self,
        fd: &VcpuFd,
        shape: &VcpuShape,
        batch: &mut Msrs,
    ) -> Result<(), KvmError> {
        let read = fd
            .get_msrs(batch)
            .map_err(KvmError::refused("read the MSRs"))?;
        let values = batch.as_slice();
        self.tsc.realtime_ns = realtime_ns();
        if read != values.len() {
            return Err(KvmError::Lacks("an MSR that it lists"));
        }
        self.msrs.clear();
        for value in values {
            match value.index {
                MSR_IA32_TSC => self.tsc.value = value.data,
                _ => self.msrs.push(*value),
            }
        }
        self.tsc.khz = shape.tsc_khz;
        // Only what can be set can have changed.
        self.tsc.offset = match shape.tsc {
            TscControl::Offset => {
                Some(get_tsc_offset(fd).map_err(KvmError::refused("tell the TSC offset"))?)
            }
            TscControl::Fixed => Some(0),
            TscControl::Msr => None,
        };
        Ok(())
    }

    /// Takes memory, once, where the guest is a hypervisor.
    fn read_nested(&mut self, fd: &VcpuFd, shape: &VcpuShape) -> Result<(), KvmError> {
        let in_use = self.sregs.cr4 & CR4_VMXE != 0 || self.sregs.efer & EFER_SVME != 0;
        if !in_use {
            self.nested = None;
            return Ok(());
        }
        if !shape.nested {
            return Err(KvmError::NotCapturable("nested virtualisation"));
        }
        let buffer = self
            .nested
            .get_or_insert_with(|| Box::new(KvmNestedStateBuffer::empty()));
        **buffer = KvmNestedStateBuffer::empty();
        fd.nested_state(buffer)
            .map_err(KvmError::refused("read the nested state"))?;
        Ok(())
    }

    /// Writes everything to a vCPU that is stopped.
    pub(super) fn write(
        &self,
        fd: &VcpuFd,
        shape: &VcpuShape,
        tsc: TscTarget,
    ) -> Result<(), KvmError> {
        write_sregs(fd, shape, &self.sregs, &self.events)?;
        if let Some(nested) = &self.nested {
            fd.set_nested_state(nested)
                .map_err(KvmError::refused("write the nested state"))?;
        }
        self.write_registers(fd)?;
        if let Some(lapic) = &self.lapic {
            fd.set_lapic(lapic)
                .map_err(KvmError::refused("write the local APIC"))?;
        }
        self.write_tsc(fd, tsc)?;
        let writable = |msr: &&kvm_msr_entry| !shape.msrs.is_feature(msr.index);
        let msrs: Vec<_> = self.msrs.iter().filter(writable).copied().collect();
        write_msrs(fd, &msrs)?;
        self.write_events(fd)?;
        // Tells a guest with a kvmclock that it did not hang; there may be none.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }

    /// Writes what a vCPU without memory takes, to see whether KVM refuses any of it.
    pub(super) fn rehearse(&self, fd: &VcpuFd, shape: &VcpuShape) -> Result<(), KvmError> {
        write_sregs(fd, shape, &self.sregs, &self.events)?;
        self.write_registers(fd)?;
        if let Some(lapic) = &self.lapic {
            fd.set_lapic(lapic)
                .map_err(KvmError::refused("write the local APIC"))?;
        }
        let needs_memory = |index: u32| {
            PARAVIRTUAL_MSRS.contains(&index) || PARAVIRTUAL_MSR_RANGE.contains(&index)
        };
        let taken = |m: &&kvm_msr_entry| !shape.msrs.is_feature(m.index) && !needs_memory(m.index);
        let msrs: Vec<_> = self.msrs.iter().filter(taken).copied().collect();
        write_msrs(fd, &msrs)?;
        self.write_events(fd)
    }

    fn write_registers(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        fd.set_regs(&self.regs)
            .map_err(KvmError::refused("write the registers"))?;
        fd.set_xcrs(&self.xcrs)
            .map_err(KvmError::refused("write xcrs"))?;
        set_xsave(fd, &self.xsave).map_err(KvmError::refused("write xsave"))?;
        fd.set_debug_regs(&self.debug)
            .map_err(KvmError::refused("write the debug registers"))
    }

    fn write_tsc(&self, fd: &VcpuFd, target: TscTarget) -> Result<(), KvmError> {
        match target {
            TscTarget::Offset(offset) => {
                set_tsc_offset(fd, offset).map_err(KvmError::refused("set the TSC offset"))
            }
            TscTarget::Value(data) => write_msrs(
                fd,
                &[kvm_msr_entry {
                    index: MSR_IA32_TSC,
                    data,
                    ..Default::default()
                }],
            ),
            TscTarget::Leave => Ok(()),
        }
    }

    fn write_events(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        fd.set_vcpu_events(&self.events)
            .map_err(KvmError::refused("write the vCPU events"))?;
        fd.set_mp_state(self.mp_state)
            .map_err(KvmError::refused("write mp_state"))
    }
}

fn read_sregs(fd: &VcpuFd, shape: &VcpuShape) -> Result<kvm_sregs2, KvmError> {
    let refused = KvmError::refused("read the system registers");
    if shape.sregs2 {
        return get_sregs2(fd).map_err(refused);
    }
    // An interrupt that this has besides is in the vCPU events, too.
    Ok(sregs2_of(&fd.get_sregs().map_err(refused)?))
}

fn write_sregs(
    fd: &VcpuFd,
    shape: &VcpuShape,
    sregs: &kvm_sregs2,
    events: &kvm_vcpu_events,
) -> Result<(), KvmError> {
    let refused = KvmError::refused("write the system registers");
    if shape.sregs2 {
        return set_sregs2(fd, sregs).map_err(refused);
    }
    let mut sregs = sregs1_of(sregs);
    if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
        let vector = events.interrupt.nr;
        sregs.interrupt_bitmap[usize::from(vector / 64)] = 1 << (vector % 64);
    }
    fd.set_sregs(&sregs).map_err(refused)
}

/// The common part, without PDPTRs.
pub(super) fn sregs2_of(s: &kvm_sregs) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        ..Default::default()
    }
}

/// The common part, without interrupts.
pub(super) fn sregs1_of(s: &kvm_sregs2) -> kvm_sregs {
    kvm_sregs {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: [0; 4],
    }
}
