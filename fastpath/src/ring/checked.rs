//! Guest bytes compared with others, of the host or of another guest, and summed or copied in one pass (rule 10).
//!
//! Invariant: each guest byte is read exactly once, by an instruction that the compiler can neither
//! repeat nor leave out, so what was compared is what was summed or copied, whatever the guest writes
//! meanwhile.
//!
//! Does not check ranges.

use core::arch::asm;
use core::arch::x86_64::{
    __m128i, __m256i, _mm_add_epi64, _mm_and_si128, _mm_cmpeq_epi8, _mm_cvtsi128_si64,
    _mm_movemask_epi8, _mm_set1_epi8, _mm_set1_epi64x, _mm_setzero_si128, _mm_srli_epi64,
    _mm_srli_si128, _mm_storeu_si128, _mm256_add_epi64, _mm256_and_si256, _mm256_castsi256_si128,
    _mm256_extracti128_si256, _mm256_or_si256, _mm256_set1_epi64x, _mm256_setzero_si256,
    _mm256_srli_epi64, _mm256_testz_si256, _mm256_xor_si256,
};
use std::arch::is_x86_feature_detected;

use colo_compare::wire::checksum::fold;

const LANE: usize = size_of::<__m128i>();
const WIDE_LANE: usize = size_of::<__m256i>();
/// So much is compared before anybody looks whether it was the same.
const WIDE_BLOCK: usize = 4 * WIDE_LANE;
/// The lower of two 32-bit words.
const LOWER: i64 = 0xffff_ffff;

/// The ones' complement sum (RFC 1071: big-endian words, folded, not inverted) of the guest's
/// bytes if the `len` others are the same, else `None`.
///
/// # Safety
///
/// `len` bytes at `guest` and at `others` are mapped.
#[inline]
pub(super) unsafe fn compare_and_sum(
    guest: *const u8,
    others: *const u8,
    len: usize,
) -> Option<u16> {
    let front_len = match is_x86_feature_detected!("avx2") {
        true => len / WIDE_LANE * WIDE_LANE,
        false => 0,
    };
    // SAFETY: the ranges are the caller's, in two parts, and the processor has what the first part asks for.
    let words = unsafe {
        let front = match front_len {
            0 => 0,
            _ => wide_words(guest, others, front_len)?,
        };
        let rest = (guest.add(front_len), others.add(front_len));
        front + lanes_words(rest.0, rest.1, len - front_len)?
    };
    // RFC 1071 section 2 (B): the order of bytes may wait until here.
    Some(fold(words).swap_bytes())
}

/// The sum of the guest's 32-bit words, as this processor reads them, if the `len` others are the same.
///
/// # Safety
///
/// `len` bytes at `guest` and at `others` are mapped; `len` is a multiple of [`WIDE_LANE`].
#[target_feature(enable = "avx2")]
unsafe fn wide_words(guest: *const u8, others: *const u8, len: usize) -> Option<u64> {
    let zero = _mm256_setzero_si256();
    let lower = _mm256_set1_epi64x(LOWER);
    let (mut lower_sum, mut upper_sum) = (zero, zero);
    let mut begin = 0;
    while begin < len {
        let end = len.min(begin + WIDE_BLOCK);
        let mut differing = zero;
        for at in (begin..end).step_by(WIDE_LANE) {
            // SAFETY: as in `lanes_words`, 32 bytes.
            let (ours, theirs) = unsafe {
                (
                    load_wide_once(guest.add(at)),
                    load_wide_once(others.add(at)),
                )
            };
            differing = _mm256_or_si256(differing, _mm256_xor_si256(ours, theirs));
            lower_sum = _mm256_add_epi64(lower_sum, _mm256_and_si256(ours, lower));
            upper_sum = _mm256_add_epi64(upper_sum, _mm256_srli_epi64::<32>(ours));
        }
        if _mm256_testz_si256(differing, differing) == 0 {
            return None;
        }
        begin = end;
    }
    let sums = _mm256_add_epi64(lower_sum, upper_sum);
    let [first, second] = [
        _mm256_castsi256_si128(sums),
        _mm256_extracti128_si256::<1>(sums),
    ];
    Some(lanes(_mm_add_epi64(first, second)))
}

/// As [`wide_words`], of any length: what is behind the last whole word has zeros behind it.
///
/// # Safety
///
/// `len` bytes at `guest` and at `others` are mapped.
#[target_feature(enable = "sse2")]
unsafe fn lanes_words(guest: *const u8, others: *const u8, len: usize) -> Option<u64> {
    let lower = _mm_set1_epi64x(LOWER);
    let mut sums = _mm_setzero_si128();
    let whole = len / LANE * LANE;
    for at in (0..whole).step_by(LANE) {
        // SAFETY: 16 bytes from `at` on are inside the mapped range; the guest may write them, and
        // reading bytes that change gives some bytes (x86-64 loads do not tear below a byte).
        let (ours, theirs) = unsafe { (load_once(guest.add(at)), load_once(others.add(at))) };
        if _mm_movemask_epi8(_mm_cmpeq_epi8(ours, theirs)) != 0xffff {
            return None;
        }
        sums = _mm_add_epi64(sums, _mm_and_si128(ours, lower));
        sums = _mm_add_epi64(sums, _mm_srli_epi64::<32>(ours));
    }
    let mut words = lanes(sums);
    for at in whole..len {
        // SAFETY: inside the mapped ranges; a volatile read happens once.
        let (ours, theirs) = unsafe {
            (
                guest.add(at).read_volatile(),
                others.add(at).read_volatile(),
            )
        };
        if ours != theirs {
            return None;
        }
        words += u64::from(ours) << (if at % 2 == 0 { 0 } else { 8 });
    }
    Some(words)
}

/// Copies the guest's bytes to `to`; whether the `len` others are the same. All are copied, also when they are not.
///
/// # Safety
///
/// `len` bytes at `guest`, at `others` and at `to` are mapped; those at `to` are nobody else's.
#[target_feature(enable = "sse2")]
pub(super) unsafe fn compare_and_copy(
    guest: *const u8,
    others: *const u8,
    to: *mut u8,
    len: usize,
) -> bool {
    let mut same = _mm_set1_epi8(-1);
    let whole = len / LANE * LANE;
    for at in (0..whole).step_by(LANE) {
        // SAFETY: 16 bytes from `at` on are inside the ranges; the guest may write its own, and reading bytes that
        // change gives some bytes.
        unsafe {
            let (ours, theirs) = (load_once(guest.add(at)), load_once(others.add(at)));
            _mm_storeu_si128(to.add(at).cast(), ours);
            same = _mm_and_si128(same, _mm_cmpeq_epi8(ours, theirs));
        }
    }
    let mut is_same = _mm_movemask_epi8(same) == 0xffff;
    for at in whole..len {
        // SAFETY: inside the ranges; a volatile read happens once.
        unsafe {
            let ours = guest.add(at).read_volatile();
            to.add(at).write(ours);
            is_same &= ours == others.add(at).read_volatile();
        }
    }
    is_same
}

/// Loads 16 bytes with one instruction.
///
/// # Safety
///
/// They are mapped.
#[inline]
unsafe fn load_once(from: *const u8) -> __m128i {
    let value: __m128i;
    // SAFETY: the caller has checked the range; nothing is written, and no flag changes.
    unsafe {
        asm!(
            "movdqu {value}, [{from}]",
            from = in(reg) from,
            value = out(xmm_reg) value,
            options(nostack, preserves_flags, readonly)
        );
    }
    value
}

/// Loads 32 bytes with one instruction.
///
/// # Safety
///
/// They are mapped.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load_wide_once(from: *const u8) -> __m256i {
    let value: __m256i;
    // SAFETY: the caller has checked the range; nothing is written, and no flag changes.
    unsafe {
        asm!(
            "vmovdqu {value}, [{from}]",
            from = in(reg) from,
            value = out(ymm_reg) value,
            options(nostack, preserves_flags, readonly)
        );
    }
    value
}

/// The sum of both numbers.
#[target_feature(enable = "sse2")]
fn lanes(sums: __m128i) -> u64 {
    let (first, second) = (
        _mm_cvtsi128_si64(sums),
        _mm_cvtsi128_si64(_mm_srli_si128::<8>(sums)),
    );
    first.cast_unsigned() + second.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain_sum(bytes: &[u8]) -> u16 {
        let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        fold(bytes.chunks(2).map(word).sum())
    }

    #[test]
    fn equal_bytes_give_their_sum_and_others_none_and_all_are_copied() {
        let bytes: Vec<u8> = (0..3000_u32).map(|n| (n * 31 + n / 7) as u8).collect();
        for len in [
            0, 1, 2, 15, 16, 17, 31, 64, 65, 127, 128, 129, 300, 1459, 1460, 2999,
        ] {
            for from in [0, 1, 7] {
                let host = &bytes[from..(from + len).min(bytes.len())];
                let mut guest = host.to_vec();
                let sum_of = |guest: &[u8]| {
                    let (ours, theirs) = (guest.as_ptr(), host.as_ptr());
                    // SAFETY: both are as long as `host`.
                    let sums = unsafe {
                        let narrow = lanes_words(ours, theirs, host.len());
                        let narrow = narrow.map(|words| fold(words).swap_bytes());
                        [compare_and_sum(ours, theirs, host.len()), narrow]
                    };
                    assert_eq!(sums[0], sums[1], "{len} bytes from {from}");
                    sums[0]
                };
                let copy_of = |guest: &[u8]| {
                    let mut copy = vec![0; host.len()];
                    let (ours, to) = (guest.as_ptr(), copy.as_mut_ptr());
                    // SAFETY: all three are as long as `host`.
                    let same = unsafe { compare_and_copy(ours, host.as_ptr(), to, host.len()) };
                    (same, copy)
                };
                assert_eq!(copy_of(&guest), (true, guest.clone()));
                let sum = sum_of(&guest);
                assert_eq!(sum, Some(plain_sum(host)), "{len} bytes from {from}");
                for at in [0, len / 2, len.saturating_sub(1)] {
                    if at < guest.len() {
                        guest[at] ^= 0x10;
                        assert_eq!(sum_of(&guest), None);
                        assert_eq!(copy_of(&guest), (false, guest.clone()));
                        guest[at] ^= 0x10;
                    }
                }
            }
        }
    }
}
