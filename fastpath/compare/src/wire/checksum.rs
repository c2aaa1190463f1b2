//! Internet checksums (RFC 1071) and their incremental update (RFC 1624, equation 3).
//!
//! Invariant: `replace_u32` leaves a right checksum right and a wrong one wrong.

/// Folds a wide sum to 16 bits.
pub const fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Ones' complement sum of `bytes`, not inverted, as if the first byte were at an even offset.
pub fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    let mut pairs = bytes.chunks_exact(2);
    for pair in &mut pairs {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
        if sum > 0xffff_0000 {
            sum = u32::from(fold(sum));
        }
    }
    if let [last] = pairs.remainder() {
        sum += u32::from(u16::from_be_bytes([*last, 0]));
    }
    fold(sum)
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
        u32::from(be16(&b, 0)) + u32::from(be16(&b, 2))
    };
    let checksum = be16(bytes, checksum_at);
    let removed = u32::from(!fold(sum_of(old)));
    let sum = u32::from(!checksum) + removed + sum_of(new_bytes);
    bytes[at..at + 4].copy_from_slice(&new_bytes);
    bytes[checksum_at..checksum_at + 2].copy_from_slice(&(!fold(sum)).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
