//! Carry-less multiplication: as many products at once as the processor has instructions for (VPCLMULQDQ: four or two,
//! PCLMULQDQ: one), integer multiplication elsewhere.
//!
//! Invariants: all give the same results; the hardware's functions are called only after the processor was asked.
//!
//! Does not know what the products are for, see [`super::digest`].

use super::Page;
use crate::checkpoint::pages::PAGE_BYTES;

/// Bytes of key that a page needs: the second sum uses the key from its second pair of words on.
pub(crate) const STRETCHED_BYTES: usize = PAGE_BYTES + PAIR_BYTES;
/// Bytes of the two words that are multiplied with each other.
const PAIR_BYTES: usize = 16;

/// The stretched key, at the start of a cache line.
#[repr(C, align(64))]
pub(crate) struct Stretched(pub(crate) [u8; STRETCHED_BYTES]);

/// How products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    /// In integer registers.
    Portable,
    /// By PCLMULQDQ and its like. Made by [`Arithmetic::all`] only.
    #[cfg(target_arch = "x86_64")]
    Pclmul(Detected),
}

/// Proof that the processor was asked, and has PCLMULQDQ; and how many products it makes at once.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Detected(Products);

#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Products {
    One,
    /// VPCLMULQDQ with AVX2.
    Two,
    /// VPCLMULQDQ with AVX-512.
    Four,
}

impl Arithmetic {
    /// The fastest that this processor has.
    pub(crate) fn detect() -> Self {
        Self::all().next().unwrap_or(Self::Portable)
    }

    /// All that this processor has, the fastest first.
    fn all() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let hardware = {
            let one = std::arch::is_x86_feature_detected!("pclmulqdq");
            let more = one && std::arch::is_x86_feature_detected!("vpclmulqdq");
            let two = more && std::arch::is_x86_feature_detected!("avx2");
            let four = two && std::arch::is_x86_feature_detected!("avx512f");
            let products = [
                four.then_some(Products::Four),
                two.then_some(Products::Two),
                one.then_some(Products::One),
            ];
            let detected = products.into_iter().flatten();
            detected.map(|products| Self::Pclmul(Detected(products)))
        };
        #[cfg(not(target_arch = "x86_64"))]
        let hardware = std::iter::empty();
        hardware.chain([Self::Portable])
    }

    /// Both sums over the page's pairs of words `(m, m')` with the key's `(k, k')`: of `(m + k)(m' + k')`, with the key from
    /// its start and from its second pair on; addition and multiplication without carries.
    pub(crate) fn sums(self, key: &Stretched, page: &Page) -> [u128; 2] {
        match self {
            Self::Portable => sums(key, page),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Detected` with this number exists only after the processor was found to have what that takes.
            Self::Pclmul(Detected(products)) => unsafe {
                match products {
                    Products::One => x86_64::sums(key, page),
                    Products::Two => x86_64::sums_by_two(key, page),
                    Products::Four => x86_64::sums_by_four(key, page),
                }
            },
        }
    }

    /// The product in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1.
    pub(crate) fn field_product(self, x: u128, y: u128) -> u128 {
        reduce(match self {
            Self::Portable => products(x, y),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Detected` exists only after the processor was found to have PCLMULQDQ.
            Self::Pclmul(_) => unsafe { x86_64::products(x, y) },
        })
    }
}

fn sums(key: &Stretched, page: &Page) -> [u128; 2] {
    let (mut first, mut second) = (0, 0);
    let (pairs, _) = page.as_chunks::<PAIR_BYTES>();
    let (keys, _) = key.0.as_chunks::<PAIR_BYTES>();
    for (pair, keys) in pairs.iter().zip(keys.windows(2)) {
        let pair = u128::from_le_bytes(*pair);
        first ^= product_of_halves(pair ^ u128::from_le_bytes(keys[0]));
        second ^= product_of_halves(pair ^ u128::from_le_bytes(keys[1]));
    }
    [first, second]
}

fn product_of_halves(pair: u128) -> u128 {
    product(pair as u64, (pair >> 64) as u64)
}

/// Bits 0, 5, 10, ...
const EVERY_FIFTH: u128 = {
    let (mut bits, mut n) = (0, 0);
    while n < u128::BITS {
        bits |= 1 << n;
        n += 5;
    }
    bits
};

/// The product of two polynomials over GF(2).
///
/// Each factor is cut into five, of which each has every fifth bit: a column of an integer product of two such has at most
/// 13 ones, so that carries end before the next column that counts.
pub(crate) fn product(x: u64, y: u64) -> u128 {
    let part = |n: usize| EVERY_FIFTH << n;
    let mut columns = [0u128; 5];
    for i in 0..5 {
        let x = x & part(i) as u64;
        for j in 0..5 {
            let y = y & part(j) as u64;
            columns[(i + j) % 5] ^= u128::from(x) * u128::from(y);
        }
    }
    (0..5).fold(0, |sum, n| sum | columns[n] & part(n))
}

/// The products of the lower halves, of the upper ones, and the sum of those of one with the other.
fn products(x: u128, y: u128) -> [u128; 3] {
    let (x_low, x_high) = (x as u64, (x >> 64) as u64);
    let (y_low, y_high) = (y as u64, (y >> 64) as u64);
    let middle = product(x_low, y_high) ^ product(x_high, y_low);
    [product(x_low, y_low), product(x_high, y_high), middle]
}

/// What [`products`] gives, modulo x^128 + x^7 + x^2 + x + 1.
fn reduce([low, high, middle]: [u128; 3]) -> u128 {
    let low = low ^ (middle << 64);
    let high = high ^ (middle >> 64);
    let times_tail = |v: u128| v ^ (v << 1) ^ (v << 2) ^ (v << 7);
    let lost = (high >> 127) ^ (high >> 126) ^ (high >> 121);
    low ^ times_tail(high) ^ times_tail(lost)
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _MM_HINT_T0, _mm_clmulepi64_si128, _mm_cvtsi128_si64,
        _mm_loadu_si128, _mm_prefetch, _mm_set_epi64x, _mm_setzero_si128, _mm_unpackhi_epi64,
        _mm_xor_si128, _mm256_castsi256_si128, _mm256_clmulepi64_epi128, _mm256_extracti128_si256,
        _mm256_loadu_si256, _mm256_setzero_si256, _mm256_xor_si256, _mm512_castsi512_si256,
        _mm512_clmulepi64_epi128, _mm512_extracti64x4_epi64, _mm512_loadu_si512,
        _mm512_setzero_si512, _mm512_xor_si512,
    };

    use super::{PAIR_BYTES, Page, STRETCHED_BYTES, Stretched};

    /// Pairs at a time: each has a sum of its own, so that none waits for the one before.
    const LANES: usize = 4;
    /// How far ahead of the sums the page is fetched. Processors do it themselves within a page, but later.
    const AHEAD_BYTES: usize = 1024;
    /// What one fetch brings.
    const LINE_BYTES: usize = 64;

    #[target_feature(enable = "pclmulqdq")]
    pub(super) fn sums(key: &Stretched, page: &Page) -> [u128; 2] {
        let mut first = [_mm_setzero_si128(); LANES];
        let mut second = [_mm_setzero_si128(); LANES];
        for at in (0..AHEAD_BYTES).step_by(LANES * PAIR_BYTES) {
            fetch(page, at);
        }
        let (blocks, _) = page.as_chunks::<{ LANES * PAIR_BYTES }>();
        for (n, block) in blocks.iter().enumerate() {
            let at = n * LANES * PAIR_BYTES;
            fetch(page, (at + AHEAD_BYTES).min(page.len() - 1));
            for lane in 0..LANES {
                let pair = load(block, lane);
                let x = _mm_xor_si128(pair, load(&key.0, n * LANES + lane));
                let y = _mm_xor_si128(pair, load(&key.0, n * LANES + lane + 1));
                // 0x10: the lower word of one times the upper word of the other.
                let x = _mm_clmulepi64_si128::<0x10>(x, x);
                let y = _mm_clmulepi64_si128::<0x10>(y, y);
                first[lane] = _mm_xor_si128(first[lane], x);
                second[lane] = _mm_xor_si128(second[lane], y);
            }
        }
        [fold(first), fold(second)]
    }

    /// As [`sums`], two pairs in each lane.
    #[target_feature(enable = "avx2,vpclmulqdq")]
    pub(super) fn sums_by_two(key: &Stretched, page: &Page) -> [u128; 2] {
        const BLOCK_BYTES: usize = 2 * LANES * PAIR_BYTES;
        let mut first = [_mm256_setzero_si256(); LANES];
        let mut second = [_mm256_setzero_si256(); LANES];
        for at in (0..AHEAD_BYTES).step_by(LINE_BYTES) {
            fetch(page, at);
        }
        for at in (0..page.len()).step_by(BLOCK_BYTES) {
            for line in (0..BLOCK_BYTES).step_by(LINE_BYTES) {
                fetch(page, (at + AHEAD_BYTES + line).min(page.len() - 1));
            }
            for lane in 0..LANES {
                let at = at + 2 * PAIR_BYTES * lane;
                let pairs = load_two(page, at);
                let x = _mm256_xor_si256(pairs, load_two(&key.0, at));
                let y = _mm256_xor_si256(pairs, load_two(&key.0, at + PAIR_BYTES));
                let x = _mm256_clmulepi64_epi128::<0x10>(x, x);
                let y = _mm256_clmulepi64_epi128::<0x10>(y, y);
                first[lane] = _mm256_xor_si256(first[lane], x);
                second[lane] = _mm256_xor_si256(second[lane], y);
            }
        }
        [fold_two(first), fold_two(second)]
    }

    /// As [`sums`], four pairs in each lane.
    #[target_feature(enable = "avx512f,avx2,vpclmulqdq")]
    pub(super) fn sums_by_four(key: &Stretched, page: &Page) -> [u128; 2] {
        const BLOCK_BYTES: usize = 4 * LANES * PAIR_BYTES;
        let mut first = [_mm512_setzero_si512(); LANES];
        let mut second = [_mm512_setzero_si512(); LANES];
        for at in (0..AHEAD_BYTES).step_by(LINE_BYTES) {
            fetch(page, at);
        }
        for at in (0..page.len()).step_by(BLOCK_BYTES) {
            for line in (0..BLOCK_BYTES).step_by(LINE_BYTES) {
                fetch(page, (at + AHEAD_BYTES + line).min(page.len() - 1));
            }
            for lane in 0..LANES {
                let at = at + 4 * PAIR_BYTES * lane;
                let pairs = load_four(page, at);
                let x = _mm512_xor_si512(pairs, load_four(&key.0, at));
                let y = _mm512_xor_si512(pairs, load_four(&key.0, at + PAIR_BYTES));
                let x = _mm512_clmulepi64_epi128::<0x10>(x, x);
                let y = _mm512_clmulepi64_epi128::<0x10>(y, y);
                first[lane] = _mm512_xor_si512(first[lane], x);
                second[lane] = _mm512_xor_si512(second[lane], y);
            }
        }
        [fold_four(first), fold_four(second)]
    }

    /// See [`super::products`].
    #[target_feature(enable = "pclmulqdq")]
    pub(super) fn products(x: u128, y: u128) -> [u128; 3] {
        let (x, y) = (of_number(x), of_number(y));
        let middle = _mm_xor_si128(
            _mm_clmulepi64_si128::<0x01>(x, y),
            _mm_clmulepi64_si128::<0x10>(x, y),
        );
        [
            number(_mm_clmulepi64_si128::<0x00>(x, y)),
            number(_mm_clmulepi64_si128::<0x11>(x, y)),
            number(middle),
        ]
    }

    #[target_feature(enable = "sse2")]
    fn fold(lanes: [__m128i; LANES]) -> u128 {
        lanes.into_iter().fold(0, |sum, lane| sum ^ number(lane))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn fold_two([a, b, c, d]: [__m256i; LANES]) -> u128 {
        let sum = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
        let (low, high) = (
            _mm256_castsi256_si128(sum),
            _mm256_extracti128_si256::<1>(sum),
        );
        number(_mm_xor_si128(low, high))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2")]
    fn fold_four([a, b, c, d]: [__m512i; LANES]) -> u128 {
        let sum = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
        let (low, high) = (
            _mm512_castsi512_si256(sum),
            _mm512_extracti64x4_epi64::<1>(sum),
        );
        let zero = _mm256_setzero_si256();
        fold_two([low, high, zero, zero])
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn of_number(value: u128) -> __m128i {
        _mm_set_epi64x((value >> 64) as i64, value as i64)
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn number(value: __m128i) -> u128 {
        let (low, high) = (
            _mm_cvtsi128_si64(value),
            _mm_cvtsi128_si64(_mm_unpackhi_epi64(value, value)),
        );
        u128::from(low as u64) | u128::from(high as u64) << 64
    }

    /// The pair of words number `n`.
    #[inline(always)]
    fn load(bytes: &[u8], n: usize) -> __m128i {
        let pair = &bytes[n * PAIR_BYTES..(n + 1) * PAIR_BYTES];
        // SAFETY: `pair` has the 16 bytes that are read, which nobody writes while it is borrowed; any alignment will do.
        unsafe { _mm_loadu_si128(pair.as_ptr().cast()) }
    }

    /// Two pairs of words, from byte `at` on.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn load_two(bytes: &[u8], at: usize) -> __m256i {
        let pairs = &bytes[at..at + 2 * PAIR_BYTES];
        // SAFETY: as in `load`, with 32 bytes.
        unsafe { _mm256_loadu_si256(pairs.as_ptr().cast()) }
    }

    /// Four pairs of words, from byte `at` on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_four(bytes: &[u8], at: usize) -> __m512i {
        let pairs = &bytes[at..at + 4 * PAIR_BYTES];
        // SAFETY: as in `load`, with 64 bytes.
        unsafe { _mm512_loadu_si512(pairs.as_ptr().cast()) }
    }

    #[inline(always)]
    fn fetch(page: &Page, at: usize) {
        let line = &raw const page[at];
        // SAFETY: a prefetch reads nothing; the address is inside the page.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }

    const _: () = assert!(STRETCHED_BYTES.is_multiple_of(PAIR_BYTES));
    const _: () = assert!(size_of::<Page>().is_multiple_of(4 * LANES * PAIR_BYTES));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn by_bits(x: u64, y: u64) -> u128 {
        (0..64)
            .filter(|n| y >> n & 1 == 1)
            .fold(0, |sum, n| sum ^ u128::from(x) << n)
    }

    /// Multiplies and reduces bit by bit, highest first.
    fn field_by_bits(x: u128, y: u128) -> u128 {
        (0..128).rev().fold(0, |sum: u128, n| {
            let doubled = (sum << 1) ^ ((sum >> 127) * 0x87);
            doubled ^ ((y >> n & 1) * x)
        })
    }

    #[test]
    fn products_of_full_words_lose_no_carry() {
        for (x, y) in [(u64::MAX, u64::MAX), (u64::MAX, 1 << 63), (0, u64::MAX)] {
            assert_eq!(product(x, y), by_bits(x, y));
        }
        for arithmetic in Arithmetic::all() {
            for (x, y) in [(u128::MAX, 1), (1 << 127, 2), (u128::MAX, u128::MAX)] {
                assert_eq!(arithmetic.field_product(x, y), field_by_bits(x, y));
            }
        }
    }

    proptest! {
        #[test]
        fn products_are_those_by_bits(x: u64, y: u64, a: u128, b: u128) {
            prop_assert_eq!(product(x, y), by_bits(x, y));
            for arithmetic in Arithmetic::all() {
                prop_assert_eq!(arithmetic.field_product(a, b), field_by_bits(a, b));
            }
        }

        #[test]
        fn all_arithmetics_give_the_same_sums(seed: u64) {
            let mut key = Stretched([0; STRETCHED_BYTES]);
            let mut page = [0; PAGE_BYTES];
            super::super::testing::fill(seed, &mut key.0);
            super::super::testing::fill(!seed, &mut page);
            let sums = Arithmetic::Portable.sums(&key, &page);
            for arithmetic in Arithmetic::all() {
                prop_assert_eq!(arithmetic.sums(&key, &page), sums, "{:?}", arithmetic);
            }
        }
    }

    #[test]
    fn the_hardware_is_used_where_it_is() {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let products = match Arithmetic::detect() {
                Arithmetic::Portable => 0,
                Arithmetic::Pclmul(Detected(Products::One)) => 1,
                Arithmetic::Pclmul(Detected(Products::Two)) => 2,
                Arithmetic::Pclmul(Detected(Products::Four)) => 4,
            };
            let expected = match (has!("pclmulqdq"), has!("vpclmulqdq"), has!("avx512f")) {
                (false, ..) => 0,
                (_, true, true) => 4,
                (_, true, _) if has!("avx2") => 2,
                _ => 1,
            };
            assert_eq!(products, expected);
        }
        assert_eq!(Arithmetic::all().last(), Some(Arithmetic::Portable));
    }
}
