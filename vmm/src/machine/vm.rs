//! One KVM virtual machine: its memory slots, its dirty log, its event descriptors.
//!
//! Invariants: RAM is a slot for each of its ranges, counted from 0, backed by [`GuestRam`], which this keeps
//! alive; a machine that may be replicated sees it through a mapping of its own ([`GuestView`]);
//! dirty logging is off unless asked for.
//!
//! Does not run vCPUs.

use std::sync::Arc;

use colo_fastpath::ring::GuestRam;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::kvm::{KvmError, open};
use super::vcpu_ioctl::enable_all_events;
use super::view::GuestView;
use crate::checkpoint::dirty::{DirtyChoice, DirtySettings, DirtyTracker};
use crate::checkpoint::pages::PageBitmap;

/// A KVM machine with its RAM.
#[derive(Debug)]
pub struct Vm {
    // Before the memory: the slot goes first.
    dirty: Arc<DirtyTracker>,
    fd: Arc<VmFd>,
    kvm: Kvm,
    view: Option<Arc<GuestView>>,
    ram: Arc<GuestRam>,
}

impl Vm {
    /// Makes a machine around `ram`; with settings for dirty tracking if it may be replicated.
    pub fn new(ram: Arc<GuestRam>, dirty: Option<DirtySettings>) -> Result<Self, KvmError> {
        if !ram.is_in_a_row() {
            return Err(KvmError::Lacks("guest memory in a row"));
        }
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
        let fd = Arc::new(fd);
        let view = dirty.and_then(|_| view_of(&ram)).map(Arc::new);
        // What is never logged needs no rings.
        let settings = dirty.unwrap_or(DirtySettings {
            choice: DirtyChoice::Bitmap,
            ..DirtySettings::default()
        });
        let dirty = DirtyTracker::new(fd.clone(), ram.clone(), settings)?;
        let vm = Self {
            dirty: Arc::new(dirty),
            fd,
            kvm,
            view,
            ram,
        };
        vm.set_slots(0)?;
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
        let vcpu = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(KvmError::refused("create a vCPU"))?;
        self.dirty.add_vcpu(&vcpu)?;
        Ok(vcpu)
    }

    /// What guest and host write.
    pub fn dirty(&self) -> &Arc<DirtyTracker> {
        &self.dirty
    }

    /// The guest's own mapping of its RAM, if it has one.
    pub fn view(&self) -> Option<&Arc<GuestView>> {
        self.view.as_ref()
    }

    /// Switches dirty logging of guest and host writes. Switching on starts from an empty log.
    pub fn set_dirty_logging(&self, on: bool) -> Result<(), KvmError> {
        self.dirty.switch(on, |on| {
            self.set_slots(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
        })
    }

    /// Adds to `set` what guest and host wrote since the last call, and starts the log anew. Only while logging is on.
    pub fn take_dirty(&self, set: &mut PageBitmap) -> Result<(), KvmError> {
        self.dirty.take(set)
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

    fn set_slots(&self, flags: u32) -> Result<(), KvmError> {
        let mut userspace_addr = match &self.view {
            Some(view) => view.address(),
            None => self.ram.host_address(),
        };
        for (slot, range) in (0..).zip(self.ram.ranges()) {
            let memory_size = range.end - range.start;
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: range.start,
                memory_size,
                userspace_addr,
            };
            userspace_addr += memory_size;
            // SAFETY: the ranges lie in a row in the mapping of `ram`, or in the view of the same size,
            // which `self` keeps until after the machine is closed; no slots overlap. Guest and host
            // both write there, the host only through GuestRam.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(KvmError::refused("set a memory slot (not enough memory?)"))?;
        }
        Ok(())
    }
}

/// Pages that the host has reserved are as large as they are, and cannot be protected one by one.
fn view_of(ram: &Arc<GuestRam>) -> Option<GuestView> {
    if ram.is_huge() {
        return None;
    }
    let view = GuestView::new(ram.clone());
    view.inspect_err(|e| tracing::warn!("captures are copied: no second mapping of RAM: {e}"))
        .ok()
}
