//! Pages compressed one by one with LZ4 (block format).
//!
//! Invariants: nothing is allocated after [`Lz4::new`]; what comes back has exactly the size of a page.
//!
//! Does not decide whether it pays, see [`super::payoff`].

use std::fmt;

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::Page;
use crate::checkpoint::pages::PAGE_BYTES;

/// Compressed bytes that are no page.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// They are damaged or make more than a page.
    #[error("compressed page: {0}; the checkpoint has to be sent again")]
    Damaged(#[from] lz4_flex::block::DecompressError),
    /// They make less than a page.
    #[error("compressed page has {0} bytes instead of 4096; the checkpoint has to be sent again")]
    Short(usize),
}

/// The compressor with its table and its output.
pub struct Lz4 {
    table: CompressTable,
    out: Box<[u8]>,
}

impl Lz4 {
    /// Allocates all that is needed.
    pub fn new() -> Self {
        Self {
            table: CompressTable::small(),
            out: vec![0; get_maximum_output_size(PAGE_BYTES)].into(),
        }
    }

    /// The page compressed to at most `max_bytes`, else `None`.
    pub fn compress(&mut self, page: &Page, max_bytes: usize) -> Option<&[u8]> {
        let len = compress_into_with_table(page, &mut self.out, &mut self.table).ok()?;
        (len <= max_bytes).then(|| &self.out[..len])
    }
}

impl Default for Lz4 {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Lz4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lz4")
    }
}

/// Makes the page again. After an error `out` holds anything.
pub fn decompress(bytes: &[u8], out: &mut Page) -> Result<(), CompressError> {
    match decompress_into(bytes, out)? {
        PAGE_BYTES => Ok(()),
        short => Err(CompressError::Short(short)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{any_page, noise};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_shrinks_and_noise_is_left_alone() {
        let mut lz4 = Lz4::new();
        let text: Page = std::array::from_fn(|n| b"all or nothing "[n % 15]);
        assert!(lz4.compress(&text, 100).is_some());
        assert!(lz4.compress(&noise(1), PAGE_BYTES).is_none());
    }

    proptest! {
        #[test]
        fn a_page_comes_back(pages in proptest::collection::vec(any_page(), 1..4)) {
            // One compressor for all: its table must not remember the page before.
            let mut lz4 = Lz4::new();
            for page in pages {
                let bytes = lz4.compress(&page, usize::MAX).unwrap();
                let mut out = noise(2);
                decompress(bytes, &mut out).unwrap();
                prop_assert_eq!(out, page);
            }
        }

        #[test]
        fn a_cut_is_refused(page in any_page(), cut: prop::sample::Index) {
            let mut lz4 = Lz4::new();
            let bytes = lz4.compress(&page, usize::MAX).unwrap();
            let mut out = [0; PAGE_BYTES];
            prop_assert!(decompress(&bytes[..cut.index(bytes.len())], &mut out).is_err());
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut out = [0; PAGE_BYTES];
            let _ = decompress(&bytes, &mut out);
        }
    }
}
