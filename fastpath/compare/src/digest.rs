//! Keyed digests of payload, which stand for the bytes where those are on another host.
//!
//! Invariant: two payloads that differ in a byte or in length have the same digest with a probability of
//! 2^-116 at most, as long as whoever chooses the bytes knows neither the key nor a digest. The hash is POLYVAL
//! (RFC 8452): a polynomial over GF(2^128) at a secret point, which processors multiply in hardware.
//!
//! Does not authenticate anything: the link is believed as it is with bytes.

use core::fmt;

use polyval::Polyval;
use polyval::universal_hash::UniversalHash;

/// Longest headers of a frame whose payload travels as a digest.
pub const DIGEST_HEADERS_MAX: usize = 128;

/// Bytes that [`DigestKey::of_chunks`] reads at a time.
const CHUNK_BYTES: usize = 512;

/// The key of a pair's digests, the same on both hosts and known to no guest and no client.
#[derive(Clone)]
pub struct DigestKey(Polyval);

impl DigestKey {
    /// A key of random bytes. `None` for zeros, under which all digests are equal.
    pub fn new(bytes: [u8; 16]) -> Option<Self> {
        (bytes != [0; 16]).then(|| Self(Polyval::new(&bytes.into())))
    }

    /// The digest of a payload.
    pub fn of(&self, payload: &[u8]) -> u128 {
        let mut hash = self.0.clone();
        hash.update_padded(payload);
        finish(hash, payload.len())
    }

    /// The digest of `len` bytes of which `read(at, out)` copies those from `at` on.
    pub fn of_chunks(&self, len: usize, mut read: impl FnMut(usize, &mut [u8])) -> u128 {
        let mut hash = self.0.clone();
        let mut chunk = [0; CHUNK_BYTES];
        for at in (0..len).step_by(CHUNK_BYTES) {
            let chunk = &mut chunk[..(len - at).min(CHUNK_BYTES)];
            read(at, chunk);
            hash.update_padded(chunk);
        }
        finish(hash, len)
    }
}

impl fmt::Debug for DigestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DigestKey")
    }
}

fn finish(mut hash: Polyval, len: usize) -> u128 {
    hash.update_padded(&(len as u64).to_le_bytes());
    u128::from_le_bytes(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_digest_knows_each_bit_and_the_length(
            payload in proptest::collection::vec(any::<u8>(), 0..1600),
            at: prop::sample::Index,
            bit in 0u32..8,
            key in 1u128..,
        ) {
            let key = DigestKey::new(key.to_le_bytes()).unwrap();
            let digest = key.of(&payload);
            let copy = |at: usize, out: &mut [u8]| out.copy_from_slice(&payload[at..at + out.len()]);
            prop_assert_eq!(key.of_chunks(payload.len(), copy), digest);
            let longer: Vec<u8> = payload.iter().copied().chain([0]).collect();
            prop_assert_ne!(key.of(&longer), digest);
            if !payload.is_empty() {
                let mut other = payload.clone();
                other[at.index(payload.len())] ^= 1 << bit;
                prop_assert_ne!(key.of(&other), digest);
            }
        }
    }

    #[test]
    fn another_key_gives_another_digest() {
        let digest = |key: u8| DigestKey::new([key; 16]).map(|key| key.of(b"abc"));
        assert_eq!(digest(0), None);
        assert!(digest(1).is_some() && digest(1) != digest(2));
    }
}
