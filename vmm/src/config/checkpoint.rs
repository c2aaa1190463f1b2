//! `[checkpoint]`: how a pair takes its checkpoints.

use serde::Deserialize;

use super::{Check, Config, ConfigError};
use crate::checkpoint::dirty::{DirtyChoice, DirtySettings, RING_ENTRIES};

/// `[checkpoint]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// How KVM tells which pages the guest has written.
    pub dirty: DirtyChoice,
    /// Entries of each vCPU's dirty ring.
    pub dirty_ring_entries: u32,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            dirty: DirtyChoice::default(),
            dirty_ring_entries: RING_ENTRIES,
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
        )
    }
}
