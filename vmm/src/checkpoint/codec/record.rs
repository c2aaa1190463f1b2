//! Page records: runs of pages on the wire, one run in each chunk of the page channel.
//!
//! ```text
//! chunk   u8 version (1; 2: pages apart), u8 flags (1: digests), u16 zero, u32 number of records, records
//! record  u8 kind, LEB128 page number less the least that it can be, u16 length (Delta and Lz4 only),
//!         16 bytes digest of the resulting page (with the flag; not for Zero), data
//! ```
//!
//! All little-endian. The least number of a chunk's first record is 0, of another one the number before it plus 1: a page twice
//! or out of order can't be said. In version 2, which always has digests, the data of Raw and Same records lies behind all
//! records, page after page: such pages leave from where they were captured, and only the records are under the chunk's checksum. A chunk stands alone, so that chunks may travel on several streams.
//!
//! Invariants: a cut at any byte is an error, and so is a byte too many; no record names a page outside the
//! guest's; an encoder never leaves half a record.
//!
//! Does not see other chunks: whether a page is in two chunks of a checkpoint is for the stage to refuse.

use super::compress::{CompressError, decompress};
use super::delta::{self, DeltaError};
use super::digest::DIGEST_BYTES;
use super::{Page, PageDigest, PageKey};
use crate::checkpoint::pages::PAGE_BYTES;

/// Bytes before the first record.
pub const CHUNK_HEAD_BYTES: usize = 8;
/// Most bytes that a record takes; an encoder with so much room takes any page.
pub const RECORD_MAX_BYTES: usize = 1 + NUMBER_MAX_BYTES + 2 + DIGEST_BYTES + PAGE_BYTES;

const VERSION: u8 = 1;
/// With whole pages behind the records.
const VERSION_APART: u8 = 2;
const FLAG_DIGESTS: u8 = 1;
/// LEB128 of 64 bits.
const NUMBER_MAX_BYTES: usize = 10;

/// How a page travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// It holds zeros.
    Zero = 0,
    /// What differs from the page that the other side has.
    Delta = 1,
    /// LZ4.
    Lz4 = 2,
    /// As it is.
    Raw = 3,
    /// As it is, though its digest says that the other side has the same: to prove it (verifying mode).
    Same = 4,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        let kinds = [Self::Zero, Self::Delta, Self::Lz4, Self::Raw, Self::Same];
        kinds.into_iter().find(|&kind| kind as u8 == byte)
    }

    fn has_length(self) -> bool {
        matches!(self, Self::Delta | Self::Lz4)
    }

    fn has_digest(self) -> bool {
        self != Self::Zero
    }

    /// Its data is the page.
    pub fn is_whole(self) -> bool {
        matches!(self, Self::Raw | Self::Same)
    }
}

/// A page as it goes into a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload<'a> {
    /// Zeros.
    Zero,
    /// From [`delta::encode`].
    Delta(&'a [u8]),
    /// From [`super::compress::Lz4`].
    Lz4(&'a [u8]),
    /// The page.
    Raw(&'a Page),
    /// The page, to be compared with the other side's.
    Same(&'a Page),
}

impl<'a> Payload<'a> {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Zero => Kind::Zero,
            Self::Delta(_) => Kind::Delta,
            Self::Lz4(_) => Kind::Lz4,
            Self::Raw(_) => Kind::Raw,
            Self::Same(_) => Kind::Same,
        }
    }

    /// Its bytes.
    pub fn data(&self) -> &'a [u8] {
        match *self {
            Self::Zero => &[],
            Self::Delta(data) | Self::Lz4(data) => data,
            Self::Raw(page) | Self::Same(page) => page,
        }
    }
}

/// Why a record was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The buffer does not even take the head of a chunk.
    #[error("a buffer of {bytes} bytes is too small for a chunk of pages; raise chunk_bytes")]
    NoHead {
        /// Of the buffer.
        bytes: usize,
    },
    /// The chunk has no room: finish it and start another.
    #[error("the chunk has no room for page {number}")]
    Full {
        /// The page.
        number: u64,
    },
    /// Numbers must rise.
    #[error("page {number} does not rise above the page before; sort the pages of a chunk")]
    Order {
        /// The page.
        number: u64,
    },
    /// A delta or compressed page that is not smaller than the page: send it raw.
    #[error("page {number} takes {bytes} bytes as a delta or compressed; send it raw")]
    Long {
        /// The page.
        number: u64,
        /// Of payload.
        bytes: usize,
    },
}

/// Writes the records of one chunk into a send buffer.
#[derive(Debug)]
pub struct Encoder<'a> {
    out: &'a mut [u8],
    len: usize,
    count: u32,
    /// The least number that the next record can have.
    next: u64,
    has_digests: bool,
    /// Bytes that go behind the records; none if pages are among them.
    apart: Option<usize>,
}

impl<'a> Encoder<'a> {
    /// For a buffer of at least [`CHUNK_HEAD_BYTES`]. A buffer that should take any page has
    /// [`RECORD_MAX_BYTES`] more. With `has_digests` the other side checks every page that it makes.
    pub fn new(out: &'a mut [u8], has_digests: bool) -> Result<Self, EncodeError> {
        let bytes = out.len();
        if bytes < CHUNK_HEAD_BYTES {
            return Err(EncodeError::NoHead { bytes });
        }
        Ok(Self {
            out,
            len: CHUNK_HEAD_BYTES,
            count: 0,
            next: 0,
            has_digests,
            apart: None,
        })
    }

    /// The same with digests, and whole pages are left out: the caller sends them behind the chunk, in order. They count as if
    /// they were in the buffer.
    pub fn apart(out: &'a mut [u8]) -> Result<Self, EncodeError> {
        let encoder = Self::new(out, true)?;
        Ok(Self {
            apart: Some(0),
            ..encoder
        })
    }

    /// Adds a page. After an error the chunk is as it was.
    pub fn push(
        &mut self,
        number: u64,
        payload: &Payload<'_>,
        digest: PageDigest,
    ) -> Result<(), EncodeError> {
        let gap = number
            .checked_sub(self.next)
            .ok_or(EncodeError::Order { number })?;
        // No page has the highest number: there would be none to follow it.
        let next = number.checked_add(1).ok_or(EncodeError::Order { number })?;
        let (kind, data) = (payload.kind(), payload.data());
        let mut head = [0; RECORD_MAX_BYTES - PAGE_BYTES];
        head[0] = kind as u8;
        let mut head_len = 1 + put_number(gap, &mut head[1..]);
        let mut add = |bytes: &[u8]| {
            head[head_len..head_len + bytes.len()].copy_from_slice(bytes);
            head_len += bytes.len();
        };
        if kind.has_length() {
            let bytes = data.len();
            if bytes >= PAGE_BYTES {
                return Err(EncodeError::Long { number, bytes });
            }
            add(&(bytes as u16).to_le_bytes());
        }
        if self.has_digests && kind.has_digest() {
            add(&digest.to_bytes());
        }
        let apart = self.apart.filter(|_| kind.is_whole());
        if head_len + data.len() > self.room() {
            return Err(EncodeError::Full { number });
        }
        let here = if apart.is_some() { &[] } else { data };
        let end = self.len + head_len + here.len();
        let room = self.out.get_mut(self.len..end);
        let room = room.ok_or(EncodeError::Full { number })?;
        let (head_room, data_room) = room.split_at_mut(head_len);
        head_room.copy_from_slice(&head[..head_len]);
        data_room.copy_from_slice(here);
        if let Some(bytes) = apart {
            self.apart = Some(bytes + data.len());
        }
        self.len = end;
        self.count += 1;
        self.next = next;
        Ok(())
    }

    /// How many pages are in it.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many bytes [`Self::finish`] would give.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without records.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many bytes are left.
    pub fn room(&self) -> usize {
        self.out.len() - self.len - self.apart.unwrap_or(0)
    }

    /// Completes the chunk: so many bytes of the buffer are to be sent.
    pub fn finish(self) -> usize {
        let version = if self.apart.is_some() {
            VERSION_APART
        } else {
            VERSION
        };
        let flags = if self.has_digests { FLAG_DIGESTS } else { 0 };
        let [a, b, c, d] = self.count.to_le_bytes();
        self.out[..CHUNK_HEAD_BYTES].copy_from_slice(&[version, flags, 0, 0, a, b, c, d]);
        self.len
    }
}

/// Why a chunk is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// It ends in its head or in a record.
    #[error("page chunk is cut off in its record {record}; the checkpoint has to be sent again")]
    Cut {
        /// Counted from 0.
        record: u32,
    },
    /// There are bytes behind the last record.
    #[error("page chunk has {bytes} bytes too many; the checkpoint has to be sent again")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// Another version or unknown flags.
    #[error("page chunk has version {version} and flags {flags:#x}; update the older host")]
    Version {
        /// Its version.
        version: u8,
        /// Its flags, with the reserved bytes above.
        flags: u32,
    },
    /// No such kind.
    #[error("page record {record} has unknown kind {kind}; update the older host")]
    Kind {
        /// Counted from 0.
        record: u32,
        /// What it says.
        kind: u8,
    },
    /// The guest has no such page.
    #[error(
        "page record {record} names a page outside the guest's {pages}; the hosts differ in memory size or the link is damaged"
    )]
    Number {
        /// Counted from 0.
        record: u32,
        /// How many the guest has.
        pages: u64,
    },
    /// A delta or compressed page of impossible length.
    #[error(
        "page {number} has {bytes} bytes as a delta or compressed; the checkpoint has to be sent again"
    )]
    Length {
        /// The page.
        number: u64,
        /// Of data.
        bytes: u16,
    },
}

/// Why a record makes no page.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The delta is none.
    #[error("page {number}: {source}")]
    Delta {
        /// The page.
        number: u64,
        /// Why.
        source: DeltaError,
    },
    /// The compressed bytes are none.
    #[error("page {number}: {source}")]
    Lz4 {
        /// The page.
        number: u64,
        /// Why.
        source: CompressError,
    },
    /// The result is not the page that the primary has.
    #[error(
        "page {number} does not have the digest that the primary computed: another base, or damage; the checkpoint has to be sent again"
    )]
    Digest {
        /// The page.
        number: u64,
    },
    /// Equal digests, different bytes.
    #[error(
        "page {number} differs though both sides have the same digest of it; do not trust page digests here"
    )]
    Same {
        /// The page.
        number: u64,
    },
}

/// One page of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Which page; below the guest's number of pages.
    pub number: u64,
    /// How it travels.
    pub kind: Kind,
    /// Its bytes.
    pub data: &'a [u8],
    /// What the page has to be.
    pub digest: Option<PageDigest>,
}

impl Record<'_> {
    /// True if [`Self::apply`] looks at the base.
    pub fn needs_base(&self) -> bool {
        matches!(self.kind, Kind::Delta | Kind::Same)
    }

    /// Makes the page in `out`. `base` is what the stopped SVM has there. With `key` the digest is checked if there is
    /// one. After an error `out` holds anything.
    pub fn apply(
        &self,
        base: &Page,
        out: &mut Page,
        key: Option<&PageKey>,
    ) -> Result<(), ApplyError> {
        let number = self.number;
        match self.kind {
            Kind::Zero => out.fill(0),
            Kind::Delta => delta::decode(base, self.data, out)
                .map_err(|source| ApplyError::Delta { number, source })?,
            Kind::Lz4 => {
                decompress(self.data, out).map_err(|source| ApplyError::Lz4 { number, source })?
            }
            Kind::Raw | Kind::Same => out.copy_from_slice(self.data),
        }
        self.check_page(out, base, key)
    }

    /// Checks a page that travels whole where it lies, as [`Self::apply`] checks what it has made.
    pub fn check(&self, base: &Page, key: &PageKey) -> Result<(), ApplyError> {
        let number = self.number;
        let page = self.data.try_into();
        let page = page.map_err(|_| ApplyError::Digest { number })?;
        self.check_page(page, base, Some(key))
    }

    fn check_page(
        &self,
        page: &Page,
        base: &Page,
        key: Option<&PageKey>,
    ) -> Result<(), ApplyError> {
        let number = self.number;
        if self.kind == Kind::Same && page != base {
            return Err(ApplyError::Same { number });
        }
        match (self.digest, key) {
            (Some(digest), Some(key)) if key.of(page) != digest => {
                Err(ApplyError::Digest { number })
            }
            _ => Ok(()),
        }
    }
}

/// Reads the records of one received chunk. It was whole if the last item is no error; nothing follows an error.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    rest: &'a [u8],
    /// Whole pages, if they do not lie in the records.
    apart: Option<&'a [u8]>,
    record: u32,
    count: u32,
    next: u64,
    pages: u64,
    has_digests: bool,
    is_done: bool,
}

impl<'a> Decoder<'a> {
    /// For a guest of `pages` pages.
    pub fn new(chunk: &'a [u8], pages: u64) -> Result<Self, ChunkError> {
        Self::with_bulk(chunk, &[], pages)
    }

    /// The same; `bulk` is what came behind the chunk's checksummed bytes.
    pub fn with_bulk(chunk: &'a [u8], bulk: &'a [u8], pages: u64) -> Result<Self, ChunkError> {
        let (head, rest) = chunk
            .split_first_chunk::<CHUNK_HEAD_BYTES>()
            .ok_or(ChunkError::Cut { record: 0 })?;
        let [version, low, mid, high, a, b, c, d] = *head;
        let flags = u32::from_le_bytes([low, mid, high, 0]);
        let apart = match version {
            VERSION if flags & !u32::from(FLAG_DIGESTS) == 0 => match bulk.len() {
                0 => None,
                bytes => return Err(ChunkError::Trailing { bytes }),
            },
            // Nothing but the digests says that these pages are intact.
            VERSION_APART if flags == u32::from(FLAG_DIGESTS) => Some(bulk),
            _ => return Err(ChunkError::Version { version, flags }),
        };
        Ok(Self {
            rest,
            apart,
            record: 0,
            count: u32::from_le_bytes([a, b, c, d]),
            next: 0,
            pages,
            has_digests: flags != 0,
            is_done: false,
        })
    }

    /// Goes through the rest of the chunk and gives the number of its records; for who must refuse a chunk before using any of it.
    pub fn check(&self) -> Result<u32, ChunkError> {
        self.clone().try_fold(0, |n, record| record.map(|_| n + 1))
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], ChunkError> {
        let cut = ChunkError::Cut {
            record: self.record,
        };
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(cut)?;
        self.rest = rest;
        Ok(taken)
    }

    fn take_array<const N: usize>(&mut self) -> Result<[u8; N], ChunkError> {
        let cut = ChunkError::Cut {
            record: self.record,
        };
        let (taken, rest) = self.rest.split_first_chunk().ok_or(cut)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// The record's page, checked to be above the one before and inside the guest.
    fn take_page_number(&mut self) -> Result<u64, ChunkError> {
        let outside = ChunkError::Number {
            record: self.record,
            pages: self.pages,
        };
        let mut gap = 0u64;
        for shift in (0..).step_by(7) {
            let [byte] = self.take_array()?;
            let bits = u64::from(byte & 0x7f);
            // A number of a guest's page has far less than 63 bits.
            if shift >= 63 {
                return Err(outside);
            }
            gap |= bits << shift;
            if byte < 0x80 {
                break;
            }
        }
        let number = self.next.checked_add(gap).filter(|&n| n < self.pages);
        number.ok_or(outside)
    }

    fn record(&mut self) -> Result<Record<'a>, ChunkError> {
        let [byte] = self.take_array()?;
        let record = self.record;
        let kind = Kind::of(byte).ok_or(ChunkError::Kind { record, kind: byte })?;
        let number = self.take_page_number()?;
        let bytes = match kind {
            Kind::Zero => 0,
            Kind::Raw | Kind::Same => PAGE_BYTES,
            Kind::Delta | Kind::Lz4 => {
                let bytes = u16::from_le_bytes(self.take_array()?);
                if bytes == 0 || usize::from(bytes) >= PAGE_BYTES {
                    return Err(ChunkError::Length { number, bytes });
                }
                usize::from(bytes)
            }
        };
        let digest = match self.has_digests && kind.has_digest() {
            true => Some(PageDigest::from_bytes(self.take_array()?)),
            false => None,
        };
        let data = match &mut self.apart {
            Some(pages) if kind.is_whole() => {
                let (page, rest) = pages
                    .split_at_checked(bytes)
                    .ok_or(ChunkError::Cut { record })?;
                *pages = rest;
                page
            }
            _ => self.take(bytes)?,
        };
        self.record += 1;
        self.next = number + 1;
        Ok(Record {
            number,
            kind,
            data,
            digest,
        })
    }
}

impl<'a> Iterator for Decoder<'a> {
    type Item = Result<Record<'a>, ChunkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_done {
            return None;
        }
        let item = if self.record < self.count {
            self.record()
        } else if self.rest.is_empty() && self.apart.is_none_or(<[u8]>::is_empty) {
            self.is_done = true;
            return None;
        } else {
            let bytes = self.rest.len() + self.apart.map_or(0, <[u8]>::len);
            Err(ChunkError::Trailing { bytes })
        };
        self.is_done = item.is_err();
        Some(item)
    }
}

fn put_number(mut value: u64, out: &mut [u8]) -> usize {
    let mut len = 0;
    loop {
        let more = value >= 0x80;
        out[len] = value as u8 & 0x7f | u8::from(more) << 7;
        len += 1;
        value >>= 7;
        if !more {
            return len;
        }
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
