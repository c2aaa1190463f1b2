//! The SVM's page digests on their way to the primary, and the primary's table of them.
//!
//! ```text
//! chunk   u8 version (1), 3 bytes zero, u32 number of digests, u64 place of the first, 16 bytes for each
//! ```
//!
//! All little-endian. A place counts the pages that are set in the SVM's dirty bitmap, rising; the bitmap itself
//! travels before, with the word that the SVM has stopped (rule 11).
//!
//! Invariants: the table gives a digest only for a page that the bitmap names and whose digest has come; none can come twice
//! or from outside the bitmap; it is allocated once and not touched beyond what a checkpoint needs.
//!
//! Does not wait: a page whose digest is still on its way is [`SvmPage::Pending`].

use super::PageDigest;
use super::digest::DIGEST_BYTES;
use crate::checkpoint::pages::PageBitmap;

/// Bytes before the first digest of a chunk.
pub const LIST_HEAD_BYTES: usize = 16;

const VERSION: u8 = 1;

/// Writes digests into a send buffer, in the order of the dirty bitmap.
#[derive(Debug)]
pub struct DigestListEncoder<'a> {
    out: &'a mut [u8],
    len: usize,
    first: u64,
}

impl<'a> DigestListEncoder<'a> {
    /// For a buffer of at least [`LIST_HEAD_BYTES`], else `None`. `first` digests went before this chunk.
    pub fn new(out: &'a mut [u8], first: u64) -> Option<Self> {
        (out.len() >= LIST_HEAD_BYTES).then_some(Self {
            out,
            len: LIST_HEAD_BYTES,
            first,
        })
    }

    /// Adds the next digest; false if there is no room for it.
    #[must_use]
    pub fn push(&mut self, digest: PageDigest) -> bool {
        let end = self.len + DIGEST_BYTES;
        let Some(room) = self.out.get_mut(self.len..end) else {
            return false;
        };
        room.copy_from_slice(&digest.to_bytes());
        self.len = end;
        true
    }

    /// How many are in it.
    pub fn count(&self) -> u32 {
        ((self.len - LIST_HEAD_BYTES) / DIGEST_BYTES) as u32
    }

    /// Completes the chunk: so many bytes of the buffer are to be sent.
    pub fn finish(self) -> usize {
        let count = self.count();
        self.out[..4].copy_from_slice(&[VERSION, 0, 0, 0]);
        self.out[4..8].copy_from_slice(&count.to_le_bytes());
        self.out[8..LIST_HEAD_BYTES].copy_from_slice(&self.first.to_le_bytes());
        self.len
    }
}

/// Why a bitmap or a chunk is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DigestListError {
    /// It is not one of this guest.
    #[error(
        "the secondary's dirty bitmap does not fit a guest of {pages} pages; the hosts differ in memory size"
    )]
    Bitmap {
        /// How many the guest has.
        pages: usize,
    },
    /// Another version.
    #[error("digest list has version {version:#x}; update the older host")]
    Version {
        /// The first four bytes.
        version: u32,
    },
    /// Its length is not that of its digests.
    #[error(
        "digest list of {digests} digests has {bytes} bytes; the checkpoint has to be taken again"
    )]
    Length {
        /// As it says.
        digests: u32,
        /// As it has.
        bytes: usize,
    },
    /// It goes beyond the pages of the bitmap.
    #[error(
        "digest list names places {first} and on of {expected}; the checkpoint has to be taken again"
    )]
    Place {
        /// The first.
        first: u64,
        /// How many there are.
        expected: usize,
    },
    /// One of them came before.
    #[error("digest {place} came twice; the checkpoint has to be taken again")]
    Twice {
        /// Which.
        place: usize,
    },
}

/// What the SVM has at a page, compared with the last commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SvmPage {
    /// The same.
    Clean,
    /// It was written; the digest has not come yet.
    Pending,
    /// It was written and has this digest.
    Dirty(PageDigest),
}

/// The SVM's dirty pages of one checkpoint with their digests.
#[derive(Debug)]
pub struct SvmDigests {
    pages: usize,
    dirty: Vec<u64>,
    /// The words of it that are not 0.
    set: Vec<usize>,
    /// For each of these: how many pages are set before it.
    before: Vec<u32>,
    /// By place.
    digests: Vec<u128>,
    /// One bit for each place.
    has_come: Vec<u64>,
    expected: usize,
    received: usize,
}

impl SvmDigests {
    /// For a guest of `pages` pages. Takes 16 bytes of address space for each; memory only for those that are dirty.
    pub fn new(pages: usize) -> Self {
        let words = pages.div_ceil(64);
        Self {
            pages,
            dirty: vec![0; words],
            set: Vec::new(),
            before: vec![0; words],
            digests: vec![0; pages],
            has_come: vec![0; words],
            expected: 0,
            received: 0,
        }
    }

    /// Starts a checkpoint with the SVM's dirty pages: all that it wrote since the last *commit*. After an abort (rule 14) the
    /// pages of the checkpoint that failed are in it again.
    pub fn begin(&mut self, dirty: &PageBitmap) -> Result<(), DigestListError> {
        let pages = self.pages;
        let beyond = match pages % 64 {
            0 => 0,
            used => u64::MAX << used,
        };
        let words = dirty.words().len();
        if words != self.dirty.len() || dirty.word(words.saturating_sub(1)) & beyond != 0 {
            return Err(DigestListError::Bitmap { pages });
        }
        self.has_come[..self.expected.div_ceil(64)].fill(0);
        // Only what is set is looked at: a transfer must not grow with guest memory.
        self.set.drain(..).for_each(|at| self.dirty[at] = 0);
        self.expected = 0;
        self.received = 0;
        for (at, word) in dirty.set_words() {
            self.set.push(at);
            (self.dirty[at], self.before[at]) = (word, self.expected as u32);
            self.expected += word.count_ones() as usize;
        }
        Ok(())
    }

    /// Takes a chunk in and gives how many digests it had. After an error the checkpoint is to be aborted.
    pub fn accept(&mut self, chunk: &[u8]) -> Result<usize, DigestListError> {
        let damaged = |digests| DigestListError::Length {
            digests,
            bytes: chunk.len(),
        };
        let (head, rest) = chunk
            .split_first_chunk::<LIST_HEAD_BYTES>()
            .ok_or(damaged(0))?;
        let [v0, v1, v2, v3, c0, c1, c2, c3, place @ ..] = *head;
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if version != u32::from(VERSION) {
            return Err(DigestListError::Version { version });
        }
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let (digests, cut) = rest.as_chunks::<DIGEST_BYTES>();
        if !cut.is_empty() || digests.len() != count as usize {
            return Err(damaged(count));
        }
        let first = u64::from_le_bytes(place);
        let outside = DigestListError::Place {
            first,
            expected: self.expected,
        };
        let start = usize::try_from(first).map_err(|_| outside)?;
        let end = start.checked_add(digests.len()).ok_or(outside)?;
        if end > self.expected {
            return Err(outside);
        }
        for (place, digest) in (start..end).zip(digests) {
            let word = &mut self.has_come[place / 64];
            if *word >> (place % 64) & 1 == 1 {
                return Err(DigestListError::Twice { place });
            }
            *word |= 1 << (place % 64);
            self.digests[place] = u128::from_le_bytes(*digest);
            self.received += 1;
        }
        Ok(digests.len())
    }

    /// What the SVM has at page `number`.
    pub fn at(&self, number: u64) -> SvmPage {
        let bit = number % 64;
        let index = usize::try_from(number / 64).unwrap_or(usize::MAX);
        let word = self.dirty.get(index).copied().unwrap_or(0);
        if word >> bit & 1 == 0 {
            return SvmPage::Clean;
        }
        let place = self.before[index] as usize + (word & ((1 << bit) - 1)).count_ones() as usize;
        match self.has_come[place / 64] >> (place % 64) & 1 {
            0 => SvmPage::Pending,
            _ => SvmPage::Dirty(PageDigest::from_bytes(self.digests[place].to_le_bytes())),
        }
    }

    /// How many pages the SVM dirtied.
    pub fn expected(&self) -> usize {
        self.expected
    }

    /// True once the digests of all of them have come.
    pub fn is_complete(&self) -> bool {
        self.received == self.expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: usize = 300;

    fn digest(number: u64) -> PageDigest {
        PageDigest::from_bytes((u128::from(number) << 64 | 0xd).to_le_bytes())
    }

    fn bitmap(numbers: &[u64]) -> PageBitmap {
        let mut bitmap = PageBitmap::new(PAGES);
        for n in numbers {
            bitmap.add(*n as usize / 64, 1 << (n % 64));
        }
        bitmap
    }

    fn chunk(first: u64, numbers: &[u64]) -> Vec<u8> {
        let mut out = vec![0xaa; LIST_HEAD_BYTES + numbers.len() * DIGEST_BYTES];
        let mut list = DigestListEncoder::new(&mut out, first).unwrap();
        assert!(numbers.iter().all(|n| list.push(digest(*n))));
        assert!(!list.push(digest(0)), "no room");
        assert_eq!(list.finish(), out.len());
        out
    }

    proptest! {
        #[test]
        fn digests_are_found_by_page_while_they_come(
            sets in proptest::collection::vec(proptest::collection::btree_set(0..PAGES as u64, 0..200), 1..4),
            size in 1usize..50,
            is_backwards: bool,
        ) {
            // One table for several checkpoints: nothing of one may be seen in the next.
            let mut table = SvmDigests::new(PAGES);
            for set in sets {
                let numbers: Vec<u64> = set.iter().copied().collect();
                table.begin(&bitmap(&numbers)).unwrap();
                prop_assert_eq!(table.expected(), numbers.len());
                let mut chunks: Vec<_> = numbers.chunks(size).enumerate().collect();
                if is_backwards { chunks.reverse(); }
                let mut come = std::collections::BTreeSet::<u64>::new();
                for (n, part) in chunks {
                    prop_assert!(!table.is_complete());
                    prop_assert_eq!(table.accept(&chunk((n * size) as u64, part)), Ok(part.len()));
                    come.extend(part);
                    for page in 0..PAGES as u64 + 70 {
                        let expected = match (set.contains(&page), come.contains(&page)) {
                            (false, _) => SvmPage::Clean,
                            (true, false) => SvmPage::Pending,
                            (true, true) => SvmPage::Dirty(digest(page)),
                        };
                        prop_assert_eq!(table.at(page), expected);
                    }
                }
                prop_assert!(table.is_complete());
            }
        }

        #[test]
        fn any_bytes_are_taken_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), is_near: bool) {
            let mut table = SvmDigests::new(PAGES);
            table.begin(&bitmap(&[1, 2, 3, 64, 299])).unwrap();
            if let (true, Some(head)) = (is_near, bytes.first_chunk_mut::<15>()) {
                let count = head[4] % 8;
                head[..8].copy_from_slice(&[VERSION, 0, 0, 0, count, 0, 0, 0]);
                head[9..].fill(0);
            }
            let _ = table.accept(&bytes);
        }
    }

    #[test]
    fn what_is_not_of_this_checkpoint_is_refused() {
        let mut table = SvmDigests::new(PAGES);
        let refused = Err(DigestListError::Bitmap { pages: PAGES });
        assert_eq!(table.begin(&PageBitmap::new(4 * 64)), refused);
        assert_eq!(table.begin(&bitmap(&[300])), refused);
        table.begin(&bitmap(&[1, 2, 3])).unwrap();
        assert_eq!(table.accept(&chunk(0, &[1, 2])), Ok(2));
        let twice = DigestListError::Twice { place: 1 };
        assert_eq!(table.accept(&chunk(1, &[2, 3])), Err(twice));
        for first in [2, 3, u64::MAX] {
            let outside = DigestListError::Place { first, expected: 3 };
            assert_eq!(table.accept(&chunk(first, &[3, 4])), Err(outside));
        }
        let mut other = chunk(2, &[3]);
        other[1] = 1;
        let version = DigestListError::Version { version: 0x101 };
        assert_eq!(table.accept(&other), Err(version));
    }

    #[test]
    fn invariant_3_a_cut_at_any_byte_is_an_error() {
        let whole = chunk(0, &[1, 2]);
        for len in 0..whole.len() {
            let mut table = SvmDigests::new(PAGES);
            table.begin(&bitmap(&[1, 2, 3])).unwrap();
            let cut = table.accept(&whole[..len]);
            assert!(matches!(cut, Err(DigestListError::Length { .. })), "{len}");
        }
    }
}
