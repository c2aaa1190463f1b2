//! The document of `colo status` of a replicated VM, put together from what its parts have counted.

use std::collections::BTreeMap;

use colo_compare::Cause;
use colo_control::{Counters, Mode, Step};
use colo_fastpath::link::LinkStats;
use colo_fastpath::pair::{PrimaryReport, SecondaryReport};
use serde::Serialize;

use super::{CheckpointTimes, LastCheckpoint, Percentiles};
use crate::checkpoint::ahead::AheadCounters;
use crate::checkpoint::ahead::area::AreaCounters;
use crate::checkpoint::codec::PageCounters;
use crate::checkpoint::dirty::DirtySnapshot;
use crate::checkpoint::staging::StagedPages;
use crate::replication::applied::ApplyTimes;
use crate::replication::engine::EngineCounters;

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
    /// Whether writes of the guest are logged: only while there is a peer that a checkpoint may be for.
    pub dirty_logging: bool,
    /// How, and what was counted of it; none without a machine.
    pub dirty_log: Option<DirtySnapshot>,
    /// Pauses that waited for their processors like everybody: this process has no CAP_SYS_NICE.
    pub unhurried_pauses: u64,
    /// TCP streams that checkpoints spread over; 0 without a peer.
    pub page_streams: usize,
    /// How often these broke and were opened anew.
    pub streams_reopened: u64,
    /// The arbiter's generation as last confirmed.
    pub generation: u64,
    /// Present epoch.
    pub epoch: u64,
    /// How many times this process took the VM over.
    pub takeovers: u64,
    /// `colo` (output is compared) or `remus` (it waits for periodic checkpoints), now.
    pub mode: &'static str,
    /// Share of time that the guest may run, in percent.
    pub run_pct: u8,
    /// How long its vCPUs were kept standing for that, so far.
    pub throttled_us: u64,
    /// How much later the SVM's answers came lately than the PVM's, without checkpoints and the link (rule 16).
    pub lag_us: u64,
    /// How often the guest was slowed down one level for that,
    pub lag_slowed: u64,
    /// and how often it got all of its time back because that did not help.
    pub lag_unhelped: u64,
    /// Links given up though both hosts lived: the page channel stood still, broke again and again or in a synchronisation, or
    /// no checkpoint came to an end.
    pub links_given_up: u64,
    /// Which of these it was the last time.
    pub link_given_up_reason: String,
    /// Synchronisations given up because the guest dirties memory faster than the link carries it.
    pub not_followed: u64,
    /// Storms of divergences so far.
    pub storms: u64,
    /// Share of the latest `storm_window_ms` that went into checkpoints because outputs differ, in percent.
    pub checkpoint_share_pct: u8,
    /// Steps of checkpoints that took too long, by step.
    pub step_timeouts: BTreeMap<&'static str, u64>,
    /// Checkpoints that this host's core gave up before their commit; `checkpoints_aborted` has those that a lost link
    /// ended, too.
    pub aborts: u64,
    /// Aborts that came too late: the secondary had committed.
    pub late_aborts: u64,
    /// Checkpoints that came whole when nobody wanted them any more.
    pub discarded_stages: u64,
    /// Secondaries that could not have the first state.
    pub refusals: u64,
    /// Requests for a checkpoint that another one covered.
    pub coalesced_requests: u64,
    /// Connections to `link_listen` that were no colo link, or too many.
    pub refused_connections: u64,
}

impl Standing {
    /// With what the core has counted.
    pub fn counted(self, counters: &Counters) -> Self {
        Self {
            links_given_up: counters.given_up,
            not_followed: counters.not_followed,
            lag_slowed: counters.lag_slowed,
            lag_unhelped: counters.lag_unhelped,
            storms: counters.storms,
            step_timeouts: by_step(counters),
            aborts: counters.aborts,
            late_aborts: counters.late_aborts,
            discarded_stages: counters.discarded,
            refusals: counters.refusals,
            coalesced_requests: counters.coalesced,
            ..self
        }
    }
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
    /// Those of `checkpoints` that were audited, on a primary or a secondary.
    pub audits: u64,
    pub sync_us: u64,
    pub sync_rounds: u64,
    pub sync_pages: u64,
    pub hold_full: u64,
    pub checkpoint_pause_us: Percentiles,
    pub quiesce_us: Percentiles,
    pub state_us: Percentiles,
    pub early_us: Percentiles,
    pub collect_us: Percentiles,
    pub stabilise_us: Percentiles,
    /// Of a primary or a secondary, whichever this host is, as `resume_us`.
    pub audit_us: Percentiles,
    pub resume_us: Percentiles,
    pub stall_us: Percentiles,
    pub stolen_us: Percentiles,
    pub svm_stop_us: Percentiles,
    pub transfer_us: Percentiles,
    pub begin_us: Percentiles,
    pub hand_over_us: Percentiles,
    pub digest_wait_us: Percentiles,
    pub commit_us: Percentiles,
    /// Of a secondary, these four.
    pub stage_us: Percentiles,
    pub apply_us: Percentiles,
    pub write_us: Percentiles,
    pub load_us: Percentiles,
    pub hold_us: Percentiles,
    pub dirty_pages: Percentiles,
    pub link_bytes: u64,
    pub link: LinkStats,
    pub page_bytes: u64,
    #[serde(flatten)]
    pub engine: EngineCounters,
    /// What became of the pages of checkpoints.
    pub pages: PageCounters,
    /// Pages that were sent before a checkpoint needed them.
    pub ahead: AheadCounters,
    /// The same on the secondary, as of the last commit.
    pub ahead_area: AreaCounters,
    /// How pages of checkpoints were staged on the secondary, as of the last commit.
    pub staged_pages: StagedPages,
    pub last_checkpoint: Option<LastCheckpoint>,
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
            audits: times.audit_us.count(),
            sync_us: times.sync_us,
            sync_rounds: times.sync_rounds,
            sync_pages: times.sync_pages,
            hold_full: times.hold_full,
            checkpoint_pause_us: times.pause_us.percentiles(),
            quiesce_us: times.quiesce_us.percentiles(),
            state_us: times.state_us.percentiles(),
            early_us: times.early_us.percentiles(),
            collect_us: times.collect_us.percentiles(),
            stabilise_us: times.stabilise_us.percentiles(),
            audit_us: times.audit_us.percentiles(),
            resume_us: times.resume_us.percentiles(),
            stall_us: times.stall_us.percentiles(),
            stolen_us: times.stolen_us.percentiles(),
            svm_stop_us: times.svm_stop_us.percentiles(),
            transfer_us: times.transfer_us.percentiles(),
            begin_us: times.begin_us.percentiles(),
            hand_over_us: times.hand_over_us.percentiles(),
            digest_wait_us: times.digest_wait_us.percentiles(),
            commit_us: times.commit_us.percentiles(),
            hold_us: (&report.hold_us).into(),
            dirty_pages: times.dirty_pages.percentiles(),
            link_bytes: report.link.sent_bytes + report.link.received_bytes,
            link: report.link,
            page_bytes: times.page_bytes,
            engine: times.engine,
            pages: times.pages,
            ahead: times.ahead,
            last_checkpoint: times
                .last
                .clone()
                .map(|last| LastCheckpoint::Committed(Box::new(last))),
            mirrored: stats.mirrored,
            redelivered: stats.redelivered,
            digests: stats.digests,
            fetched: stats.fetched,
            ..Self::default()
        }
    }

    /// Of a secondary.
    pub fn of_secondary(standing: Standing, report: &SecondaryReport, times: &ApplyTimes) -> Self {
        Self {
            standing,
            checkpoints: times.count,
            audits: times.audit_us.count(),
            stage_us: times.stage_us.percentiles(),
            apply_us: times.apply_us.percentiles(),
            write_us: times.write_us.percentiles(),
            load_us: times.load_us.percentiles(),
            audit_us: times.audit_us.percentiles(),
            resume_us: times.resume_us.percentiles(),
            last_checkpoint: times.last.map(LastCheckpoint::Applied),
            ahead_area: times.area,
            engine: times.engine,
            staged_pages: times.staged,
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
fn by_step(counters: &Counters) -> BTreeMap<&'static str, u64> {
    let named = Step::ALL
        .iter()
        .map(|s| (s.name(), counters.timeouts[s.index()]));
    named.filter(|&(_, n)| n > 0).collect()
}

pub(in crate::replication) const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Colo => "colo",
        Mode::Remus => "remus",
    }
}

fn by_cause(counts: &[u64; Cause::COUNT]) -> BTreeMap<&'static str, u64> {
    let named = Cause::ALL.iter().map(|c| (c.name(), counts[c.index()]));
    named.filter(|&(_, n)| n > 0).collect()
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::*;
    use crate::checkpoint::dirty::DirtyMechanism;
    use crate::checkpoint::outbound::Sent;

    /// Whether a document has this number at this place.
    fn has(status: &PairStatus, place: &str, number: u64) {
        let document = serde_json::to_value(status).unwrap();
        assert_eq!(document.pointer(place), Some(&number.into()), "{place}");
    }

    #[test]
    fn the_status_has_what_the_parts_have_counted() {
        let counters = Counters {
            aborts: 1,
            late_aborts: 2,
            discarded: 3,
            storms: 4,
            coalesced: 9,
            refusals: 10,
            lag_slowed: 15,
            lag_unhelped: 16,
            ..Counters::default()
        };
        let standing = Standing {
            refused_connections: 5,
            unhurried_pauses: 11,
            dirty_log: Some(DirtySnapshot {
                mechanism: DirtyMechanism::Ring,
                ring_full: 12,
                taken: 0,
                guest_pages: 0,
            }),
            ..Standing::default()
        };
        let mut sent = Sent::default();
        sent.channel.zero_copy_off = 6;
        sent.cache.evicted = 7;
        sent.stabilise.fallbacks = 8;
        sent.stabilise.early_again_pages = 13;
        sent.channel.receives_beyond_registered = 14;
        let mut times = CheckpointTimes::default();
        times.sent(1, &sent, 0);
        let report = PrimaryReport {
            stats: Default::default(),
            hold_us: Histogram::new_with_bounds(1, 2, 1).unwrap(),
            link: LinkStats::default(),
        };
        let primary = PairStatus::of_primary(standing.counted(&counters), &report, &times);
        for (n, place) in (1..).zip([
            "/aborts",
            "/late_aborts",
            "/discarded_stages",
            "/storms",
            "/refused_connections",
            "/page_channel/zero_copy_off",
            "/page_cache/evicted",
            "/stabilise/fallbacks",
            "/coalesced_requests",
            "/refusals",
            "/unhurried_pauses",
            "/dirty_log/ring_full",
            "/stabilise/early_again_pages",
            "/page_channel/receives_beyond_registered",
            "/lag_slowed",
            "/lag_unhelped",
        ]) {
            has(&primary, place, n);
        }

        let mut cost = crate::checkpoint::stage::ApplyCost::default();
        cost.channel.damaged_checkpoints = 9;
        let mut times = ApplyTimes::default();
        times.applied(1, &cost);
        let report = SecondaryReport {
            stats: Default::default(),
            link: LinkStats::default(),
        };
        let secondary = PairStatus::of_secondary(Standing::default(), &report, &times);
        has(&secondary, "/page_channel/damaged_checkpoints", 9);
    }
}
