//! What became of the pages of checkpoints, in pages and bytes, for `colo status`.
//!
//! Invariant: each page that was decided about counts once, in [`PageCounters::by_kind`] or in `equal`.

use serde::Serialize;

use super::Kind;
use crate::checkpoint::pages::PAGE_BYTES;

/// Pages of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct KindCounter {
    /// How many.
    pub pages: u64,
    /// What they take on the link, without heads of records.
    pub bytes: u64,
}

/// Attempts of one way to make pages smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct AttemptCounter {
    /// Pages that it was tried on.
    pub tried: u64,
    /// Of those, not made smaller by enough.
    pub refused: u64,
    /// Pages that it was not tried on because it had not paid before.
    pub rested: u64,
    /// How often it was left off because it had not paid.
    pub rests: u64,
}

/// Counters of one session; all only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PageCounters {
    /// Dropped: the SVM has the same, by its digest or by the last commit's.
    pub equal: u64,
    /// Holding zeros only.
    pub zero: KindCounter,
    /// As deltas.
    pub delta: KindCounter,
    /// Compressed.
    pub lz4: KindCounter,
    /// As they are.
    pub raw: KindCounter,
    /// Equal, sent to prove it.
    pub same: KindCounter,
    /// Pages that the SVM had written and whose digest had not come in time.
    pub late_digests: u64,
    /// How deltas did.
    pub delta_attempts: AttemptCounter,
    /// How compression did.
    pub lz4_attempts: AttemptCounter,
    /// How keeping pages of the last commit did: `tried` came again, and of these `refused` gained nothing by it.
    pub base_attempts: AttemptCounter,
}

impl PageCounters {
    /// The counter of a kind.
    pub fn by_kind(&self, kind: Kind) -> KindCounter {
        match kind {
            Kind::Zero => self.zero,
            Kind::Delta => self.delta,
            Kind::Lz4 => self.lz4,
            Kind::Raw => self.raw,
            Kind::Same => self.same,
        }
    }

    /// Bytes of all pages that were decided about.
    pub fn bytes_before(&self) -> u64 {
        let sent = [self.zero, self.delta, self.lz4, self.raw, self.same];
        (self.equal + sent.iter().map(|kind| kind.pages).sum::<u64>()) * PAGE_BYTES as u64
    }

    /// Bytes that travel for them, without heads of records.
    pub fn bytes_after(&self) -> u64 {
        let sent = [self.zero, self.delta, self.lz4, self.raw, self.same];
        sent.iter().map(|kind| kind.bytes).sum()
    }

    /// What was counted since `before`, an earlier value of the same counters.
    pub fn since(&self, before: &Self) -> Self {
        self.with(before, u64::saturating_sub)
    }

    /// Adds what another session counted.
    pub fn add(&mut self, other: &Self) {
        *self = self.with(other, u64::saturating_add);
    }

    fn with(&self, other: &Self, of: impl Fn(u64, u64) -> u64) -> Self {
        let kind = |a: KindCounter, b: KindCounter| KindCounter {
            pages: of(a.pages, b.pages),
            bytes: of(a.bytes, b.bytes),
        };
        let attempt = |a: AttemptCounter, b: AttemptCounter| AttemptCounter {
            tried: of(a.tried, b.tried),
            refused: of(a.refused, b.refused),
            rested: of(a.rested, b.rested),
            rests: of(a.rests, b.rests),
        };
        Self {
            equal: of(self.equal, other.equal),
            zero: kind(self.zero, other.zero),
            delta: kind(self.delta, other.delta),
            lz4: kind(self.lz4, other.lz4),
            raw: kind(self.raw, other.raw),
            same: kind(self.same, other.same),
            late_digests: of(self.late_digests, other.late_digests),
            delta_attempts: attempt(self.delta_attempts, other.delta_attempts),
            lz4_attempts: attempt(self.lz4_attempts, other.lz4_attempts),
            base_attempts: attempt(self.base_attempts, other.base_attempts),
        }
    }

    pub(super) fn count(&mut self, kind: Kind, bytes: usize) {
        let counter = match kind {
            Kind::Zero => &mut self.zero,
            Kind::Delta => &mut self.delta,
            Kind::Lz4 => &mut self.lz4,
            Kind::Raw => &mut self.raw,
            Kind::Same => &mut self.same,
        };
        counter.pages += 1;
        counter.bytes += bytes as u64;
    }
}
