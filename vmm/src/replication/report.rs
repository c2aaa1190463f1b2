//! What a replicated VM tells about itself: the times and sizes of checkpoints on the primary here, the whole document of
//! `colo status` in `document`.
//!
//! Times are microseconds. What each of them contains, and what it does not, is in the table of README.md (rule 17).
//! What a secondary measures is in `applied`.

mod document;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::applied::AppliedReport;
use super::engine::EngineCounters;
use crate::checkpoint::ahead::AheadCounters;
use crate::checkpoint::capture::CaptureCost;
use crate::checkpoint::codec::PageCounters;
use crate::checkpoint::outbound::Sent;

pub(super) use document::mode_name;
pub use document::{PairStatus, Standing};

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
    /// Part of the transfer: begin and states, handed to the kernel.
    pub begin_us: u64,
    /// Part of the transfer: pages, handed to the kernel.
    pub hand_over_us: u64,
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
    /// Of these, copied before all the same: each met one more fault of the dirty log.
    pub again_pages: u64,
    pub pending_frames: u64,
    pub sent_bytes: u64,
    pub digest_bytes: u64,
    /// Pages that were digested as they were copied, or by another core ahead of the sender.
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
        self.begin_us = sent.begin_us;
        self.hand_over_us = sent.hand_over_us;
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

    /// How many values there were.
    pub(super) fn count(&self) -> u64 {
        self.0.len()
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
    begin_us: Spread,
    hand_over_us: Spread,
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
        current.again_pages = cost.again_pages;
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
        self.begin_us.record(done.begin_us);
        self.hand_over_us.record(done.hand_over_us);
        self.digest_wait_us.record(done.digest_wait_us);
        self.commit_us.record(done.commit_us);
        self.dirty_pages.record(done.dirty_pages);
        self.pages.add(&done.pages);
        self.count += 1;
        self.last = Some(done);
    }
}

#[cfg(test)]
mod breakdown_tests;

#[cfg(test)]
mod tests {
    use super::*;

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
