//! Host memory for copies of guest pages: reserved once, touched in advance, used from the start for each capture.
//!
//! Invariants: a slot is given out once between two resets, so whoever has it may write it; a slot is read only when its
//! number was published after it was written; nothing is given out beyond the limit.
//!
//! Does not know which page a slot holds.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::checkpoint::channel::Keeper;
use crate::checkpoint::pages::PAGE_BYTES;

/// Pages that are made ready with one call.
const WARM_STEP_PAGES: usize = 1024;

/// Slots in a row that one caller may write. Not `Clone`: it is the right to do so.
#[derive(Debug)]
pub(super) struct Slots {
    first: u32,
    count: u32,
}

impl Slots {
    pub(super) fn first(&self) -> u32 {
        self.first
    }
}

#[derive(Debug)]
pub(super) struct Arena {
    base: NonNull<u8>,
    limit: u32,
    next: AtomicU32,
    /// Touched in advance: writing there meets no page fault.
    warm: AtomicU32,
}

// SAFETY: slots are written by whoever holds their token, and read after publication (see the invariants).
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// For at most `limit` pages. Costs no memory yet.
    pub(super) fn new(limit: u32) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let bytes = limit.max(1) as usize * PAGE_BYTES;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: MADV_HUGEPAGE changes how the range just mapped is backed; a refusal is of no consequence.
        unsafe { libc::madvise(base, bytes, libc::MADV_HUGEPAGE) };
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            limit: limit.max(1),
            next: AtomicU32::new(0),
            warm: AtomicU32::new(0),
        })
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    pub(super) fn warm(&self) -> u32 {
        self.warm.load(Ordering::Relaxed)
    }

    /// Touches memory for so many pages, as far as the limit allows, so that a capture finds it ready.
    pub(super) fn warm_up(&self, pages: u32) {
        let (from, to) = (self.warm(), pages.min(self.limit));
        if to <= from {
            return;
        }
        // In steps: each call keeps other threads of this process from changing mappings.
        for first in (from..to).step_by(WARM_STEP_PAGES) {
            let at = self.base.as_ptr().wrapping_add(first as usize * PAGE_BYTES);
            let bytes = (to - first).min(WARM_STEP_PAGES as u32) as usize * PAGE_BYTES;
            // SAFETY: the range lies in our mapping; MADV_POPULATE_WRITE keeps what is in it. Where the kernel does not
            // know it (before 5.14) the pages come when they are written.
            unsafe { libc::madvise(at.cast(), bytes, libc::MADV_POPULATE_WRITE) };
        }
        self.warm.store(to, Ordering::Relaxed);
    }

    /// Slots in a row, if `keep` are left then.
    pub(super) fn take(&self, count: u32, keep: u32) -> Option<Slots> {
        let fits = |next: u32| {
            let end = next.checked_add(count)?;
            (end.checked_add(keep)? <= self.limit).then_some(end)
        };
        let first = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        first.ok().map(|first| Slots { first, count })
    }

    /// The bytes of slots, to be written by their owner.
    pub(super) fn bytes_mut<'a>(&'a self, slots: &'a mut Slots) -> &'a mut [u8] {
        let len = slots.count as usize * PAGE_BYTES;
        // SAFETY: the slots lie below the limit, and this token is the only right to them: nobody else reads or writes.
        unsafe { std::slice::from_raw_parts_mut(self.at(slots.first), len) }
    }

    /// The page in a slot that its owner has written and published.
    pub(super) fn page(&self, slot: u32) -> &[u8; PAGE_BYTES] {
        assert!(slot < self.limit);
        // SAFETY: the slot lies in the mapping, which lives as long as `self`; after publication nobody writes it until
        // the reset, which comes when no capture reads any more.
        unsafe { &*self.at(slot).cast::<[u8; PAGE_BYTES]>() }
    }

    /// Slots in a row that their owners have written and published; nothing of slots that there are not.
    pub(super) fn pages(&self, slots: Range<u32>) -> &[u8] {
        let count = slots.end.min(self.limit).saturating_sub(slots.start);
        // SAFETY: the slots lie in the mapping; otherwise as in `page`.
        unsafe { std::slice::from_raw_parts(self.at(slots.start), count as usize * PAGE_BYTES) }
    }

    /// Takes all slots back. Only when no capture and no writer of one uses any.
    pub(super) fn reset(&self) {
        self.next.store(0, Ordering::Relaxed);
    }

    /// Slots given out since the reset.
    pub(super) fn used(&self) -> u32 {
        self.next.load(Ordering::Relaxed)
    }

    fn at(&self, slot: u32) -> *mut u8 {
        self.base.as_ptr().wrapping_add(slot as usize * PAGE_BYTES)
    }
}

// SAFETY: a slot's place in the mapping, which lives as long as the arena, never changes; slots are written again only after
// the reset, which comes when no capture reads any more, and a capture is kept until the channel has settled.
unsafe impl Keeper for Arena {
    fn bytes(&self, slots: Range<u32>) -> &[u8] {
        self.pages(slots)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let bytes = self.limit as usize * PAGE_BYTES;
        // SAFETY: the mapping made in `new`, with no reference left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_given_out_once_and_up_to_the_limit() {
        let arena = Arena::new(10).unwrap();
        arena.warm_up(100);
        assert_eq!(arena.warm(), 10);
        let mut first = arena.take(4, 0).unwrap();
        let mut second = arena.take(4, 2).unwrap();
        assert!(arena.take(1, 2).is_none(), "two are kept");
        assert!(arena.take(3, 0).is_none());
        arena.bytes_mut(&mut first).fill(1);
        arena.bytes_mut(&mut second).fill(2);
        assert_eq!((arena.page(3)[4095], arena.page(4)[0]), (1, 2));
        let both = arena.pages(3..5);
        assert_eq!((both.len(), both[4095], both[4096]), (8192, 1, 2));
        assert!(arena.pages(10..12).is_empty() && arena.pages(9..12).len() == 4096);
        assert_eq!(arena.take(2, 0).unwrap().first(), 8);
        assert_eq!(arena.used(), 10);
        arena.reset();
        assert_eq!(arena.take(10, 0).unwrap().first(), 0);
        assert!(arena.take(u32::MAX, u32::MAX).is_none());
    }
}
