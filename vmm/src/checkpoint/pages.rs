//! Sets of guest pages, as bitmaps.
//!
//! Does not know what is in a page.

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;

/// Words that are looked at together: most of a large guest's are 0.
const BLOCK_WORDS: usize = 32;

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

/// One bit per guest page.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageBitmap {
    /// Bit `n % 64` of word `n / 64` is page `n`.
    pub words: Vec<u64>,
}

impl PageBitmap {
    /// All clear, for so many pages.
    pub fn new(pages: usize) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64)],
        }
    }

    /// All set, for so many pages.
    pub fn full(pages: usize) -> Self {
        let mut bitmap = Self::new(pages);
        bitmap.words.fill(u64::MAX);
        if let (Some(last), 1..) = (bitmap.words.last_mut(), pages % 64) {
            *last = (1 << (pages % 64)) - 1;
        }
        bitmap
    }

    /// Adds the pages of `other`; pages beyond our size are ignored.
    pub fn merge(&mut self, other: &[u64]) {
        let fits = other.len().min(self.words.len());
        for (at, more) in set_words(&other[..fits]) {
            self.words[at] |= more;
        }
    }

    /// Clears all.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many pages are set.
    pub fn count(&self) -> usize {
        set_words(&self.words)
            .map(|(_, word)| word.count_ones() as usize)
            .sum()
    }

    /// The numbers of the pages set, rising.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        set_words(&self.words).flat_map(|(i, word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(i as u64 * 64 + u64::from(bit))
            })
        })
    }

    /// As little-endian bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// From little-endian bytes; an incomplete last word is ignored.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let word = |b: &[u8]| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        Self {
            words: bytes.chunks_exact(8).map(word).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_list_what_was_merged() {
        let mut bitmap = PageBitmap::new(130);
        bitmap.merge(&[1 | 1 << 63, 0, 2]);
        bitmap.merge(&[1 << 5, 7, 0, u64::MAX]);
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
        for len in [0, 1, BLOCK_WORDS, 3 * BLOCK_WORDS + 5] {
            for step in [1, 7, 31, 32, 33, 1000] {
                let mut words = vec![0; len];
                (0..len)
                    .step_by(step)
                    .for_each(|at| words[at] = at as u64 + 1);
                let plain = words.iter().copied().enumerate();
                let plain: Vec<_> = plain.filter(|&(_, word)| word != 0).collect();
                assert_eq!(set_words(&words).collect::<Vec<_>>(), plain);
            }
        }
        let mut short = PageBitmap::new(64);
        short.merge(&[1, 1]);
        assert_eq!(short.words, [1]);
    }
}
