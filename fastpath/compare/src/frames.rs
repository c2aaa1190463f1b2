//! How the cores name and touch frames: a linear token, and a small trait over whoever stores the bytes.
//!
//! Invariants: a token is neither `Copy` nor `Clone`, so a slot has one owner at any time; header bytes are host
//! memory; payload bytes are touched only through [`Frames`].
//!
//! Does not store anything itself.

use crate::digest::DigestKey;

/// Most bytes of a frame that [`Frames::header`] gives: Ethernet with two VLAN tags, IPv6 with
/// extension headers or IPv4 with options, TCP with options.
pub const HEADER_MAX: usize = 256;

/// The right to one frame slot. Whoever holds it must pass it on or give it back with
/// [`Frames::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped token leaks its slot"]
pub struct Token(u32);

impl Token {
    /// Makes the token of a slot. Only the owner of the slots calls this, once per allocation.
    pub const fn new(slot: u32) -> Self {
        Self(slot)
    }

    /// The slot number.
    pub const fn slot(&self) -> u32 {
        self.0
    }

    /// Takes the token out of a place that is forgotten next.
    pub(crate) const fn take(&mut self) -> Self {
        core::mem::replace(self, Self(u32::MAX))
    }
}

/// Access to frame bytes. Offsets count from the first byte of the Ethernet header; ranges outside
/// `0..len` are a bug of the caller and panic.
pub trait Frames {
    /// Length of the frame in bytes, Ethernet header included, without FCS.
    fn len(&self, token: &Token) -> usize;

    /// The first `min(len, HEADER_MAX)` bytes, in host memory.
    fn header(&self, token: &Token) -> &[u8];

    /// Both at once.
    #[inline]
    fn view(&self, token: &Token) -> (&[u8], usize) {
        (self.header(token), self.len(token))
    }

    /// The same bytes, to be rewritten before the frame leaves.
    fn header_mut(&mut self, token: &Token) -> &mut [u8];

    /// Compares `n` bytes of `a` at `a_at` with those of `b` at `b_at`. Gives the index of the first
    /// difference, `None` when all are equal.
    fn first_difference(
        &self,
        a: &Token,
        a_at: usize,
        b: &Token,
        b_at: usize,
        n: usize,
    ) -> Option<usize>;

    /// Whether the whole payloads of two frames, `n` bytes each to the ends of the frames, are the
    /// same. From a `true` on the store may take those of `svm` for those of `pvm`: a frame whose
    /// payload still lies where its guest can write it leaves with the bytes that were compared.
    #[inline]
    fn match_payload(
        &self,
        pvm: &Token,
        pvm_at: usize,
        svm: &Token,
        svm_at: usize,
        n: usize,
    ) -> bool {
        self.first_difference(pvm, pvm_at, svm, svm_at, n).is_none()
    }

    /// Copies `out.len()` bytes at `at`, for logs and reports.
    fn copy_out(&self, token: &Token, at: usize, out: &mut [u8]);

    /// The keyed digest of `n` bytes at `at`. From then on the frame must leave with the bytes that
    /// were digested.
    fn digest(&self, token: &Token, at: usize, n: usize, key: &DigestKey) -> u128 {
        key.of_chunks(n, |from, out| self.copy_out(token, at + from, out))
    }

    /// A second frame with the same bytes; `None` when no slot is free.
    fn duplicate(&mut self, token: &Token) -> Option<Token>;

    /// Gives the slot back.
    fn release(&mut self, token: Token);

    /// Asks the processor to fetch the cache line at `address`, which is only a hint: whatever the
    /// address is, nothing is read. The cores have no instruction for it, because they have no
    /// unsafe code; without an implementation everything is only slower.
    #[inline]
    fn prefetch(&self, _address: *const u8) {}
}

/// The index of the first byte in which two slices of the same length differ, `None` when they are equal.
#[inline]
pub fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    // memcmp first: equality is the common case and is the fast one.
    if a == b { None } else { position(a, b) }
}

#[cold]
fn position(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}
