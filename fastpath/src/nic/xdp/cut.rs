//! Cuts frames into descriptors that the kernel takes.
//!
//! Invariants: every descriptor lies in the area and is no longer than a chunk; where the NIC reads by itself none
//! crosses a page, because pages that follow each other here do not for it. What cannot be cut so is copied into one
//! piece, and counted by cause.
//!
//! Does not queue anything.

use colo_compare::Token;

use super::queue::PIECES_MAX;
use super::{XdpAbilities, XdpNic};
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
        let base = frames.area().base().addr();
        let first = pieces.as_slice().first()?.address.addr();
        let places = pieces.as_slice().iter();
        let places = places.map(|piece| (piece.address.addr().wrapping_sub(base), piece.len));
        let why = match self.room().cut(places, list) {
            Ok(count) => {
                let slot = self.slot_of(frames, first).unwrap_or(token.slot());
                return Some((slot, count));
            }
            Err(why) => why,
        };
        match why {
            NoCut::OnePiece => self.stats.tx_gathered_one_piece_frames.add(1),
            NoCut::ManyPieces => self.stats.tx_gathered_many_pieces_frames.add(1),
            NoCut::Outside => self.stats.tx_gathered_outside_frames.add(1),
        }
        let whole = frames.in_one_piece(token);
        let (address, len) = (whole.as_ptr().addr(), whole.len());
        let count = self.room().cut([(address.wrapping_sub(base), len)], list);
        Some((self.slot_of(frames, address)?, count.ok()?))
    }

    fn slot_of(&self, frames: &FramePool, address: usize) -> Option<u32> {
        let offset = address.checked_sub(frames.area().base().addr())?;
        Some(frames.slot_at(offset)?.0)
    }

    fn room(&self) -> Room {
        let umem = self.memory.as_ref().map(|memory| &memory.whole);
        Room {
            area_bytes: umem.map_or(0, Umem::bytes),
            piece_max: umem.map_or(0, |umem| umem.settings().chunk_bytes),
            abilities: self.abilities,
        }
    }
}

/// Why a frame cannot be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoCut {
    /// It is in several pieces, and only one is taken.
    OnePiece,
    /// More pieces than are taken.
    ManyPieces,
    /// A part of it is not in the area.
    Outside,
}

/// What a descriptor may say.
#[derive(Clone, Copy, Debug)]
struct Room {
    area_bytes: u64,
    piece_max: u32,
    abilities: XdpAbilities,
}

impl Room {
    /// Cuts pieces of the area, as offset and length, into descriptors; gives how many.
    fn cut(
        &self,
        places: impl IntoIterator<Item = (usize, usize)>,
        list: &mut [Descriptor; PIECES_MAX],
    ) -> Result<usize, NoCut> {
        let mut count = 0;
        for (offset, len) in places {
            let (mut offset, mut left) = (offset as u64, len as u64);
            let inside = offset
                .checked_add(left)
                .is_some_and(|end| end <= self.area_bytes);
            if !inside || self.piece_max == 0 {
                return Err(NoCut::Outside);
            }
            while left > 0 {
                let len = left.min(self.longest_at(offset));
                let place = list.get_mut(count).ok_or(NoCut::ManyPieces)?;
                *place = Descriptor {
                    offset,
                    len: len as u32,
                    more: true,
                };
                count += 1;
                offset += len;
                left -= len;
            }
        }
        if count > 1 && !self.abilities.multi_buffer {
            return Err(NoCut::OnePiece);
        }
        if let Some(last) = count.checked_sub(1) {
            list[last].more = false;
        }
        Ok(count)
    }

    /// How long a descriptor may be that starts here.
    fn longest_at(&self, offset: u64) -> u64 {
        let page = u64::from(PAGE_BYTES);
        let to_border = page - offset % page;
        match self.abilities.crosses_pages {
            true => u64::from(self.piece_max),
            false => u64::from(self.piece_max).min(to_border),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Room = Room {
        area_bytes: 1 << 20,
        piece_max: 2048,
        abilities: XdpAbilities {
            multi_buffer: true,
            crosses_pages: true,
        },
    };

    fn cut(room: Room, places: &[(usize, usize)]) -> Result<Vec<(u64, u32)>, NoCut> {
        let empty = Descriptor {
            offset: 0,
            len: 0,
            more: false,
        };
        let mut list = [empty; PIECES_MAX];
        let count = room.cut(places.iter().copied(), &mut list)?;
        let more: Vec<_> = list[..count].iter().map(|it| it.more).collect();
        assert!(
            more.iter()
                .enumerate()
                .all(|(n, more)| *more == (n + 1 < count)),
            "{more:?}"
        );
        Ok(list[..count].iter().map(|it| (it.offset, it.len)).collect())
    }

    fn without(multi_buffer: bool, crosses_pages: bool) -> Room {
        Room {
            abilities: XdpAbilities {
                multi_buffer,
                crosses_pages,
            },
            ..ROOM
        }
    }

    #[test]
    fn pieces_are_cut_at_chunks_and_where_it_matters_at_pages() {
        let frame = [(0x0f00, 0x300), (0x2f80, 0x1200)];
        let chunks = [
            (0x0f00, 0x300),
            (0x2f80, 0x800),
            (0x3780, 0x800),
            (0x3f80, 0x200),
        ];
        assert_eq!(cut(ROOM, &frame).unwrap(), chunks);
        let pages = [
            (0x0f00, 0x100),
            (0x1000, 0x200),
            (0x2f80, 0x80),
            (0x3000, 0x800),
            (0x3800, 0x800),
            (0x4000, 0x180),
        ];
        assert_eq!(cut(without(true, false), &frame).unwrap(), pages);
        // Up to a border is not beyond it.
        assert_eq!(
            cut(without(true, false), &[(0xc00, 0x400)]).unwrap(),
            [(0xc00, 0x400)]
        );
    }

    #[test]
    fn what_cannot_be_cut_says_why() {
        assert_eq!(
            cut(without(false, true), &[(0xf00, 0x800)]).unwrap().len(),
            1
        );
        let several: [&[_]; 2] = [&[(0xf00, 0x801)], &[(0, 64), (128, 64)]];
        for pieces in several {
            assert_eq!(cut(without(false, true), pieces), Err(NoCut::OnePiece));
        }
        assert_eq!(
            cut(without(false, false), &[(0xf00, 0x101)]),
            Err(NoCut::OnePiece)
        );

        let many = [(0, 10); PIECES_MAX];
        assert_eq!(cut(ROOM, &many).unwrap().len(), PIECES_MAX);
        assert_eq!(
            cut(ROOM, &[(0, 10); PIECES_MAX + 1]),
            Err(NoCut::ManyPieces)
        );
        assert_eq!(
            cut(ROOM, &[(0, 2048 * PIECES_MAX + 1)]),
            Err(NoCut::ManyPieces)
        );

        let end = ROOM.area_bytes as usize;
        assert_eq!(cut(ROOM, &[(end - 10, 10)]).unwrap().len(), 1);
        for outside in [
            (end - 10, 11),
            (end, 1),
            (usize::MAX, 1),
            (usize::MAX - 4, 10),
        ] {
            assert_eq!(cut(ROOM, &[(0, 10), outside]), Err(NoCut::Outside));
        }
        let no_memory = Room {
            piece_max: 0,
            ..ROOM
        };
        assert_eq!(cut(no_memory, &[(0, 10)]), Err(NoCut::Outside));
    }
}
