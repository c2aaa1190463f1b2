//! The memory of one split queue, found and checked once: descriptor table, available ring, used ring
//! (virtio 1.3 section 2.7.5 to 2.7.8).
//!
//! Invariants: every pointer here has its whole part behind it, inside guest RAM that this keeps
//! mapped, at the part's alignment; entries are addressed modulo the size, so no access leaves a part;
//! the guest may write any of it at any time, so access is by atomics and no reference is made. Host
//! writes are asked for and marked as all others are (rule 15).
//!
//! Does not judge what it reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::error::RingError;
use super::memory::GuestRam;
use super::virtqueue::QueueState;

/// Bytes of one descriptor.
pub(super) const DESCRIPTOR_BYTES: u64 = 16;

/// A descriptor, read once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    /// From its two little-endian halves.
    #[inline]
    pub(super) fn from_halves(addr: u64, rest: u64) -> Self {
        let (addr, rest) = (u64::from_le(addr), u64::from_le(rest));
        Self {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

/// Where a queue lies.
#[derive(Debug)]
pub(super) struct SplitRing {
    ram: Arc<GuestRam>,
    descriptors: *mut u64,
    avail: *mut u16,
    used: *mut u32,
    used_gpa: u64,
    size: usize,
}

// SAFETY: the pointers lead into guest RAM, which `ram` keeps mapped and which is shared with the guest
// anyway; all access is atomic.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Finds the parts of a queue; its size must be a power of two.
    pub(super) fn new(ram: Arc<GuestRam>, state: &QueueState) -> Result<Self, RingError> {
        let entries = u64::from(state.size);
        let find = |part, gpa: u64, bytes: u64, align: u64| {
            let fits = |at: &*mut u8| {
                gpa.is_multiple_of(align) && at.addr().is_multiple_of(align as usize)
            };
            let found = ram.host_range(gpa, bytes as usize).ok().filter(fits);
            found.ok_or(RingError::BadLayout { part, gpa })
        };
        let descriptors = find(
            "descriptor table",
            state.descriptors,
            DESCRIPTOR_BYTES * entries,
            16,
        )?;
        let avail = find("available ring", state.avail, 6 + 2 * entries, 2)?;
        let used = find("used ring", state.used, 6 + 8 * entries, 4)?;
        Ok(Self {
            descriptors: descriptors.cast(),
            avail: avail.cast(),
            used: used.cast(),
            used_gpa: state.used,
            size: state.size.into(),
            ram,
        })
    }

    /// The guest's memory.
    #[inline]
    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// `avail->idx`. Acquire: entries and descriptors are read after the index that covers them.
    #[inline]
    pub(super) fn avail_idx(&self) -> u16 {
        self.avail_word(1, Ordering::Acquire)
    }

    /// `avail->flags`
    #[inline]
    pub(super) fn avail_flags(&self) -> u16 {
        self.avail_word(0, Ordering::Relaxed)
    }

    /// `avail->ring` at an index that runs freely.
    #[inline]
    pub(super) fn avail_entry(&self, index: u16) -> u16 {
        self.avail_word(2 + self.slot(index), Ordering::Relaxed)
    }

    /// `used_event`, behind the available ring.
    #[inline]
    pub(super) fn used_event(&self) -> u16 {
        self.avail_word(2 + self.size, Ordering::Relaxed)
    }

    /// A descriptor of the table; `None` when the number is none of it.
    #[inline]
    pub(super) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if usize::from(index) >= self.size {
            return None;
        }
        let at = 2 * usize::from(index);
        Some(Descriptor::from_halves(
            self.descriptor_half(at),
            self.descriptor_half(at + 1),
        ))
    }

    /// Where a descriptor lies, for hints only.
    #[inline]
    pub(super) fn descriptor_address(&self, index: u16) -> *const u8 {
        self.descriptors
            .wrapping_add(2 * usize::from(index))
            .cast_const()
            .cast()
    }

    /// Writes `used->ring` at an index that runs freely.
    #[inline]
    pub(super) fn write_used(&self, index: u16, head: u16, written: u32) {
        let at = 1 + 2 * self.slot(index);
        self.ram.before_write(self.used_gpa + 4 * at as u64, 8);
        self.store_used(at, u32::from(head));
        self.store_used(at + 1, written);
        self.ram.mark_written(self.used_gpa + 4 * at as u64, 8);
    }

    /// Writes `used->idx`. Release: the entries come first.
    #[inline]
    pub(super) fn publish_used(&self, index: u16) {
        self.store_used_half(1, index, Ordering::Release);
    }

    /// Writes `used->flags`.
    pub(super) fn write_used_flags(&self, flags: u16) {
        self.store_used_half(0, flags, Ordering::Relaxed);
    }

    /// Writes `avail_event`, behind the used ring.
    pub(super) fn write_avail_event(&self, index: u16) {
        self.store_used_half(2 + 4 * self.size, index, Ordering::Relaxed);
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index) & (self.size - 1)
    }

    /// Word `at` of the available ring, at most `size + 2`.
    #[inline]
    fn avail_word(&self, at: usize, order: Ordering) -> u16 {
        debug_assert!(at <= self.size + 2);
        // SAFETY: the ring has `size + 3` words from an even address on (`new`).
        let word = unsafe { AtomicU16::from_ptr(self.avail.add(at)) };
        u16::from_le(word.load(order))
    }

    /// Half `at` of the descriptor table, below `2 * size`.
    #[inline]
    fn descriptor_half(&self, at: usize) -> u64 {
        debug_assert!(at < 2 * self.size);
        // SAFETY: the table has `2 * size` halves from a multiple of 16 on (`new`).
        let half = unsafe { AtomicU64::from_ptr(self.descriptors.add(at)) };
        half.load(Ordering::Relaxed)
    }

    /// Double word `at` of the used ring, below `1 + 2 * size`.
    #[inline]
    fn store_used(&self, at: usize, value: u32) {
        debug_assert!(at <= 2 * self.size);
        // SAFETY: the ring has `1 + 2 * size` double words, and half of one, from a multiple of 4 on
        // (`new`).
        let word = unsafe { AtomicU32::from_ptr(self.used.add(at)) };
        word.store(value.to_le(), Ordering::Relaxed);
    }

    /// Word `at` of the used ring, at most `2 + 4 * size`.
    #[inline]
    fn store_used_half(&self, at: usize, value: u16, order: Ordering) {
        debug_assert!(at <= 2 + 4 * self.size);
        // SAFETY: the ring has `3 + 4 * size` words from a multiple of 4 on (`new`).
        let word = unsafe { AtomicU16::from_ptr(self.used.cast::<u16>().add(at)) };
        self.ram.before_write(self.used_gpa + 2 * at as u64, 2);
        word.store(value.to_le(), order);
        self.ram.mark_written(self.used_gpa + 2 * at as u64, 2);
    }
}
