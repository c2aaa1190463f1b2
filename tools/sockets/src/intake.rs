//! One input: a stream of messages, cut into frames where the socket put them.
//!
//! A message is a 4-byte big-endian length, with `vnet_hdr` a 4-byte big-endian length of a virtio-net
//! header, and then as many bytes as the first length says: that header and the frame.
//!
//! Invariants: a frame lies in one block, with its message's beginning right before it; one read a
//! call, and no copy but that of a message that a block's end cuts.
//!
//! Does not read by itself: the engine says when.

use std::io::{self, Read};
use std::ops::Range;

use colo_compare::Token;

use crate::address::Socket;
use crate::error::SocketsError;
use crate::slab::{BlockId, Side, Slab};

/// Longest message, without its length fields: what QEMU's own end takes.
pub(crate) const MESSAGE_MAX: usize = 4096 + 65_536;
/// A block with less room than this is left, so that no read is small for want of room.
const ROOM_MIN: usize = 128 << 10;
/// Bytes of one read: what is held between reading and comparing shall stay in the cache.
const READ_MAX: usize = 64 << 10;

/// What [`Intake::fill`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    /// As much as was asked for: there may be more.
    Full,
    /// All that there was.
    Drained,
    /// The stream has ended.
    Ended,
    /// There is no block to read into.
    NoRoom,
}

/// Why [`Intake::take`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The batch is full.
    Enough,
    /// The next message is not whole yet.
    Partial,
    /// Every slot of this side is taken.
    NoSlot,
}

/// A message where the socket put it.
#[derive(Debug)]
pub(crate) struct Message<'a> {
    start: usize,
    /// Bytes before the frame.
    pub(crate) lead: usize,
    pub(crate) end: usize,
    pub(crate) frame: &'a [u8],
}

impl Message<'_> {
    #[inline(always)]
    pub(crate) fn range(&self) -> Range<usize> {
        self.start..self.end
    }
}

/// The reading end of one input.
#[derive(Debug)]
pub(crate) struct Intake {
    socket: Socket,
    side: Side,
    vnet_hdr: bool,
    block: BlockId,
    /// The first byte that is in no frame yet, and the first that is not read yet.
    parsed: usize,
    filled: usize,
    /// Bytes of the stream before `parsed`.
    position: u64,
    ended: bool,
}

impl Intake {
    pub(crate) fn new(socket: Socket, side: Side, vnet_hdr: bool, slab: &mut Slab) -> Self {
        // A new slab has blocks.
        let block = slab.take_block(side).unwrap_or_default();
        let start = Slab::block_range(block).start;
        Self {
            socket,
            side,
            vnet_hdr,
            block,
            parsed: start,
            filled: start,
            position: 0,
            ended: false,
        }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Bytes that have been read and are in no frame yet.
    pub(crate) fn unparsed(&self) -> usize {
        self.filled - self.parsed
    }

    /// Whether the stream has ended and every frame of it was given out.
    pub(crate) fn is_finished(&self) -> bool {
        self.ended && self.parsed == self.filled
    }

    /// Reads once.
    pub(crate) fn fill(&mut self, slab: &mut Slab) -> Result<Filled, SocketsError> {
        if self.ended {
            return Ok(Filled::Ended);
        }
        if !self.make_room(slab) {
            return Ok(Filled::NoRoom);
        }
        let end = Slab::block_range(self.block)
            .end
            .min(self.filled + READ_MAX);
        let room = end - self.filled;
        match (&self.socket.file).read(slab.bytes_mut(self.filled..end)) {
            Ok(0) => {
                self.ended = true;
                Ok(Filled::Ended)
            }
            Ok(n) => {
                self.filled += n;
                Ok(if n == room {
                    Filled::Full
                } else {
                    Filled::Drained
                })
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Filled::Drained),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Filled::Full),
            Err(source) => Err(SocketsError::Read {
                socket: self.socket.name.clone(),
                at: self.position + (self.filled - self.parsed) as u64,
                source,
            }),
        }
    }

    /// Makes sure that a read has room. What is read and is no frame yet comes along.
    fn make_room(&mut self, slab: &mut Slab) -> bool {
        let range = Slab::block_range(self.block);
        let rest = self.parsed..self.filled;
        if slab.is_empty_but_for_reader(self.block) {
            if rest.start != range.start {
                slab.copy_within(rest, range.start);
                self.filled -= self.parsed - range.start;
                self.parsed = range.start;
            }
        } else if range.end - self.filled < ROOM_MIN {
            let Some(block) = slab.take_block(self.side) else {
                return range.end > self.filled;
            };
            let start = Slab::block_range(block).start;
            slab.copy_within(rest.clone(), start);
            slab.unpin(self.block);
            (self.block, self.parsed, self.filled) = (block, start, start + rest.len());
        }
        true
    }

    /// Where the first message begins that is not dealt with.
    #[inline(always)]
    pub(crate) fn next(&self) -> usize {
        self.parsed
    }

    /// The message that begins at `at`, when it is whole and right.
    #[inline(always)]
    pub(crate) fn peek<'a>(&self, at: usize, slab: &'a Slab) -> Option<Message<'a>> {
        let bytes = slab.bytes(at..self.filled);
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let (lead, len) = match self.vnet_hdr {
            false => (4, 4 + length),
            true => {
                let header = u32::from_be_bytes(*rest.first_chunk()?) as usize;
                (8 + header, 8 + length)
            }
        };
        if lead >= len || length > MESSAGE_MAX {
            return None;
        }
        Some(Message {
            start: at,
            lead,
            end: at + len,
            frame: bytes.get(lead..len)?,
        })
    }

    /// The messages that were looked at are dealt with, up to the one that begins at `next`. Gives where they lie.
    pub(crate) fn pass(&mut self, next: usize) -> Range<usize> {
        let passed = self.parsed..next;
        self.position += passed.len() as u64;
        self.parsed = next;
        passed
    }

    /// Cuts frames off until `batch` has `most`.
    pub(crate) fn take(
        &mut self,
        most: usize,
        batch: &mut Vec<Token>,
        slab: &mut Slab,
    ) -> Result<Taken, SocketsError> {
        while batch.len() < most {
            let Some((lead, len)) = self.message(slab.bytes(self.parsed..self.filled))? else {
                return self.partial();
            };
            let end = self.parsed + len;
            if end > self.filled {
                return self.partial();
            }
            let Some(token) = slab.insert(self.side, self.parsed..end, lead) else {
                return Ok(Taken::NoSlot);
            };
            batch.push(token);
            self.parsed = end;
            self.position += len as u64;
        }
        Ok(Taken::Enough)
    }

    /// The length of everything before the frame and of the whole message; `None` until they are
    /// there.
    #[inline(always)]
    fn message(&self, bytes: &[u8]) -> Result<Option<(usize, usize)>, SocketsError> {
        let Some((length, rest)) = bytes.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let found = u32::from_be_bytes(*length);
        if found == 0 || found as usize > MESSAGE_MAX {
            return Err(self.wrong_length(found));
        }
        if !self.vnet_hdr {
            return Ok(Some((4, 4 + found as usize)));
        }
        let Some(length) = rest.first_chunk::<4>() else {
            return Ok(None);
        };
        let header = u32::from_be_bytes(*length);
        if header >= found {
            return Err(SocketsError::VnetHeader {
                socket: self.socket.name.clone(),
                at: self.position,
                found: header,
                len: found,
            });
        }
        Ok(Some((8 + header as usize, 8 + found as usize)))
    }

    #[cold]
    fn wrong_length(&self, found: u32) -> SocketsError {
        SocketsError::Length {
            socket: self.socket.name.clone(),
            at: self.position,
            found,
            most: MESSAGE_MAX as u32,
        }
    }

    #[cold]
    fn partial(&self) -> Result<Taken, SocketsError> {
        let have = self.filled - self.parsed;
        if self.ended && have > 0 {
            return Err(SocketsError::Truncated {
                socket: self.socket.name.clone(),
                at: self.position,
                have,
            });
        }
        Ok(Taken::Partial)
    }
}
