//! Frames under way to the wire that begin in the guest's memory, by where.
//!
//! Invariants: nothing allocates after [`Strays::with_capacity`]; each frame is given back once. The kernel
//! completes frames in the order in which it got them, nearly always, so the oldest is looked at first.
//!
//! Does not know who the frames' slots belong to. A guest that sends twice from the same bytes has its frames
//! given back in order; which of the two was meant is all the same, since only the guest writes there.

use std::collections::VecDeque;

/// Of the first piece of a frame the kernel may lose bit 0 of the offset
/// ([`XskSocket::complete`](crate::ring::xsk::XskSocket::complete)).
const KEPT_BITS: u64 = !1;

/// Where frames begin, and their slots, oldest first.
#[derive(Debug)]
pub(super) struct Strays {
    under_way: VecDeque<(u64, u32)>,
}

impl Strays {
    /// Has room for so many frames.
    pub(super) fn with_capacity(frames: usize) -> Self {
        Self {
            under_way: VecDeque::with_capacity(frames),
        }
    }

    /// The frame of `slot` is on its way from `offset`.
    #[inline]
    pub(super) fn add(&mut self, offset: u64, slot: u32) {
        self.under_way.push_back((offset & KEPT_BITS, slot));
    }

    /// The slot of the frame that began at `offset`, which is not on its way any more.
    #[inline]
    pub(super) fn take(&mut self, offset: u64) -> Option<u32> {
        let offset = offset & KEPT_BITS;
        let at = self
            .under_way
            .iter()
            .position(|(from, _)| *from == offset)?;
        let (_, slot) = self.under_way.remove(at)?;
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_once_by_where_they_began() {
        let mut strays = Strays::with_capacity(4);
        for (offset, slot) in [(0x1000, 1), (0x2001, 2), (0x1000, 3), (0x3000, 4)] {
            strays.add(offset, slot);
        }
        assert_eq!(strays.take(0x4000), None);
        assert_eq!(strays.take(0x2000), Some(2), "bit 0 was lost");
        assert_eq!(
            (strays.take(0x1000), strays.take(0x1000)),
            (Some(1), Some(3))
        );
        assert_eq!((strays.take(0x1000), strays.take(0x3000)), (None, Some(4)));
        assert_eq!(strays.take(0x3000), None);
    }
}
