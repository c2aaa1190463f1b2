//! What leaves of a frame: its own bytes, in one piece or several, or its twin's.
//!
//! Invariants: payload that was compared in place leaves with the bytes it was compared with, or under a checksum of
//! them (rule 10); a twin gets the header of the frame that leaves with it.
//!
//! Does not send.

use colo_compare::{HEADER_MAX, Token};

use super::slots::{CopyCause, PIECES_MAX};
use super::{FramePool, checksum};

/// A piece of a frame in this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub address: *const u8,
    /// Length in bytes.
    pub len: usize,
}

/// A frame in one piece or a few, in order.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    list: [Piece; PIECES_MAX],
    count: usize,
}

impl Pieces {
    fn none() -> Self {
        let nothing = Piece {
            address: std::ptr::null(),
            len: 0,
        };
        Self {
            list: [nothing; PIECES_MAX],
            count: 0,
        }
    }

    fn one(piece: Piece) -> Self {
        let list = [piece; PIECES_MAX];
        Self { list, count: 1 }
    }

    fn push(&mut self, piece: Piece) {
        self.list[self.count] = piece;
        self.count += 1;
    }

    /// The pieces.
    pub fn as_slice(&self) -> &[Piece] {
        &self.list[..self.count]
    }
}

impl FramePool {
    /// Whether the checksum of a frame of `len` bytes with this header can bind its payload, from `at` on, to what
    /// was compared ([`FramePool::bind`]).
    pub(crate) fn can_bind(header: &[u8], len: usize, at: usize) -> bool {
        at <= header.len().min(HEADER_MAX) && checksum::applies(header, len, at)
    }

    /// The payload of a frame that is in place, from `at` on, was compared and has this sum: it leaves under a
    /// checksum made of that (rule 10).
    pub(crate) fn bind(&self, token: &Token, at: usize, sum: u16) {
        self.slots[token.slot() as usize].set_sum(at, sum);
    }

    /// Where the bytes lie that are to be sent. The addresses are valid until the frame is
    /// released.
    pub fn pieces(&mut self, token: &Token) -> Pieces {
        if let Some((twin, at)) = self.slots[token.slot() as usize].twin() {
            return Pieces::one(self.join_twin(token.slot(), twin, at));
        }
        self.seal(token);
        let held = self.host_bytes(token.slot());
        let mut pieces = match held {
            [] => Pieces::none(),
            _ => Pieces::one(Piece {
                address: held.as_ptr(),
                len: held.len(),
            }),
        };
        if let (Some(place), Some(guest)) = (self.place_of(token.slot()), &self.guest) {
            for segment in place.rest() {
                let len = segment.len as usize;
                // In RAM when the buffer was taken, and RAM does not shrink.
                if let Ok(address) = guest.host_range(segment.gpa, len) {
                    pieces.push(Piece { address, len });
                }
            }
        }
        pieces
    }

    /// The bytes that are to be sent, in one piece: copied together if they lie apart.
    pub fn in_one_piece(&mut self, token: &Token) -> &[u8] {
        if let Some((twin, at)) = self.slots[token.slot() as usize].twin() {
            self.join_twin(token.slot(), twin, at);
            return self.host_bytes(twin);
        }
        self.seal(token);
        self.settle(token.slot(), CopyCause::Gathered);
        self.host_bytes(token.slot())
    }

    /// Binds payload that leaves from the guest's memory to what was compared: its checksum goes into
    /// the header (rule 10).
    fn seal(&mut self, token: &Token) {
        let slot = token.slot();
        let state = &self.slots[slot as usize];
        if let Some((at, sum)) = state.sum() {
            let (start, held, len) = (state.start(), state.held(), state.len());
            let header = self.memory.bytes_mut(slot, start, held.min(at));
            checksum::write(header, len, at, sum);
        }
    }

    /// Puts the header of `slot` before the payload of its twin, which begins at the same place.
    fn join_twin(&mut self, slot: u32, twin: u32, at: usize) -> Piece {
        let mut header = [0; HEADER_MAX];
        let at = at.min(HEADER_MAX);
        header[..at].copy_from_slice(&self.host_bytes(slot)[..at]);
        let start = self.slots[twin as usize].start();
        let front = self.memory.bytes_mut(twin, start, at);
        front.copy_from_slice(&header[..at]);
        let frame = self.host_bytes(twin);
        Piece {
            address: frame.as_ptr(),
            len: frame.len(),
        }
    }
}
