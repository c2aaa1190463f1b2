//! Chunks as bytes: a 64-byte header, checksummed by itself, and a payload whose checksum is in it.
//!
//! The header, little-endian: `0 "COLP" · 4 version:u16 · 6 kind:u16 · 8 length:u32 · 12 stream:u16 · 14 0:u16 ·
//! 16 generation:u64 · 24 epoch:u64 · 32 attempt:u32 · 36 sequence:u32 · 40 items:u32 · 44 payload_crc:u32 ·
//! 48 bulk:u32 · 52 0:8 bytes · 60 header_crc:u32`. Zeros are for later versions, and not looked at.
//!
//! The last `bulk` bytes of a payload are not under its checksum: pages, each of which has a digest of its own, stronger
//! than the checksum and verified before the commit (rule 13). Only to peers that know it
//! (`VERSION_BULK` of the control channel); to the version before, these bytes are 0.
//!
//! Invariants: a length is bounded before it is used; damage in a payload leaves the header true, so the next chunk is
//! found behind it; damage in a header ends the stream.
//!
//! CRC-32 (IEEE), which crc32fast computes with carry-less multiplication, faster than memory gives the bytes.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of the payload of an End chunk.
pub(super) const TOTALS_BYTES: usize = 32;
const MAGIC: [u8; 4] = *b"COLP";
const VERSION: u16 = 1;

/// What a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// Live pages of the initial synchronisation, outside a checkpoint.
    Sync = 1,
    /// First of a checkpoint, on each stream.
    Begin = 2,
    /// A record of machine state.
    State = 3,
    /// Pages.
    Pages = 4,
    /// Digests of pages.
    Digests = 5,
    /// Last of a checkpoint, on each stream: what this stream had.
    End = 6,
    /// The checkpoint is given up; on each stream.
    Abort = 7,
    /// Pages sent ahead of the checkpoint of this epoch, outside of it.
    Ahead = 8,
    /// Names of pages that were sent ahead of this checkpoint.
    Named = 9,
}

impl Kind {
    /// What a checkpoint is made of, between its begin and its end.
    pub(super) fn is_content(self) -> bool {
        matches!(
            self,
            Self::State | Self::Pages | Self::Named | Self::Digests
        )
    }

    /// None for kinds of a later version.
    pub(super) fn from_wire(kind: u16) -> Option<Self> {
        Some(match kind {
            1 => Self::Sync,
            2 => Self::Begin,
            3 => Self::State,
            4 => Self::Pages,
            5 => Self::Digests,
            6 => Self::End,
            7 => Self::Abort,
            8 => Self::Ahead,
            9 => Self::Named,
            _ => return None,
        })
    }
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not a chunk.
    #[error("bytes that are no chunk of a page channel (they begin with {0:02x?})")]
    Foreign([u8; 4]),
    /// A version that was not negotiated (rule 22).
    #[error("chunk of version {theirs}, {VERSION} here; run the same version on both hosts")]
    Version {
        /// The peer's.
        theirs: u16,
    },
    /// Damaged on the way.
    #[error("damaged chunk header")]
    Checksum,
    /// More than a buffer holds.
    #[error("chunk of {length} bytes, at most {max} here; set the same chunk size on both hosts")]
    Length {
        /// What it says.
        length: u32,
        /// What fits.
        max: usize,
    },
    /// A chunk of another stream.
    #[error("chunk of stream {theirs}; the streams are joined crosswise")]
    Stream {
        /// The peer's number.
        theirs: u16,
    },
}

/// A header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// See [`Kind`]; kinds of a later version stay numbers.
    pub kind: u16,
    /// Bytes of payload.
    pub length: u32,
    /// The stream it was sent on.
    pub stream: u16,
    /// Under which it was sent.
    pub generation: u64,
    /// Which the checkpoint ends.
    pub epoch: u64,
    /// Rises with each checkpoint begun on the channel, one of the same epoch included.
    pub attempt: u32,
    /// Place within the checkpoint on this stream, from 0.
    pub sequence: u32,
    /// How many pages, states or digests.
    pub items: u32,
    /// CRC-32 of the payload without its bulk.
    pub payload_crc: u32,
    /// Bytes at the end of the payload that are not under the checksum.
    pub bulk: u32,
}

impl Header {
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.stream.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.generation.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.attempt.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.items.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.payload_crc.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.bulk.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Of a stream whose chunks hold at most `max` bytes.
    pub(super) fn from_bytes(
        bytes: &[u8; HEADER_BYTES],
        stream: usize,
        max: usize,
    ) -> Result<Self, HeaderError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if magic != MAGIC {
            return Err(HeaderError::Foreign(magic));
        }
        if crc32fast::hash(&bytes[..60]) != u32_at(60) {
            return Err(HeaderError::Checksum);
        }
        let (version, length, theirs) = (u16_at(4), u32_at(8), u16_at(12));
        if version != VERSION {
            return Err(HeaderError::Version { theirs: version });
        }
        if length as usize > max {
            return Err(HeaderError::Length { length, max });
        }
        if usize::from(theirs) != stream {
            return Err(HeaderError::Stream { theirs });
        }
        Ok(Self {
            kind: u16_at(6),
            length,
            stream: theirs,
            generation: u64_at(16),
            epoch: u64_at(24),
            attempt: u32_at(32),
            sequence: u32_at(36),
            items: u32_at(40),
            payload_crc: u32_at(44),
            bulk: u32_at(48),
        })
    }

    /// Only pages have digests besides, and no chunk has more bulk than bytes.
    pub(super) fn may_have_bulk(&self) -> bool {
        self.bulk == 0 || (self.kind == Kind::Pages as u16 && self.bulk <= self.length)
    }

    /// Bytes of the payload that are under its checksum.
    pub(super) fn summed_bytes(&self) -> usize {
        self.length.saturating_sub(self.bulk) as usize
    }
}

/// What a checkpoint has, on one stream or on all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Chunks, without those that begin and end it.
    pub chunks: u64,
    /// Records of machine state.
    pub states: u64,
    /// Pages, and names of pages that were sent ahead.
    pub pages: u64,
    /// Digests.
    pub digests: u64,
}

impl Totals {
    pub(super) fn add_chunk(&mut self, kind: Kind, items: u32) {
        let items = u64::from(items);
        self.chunks += 1;
        match kind {
            Kind::State => self.states += items,
            Kind::Pages | Kind::Named => self.pages += items,
            Kind::Digests => self.digests += items,
            Kind::Sync | Kind::Ahead | Kind::Begin | Kind::End | Kind::Abort => {}
        }
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.chunks += other.chunks;
        self.states += other.states;
        self.pages += other.pages;
        self.digests += other.digests;
    }

    pub(super) fn to_bytes(self) -> [u8; TOTALS_BYTES] {
        let mut bytes = [0; TOTALS_BYTES];
        let words = [self.chunks, self.states, self.pages, self.digests];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            kind: Kind::Pages as u16,
            length: 4096,
            stream: 3,
            generation: 7,
            epoch: u64::MAX,
            attempt: 9,
            sequence: 2,
            items: 1,
            payload_crc: 0xdead_beef,
            bulk: 77,
        }
    }

    #[test]
    fn headers_come_back_and_any_flipped_bit_is_seen() {
        let bytes = header().to_bytes();
        assert_eq!(Header::from_bytes(&bytes, 3, 4096), Ok(header()));
        for bit in 0..HEADER_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            let found = Header::from_bytes(&damaged, 3, 4096);
            let expected = match bit / 8 {
                0..4 => HeaderError::Foreign([damaged[0], damaged[1], damaged[2], damaged[3]]),
                _ => HeaderError::Checksum,
            };
            assert_eq!(found, Err(expected), "bit {bit}");
        }
    }

    #[test]
    fn rule_22_what_cannot_be_read_is_refused_by_name() {
        let bytes = header().to_bytes();
        let too_long = HeaderError::Length {
            length: 4096,
            max: 4095,
        };
        assert_eq!(Header::from_bytes(&bytes, 3, 4095), Err(too_long));
        let crosswise = HeaderError::Stream { theirs: 3 };
        assert_eq!(Header::from_bytes(&bytes, 0, 4096), Err(crosswise));
        let mut later = bytes;
        later[4] = 2;
        let crc = crc32fast::hash(&later[..60]);
        later[60..].copy_from_slice(&crc.to_le_bytes());
        let version = HeaderError::Version { theirs: 2 };
        assert_eq!(Header::from_bytes(&later, 3, 4096), Err(version));
        assert!(version.to_string().contains("version 2, 1 here"));
    }
}
