//! `[checkpoint]`: how a pair takes its checkpoints.

use std::time::Duration;

use serde::Deserialize;

use super::{Check, Config, ConfigError};
use crate::checkpoint::ahead::AheadSettings;
use crate::checkpoint::channel::Settings;
use crate::checkpoint::dirty::{DirtyChoice, DirtySettings, RING_ENTRIES};
use crate::checkpoint::stabilise::StabilisePolicy;
use crate::replication::link::PAGE_STREAMS_MAX;

/// Arena of captured pages without `arena_mib`, at most.
const ARENA_MIB_MAX: u64 = 512;
const PAGES_PER_MIB: u64 = 256;
/// Twice the largest guest.
const MIB_MAX: u64 = 256 << 10;

/// `[checkpoint]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// How KVM tells which pages the guest has written.
    pub dirty: DirtyChoice,
    /// Entries of each vCPU's dirty ring.
    pub dirty_ring_entries: u32,
    /// How captured pages are kept while the guest runs on.
    pub stabilise: StabilisePolicy,
    /// Memory for captured pages on the primary; 0: half of RAM, 512 MiB at most.
    pub arena_mib: u64,
    /// Memory for staged pages on the secondary; 0: as much as RAM.
    pub stage_mib: u64,
    /// Memory on the secondary for pages that come before a checkpoint needs them; 0 on either host: none come.
    pub ahead_mib: usize,
    /// How fast they come; 0: with a quarter of what the link was seen to carry.
    pub ahead_mib_per_s: u32,
    /// How often the primary looks for such pages while it finds some.
    pub ahead_interval_ms: u64,
    /// Memory for pages of the last commit, the bases of deltas; 0: none.
    pub cache_mib: usize,
    /// One in so many pages that digests say are equal is sent and compared; 0: none.
    pub verify_one_in: u32,
    /// One in so many checkpoints is audited: both sides digest all of their memory, and the state of vCPUs, platform and
    /// devices, and the secondary compares; 0: none. The guest stands still meanwhile.
    pub audit_every: u32,
    /// TCP streams over which checkpoints are spread at most; the smaller number of both hosts counts.
    pub streams: usize,
    /// Send without a copy in the kernel, where it does not copy all the same.
    pub zero_copy: bool,
    /// How long the page channel may stand still before the link counts as lost.
    pub stall_ms: u64,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            dirty: DirtyChoice::default(),
            dirty_ring_entries: RING_ENTRIES,
            stabilise: StabilisePolicy::default(),
            arena_mib: 0,
            stage_mib: 0,
            ahead_mib: 64,
            ahead_mib_per_s: 0,
            ahead_interval_ms: 100,
            cache_mib: 32,
            verify_one_in: 0,
            audit_every: 0,
            streams: 1,
            zero_copy: true,
            stall_ms: 5000,
        }
    }
}

impl CheckpointConfig {
    /// Memory for captured pages, in pages.
    pub fn arena_pages(&self, ram_mib: u64) -> u32 {
        let mib = match self.arena_mib {
            0 => (ram_mib / 2).clamp(1, ARENA_MIB_MAX),
            mib => mib.min(ram_mib),
        };
        u32::try_from(mib * PAGES_PER_MIB).unwrap_or(u32::MAX)
    }

    /// Memory for staged pages.
    pub fn stage_mib(&self, ram_mib: u64) -> usize {
        match self.stage_mib {
            0 => ram_mib as usize,
            mib => mib as usize,
        }
    }

    /// How pages travel before a checkpoint needs them.
    pub fn ahead(&self) -> AheadSettings {
        AheadSettings {
            interval: Duration::from_millis(self.ahead_interval_ms),
            mib_per_s: self.ahead_mib_per_s,
        }
    }

    /// How the page channel works.
    pub fn channel(&self) -> Settings {
        Settings {
            timeout: Duration::from_millis(self.stall_ms),
            zero_copy: self.zero_copy,
            ..Settings::default()
        }
    }
}

impl Config {
    /// For a machine that may be replicated.
    pub fn dirty_settings(&self) -> Option<DirtySettings> {
        self.replication.as_ref().map(|_| DirtySettings {
            choice: self.checkpoint.dirty,
            ring_entries: self.checkpoint.dirty_ring_entries,
        })
    }
}

impl Check<'_> {
    pub(super) fn checkpoint(&self, checkpoint: &CheckpointConfig) -> Result<(), ConfigError> {
        let entries = checkpoint.dirty_ring_entries;
        // KVM keeps up to 576 entries for itself.
        let good = entries.is_power_of_two() && (1024..=RING_ENTRIES).contains(&entries);
        self.that(
            good,
            "checkpoint.dirty_ring_entries",
            entries,
            "choose a power of two from 1024 to 65536",
        )?;
        let interval_ms = checkpoint.ahead_interval_ms;
        let is_good = (1..=60_000).contains(&interval_ms);
        let advice = "must be from 1 to 60000; ahead_mib = 0 switches it off";
        self.that(is_good, "checkpoint.ahead_interval_ms", interval_ms, advice)?;
        for (field, mib) in [
            ("checkpoint.arena_mib", checkpoint.arena_mib),
            ("checkpoint.stage_mib", checkpoint.stage_mib),
            ("checkpoint.ahead_mib", checkpoint.ahead_mib as u64),
            ("checkpoint.cache_mib", checkpoint.cache_mib as u64),
        ] {
            self.within(0..=MIB_MAX, field, mib)?;
        }
        let streams = checkpoint.streams;
        let is_good = (1..=PAGE_STREAMS_MAX).contains(&streams);
        self.that(
            is_good,
            "checkpoint.streams",
            streams,
            "must be from 1 to 8",
        )?;
        self.within(100..=3_600_000, "checkpoint.stall_ms", checkpoint.stall_ms)
    }
}
