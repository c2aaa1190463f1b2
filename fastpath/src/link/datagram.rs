//! The datagrams of the packet channel: header, checksum, and what is no datagram of ours.
//!
//! ```text
//!  0  0xc0 0x10  version:u8  kind:u8  crc:u32
//!  8  to:u64                            key of the receiving end, which it chose itself
//! 16  number:u64                        of the unit (data) or the question (probe)
//! 24  next:u64                          all units below have come
//! 32  received:u64                      bit n: unit next + 1 + n has come, too
//! 40  window:u16  flags:u8 0  len:u16 0 0
//! 48  payload
//! ```
//!
//! Little-endian. `window`: so many units from `next` on find room. The checksum (CRC-32 of IEEE 802.3) covers all of it with
//! the field as zero; bytes behind the payload are padding. Flag 1: the message goes on in the next unit. Flag 2: the
//! sender wants an acknowledgement at once.
//!
//! Does not send or receive.

use crc32fast::Hasher;

use super::msg::{u32_at, u64_at};

/// Bytes before the payload.
pub const HEADER_BYTES: usize = 48;
const MAGIC: [u8; 3] = [0xc0, 0x10, 1];
const CRC: std::ops::Range<usize> = 4..8;
const MORE: u8 = 1;
const ASK: u8 = 2;

/// What a datagram is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A unit: messages, or a part of one.
    Data,
    /// Acknowledgement only; the payload continues `received`.
    Ack,
    /// Does this path work?
    Probe,
    /// It does.
    ProbeAnswer,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Data, Self::Ack, Self::Probe, Self::ProbeAnswer];
}

/// Why a datagram was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DropCause {
    /// Shorter than it says.
    Truncated,
    /// Of another program, version or session.
    Foreign,
    /// The checksum is wrong.
    Damaged,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) to: u64,
    pub(super) number: u64,
    pub(super) next: u64,
    pub(super) received: u64,
    pub(super) window: u16,
    pub(super) more: bool,
    pub(super) ask: bool,
}

impl Header {
    /// The bytes that stand before `payload`.
    pub(super) fn seal(&self, payload: &[u8]) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..3].copy_from_slice(&MAGIC);
        out[3] = self.kind as u8;
        out[8..16].copy_from_slice(&self.to.to_le_bytes());
        out[16..24].copy_from_slice(&self.number.to_le_bytes());
        out[24..32].copy_from_slice(&self.next.to_le_bytes());
        out[32..40].copy_from_slice(&self.received.to_le_bytes());
        out[40..42].copy_from_slice(&self.window.to_le_bytes());
        out[42] = (u8::from(self.more) * MORE) | (u8::from(self.ask) * ASK);
        out[44..46].copy_from_slice(&(payload.len() as u16).to_le_bytes());
        let crc = checksum(&out, payload);
        out[CRC].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The key of what looks like a datagram; nothing else of it is known to be true.
    pub(super) fn key_of(bytes: &[u8]) -> Option<u64> {
        let head = bytes.first_chunk::<HEADER_BYTES>()?;
        head.starts_with(&MAGIC).then(|| u64_at(head, 8))
    }

    /// Header and payload of a datagram to `key`.
    pub(super) fn open(bytes: &[u8], key: u64) -> Result<(Self, &[u8]), DropCause> {
        let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(DropCause::Truncated);
        };
        let kind = Kind::ALL.iter().find(|&&k| k as u8 == head[3]);
        let (Some(&kind), true) = (kind, head.starts_with(&MAGIC) && u64_at(head, 8) == key) else {
            return Err(DropCause::Foreign);
        };
        let len = usize::from(u16::from_le_bytes([head[44], head[45]]));
        let payload = rest.get(..len).ok_or(DropCause::Truncated)?;
        let mut plain = *head;
        plain[CRC].fill(0);
        if checksum(&plain, payload) != u32_at(head, CRC.start) {
            return Err(DropCause::Damaged);
        }
        let header = Self {
            kind,
            to: key,
            number: u64_at(head, 16),
            next: u64_at(head, 24),
            received: u64_at(head, 32),
            window: u16::from_le_bytes([head[40], head[41]]),
            more: head[42] & MORE != 0,
            ask: head[42] & ASK != 0,
        };
        Ok((header, payload))
    }
}

fn checksum(head: &[u8; HEADER_BYTES], payload: &[u8]) -> u32 {
    let mut crc = Hasher::new();
    crc.update(head);
    crc.update(payload);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        kind: Kind::Data,
        to: 0x0102_0304_0506_0708,
        number: u64::MAX - 5,
        next: 77,
        received: 0xf00f,
        window: 512,
        more: true,
        ask: false,
    };

    #[test]
    fn what_was_sealed_is_opened_with_padding_behind_it() {
        let payload = [9; 100];
        for header in [
            HEADER,
            Header {
                kind: Kind::ProbeAnswer,
                more: false,
                ask: true,
                ..HEADER
            },
        ] {
            let mut bytes = [&header.seal(&payload)[..], &payload].concat();
            assert_eq!(Header::open(&bytes, HEADER.to), Ok((header, &payload[..])));
            bytes.extend_from_slice(&[3; 12]);
            assert_eq!(Header::open(&bytes, HEADER.to), Ok((header, &payload[..])));
        }
    }

    #[test]
    fn whatever_is_changed_or_missing_is_noticed() {
        let payload = [9; 100];
        let bytes = [&HEADER.seal(&payload)[..], &payload].concat();
        for at in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            assert!(Header::open(&damaged, HEADER.to).is_err(), "bit {at}");
        }
        for len in 0..bytes.len() {
            assert_eq!(
                Header::open(&bytes[..len], HEADER.to),
                Err(DropCause::Truncated),
                "{len}"
            );
        }
        assert_eq!(Header::open(&bytes, 5), Err(DropCause::Foreign));
    }
}
