//! Headers on their way over the link, as what has changed since the last ones of the same flow.
//!
//! A message is `slot:u8 len:u8`, then tokens until `len` bytes are written: the upper five bits say how many bytes
//! are as in the slot's last header, the lower three how many follow that are not. Both ends begin with empty slots
//! and see the same messages in the same order.
//!
//! Invariants: nothing is lost: the reader gives what was written, byte for byte; all memory is taken in `new`; bytes
//! that make no sense are an error, never a panic, and never give more than [`HEADER_LEN_MAX`] bytes.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

/// Longest header that is written: longer ones travel with their frames.
pub const HEADER_LEN_MAX: usize = 128;
const SLOTS: usize = 256;
const SKIP_MAX: usize = 31;
const CHANGED_MAX: usize = 7;

type Slots = Box<[[u8; HEADER_LEN_MAX]]>;

fn slots() -> Slots {
    vec![[0; HEADER_LEN_MAX]; SLOTS].into_boxed_slice()
}

/// Why headers cannot be read: the two ends have lost each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The message ends too early.
    #[error("a header of {len} bytes ends after {at}; end this session")]
    Truncated {
        /// What it says it has.
        len: usize,
        /// Bytes that were written.
        at: usize,
    },
    /// It says more than it may.
    #[error(
        "a header says that it has {len} bytes, where {HEADER_LEN_MAX} are the most; end this session"
    )]
    TooLong {
        /// What it says.
        len: usize,
    },
}

/// The sending end.
#[derive(Debug)]
pub struct HeaderWriter {
    slots: Slots,
}

impl Default for HeaderWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl HeaderWriter {
    /// One that has sent nothing yet.
    pub fn new() -> Self {
        Self { slots: slots() }
    }

    /// Appends the message for a header. False, and nothing is appended, when it is longer than
    /// [`HEADER_LEN_MAX`].
    pub fn write(&mut self, header: &[u8], out: &mut Vec<u8>) -> bool {
        if header.len() > HEADER_LEN_MAX {
            return false;
        }
        let slot = slot_of(header);
        let last = &mut self.slots[usize::from(slot)];
        out.extend_from_slice(&[slot, header.len() as u8]);
        let mut at = 0;
        while at < header.len() {
            let run = |from: usize, most: usize, is_same: bool| {
                let sides = header[from..].iter().zip(&last[from..]);
                let equal = sides.take(most).take_while(|(a, b)| (a == b) == is_same);
                equal.count()
            };
            let skip = run(at, SKIP_MAX, true);
            let changed = run(at + skip, CHANGED_MAX, false);
            out.push((skip << 3 | changed) as u8);
            out.extend_from_slice(&header[at + skip..at + skip + changed]);
            at += skip + changed;
        }
        last[..header.len()].copy_from_slice(header);
        true
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct HeaderReader {
    slots: Slots,
}

impl Default for HeaderReader {
    fn default() -> Self {
        Self::new()
    }
}

impl HeaderReader {
    /// One that has received nothing yet.
    pub fn new() -> Self {
        Self { slots: slots() }
    }

    /// Reads one message. Gives the header, and what comes behind the message.
    pub fn read<'a, 'b>(
        &'a mut self,
        bytes: &'b [u8],
    ) -> Result<(&'a [u8], &'b [u8]), HeaderError> {
        let [slot, len, rest @ ..] = bytes else {
            return Err(HeaderError::Truncated { len: 0, at: 0 });
        };
        let mut rest = rest;
        let len = usize::from(*len);
        let last = &mut self.slots[usize::from(*slot)];
        let header = last.get_mut(..len).ok_or(HeaderError::TooLong { len })?;
        let mut at = 0;
        while at < len {
            let truncated = HeaderError::Truncated { len, at };
            let (token, behind) = rest.split_first().ok_or(truncated)?;
            let (skip, n) = (usize::from(token >> 3), usize::from(token & 7));
            let changed = behind.get(..n).ok_or(truncated)?;
            let place = header.get_mut(at + skip..at + skip + n).ok_or(truncated)?;
            place.copy_from_slice(changed);
            // A token that says nothing would never end.
            at += (skip + n).max(1);
            rest = &behind[n..];
        }
        Ok((header, rest))
    }
}

/// Flows that are told apart by addresses and ports mostly have slots of their own. Which one it is
/// matters to nobody else.
fn slot_of(header: &[u8]) -> u8 {
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    let is_v6 = header.get(12..14) == Some(&[0x86, 0xdd]);
    let ends = if is_v6 { 22..58 } else { 26..38 };
    let ends = header.get(ends).unwrap_or_default();
    let words = ends.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from(u32::from_le_bytes(word))
    });
    let hash = words.fold(header.len() as u64, |hash, word| {
        (hash.rotate_left(23) ^ word).wrapping_mul(MULTIPLIER)
    });
    (hash >> 56) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Segment, Side};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            headers in proptest::collection::vec(
                (0u8..3, proptest::collection::vec(0u8..4, 0..=HEADER_LEN_MAX)), 0..30,
            ),
            behind: Vec<u8>,
        ) {
            let (mut writer, mut reader) = (HeaderWriter::new(), HeaderReader::new());
            for (flow, mut header) in headers {
                if let Some(byte) = header.get_mut(30) {
                    *byte = flow;
                }
                let mut message = Vec::new();
                prop_assert!(writer.write(&header, &mut message));
                message.extend_from_slice(&behind);
                prop_assert_eq!(reader.read(&message), Ok((&header[..], &behind[..])));
            }
            prop_assert!(!writer.write(&[0; HEADER_LEN_MAX + 1], &mut Vec::new()));
        }

        #[test]
        fn any_bytes_are_read_or_refused(messages in proptest::collection::vec(any::<Vec<u8>>(), 0..9)) {
            let mut reader = HeaderReader::new();
            for message in messages {
                if let Ok((header, rest)) = reader.read(&message) {
                    prop_assert!(header.len() <= HEADER_LEN_MAX && message.ends_with(rest));
                }
            }
        }
    }

    #[test]
    fn the_headers_of_a_stream_are_few_bytes() {
        const PAYLOAD: u32 = 1400;
        for side in [Side::V4, Side::V6] {
            let (mut writer, mut bytes, mut sent) = (HeaderWriter::new(), 0, 0u32);
            let mut seq = 0xfff0_0000u32;
            for n in 0..1000u16 {
                let segment = Segment::new(side).seq(seq).ack(77).id(n.wrapping_mul(7));
                let segment = segment
                    .option(&[1, 1])
                    .timestamps(u32::from(n) * 3 + 900, 5);
                let frame = segment.payload(&[n as u8; PAYLOAD as usize]).bytes();
                let mut message = Vec::new();
                writer.write(&frame[..frame.len() - PAYLOAD as usize], &mut message);
                (bytes, sent) = (bytes + message.len() as u32, sent + PAYLOAD);
                seq = seq.wrapping_add(PAYLOAD);
            }
            // Beside them go a digest, a length, the message's header of 24 bytes, and a report of 8.
            let all = bytes + 1000 * (16 + 2 + 24 + 8);
            assert!(
                all * 20 < sent,
                "{side:?}: {bytes} and {all} bytes of {sent}"
            );
        }
    }
}
