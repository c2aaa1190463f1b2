//! What of a dirty page travels: nothing where the SVM has the same bytes, a flag for zeros, a delta against what both
//! sides know, compressed bytes, or all of it.
//!
//! - [`digest`]: 128-bit keyed digests of pages, with `clmul` as their arithmetic in hardware
//! - [`digest_list`]: the SVM's digests on the wire, and the primary's table of them
//! - [`zero`], [`delta`], [`compress`]: the ways to make a page small
//! - [`choose`]: which of them for a page, with [`payoff`] to leave out what does not pay, and [`counters`]
//! - [`cache`]: what pages held at the last commit, the base of deltas
//! - [`record`]: runs of pages on the wire
//!
//! Invariants: nothing here allocates per page, reads a clock or does input or output; decoders take any bytes, refuse
//! what is not whole and write nowhere but into the page they are given.
//!
//! Does not touch guest memory: pages come as host copies, since a running guest may write at any time. Does not
//! authenticate: the link is believed as far as its checksums go.

pub mod cache;
pub mod choose;
pub(crate) mod clmul;
pub mod compress;
pub mod counters;
pub mod delta;
pub mod digest;
pub mod digest_list;
pub mod payoff;
pub mod record;
pub mod zero;

pub use cache::PageCache;
pub use choose::{Base, Choice, Chooser, Known, Link};
pub use counters::PageCounters;
pub use digest::{PageDigest, PageKey};
pub use digest_list::{DigestListEncoder, SvmDigests, SvmPage};
pub use record::{Decoder, Encoder, Kind, Payload, Record};

use super::pages::PAGE_BYTES;

/// A host copy of a guest page.
pub type Page = [u8; PAGE_BYTES];

#[cfg(test)]
pub(crate) mod testing;
