//! Internet checksums (RFC 1071) and their incremental update (RFC 1624, equation 3).
//!
//! Invariant: `replace_u32` leaves a right checksum right and a wrong one wrong.

/// Folds a wide sum of 16-bit words to one.
#[inline]
pub const fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A ones' complement sum over pieces of any length, up to 8 GiB together.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnesSum {
    /// Of words as they lie in memory: RFC 1071 section 2 (B) lets the order of bytes wait until the end.
    words: u64,
    is_odd: bool,
}

impl OnesSum {
    /// Goes on with these bytes; behind an odd number of them the next one is the lower half of a word.
    #[inline]
    pub fn add(&mut self, mut bytes: &[u8]) {
        if self.is_odd
            && let Some((&first, rest)) = bytes.split_first()
        {
            self.words += u64::from(u16::from_ne_bytes([0, first]));
            self.is_odd = false;
            bytes = rest;
        }
        let (words, rest) = bytes.as_chunks();
        // Pairs of words, as so many words at a time as the processor adds.
        let pairs = words
            .iter()
            .map(|&word| u64::from(u32::from_ne_bytes(word)));
        self.words += pairs.sum::<u64>();
        let (words, rest) = rest.as_chunks();
        for &word in words {
            self.words += u64::from(u16::from_ne_bytes(word));
        }
        if let &[last] = rest {
            self.words += u64::from(u16::from_ne_bytes([last, 0]));
            self.is_odd = true;
        }
    }

    /// Goes on with `len` bytes that have this sum by themselves.
    #[inline]
    pub fn add_sum(&mut self, sum: u16, len: usize) {
        // At an odd place the halves of the words are exchanged.
        let sum = if self.is_odd { sum.swap_bytes() } else { sum };
        self.words += u64::from(sum.to_be());
        self.is_odd ^= len % 2 == 1;
    }

    /// The sum in one word, not inverted.
    #[inline]
    pub fn word(&self) -> u16 {
        u16::from_be(fold(self.words))
    }
}

/// Ones' complement sum of `bytes`, not inverted, as if the first byte were at an even offset.
pub fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum = OnesSum::default();
    sum.add(bytes);
    sum.word()
}

/// Reads a big-endian 16-bit number. The caller has checked the range.
#[inline]
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Reads a big-endian 32-bit number. The caller has checked the range.
#[inline]
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Writes `new` at `at` and brings the checksum at `checksum_at` up to date, where the checksum
/// covers from `covered_from` on (that decides which bytes are the high ones).
pub(crate) fn replace_u32(
    bytes: &mut [u8],
    at: usize,
    new: u32,
    covered_from: usize,
    checksum_at: usize,
) {
    let (old, new_bytes) = (be32(bytes, at).to_be_bytes(), new.to_be_bytes());
    let odd = (at - covered_from) % 2 == 1;
    let sum_of = |b: [u8; 4]| {
        let b = if odd { [b[1], b[0], b[3], b[2]] } else { b };
        // A swapped pair has the byte-swapped sum (RFC 1071 section 2): that is what an odd
        // offset makes of it.
        u64::from(be16(&b, 0)) + u64::from(be16(&b, 2))
    };
    let checksum = be16(bytes, checksum_at);
    let removed = u64::from(!fold(sum_of(old)));
    let sum = u64::from(!checksum) + removed + sum_of(new_bytes);
    bytes[at..at + 4].copy_from_slice(&new_bytes);
    bytes[checksum_at..checksum_at + 2].copy_from_slice(&(!fold(sum)).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pieces_of_any_length_sum_up_as_the_whole_does() {
        let bytes: [u8; 1000] = core::array::from_fn(|n| (n * 31 + 7) as u8);
        let word = |pair: &[u8]| u64::from(be16(pair, 0));
        assert_eq!(ones_sum(&bytes), fold(bytes.chunks(2).map(word).sum()));
        for cut in [1, 2, 3, 7, 64, 999] {
            let mut parts = OnesSum::default();
            for part in bytes.chunks(cut) {
                parts.add(part);
            }
            assert_eq!(parts.word(), ones_sum(&bytes), "{cut}");
        }
        for cut in [0, 1, 40, 41, 999] {
            let (front, rest) = bytes.split_at(cut);
            let mut parts = OnesSum::default();
            parts.add_sum(ones_sum(front), front.len());
            parts.add_sum(ones_sum(rest), rest.len());
            parts.add(&[7]);
            let whole = [&bytes[..], &[7]].concat();
            assert_eq!(parts.word(), ones_sum(&whole), "{cut}");
        }
        // RFC 1071, section 3.
        let example = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(ones_sum(&example), 0xddf2);
        assert_eq!(ones_sum(&[0xab]), 0xab00);
        assert_eq!((ones_sum(&[]), ones_sum(&[0xff, 0xff])), (0, 0xffff));
    }

    proptest! {
        #[test]
        fn incremental_update_equals_recomputation(
            mut bytes in proptest::collection::vec(any::<u8>(), 24..64),
            at in 4usize..20,
            new: u32,
        ) {
            bytes[0] = 0x45; // Never all zero: 0 and 0xffff would be two names of one sum.
            bytes[2] = 0;
            bytes[3] = 0;
            let sum = !ones_sum(&bytes);
            bytes[2..4].copy_from_slice(&sum.to_be_bytes());
            replace_u32(&mut bytes, at, new, 0, 2);
            prop_assert_eq!(ones_sum(&bytes), 0xffff);
        }
    }
}
