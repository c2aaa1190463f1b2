//! A ring of frame copies from one thread to another.
//!
//! Invariants: one [`Sender`] and one [`Receiver`], each used by one thread at a time; all memory is
//! taken in [`lane`]; an entry is the sender's until the tail passes it and the receiver's until the
//! head does. A sender that found the ring full is *starved* until it sees room: whoever makes room
//! learns of it ([`Receiver::take_starved`]).
//!
//! Does not wake anybody.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

/// Bytes in front of the frame: length, word, stamp.
const ENTRY_HEADER_BYTES: usize = 16;
/// Entries begin at cache lines.
const ENTRY_ALIGN: usize = 64;

/// An index that shares its cache lines with nothing (two: processors fetch them in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Index(AtomicU32);

#[derive(Debug)]
struct Ring {
    /// Entries taken; the receiver writes it.
    head: Index,
    /// Entries put in; the sender writes it.
    tail: Index,
    starved: AtomicBool,
    memory: NonNull<u8>,
    entries: u32,
    entry_bytes: usize,
}

// SAFETY: the memory is owned by the ring and outlives both ends; who may touch which entry is
// decided by the indices, whose release stores pair with acquire loads.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    fn layout(entries: u32, entry_bytes: usize) -> Layout {
        Layout::from_size_align(entries as usize * entry_bytes, ENTRY_ALIGN)
            .expect("a ring larger than the address space")
    }

    /// First byte of the entry with this running number.
    fn entry(&self, at: u32) -> NonNull<u8> {
        let index = (at % self.entries) as usize;
        // SAFETY: `index` is below `entries`, so the entry lies in the allocation.
        unsafe { self.memory.add(index * self.entry_bytes) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let layout = Self::layout(self.entries, self.entry_bytes);
        // SAFETY: allocated in `lane` with this layout, and no end is left.
        unsafe { dealloc(self.memory.as_ptr(), layout) };
    }
}

/// What lies in front of an entry's bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Header {
    len: u32,
    word: u32,
    stamp_ns: u64,
}

const _: () = assert!(size_of::<Header>() == ENTRY_HEADER_BYTES);

/// A ring of `entries` (a power of two) with up to `bytes_max` bytes each.
pub fn lane(entries: u32, bytes_max: usize) -> (Sender, Receiver) {
    assert!(entries.is_power_of_two(), "indices run over");
    let entry_bytes = (ENTRY_HEADER_BYTES + bytes_max).next_multiple_of(ENTRY_ALIGN);
    let layout = Ring::layout(entries, entry_bytes);
    // SAFETY: the layout has at least one entry, so its size is not 0.
    let memory = unsafe { alloc_zeroed(layout) };
    let Some(memory) = NonNull::new(memory) else {
        handle_alloc_error(layout);
    };
    let ring = Arc::new(Ring {
        head: Index::default(),
        tail: Index::default(),
        starved: AtomicBool::new(false),
        memory,
        entries,
        entry_bytes,
    });
    let sender = Sender {
        ring: ring.clone(),
        tail: 0,
        head_seen: 0,
        is_starved: false,
    };
    let receiver = Receiver {
        ring,
        head: 0,
        tail_seen: 0,
    };
    (sender, receiver)
}

/// The end that puts frames in.
#[derive(Debug)]
pub struct Sender {
    ring: Arc<Ring>,
    tail: u32,
    head_seen: u32,
    is_starved: bool,
}

impl Sender {
    /// Whether one more entry fits. A `false` makes the sender starved.
    #[inline]
    pub fn has_room(&mut self) -> bool {
        if self.tail.wrapping_sub(self.head_seen) < self.ring.entries {
            return true;
        }
        self.look_for_room()
    }

    #[cold]
    fn look_for_room(&mut self) -> bool {
        self.head_seen = self.ring.head.0.load(Ordering::Acquire);
        if self.is_full() {
            self.is_starved = true;
            self.ring.starved.store(true, Ordering::Relaxed);
            // Pairs with the fence of `Receiver::take_starved`: either it sees the flag, or this
            // look sees its head.
            fence(Ordering::SeqCst);
            self.head_seen = self.ring.head.0.load(Ordering::Acquire);
        }
        self.is_starved &= self.is_full();
        !self.is_full()
    }

    fn is_full(&self) -> bool {
        self.tail.wrapping_sub(self.head_seen) >= self.ring.entries
    }

    /// Whether it was found full and has room now; said once.
    pub fn is_fed(&mut self) -> bool {
        if !self.is_starved {
            return false;
        }
        self.head_seen = self.ring.head.0.load(Ordering::Acquire);
        self.is_starved = self.is_full();
        !self.is_starved
    }

    /// Puts a frame in; the receiver can see it at once. `false`: there is no room, or the frame is
    /// longer than an entry.
    #[inline]
    pub fn push(&mut self, word: u32, stamp_ns: u64, frame: &[u8]) -> bool {
        if ENTRY_HEADER_BYTES + frame.len() > self.ring.entry_bytes || !self.has_room() {
            return false;
        }
        let entry = self.ring.entry(self.tail);
        let header = Header {
            len: frame.len() as u32,
            word,
            stamp_ns,
        };
        // SAFETY: the entry is aligned for a header and this end's alone: the receiver has passed it
        // (`has_room` loaded its head with acquire) and looks at it only behind the store below.
        unsafe { entry.cast::<Header>().write(header) };
        // SAFETY: as above; the bytes fit behind the header (checked), and `frame` is not in the ring.
        unsafe {
            let to = entry.add(ENTRY_HEADER_BYTES);
            std::ptr::copy_nonoverlapping(frame.as_ptr(), to.as_ptr(), frame.len());
        }
        self.tail = self.tail.wrapping_add(1);
        // Pairs with the acquire in `Receiver::refresh`.
        self.ring.tail.0.store(self.tail, Ordering::Release);
        true
    }
}

/// A frame in the ring.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// What the sender said with it.
    pub word: u32,
    /// When it entered its stage, as the sender said.
    pub stamp_ns: u64,
    /// Its bytes.
    pub frame: &'a [u8],
}

/// The end that takes frames out.
#[derive(Debug)]
pub struct Receiver {
    ring: Arc<Ring>,
    head: u32,
    tail_seen: u32,
}

impl Receiver {
    /// Looks what has been put in. Everything that the sender did before it put in an entry that is
    /// seen here is seen as well.
    #[inline]
    pub fn refresh(&mut self) {
        self.tail_seen = self.ring.tail.0.load(Ordering::Acquire);
    }

    /// Whether there is an entry, as of the last [`Receiver::refresh`].
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.head == self.tail_seen
    }

    /// The oldest entry, as of the last [`Receiver::refresh`].
    #[inline]
    pub fn front(&self) -> Option<Entry<'_>> {
        if self.is_empty() {
            return None;
        }
        let entry = self.ring.entry(self.head);
        // SAFETY: the sender has finished this entry (`refresh` loaded its tail with acquire) and
        // writes it again only when the head has passed it, for which `pop` borrows mutably.
        let header = unsafe { entry.cast::<Header>().read() };
        // SAFETY: as above; `push` has checked the length.
        let frame = unsafe {
            let from = entry.add(ENTRY_HEADER_BYTES);
            std::slice::from_raw_parts(from.as_ptr(), header.len as usize)
        };
        Some(Entry {
            word: header.word,
            stamp_ns: header.stamp_ns,
            frame,
        })
    }

    /// Gives the oldest entry's place back, if there is one.
    #[inline]
    pub fn pop(&mut self) {
        if !self.is_empty() {
            self.head = self.head.wrapping_add(1);
            // Pairs with the acquire in `Sender::has_room`.
            self.ring.head.0.store(self.head, Ordering::Release);
        }
    }

    /// Whether the sender has found the ring full since the last call. The caller has executed a
    /// sequentially consistent fence since its last [`Receiver::pop`].
    pub fn take_starved(&self) -> bool {
        self.ring.starved.load(Ordering::Relaxed)
            && self.ring.starved.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_as_they_went_in() {
        let (mut sender, mut receiver) = lane(4, 100);
        assert!(!sender.push(0, 0, &[0; 113]), "longer than an entry");
        for round in 0..10_u8 {
            for n in 0..4_u8 {
                let frame = vec![round * 4 + n; usize::from(n) * 33];
                assert!(sender.push(u32::from(n), u64::from(round), &frame));
            }
            assert!(!sender.push(9, 9, &[]) && !sender.is_fed());
            let mut told = 0;
            assert!(receiver.is_empty(), "not looked at yet");
            receiver.refresh();
            for n in 0..4_u8 {
                let entry = receiver.front().unwrap();
                assert_eq!(
                    (entry.word, entry.stamp_ns),
                    (u32::from(n), u64::from(round))
                );
                assert_eq!(
                    entry.frame,
                    vec![round * 4 + n; usize::from(n) * 33].as_slice()
                );
                receiver.pop();
                told += u32::from(sender.is_fed());
            }
            assert_eq!(told, 1, "said once");
            assert!(receiver.front().is_none());
            receiver.pop();
            assert!(receiver.take_starved() && !receiver.take_starved());
            assert!(sender.has_room() && !sender.is_fed());
        }
    }

    #[test]
    fn indices_run_over() {
        let (mut sender, mut receiver) = lane(2, 8);
        for at in [&mut sender.tail, &mut sender.head_seen] {
            *at = u32::MAX;
        }
        for at in [&mut receiver.head, &mut receiver.tail_seen] {
            *at = u32::MAX;
        }
        for index in [&sender.ring.head, &sender.ring.tail] {
            index.0.store(u32::MAX, Ordering::Relaxed);
        }
        assert!(sender.push(1, 0, b"one") && sender.push(2, 0, b"two") && !sender.push(3, 0, b""));
        receiver.refresh();
        assert_eq!(receiver.front().unwrap().frame, b"one");
        receiver.pop();
        assert_eq!(receiver.front().unwrap().frame, b"two");
        receiver.pop();
        assert!(receiver.front().is_none());
    }
}
