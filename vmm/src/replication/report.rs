//! What a replicated VM tells about itself: the document of `colo status`.
//!
//! Times are microseconds. What each of them contains, and what it does not, is in the table of README.md (rule 17).
//! What a secondary measures is in `applied`.

use std::collections::BTreeMap;

use colo_compare::Cause;
use colo_control::{Counters, Mode, Step};
use colo_fastpath::link::LinkStats;
use colo_fastpath::pair::{PrimaryReport, SecondaryReport};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::applied::{AppliedReport, ApplyTimes};
use super::engine::EngineCounters;
use crate::checkpoint::ahead::AheadCounters;
use crate::checkpoint::ahead::area::AreaCounters;
use crate::checkpoint::capture::CaptureCost;
use crate::checkpoint::codec::PageCounters;
use crate::checkpoint::outbound::Sent;
use crate::checkpoint::staging::StagedPages;

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

/// One checkpoint, as its primary saw it.
#[derive(Debug, Clone, Default, Serialize)]
#[allow(
    missing_docs,
    reason = "the names are the documentation; units are in them"
)]
pub struct CheckpointReport {
    pub epoch: u64,
    /// What asked for it.
    pub cause: &'static str,
    /// From the order to stop the SVM until it had stopped.
    pub svm_stop_us: u64,
    /// Pages were copied while the PVM ran.
    pub early_us: u64,
    /// Then it stood still: of this, the next six.
    pub pause_us: u64,
    pub quiesce_us: u64,
    pub state_us: u64,
    pub collect_us: u64,
    pub stabilise_us: u64,
    pub audit_us: u64,
    pub resume_us: u64,
    /// Writes of the PVM that waited for captured pages.
    pub stall_us: u64,
    pub stolen_us: u64,
    pub transfer_us: u64,
    /// Part of the transfer: waiting for the SVM's digests.
    pub digest_wait_us: u64,
    /// From the order to stop the SVM until the secondary's commit.
    pub commit_us: u64,
    /// The longest time from the production of a frame until this commit released it; 0 if it released none.
    pub hold_us: u64,
    pub dirty_pages: u64,
    /// Of these, sent ahead and not written since: not captured in the pause.
    pub ahead_pages: u64,
    /// Copied before the pause.
    pub early_pages: u64,
    /// Written last before it: captured in the pause, if others were before.
    pub late_pages: u64,
    pub pending_frames: u64,
    pub sent_bytes: u64,
    pub digest_bytes: u64,
    /// Pages that another core digested ahead of the sender.
    pub digested_pages: u64,
    pub pages: PageCounters,
    /// Pages sent ahead since the commit before.
    pub ahead: AheadCounters,
}

impl CheckpointReport {
    /// All of it is on the link.
    fn sent(&mut self, sent: &Sent, stall_us: u64) {
        self.stall_us = stall_us;
        self.stolen_us = self.pause_us + stall_us;
        self.transfer_us = sent.transfer_us;
        self.digest_wait_us = sent.digest_wait_us;
        self.sent_bytes = sent.sent_bytes;
        self.digest_bytes = sent.digest_bytes;
        self.pages = sent.pages;
        self.digested_pages = sent.digested_pages;
        self.ahead.used_pages = sent.names.used_pages;
        self.ahead.equal_pages = sent.names.equal_pages;
    }
}

/// What there is to tell of the latest checkpoint.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum LastCheckpoint {
    /// On the primary.
    Committed(Box<CheckpointReport>),
    /// On the secondary.
    Applied(AppliedReport),
}

/// A distribution of times or sizes.
#[derive(Debug)]
pub(super) struct Spread(Histogram<u64>);

impl Default for Spread {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, 600_000_000, 3).expect("constant bounds"))
    }
}

impl Spread {
    pub(super) fn record(&mut self, value: u64) {
        self.0.saturating_record(value.max(1));
    }

    pub(super) fn percentiles(&self) -> Percentiles {
        (&self.0).into()
    }
}

/// The distributions of checkpoints, owned by the control thread.
#[derive(Debug, Default)]
pub struct CheckpointTimes {
    pause_us: Spread,
    stolen_us: Spread,
    svm_stop_us: Spread,
    quiesce_us: Spread,
    state_us: Spread,
    early_us: Spread,
    collect_us: Spread,
    stabilise_us: Spread,
    audit_us: Spread,
    resume_us: Spread,
    stall_us: Spread,
    transfer_us: Spread,
    digest_wait_us: Spread,
    commit_us: Spread,
    dirty_pages: Spread,
    pages: PageCounters,
    ahead: AheadCounters,
    /// Since the last commit.
    ahead_since: AheadCounters,
    /// The checkpoint in flight.
    current: CheckpointReport,
    /// All of `current` is on the link.
    is_sent: bool,
    /// Committed, though it has not been told yet that all was sent: the secondary's word can be faster.
    committed: Option<CheckpointReport>,
    /// The one committed last.
    last: Option<CheckpointReport>,
    /// Checkpoints committed, the one that completes a pair not counted.
    pub count: u64,
    /// How long the last secondary took from its welcome to its protection.
    pub sync_us: u64,
    /// Live rounds of the last secondary's synchronisation, and the pages sent in them.
    pub sync_rounds: u64,
    /// See `sync_rounds`.
    pub sync_pages: u64,
    /// How often a shard had no room for more held output, and the vCPUs stood still.
    pub hold_full: u64,
    /// Checkpoints aborted.
    pub aborted: u64,
    /// Bytes on the page channel.
    pub page_bytes: u64,
    engine: EngineCounters,
}

impl CheckpointTimes {
    /// One begins.
    pub fn begun(&mut self, epoch: u64, cause: &'static str) {
        self.is_sent = false;
        self.current = CheckpointReport {
            epoch,
            cause,
            ..CheckpointReport::default()
        };
    }

    /// The SVM has stopped.
    pub fn svm_stopped(&mut self, svm_stop_us: u64) {
        self.current.svm_stop_us = svm_stop_us;
    }

    /// A capture was made. Nothing more comes of the checkpoint before it.
    pub fn captured(&mut self, cost: &CaptureCost) {
        self.finish_committed();
        let current = &mut self.current;
        current.early_us = cost.early_us;
        current.pause_us = cost.pause_us;
        current.quiesce_us = cost.quiesce_us;
        current.state_us = cost.state_us;
        current.collect_us = cost.collect_us;
        current.stabilise_us = cost.stabilise_us;
        current.audit_us = cost.audit_us;
        current.resume_us = cost.resume_us;
        current.dirty_pages = cost.dirty_pages;
        current.ahead_pages = cost.ahead_pages;
        current.early_pages = cost.early_pages;
        current.late_pages = cost.late_pages;
        current.pending_frames = cost.pending_frames;
    }

    /// All of the checkpoint of an epoch is on the link.
    pub fn sent(&mut self, epoch: u64, sent: &Sent, stall_us: u64) {
        self.page_bytes = sent.channel.sent_bytes;
        self.engine = sent.into();
        self.ahead(&sent.ahead);
        let reports = self.committed.iter_mut().chain([&mut self.current]);
        let Some(report) = reports.into_iter().find(|report| report.epoch == epoch) else {
            return;
        };
        report.sent(sent, stall_us);
        if self.current.epoch == epoch {
            self.is_sent = true;
        } else {
            self.finish_committed();
        }
    }

    /// Pages were sent ahead.
    pub fn ahead(&mut self, counted: &AheadCounters) {
        self.ahead.add(counted);
        self.ahead_since.add(counted);
    }

    /// The checkpoint was committed so long after it was begun, and what it released had been held for so long at most.
    pub fn committed(&mut self, commit_us: u64, hold_us: u64) {
        self.finish_committed();
        let mut done = std::mem::take(&mut self.current);
        (done.commit_us, done.hold_us) = (commit_us, hold_us);
        self.committed = Some(done);
        if self.is_sent {
            self.finish_committed();
        }
    }

    /// Counts and shows a committed checkpoint: all of it is known.
    fn finish_committed(&mut self) {
        let Some(mut done) = self.committed.take() else {
            return;
        };
        let used = done.ahead;
        self.ahead.add(&used);
        done.ahead.add(&std::mem::take(&mut self.ahead_since));
        self.pause_us.record(done.pause_us);
        self.stolen_us.record(done.stolen_us);
        self.svm_stop_us.record(done.svm_stop_us);
        self.quiesce_us.record(done.quiesce_us);
        self.state_us.record(done.state_us);
        self.early_us.record(done.early_us);
        self.collect_us.record(done.collect_us);
        self.stabilise_us.record(done.stabilise_us);
        if done.audit_us > 0 {
            self.audit_us.record(done.audit_us);
        }
        self.resume_us.record(done.resume_us);
        self.stall_us.record(done.stall_us);
        self.transfer_us.record(done.transfer_us);
        self.digest_wait_us.record(done.digest_wait_us);
        self.commit_us.record(done.commit_us);
        self.dirty_pages.record(done.dirty_pages);
        self.pages.add(&done.pages);
        self.count += 1;
        self.last = Some(done);
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
    /// Whether writes of the guest are logged: only while there is a peer that a checkpoint may be for.
    pub dirty_logging: bool,
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

#[cfg(test)]
mod breakdown_tests;

#[cfg(test)]
mod tests {
    use super::*;

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
            lag_slowed: 11,
            lag_unhelped: 12,
            ..Counters::default()
        };
        let standing = Standing {
            refused_connections: 5,
            ..Standing::default()
        };
        let mut sent = Sent::default();
        sent.channel.zero_copy_off = 6;
        sent.cache.evicted = 7;
        sent.stabilise.fallbacks = 8;
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

    fn captured(times: &mut CheckpointTimes, epoch: u64) {
        times.begun(epoch, "payload");
        times.captured(&CaptureCost {
            pause_us: 100 * epoch,
            dirty_pages: 10,
            ..CaptureCost::default()
        });
    }

    fn sent(times: &mut CheckpointTimes, epoch: u64) {
        let mut sent = Sent {
            sent_bytes: 1000 * epoch,
            ..Sent::default()
        };
        sent.pages.equal = 7;
        times.sent(epoch, &sent, 5);
    }

    /// Epoch, bytes, stolen time and commit of what is shown, how many there were, and equal pages in all.
    fn shown(times: &CheckpointTimes) -> (Option<[u64; 4]>, u64, u64) {
        let last = times.last.as_ref();
        let last = last.map(|c| [c.epoch, c.sent_bytes, c.stolen_us, c.commit_us]);
        (last, times.count, times.pages.equal)
    }

    #[test]
    fn a_checkpoint_is_shown_when_all_of_it_is_known_in_whatever_order_that_comes() {
        let mut times = CheckpointTimes::default();
        captured(&mut times, 1);
        sent(&mut times, 1);
        assert_eq!(shown(&times), (None, 0, 0));
        times.committed(9, 0);
        assert_eq!(shown(&times), (Some([1, 1000, 105, 9]), 1, 7));

        // The secondary's word is faster than the sender's.
        captured(&mut times, 2);
        times.committed(8, 0);
        assert_eq!(shown(&times), (Some([1, 1000, 105, 9]), 1, 7));
        sent(&mut times, 2);
        assert_eq!(shown(&times), (Some([2, 2000, 205, 8]), 2, 14));

        // And the next one begins in between.
        captured(&mut times, 3);
        times.committed(7, 0);
        times.begun(4, "payload");
        sent(&mut times, 3);
        assert_eq!(shown(&times), (Some([3, 3000, 305, 7]), 3, 21));
        times.captured(&CaptureCost::default());
        sent(&mut times, 4);
        times.committed(6, 0);
        assert_eq!(shown(&times), (Some([4, 4000, 5, 6]), 4, 28));
    }

    #[test]
    fn a_checkpoint_whose_sender_was_cut_off_counts_before_the_next_one() {
        let mut times = CheckpointTimes::default();
        captured(&mut times, 1);
        times.committed(9, 0);
        assert_eq!(shown(&times), (None, 0, 0));
        captured(&mut times, 2);
        assert_eq!(shown(&times), (Some([1, 0, 0, 9]), 1, 0));
    }
}
