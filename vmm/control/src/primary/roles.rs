//! Who speaks: questions to the arbiter, loss of the secondary, the end of the VM.

use alloc::string::{String, ToString};

use super::{Primary, PrimaryState};
use crate::farewell::farewell;
use crate::{Action, Cas, Expect, Msg, Notice, Outcome, Reply, Standing};

impl Primary {
    // ---- the secondary is gone ----

    pub(super) fn drop_link(&mut self, reason: &str) {
        self.act(Action::CloseLink {
            reason: reason.to_string(),
        });
        self.peer_lost();
    }

    /// The link is of no use though both hosts live, or the secondary says so.
    pub(super) fn give_link_up(&mut self, reason: String) {
        if self.peer.is_none() {
            return;
        }
        self.counters.given_up += 1;
        self.send(farewell(self.record.generation, &reason));
        self.drop_link(&reason);
        self.act(Action::Tell(Notice::GivenUp { reason }));
    }

    pub(super) fn peer_lost(&mut self) {
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
            PrimaryState::Paired if self.block_alone => self.block(),
            PrimaryState::Paired => {
                self.state = PrimaryState::Deciding;
                self.ask(Standing::Alone);
            }
            // `Blocked` with a question open about a new secondary: the answer finds no peer.
            _ => {}
        }
        // Nobody is to be waited for.
        self.pacer.reset();
        self.tell_pace();
    }

    pub(super) fn gone_alone(&mut self) {
        if self.block_alone && self.was_paired {
            return self.block();
        }
        self.state = PrimaryState::Alone;
        self.act(Action::GoAlone);
    }

    fn block(&mut self) {
        self.state = PrimaryState::Blocked;
        self.act(Action::Detach);
    }

    // ---- the arbiter ----

    pub(super) fn ask(&mut self, standing: Standing) {
        let expect = Expect::Exactly(self.record.clone());
        self.put(Cas::Swap {
            expect,
            holder: self.host.clone(),
            standing,
        });
    }

    pub(super) fn confirm(&mut self) {
        self.put(Cas::Confirm(self.record.clone()));
    }

    pub(super) fn clock_gap(&mut self) {
        self.unconfirmed = true;
        // An answer that was on its way during the gap says nothing about what happened in it.
        self.stale_question = self.question.is_some() && self.retry_us.is_none();
        self.act(Action::Mute(true));
        self.act(Action::Lease { until_us: 0 });
        self.confirm();
    }

    pub(super) fn put(&mut self, cas: Cas) {
        // An open question is answered first; `record_confirmed` then asks what the state still needs.
        if self.question.is_none() {
            self.question = Some(cas.clone());
            self.act(Action::Arbiter(cas));
        }
    }

    pub(super) fn arbiter(&mut self, now_us: u64, reply: Reply) {
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
    pub(super) fn record_confirmed(&mut self, now_us: u64) {
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

    pub(super) fn paired(&mut self, now_us: u64) {
        self.state = PrimaryState::Paired;
        self.was_paired = true;
        let generation = self.record.generation;
        self.send(Msg::Paired { generation });
        // The first checkpoint ended the epoch before the present one.
        self.committed_to(now_us, now_us, self.epoch - 1);
    }

    /// The peer's session, 0 without one.
    pub(super) fn session(&self) -> u64 {
        self.peer.as_ref().map_or(0, |p| p.session)
    }

    // ---- the end ----

    pub(super) fn shut_down(&mut self, now_us: u64) {
        if self.state == PrimaryState::ShuttingDown {
            return;
        }
        self.state = PrimaryState::ShuttingDown;
        self.shutdown_due_us = Some(now_us + self.timing.step_timeout_us);
        self.ask(Standing::Off);
    }

    /// Either the arbiter or the secondary must know before this host goes: a secondary that knows nothing
    /// would resurrect the VM (rule 20).
    pub(super) fn shutdown_due(&mut self, now_us: u64) {
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

    pub(super) fn tell_off(&mut self, now_us: u64) {
        if self.session() == 0 {
            self.end(Outcome::Off);
            return;
        }
        let generation = self.record.generation;
        self.shutdown_due_us = Some(now_us + self.timing.detection_us());
        self.send(Msg::Off { generation });
    }

    pub(super) fn end(&mut self, outcome: Outcome) {
        self.state = PrimaryState::Ended;
        self.act(Action::Mute(true));
        self.act(Action::Stop(outcome));
    }
}
