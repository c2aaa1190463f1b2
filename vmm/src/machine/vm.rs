//! One KVM virtual machine: its memory slot, its dirty log, its event descriptors.
//!
//! Invariants: RAM is one slot at guest physical address 0, backed by [`GuestRam`], which this keeps
//! alive; dirty logging is off unless asked for.
//!
//! Does not run vCPUs.

use std::sync::Arc;

use colo_fastpath::ring::GuestRam;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::kvm::{KvmError, open};
use super::vcpu_ioctl::enable_all_events;

const RAM_SLOT: u32 = 0;

/// A KVM machine with its RAM.
#[derive(Debug)]
pub struct Vm {
    // Before `ram`: the slot goes first.
    fd: VmFd,
    kvm: Kvm,
    ram: Arc<GuestRam>,
}

impl Vm {
    /// Makes a machine around `ram`.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, KvmError> {
        let kvm = open()?;
        let fd = kvm
            .create_vm()
            .map_err(KvmError::refused("create a machine"))?;
        // Some Intel hosts need a place for a task state segment; it lies above all RAM.
        if kvm.check_extension(kvm_ioctls::Cap::SetTssAddr) {
            fd.set_tss_address(0xfffb_d000)
                .map_err(KvmError::refused("place the TSS"))?;
        }
        enable_all_events(&fd);
        let vm = Self { fd, kvm, ram };
        vm.set_slot(0)?;
        Ok(vm)
    }

    /// Guest memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(super) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    pub(super) fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(KvmError::refused("create a vCPU"))
    }

    /// Switches dirty logging of guest and host writes. Switching on starts from an empty log.
    pub fn set_dirty_logging(&self, on: bool) -> Result<(), KvmError> {
        self.set_slot(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        self.ram.set_tracking(on);
        Ok(())
    }

    /// Adds to `bitmap` (one bit a page, [`GuestRam::bitmap_words`] words) what guest and host wrote
    /// since the last call, and starts the log anew. Only while logging is on.
    pub fn take_dirty(&self, bitmap: &mut [u64]) -> Result<(), KvmError> {
        let bytes = self.ram.bytes() as usize;
        let log = self
            .fd
            .get_dirty_log(RAM_SLOT, bytes)
            .map_err(KvmError::refused("read the dirty log (is logging on?)"))?;
        for (out, word) in bitmap.iter_mut().zip(log) {
            *out |= word;
        }
        self.ram.take_host_dirty(bitmap);
        Ok(())
    }

    /// Connects writes of any width to `gpa` with an eventfd: no exit to user space.
    pub fn add_ioeventfd(&self, gpa: u64, event: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(KvmError::refused("register an ioeventfd"))
    }

    /// The same for 32-bit writes of this value only.
    pub fn add_ioeventfd_for(&self, gpa: u64, value: u32, event: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(gpa), value)
            .map_err(KvmError::refused("register an ioeventfd"))
    }

    fn set_slot(&self, flags: u32) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: RAM_SLOT,
            flags,
            guest_phys_addr: 0,
            memory_size: self.ram.bytes(),
            userspace_addr: self.ram.host_address(),
        };
        // SAFETY: the range is the whole mapping of `ram`, which `self` keeps until after the
        // machine is closed; no other slot overlaps. Guest and host both write there, the host only
        // through GuestRam.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(KvmError::refused(
            "set the memory slot (not enough memory?)",
        ))
    }
}
