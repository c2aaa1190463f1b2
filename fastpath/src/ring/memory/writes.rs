//! What the host writes to guest RAM: who is asked before, and what is marked after (rule 15).
//!
//! Invariant: a page is marked after its bytes are there, and marks are taken before a page is copied, so no write is
//! missed.
//!
//! Does not know what KVM's own dirty log has seen.

use std::ops::RangeInclusive;
use std::sync::Weak;
use std::sync::atomic::{Ordering, compiler_fence};

use super::super::guard::WriteGuard;
use super::{GuestRam, PAGE_BYTES};

impl GuestRam {
    /// Switches the tracking of host writes. After `set_tracking(true)` returns, every write that a
    /// later copy could miss is marked. Switching off forgets the marks.
    pub fn set_tracking(&self, on: bool) {
        self.tracking.store(on, Ordering::SeqCst);
        // Pairs with the compiler fence in `mark_written`: a writer that still saw the old value
        // has its bytes in memory when this returns, so a copy that starts now has them.
        expedited_barrier();
        if !on {
            self.host_dirty.clear();
        }
    }

    /// Whether it is on.
    pub fn is_tracking(&self) -> bool {
        self.tracking.load(Ordering::Relaxed)
    }

    /// Gives the pages that the host wrote since the last call, as words of a bitmap (one bit a page) with their places, rising,
    /// and forgets them here.
    pub fn take_host_dirty(&self, each: impl FnMut(usize, u64)) {
        self.host_dirty.take(each);
    }

    /// Names who is asked before host writes, in place of who was. Only while unarmed.
    pub fn set_guard(&self, guard: Weak<dyn WriteGuard>) {
        self.guard.set(guard);
    }

    /// Switches the questions to the guard. It is switched on only while every thread that writes here
    /// stands still, and what lets it go on (a message, a lock) shows it the switch.
    pub fn arm_guard(&self, on: bool) {
        self.guard.arm(on);
    }

    /// Before the bytes of a range inside RAM are written. Unarmed, this is one relaxed load.
    #[inline]
    pub(in crate::ring) fn before_write(&self, gpa: u64, len: usize) {
        if self.guard.is_armed()
            && let Some(pages) = self.pages_of(gpa, len)
        {
            self.guard.ask(pages);
        }
    }

    /// Marks after the bytes are written: a copier takes the bitmap first and copies then, so a page
    /// it copied too early has its mark in the next round. Off, this is one relaxed load.
    #[inline]
    pub(in crate::ring) fn mark_written(&self, gpa: u64, len: usize) {
        compiler_fence(Ordering::SeqCst);
        if self.tracking.load(Ordering::Relaxed) && len > 0 {
            self.mark_range(gpa, len);
        }
    }

    /// The pages that a range touches; `None` for an empty one and outside RAM.
    fn pages_of(&self, gpa: u64, len: usize) -> Option<RangeInclusive<usize>> {
        let last_byte = len.checked_sub(1)?;
        let (region, at) = self.find(gpa, len).ok()?;
        let page = |at: usize| region.first_page + at / PAGE_BYTES;
        Some(page(at)..=page(at + last_byte))
    }

    #[cold]
    fn mark_range(&self, gpa: u64, len: usize) {
        let Some(pages) = self.pages_of(gpa, len) else {
            return;
        };
        for page in pages {
            self.host_dirty.add(page);
        }
    }
}

/// Once before the first barrier.
pub(super) fn register_barrier() {
    membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
}

/// A full memory barrier on every running thread of this process.
fn expedited_barrier() {
    if membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) != 0 {
        // Kernels before 4.14: slower, same effect.
        membarrier(libc::MEMBARRIER_CMD_GLOBAL);
    }
}

fn membarrier(command: libc::c_int) -> libc::c_long {
    // SAFETY: membarrier takes no pointers.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
}
