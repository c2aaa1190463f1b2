//! What came over the channel as whole messages, whether it came as units or over TCP.
//!
//! Invariants: messages are taken in the order they were sent in, also where the peer moves between units and TCP; those for
//! the link layer are heeded here and go no further; a slot is kept until what is in it was taken or copied, and then
//! released, or becomes the pool's with the frame in it.
//!
//! Reads no socket: what there is, [`PacketLink::fill`] has taken.

use std::ops::Range;

use colo_compare::Token;

use super::msg::{BODY_MAX, HEAD_BYTES, Head, Malformed};
use super::reliable::Held;
use super::transport::{kind, say};
use super::{PacketLink, PacketLinkError, offer};
use crate::clock::now_us;
use crate::frame::FramePool;

/// The unit that messages are being read from.
#[derive(Debug)]
pub(super) enum Reading {
    Nothing,
    /// From this place of its slot on.
    Slot(Held),
    /// From this place of the put-together bytes on.
    Whole(usize),
}

/// Where a message's body lies.
#[derive(Debug)]
pub(super) enum Place {
    Stream,
    Slot,
    Whole,
}

/// What the stream had.
#[derive(Debug)]
enum InStream {
    Message(Head, Range<usize>),
    /// What comes as units is to be looked at again.
    UnitsFirst,
    Nothing,
}

impl PacketLink {
    /// The next message of a kind for the roles, and where its body lies.
    pub(super) fn locate(
        &mut self,
    ) -> Result<Option<(Head, Place, Range<usize>)>, PacketLinkError> {
        loop {
            let found = match self.in_unit()? {
                Some(found) => found,
                None if self.next_unit()? => continue,
                None => match self.in_stream()? {
                    InStream::Message(head, range) => (head, Place::Stream, range),
                    InStream::UnitsFirst => continue,
                    InStream::Nothing => return Ok(None),
                },
            };
            if found.0.is_known() {
                return Ok(Some(found));
            }
        }
    }

    /// The next message of the unit that is being read.
    fn in_unit(&mut self) -> Result<Option<(Head, Place, Range<usize>)>, PacketLinkError> {
        let (bytes, at, place) = match (&self.reading, &self.datagrams) {
            (Reading::Slot(unit), Some(datagrams)) => {
                let bytes = datagrams.bytes(unit.port, &unit.slot);
                (&bytes[..unit.end], unit.start, Place::Slot)
            }
            (Reading::Whole(at), _) => (&self.whole[..], *at, Place::Whole),
            _ => return Ok(None),
        };
        if at == bytes.len() {
            self.finish_unit();
            return Ok(None);
        }
        let (kind, len) = (0, bytes.len() - at);
        let head = Head::read(&bytes[at..])?.ok_or(Malformed { kind, len })?;
        let body = at + HEAD_BYTES..at + HEAD_BYTES + head.len;
        if body.end > bytes.len() {
            return Err(head.malformed().into());
        }
        match &mut self.reading {
            Reading::Slot(unit) => unit.start = body.end,
            Reading::Whole(at) => *at = body.end,
            Reading::Nothing => {}
        }
        Ok(Some((head, place, body)))
    }

    fn finish_unit(&mut self) {
        match std::mem::replace(&mut self.reading, Reading::Nothing) {
            Reading::Slot(unit) => {
                if let Some(datagrams) = &mut self.datagrams {
                    datagrams.release(unit.port, unit.slot);
                }
            }
            Reading::Whole(_) => self.whole.clear(),
            Reading::Nothing => {}
        }
    }

    /// Turns to the next unit that came as a datagram.
    fn next_unit(&mut self) -> Result<bool, PacketLinkError> {
        let Some(datagrams) = self.datagrams.as_mut().filter(|_| self.units) else {
            return Ok(false);
        };
        let Some(unit) = datagrams.core.receiver.take() else {
            return Ok(false);
        };
        if !unit.more && self.whole.is_empty() {
            self.reading = Reading::Slot(unit);
            return Ok(true);
        }
        let bytes = &datagrams.bytes(unit.port, &unit.slot)[unit.start..unit.end];
        let joined = join(&mut self.whole, &mut self.reading, unit.more, bytes);
        datagrams.release(unit.port, unit.slot);
        joined.map(|()| true)
    }

    /// The next message in the stream for the roles; those for the link layer are heeded.
    fn in_stream(&mut self) -> Result<InStream, PacketLinkError> {
        while let Some((head, range)) = self.stream.next()? {
            let Some(datagrams) = self.datagrams.as_mut() else {
                return Ok(InStream::Message(head, range));
            };
            let receiver = &mut datagrams.core.receiver;
            match head.kind {
                kind::OFFER => {
                    let body = self.stream.bytes(range);
                    let offer = self.peer.map(|peer| offer::decode(body, peer));
                    if let Some(offer) = offer {
                        datagrams.take_offer(now_us(), &offer.ok_or_else(|| head.malformed())?);
                    }
                }
                kind::PING => say(&mut self.stream, kind::PONG, 0, head.seq, &[]),
                kind::PONG => datagrams.take_pong(now_us(), head.seq),
                kind::TO_UNITS if !self.units && head.seq == receiver.next() => {
                    self.units = true;
                    return Ok(InStream::UnitsFirst);
                }
                kind::TO_STREAM if self.units && head.seq == receiver.next() => self.units = false,
                kind::UNIT if self.units => {
                    if receiver.supply(head.seq).map_err(|()| head.malformed())? {
                        let bytes = self.stream.bytes(range);
                        join(&mut self.whole, &mut self.reading, head.epoch != 0, bytes)?;
                        return Ok(InStream::UnitsFirst);
                    }
                }
                // Those of later versions are skipped (rule 22).
                later if later > kind::PONG => {}
                plain if !self.units && plain < kind::OFFER => {
                    return Ok(InStream::Message(head, range));
                }
                _ => return Err(head.malformed().into()),
            }
        }
        Ok(InStream::Nothing)
    }

    /// The frame that was just located. Where it is the longer part of what is left of its datagram, it stays where it
    /// is, and what follows it is put aside; else it is copied.
    pub(super) fn take_frame(
        &mut self,
        place: &Place,
        range: Range<usize>,
        frames: &mut FramePool,
    ) -> Result<Token, PacketLinkError> {
        if let Some(token) = self.adopt(place, range.clone(), frames) {
            self.frames.in_place += 1;
            return Ok(token);
        }
        self.frames.copied += 1;
        let (len, max) = (range.len(), frames.frame_bytes_max());
        let token = frames.from_bytes(self.body(place, range));
        token.ok_or(PacketLinkError::LongFrame { len, max })
    }

    fn adopt(
        &mut self,
        place: &Place,
        range: Range<usize>,
        frames: &mut FramePool,
    ) -> Option<Token> {
        let datagrams = self.datagrams.as_mut()?;
        let in_slot = matches!(place, Place::Slot);
        let longer = |unit: &Held| range.len() >= unit.end - range.end;
        let mut unit = match std::mem::replace(&mut self.reading, Reading::Nothing) {
            Reading::Slot(unit) if in_slot && longer(&unit) => unit,
            reading => {
                self.reading = reading;
                return None;
            }
        };
        let rest = &datagrams.bytes(unit.port, &unit.slot)[range.end..unit.end];
        self.whole.extend_from_slice(rest);
        match datagrams.adopt(unit.port, unit.slot, range, frames) {
            Ok(token) => {
                if !self.whole.is_empty() {
                    self.reading = Reading::Whole(0);
                }
                Some(token)
            }
            Err(slot) => {
                self.whole.clear();
                unit.slot = slot;
                self.reading = Reading::Slot(unit);
                None
            }
        }
    }

    /// Where the body of a message lies that was just located.
    pub(super) fn body(&self, place: &Place, range: Range<usize>) -> &[u8] {
        match (place, &self.reading, &self.datagrams) {
            (Place::Slot, Reading::Slot(unit), Some(datagrams)) => {
                &datagrams.bytes(unit.port, &unit.slot)[range]
            }
            (Place::Whole, ..) => &self.whole[range],
            _ => self.stream.bytes(range),
        }
    }
}

/// Appends a unit to the message that it belongs to.
fn join(
    whole: &mut Vec<u8>,
    reading: &mut Reading,
    more: bool,
    bytes: &[u8],
) -> Result<(), PacketLinkError> {
    let len = whole.len() + bytes.len();
    if len > HEAD_BYTES + BODY_MAX {
        return Err(Malformed {
            kind: kind::UNIT,
            len,
        }
        .into());
    }
    whole.extend_from_slice(bytes);
    if !more {
        *reading = Reading::Whole(0);
    }
    Ok(())
}
