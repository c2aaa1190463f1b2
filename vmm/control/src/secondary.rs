//! The secondary's state machine: joining, checkpoints, takeover.
//!
//! Invariants: a stage that is whole and accepted is applied, come what may (rule 13); before that point a takeover
//! continues the old SVM (rule 14); nothing is taken over without the arbiter's word (rule 18).

mod takeover;

use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::farewell::NO_EPOCH;
use crate::{Action, Counters, Geometry, HOLDER, Msg, Notice, Outcome, Reply};
use crate::{Step, Timing, VERSION_ABORT_ANSWERED, VERSION_MAX, VERSION_MIN};

/// What happened on the secondary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecondaryEvent {
    /// All channels to the primary are connected.
    LinkUp,
    /// A channel closed or failed.
    LinkDown {
        /// For the log.
        reason: String,
    },
    /// A control message came.
    Msg(Msg),
    /// The SVM stands still and its output is on the link.
    SvmStopped {
        /// The epoch asked for.
        epoch: u64,
        /// Pages it dirtied since the last commit, a little-endian bitmap.
        dirty: Vec<u8>,
    },
    /// A whole stage was received and everything that can be refused was accepted.
    Staged {
        /// Its epoch.
        epoch: u64,
    },
    /// The stage is damaged or refused.
    StageFailed {
        /// Its epoch.
        epoch: u64,
        /// In words.
        reason: String,
    },
    /// The stage is whole, but this host cannot have such a state: it will refuse the next one as well (rule 22).
    Unfit {
        /// Its epoch.
        epoch: u64,
        /// In words.
        reason: String,
    },
    /// The streams of pages broke, and others are being opened: nothing comes of a checkpoint that is under way.
    PagesLost {
        /// In words.
        reason: String,
    },
    /// The page channel is of no use any more, and no other one is wanted; all else is.
    PagesGone {
        /// In words.
        reason: String,
    },
    /// The commit is applied, the SVM runs from it.
    Applied {
        /// Its epoch.
        epoch: u64,
    },
    /// The commit could not be applied.
    ApplyFailed {
        /// In words.
        reason: String,
    },
    /// The arbiter answered the open question.
    Arbiter(Reply),
}

/// Where a secondary is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecondaryState {
    /// Not connected or not yet welcome.
    Joining,
    /// Receives the first state.
    Syncing,
    /// Holds a committed state and follows.
    Standby,
    /// The primary is lost; waits for the arbiter, or for the apply that must end first.
    TakingOver,
    /// It is the VM now; a [`crate::Primary`] goes on from here.
    TookOver,
    /// Over.
    Ended,
}

/// A checkpoint as the primary announced it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Order {
    epoch: u64,
    /// The SVM does not run after the commit (Remus).
    halt: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The SVM runs, was never started, or stands still at a commit (Remus).
    Resting,
    /// The shell stops the SVM.
    Stopping(Order),
    /// Stopped; the stage fills.
    Staging(Order),
    /// Past the commit point.
    Applying(Order),
}

/// The secondary's core.
#[derive(Debug)]
pub struct Secondary {
    host: String,
    timing: Timing,
    session: u64,
    geometry: Geometry,
    ahead_mib: u32,
    state: SecondaryState,
    phase: Phase,
    /// When it began.
    phase_since_us: u64,
    /// The SVM stands still at the commit of this epoch: it has dirtied nothing since.
    halted: Option<u64>,
    /// The next checkpoint was announced while the last one is applied.
    next: Option<Order>,
    /// What becomes of the SVM after the first commit.
    first_halt: bool,
    /// Negotiated with the primary (rule 22).
    version: u16,
    counters: Counters,
    generation: u64,
    /// Of the last checkpoint that began to come in; 0: none did.
    begun_epoch: u64,
    connected: bool,
    heard_us: u64,
    heartbeat_due_us: u64,
    question_open: bool,
    retry_us: Option<u64>,
    /// The link is given up though the primary lives: until then it may end it and ask the arbiter.
    farewell_us: Option<u64>,
    won: Option<u64>,
    actions: VecDeque<Action>,
}

impl Secondary {
    /// A secondary that will join. `session` must be fresh (random): the arbiter tells pairs apart by it.
    pub fn new(host: String, timing: Timing, session: u64, geometry: Geometry) -> Self {
        Self {
            host,
            timing,
            session,
            geometry,
            ahead_mib: 0,
            state: SecondaryState::Joining,
            phase: Phase::Resting,
            phase_since_us: 0,
            halted: None,
            next: None,
            first_halt: false,
            version: VERSION_MIN,
            counters: Counters::default(),
            generation: 0,
            begun_epoch: 0,
            connected: false,
            heard_us: 0,
            heartbeat_due_us: u64::MAX,
            question_open: false,
            retry_us: None,
            farewell_us: None,
            won: None,
            actions: VecDeque::new(),
        }
    }

    /// The same with memory for pages that come ahead of a checkpoint.
    #[must_use]
    pub fn keeping_ahead(mut self, ahead_mib: u32) -> Self {
        self.ahead_mib = ahead_mib;
        self
    }

    /// The last checkpoint that began to come in is that of `epoch`; the primary hears it with the next answer to a heartbeat.
    pub fn note_begun(&mut self, epoch: u64) {
        self.begun_epoch = self.begun_epoch.max(epoch);
    }

    /// Where it is.
    pub fn state(&self) -> SecondaryState {
        self.state
    }

    /// The protocol version of the link, as negotiated (rule 22).
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The generation it was last told.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Whether the SVM stands still between checkpoints (Remus mode).
    pub fn is_halted(&self) -> bool {
        self.halted.is_some()
    }

    /// The step that the checkpoint in flight is in.
    pub fn step(&self) -> Option<Step> {
        match self.phase {
            Phase::Resting => None,
            Phase::Stopping(_) => Some(Step::Stop),
            Phase::Staging(_) => Some(Step::Stage),
            Phase::Applying(_) => Some(Step::Apply),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Takes an event.
    pub fn handle(&mut self, now_us: u64, event: SecondaryEvent) {
        if matches!(self.state, SecondaryState::Ended | SecondaryState::TookOver) {
            return;
        }
        match event {
            SecondaryEvent::LinkUp => self.link_up(now_us),
            SecondaryEvent::LinkDown { .. } => self.peer_lost(now_us),
            SecondaryEvent::Msg(msg) => self.message(now_us, msg),
            SecondaryEvent::SvmStopped { epoch, dirty } => self.svm_stopped(now_us, epoch, dirty),
            SecondaryEvent::Staged { epoch } => self.staged(now_us, epoch),
            SecondaryEvent::StageFailed { epoch, reason } => self.stage_failed(epoch, &reason),
            SecondaryEvent::Unfit { epoch, reason } => self.unfit(epoch, reason),
            SecondaryEvent::PagesLost { reason } => self.pages_lost(now_us, &reason),
            SecondaryEvent::PagesGone { reason } => self.pages_gone(now_us, &reason),
            SecondaryEvent::Applied { epoch } => self.applied(now_us, epoch),
            SecondaryEvent::ApplyFailed { reason } => self.end(Outcome::Failed { reason }),
            SecondaryEvent::Arbiter(reply) => self.arbiter(now_us, reply),
        }
    }

    /// When the primary was heard last: a takeover is proposed [`Timing::detection_us`] after that.
    pub fn heard_us(&self) -> u64 {
        self.heard_us
    }

    /// The next instant at which [`Self::handle_timeout`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        let link = self
            .connected
            .then_some(self.silence_at_us().min(self.heartbeat_due_us));
        let step = self.step_deadline().map(|(at_us, _, _)| at_us);
        let farewell = self.farewell_us.filter(|_| self.connected);
        [self.retry_us, link, step, farewell]
            .into_iter()
            .flatten()
            .min()
    }

    /// When a primary that says nothing counts as lost. What has no state to take over with can wait.
    fn silence_at_us(&self) -> u64 {
        let has_state = match self.state {
            SecondaryState::Joining | SecondaryState::Syncing => {
                matches!(self.phase, Phase::Applying(_))
            }
            _ => true,
        };
        self.heard_us
            + match has_state {
                true => self.timing.detection_us(),
                false => self.timing.sync_silence_us(),
            }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now_us: u64) {
        if self.retry_us.is_some_and(|at| at <= now_us) {
            self.retry_us = None;
            self.propose();
        }
        if let Some((_, step, epoch)) = self.step_deadline().filter(|(at_us, ..)| *at_us <= now_us)
        {
            self.step_timed_out(step, epoch);
        }
        if !self.connected {
            return;
        }
        if self.silence_at_us() <= now_us {
            self.close_link(now_us, "no heartbeat from the primary");
        } else if self.farewell_us.is_some_and(|at| at <= now_us) {
            self.close_link(now_us, "given up, but the primary does not end it");
        } else if self.heartbeat_due_us <= now_us {
            self.heartbeat_due_us = now_us + self.timing.heartbeat_us;
            let generation = self.generation;
            self.send(Msg::Heartbeat {
                generation,
                sent_us: now_us,
            });
        }
    }

    fn close_link(&mut self, now_us: u64, reason: &str) {
        self.act(Action::CloseLink {
            reason: reason.to_string(),
        });
        self.peer_lost(now_us);
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn send(&mut self, msg: Msg) {
        self.act(Action::Send(msg));
    }

    fn link_up(&mut self, now_us: u64) {
        if self.state != SecondaryState::Joining || self.connected {
            return;
        }
        self.connected = true;
        self.heard_us = now_us;
        let mut geometry = self.geometry.clone();
        geometry.push((HOLDER.to_string(), self.host.clone()));
        self.send(Msg::Hello {
            min: VERSION_MIN,
            max: VERSION_MAX,
            session: self.session,
            geometry,
            ahead_mib: self.ahead_mib,
        });
    }

    fn message(&mut self, now_us: u64, msg: Msg) {
        if !self.connected || msg.generation().is_some_and(|g| g < self.generation) {
            return;
        }
        self.heard_us = now_us;
        match msg {
            Msg::Welcome {
                generation,
                version,
                halt,
            } if self.state == SecondaryState::Joining => {
                self.state = SecondaryState::Syncing;
                (self.version, self.first_halt) = (version, halt);
                self.generation = generation;
                self.heartbeat_due_us = now_us + self.timing.heartbeat_us;
            }
            Msg::Refuse { reason } => self.end(Outcome::Refused { reason }),
            // The lease that an answer gives must have ended when this host may ask the arbiter (rule 18).
            Msg::Heartbeat { .. } if self.farewell_us.is_some() => {}
            Msg::Heartbeat {
                generation,
                sent_us,
            } => {
                self.send(Msg::Echo {
                    generation,
                    sent_us,
                    begun_epoch: Some(self.begun_epoch),
                });
                // Says as much as a heartbeat of ours, which would cost both hosts another wake-up.
                self.heartbeat_due_us = now_us + self.timing.heartbeat_us / 2 * 3;
            }
            Msg::Paired { generation } => self.generation = generation,
            Msg::StopSvm { epoch, halt, .. } => self.stop_svm(now_us, Order { epoch, halt }),
            Msg::Aborted {
                epoch: NO_EPOCH, ..
            } => self.farewell_us = Some(now_us + self.timing.detection_us()),
            Msg::Aborted { epoch, .. } => self.aborted(epoch),
            Msg::Off { generation } => {
                self.send(Msg::OffAck { generation });
                self.end(Outcome::Off);
            }
            _ => {}
        }
    }

    fn enter(&mut self, now_us: u64, phase: Phase) {
        (self.phase, self.phase_since_us) = (phase, now_us);
    }

    fn stop_svm(&mut self, now_us: u64, order: Order) {
        if self.farewell_us.is_some() {
            return; // nothing would come of it
        }
        if let Phase::Applying(_) = self.phase {
            // The primary is ahead: our apply ends first, then the request is served.
            self.next = Some(order);
        } else if self.state == SecondaryState::Standby && self.phase == Phase::Resting {
            if self.halted.is_some() {
                self.enter(now_us, Phase::Staging(order));
                self.tell_stopped(order.epoch, Vec::new());
            } else {
                self.enter(now_us, Phase::Stopping(order));
                self.act(Action::StopSvm { epoch: order.epoch });
            }
        }
    }

    fn svm_stopped(&mut self, now_us: u64, epoch: u64, dirty: Vec<u8>) {
        if let Phase::Stopping(order) = self.phase
            && order.epoch == epoch
        {
            self.enter(now_us, Phase::Staging(order));
            self.tell_stopped(epoch, dirty);
        }
    }

    fn tell_stopped(&mut self, epoch: u64, dirty: Vec<u8>) {
        let generation = self.generation;
        self.send(Msg::SvmStopped {
            generation,
            epoch,
            dirty,
        });
    }

    /// The primary wants a checkpoint to be off. Past the commit point it has our `Committed` already.
    fn aborted(&mut self, epoch: u64) {
        let announced = self.next.take_if(|order| order.epoch == epoch).is_some();
        if announced || self.leave_checkpoint(epoch) {
            self.tell_aborted(epoch, "as asked", VERSION_ABORT_ANSWERED);
        }
    }

    /// Before the commit point: back to where the SVM was (rule 14).
    fn leave_checkpoint(&mut self, epoch: u64) -> bool {
        let open = matches!(self.phase, Phase::Stopping(o) | Phase::Staging(o) if o.epoch == epoch);
        if open {
            self.phase = Phase::Resting;
            self.counters.aborts += 1;
            if self.halted.is_none() {
                self.act(Action::Abort { epoch });
            }
        }
        open
    }

    /// To a primary of that version or a newer one.
    fn tell_aborted(&mut self, epoch: u64, reason: &str, version: u16) {
        if self.connected && self.version >= version {
            let generation = self.generation;
            self.send(Msg::Aborted {
                generation,
                epoch,
                reason: reason.to_string(),
            });
        }
    }

    fn staged(&mut self, now_us: u64, epoch: u64) {
        let order = match self.phase {
            Phase::Staging(order) if order.epoch == epoch => order,
            Phase::Resting if self.state == SecondaryState::Syncing => Order {
                epoch,
                halt: self.first_halt,
            },
            // It was aborted while the rest of it was on its way.
            _ => {
                self.counters.discarded += 1;
                return self.act(Action::Discard { epoch });
            }
        };
        self.enter(now_us, Phase::Applying(order));
        let generation = self.generation;
        if self.connected {
            self.send(Msg::Committed { generation, epoch });
        }
        let halt = order.halt;
        self.act(Action::Apply { epoch, halt });
    }

    fn stage_failed(&mut self, epoch: u64, reason: &str) {
        if self.state == SecondaryState::Syncing {
            self.tell_aborted(epoch, reason, VERSION_MIN);
            self.end(Outcome::NotSynced);
        } else if matches!(self.phase, Phase::Staging(order) if order.epoch == epoch) {
            self.tell_aborted(epoch, reason, VERSION_MIN);
            self.leave_checkpoint(epoch);
        }
    }

    /// Before the commit point there is nothing left to commit; what is past it goes forward (rule 13).
    fn pages_lost(&mut self, now_us: u64, reason: &str) {
        if self.state == SecondaryState::Syncing && !matches!(self.phase, Phase::Applying(_)) {
            self.pages_gone(now_us, reason);
        } else if let Phase::Stopping(order) | Phase::Staging(order) = self.phase {
            self.tell_aborted(order.epoch, reason, VERSION_MIN);
            self.leave_checkpoint(order.epoch);
        }
    }

    /// Who holds a state keeps it: should the primary die now, that one is as good as it ever was (rule 14). A primary that
    /// lives parts with a secondary that none of its states fit, says farewell, and asks the arbiter first.
    fn unfit(&mut self, epoch: u64, reason: String) {
        if self.state != SecondaryState::Syncing {
            return self.stage_failed(epoch, &reason);
        }
        self.send(Msg::Refuse {
            reason: reason.clone(),
        });
        self.end(Outcome::Refused { reason });
    }

    fn applied(&mut self, now_us: u64, epoch: u64) {
        let Phase::Applying(order) = self.phase else {
            return;
        };
        if order.epoch != epoch {
            return;
        }
        self.phase = Phase::Resting;
        self.halted = order.halt.then_some(epoch);
        if self.state == SecondaryState::Syncing {
            self.state = SecondaryState::Standby;
        }
        let next = self.next.take();
        if self.state == SecondaryState::TakingOver {
            self.finish_takeover();
        } else if let Some(order) = next {
            self.stop_svm(now_us, order);
        }
    }

    /// Until when the present step may take, with the step and its epoch.
    fn step_deadline(&self) -> Option<(u64, Step, u64)> {
        let (step, order) = match self.phase {
            Phase::Resting => return None,
            Phase::Stopping(order) => (Step::Stop, order),
            Phase::Staging(order) => (Step::Stage, order),
            // Who takes over has nothing better than to wait for the end of the apply (rule 13).
            Phase::Applying(_) if self.state == SecondaryState::TakingOver => return None,
            Phase::Applying(order) => (Step::Apply, order),
        };
        let limit_us = self.timing.steps.of(step);
        Some((self.phase_since_us + limit_us, step, order.epoch))
    }

    fn step_timed_out(&mut self, step: Step, epoch: u64) {
        self.counters.timeouts[step.index()] += 1;
        let limit_us = self.timing.steps.of(step);
        let notice = Notice::StepTimedOut {
            step,
            epoch,
            limit_us,
        };
        let reason = notice.to_string();
        self.act(Action::Tell(notice));
        if step == Step::Apply {
            self.end(Outcome::Failed { reason });
            return;
        }
        // Our shell never came to an end, or the primary neither sends nor gives up: the SVM goes on.
        self.tell_aborted(epoch, &reason, VERSION_MIN);
        self.leave_checkpoint(epoch);
    }
}

#[cfg(test)]
mod tests;
