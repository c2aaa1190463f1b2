//! What a stopped SVM tells: its dirty pages and which stop this is.
//!
//! Goes as the body of `SvmStopped`, all little-endian. To a primary of link version 3 or less: the bitmap's words, then the
//! number of the stop. Since 4 (`VERSION_SPARSE`), so that the message does not grow with guest memory: the number of the stop,
//! then for each block of 32 words that are not all 0 `block:u32 mask:u32` and the words that the mask names, lowest first.
//!
//! Invariants: a body is read only if it is the one way to say what it says: blocks rise, no mask and no word is 0, nothing
//! lies beyond the bitmap, nothing is cut off or left over.
//!
//! The digests that follow on the page channel name the stop, so that those of an earlier one, which an abort may have
//! overtaken, are not taken for these.
//!
//! Does not know when an SVM stops.

use colo_control::VERSION_SPARSE;

use super::pages::{BLOCK_WORDS, PageBitmap};

/// Bytes of a word, and of the number of a stop.
const WORD_BYTES: usize = 8;

/// Counts the stops of one SVM, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StopNumber(u64);

impl StopNumber {
    /// The next one.
    pub fn advance(&mut self) -> Self {
        self.0 += 1;
        *self
    }

    /// As it travels.
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    /// From exactly its bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let number = u64::from_le_bytes(bytes.try_into().ok()?);
        (number > 0).then_some(Self(number))
    }
}

/// The body of `SvmStopped` on a link of this version.
pub fn to_bytes(dirty: &PageBitmap, number: StopNumber, version: u16) -> Vec<u8> {
    if version < VERSION_SPARSE {
        let mut bytes = dirty.to_bytes();
        bytes.extend(number.to_bytes());
        return bytes;
    }
    let mut bytes = number.to_bytes().to_vec();
    for (block, words) in dirty.set_blocks() {
        let bits = words.iter().zip(0..).filter(|(word, _)| **word != 0);
        let mask = bits.fold(0_u32, |mask, (_, bit)| mask | 1 << bit);
        bytes.extend((block as u32).to_le_bytes());
        bytes.extend(mask.to_le_bytes());
        let set = words.iter().filter(|word| **word != 0);
        set.for_each(|word| bytes.extend(word.to_le_bytes()));
    }
    bytes
}

/// Reads such a body, of a guest with so many bitmap words; `None` if it is none. An SVM that has never run has no body.
pub fn from_bytes(
    bytes: &[u8],
    words: usize,
    version: u16,
) -> Option<(PageBitmap, Option<StopNumber>)> {
    if bytes.is_empty() {
        return Some((PageBitmap::new(words * 64), None));
    }
    if version < VERSION_SPARSE {
        let (bitmap, number) = bytes.split_last_chunk::<WORD_BYTES>()?;
        let number = StopNumber::from_bytes(number)?;
        let fits = bitmap.len() == words * WORD_BYTES;
        return fits.then(|| (PageBitmap::from_bytes(bitmap), Some(number)));
    }
    let (number, blocks) = bytes.split_first_chunk::<WORD_BYTES>()?;
    let number = StopNumber::from_bytes(number)?;
    Some((bitmap_of(blocks, words)?, Some(number)))
}

/// The bitmap of such blocks.
fn bitmap_of(mut blocks: &[u8], words: usize) -> Option<PageBitmap> {
    let mut bitmap = PageBitmap::new(words * 64);
    let mut next = 0;
    while let Some((head, rest)) = blocks.split_first_chunk::<WORD_BYTES>() {
        let [b0, b1, b2, b3, m0, m1, m2, m3] = *head;
        let block = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
        let mask = u32::from_le_bytes([m0, m1, m2, m3]);
        if block < next || mask == 0 {
            return None;
        }
        next = block + 1;
        let (set, behind) = rest.split_at_checked(mask.count_ones() as usize * WORD_BYTES)?;
        let (set, _) = set.as_chunks::<WORD_BYTES>();
        let places = (0..BLOCK_WORDS).filter(|bit| mask >> bit & 1 == 1);
        for (place, word) in places.zip(set) {
            let (at, word) = (block * BLOCK_WORDS + place, u64::from_le_bytes(*word));
            // Gives what is new: nothing of a word that is 0, or beyond.
            if bitmap.add(at, word) == 0 {
                return None;
            }
        }
        blocks = behind;
    }
    blocks.is_empty().then_some(bitmap)
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_control::{VERSION_BULK, VERSION_MAX};
    use proptest::prelude::*;

    const BOTH: [u16; 2] = [VERSION_BULK, VERSION_SPARSE];

    #[test]
    fn a_stop_names_its_pages_and_its_number() {
        for version in BOTH {
            let mut number = StopNumber::default();
            let mut dirty = PageBitmap::new(130);
            dirty.add(2, 3);
            for n in 1..3 {
                let bytes = to_bytes(&dirty, number.advance(), version);
                let (read, stop) = from_bytes(&bytes, 3, version).unwrap();
                assert_eq!((read, stop), (dirty.clone(), Some(StopNumber(n))));
                assert!(from_bytes(&bytes, 2, version).is_none(), "beyond");
                assert!(from_bytes(&bytes[..bytes.len() - 1], 3, version).is_none());
            }
            let (none, stop) = from_bytes(&[], 3, version).unwrap();
            assert_eq!((none.count(), stop), (0, None));
            assert!(from_bytes(&[0; 32], 3, version).is_none(), "0 is no stop");
        }
    }

    #[test]
    fn rule_22_a_peer_of_the_version_before_gets_and_gives_the_whole_bitmap() {
        let mut dirty = PageBitmap::new(64 * 64);
        dirty.add(40, 5);
        let number = StopNumber(7);
        let old = to_bytes(&dirty, number, VERSION_SPARSE - 1);
        let mut expected = dirty.to_bytes();
        expected.extend(7_u64.to_le_bytes());
        assert_eq!(old, expected);
        let new = to_bytes(&dirty, number, VERSION_MAX);
        let expected: &[u8] = &[
            7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(new, expected);
        // Neither is taken for the other.
        assert!(from_bytes(&old, 64, VERSION_SPARSE).is_none());
        assert!(from_bytes(&new, 64, VERSION_BULK).is_none());
    }

    #[test]
    fn its_size_follows_what_was_written_not_the_memory() {
        let number = StopNumber(1);
        let mut small = PageBitmap::new(3 << 20);
        for n in 0..100 {
            small.add(n * 481, 1 << (n % 64));
        }
        assert_eq!(to_bytes(&small, number, VERSION_SPARSE).len(), 8 + 100 * 16);
        let all = PageBitmap::full(3 << 20);
        let whole = to_bytes(&all, number, VERSION_BULK).len();
        let most = to_bytes(&all, number, VERSION_SPARSE).len();
        assert!(most < whole + whole / 30, "{most} of {whole}");
    }

    #[test]
    fn what_is_said_twice_or_out_of_order_or_beyond_is_refused() {
        let body = |blocks: &[(u32, u32, &[u64])]| {
            let mut bytes = StopNumber(1).to_bytes().to_vec();
            for (block, mask, words) in blocks {
                bytes.extend(block.to_le_bytes());
                bytes.extend(mask.to_le_bytes());
                words
                    .iter()
                    .for_each(|word| bytes.extend(word.to_le_bytes()));
            }
            bytes
        };
        let read = |blocks: &[(u32, u32, &[u64])]| from_bytes(&body(blocks), 70, VERSION_SPARSE);
        assert!(read(&[(0, 3, &[1, 2]), (2, 1 << 5, &[9])]).is_some());
        for (bad, why) in [
            (&[(1, 1, &[1][..]), (0, 1, &[1])][..], "order"),
            (&[(1, 1, &[1]), (1, 2, &[1])], "overlap"),
            (&[(0, 0, &[])], "nothing"),
            (&[(0, 3, &[1, 0])], "a word of nothing"),
            (&[(2, 1 << 6, &[1])], "beyond the last word"),
            (&[(3, 1, &[1])], "beyond the last block"),
            (&[(u32::MAX, 1, &[1])], "far beyond"),
            (&[(0, 7, &[1, 2])], "cut off"),
            (&[(0, 1, &[1, 2])], "left over"),
        ] {
            assert!(read(bad).is_none(), "{why}");
        }
    }

    proptest! {
        #[test]
        fn any_set_comes_back_and_any_bytes_are_read_in_one_way_or_not_at_all(
            set in proptest::collection::btree_map(0..300usize, 1..u64::MAX, 0..80),
            cut in 0..200usize,
            flip in (0..2000usize, 1..=u8::MAX),
        ) {
            let mut dirty = PageBitmap::new(300 * 64);
            for (&at, &word) in &set {
                dirty.add(at, word);
            }
            for version in BOTH {
                let bytes = to_bytes(&dirty, StopNumber(3), version);
                let read = from_bytes(&bytes, 300, version);
                prop_assert_eq!(read, Some((dirty.clone(), Some(StopNumber(3)))));
                let mut damaged = bytes.clone();
                let at = flip.0 % damaged.len();
                damaged[at] ^= flip.1;
                for odd in [&damaged[..], &bytes[..bytes.len().saturating_sub(cut)]] {
                    if let Some((read, Some(number))) = from_bytes(odd, 300, version) {
                        prop_assert_eq!(to_bytes(&read, number, version), odd);
                    }
                }
            }
        }
    }
}
