//! Checkpoints: begin, verdict, abort, and what each step may take.
//!
//! Invariants: at most one is in flight (rule 7). Once its stage can be whole only the secondary's word ends it
//! (rule 13): an abort of ours is a question, and the answer is its abort or its commit. No new one begins before
//! the old one has such an end on both sides, so no message of an aborted one can be taken for one of the next. A
//! step that does not end is aborted, and an abort that gets no answer means that the secondary is lost.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::{ABORTS_MAX, Primary, PrimaryState};
use crate::lag::Change as Lag;
use crate::pace::{Rate, Round};
use crate::storm::Change;
use crate::{Action, Msg, Notice, Standing, Step, VERSION_ABORT_ANSWERED};

/// The one in flight.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) epoch: u64,
    pub(super) step: Step,
    pub(super) since_us: u64,
    begun_us: u64,
    /// The packet path, the operator or a limit has asked for it.
    wanted: bool,
    /// The epoch that follows is buffered.
    buffer: bool,
    /// Our shell is at the capture.
    capturing: bool,
    /// The epoch was cut.
    cut: bool,
    /// What the secondary said about it before our own shell reported the end of the capture.
    verdict: Option<Result<(), String>>,
}

impl Primary {
    /// Until when the present step may take, with the step.
    pub(super) fn step_deadline(&self) -> Option<u64> {
        let of = |step| self.timing.limit_us(step);
        match (&self.checkpoint, self.state) {
            (Some(c), _) => Some(c.since_us + of(c.step)),
            (None, PrimaryState::Syncing) => Some(self.sync_progress_us + of(Step::Sync)),
            _ => None,
        }
    }

    /// The present step has taken too long.
    pub(super) fn step_timed_out(&mut self, now_us: u64) {
        let (step, epoch) = match &self.checkpoint {
            Some(c) => (c.step, c.epoch),
            None => (Step::Sync, self.epoch),
        };
        self.counters.timeouts[step.index()] += 1;
        let limit_us = self.timing.limit_us(step);
        let notice = Notice::StepTimedOut {
            step,
            epoch,
            limit_us,
        };
        let reason = notice.to_string();
        self.act(Action::Tell(notice));
        match step {
            Step::Abort | Step::Sync => self.give_link_up(reason),
            _ if !self.answers_aborts() => self.give_link_up(reason),
            _ => {
                if matches!(step, Step::Send | Step::Begin | Step::Commit) {
                    self.pacer.slow_down();
                    self.tell_pace();
                }
                self.give_up(now_us, &reason);
            }
        }
    }

    fn answers_aborts(&self) -> bool {
        let answers = |version| version >= VERSION_ABORT_ANSWERED;
        self.peer.as_ref().is_some_and(|p| answers(p.version))
    }

    // ---- synchronisation ----

    pub(super) fn sync_round(&mut self, now_us: u64, sent_pages: u64, dirty_pages: u64, us: u64) {
        if self.state != PrimaryState::Syncing {
            return;
        }
        self.sync_progress_us = now_us;
        let pace = self.switch.protection().pace;
        match self.pacer.round(now_us, &pace, sent_pages, dirty_pages, us) {
            Round::Ready => self.sync_ready(now_us),
            Round::Again => {
                self.tell_pace();
                self.act(Action::SyncRound);
            }
            Round::GiveUp => {
                self.counters.not_followed += 1;
                let rate = |pages: u64| Rate::of(pages, us);
                let reason = format!(
                    "the guest dirties memory faster than the link carries it: it dirties {}, the link carries {}, \
                     though it runs {} % of the time only; a faster link or less write load helps",
                    rate(dirty_pages),
                    rate(sent_pages),
                    self.pacer.run_pct()
                );
                self.act(Action::Tell(Notice::CannotFollow {
                    reason: reason.clone(),
                }));
                self.drop_link(&reason);
            }
        }
    }

    fn sync_ready(&mut self, now_us: u64) {
        self.state = PrimaryState::FirstCheckpoint;
        self.switch.start(now_us);
        let buffer = self.switch.buffers();
        self.checkpoint = Some(Checkpoint {
            epoch: self.epoch,
            step: Step::Capture,
            since_us: now_us,
            begun_us: now_us,
            wanted: false,
            buffer,
            capturing: true,
            cut: false,
            verdict: None,
        });
        let epoch = self.epoch;
        self.act(Action::Capture {
            epoch,
            first: true,
            svm_dirty: Vec::new(),
            buffer,
        });
    }

    // ---- begin ----

    pub(super) fn checkpoint_wanted(&mut self, now_us: u64) {
        // Before the capture a request is coalesced with the checkpoint in flight (rule 14); later the
        // output it is about can be of the next epoch, and the path asks only once an epoch.
        let covered = self
            .checkpoint
            .as_ref()
            .is_some_and(|c| c.step == Step::Stop);
        let pairs = matches!(
            self.state,
            PrimaryState::FirstCheckpoint | PrimaryState::Pairing | PrimaryState::Paired
        );
        let waits = self.wanted && self.checkpoint.is_some();
        self.counters.coalesced += u64::from(covered || waits);
        self.wanted |= pairs && !covered;
        self.begin_checkpoint(now_us);
    }

    pub(super) fn begin_checkpoint(&mut self, now_us: u64) {
        if self.state != PrimaryState::Paired || self.checkpoint.is_some() {
            return;
        }
        let wanted = core::mem::take(&mut self.wanted);
        let buffer = self.switch.begin(now_us, wanted);
        let (generation, epoch) = (self.record.generation, self.epoch);
        self.checkpoint = Some(Checkpoint {
            epoch,
            step: Step::Stop,
            since_us: now_us,
            begun_us: now_us,
            wanted,
            buffer,
            capturing: false,
            cut: false,
            verdict: None,
        });
        self.send(Msg::StopSvm {
            generation,
            epoch,
            halt: buffer,
        });
    }

    pub(super) fn svm_stopped(&mut self, now_us: u64, epoch: u64, svm_dirty: Vec<u8>) {
        let Some(c) = self.in_flight(epoch).filter(|c| c.step == Step::Stop) else {
            return;
        };
        (c.step, c.since_us, c.capturing) = (Step::Capture, now_us, true);
        let buffer = c.buffer;
        self.act(Action::Capture {
            epoch,
            first: false,
            svm_dirty,
            buffer,
        });
    }

    fn in_flight(&mut self, epoch: u64) -> Option<&mut Checkpoint> {
        self.checkpoint.as_mut().filter(|c| c.epoch == epoch)
    }

    // ---- what our shell reports ----

    pub(super) fn captured(&mut self, now_us: u64, epoch: u64) {
        // The cut was made whatever became of the checkpoint meanwhile.
        if epoch == self.epoch {
            self.epoch += 1;
        }
        let Some(c) = self.in_flight(epoch) else {
            return;
        };
        (c.capturing, c.cut) = (false, true);
        if c.step == Step::Capture {
            (c.step, c.since_us) = (Step::Send, now_us);
        }
        self.early_verdict(now_us, epoch);
    }

    pub(super) fn sent(&mut self, now_us: u64, epoch: u64) {
        if let Some(c) = self.in_flight(epoch).filter(|c| c.step == Step::Send) {
            (c.step, c.since_us) = (Step::Begin, now_us);
        }
        self.begun(now_us);
    }

    /// Looks whether what was sent is known to come in, or nobody will tell.
    pub(super) fn begun(&mut self, now_us: u64) {
        let told = self.peer.as_ref().and_then(|peer| peer.begun_epoch);
        if let Some(c) = self.checkpoint.as_mut().filter(|c| c.step == Step::Begin)
            && told.is_none_or(|epoch| epoch >= c.epoch)
        {
            (c.step, c.since_us) = (Step::Commit, now_us);
        }
    }

    /// Nothing whole was sent, and nothing will be.
    pub(super) fn checkpoint_failed(&mut self, now_us: u64, epoch: u64, reason: &str) {
        let Some(c) = self.in_flight(epoch) else {
            return;
        };
        c.capturing = false;
        match c.step {
            Step::Capture | Step::Send if matches!(c.verdict, Some(Err(_))) => {
                self.abort(now_us, epoch, reason);
            }
            Step::Capture | Step::Send => self.give_up(now_us, reason),
            Step::Abort => self.early_verdict(now_us, epoch),
            // It was reported as sent.
            _ => {}
        }
    }

    // ---- the end of a checkpoint ----

    /// The secondary's word: committed, or off.
    pub(super) fn verdict(&mut self, now_us: u64, epoch: u64, verdict: Result<(), String>) {
        let Some(c) = self.in_flight(epoch) else {
            return;
        };
        if c.capturing {
            // It overtook the report of the capture, and the epoch counts from there.
            c.verdict = Some(verdict);
            return;
        }
        match verdict {
            Ok(()) if !c.cut => {} // nothing was captured that could be committed
            Ok(()) => self.committed(now_us, epoch),
            Err(reason) => self.abort(now_us, epoch, &reason),
        }
    }

    fn early_verdict(&mut self, now_us: u64, epoch: u64) {
        if let Some(verdict) = self.in_flight(epoch).and_then(|c| c.verdict.take()) {
            self.verdict(now_us, epoch, verdict);
        }
    }

    /// Asks the secondary to let the checkpoint be off. It may answer that it has committed.
    fn give_up(&mut self, now_us: u64, reason: &str) {
        let generation = self.record.generation;
        let answers = self.answers_aborts() && self.state == PrimaryState::Paired;
        let Some(c) = &mut self.checkpoint else {
            return;
        };
        let epoch = c.epoch;
        (c.step, c.since_us) = (Step::Abort, now_us);
        // It may have said already what it would answer.
        let is_off = matches!(c.verdict, Some(Err(_)));
        if !is_off {
            self.send(Msg::Aborted {
                generation,
                epoch,
                reason: reason.to_string(),
            });
        }
        if !answers {
            self.abort(now_us, epoch, reason);
        }
    }

    fn committed(&mut self, now_us: u64, epoch: u64) {
        let Some(c) = self.checkpoint.take() else {
            return;
        };
        self.counters.late_aborts += u64::from(c.step == Step::Abort);
        self.aborts = 0;
        let took_us = now_us.saturating_sub(c.begun_us);
        let pace = self.switch.protection().pace;
        self.pacer.committed(now_us, &pace, took_us);
        if self.state == PrimaryState::FirstCheckpoint {
            self.state = PrimaryState::Pairing;
            let session = self.session();
            self.ask(Standing::Paired { session });
        } else {
            let change = self.switch.committed(now_us, took_us, c.buffer);
            self.committed_to(now_us, c.begun_us, epoch);
            self.tell_change(change);
        }
        self.tell_pace();
    }

    fn tell_change(&mut self, change: Option<Change>) {
        match change {
            Some(Change::Storm {
                share_pct,
                checkpoints,
                retry_us,
            }) => {
                self.counters.storms += 1;
                let window_us = self.switch.protection().storm.window_us;
                self.act(Action::Tell(Notice::Storm {
                    checkpoints,
                    share_pct,
                    window_us,
                    retry_us,
                }));
            }
            Some(Change::Retry) => self.act(Action::Tell(Notice::StormOver)),
            None => {}
        }
    }

    pub(super) fn committed_to(&mut self, now_us: u64, begun_us: u64, epoch: u64) {
        self.periodic_due_us = match self.switch.interval_us() {
            // In Remus mode the interval is that between two begins, as far as the link can.
            Some(interval_us) => now_us.max(begun_us + interval_us),
            None => match self.timing.checkpoint_interval_us {
                0 => u64::MAX,
                interval_us => now_us + interval_us,
            },
        };
        self.act(Action::Commit { epoch });
        if self.wanted {
            self.begin_checkpoint(now_us);
        }
    }

    fn abort(&mut self, now_us: u64, epoch: u64, reason: &str) {
        // Who asked for it asks for the next one.
        self.wanted |= self.checkpoint.take().is_some_and(|c| c.wanted);
        self.aborts += 1;
        self.counters.aborts += 1;
        self.act(Action::Abort { epoch });
        if self.state == PrimaryState::FirstCheckpoint || self.aborts >= ABORTS_MAX {
            return self.give_link_up(reason.to_string());
        }
        self.begin_checkpoint(now_us);
    }

    // ---- the PVM's pace ----

    /// When a pair gives the PVM some of its time back, though no checkpoint shows that it may have it.
    pub(super) fn relief_at_us(&self) -> Option<u64> {
        let rests = self.state == PrimaryState::Paired && self.checkpoint.is_none();
        self.pacer.relief_at_us().filter(|_| rests)
    }

    pub(super) fn relieve(&mut self, now_us: u64) {
        if self.relief_at_us().is_some() {
            let pace = self.switch.protection().pace;
            self.pacer.relieve(now_us, &pace);
            self.tell_pace();
        }
    }

    /// The SVM's lag is looked at (rule 16).
    pub(super) fn answers(&mut self, now_us: u64, answers: u64, late_us: u64) {
        if self.state != PrimaryState::Paired {
            return;
        }
        let pace = self.switch.protection().pace;
        let before = self.pacer.lag.level();
        let change = self.pacer.lag.answers(now_us, &pace, answers, late_us);
        let lag_us = self.pacer.lag.lag_us();
        match change {
            Some(Lag::Slowed) => {
                self.counters.lag_slowed += 1;
                if before == 0 {
                    self.act(Action::Tell(Notice::Lags { lag_us }));
                }
            }
            Some(Lag::Unhelped) => {
                self.counters.lag_unhelped += 1;
                self.act(Action::Tell(Notice::LagUnhelped { lag_us }));
            }
            Some(Lag::Relieved) | None => {}
        }
        self.tell_pace();
    }

    pub(super) fn hold_full(&mut self, is_full: bool) {
        self.pacer.hold_full(is_full);
        self.tell_pace();
    }

    pub(super) fn tell_pace(&mut self) {
        if let Some(run_pct) = self.pacer.change() {
            self.act(Action::Throttle { run_pct });
            self.act(Action::Tell(Notice::Throttled { run_pct }));
        }
    }
}
