//! The four rings of a socket: single producer, single consumer, of which one is the kernel.
//!
//! Invariants: an entry is written before its index is published with release ordering, and read
//! after the other side's index was loaded with acquire ordering; an index of the kernel that is
//! further ahead or behind than the ring is long counts as no room and no entries.
//!
//! Does not know what the entries mean.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::sys::Mapping;

/// An entry of a ring: any bit pattern is valid.
pub(super) trait Entry: Copy {}
impl Entry for u64 {}
impl Entry for libc::xdp_desc {}

#[derive(Debug)]
struct Ring<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    size: u32,
    /// Keeps the pointers above valid.
    _mapping: Mapping,
}

// SAFETY: the pointers go into a mapping that moves with them, and only the owner's thread uses
// them on this side.
unsafe impl<T: Entry> Send for Ring<T> {}

impl<T: Entry> Ring<T> {
    fn map(
        fd: BorrowedFd<'_>,
        page_offset: libc::off_t,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let bytes = offsets.desc as usize + size as usize * size_of::<T>();
        let mapping = Mapping::new(fd, page_offset, bytes)?;
        let place = || {
            Some((
                mapping.at(offsets.producer, 1)?,
                mapping.at(offsets.consumer, 1)?,
                mapping.at(offsets.flags, 1)?,
                mapping.at(offsets.desc, size)?,
            ))
        };
        let (producer, consumer, flags, entries) = place().ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self {
            producer,
            consumer,
            flags,
            entries,
            size,
            _mapping: mapping,
        })
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: inside the mapping, aligned, alive with `self`; the kernel only accesses it
        // atomically.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as for the producer.
        unsafe { self.consumer.as_ref() }
    }

    fn wakeup_wanted(&self) -> bool {
        // Our index must be visible before the flag is read, or both sides go to sleep: the kernel
        // sets the flag and then looks at the index once more.
        fence(Ordering::SeqCst);
        // SAFETY: as for the producer.
        let flags = unsafe { self.flags.as_ref() };
        flags.load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }

    fn slot(&self, index: u32) -> NonNull<T> {
        // SAFETY: the masked index is below `size`, and `size` entries lie in the mapping.
        unsafe { self.entries.add((index & (self.size - 1)) as usize) }
    }
}

/// The side that puts entries in: fill and tx.
#[derive(Debug)]
pub(super) struct Producer<T> {
    ring: Ring<T>,
    /// Next entry to write. Beyond the published index by what is not submitted.
    next: u32,
    published: u32,
    /// The kernel's index as last seen.
    consumed: u32,
}

impl<T: Entry> Producer<T> {
    pub(super) fn map(
        fd: BorrowedFd<'_>,
        page_offset: libc::off_t,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let ring = Ring::map(fd, page_offset, offsets, size)?;
        let next = ring.producer().load(Ordering::Relaxed);
        let consumed = ring.consumer().load(Ordering::Acquire);
        Ok(Self {
            ring,
            next,
            published: next,
            consumed,
        })
    }

    /// How many entries can be pushed; looks at the kernel's index when it knows of fewer than
    /// `wanted`.
    pub(super) fn free(&mut self, wanted: u32) -> u32 {
        let known = self.known_free();
        if known >= wanted {
            return known;
        }
        // Pairs with the kernel's release of the entries it has read.
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.known_free()
    }

    fn known_free(&self) -> u32 {
        let filled = self.next.wrapping_sub(self.consumed);
        self.ring.size.saturating_sub(filled)
    }

    /// Writes an entry that the kernel sees after [`Producer::submit`]; `false` when there is no
    /// room.
    pub(super) fn push(&mut self, entry: T) -> bool {
        if self.free(1) == 0 {
            return false;
        }
        // SAFETY: the slot is in the mapping and the kernel does not read it before it is
        // published, having given it back as seen by the acquire in `free`.
        unsafe { self.ring.slot(self.next).write(entry) };
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Entries that are not submitted.
    pub(super) fn unsubmitted(&self) -> u32 {
        self.next.wrapping_sub(self.published)
    }

    /// Publishes what was pushed.
    pub(super) fn submit(&mut self) {
        if self.published != self.next {
            self.published = self.next;
            // Pairs with the kernel's acquire of the index: the entries are there before it.
            self.ring.producer().store(self.next, Ordering::Release);
        }
    }

    /// Entries that the kernel has not taken yet.
    pub(super) fn pending(&mut self) -> u32 {
        self.ring.size - self.free(self.ring.size).min(self.ring.size)
    }

    pub(super) fn wakeup_wanted(&self) -> bool {
        self.ring.wakeup_wanted()
    }
}

/// The side that takes entries out: rx and completion.
#[derive(Debug)]
pub(super) struct Consumer<T> {
    ring: Ring<T>,
    /// Next entry to read. Beyond the published index by what is not released.
    next: u32,
    published: u32,
    /// The kernel's index as last seen.
    produced: u32,
}

impl<T: Entry> Consumer<T> {
    pub(super) fn map(
        fd: BorrowedFd<'_>,
        page_offset: libc::off_t,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let ring = Ring::map(fd, page_offset, offsets, size)?;
        let next = ring.consumer().load(Ordering::Relaxed);
        Ok(Self {
            ring,
            next,
            published: next,
            produced: next,
        })
    }

    /// Takes the next entry; its slot is the kernel's again after [`Consumer::release`].
    pub(super) fn pop(&mut self) -> Option<T> {
        if self.produced == self.next {
            // Pairs with the kernel's release of the entries it has written.
            let produced = self.ring.producer().load(Ordering::Acquire);
            if produced.wrapping_sub(self.published) > self.ring.size {
                return None;
            }
            self.produced = produced;
            if produced == self.next {
                return None;
            }
        }
        // SAFETY: the slot is in the mapping, and the kernel has published it and does not write
        // it again before it is released; any bit pattern is a valid entry.
        let entry = unsafe { self.ring.slot(self.next).read() };
        self.next = self.next.wrapping_add(1);
        Some(entry)
    }

    /// Gives the slots of the entries taken back to the kernel.
    pub(super) fn release(&mut self) {
        if self.published != self.next {
            self.published = self.next;
            // Pairs with the kernel's acquire of the index: the entries were read before it.
            self.ring.consumer().store(self.next, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, FromRawFd};

    use super::*;

    const SIZE: u32 = 4;
    const OFFSETS: libc::xdp_ring_offset = libc::xdp_ring_offset {
        producer: 0,
        consumer: 64,
        desc: 192,
        flags: 128,
    };

    /// A page that plays the kernel's part of a ring.
    struct Kernel {
        file: File,
        ring: Ring<u64>,
    }

    impl Kernel {
        fn new() -> Self {
            // SAFETY: the name is a constant C string; the call gives a new descriptor or -1.
            let fd = unsafe { libc::memfd_create(c"ring".as_ptr(), libc::MFD_CLOEXEC) };
            assert!(fd >= 0);
            // SAFETY: `fd` was just made and nobody else owns it.
            let file = unsafe { File::from_raw_fd(fd) };
            file.set_len(4096).unwrap();
            let ring = Ring::map(file.as_fd(), 0, &OFFSETS, SIZE).unwrap();
            // Indices wrap early.
            ring.producer().store(u32::MAX - 1, Ordering::Relaxed);
            ring.consumer().store(u32::MAX - 1, Ordering::Relaxed);
            Self { file, ring }
        }

        fn producer(&self) -> Producer<u64> {
            Producer::map(self.file.as_fd(), 0, &OFFSETS, SIZE).unwrap()
        }

        fn consumer(&self) -> Consumer<u64> {
            Consumer::map(self.file.as_fd(), 0, &OFFSETS, SIZE).unwrap()
        }
    }

    #[test]
    fn what_is_pushed_is_seen_after_submit_and_makes_room_after_it_is_taken() {
        let kernel = Kernel::new();
        let (mut producer, mut consumer) = (kernel.producer(), kernel.consumer());
        for round in 0..10 {
            assert_eq!(producer.free(SIZE), SIZE);
            for n in 0..u64::from(SIZE) {
                assert!(producer.push(round * 10 + n));
            }
            assert!(!producer.push(99));
            assert_eq!(consumer.pop(), None, "nothing is submitted");
            producer.submit();
            for n in 0..u64::from(SIZE) {
                assert_eq!(consumer.pop(), Some(round * 10 + n));
            }
            assert_eq!(consumer.pop(), None);
            assert_eq!(producer.free(1), 0, "nothing is released");
            assert_eq!(producer.pending(), SIZE);
            consumer.release();
            assert_eq!(producer.pending(), 0);
        }
    }

    #[test]
    fn wild_indices_give_neither_room_nor_entries() {
        let kernel = Kernel::new();
        let (mut producer, mut consumer) = (kernel.producer(), kernel.consumer());
        for wild in [5_u32, 1 << 30, u32::MAX - 10] {
            kernel.ring.producer().store(wild, Ordering::Relaxed);
            assert_eq!(consumer.pop(), None, "{wild}");
            kernel.ring.consumer().store(wild, Ordering::Relaxed);
            for n in 0..SIZE {
                producer.push(u64::from(n));
            }
            assert_eq!(producer.free(SIZE), 0, "{wild}");
            assert!(!producer.push(1));
        }
    }

    #[test]
    fn the_flag_asks_for_a_wakeup() {
        let kernel = Kernel::new();
        let producer = kernel.producer();
        assert!(!producer.wakeup_wanted());
        // SAFETY: inside the mapping of `kernel.ring`.
        unsafe { kernel.ring.flags.as_ref() }.store(1, Ordering::Relaxed);
        assert!(producer.wakeup_wanted());
    }

    #[test]
    fn offsets_outside_the_mapping_are_refused() {
        let kernel = Kernel::new();
        for bad in [
            libc::xdp_ring_offset {
                producer: 4096,
                ..OFFSETS
            },
            libc::xdp_ring_offset {
                consumer: u64::MAX,
                ..OFFSETS
            },
            libc::xdp_ring_offset {
                flags: 1,
                ..OFFSETS
            },
        ] {
            assert!(Producer::<u64>::map(kernel.file.as_fd(), 0, &bad, SIZE).is_err());
        }
    }
}
