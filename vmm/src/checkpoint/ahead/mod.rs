//! Pages that travel between checkpoints, before one needs them.
//!
//! The primary looks at the dirty log now and then. A page that is owed to the secondary and was not written for a whole
//! round goes to it ([`primary`]), which keeps it apart from the SVM's memory ([`area`]). A capture does not copy such a page
//! if the log says that it was not written since; the checkpoint names it with its digest ([`wire`]), and the secondary takes
//! it from the area when it commits. What past checkpoints say about a page decides whether it is worth that ([`history`]).
//!
//! Invariants: the log is collected first and a page read afterwards, so what is written during the reading comes with the
//! next collection, and a page of which the log says so is not named; a page is named with the digest of the bytes that were
//! sent, so that an area which has lost or mixed something up refuses the checkpoint (rule 13), and the next one names nothing
//! that was sent before the refusal (rule 14); both ends hold no more than the smaller of their limits.
//!
//! Does not travel while a checkpoint is in flight, nor before the first commit.

pub mod area;
pub mod history;
pub mod primary;
pub mod wire;

use std::time::Duration;

use serde::Serialize;

/// The epoch in the header of chunks of pages ahead: they belong to no checkpoint. Epochs of guests begin at 1.
pub const EPOCH: u64 = 0;
/// Pages of a chunk: an order to capture waits for one at most.
pub const CHUNK_PAGES: usize = 16;

/// How pages are sent ahead.
#[derive(Debug, Clone, Copy)]
pub struct AheadSettings {
    /// Between two looks at the dirty log while pages are found.
    pub interval: Duration,
    /// What the link gives; 0: a quarter of what it was seen to carry.
    pub mib_per_s: u32,
}

/// What became of pages ahead, as their primary counts; all only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct AheadCounters {
    /// Looks at the dirty log between checkpoints.
    pub rounds: u64,
    /// Pages sent.
    pub sent_pages: u64,
    /// Bytes of them on the link, without heads of chunks.
    pub sent_bytes: u64,
    /// Of these, named by a checkpoint and not sent again.
    pub used_pages: u64,
    /// Of these, dropped by a checkpoint because the SVM has the same.
    pub equal_pages: u64,
    /// Of these, written again before a checkpoint could use them.
    pub wasted_pages: u64,
    /// Not sent because the secondary's area was full; each counted once per round.
    pub refused_pages: u64,
    /// Not sent because most likely little of them has to travel, or they are written again; each counted once while it is
    /// left alone.
    pub held_back_pages: u64,
}

impl AheadCounters {
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Self) {
        self.rounds += other.rounds;
        self.sent_pages += other.sent_pages;
        self.sent_bytes += other.sent_bytes;
        self.used_pages += other.used_pages;
        self.equal_pages += other.equal_pages;
        self.wasted_pages += other.wasted_pages;
        self.refused_pages += other.refused_pages;
        self.held_back_pages += other.held_back_pages;
    }
}

#[cfg(test)]
mod model_tests;
