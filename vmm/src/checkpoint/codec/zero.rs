//! Whether a page holds zeros only.
//!
//! Invariant: a page that does not is left at its first 256 bytes that are not all zero, which is nearly always at once.

use super::Page;

/// Bytes looked at between two decisions.
const STRIDE_BYTES: usize = 256;

/// True if the page holds zeros only.
pub fn is_zero(page: &Page) -> bool {
    let (strides, _) = page.as_chunks::<STRIDE_BYTES>();
    strides.iter().all(|stride| {
        let (words, _) = stride.as_chunks::<8>();
        let bits = |or: u64, word: &[u8; 8]| or | u64::from_ne_bytes(*word);
        words.iter().fold(0, bits) == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::pages::PAGE_BYTES;

    #[test]
    fn one_bit_anywhere_is_seen() {
        let mut page = [0; PAGE_BYTES];
        assert!(is_zero(&page));
        for bit in 0..PAGE_BYTES * 8 {
            page[bit / 8] = 1 << (bit % 8);
            assert!(!is_zero(&page), "bit {bit}");
            page[bit / 8] = 0;
        }
    }
}
