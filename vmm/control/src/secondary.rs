//! The secondary's state machine: joining, checkpoints, takeover.
//!
//! Invariants: a stage that is whole and accepted is applied, come what may (rule 13); before that point a takeover
//! continues the old SVM (rule 14); nothing is taken over without the arbiter's word (rule 18).

use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::{Action, Cas, Expect, Geometry, Msg, Outcome, Reply, Standing, Timing};
use crate::{VERSION_MAX, VERSION_MIN};

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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The SVM runs (or was never started).
    Running,
    /// The shell stops the SVM.
    Stopping(u64),
    /// Stopped; the stage fills.
    Staging(u64),
    /// Past the commit point.
    Applying(u64),
}

/// The secondary's core.
#[derive(Debug)]
pub struct Secondary {
    host: String,
    timing: Timing,
    session: u64,
    geometry: Geometry,
    state: SecondaryState,
    phase: Phase,
    generation: u64,
    connected: bool,
    heard_us: u64,
    heartbeat_due_us: u64,
    question_open: bool,
    retry_us: Option<u64>,
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
            state: SecondaryState::Joining,
            phase: Phase::Running,
            generation: 0,
            connected: false,
            heard_us: 0,
            heartbeat_due_us: u64::MAX,
            question_open: false,
            retry_us: None,
            won: None,
            actions: VecDeque::new(),
        }
    }

    /// Where it is.
    pub fn state(&self) -> SecondaryState {
        self.state
    }

    /// The generation it was last told.
    pub fn generation(&self) -> u64 {
        self.generation
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
            SecondaryEvent::LinkDown { .. } => self.peer_lost(),
            SecondaryEvent::Msg(msg) => self.message(now_us, msg),
            SecondaryEvent::SvmStopped { epoch, dirty } => self.svm_stopped(epoch, dirty),
            SecondaryEvent::Staged { epoch } => self.staged(epoch),
            SecondaryEvent::StageFailed { epoch, reason } => self.stage_failed(epoch, reason),
            SecondaryEvent::Applied { epoch } => self.applied(epoch),
            SecondaryEvent::ApplyFailed { reason } => self.end(Outcome::Failed { reason }),
            SecondaryEvent::Arbiter(reply) => self.arbiter(now_us, reply),
        }
    }

    /// The next instant at which [`Self::handle_timeout`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        let silence = self.heard_us + self.timing.detection_us();
        let link = self.connected.then_some(silence.min(self.heartbeat_due_us));
        [self.retry_us, link].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now_us: u64) {
        if self.retry_us.is_some_and(|at| at <= now_us) {
            self.retry_us = None;
            self.propose();
        }
        if !self.connected {
            return;
        }
        if self.heard_us + self.timing.detection_us() <= now_us {
            self.act(Action::CloseLink {
                reason: "no heartbeat from the primary".to_string(),
            });
            self.peer_lost();
        } else if self.heartbeat_due_us <= now_us {
            self.heartbeat_due_us = now_us + self.timing.heartbeat_us;
            let generation = self.generation;
            self.send(Msg::Heartbeat {
                generation,
                sent_us: now_us,
            });
        }
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
        self.send(Msg::Hello {
            min: VERSION_MIN,
            max: VERSION_MAX,
            session: self.session,
            geometry: self.geometry.clone(),
        });
    }

    fn message(&mut self, now_us: u64, msg: Msg) {
        if !self.connected || msg.generation().is_some_and(|g| g < self.generation) {
            return;
        }
        self.heard_us = now_us;
        match msg {
            Msg::Welcome { generation, .. } if self.state == SecondaryState::Joining => {
                self.state = SecondaryState::Syncing;
                self.generation = generation;
                self.heartbeat_due_us = now_us + self.timing.heartbeat_us;
            }
            Msg::Refuse { reason } => self.end(Outcome::Refused { reason }),
            Msg::Heartbeat {
                generation,
                sent_us,
            } => self.send(Msg::Echo {
                generation,
                sent_us,
            }),
            Msg::Paired { generation } => self.generation = generation,
            Msg::StopSvm { epoch, .. } => self.stop_svm(epoch),
            Msg::Aborted { epoch, .. } => self.aborted(epoch),
            Msg::Off { generation } => {
                self.send(Msg::OffAck { generation });
                self.end(Outcome::Off);
            }
            _ => {}
        }
    }

    fn stop_svm(&mut self, epoch: u64) {
        if self.state == SecondaryState::Standby && self.phase == Phase::Running {
            self.phase = Phase::Stopping(epoch);
            self.act(Action::StopSvm { epoch });
        } else if let Phase::Applying(_) = self.phase {
            // The primary is ahead: our apply ends first, then the request is served.
            self.phase = Phase::Applying(epoch);
        }
    }

    fn svm_stopped(&mut self, epoch: u64, dirty: Vec<u8>) {
        if self.phase != Phase::Stopping(epoch) {
            return;
        }
        self.phase = Phase::Staging(epoch);
        let generation = self.generation;
        self.send(Msg::SvmStopped {
            generation,
            epoch,
            dirty,
        });
    }

    fn aborted(&mut self, epoch: u64) {
        if matches!(self.phase, Phase::Stopping(e) | Phase::Staging(e) if e == epoch) {
            self.phase = Phase::Running;
            self.act(Action::Abort { epoch });
        }
    }

    fn staged(&mut self, epoch: u64) {
        let first = self.state == SecondaryState::Syncing && self.phase == Phase::Running;
        if !first && self.phase != Phase::Staging(epoch) {
            return;
        }
        self.phase = Phase::Applying(epoch);
        let generation = self.generation;
        if self.connected {
            self.send(Msg::Committed { generation, epoch });
        }
        self.act(Action::Apply { epoch });
    }

    fn stage_failed(&mut self, epoch: u64, reason: String) {
        if self.state == SecondaryState::Syncing {
            self.end(Outcome::NotSynced);
            return;
        }
        if self.phase == Phase::Staging(epoch) {
            self.phase = Phase::Running;
            let generation = self.generation;
            if self.connected {
                self.send(Msg::Aborted {
                    generation,
                    epoch,
                    reason,
                });
            }
            self.act(Action::Abort { epoch });
        }
    }

    fn applied(&mut self, applied: u64) {
        let Phase::Applying(epoch) = self.phase else {
            return;
        };
        self.phase = Phase::Running;
        if self.state == SecondaryState::Syncing {
            self.state = SecondaryState::Standby;
        }
        if self.state == SecondaryState::TakingOver {
            self.finish_takeover();
        } else if epoch != applied {
            self.stop_svm(epoch);
        }
    }

    fn peer_lost(&mut self) {
        self.connected = false;
        match self.state {
            SecondaryState::Joining => self.end(Outcome::NotSynced),
            // Past the commit point the state is whole; whether it counts the arbiter knows.
            SecondaryState::Syncing if !matches!(self.phase, Phase::Applying(_)) => {
                self.end(Outcome::NotSynced);
            }
            SecondaryState::Syncing | SecondaryState::Standby => {
                self.state = SecondaryState::TakingOver;
                self.propose();
            }
            _ => {}
        }
    }

    fn propose(&mut self) {
        if self.state != SecondaryState::TakingOver || self.question_open {
            return;
        }
        self.question_open = true;
        self.act(Action::Arbiter(Cas::Swap {
            expect: Expect::PairedWith {
                session: self.session,
            },
            holder: self.host.clone(),
            standing: Standing::Alone,
        }));
    }

    fn arbiter(&mut self, now_us: u64, reply: Reply) {
        self.question_open = false;
        match reply {
            Reply::Unavailable(_) => self.retry_us = Some(now_us + self.timing.arbiter_retry_us),
            Reply::Lost(record)
                if !(record.holder == self.host && record.generation > self.generation) =>
            {
                let outcome = match record.standing {
                    Standing::Off => Outcome::Off,
                    _ => Outcome::Deposed { record },
                };
                self.end(outcome);
            }
            // A lost answer's deed: nobody else writes our name.
            Reply::Won(record) | Reply::Lost(record) => {
                self.won = Some(record.generation);
                self.finish_takeover();
            }
        }
    }

    fn finish_takeover(&mut self) {
        let Some(generation) = self.won else { return };
        match self.phase {
            Phase::Applying(_) => return, // goes only forward: `Applied` comes back here
            Phase::Stopping(epoch) | Phase::Staging(epoch) => self.act(Action::Abort { epoch }),
            Phase::Running => {}
        }
        self.phase = Phase::Running;
        self.generation = generation;
        self.state = SecondaryState::TookOver;
        self.act(Action::TakeOver { generation });
    }

    fn end(&mut self, outcome: Outcome) {
        self.state = SecondaryState::Ended;
        self.act(Action::Stop(outcome));
    }
}

#[cfg(test)]
mod tests;
