//! Which memory to receive into is registered with the ring: the streams' buffers, and blocks of landings as they are used.
//!
//! A receive names one registered buffer, so that a block has room for the bytes around its pages
//! ([`Landing::aside`](super::landing::Landing::aside)).
//!
//! Invariants: a block is looked up by what keeps it, never by its address, which may come again; what can't be locked is
//! counted, and not tried again until something was let go; a block that is unmapped is let go at the next checkpoint.
//!
//! Does not receive.

use std::io;
use std::rc::{Rc, Weak};

use super::landing::{BLOCK_PAGES, BLOCK_PAGES_ALL};
use super::memory::{Mapping, PAGE_BYTES};
use super::ring::Ring;

/// The place of the buffers that are sent.
pub(super) const SEND_SLOT: u16 = 0;
/// Of the streams' buffers.
const RECEIVE_SLOT: u16 = 1;
/// Of the first block.
const BLOCK_SLOT: u16 = 2;
/// Blocks that are registered at most: 16 GiB of landings.
const BLOCKS_MAX: usize = 4096;
/// Places of the table.
pub(super) const SLOTS: u32 = BLOCK_SLOT as u32 + BLOCKS_MAX as u32;

/// What is registered for receives.
#[derive(Debug)]
pub(super) struct Pinned {
    blocks_max: usize,
    /// The kernel can do it.
    is_on: bool,
    has_buffers: bool,
    /// By their places.
    blocks: Vec<Option<Weak<Mapping>>>,
    /// The block that was received into last.
    last: usize,
    /// Nothing more can be registered.
    is_full: bool,
    refused: u64,
    /// Receives into blocks without a place.
    beyond: u64,
}

impl Pinned {
    /// With the streams' buffers.
    pub(super) fn new(ring: &Ring, buffers: libc::iovec) -> Self {
        let mut pinned = Self {
            blocks_max: BLOCKS_MAX,
            is_on: ring.reads_fixed,
            has_buffers: false,
            blocks: Vec::new(),
            last: 0,
            is_full: false,
            refused: 0,
            beyond: 0,
        };
        if pinned.is_on {
            let done = ring.pin(RECEIVE_SLOT, buffers);
            pinned.has_buffers = pinned.count(done, buffers.iov_len);
        }
        pinned
    }

    /// Where the streams' buffers are registered.
    pub(super) fn buffers(&self) -> Option<u16> {
        (self.is_on && self.has_buffers).then_some(RECEIVE_SLOT)
    }

    /// Where a block is registered; now, if it can be and was not before.
    pub(super) fn block(&mut self, ring: &Ring, block: &Rc<Mapping>) -> Option<u16> {
        if !self.is_on {
            return None;
        }
        let is_it = |known: &Option<Weak<Mapping>>| {
            let known = known.as_ref().map(Weak::as_ptr);
            known == Some(Rc::as_ptr(block))
        };
        if !self.blocks.get(self.last).is_some_and(is_it) {
            let known = self.blocks.iter().position(is_it);
            let Some(place) = known.or_else(|| self.register(ring, block)) else {
                self.beyond += 1;
                return None;
            };
            self.last = place;
        }
        Some(BLOCK_SLOT + self.last as u16)
    }

    fn register(&mut self, ring: &Ring, block: &Rc<Mapping>) -> Option<usize> {
        self.give_back(ring);
        let free = self.blocks.iter().position(Option::is_none);
        let index = free.unwrap_or(self.blocks.len());
        if self.is_full || index >= self.blocks_max {
            if self.beyond == 0 {
                let mib = (self.blocks.len() * BLOCK_PAGES * PAGE_BYTES) >> 20;
                tracing::warn!(
                    "page channel: what is received beyond {mib} MiB is not registered, and takes longer"
                );
            }
            return None;
        }
        let part = block.part(BLOCK_PAGES_ALL);
        let done = ring.pin(BLOCK_SLOT + index as u16, part);
        if !self.count(done, part.iov_len) {
            self.is_full = true;
            return None;
        }
        if index == self.blocks.len() {
            self.blocks.push(None);
        }
        self.blocks[index] = Some(Rc::downgrade(block));
        Some(index)
    }

    /// Lets blocks go that nobody has any more: until then their pages stay with the kernel, though they are unmapped.
    pub(super) fn give_back(&mut self, ring: &Ring) {
        for (known, slot) in self.blocks.iter_mut().zip(BLOCK_SLOT..) {
            let is_gone = known
                .as_ref()
                .is_some_and(|known| known.strong_count() == 0);
            if is_gone && ring.unpin(slot).is_ok() {
                *known = None;
                self.is_full = false;
            }
        }
    }

    /// Lets everything go, what is sent as well: operations have ended.
    pub(super) fn let_go(&mut self, ring: &Ring) {
        if !ring.has_table {
            return;
        }
        for slot in SEND_SLOT..BLOCK_SLOT + self.blocks.len() as u16 {
            // A place that is empty stays so.
            let _ = ring.unpin(slot);
        }
        self.blocks.clear();
        (self.is_on, self.has_buffers) = (false, false);
    }

    /// The kernel refuses what it said that it can do.
    pub(super) fn turn_off(&mut self, why: &io::Error) {
        self.is_on = false;
        self.refused += 1;
        tracing::warn!("page channel: the kernel does not receive into registered memory ({why})");
    }

    /// How often something was refused.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// How many receives went into blocks that are not registered, because as many are as can be.
    pub(super) fn beyond(&self) -> u64 {
        self.beyond
    }

    fn count(&mut self, done: io::Result<()>, bytes: usize) -> bool {
        let Err(e) = done else {
            return true;
        };
        if self.refused == 0 {
            tracing::warn!(
                "page channel: {bytes} bytes to receive into can't be locked ({e}), the kernel looks up their pages each \
                 time; raise RLIMIT_MEMLOCK (`ulimit -l`, LimitMEMLOCK=)"
            );
        }
        self.refused += 1;
        false
    }

    #[cfg(test)]
    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    #[cfg(test)]
    pub(super) fn blocks(&self) -> usize {
        self.blocks.iter().flatten().count()
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    use super::super::memory::Buffer;
    use super::*;

    #[test]
    fn blocks_keep_their_places_until_they_are_unmapped() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (buffers, part) = Buffer::carve(&[4096, 4096], 1).unwrap();
        let ring = Ring::new(8, 8, &[socket.as_raw_fd()], part).unwrap();
        let mut pinned = Pinned::new(&ring, Buffer::span(&buffers[1..]));
        if !ring.reads_fixed {
            assert_eq!(pinned.buffers(), None);
            return;
        }
        assert_eq!(pinned.buffers(), Some(RECEIVE_SLOT));
        let block = || Rc::new(Mapping::new(3 * 4096).unwrap());
        let (first, second) = (block(), block());
        for _ in 0..2 {
            assert_eq!(pinned.block(&ring, &first), Some(BLOCK_SLOT));
            assert_eq!(pinned.block(&ring, &second), Some(BLOCK_SLOT + 1));
        }
        // The next mapping may well have the address of this one.
        drop(first);
        assert_eq!(pinned.blocks(), 2);
        let third = block();
        assert_eq!(pinned.block(&ring, &third), Some(BLOCK_SLOT));
        assert_eq!(pinned.block(&ring, &second), Some(BLOCK_SLOT + 1));
        drop(third);
        pinned.give_back(&ring);
        assert_eq!((pinned.blocks(), pinned.refused()), (1, 0));
        pinned.turn_off(&io::ErrorKind::Unsupported.into());
        assert_eq!(
            (pinned.buffers(), pinned.block(&ring, &second)),
            (None, None)
        );
        assert_eq!((pinned.refused(), pinned.beyond()), (1, 0));
    }

    #[test]
    fn receives_beyond_what_can_be_registered_are_counted() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (buffers, part) = Buffer::carve(&[4096, 4096], 1).unwrap();
        let ring = Ring::new(8, 8, &[socket.as_raw_fd()], part).unwrap();
        let mut pinned = Pinned::new(&ring, Buffer::span(&buffers[1..]));
        if !ring.reads_fixed {
            return;
        }
        pinned.blocks_max = 1;
        let block = || Rc::new(Mapping::new(3 * 4096).unwrap());
        let (first, second) = (block(), block());
        for receives in 1..4 {
            assert_eq!(pinned.block(&ring, &first), Some(BLOCK_SLOT));
            assert_eq!(pinned.block(&ring, &second), None);
            assert_eq!((pinned.beyond(), pinned.refused()), (receives, 0));
        }
        drop(first);
        assert_eq!(pinned.block(&ring, &second), Some(BLOCK_SLOT));
        assert_eq!(pinned.beyond(), 3);
    }
}
