//! Frames for the guest that take several of its buffers (`VIRTIO_NET_F_MRG_RXBUF`, virtio 1.3 section
//! 5.1.6.3 and 5.1.6.4).
//!
//! Invariants: all buffers of a frame become visible to the guest at once, the first of them says how many
//! they are; buffers that do not suffice go back untouched.

use crate::ring::{Chain, GuestRam, RingError, Segment, Virtqueue};

use super::port::{Delivery, NET_HEADER_BYTES, header_of, scatter};

/// The buffers of one frame. Reused from frame to frame.
#[derive(Debug, Default)]
pub(super) struct Merge {
    chains: Vec<Taken>,
    segments: Vec<Segment>,
}

/// A chain that was taken: its head, where its segments end, and what goes into it at most.
#[derive(Clone, Copy, Debug)]
struct Taken {
    head: u16,
    segments_end: usize,
    bytes: usize,
}

impl Merge {
    /// Whether there are buffers for `need` bytes, or as many buffers as the queue can have.
    pub(super) fn has_room(
        &mut self,
        queue: &mut Virtqueue,
        chain: &mut Chain,
        need: usize,
    ) -> Result<bool, RingError> {
        let room = self.gather(queue, chain, need)?;
        queue.undo_pops(self.chains.len() as u16);
        Ok(room >= need || self.chains.len() == usize::from(queue.size()))
    }

    /// Puts a frame into the guest's buffers.
    pub(super) fn deliver(
        &mut self,
        queue: &mut Virtqueue,
        chain: &mut Chain,
        ram: &GuestRam,
        frame: &[u8],
        verified: bool,
    ) -> Result<Delivery, RingError> {
        let need = NET_HEADER_BYTES + frame.len();
        let room = self.gather(queue, chain, need)?;
        // The first buffer must hold the header (5.1.6.3.1).
        let headless = self
            .chains
            .first()
            .is_some_and(|c| c.bytes < NET_HEADER_BYTES);
        if room < need || headless {
            let all = self.chains.len() == usize::from(queue.size());
            queue.undo_pops(self.chains.len() as u16);
            return Ok(if all || headless {
                Delivery::TooSmall
            } else {
                Delivery::NoRoom
            });
        }
        let header = header_of(self.chains.len() as u16, verified);
        let (mut at, mut first) = (0, 0);
        // Not a part of it becomes visible before the rest: what is not published yet goes first.
        queue.make_room(self.chains.len() as u16);
        for taken in &self.chains {
            let before = at;
            for segment in &self.segments[first..taken.segments_end] {
                at += scatter(ram, *segment, at, &header, frame)?;
            }
            first = taken.segments_end;
            queue.complete(taken.head, (at - before) as u32)?;
        }
        Ok(Delivery::Done)
    }

    /// Takes chains until they have room for `need` bytes, or there are no more. Gives their room.
    fn gather(
        &mut self,
        queue: &mut Virtqueue,
        chain: &mut Chain,
        need: usize,
    ) -> Result<usize, RingError> {
        self.chains.clear();
        self.segments.clear();
        let mut room = 0;
        while room < need && self.chains.len() < usize::from(queue.size()) && queue.pop(chain)? {
            if !chain.readable().is_empty() {
                return Err(RingError::Direction);
            }
            // At most `need` segments: each has a byte.
            let mut bytes = 0;
            for segment in chain.writable() {
                if room + bytes < need {
                    self.segments.push(*segment);
                }
                bytes = bytes.saturating_add(segment.len as usize);
            }
            room = room.saturating_add(bytes);
            let (head, segments_end) = (chain.head(), self.segments.len());
            self.chains.push(Taken {
                head,
                segments_end,
                bytes,
            });
        }
        Ok(room)
    }
}
