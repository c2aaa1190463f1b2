//! What a replicated VM tells about itself: the document of `colo status`.
//!
//! Times are microseconds. `checkpoint_pause_us` is from the order to pause the PVM until its vCPUs ran again; it does
//! not contain the transfer. `hold_us` is from the moment a frame was taken from the PVM's ring until it was released.

use std::collections::BTreeMap;

use colo_compare::Cause;
use colo_control::{Counters, Mode, Step};
use colo_fastpath::link::LinkStats;
use colo_fastpath::pair::{PrimaryReport, SecondaryReport};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::checkpoint::capture::CaptureCost;

/// Percentiles of a distribution.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Largest.
    pub max: u64,
}

impl From<&Histogram<u64>> for Percentiles {
    fn from(h: &Histogram<u64>) -> Self {
        Self {
            p50: h.value_at_quantile(0.5),
            p99: h.value_at_quantile(0.99),
            max: h.max(),
        }
    }
}

/// The distributions of checkpoints, owned by the control thread.
#[derive(Debug)]
pub struct CheckpointTimes {
    pause_us: Histogram<u64>,
    quiesce_us: Histogram<u64>,
    state_us: Histogram<u64>,
    copy_us: Histogram<u64>,
    commit_us: Histogram<u64>,
    dirty_pages: Histogram<u64>,
    /// Checkpoints committed, the one that completes a pair not counted.
    pub count: u64,
    /// How long the last secondary took from its welcome to its protection.
    pub sync_us: u64,
    /// Checkpoints aborted.
    pub aborted: u64,
    /// Bytes on the page channel.
    pub page_bytes: u64,
}

impl Default for CheckpointTimes {
    fn default() -> Self {
        let new = || Histogram::new_with_bounds(1, 600_000_000, 3).expect("constant bounds");
        Self {
            pause_us: new(),
            quiesce_us: new(),
            state_us: new(),
            copy_us: new(),
            commit_us: new(),
            dirty_pages: new(),
            count: 0,
            sync_us: 0,
            aborted: 0,
            page_bytes: 0,
        }
    }
}

impl CheckpointTimes {
    /// A capture was made.
    pub fn captured(&mut self, cost: &CaptureCost) {
        self.pause_us.saturating_record(cost.pause_us.max(1));
        self.quiesce_us.saturating_record(cost.quiesce_us.max(1));
        self.state_us.saturating_record(cost.state_us.max(1));
        self.copy_us.saturating_record(cost.copy_us.max(1));
        self.dirty_pages.saturating_record(cost.dirty_pages.max(1));
    }

    /// A checkpoint was committed so long after it was begun.
    pub fn committed(&mut self, commit_us: u64) {
        self.commit_us.saturating_record(commit_us.max(1));
        self.count += 1;
    }
}

/// Where the pair stands.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Standing {
    /// `primary` or `secondary`.
    pub role: &'static str,
    /// `alone`, `syncing`, `paired`, `deciding`, `blocked`, `standby`, ...
    pub state: &'static str,
    /// Whether the loss of this host would be survived.
    pub protected: bool,
    /// Why not, and since when (seconds since 1970); empty while protected.
    pub unprotected_reason: String,
    /// Seconds since 1970.
    pub unprotected_since: u64,
    /// The arbiter's generation as last confirmed.
    pub generation: u64,
    /// Present epoch.
    pub epoch: u64,
    /// How many times this process took the VM over.
    pub takeovers: u64,
    /// `colo` (output is compared) or `remus` (it waits for periodic checkpoints), now.
    pub mode: &'static str,
    /// Share of time that the guest may run, in percent, as decided.
    pub run_pct: u8,
    /// Storms of divergences so far.
    pub storms: u64,
    /// Steps of checkpoints that took too long, by step.
    pub step_timeouts: BTreeMap<&'static str, u64>,
}

/// The document.
#[derive(Debug, Clone, Default, Serialize)]
#[allow(
    missing_docs,
    reason = "the names are the documentation; units are in them"
)]
pub struct PairStatus {
    #[serde(flatten)]
    pub standing: Standing,
    pub compared: u64,
    pub released_by_match: u64,
    pub released_by_checkpoint: u64,
    pub released_free: u64,
    pub released_by_policy: u64,
    pub released_alone: u64,
    pub released_data_by_match: u64,
    pub released_data_by_checkpoint: u64,
    pub divergences: BTreeMap<&'static str, u64>,
    pub checkpoint_causes: BTreeMap<&'static str, u64>,
    pub checkpoints: u64,
    pub checkpoints_aborted: u64,
    pub sync_us: u64,
    pub checkpoint_pause_us: Percentiles,
    pub quiesce_us: Percentiles,
    pub state_us: Percentiles,
    pub copy_us: Percentiles,
    pub commit_us: Percentiles,
    pub hold_us: Percentiles,
    pub dirty_pages: Percentiles,
    pub link_bytes: u64,
    pub link: LinkStats,
    pub page_bytes: u64,
    pub mirrored: u64,
    pub redelivered: u64,
    pub digests: u64,
    pub fetched: u64,
}

impl PairStatus {
    /// Of a secondary that has not reached its primary yet.
    pub fn joining() -> Self {
        let standing = Standing {
            role: "secondary",
            state: "joining",
            ..Standing::default()
        };
        Self {
            standing,
            ..Self::default()
        }
    }

    /// Of a primary.
    pub fn of_primary(standing: Standing, report: &PrimaryReport, times: &CheckpointTimes) -> Self {
        let stats = &report.stats;
        Self {
            standing,
            compared: stats.compared,
            released_by_match: stats.released_by_match,
            released_by_checkpoint: stats.released_by_checkpoint,
            released_free: stats.released_free,
            released_by_policy: stats.released_by_policy,
            released_alone: stats.released_alone,
            released_data_by_match: stats.released_data_by_match,
            released_data_by_checkpoint: stats.released_data_by_checkpoint,
            divergences: by_cause(&stats.divergences),
            checkpoint_causes: by_cause(&stats.requests),
            checkpoints: times.count,
            checkpoints_aborted: times.aborted,
            sync_us: times.sync_us,
            checkpoint_pause_us: (&times.pause_us).into(),
            quiesce_us: (&times.quiesce_us).into(),
            state_us: (&times.state_us).into(),
            copy_us: (&times.copy_us).into(),
            commit_us: (&times.commit_us).into(),
            hold_us: (&report.hold_us).into(),
            dirty_pages: (&times.dirty_pages).into(),
            link_bytes: report.link.sent_bytes + report.link.received_bytes,
            link: report.link,
            page_bytes: times.page_bytes,
            mirrored: stats.mirrored,
            redelivered: stats.redelivered,
            digests: stats.digests,
            fetched: stats.fetched,
        }
    }

    /// Of a secondary.
    pub fn of_secondary(standing: Standing, report: &SecondaryReport) -> Self {
        Self {
            standing,
            checkpoint_causes: by_cause(&report.stats.requests),
            link_bytes: report.link.sent_bytes + report.link.received_bytes,
            link: report.link,
            mirrored: report.stats.mirrored,
            redelivered: report.stats.redelivered,
            digests: report.stats.digests,
            fetched: report.stats.fetched,
            ..Self::default()
        }
    }
}

/// Counts of steps that took too long.
pub(super) fn by_step(counters: &Counters) -> BTreeMap<&'static str, u64> {
    let named = Step::ALL
        .iter()
        .map(|s| (s.name(), counters.timeouts[s.index()]));
    named.filter(|&(_, n)| n > 0).collect()
}

pub(super) const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Colo => "colo",
        Mode::Remus => "remus",
    }
}

fn by_cause(counts: &[u64; Cause::COUNT]) -> BTreeMap<&'static str, u64> {
    let named = Cause::ALL.iter().map(|c| (c.name(), counts[c.index()]));
    named.filter(|&(_, n)| n > 0).collect()
}
