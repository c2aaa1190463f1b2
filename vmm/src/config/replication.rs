//! `[replication]`: how a pair is protected, and where its hosts find each other.

use std::net::SocketAddr;
use std::path::Path;

use colo_control::Storm;
use colo_fastpath::link::Packets;
use colo_fastpath::pair::FrameParts;
use colo_fastpath::shard::crossing_frames;
use serde::Deserialize;

use super::{Check, ConfigError, HostConfig};

/// The scheme of an arbiter that is a file.
const FILE: &str = "file:";
/// Nothing of the protocol takes longer; and what is multiplied later must not overflow.
const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;
const HEARTBEATS_MAX: u64 = 1000;

/// What a primary does without a secondary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Alone {
    /// Go on, unprotected, once the arbiter agrees.
    #[default]
    Continue,
    /// Hold all output until a secondary is there.
    Block,
}

/// How output is protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Output is compared; checkpoints on divergence.
    #[default]
    Colo,
    /// The secondary's VM stands still; output waits for periodic checkpoints.
    Remus,
}

impl From<Mode> for colo_control::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Colo => Self::Colo,
            Mode::Remus => Self::Remus,
        }
    }
}

/// `[replication]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicationConfig {
    /// Where this host accepts its peer.
    pub link_listen: SocketAddr,
    /// Where the peer accepts.
    pub link_peer: SocketAddr,
    /// `file:PATH`.
    pub arbiter: String,
    /// Interval of heartbeats.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u64,
    /// Heartbeats missed until the peer counts as lost.
    #[serde(default = "default_heartbeat_count")]
    pub heartbeat_count: u32,
    /// How long output waits for its counterpart.
    #[serde(default = "default_compare_deadline_ms")]
    pub compare_deadline_ms: u64,
    /// How long an acknowledgement waits for the secondary (rule 6).
    #[serde(default = "default_ack_deadline_ms")]
    pub ack_deadline_ms: u64,
    /// Interval of periodic checkpoints; 0: none.
    #[serde(default)]
    pub checkpoint_interval_ms: u64,
    /// How output is protected.
    #[serde(default)]
    pub mode: Mode,
    /// Interval of checkpoints in Remus mode.
    #[serde(default = "default_remus_interval_ms")]
    pub remus_interval_ms: u64,
    /// A larger share of the time spent in checkpoints on divergence leads to Remus mode for a while (rule 21); 0: never.
    #[serde(default = "default_storm_share_pct")]
    pub storm_share_pct: u8,
    /// Over how long that share is measured.
    #[serde(default = "default_storm_window_ms")]
    pub storm_window_ms: u64,
    /// What a primary does without a secondary.
    #[serde(default)]
    pub alone: Alone,
    /// Frames that may be held, by each shard; 0: as many as the pool has room for.
    #[serde(default)]
    pub hold_frames: u32,
    /// What may carry mirrored input and SVM output beside TCP.
    #[serde(default)]
    pub packets: Packets,
}

const fn default_heartbeat_ms() -> u64 {
    20
}
const fn default_heartbeat_count() -> u32 {
    10
}
const fn default_compare_deadline_ms() -> u64 {
    20
}
const fn default_ack_deadline_ms() -> u64 {
    100
}
const fn default_remus_interval_ms() -> u64 {
    50
}
const fn default_storm_share_pct() -> u8 {
    Storm::DEFAULT.share_pct
}
const fn default_storm_window_ms() -> u64 {
    5000
}

impl ReplicationConfig {
    /// Where the arbiter's file is, wherever this program was started: two hosts that mean different files have no arbiter.
    pub(super) fn find_arbiter(&mut self, base: &Path) {
        if let Some(file) = self.arbiter.strip_prefix(FILE).filter(|f| !f.is_empty()) {
            self.arbiter = format!("{FILE}{}", base.join(file).display());
        }
    }
}

impl Check<'_> {
    pub(super) fn replication(
        &self,
        r: &ReplicationConfig,
        host: &HostConfig,
    ) -> Result<(), ConfigError> {
        for (range, field, value) in [
            (1..=MINUTE_MS, "replication.heartbeat_ms", r.heartbeat_ms),
            (
                1..=HEARTBEATS_MAX,
                "replication.heartbeat_count",
                r.heartbeat_count.into(),
            ),
            (
                1..=MINUTE_MS,
                "replication.compare_deadline_ms",
                r.compare_deadline_ms,
            ),
            (
                0..=DAY_MS,
                "replication.checkpoint_interval_ms",
                r.checkpoint_interval_ms,
            ),
            (
                1..=MINUTE_MS,
                "replication.remus_interval_ms",
                r.remus_interval_ms,
            ),
            (
                1..=HOUR_MS,
                "replication.storm_window_ms",
                r.storm_window_ms,
            ),
        ] {
            self.within(range, field, value)?;
        }
        let advice =
            "must be more than the guest's delayed ACK of 40 ms (rule 6), and 60000 at most";
        let deadline = r.ack_deadline_ms;
        self.that(
            (41..=MINUTE_MS).contains(&deadline),
            "replication.ack_deadline_ms",
            deadline,
            advice,
        )?;
        // What a host listens at is a part of its name at the arbiter (rule 18).
        for (field, address) in [
            ("replication.link_listen", r.link_listen),
            ("replication.link_peer", r.link_peer),
        ] {
            let specified = !address.ip().to_canonical().is_unspecified();
            let advice = "name an address of that host alone, which the other one reaches";
            self.that(specified, field, address, advice)?;
        }
        self.that(
            r.storm_share_pct <= 100,
            "replication.storm_share_pct",
            r.storm_share_pct,
            "must be from 0 to 100; 0 switches it off",
        )?;
        let other = r.link_listen != r.link_peer;
        let advice = "must be the other host's address, not link_listen";
        self.that(other, "replication.link_peer", r.link_peer, advice)?;
        let file = r
            .arbiter
            .strip_prefix(FILE)
            .is_some_and(|path| !path.is_empty());
        let advice = "write \"file:\" and a path that both hosts reach";
        self.that(file, "replication.arbiter", &r.arbiter, advice)?;
        let advice = format!("a pair needs at least {}", FrameParts::SLOTS_MIN);
        let enough = host.frame_slots >= FrameParts::SLOTS_MIN;
        self.that(enough, "host.frame_slots", host.frame_slots, advice)?;
        let most = FrameParts::of(host.frame_slots, crossing_frames(host.shards)).each;
        let fits = r.hold_frames as usize <= most;
        let advice = format!("host.frame_slots leaves room for {most} at most");
        self.that(fits, "replication.hold_frames", r.hold_frames, advice)
    }
}
