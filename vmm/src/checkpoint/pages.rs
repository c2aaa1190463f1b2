//! Sets of guest pages: bitmaps of page numbers, and page numbers with their contents.
//!
//! Invariant: [`PageSet::data`] holds 4096 bytes for each page that is not marked zero, in order of `numbers`.

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;

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

    /// Adds the pages of `other`; pages beyond our size are ignored.
    pub fn merge(&mut self, other: &[u64]) {
        for (word, more) in self.words.iter_mut().zip(other) {
            *word |= more;
        }
    }

    /// Clears all.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many pages are set.
    pub fn count(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// The numbers of the pages set, rising.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(i, &word)| {
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

/// Guest pages with their contents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// Page number, with [`Self::ZERO`] set where the page holds zeros only and has no data.
    pub numbers: Vec<u64>,
    /// Contents of the others.
    pub data: Vec<u8>,
}

impl PageSet {
    /// Flag of a page that holds zeros only.
    pub const ZERO: u64 = 1 << 63;

    /// Forgets the pages, keeps the memory.
    pub fn clear(&mut self) {
        self.numbers.clear();
        self.data.clear();
    }

    /// Adds a page; `read` fills its contents.
    pub fn push_with(&mut self, number: u64, read: impl FnOnce(&mut [u8])) {
        let at = self.data.len();
        self.data.resize(at + PAGE_BYTES, 0);
        read(&mut self.data[at..]);
        if is_zero(&self.data[at..]) {
            self.data.truncate(at);
            self.numbers.push(number | Self::ZERO);
        } else {
            self.numbers.push(number);
        }
    }

    /// Number and contents of each page, `None` for zeros.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Option<&[u8]>)> + '_ {
        let mut pages = self.data.chunks_exact(PAGE_BYTES);
        self.numbers.iter().map(move |&n| match n & Self::ZERO {
            0 => (n, pages.next()),
            _ => (n & !Self::ZERO, None),
        })
    }

    /// True if the data fits the numbers and every page lies below `pages`.
    pub fn is_consistent(&self, pages: u64) -> bool {
        let full = self
            .numbers
            .iter()
            .filter(|&&n| n & Self::ZERO == 0)
            .count();
        self.data.len() == full * PAGE_BYTES
            && self.numbers.iter().all(|&n| n & !Self::ZERO < pages)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks_exact(64)
        .all(|chunk| chunk.iter().fold(0, |or, b| or | b) == 0)
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
    }

    #[test]
    fn zero_pages_carry_no_data_and_come_back_in_place() {
        let mut set = PageSet::default();
        set.push_with(3, |b| b.fill(7));
        set.push_with(4, |_| {});
        set.push_with(9, |b| b[4095] = 1);
        assert_eq!(set.data.len(), 2 * PAGE_BYTES);
        let back: Vec<_> = set.iter().map(|(n, d)| (n, d.map(|d| d[4095]))).collect();
        assert_eq!(back, [(3, Some(7)), (4, None), (9, Some(1))]);
        assert!(set.is_consistent(10) && !set.is_consistent(9));
    }
}
