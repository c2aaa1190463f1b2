//! What a page channel tells its owner.

use std::ops::Deref;

use super::frame::{Kind, Totals};
use super::landing::Landing;

/// Pages behind the checksummed bytes of a chunk, in a row.
#[derive(Debug, PartialEq, Eq)]
pub enum Whole<'a> {
    /// In the stream's buffer, until the next call of the channel.
    Passing(&'a [u8]),
    /// In memory that belongs to whoever has it.
    Landed(Landing),
}

impl Deref for Whole<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Passing(bytes) => bytes,
            Self::Landed(landing) => landing,
        }
    }
}

/// A chunk that has come.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// What it holds: Sync, Ahead, Begin (the first of them), State, Pages, Named or Digests.
    pub kind: Kind,
    /// Of its checkpoint.
    pub epoch: u64,
    /// Under which it was sent.
    pub generation: u64,
    /// How many pages, states or digests, as its sender says.
    pub items: u32,
    /// The bytes, intact, where they were received; for the last time at the next call of the channel.
    pub payload: &'a [u8],
    /// What is behind them and under no checksum: pages, to be checked by their digests.
    pub bulk: Whole<'a>,
}

/// What [`poll`](super::PageChannel::poll) gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A chunk; those of a checkpoint come in any order, but for Begin.
    Chunk(Chunk<'a>),
    /// All of a checkpoint has come.
    Complete {
        /// Its epoch.
        epoch: u64,
        /// What it had.
        totals: Totals,
    },
    /// The sender has given its checkpoint up.
    Aborted {
        /// Its epoch.
        epoch: u64,
    },
    /// A checkpoint is spoilt, and nothing more will come of it; the channel goes on.
    Damaged {
        /// Its epoch.
        epoch: u64,
        /// What was wrong.
        reason: String,
    },
    /// A buffer is free, after [`try_next_buffer`](super::PageChannel::try_next_buffer) found none.
    Sendable,
    /// A [`Waker`](super::Waker) was used.
    Woken,
    /// The peer has closed all streams, and nothing is open.
    Closed,
    /// Nothing happened in the time given.
    Idle,
}
