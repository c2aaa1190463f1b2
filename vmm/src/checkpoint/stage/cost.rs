//! What a checkpoint costs its secondary, in parts.

use std::time::Instant;

use serde::Serialize;

use super::super::ahead::area::AreaCounters;
use super::super::channel::Counters;
use super::super::staging::StagedPages;

/// What a checkpoint cost the secondary, as the status shows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ApplyParts {
    /// From its first chunk until it was accepted.
    pub stage_us: u64,
    /// From the order until the SVM ran.
    pub apply_us: u64,
    /// Part of it: writing pages.
    pub write_us: u64,
    /// Part of it: registers, devices and the packet side.
    pub load_us: u64,
    /// Part of it: digesting all of memory and the state, and comparing them; 0 without an audit.
    pub audit_us: u64,
    /// Part of it: from there until the SVM ran.
    pub resume_us: u64,
    /// Pages written to guest memory.
    pub pages: u64,
}

/// The same, with what was counted meanwhile.
#[derive(Debug, Clone, Copy, Default)]
pub struct ApplyCost {
    /// Of this checkpoint.
    pub parts: ApplyParts,
    /// What had come ahead, since the start.
    pub area: AreaCounters,
    /// And what the page channel has counted.
    pub channel: Counters,
    /// How pages were staged, since the start.
    pub staged: StagedPages,
}

/// One stretch of time after the other, without a gap.
#[derive(Debug)]
pub(super) struct Laps {
    start: Instant,
    until_us: u64,
}

impl Laps {
    pub(super) fn start() -> Self {
        Self {
            start: Instant::now(),
            until_us: 0,
        }
    }

    /// Since the one before.
    pub(super) fn next_us(&mut self) -> u64 {
        let now_us = self.start.elapsed().as_micros() as u64;
        now_us - std::mem::replace(&mut self.until_us, now_us)
    }

    /// Of all of them.
    pub(super) fn all_us(&self) -> u64 {
        self.until_us
    }
}
