//! The classic pcap format: a file header of 24 bytes, then records of 16 bytes and a frame.
//!
//! Invariant: `at` is the start of a record or the end of the file.
//!
//! The frame check sequence that some captures keep is not taken off: IP and ARP lengths exclude it.

use super::{Fault, Fields, Problem, Record, check_lengths, check_link};

const HEADER_BYTES: usize = 24;
const RECORD_HEADER_BYTES: usize = 16;
/// Magic numbers, as the capturing host would read them.
const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const VERSION: (u16, u16) = (2, 4);

/// Whether these are the first bytes of a pcap file.
pub(super) fn knows(magic: [u8; 4]) -> bool {
    resolution(u32::from_le_bytes(magic)).is_some()
        || resolution(u32::from_be_bytes(magic)).is_some()
}

/// Nanoseconds per unit of a record's fraction.
fn resolution(magic: u32) -> Option<u64> {
    match magic {
        MICROSECONDS => Some(1000),
        NANOSECONDS => Some(1),
        _ => None,
    }
}

#[derive(Debug, Clone)]
pub(super) struct Pcap<'a> {
    fields: Fields<'a>,
    unit_ns: u64,
    at: usize,
}

impl<'a> Pcap<'a> {
    /// `bytes` begins with a magic number that [`knows`] accepts.
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, Fault> {
        let little = bytes.first_chunk().map(|magic| u32::from_le_bytes(*magic));
        let big = bytes.first_chunk().map(|magic| u32::from_be_bytes(*magic));
        let big_endian = little.and_then(resolution).is_none();
        let unit_ns = little.and_then(resolution).or(big.and_then(resolution));
        let fields = Fields { bytes, big_endian };
        let header = fields.take(0, HEADER_BYTES, "the file header")?;
        let version = (fields.u16(header, 4), fields.u16(header, 6));
        if version != VERSION {
            let (major, minor) = version;
            return Err(Fault {
                offset: 4,
                problem: Problem::Version { major, minor },
            });
        }
        // The upper half says how long a frame check sequence is.
        check_link(20, fields.u32(header, 20) as u16)?;
        Ok(Self {
            fields,
            unit_ns: unit_ns.unwrap_or(1000),
            at: HEADER_BYTES,
        })
    }

    pub(super) fn next_record(&mut self) -> Result<Option<Record<'a>>, Fault> {
        let (fields, at) = (self.fields, self.at);
        if at == fields.bytes.len() {
            return Ok(None);
        }
        let header = fields.take(at, RECORD_HEADER_BYTES, "a record header")?;
        let [seconds, fraction, captured, original] =
            [0, 4, 8, 12].map(|field| fields.u32(header, field));
        check_lengths(at, captured, original)?;
        let from = at + RECORD_HEADER_BYTES;
        let frame = fields.take(from, captured as usize, "a packet")?;
        self.at = from + frame.len();
        let at_ns = u64::from(seconds) * 1_000_000_000 + u64::from(fraction) * self.unit_ns;
        Ok(Some(Record {
            number: 0,
            at_ns,
            offset: at as u64,
            frame,
        }))
    }
}
