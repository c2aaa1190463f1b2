//! The primary is lost or left: farewell, the question to the arbiter, the takeover.
//!
//! Invariants: nothing is taken over without the arbiter's word (rule 18); a primary that is known to live is asked about only
//! after it had the time to ask itself (rule 19); what is past the commit point goes forward first (rule 13).

use super::{Order, Phase, Secondary, SecondaryState};
use crate::farewell::farewell;
use crate::{Action, Cas, Expect, Outcome, Reply, Standing};

impl Secondary {
    /// The session cannot go on, which is no fault of the primary: it is told, and ends the link. Without a state there is
    /// nothing to wait for.
    pub(super) fn pages_gone(&mut self, now_us: u64, reason: &str) {
        if !self.connected {
            return;
        }
        self.send(farewell(self.generation, reason));
        let has_state = !matches!(
            self.state,
            SecondaryState::Joining | SecondaryState::Syncing
        );
        if !has_state && !matches!(self.phase, Phase::Applying(_)) {
            return self.end(Outcome::NotSynced);
        }
        self.farewell_us = Some(now_us + self.timing.detection_us());
        self.next = None;
        if let Phase::Stopping(order) | Phase::Staging(order) = self.phase {
            self.leave_checkpoint(order.epoch);
        }
    }

    pub(super) fn peer_lost(&mut self, now_us: u64) {
        self.connected = false;
        match self.state {
            SecondaryState::Joining => self.end(Outcome::NotSynced),
            // Past the commit point the state is whole; whether it counts the arbiter knows.
            SecondaryState::Syncing if !matches!(self.phase, Phase::Applying(_)) => {
                self.end(Outcome::NotSynced);
            }
            SecondaryState::Syncing | SecondaryState::Standby => {
                self.state = SecondaryState::TakingOver;
                // A primary that has said farewell lives.
                match self.farewell_us.take().filter(|&at| at > now_us) {
                    Some(at) => self.retry_us = Some(at),
                    None => self.propose(),
                }
            }
            _ => {}
        }
    }

    pub(super) fn propose(&mut self) {
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

    pub(super) fn arbiter(&mut self, now_us: u64, reply: Reply) {
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

    /// Whether the arbiter has said that this host has the VM now: it is not left before somebody who can note its end
    /// runs it (rule 20).
    pub const fn has_won(&self) -> bool {
        self.won.is_some()
    }

    pub(super) fn finish_takeover(&mut self) {
        let Some(generation) = self.won else { return };
        match self.phase {
            Phase::Applying(_) => return, // goes only forward: `Applied` comes back here
            Phase::Stopping(Order { epoch, .. }) | Phase::Staging(Order { epoch, .. }) => {
                self.act(Action::Abort { epoch });
            }
            Phase::Resting => {
                if let Some(epoch) = self.halted {
                    self.act(Action::Abort { epoch });
                }
            }
        }
        self.phase = Phase::Resting;
        self.generation = generation;
        self.state = SecondaryState::TookOver;
        self.act(Action::TakeOver { generation });
    }

    pub(super) fn end(&mut self, outcome: Outcome) {
        self.state = SecondaryState::Ended;
        self.act(Action::Stop(outcome));
    }
}
