//! The primary's state machine: who speaks, pairing, checkpoints, loss of the secondary.
//!
//! Invariants: at most one checkpoint is in flight (rule 7); after the stage was sent whole only the secondary
//! decides about it (rule 13); the role changes only on the arbiter's answer (rule 18), of which one question at
//! a time is open.
//!
//! Does not touch packets or pages: the shell does, as the actions say.

mod checkpoint;
mod roles;

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};

use crate::farewell::NO_EPOCH;
use crate::pace::Pacer;
use crate::storm::Switch;
use crate::{
    Action, Cas, Counters, Geometry, HOLDER, Mode, Msg, NOTHING, Outcome, Protection, Record, Reply,
};
use crate::{Notice, Standing, Timing, VERSION_MAX, VERSION_MIN};
use checkpoint::Checkpoint;

/// What an older peer has, but does not name (rule 22).
const LATER: [&str; 2] = ["host.frame_slots", "replication.hold_frames"];
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
    /// The page channel is of no use any more, and no other one is wanted; all else is.
    PagesGone {
        /// In words.
        reason: String,
    },
    /// A control message came.
    Msg(Msg),
    /// The packet path, the operator or a limit wants a checkpoint.
    CheckpointWanted,
    /// A round of the synchronisation went to the link; the core decides whether another follows.
    SyncRound {
        /// Pages sent in it.
        sent_pages: u64,
        /// Pages that the guest dirtied meanwhile.
        dirty_pages: u64,
        /// How long it took.
        took_us: u64,
    },
    /// What has come of the SVM's answers since the last such event (rule 16). Often, at least with each heartbeat.
    Answers {
        /// How many came, or were waited for in vain.
        answers: u64,
        /// How much later than the PVM's, all together; checkpoints left out.
        late_us: u64,
    },
    /// The packet path can hold no more output (true), or can again (rule 14).
    HoldFull(bool),
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
    /// Capture or transfer failed before the stage was whole. A capture that had cut the epoch reports `Captured`
    /// first.
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

#[derive(Debug)]
struct Peer {
    /// 0 until its hello.
    session: u64,
    /// Negotiated at the hello (rule 22).
    version: u16,
    /// Its memory for pages that come ahead of a checkpoint.
    ahead_mib: u32,
    /// The last checkpoint that began to come in there, if it says so.
    begun_epoch: Option<u64>,
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
    /// The last sign of progress of the synchronisation.
    sync_progress_us: u64,
    switch: Switch,
    pacer: Pacer,
    counters: Counters,
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
            sync_progress_us: 0,
            switch: Switch::new(Protection::DEFAULT),
            pacer: Pacer::new(),
            counters: Counters::default(),
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

    /// The same with another way of protection than [`Protection::DEFAULT`].
    #[must_use]
    pub fn protected_by(mut self, protection: Protection) -> Self {
        self.switch = Switch::new(protection);
        self
    }

    /// How output is protected now: by comparison, or by buffering (by the operator's wish or in a storm).
    pub fn mode(&self) -> Mode {
        match self.switch.buffers() {
            true => Mode::Remus,
            false => Mode::Colo,
        }
    }

    /// Share of the latest time that was spent in checkpoints because outputs differ, in percent.
    pub fn checkpoint_share_pct(&self, now_us: u64) -> u8 {
        self.switch.share_pct(now_us)
    }

    /// Memory that the secondary has for pages that come ahead of a checkpoint, in MiB.
    pub fn peer_ahead_mib(&self) -> u32 {
        self.peer.as_ref().map_or(0, |peer| peer.ahead_mib)
    }

    /// Share of time that the PVM's vCPUs may run, in percent.
    pub fn run_pct(&self) -> u8 {
        self.pacer.run_pct()
    }

    /// How much later the SVM's answers came lately than the PVM's, in microseconds, as far as the link does not explain it.
    pub fn lag_us(&self) -> u64 {
        self.pacer.lag.lag_us()
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
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

    /// The step that the checkpoint in flight is in.
    pub fn step(&self) -> Option<crate::Step> {
        self.checkpoint.as_ref().map(|c| c.step)
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
            PrimaryEvent::PagesGone { reason } => self.give_link_up(reason),
            PrimaryEvent::Msg(msg) => self.message(now_us, msg),
            PrimaryEvent::CheckpointWanted => self.checkpoint_wanted(now_us),
            PrimaryEvent::SyncRound {
                sent_pages,
                dirty_pages,
                took_us,
            } => self.sync_round(now_us, sent_pages, dirty_pages, took_us),
            PrimaryEvent::Answers { answers, late_us } => self.answers(now_us, answers, late_us),
            PrimaryEvent::HoldFull(is_full) => self.hold_full(is_full),
            PrimaryEvent::Captured { epoch } => self.captured(now_us, epoch),
            PrimaryEvent::Sent { epoch } => self.sent(now_us, epoch),
            PrimaryEvent::CheckpointFailed { epoch, reason } => {
                self.checkpoint_failed(now_us, epoch, &reason);
            }
            PrimaryEvent::Arbiter(reply) => self.arbiter(now_us, reply),
            PrimaryEvent::ClockGap => self.clock_gap(),
            PrimaryEvent::ShutDown => self.shut_down(now_us),
        }
    }

    /// The protocol version of the secondary there is, as negotiated (rule 22).
    pub fn peer_version(&self) -> u16 {
        self.peer.as_ref().map_or(VERSION_MIN, |peer| peer.version)
    }

    /// When the secondary there is was heard last; 0: there is none.
    pub fn heard_us(&self) -> u64 {
        self.peer.as_ref().map_or(0, |peer| peer.heard_us)
    }

    /// The next instant at which [`Self::handle_timeout`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        [
            self.retry_us,
            self.shutdown_due_us,
            self.peer.as_ref().map(|p| match p.session {
                0 => p.heard_us + self.timing.step_timeout_us,
                _ => p.heartbeat_due_us.min(p.heard_us + self.silence_us()),
            }),
            self.step_deadline(),
            self.relief_at_us(),
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
        if self.step_deadline().is_some_and(|at| at <= now_us) {
            self.step_timed_out(now_us);
        }
        self.relieve(now_us);
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
        if !self.pacer.may_join(now_us) {
            self.act(Action::CloseLink {
                reason: "the guest dirties memory faster than the link carries it; a secondary may try again \
                         in a while"
                    .to_string(),
            });
            return;
        }
        let heartbeat_due_us = now_us + self.timing.heartbeat_us;
        self.peer = Some(Peer {
            session: 0,
            version: VERSION_MAX,
            ahead_mib: 0,
            begun_epoch: None,
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
            same_name(&self.host, geometry).or_else(|| difference(&self.geometry, geometry))
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
        self.switch.start(now_us);
        self.send(Msg::Welcome {
            version,
            generation,
            halt: self.switch.buffers(),
        });
        self.state = PrimaryState::Syncing;
        self.sync_progress_us = now_us;
        self.aborts = 0;
        self.pacer.reset();
        self.tell_pace();
        self.act(Action::StartSync);
    }

    fn message(&mut self, now_us: u64, msg: Msg) {
        let Some(peer) = &mut self.peer else { return };
        if let Msg::Hello {
            min,
            max,
            session,
            geometry,
            ahead_mib,
        } = msg
        {
            if peer.session == 0 {
                peer.ahead_mib = ahead_mib;
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
                begun_epoch: None,
            }),
            Msg::Echo {
                sent_us,
                begun_epoch,
                ..
            } => {
                peer.begun_epoch = begun_epoch;
                self.begun(now_us);
                self.echo(now_us, sent_us);
            }
            Msg::SvmStopped { epoch, dirty, .. } => self.svm_stopped(now_us, epoch, dirty),
            Msg::Committed { epoch, .. } => self.verdict(now_us, epoch, Ok(())),
            Msg::Aborted {
                epoch: NO_EPOCH,
                reason,
                ..
            } => self.give_link_up(reason),
            Msg::Aborted { epoch, reason, .. } => self.verdict(now_us, epoch, Err(reason)),
            Msg::OffAck { .. } if self.state == PrimaryState::ShuttingDown => {
                self.end(Outcome::Off);
            }
            Msg::Refuse { reason } => {
                self.counters.refusals += 1;
                self.act(Action::Tell(Notice::Refused {
                    reason: reason.clone(),
                }));
                self.drop_link(&reason);
            }
            _ => {}
        }
    }

    fn echo(&mut self, now_us: u64, sent_us: u64) {
        if self.state != PrimaryState::Paired {
            return;
        }
        // The clock in the echo is our own; a peer that invents one must not stretch the lease.
        let sent_us = sent_us.min(now_us);
        self.pacer.lag.round_trip(now_us - sent_us);
        let until_us = sent_us + self.timing.lease_us();
        self.act(Action::Lease { until_us });
    }

    /// Silence of the secondary that loses it. As long as no output waits for it, there is time.
    fn silence_us(&self) -> u64 {
        match self.state {
            PrimaryState::Syncing => self.timing.sync_silence_us(),
            _ => self.timing.detection_us(),
        }
    }

    fn heartbeat(&mut self, now_us: u64) {
        let (timing, silence_us) = (self.timing, self.silence_us());
        let generation = self.record.generation;
        let Some(peer) = &mut self.peer else { return };
        if peer.session == 0 {
            if peer.heard_us + timing.step_timeout_us <= now_us {
                self.drop_link("connected, but no hello");
            }
            return;
        }
        if peer.heard_us + silence_us <= now_us {
            self.drop_link("no heartbeat from the secondary");
        } else if peer.heartbeat_due_us <= now_us {
            peer.heartbeat_due_us = now_us + timing.heartbeat_us;
            self.send(Msg::Heartbeat {
                generation,
                sent_us: now_us,
            });
        }
    }
}

/// Two hosts of one name would each take the other's record for its own (rule 18).
fn same_name(ours: &str, theirs: &Geometry) -> Option<String> {
    let is_ours = |(name, value): &(String, String)| name == HOLDER && value == ours;
    theirs.iter().any(is_ours).then(|| {
        format!("{HOLDER} makes {ours} the name of both hosts at the arbiter: give each its own")
    })
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
            None if value == NOTHING || LATER.contains(&name.as_str()) => {}
            None => return Some(format!("the secondary does not name its {name}: update it")),
        }
    }
    None
}

#[cfg(test)]
mod tests;
