//! Cuts frames into descriptors that the kernel takes.
//!
//! Invariants: every descriptor lies in the area and is no longer than a chunk; with zero copy none
//! crosses a page, because pages that follow each other here do not for the NIC.
//!
//! Does not queue anything.

use colo_compare::Token;

use super::queue::PIECES_MAX;
use super::{XdpNic, XdpNicMode};
use crate::frame::FramePool;
use crate::ring::xsk::{Descriptor, Umem};

const PAGE_BYTES: u32 = 4096;

impl XdpNic {
    /// The pieces of a frame as descriptors, and the slot that the first lies in: the frame's own if it begins
    /// in the guest. `None`: it does not fit.
    pub(super) fn describe_frame(
        &self,
        frames: &mut FramePool,
        token: &Token,
        list: &mut [Descriptor; PIECES_MAX],
    ) -> Option<(u32, usize)> {
        let pieces = frames.pieces(token);
        let first = pieces.as_slice().first()?.address.addr();
        let mut cut = Cut::new(self, frames, list);
        let in_pieces = pieces
            .as_slice()
            .iter()
            .all(|piece| cut.add(piece.address.addr(), piece.len));
        if in_pieces && (self.multi_buffer || cut.count == 1) {
            let count = cut.finish();
            let slot = self.slot_of(frames, first).unwrap_or(token.slot());
            return Some((slot, count));
        }
        self.stats.tx_gathered_frames.add(1);
        let whole = frames.in_one_piece(token);
        let (address, len) = (whole.as_ptr().addr(), whole.len());
        let mut cut = Cut::new(self, frames, list);
        let fits = cut.add(address, len) && (self.multi_buffer || cut.count == 1);
        let count = cut.finish();
        fits.then_some((self.slot_of(frames, address)?, count))
    }

    fn slot_of(&self, frames: &FramePool, address: usize) -> Option<u32> {
        let offset = address.checked_sub(frames.area().base().addr())?;
        Some(frames.slot_at(offset)?.0)
    }
}

/// Cuts pieces of memory into descriptors that the kernel takes.
struct Cut<'a> {
    base: usize,
    area_bytes: u64,
    piece_max: u32,
    splits_pages: bool,
    list: &'a mut [Descriptor; PIECES_MAX],
    count: usize,
}

impl<'a> Cut<'a> {
    fn new(nic: &XdpNic, frames: &FramePool, list: &'a mut [Descriptor; PIECES_MAX]) -> Self {
        let umem = nic.memory.as_ref().map(|memory| &memory.whole);
        Self {
            base: frames.area().base().addr(),
            area_bytes: umem.map_or(0, Umem::bytes),
            piece_max: umem.map_or(0, |umem| umem.settings().chunk_bytes),
            splits_pages: nic.mode == XdpNicMode::ZeroCopy,
            list,
            count: 0,
        }
    }

    /// `false`: outside the area, or too many.
    fn add(&mut self, address: usize, len: usize) -> bool {
        let Some(mut offset) = address.checked_sub(self.base).map(|at| at as u64) else {
            return false;
        };
        let mut left = len as u64;
        if self.piece_max == 0 || offset + left > self.area_bytes {
            return false;
        }
        while left > 0 {
            let mut len = left.min(u64::from(self.piece_max));
            if self.splits_pages {
                let page = u64::from(PAGE_BYTES);
                len = len.min(page - offset % page);
            }
            let Some(place) = self.list.get_mut(self.count) else {
                return false;
            };
            *place = Descriptor {
                offset,
                len: len as u32,
                more: true,
            };
            self.count += 1;
            offset += len;
            left -= len;
        }
        true
    }

    /// Marks the last piece.
    fn finish(self) -> usize {
        if let Some(last) = self.count.checked_sub(1) {
            self.list[last].more = false;
        }
        self.count
    }
}
