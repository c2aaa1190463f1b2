//! Pages ahead as bytes: the chunk that carries them, and the list by which a checkpoint names them.
//!
//! ```text
//! chunk   u8 version (1), u8 zero, u16 number of pages to forget, u32 zero, u64 fill, u32 for each page to forget,
//!         then a chunk of page records with digests (`codec::record`)
//! names   u8 version (1), 3 bytes zero, u32 number of names, for each: u32 page, 16 bytes digest
//! ```
//!
//! All little-endian. A *fill* is what the area takes between two resets; the first chunk of another one empties it.
//!
//! Invariant: a cut at any byte is an error, and so is a byte too many.
//!
//! Does not know which pages a guest has.

use crate::checkpoint::codec::PageDigest;
use crate::checkpoint::codec::digest::DIGEST_BYTES;

/// Bytes of a chunk before the pages to forget.
pub const HEAD_BYTES: usize = 16;
/// Bytes before the first name of a list.
pub const NAMES_HEAD_BYTES: usize = 8;
/// Bytes of one name.
pub const NAME_BYTES: usize = 4 + DIGEST_BYTES;

const VERSION: u8 = 1;

/// Why bytes are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Cut off, or too long.
    #[error("{what} of {bytes} bytes is not whole; the checkpoint has to be taken again")]
    Length {
        /// A chunk or a list.
        what: &'static str,
        /// As many as there are.
        bytes: usize,
    },
    /// Another version.
    #[error("{what} has version {version}; update the older host")]
    Version {
        /// A chunk or a list.
        what: &'static str,
        /// As it says.
        version: u8,
    },
}

/// Writes the head of a chunk; gives its length, or `None` if `out` is too small.
pub fn put_head(out: &mut [u8], fill: u64, forget: &[u32]) -> Option<usize> {
    let length = HEAD_BYTES + 4 * forget.len();
    let (head, rest) = out.get_mut(..length)?.split_at_mut(HEAD_BYTES);
    let count = u16::try_from(forget.len()).ok()?;
    head.fill(0);
    head[0] = VERSION;
    head[2..4].copy_from_slice(&count.to_le_bytes());
    head[8..].copy_from_slice(&fill.to_le_bytes());
    for (to, page) in rest.chunks_exact_mut(4).zip(forget) {
        to.copy_from_slice(&page.to_le_bytes());
    }
    Some(length)
}

/// A chunk, taken apart.
#[derive(Debug)]
pub struct AheadChunk<'a> {
    /// What it is a part of.
    pub fill: u64,
    forget: &'a [[u8; 4]],
    /// The chunk of page records.
    pub records: &'a [u8],
}

impl<'a> AheadChunk<'a> {
    /// Of exactly these bytes.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, WireError> {
        let what = "a chunk of pages ahead";
        let cut = WireError::Length {
            what,
            bytes: bytes.len(),
        };
        let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>().ok_or(cut)?;
        let [version, _, low, high, _, _, _, _, fill @ ..] = *head;
        if version != VERSION {
            return Err(WireError::Version { what, version });
        }
        let forget_bytes = 4 * usize::from(u16::from_le_bytes([low, high]));
        let (forget, records) = rest.split_at_checked(forget_bytes).ok_or(cut)?;
        Ok(Self {
            fill: u64::from_le_bytes(fill),
            forget: forget.as_chunks().0,
            records,
        })
    }

    /// Pages that the area gives up.
    pub fn forget(&self) -> impl Iterator<Item = u32> {
        self.forget.iter().map(|bytes| u32::from_le_bytes(*bytes))
    }
}

/// Names for one chunk.
#[derive(Debug)]
pub struct NameList {
    bytes: Vec<u8>,
    limit: usize,
}

impl NameList {
    /// For a chunk of so many bytes.
    pub fn new(chunk_bytes: usize) -> Self {
        let mut bytes = Vec::with_capacity(chunk_bytes);
        bytes.extend([VERSION, 0, 0, 0, 0, 0, 0, 0]);
        Self {
            bytes,
            limit: chunk_bytes,
        }
    }

    /// Adds a page.
    pub fn push(&mut self, page: u32, digest: PageDigest) {
        self.bytes.extend(page.to_le_bytes());
        self.bytes.extend(digest.to_bytes());
    }

    /// No other page goes in.
    pub fn is_full(&self) -> bool {
        self.bytes.len() + NAME_BYTES > self.limit
    }

    /// How many are in it.
    pub fn count(&self) -> u32 {
        ((self.bytes.len() - NAMES_HEAD_BYTES) / NAME_BYTES) as u32
    }

    /// The chunk.
    pub fn finish(&mut self) -> &[u8] {
        let count = self.count();
        self.bytes[4..NAMES_HEAD_BYTES].copy_from_slice(&count.to_le_bytes());
        &self.bytes
    }

    /// Empty again.
    pub fn clear(&mut self) {
        self.bytes.truncate(NAMES_HEAD_BYTES);
    }
}

/// Reads such a list.
pub fn names(bytes: &[u8]) -> Result<impl Iterator<Item = (u32, PageDigest)>, WireError> {
    let what = "a list of pages ahead";
    let cut = WireError::Length {
        what,
        bytes: bytes.len(),
    };
    let (head, rest) = bytes.split_first_chunk::<NAMES_HEAD_BYTES>().ok_or(cut)?;
    let [version, _, _, _, count @ ..] = *head;
    if version != VERSION {
        return Err(WireError::Version { what, version });
    }
    let (names, odd) = rest.as_chunks::<NAME_BYTES>();
    if !odd.is_empty() || names.len() != u32::from_le_bytes(count) as usize {
        return Err(cut);
    }
    Ok(names.iter().map(|name| {
        let [a, b, c, d, digest @ ..] = *name;
        let page = u32::from_le_bytes([a, b, c, d]);
        (page, PageDigest::from_bytes(digest))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_and_lists_come_back_and_any_cut_is_an_error() {
        let mut out = [9; 40];
        assert_eq!(put_head(&mut out[..23], 7, &[5, 6]), None);
        assert_eq!(put_head(&mut out, 7, &[5, u32::MAX]), Some(24));
        let chunk = AheadChunk::from_bytes(&out[..30]).unwrap();
        assert_eq!((chunk.fill, chunk.records), (7, &[9; 6][..]));
        assert_eq!(chunk.forget().collect::<Vec<_>>(), [5, u32::MAX]);
        for length in 0..24 {
            assert!(AheadChunk::from_bytes(&out[..length]).is_err(), "{length}");
        }
        let digest = PageDigest::from_bytes([3; DIGEST_BYTES]);
        let mut list = NameList::new(NAMES_HEAD_BYTES + 2 * NAME_BYTES + 1);
        for page in [1, 700] {
            assert!(!list.is_full());
            list.push(page, digest);
        }
        assert!(list.is_full());
        let bytes = list.finish().to_vec();
        let read: Vec<_> = names(&bytes).unwrap().collect();
        assert_eq!(read, [(1, digest), (700, digest)]);
        for length in 0..bytes.len() {
            assert!(names(&bytes[..length]).is_err(), "{length}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(names(&longer).is_err());
        list.clear();
        assert_eq!(names(list.finish()).unwrap().count(), 0);
    }
}
