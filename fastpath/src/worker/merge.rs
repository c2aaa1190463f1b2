//! Frames for the guest that take several of its buffers (`VIRTIO_NET_F_MRG_RXBUF`, virtio 1.3 section
//! 5.1.6.3 and 5.1.6.4).
//!
//! Invariants: all buffers of a frame become visible to the guest at once, the first of them says how many
//! they are; buffers that do not suffice go back untouched; nothing allocates after [`Merge::for_bytes`].

use crate::ring::{Chain, GuestRam, QUEUE_SIZE_MAX, RingError, Segment, Virtqueue};

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
    /// For frames that take up to `need` bytes, the header included.
    pub(super) fn for_bytes(need: usize) -> Self {
        Self {
            chains: Vec::with_capacity(QUEUE_SIZE_MAX.into()),
            // However small the guest's buffers are, each has a byte.
            segments: Vec::with_capacity(need),
        }
    }

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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ring::Pages;
    use crate::ring::driver_mock::DriverMock;

    #[test]
    fn no_memory_is_taken_however_small_the_guests_buffers_are() {
        const NEED: usize = 200;
        let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
        let mut driver = DriverMock::new(ram.clone(), 0x4000, 256, true);
        let buffer = |n: u64| Segment {
            gpa: 0x8000 + n,
            len: 1,
        };
        let first: Vec<_> = (0..NET_HEADER_BYTES as u64).map(buffer).collect();
        driver.offer(&[], &first).unwrap().unwrap();
        for n in NET_HEADER_BYTES..NEED {
            driver.offer(&[], &[buffer(n as u64)]).unwrap().unwrap();
        }
        let mut queue = Virtqueue::new(ram.clone(), driver.queue_state()).unwrap();
        let (mut merge, mut chain) = (Merge::for_bytes(NEED), Chain::default());
        let capacities = |merge: &Merge| (merge.chains.capacity(), merge.segments.capacity());
        let before = capacities(&merge);
        assert!(merge.has_room(&mut queue, &mut chain, NEED).unwrap());
        let frame = [7; NEED - NET_HEADER_BYTES];
        let done = merge.deliver(&mut queue, &mut chain, &ram, &frame, false);
        assert_eq!(done.unwrap(), Delivery::Done);
        let mut written = frame;
        ram.read(0x8000 + NET_HEADER_BYTES as u64, &mut written)
            .unwrap();
        assert_eq!(written, frame);
        assert_eq!(capacities(&merge), before);
    }
}
