//! The primary's state machine: who speaks, pairing, checkpoints, loss of the secondary.
//!
//! Invariants: at most one checkpoint is in flight (rule 7); after the stage was sent whole only the secondary
//! decides about it (rule 13); the role changes only on the arbiter's answer (rule 18), of which one question at
//! a time is open.
//!
//! Does not touch packets or pages: the shell does, as the actions say.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::{Action, Cas, Expect, Geometry, Msg, Outcome, Record, Reply, Standing, Timing};
use crate::{VERSION_MAX, VERSION_MIN};

/// So many checkpoints may fail one after the other before the secondary counts as lost.
const ABORTS_MAX: u32 = 5;

/// What happened on the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrimaryEvent {
    /// All channels to a peer are connected.
    LinkUp,
    /// A channel closed or failed.
    LinkDown {
        /// For the log.
        reason: String,
    },
    /// A control message came.
    Msg(Msg),
    /// The packet path, the operator or a limit wants a checkpoint.
    CheckpointWanted,
    /// Few pages are left to send; the first checkpoint can be taken.
    SyncReady,
    /// The capture is made and the guest runs on.
    Captured {
        /// The epoch it ended.
        epoch: u64,
    },
    /// The whole checkpoint went to the link.
    Sent {
        /// Its epoch.
        epoch: u64,
    },
    /// Capture or transfer failed before the stage was whole.
    CheckpointFailed {
        /// Its epoch.
        epoch: u64,
        /// For the log and the peer.
        reason: String,
    },
    /// The arbiter answered the open question.
    Arbiter(Reply),
    /// The process or host stood still; the shell has muted itself (rule 18).
    ClockGap,
    /// The guest powered off, or the operator stops the VM (rule 20).
    ShutDown,
}

/// Where a primary is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrimaryState {
    /// Speaks alone, unprotected.
    Alone,
    /// A secondary receives the state.
    Syncing,
    /// The first checkpoint is on its way.
    FirstCheckpoint,
    /// The arbiter is asked to note the pair.
    Pairing,
    /// Protected.
    Paired,
    /// The secondary is lost; the arbiter is asked for the right to go alone.
    Deciding,
    /// The secondary is lost and the policy forbids to go alone (rule 19).
    Blocked,
    /// The VM was shut down; the arbiter and the secondary are told.
    ShuttingDown,
    /// Over.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Waits for `SvmStopped`.
    Stopping,
    /// Waits for `Captured`.
    Capturing,
    /// Waits for `Sent`.
    Sending,
    /// Waits for `Committed`.
    Committing,
}

#[derive(Debug)]
struct Checkpoint {
    epoch: u64,
    step: Step,
    since_us: u64,
    /// What the secondary said about it before our own shell reported the capture.
    verdict: Option<Result<(), String>>,
}

#[derive(Debug)]
struct Peer {
    /// 0 until its hello.
    session: u64,
    /// Negotiated at the hello (rule 22).
    version: u16,
    /// Generation of our welcome: older messages are of another link.
    welcomed: u64,
    heard_us: u64,
    heartbeat_due_us: u64,
}

/// The primary's core.
#[derive(Debug)]
pub struct Primary {
    host: String,
    timing: Timing,
    block_alone: bool,
    geometry: Geometry,
    record: Record,
    state: PrimaryState,
    peer: Option<Peer>,
    epoch: u64,
    checkpoint: Option<Checkpoint>,
    aborts: u32,
    periodic_due_us: u64,
    /// A request came that the checkpoint in flight may not cover.
    wanted: bool,
    question: Option<Cas>,
    retry_us: Option<u64>,
    unconfirmed: bool,
    /// The open question was asked before the clock gap: its answer may be older than the gap.
    stale_question: bool,
    was_paired: bool,
    shutdown_due_us: Option<u64>,
    actions: VecDeque<Action>,
}

impl Primary {
    /// A primary that holds `record` (standing alone), in `epoch`.
    /// `block_alone`: the policy `alone = "block"` of rule 19.
    pub fn new(
        host: String,
        timing: Timing,
        block_alone: bool,
        geometry: Geometry,
        record: Record,
        epoch: u64,
    ) -> Self {
        Self {
            host,
            timing,
            block_alone,
            geometry,
            record,
            state: PrimaryState::Alone,
            peer: None,
            epoch,
            checkpoint: None,
            aborts: 0,
            periodic_due_us: u64::MAX,
            wanted: false,
            question: None,
            retry_us: None,
            unconfirmed: false,
            stale_question: false,
            was_paired: false,
            shutdown_due_us: None,
            actions: VecDeque::new(),
        }
    }

    /// Where it is.
    pub fn state(&self) -> PrimaryState {
        self.state
    }

    /// The arbiter's record as last confirmed.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The epoch the PVM is in.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Takes an event.
    pub fn handle(&mut self, now_us: u64, event: PrimaryEvent) {
        if self.state == PrimaryState::Ended {
            return;
        }
        match event {
            PrimaryEvent::LinkUp => self.link_up(now_us),
            PrimaryEvent::LinkDown { .. } => self.peer_lost(),
            PrimaryEvent::Msg(msg) => self.message(now_us, msg),
            PrimaryEvent::CheckpointWanted => self.checkpoint_wanted(now_us),
            PrimaryEvent::SyncReady => self.sync_ready(now_us),
            PrimaryEvent::Captured { epoch } => self.captured(now_us, epoch),
            PrimaryEvent::Sent { epoch } => {
                self.step(now_us, epoch, Step::Sending, Step::Committing);
            }
            PrimaryEvent::CheckpointFailed { epoch, reason } => {
                self.checkpoint_failed(now_us, epoch, reason);
            }
            PrimaryEvent::Arbiter(reply) => self.arbiter(now_us, reply),
            PrimaryEvent::ClockGap => self.clock_gap(),
            PrimaryEvent::ShutDown => self.shut_down(now_us),
        }
    }

    /// The next instant at which [`Self::handle_timeout`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        [
            self.retry_us,
            self.shutdown_due_us,
            self.peer.as_ref().map(|p| match p.session {
                0 => p.heard_us + self.timing.step_timeout_us,
                _ => p
                    .heartbeat_due_us
                    .min(p.heard_us + self.timing.detection_us()),
            }),
            self.checkpoint
                .as_ref()
                .map(|c| c.since_us + self.timing.step_timeout_us),
            (self.state == PrimaryState::Paired && self.checkpoint.is_none())
                .then_some(self.periodic_due_us),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now_us: u64) {
        if self.retry_us.is_some_and(|at| at <= now_us) {
            self.retry_us = None;
            self.stale_question = false;
            if let Some(cas) = self.question.clone() {
                self.act(Action::Arbiter(cas));
            }
        }
        if self.shutdown_due_us.is_some_and(|at| at <= now_us) {
            self.shutdown_due(now_us);
        }
        if self.state == PrimaryState::Ended {
            return;
        }
        self.heartbeat(now_us);
        let late = |c: &Checkpoint| c.since_us + self.timing.step_timeout_us <= now_us;
        if self.checkpoint.as_ref().is_some_and(late) {
            self.drop_link("a step of the checkpoint took too long");
        }
        if self.state == PrimaryState::Paired && self.periodic_due_us <= now_us {
            self.begin_checkpoint(now_us);
        }
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn send(&mut self, msg: Msg) {
        self.act(Action::Send(msg));
    }

    // ---- link and pairing ----

    fn link_up(&mut self, now_us: u64) {
        let free = matches!(self.state, PrimaryState::Alone | PrimaryState::Blocked);
        if !free || self.peer.is_some() {
            self.act(Action::CloseLink {
                reason: "this host has a secondary".to_string(),
            });
            return;
        }
        let heartbeat_due_us = now_us + self.timing.heartbeat_us;
        self.peer = Some(Peer {
            session: 0,
            version: VERSION_MAX,
            welcomed: 0,
            heard_us: now_us,
            heartbeat_due_us,
        });
    }

    fn hello(&mut self, now_us: u64, versions: (u16, u16), session: u64, geometry: &Geometry) {
        let refusal = if versions.1 < VERSION_MIN || VERSION_MAX < versions.0 {
            Some(format!(
                "link versions {}..{} of the secondary, {VERSION_MIN}..{VERSION_MAX} of the primary: update one",
                versions.0, versions.1
            ))
        } else {
            difference(&self.geometry, geometry)
        };
        if let Some(reason) = refusal {
            self.send(Msg::Refuse {
                reason: reason.clone(),
            });
            self.peer = None;
            self.act(Action::CloseLink { reason });
            return;
        }
        let generation = self.record.generation;
        if let Some(peer) = &mut self.peer {
            *peer = Peer {
                session,
                version: VERSION_MAX.min(versions.1),
                welcomed: generation,
                ..*peer
            };
        }
        if self.state == PrimaryState::Blocked {
            // The pair of the lost session must not be able to win any more before another one begins.
            self.ask(Standing::Alone);
            return;
        }
        self.welcome(now_us);
    }

    fn welcome(&mut self, now_us: u64) {
        let generation = self.record.generation;
        let Some(peer) = &mut self.peer else { return };
        peer.welcomed = generation;
        peer.heard_us = now_us;
        let version = peer.version;
        self.send(Msg::Welcome {
            version,
            generation,
        });
        self.state = PrimaryState::Syncing;
        self.aborts = 0;
        self.act(Action::StartSync);
    }

    fn sync_ready(&mut self, now_us: u64) {
        if self.state != PrimaryState::Syncing {
            return;
        }
        self.state = PrimaryState::FirstCheckpoint;
        self.checkpoint = Some(Checkpoint {
            epoch: self.epoch,
            step: Step::Capturing,
            since_us: now_us,
            verdict: None,
        });
        let epoch = self.epoch;
        self.act(Action::Capture {
            epoch,
            first: true,
            svm_dirty: Vec::new(),
        });
    }

    fn message(&mut self, now_us: u64, msg: Msg) {
        let Some(peer) = &mut self.peer else { return };
        if let Msg::Hello {
            min,
            max,
            session,
            geometry,
        } = msg
        {
            if peer.session == 0 {
                peer.heard_us = now_us;
                self.hello(now_us, (min, max), session, &geometry);
            }
            return;
        }
        if peer.session == 0 || msg.generation().is_some_and(|g| g < peer.welcomed) {
            return;
        }
        peer.heard_us = now_us;
        match msg {
            Msg::Heartbeat {
                generation,
                sent_us,
            } => self.send(Msg::Echo {
                generation,
                sent_us,
            }),
            Msg::Echo { sent_us, .. } if self.state == PrimaryState::Paired => {
                // The clock in the echo is our own; a peer that invents one must not stretch the lease.
                let until_us = sent_us.min(now_us) + self.timing.lease_us();
                self.act(Action::Lease { until_us });
            }
            Msg::SvmStopped { epoch, dirty, .. } => self.svm_stopped(now_us, epoch, dirty),
            Msg::Committed { epoch, .. } => self.committed(now_us, epoch),
            Msg::Aborted { epoch, reason, .. } => self.aborted(now_us, epoch, &reason),
            Msg::OffAck { .. } if self.state == PrimaryState::ShuttingDown => {
                self.end(Outcome::Off);
            }
            Msg::Refuse { .. } => self.drop_link("the secondary refused"),
            _ => {}
        }
    }

    fn heartbeat(&mut self, now_us: u64) {
        let timing = self.timing;
        let generation = self.record.generation;
        let Some(peer) = &mut self.peer else { return };
        if peer.session == 0 {
            if peer.heard_us + timing.step_timeout_us <= now_us {
                self.drop_link("connected, but no hello");
            }
            return;
        }
        if peer.heard_us + timing.detection_us() <= now_us {
            self.drop_link("no heartbeat from the secondary");
        } else if peer.heartbeat_due_us <= now_us {
            peer.heartbeat_due_us = now_us + timing.heartbeat_us;
            self.send(Msg::Heartbeat {
                generation,
                sent_us: now_us,
            });
        }
    }

    fn drop_link(&mut self, reason: &str) {
        self.act(Action::CloseLink {
            reason: reason.to_string(),
        });
        self.peer_lost();
    }

    fn peer_lost(&mut self) {
        if self.peer.take().is_none() {
            return;
        }
        self.wanted = false;
        if let Some(checkpoint) = self.checkpoint.take() {
            self.act(Action::Abort {
                epoch: checkpoint.epoch,
            });
        }
        if self.was_paired {
            // From here on the secondary may be the VM at any moment.
            self.act(Action::Lease { until_us: 0 });
        }
        match self.state {
            // Never paired under this generation: we hold it alone already.
            PrimaryState::Syncing | PrimaryState::FirstCheckpoint => self.gone_alone(),
            PrimaryState::Pairing => {
                // Committed by the secondary, but no pair came of it.
                let epoch = self.epoch - 1;
                self.act(Action::Abort { epoch });
                self.state = PrimaryState::Deciding;
            }
            PrimaryState::Paired if self.block_alone => self.state = PrimaryState::Blocked,
            PrimaryState::Paired => {
                self.state = PrimaryState::Deciding;
                self.ask(Standing::Alone);
            }
            // `Blocked` with a question open about a new secondary: the answer finds no peer.
            _ => {}
        }
    }

    fn gone_alone(&mut self) {
        if self.block_alone && self.was_paired {
            self.state = PrimaryState::Blocked;
            return;
        }
        self.state = PrimaryState::Alone;
        self.act(Action::GoAlone);
    }

    // ---- checkpoints ----

    fn checkpoint_wanted(&mut self, now_us: u64) {
        // Before the capture a request is coalesced with the checkpoint in flight (rule 14); later the
        // output it is about can be of the next epoch, and the path asks only once an epoch.
        let covered = self
            .checkpoint
            .as_ref()
            .is_some_and(|c| c.step == Step::Stopping);
        let pairs = matches!(
            self.state,
            PrimaryState::FirstCheckpoint | PrimaryState::Pairing | PrimaryState::Paired
        );
        self.wanted |= pairs && !covered;
        self.begin_checkpoint(now_us);
    }

    fn begin_checkpoint(&mut self, now_us: u64) {
        if self.state != PrimaryState::Paired || self.checkpoint.is_some() {
            return;
        }
        self.wanted = false;
        let (generation, epoch) = (self.record.generation, self.epoch);
        self.checkpoint = Some(Checkpoint {
            epoch,
            step: Step::Stopping,
            since_us: now_us,
            verdict: None,
        });
        self.send(Msg::StopSvm { generation, epoch });
    }

    fn svm_stopped(&mut self, now_us: u64, epoch: u64, svm_dirty: Vec<u8>) {
        if self.step(now_us, epoch, Step::Stopping, Step::Capturing) {
            self.act(Action::Capture {
                epoch,
                first: false,
                svm_dirty,
            });
        }
    }

    fn captured(&mut self, now_us: u64, epoch: u64) {
        // The cut was made whatever became of the checkpoint meanwhile.
        if epoch == self.epoch {
            self.epoch += 1;
        }
        if !self.step(now_us, epoch, Step::Capturing, Step::Sending) {
            return;
        }
        match self.checkpoint.as_mut().and_then(|c| c.verdict.take()) {
            Some(Ok(())) => self.committed(now_us, epoch),
            Some(Err(reason)) => self.aborted(now_us, epoch, &reason),
            None => {}
        }
    }

    /// A verdict that overtook the report of the capture waits for it: the epoch counts from there.
    fn is_early(&mut self, epoch: u64, verdict: Result<(), String>) -> bool {
        match &mut self.checkpoint {
            Some(c) if c.epoch == epoch && c.step == Step::Capturing => {
                c.verdict = Some(verdict);
                true
            }
            _ => false,
        }
    }

    fn step(&mut self, now_us: u64, epoch: u64, from: Step, to: Step) -> bool {
        match &mut self.checkpoint {
            Some(c) if c.epoch == epoch && c.step == from => {
                (c.step, c.since_us) = (to, now_us);
                true
            }
            _ => false,
        }
    }

    fn committed(&mut self, now_us: u64, epoch: u64) {
        if self.is_early(epoch, Ok(())) {
            return;
        }
        // The commit can overtake our own `Sent`.
        let stage_sent =
            |c: &Checkpoint| c.epoch == epoch && matches!(c.step, Step::Sending | Step::Committing);
        if !self.checkpoint.as_ref().is_some_and(stage_sent) {
            return;
        }
        self.checkpoint = None;
        self.aborts = 0;
        if self.state == PrimaryState::FirstCheckpoint {
            self.state = PrimaryState::Pairing;
            let session = self.session();
            self.ask(Standing::Paired { session });
            return;
        }
        self.committed_to(now_us, epoch);
    }

    fn committed_to(&mut self, now_us: u64, epoch: u64) {
        self.set_periodic(now_us);
        self.act(Action::Commit { epoch });
        if self.wanted {
            self.begin_checkpoint(now_us);
        }
    }

    fn set_periodic(&mut self, now_us: u64) {
        self.periodic_due_us = match self.timing.checkpoint_interval_us {
            0 => u64::MAX,
            interval => now_us + interval,
        };
    }

    fn aborted(&mut self, now_us: u64, epoch: u64, reason: &str) {
        if self.is_early(epoch, Err(reason.to_string())) {
            return;
        }
        if self.checkpoint.as_ref().is_some_and(|c| c.epoch == epoch) {
            self.abort(now_us, epoch, reason);
        }
    }

    fn checkpoint_failed(&mut self, now_us: u64, epoch: u64, reason: String) {
        let stage_open =
            |c: &Checkpoint| c.epoch == epoch && matches!(c.step, Step::Capturing | Step::Sending);
        if self.checkpoint.as_ref().is_some_and(stage_open) {
            let generation = self.record.generation;
            self.send(Msg::Aborted {
                generation,
                epoch,
                reason: reason.clone(),
            });
            self.abort(now_us, epoch, &reason);
        }
    }

    fn abort(&mut self, now_us: u64, epoch: u64, reason: &str) {
        self.checkpoint = None;
        self.aborts += 1;
        self.act(Action::Abort { epoch });
        if self.state == PrimaryState::FirstCheckpoint || self.aborts >= ABORTS_MAX {
            self.drop_link(reason);
            return;
        }
        self.begin_checkpoint(now_us);
    }

    // ---- the arbiter ----

    fn ask(&mut self, standing: Standing) {
        let expect = Expect::Exactly(self.record.clone());
        self.put(Cas::Swap {
            expect,
            holder: self.host.clone(),
            standing,
        });
    }

    fn confirm(&mut self) {
        self.put(Cas::Confirm(self.record.clone()));
    }

    fn clock_gap(&mut self) {
        self.unconfirmed = true;
        // An answer that was on its way during the gap says nothing about what happened in it.
        self.stale_question = self.question.is_some() && self.retry_us.is_none();
        self.act(Action::Mute(true));
        self.act(Action::Lease { until_us: 0 });
        self.confirm();
    }

    fn put(&mut self, cas: Cas) {
        // An open question is answered first; `record_confirmed` then asks what the state still needs.
        if self.question.is_none() {
            self.question = Some(cas.clone());
            self.act(Action::Arbiter(cas));
        }
    }

    fn arbiter(&mut self, now_us: u64, reply: Reply) {
        let record = match reply {
            Reply::Unavailable(_) => {
                self.retry_us = Some(now_us + self.timing.arbiter_retry_us);
                return;
            }
            Reply::Won(record) | Reply::Lost(record) => record,
        };
        self.question = None;
        if record.holder != self.host || record.generation < self.record.generation {
            self.end(Outcome::Deposed { record });
            return;
        }
        // Also after an answer that got lost: what we asked for may have been done.
        self.record = record;
        if self.stale_question {
            self.stale_question = false;
            self.confirm();
            return;
        }
        if self.unconfirmed {
            self.unconfirmed = false;
            self.act(Action::Mute(false));
        }
        self.record_confirmed(now_us);
    }

    /// The record is ours as it stands; go on from there.
    fn record_confirmed(&mut self, now_us: u64) {
        match (self.state, self.record.standing) {
            (PrimaryState::Pairing, Standing::Paired { .. }) => self.paired(now_us),
            (PrimaryState::Pairing, _) => {
                let session = self.session();
                self.ask(Standing::Paired { session });
            }
            (PrimaryState::Deciding, Standing::Alone) => self.gone_alone(),
            (PrimaryState::Deciding, _) => self.ask(Standing::Alone),
            // Nobody waits at a blocked primary, or the hello will ask.
            (PrimaryState::Blocked, _) if self.session() == 0 => {}
            (PrimaryState::Blocked, Standing::Alone) => self.welcome(now_us),
            (PrimaryState::Blocked, _) => self.ask(Standing::Alone),
            (PrimaryState::ShuttingDown, Standing::Off) => self.tell_off(now_us),
            (PrimaryState::ShuttingDown, _) => self.ask(Standing::Off),
            _ => {}
        }
    }

    fn paired(&mut self, now_us: u64) {
        self.state = PrimaryState::Paired;
        self.was_paired = true;
        let generation = self.record.generation;
        self.send(Msg::Paired { generation });
        // The first checkpoint ended the epoch before the present one.
        self.committed_to(now_us, self.epoch - 1);
    }

    /// The peer's session, 0 without one.
    fn session(&self) -> u64 {
        self.peer.as_ref().map_or(0, |p| p.session)
    }

    // ---- the end ----

    fn shut_down(&mut self, now_us: u64) {
        if self.state == PrimaryState::ShuttingDown {
            return;
        }
        self.state = PrimaryState::ShuttingDown;
        self.shutdown_due_us = Some(now_us + self.timing.step_timeout_us);
        self.ask(Standing::Off);
    }

    /// Either the arbiter or the secondary must know before this host goes: a secondary that knows nothing
    /// would resurrect the VM (rule 20).
    fn shutdown_due(&mut self, now_us: u64) {
        let pairing = matches!(
            self.question,
            Some(Cas::Swap {
                standing: Standing::Paired { .. },
                ..
            })
        );
        let may_be_paired = pairing || matches!(self.record.standing, Standing::Paired { .. });
        if !may_be_paired {
            self.end(Outcome::Off);
        } else if self.session() != 0 {
            self.shutdown_due_us = Some(now_us + self.timing.step_timeout_us);
            let generation = self.record.generation;
            self.send(Msg::Off { generation });
        } else {
            self.shutdown_due_us = None; // the arbiter's answer ends it
        }
    }

    fn tell_off(&mut self, now_us: u64) {
        if self.session() == 0 {
            self.end(Outcome::Off);
            return;
        }
        let generation = self.record.generation;
        self.shutdown_due_us = Some(now_us + self.timing.detection_us());
        self.send(Msg::Off { generation });
    }

    fn end(&mut self, outcome: Outcome) {
        self.state = PrimaryState::Ended;
        self.act(Action::Mute(true));
        self.act(Action::Stop(outcome));
    }
}

fn difference(ours: &Geometry, theirs: &Geometry) -> Option<String> {
    for (name, value) in ours {
        match theirs.iter().find(|(n, _)| n == name) {
            Some((_, other)) if other == value => {}
            Some((_, other)) => {
                return Some(format!(
                    "{name} is {value} on the primary and {other} on the secondary: make them equal"
                ));
            }
            None => return Some(format!("the secondary does not name its {name}: update it")),
        }
    }
    None
}

#[cfg(test)]
mod tests;
