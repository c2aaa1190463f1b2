//! KVM's dirty rings, one for each vCPU (`Documentation/virt/kvm/api.rst`, section 8.29).
//!
//! Invariants: an entry goes from dirty to harvested here, once, and back to empty in the kernel by
//! `KVM_RESET_DIRTY_RINGS`, which protects its page again; what was harvested is in `pending` before that.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};

use super::Slot;
use crate::checkpoint::pages::PageBitmap;
use crate::machine::KvmError;

/// Bits of `kvm_dirty_gfn::flags`.
const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;

// _IO(KVMIO, 0xc7)
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = 0xaec7;

/// The mapping of one vCPU's ring. The kernel writes entries, this one their flags.
#[derive(Debug)]
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    /// Counts freely; the entry to look at next.
    next: u32,
}

// SAFETY: the mapping belongs to this structure alone, and all its accesses are behind `&mut self`.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, count: u32) -> Result<Self, KvmError> {
        // SAFETY: a fresh shared mapping of the vCPU's ring, which has `count` entries: so many were asked for when the
        // capability was enabled. The file stays open as long as it is mapped.
        let entries = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes_of(count),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096,
            )
        };
        let refused = || KvmError::refused("map a dirty ring")(kvm_ioctls::Error::last());
        if entries == libc::MAP_FAILED {
            return Err(refused());
        }
        Ok(Self {
            entries: NonNull::new(entries.cast()).ok_or_else(refused)?,
            count,
            next: 0,
        })
    }

    /// The next page written, as slot and number.
    fn pop(&mut self) -> Option<(u32, u64)> {
        let at = (self.next & (self.count - 1)) as usize;
        // SAFETY: `at` is below `count`, a power of two.
        let entry = unsafe { self.entries.as_ptr().add(at) };
        // SAFETY: inside the mapping; the kernel accesses the flags atomically, too.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        // Acquire: pairs with the kernel's release after it has written slot and offset.
        if flags.load(Ordering::Acquire) & (DIRTY | HARVESTED) != DIRTY {
            return None;
        }
        // SAFETY: the kernel does not touch an entry from dirty to harvested.
        let page = unsafe { ((*entry).slot, (*entry).offset) };
        // Release: the entry has been read when the kernel sees it harvested.
        flags.store(HARVESTED, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(page)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`, unmapped once, with no reference left.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), bytes_of(self.count)) };
    }
}

fn bytes_of(count: u32) -> usize {
    count as usize * size_of::<kvm_dirty_gfn>()
}

#[derive(Debug)]
pub(super) struct Rings {
    rings: Vec<Ring>,
    entries: u32,
    slots: Vec<Slot>,
    /// Collected, not taken yet.
    pending: PageBitmap,
}

impl Rings {
    pub(super) fn new(entries: u32, slots: Vec<Slot>, pages: usize) -> Self {
        Self {
            rings: Vec::new(),
            entries,
            slots,
            pending: PageBitmap::new(pages),
        }
    }

    pub(super) fn map(&mut self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        self.rings.push(Ring::map(vcpu, self.entries)?);
        Ok(())
    }

    /// Empties the rings into `pending` and protects the pages again.
    pub(super) fn collect(&mut self, fd: &VmFd) -> Result<(), KvmError> {
        let mut harvested = 0;
        for ring in &mut self.rings {
            while let Some((slot, page)) = ring.pop() {
                harvested += 1;
                // The address space is in the upper half: writes in system management mode count as well.
                let number = slot & 0xffff;
                let Some(slot) = self.slots.iter().find(|s| s.number == number) else {
                    continue;
                };
                let page = slot.first_page + page as usize;
                self.pending.add(page / 64, 1 << (page % 64));
            }
        }
        match harvested {
            0 => Ok(()),
            _ => reset(fd),
        }
    }

    /// Adds the pages written to `set`; gives how many they are.
    pub(super) fn take(&mut self, fd: &VmFd, set: &mut PageBitmap) -> Result<u64, KvmError> {
        self.collect(fd)?;
        let mut pages = 0;
        for (at, word) in self.pending.set_words() {
            set.add(at, word);
            pages += u64::from(word.count_ones());
        }
        self.pending.clear();
        Ok(pages)
    }

    /// Empties rings and set.
    pub(super) fn forget(&mut self, fd: &VmFd) -> Result<(), KvmError> {
        self.collect(fd)?;
        self.pending.clear();
        Ok(())
    }
}

/// Gives the harvested entries back to the kernel.
fn reset(fd: &VmFd) -> Result<(), KvmError> {
    loop {
        // SAFETY: the request takes no argument.
        if unsafe { libc::ioctl(fd.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) } >= 0 {
            return Ok(());
        }
        let error = kvm_ioctls::Error::last();
        // A vCPU thread that collects may be kicked meanwhile; what is left is reset by the next call.
        if error.errno() != libc::EINTR {
            return Err(KvmError::refused("give back dirty ring entries")(error));
        }
    }
}
