//! Guest bytes compared with others, of the host or of another guest, and summed or copied in one pass (rule 10).
//!
//! Invariant: each guest byte is read exactly once, by an instruction that the compiler can neither
//! repeat nor leave out, so what was compared is what was summed or copied, whatever the guest writes
//! meanwhile.
//!
//! Does not check ranges.

use core::arch::asm;
use core::arch::x86_64::{
    __m128i, _mm_add_epi64, _mm_and_si128, _mm_cmpeq_epi8, _mm_cvtsi128_si64, _mm_movemask_epi8,
    _mm_sad_epu8, _mm_set1_epi8, _mm_set1_epi16, _mm_setzero_si128, _mm_srli_epi16, _mm_srli_si128,
    _mm_storeu_si128,
};

const LANE: usize = size_of::<__m128i>();

/// The ones' complement sum (RFC 1071: big-endian words, folded, not inverted) of the guest's
/// bytes if the `len` others are the same, else `None`.
///
/// # Safety
///
/// `len` bytes at `guest` and at `others` are mapped.
#[target_feature(enable = "sse2")]
pub(super) unsafe fn compare_and_sum(
    guest: *const u8,
    others: *const u8,
    len: usize,
) -> Option<u16> {
    let zero = _mm_setzero_si128();
    let low = _mm_set1_epi16(0x00ff);
    let (mut high_sum, mut low_sum) = (zero, zero);
    let whole = len / LANE * LANE;
    let mut at = 0;
    while at < whole {
        // SAFETY: 16 bytes from `at` on are inside the mapped range; the guest may write them, and
        // reading bytes that change gives some bytes (x86-64 loads do not tear below a byte).
        let ours = unsafe { load_once(guest.add(at)) };
        // SAFETY: as above.
        let theirs = unsafe { load_once(others.add(at)) };
        if _mm_movemask_epi8(_mm_cmpeq_epi8(ours, theirs)) != 0xffff {
            return None;
        }
        // Bytes at even places are the high halves of big-endian words.
        high_sum = _mm_add_epi64(high_sum, _mm_sad_epu8(_mm_and_si128(ours, low), zero));
        low_sum = _mm_add_epi64(low_sum, _mm_sad_epu8(_mm_srli_epi16::<8>(ours), zero));
        at += LANE;
    }
    let mut sum = (lanes(high_sum) << 8) + lanes(low_sum);
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
        sum += u64::from(ours) << (if at % 2 == 0 { 8 } else { 0 });
    }
    Some(fold(sum))
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

#[target_feature(enable = "sse2")]
fn lanes(sums: __m128i) -> u64 {
    let (first, second) = (
        _mm_cvtsi128_si64(sums),
        _mm_cvtsi128_si64(_mm_srli_si128::<8>(sums)),
    );
    first.cast_unsigned() + second.cast_unsigned()
}

/// Folds a sum of words to one.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
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
        for len in [0, 1, 2, 15, 16, 17, 31, 64, 65, 1459, 1460, 2999] {
            for from in [0, 1, 7] {
                let host = &bytes[from..(from + len).min(bytes.len())];
                let mut guest = host.to_vec();
                let sum_of = |guest: &[u8]| {
                    // SAFETY: both are as long as `host`.
                    unsafe { compare_and_sum(guest.as_ptr(), host.as_ptr(), host.len()) }
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
