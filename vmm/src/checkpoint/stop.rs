//! What a stopped SVM tells: its dirty pages and which stop this is.
//!
//! Goes as the body of `SvmStopped`: the bitmap's words, then the number of the stop, all little-endian. The digests that
//! follow on the page channel name the stop, so that those of an earlier one, which an abort may have overtaken, are not
//! taken for these.
//!
//! Does not know when an SVM stops.

use super::pages::PageBitmap;

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

/// The body of `SvmStopped`.
pub fn to_bytes(dirty: &PageBitmap, number: StopNumber) -> Vec<u8> {
    let mut bytes = dirty.to_bytes();
    bytes.extend(number.to_bytes());
    bytes
}

/// Reads such a body, of a guest with so many bitmap words; `None` if it is none. An SVM that has never run has no body.
pub fn from_bytes(bytes: &[u8], words: usize) -> Option<(PageBitmap, Option<StopNumber>)> {
    if bytes.is_empty() {
        return Some((PageBitmap::new(words * 64), None));
    }
    let (bitmap, number) = bytes.split_last_chunk::<8>()?;
    let number = StopNumber::from_bytes(number)?;
    let fits = bitmap.len() == words * 8;
    fits.then(|| (PageBitmap::from_bytes(bitmap), Some(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_names_its_pages_and_its_number() {
        let mut number = StopNumber::default();
        let mut dirty = PageBitmap::new(130);
        dirty.add(2, 3);
        for n in 1..3 {
            let bytes = to_bytes(&dirty, number.advance());
            let (read, stop) = from_bytes(&bytes, 3).unwrap();
            assert_eq!((read, stop), (dirty.clone(), Some(StopNumber(n))));
            assert!(from_bytes(&bytes, 2).is_none() && from_bytes(&bytes, 4).is_none());
            assert!(from_bytes(&bytes[..bytes.len() - 1], 3).is_none());
        }
        let (none, stop) = from_bytes(&[], 3).unwrap();
        assert_eq!((none.count(), stop), (0, None));
        assert!(from_bytes(&[0; 32], 3).is_none(), "0 is no stop");
    }
}
