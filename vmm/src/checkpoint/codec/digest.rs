//! Keyed 128-bit digests of pages, which stand for their bytes where those are on the other host.
//!
//! Invariant: two pages that differ have the same digest with a probability of at most 2^-127, as long as whoever chooses
//! them knows neither the key nor a digest. Why:
//!
//! - For each pair of words `(m, m')` of the page the key has words `(k, k')`, and the sum of all `(m + k)(m' + k')`
//!   over GF(2)\[x\] is the same for two different pages with a probability of at most 2^-64: the difference of two products
//!   with the same key is linear in the key, and multiplication by what differs is injective.
//! - The second sum uses the key moved by one pair (Toeplitz). Take the last pair that differs: the first sum depends on its
//!   keys, the second one also on the pair of keys behind, which the first one does not use. So both are equal with at
//!   most 2^-64 · 2^-64.
//! - `a · r + b` over GF(2^128), with `r` from the key, makes one number of both sums `a` and `b`: another 2^-128.
//!
//! The key's 4128 bytes are the ChaCha20 key stream of the 16 that travel, so all of this also needs ChaCha20 to look random
//! to a guest that cannot even see its output. A pair that compares 2^40 pages in a session (4 PiB) drops a page
//! that it had to send with less than 2^-87. POLYVAL, which serves the packets' payload, has 2^-120 for a page and needs three
//! times as long as this with one product at a time (see `clmul`); BLAKE3 six times (`colo bench pages`).
//!
//! Does not authenticate anything. Does not hide pages: a digest may only go where pages go in the clear.

use std::fmt;

use chacha20::ChaCha20;
use chacha20::cipher::{KeyIvInit, StreamCipher};

use super::Page;
use super::clmul::{Arithmetic, STRETCHED_BYTES, Stretched};

/// Bytes of a session's key: from the system's generator, chosen by the primary, told to the secondary at the start.
pub const KEY_BYTES: usize = 16;
/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 16;

/// Separates this use of ChaCha20 from any other.
const NONCE: [u8; 12] = *b"colo page 01";

/// The digest of a page under a session's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PageDigest(u128);

impl PageDigest {
    /// As it travels.
    pub fn to_bytes(self) -> [u8; DIGEST_BYTES] {
        self.0.to_le_bytes()
    }

    /// As it came.
    pub fn from_bytes(bytes: [u8; DIGEST_BYTES]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }
}

/// A session's key of page digests, the same on both hosts and known to no guest.
pub struct PageKey {
    stretched: Box<Stretched>,
    /// `r` above.
    factor: u128,
    arithmetic: Arithmetic,
    zeros: PageDigest,
}

impl PageKey {
    /// From a session's random bytes.
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self::with_arithmetic(bytes, Arithmetic::detect())
    }

    pub(crate) fn with_arithmetic(bytes: [u8; KEY_BYTES], arithmetic: Arithmetic) -> Self {
        let mut chacha_key = [0; 2 * KEY_BYTES];
        chacha_key[..KEY_BYTES].copy_from_slice(&bytes);
        chacha_key[KEY_BYTES..].copy_from_slice(&bytes);
        let mut stream = ChaCha20::new(&chacha_key.into(), &NONCE.into());
        let mut stretched = Box::new(Stretched([0; STRETCHED_BYTES]));
        stream.apply_keystream(&mut stretched.0);
        let mut factor = [0; 16];
        stream.apply_keystream(&mut factor);
        let mut key = Self {
            stretched,
            factor: u128::from_le_bytes(factor),
            arithmetic,
            zeros: PageDigest::default(),
        };
        key.zeros = key.of(&[0; _]);
        key
    }

    /// The digest of a page.
    pub fn of(&self, page: &Page) -> PageDigest {
        let [first, second] = self.arithmetic.sums(&self.stretched, page);
        PageDigest(self.arithmetic.field_product(first, self.factor) ^ second)
    }

    /// The digest of a page that `read` copies: what a running guest writes meanwhile cannot mix two states of a word into the
    /// sums. `scratch` holds the copy afterwards; a caller with many pages keeps it on its stack.
    pub fn of_copy<E>(
        &self,
        scratch: &mut Page,
        read: impl FnOnce(&mut Page) -> Result<(), E>,
    ) -> Result<PageDigest, E> {
        read(scratch)?;
        Ok(self.of(scratch))
    }

    /// The digest of a page of zeros.
    pub fn of_zeros(&self) -> PageDigest {
        self.zeros
    }
}

impl fmt::Debug for PageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageKey")
            .field("arithmetic", &self.arithmetic)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{any_page, noise};
    use super::*;
    use crate::checkpoint::pages::PAGE_BYTES;
    use proptest::prelude::*;

    fn key(byte: u8) -> PageKey {
        PageKey::new([byte; KEY_BYTES])
    }

    fn distance(a: PageDigest, b: PageDigest) -> u32 {
        (a.0 ^ b.0).count_ones()
    }

    #[test]
    fn every_bit_of_a_page_counts() {
        let key = key(1);
        for mut page in [[0; PAGE_BYTES], [0xff; PAGE_BYTES], noise(7)] {
            let digest = key.of(&page);
            let mut seen = std::collections::HashSet::from([digest]);
            for bit in 0..PAGE_BYTES * 8 {
                page[bit / 8] ^= 1 << (bit % 8);
                assert!(seen.insert(key.of(&page)), "bit {bit}");
                page[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn a_flipped_bit_moves_half_the_digest() {
        let key = key(2);
        let mut page = noise(3);
        let digest = key.of(&page);
        let flips = (0..PAGE_BYTES).map(|n| {
            page[n] ^= 0x10;
            let moved = distance(key.of(&page), digest);
            page[n] ^= 0x10;
            moved
        });
        let mean = f64::from(flips.sum::<u32>()) / PAGE_BYTES as f64;
        assert!((60.0..68.0).contains(&mean), "{mean} of 128 bits");
    }

    #[test]
    fn pages_with_the_same_words_elsewhere_have_other_digests() {
        let key = key(3);
        let mut swapped = noise(5);
        let digest = key.of(&swapped);
        // Within a pair of words, whole pairs, and the halves of the page.
        for (a, b, len) in [(0, 8, 8), (0, 16, 16), (0, 2048, 2048)] {
            let copy = swapped;
            swapped[a..a + len].copy_from_slice(&copy[b..b + len]);
            swapped[b..b + len].copy_from_slice(&copy[a..a + len]);
            assert_ne!(key.of(&swapped), digest, "{a} and {b}");
            swapped = copy;
        }
    }

    #[test]
    fn the_key_decides() {
        let page = noise(9);
        assert_ne!(key(1).of(&page), key(2).of(&page));
        assert_ne!(key(0).of_zeros(), key(1).of_zeros());
        // Each bit of the key.
        let digest = PageKey::new([0; KEY_BYTES]).of(&page);
        for bit in 0..KEY_BYTES * 8 {
            let mut bytes = [0; KEY_BYTES];
            bytes[bit / 8] = 1 << (bit % 8);
            assert!(
                distance(PageKey::new(bytes).of(&page), digest) > 20,
                "bit {bit}"
            );
        }
    }

    /// Both hosts of a session may run different builds: a digest never changes its meaning under the same nonce.
    #[test]
    fn digests_are_the_same_in_every_build() {
        let key = PageKey::new(*b"0123456789abcdef");
        assert_eq!(key.of(&[0; PAGE_BYTES]), key.of_zeros());
        assert_eq!(
            format!("{:032x}", key.of_zeros().0),
            "cfce4fa90715d858dff9e78205afb5b6"
        );
        assert_eq!(
            format!("{:032x}", key.of(&noise(1)).0),
            "8146dc5a97b074d73918fdaceb2256cd"
        );
    }

    proptest! {
        #[test]
        fn equal_pages_only_have_equal_digests(a in any_page(), b in any_page(), bytes: [u8; 16]) {
            let key = PageKey::new(bytes);
            prop_assert_eq!(key.of(&a) == key.of(&b), a == b);
        }

        #[test]
        fn every_arithmetic_gives_the_same_digest(page in any_page(), bytes: [u8; 16]) {
            let portable = PageKey::with_arithmetic(bytes, Arithmetic::Portable);
            let key = PageKey::new(bytes);
            prop_assert_eq!(key.of(&page), portable.of(&page));
            let mut scratch = [0xee; PAGE_BYTES];
            let copied = key.of_copy(&mut scratch, |out| { *out = page; Ok::<_, ()>(()) });
            prop_assert_eq!(copied, Ok(key.of(&page)));
            prop_assert_eq!(scratch, page);
        }
    }
}
