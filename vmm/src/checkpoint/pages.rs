//! Sets of guest pages, as bitmaps.
//!
//! Does not know what is in a page.

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;

/// Words that are looked at together: most of a large guest's are 0.
pub(super) const BLOCK_WORDS: usize = 32;
/// Pages of these.
pub const BLOCK_PAGES: usize = 64 * BLOCK_WORDS;

/// The words that are not 0, with their places, rising. What is 0 costs next to nothing.
pub fn set_words(words: &[u64]) -> impl Iterator<Item = (usize, u64)> + '_ {
    let blocks = words.chunks(BLOCK_WORDS).enumerate();
    let some = blocks.filter(|(_, block)| block.iter().fold(0, |all, word| all | word) != 0);
    some.flat_map(|(number, block)| {
        let words = block.iter().enumerate();
        let words = words.map(move |(at, &word)| (number * BLOCK_WORDS + at, word));
        words.filter(|&(_, word)| word != 0)
    })
}

/// One bit per guest page, and one more for each [`BLOCK_PAGES`] of them, so that a small set of a large guest costs what is
/// in it: a pause must not grow with the size of RAM.
#[derive(Debug, Default)]
pub struct PageBitmap {
    /// Bit `n % 64` of word `n / 64` is page `n`.
    words: Vec<u64>,
    /// Bit `n % 64` of word `n / 64` is block `n`. One that is clear says that the block has no page; one that is set may lie.
    marks: Vec<u64>,
}

impl PageBitmap {
    /// All clear, for so many pages.
    pub fn new(pages: usize) -> Self {
        let words = pages.div_ceil(64);
        Self {
            words: vec![0; words],
            marks: vec![0; words.div_ceil(64 * BLOCK_WORDS)],
        }
    }

    /// All set, for so many pages.
    pub fn full(pages: usize) -> Self {
        let mut bitmap = Self::new(pages);
        let words = bitmap.words_mut();
        words.fill(u64::MAX);
        if let (Some(last), 1..) = (words.last_mut(), pages % 64) {
            *last = (1 << (pages % 64)) - 1;
        }
        bitmap
    }

    /// Bit `n % 64` of word `n / 64` is page `n`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The same, to be changed at will. Whatever is done with it, all of them are looked at until the next
    /// [`Self::clear`].
    pub fn words_mut(&mut self) -> &mut [u64] {
        self.marks.fill(u64::MAX);
        &mut self.words
    }

    /// The words of each block that has a page, with the number of the block, rising.
    pub fn set_blocks(&self) -> impl Iterator<Item = (usize, &[u64])> + '_ {
        let blocks = bits_of(self.marks.iter().copied().enumerate());
        let blocks = blocks.filter_map(|block| {
            let from = block as usize * BLOCK_WORDS;
            let end = self.words.len().min(from + BLOCK_WORDS);
            Some((block as usize, self.words.get(from..end)?))
        });
        blocks.filter(|(_, words)| words.iter().any(|&word| word != 0))
    }

    /// One word of these; 0 beyond our size.
    pub fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or(0)
    }

    /// Adds pages of one word; those beyond our size are ignored. Gives those that were not there.
    pub fn add(&mut self, at: usize, pages: u64) -> u64 {
        let Some(word) = self.words.get_mut(at).filter(|_| pages != 0) else {
            return 0;
        };
        let new = pages & !*word;
        *word |= pages;
        let block = at / BLOCK_WORDS;
        self.marks[block / 64] |= 1 << (block % 64);
        new
    }

    /// Takes pages of one word away.
    pub fn remove(&mut self, at: usize, pages: u64) {
        if let Some(word) = self.words.get_mut(at) {
            *word &= !pages;
        }
    }

    /// The words that are not 0, with their places, rising.
    pub fn set_words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let words = &self.words;
        bits_of(self.marks.iter().copied().enumerate()).flat_map(move |block| {
            let from = block as usize * BLOCK_WORDS;
            let end = words.len().min(from + BLOCK_WORDS);
            let block = words.get(from..end).unwrap_or_default();
            let block = block.iter().zip(from..);
            block.filter_map(|(&word, at)| (word != 0).then_some((at, word)))
        })
    }

    /// Adds the pages of `other`; those beyond our size are ignored. Gives how many were not there.
    pub fn merge(&mut self, other: &Self) -> usize {
        let words = other.set_words();
        let new = words.map(|(at, pages)| self.add(at, pages).count_ones() as usize);
        new.sum()
    }

    /// Has the pages of `other` from now on, and no others.
    pub fn copy_from(&mut self, other: &Self) {
        self.clear();
        self.merge(other);
    }

    /// Clears all.
    pub fn clear(&mut self) {
        for block in bits_of(self.marks.iter().copied().enumerate()) {
            let from = block as usize * BLOCK_WORDS;
            let end = self.words.len().min(from + BLOCK_WORDS);
            self.words.get_mut(from..end).unwrap_or_default().fill(0);
        }
        self.marks.fill(0);
    }

    /// How many pages are set.
    pub fn count(&self) -> usize {
        self.set_words()
            .map(|(_, word)| word.count_ones() as usize)
            .sum()
    }

    /// The numbers of the pages set, rising.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        bits_of(self.set_words())
    }

    /// As little-endian bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// From little-endian bytes; an incomplete last word is ignored.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let word = |b: &[u8]| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        let words: Vec<u64> = bytes.chunks_exact(8).map(word).collect();
        let mut bitmap = Self::new(words.len() * 64);
        for (at, word) in set_words(&words) {
            bitmap.add(at, word);
        }
        bitmap
    }
}

/// Costs what is in it, too: memory that is 0 is had for nothing.
impl Clone for PageBitmap {
    fn clone(&self) -> Self {
        let mut copy = Self {
            words: vec![0; self.words.len()],
            marks: vec![0; self.marks.len()],
        };
        copy.merge(self);
        copy
    }
}

/// Whatever was marked for it: the same pages are the same set.
impl PartialEq for PageBitmap {
    fn eq(&self, other: &Self) -> bool {
        self.words == other.words
    }
}

impl Eq for PageBitmap {}

/// The numbers of the bits of some words with their places, rising if these do.
fn bits_of(words: impl Iterator<Item = (usize, u64)>) -> impl Iterator<Item = u64> {
    words.flat_map(|(i, word)| {
        let mut rest = word;
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(i as u64 * 64 + u64::from(bit))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap_of(words: &[u64]) -> PageBitmap {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        PageBitmap::from_bytes(&bytes)
    }

    #[test]
    fn bitmaps_list_what_was_merged() {
        let mut bitmap = PageBitmap::new(130);
        assert_eq!(bitmap.merge(&bitmap_of(&[1 | 1 << 63, 0, 2])), 3);
        let more = bitmap_of(&[1 | 1 << 5, 7, 0, u64::MAX]);
        assert_eq!(bitmap.merge(&more), 4, "one was there, 64 are beyond");
        assert_eq!(
            bitmap.iter().collect::<Vec<_>>(),
            [0, 5, 63, 64, 65, 66, 129]
        );
        assert_eq!(bitmap.count(), 7);
        assert_eq!(PageBitmap::from_bytes(&bitmap.to_bytes()), bitmap);
        for pages in [1, 63, 64, 65, 128] {
            assert_eq!(PageBitmap::full(pages).count(), pages);
        }
    }

    #[test]
    fn words_that_are_not_0_are_found_wherever_they_lie() {
        for len in [0, 1, BLOCK_WORDS, 3 * BLOCK_WORDS + 5, 70 * BLOCK_WORDS + 1] {
            for step in [1, 7, 31, 32, 33, 1000] {
                let mut words = vec![0; len];
                (0..len)
                    .step_by(step)
                    .for_each(|at| words[at] = at as u64 + 1);
                let plain = words.iter().copied().enumerate();
                let plain: Vec<_> = plain.filter(|&(_, word)| word != 0).collect();
                assert_eq!(set_words(&words).collect::<Vec<_>>(), plain);
                let mut bitmap = bitmap_of(&words);
                assert_eq!(bitmap.set_words().collect::<Vec<_>>(), plain);
                let mut at_will = PageBitmap::new(len * 64);
                at_will.words_mut().copy_from_slice(&words);
                assert_eq!(at_will.set_words().collect::<Vec<_>>(), plain);
                assert_eq!(at_will, bitmap);
                // One word less, which its block's mark outlives.
                if let Some(&(at, word)) = plain.last() {
                    bitmap.remove(at, word);
                    assert_eq!(bitmap.set_words().count(), plain.len() - 1);
                }
                for bitmap in [&mut bitmap, &mut at_will] {
                    bitmap.clear();
                    assert!(bitmap.words().iter().all(|word| *word == 0));
                    assert_eq!(bitmap.count(), 0);
                }
            }
        }
    }

    #[test]
    fn a_small_set_of_a_large_guest_costs_its_blocks() {
        let mut bitmap = PageBitmap::new(1 << 24);
        let blocks =
            |bitmap: &PageBitmap| bits_of(bitmap.marks.iter().copied().enumerate()).count();
        for at in [0, 1, 100_000, 262_143] {
            assert_eq!(bitmap.add(at, 6), 6);
            assert_eq!(bitmap.add(at, 7), 1);
        }
        assert_eq!((blocks(&bitmap), bitmap.count()), (3, 12));
        let mut copy = PageBitmap::full(1 << 24);
        copy.copy_from(&bitmap);
        assert_eq!((blocks(&copy), &copy), (3, &bitmap));
        assert_eq!(bitmap.add(262_144, 1), 0, "beyond");
        bitmap.clear();
        assert_eq!((blocks(&bitmap), bitmap.add(5, 0)), (0, 0));
        assert_eq!(blocks(&bitmap), 0, "nothing leaves no mark");
    }
}
