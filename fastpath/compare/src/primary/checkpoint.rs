//! Epochs and roles: cut, commit, abort, pairing, going alone, muteness.

use alloc::vec::Vec;

use super::{Cleared, Deferred, PrimaryPath};
use crate::action::{Action, PathError, Right};
use crate::cause::{Cause, Divergence};
use crate::frames::{Frames, Token};
use crate::ledger::Ledger;
use crate::table::{Body, Held, Table, Wait};
use crate::wire::Packet;

/// A frame that the checkpoint carries as pending output (rule 12).
#[derive(Debug)]
pub struct Pending<'a> {
    /// Its place in the production order.
    pub id: u64,
    /// The frame, in the PVM's guest space.
    pub token: &'a Token,
}

/// An undecided frame, taken out of wherever it waited.
struct Waiting {
    id: u64,
    token: Token,
    packet: Packet,
    at_us: u64,
}

impl PrimaryPath {
    /// The PVM is quiesced for a checkpoint: what it does from now on belongs to the next epoch.
    /// Gives the epoch that the checkpoint covers.
    pub fn cut(&mut self, _now_us: u64) -> Result<u64, PathError> {
        if let Some(epoch) = self.cut {
            return Err(PathError::CheckpointInFlight { epoch });
        }
        let covered = self.epoch;
        self.cut = Some(covered);
        self.epoch += 1;
        Ok(covered)
    }

    /// The undecided frames that the checkpoint in flight covers, in production order.
    pub fn pending(&self) -> impl Iterator<Item = Pending<'_>> {
        let covered = self.cut.unwrap_or(self.epoch);
        let held = self.table.iter().flat_map(|flow| &flow.held);
        let held = held.map(|held| Pending {
            id: held.id,
            token: &held.token,
        });
        let deferred = self
            .deferred
            .iter()
            .filter(|deferred| deferred.epoch <= covered);
        let deferred = deferred.map(|frame| Pending {
            id: frame.id,
            token: &frame.token,
        });
        let cleared = self.cleared.iter().filter_map(|cleared| match cleared {
            Cleared::Frame { id, token, .. } => Some(Pending { id: *id, token }),
            Cleared::Pending { .. } => None,
        });
        let mut all: Vec<_> = held.chain(deferred).chain(cleared).collect();
        all.sort_unstable_by_key(|pending| pending.id);
        all.into_iter()
    }

    fn end_flight(&mut self, epoch: u64) -> Result<(), PathError> {
        match self.cut {
            None => Err(PathError::NoCheckpoint { epoch }),
            Some(expected) if expected != epoch => Err(PathError::WrongEpoch {
                expected,
                found: epoch,
            }),
            Some(_) => {
                self.cut = None;
                Ok(())
            }
        }
    }

    /// The secondary has committed the checkpoint of `epoch`: what it covers leaves, in production
    /// order, and the comparison of the next epoch begins.
    pub fn commit<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        epoch: u64,
    ) -> Result<(), PathError> {
        self.end_flight(epoch)?;
        let (covered, later) = self
            .deferred
            .drain(..)
            .partition::<Vec<_>, _>(|d| d.epoch <= epoch);
        for frame in &covered {
            self.note_covered(frame, frames);
        }
        let mut waiting = self.take_held();
        waiting.extend(covered.into_iter().map(Waiting::from));
        self.leave_all(now_us, frames, waiting, Right::Checkpoint);
        self.leave(now_us, frames, Cleared::Pending { epoch });
        for flow in self.table.iter_mut() {
            flow.body.rebase(&mut self.ledger, frames);
            flow.wait = Wait::Peer;
            (flow.pvm_sent, flow.svm_sent) = (false, false);
        }
        self.active.clear();
        self.openers.clear();
        self.frozen = false;
        self.comparing = self.epoch;
        self.epoch_start_us = now_us;
        // The word of the SVM that runs from this commit may overtake the commit itself.
        let early = self.early_caught_up.take() == Some(self.comparing);
        self.caught_up_us = early.then_some(now_us);
        self.resume_comparison(now_us, frames, later);
        Ok(())
    }

    /// What was never put into a flow must still raise the flow's base.
    fn note_covered<F: Frames + ?Sized>(&mut self, frame: &Deferred, frames: &mut F) {
        if let Some(tcp) = &frame.packet.tcp
            && let Some(id) = self.table.place(frame.packet.key, &mut self.ledger, frames)
            && let Some(Body::Tcp(stream)) = self.table.get_mut(id).map(|flow| &mut flow.body)
        {
            stream.produced(tcp);
        }
    }

    fn resume_comparison<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        later: Vec<Deferred>,
    ) {
        let epoch = self.comparing;
        self.learnt.retain(|(learnt_in, _)| *learnt_in >= epoch);
        for at in 0..self.learnt.len() {
            self.hold_until_commit(frames, self.learnt[at].1);
        }
        for frame in later {
            self.hold(now_us, frames, frame);
        }
        for svm in core::mem::take(&mut self.deferred_svm) {
            if svm.epoch == epoch {
                self.compare_svm(now_us, frames, svm.svm_seq, svm.token);
            } else {
                self.ledger.stats.svm_stale += 1;
                self.ledger.recycle_svm(svm.token, frames);
            }
        }
        if !self.room() {
            self.request(Divergence::plain(Cause::HoldFull, None));
        }
    }

    /// The checkpoint of `epoch` failed before its commit point: everything stays held until the
    /// next one covers both epochs (rule 14).
    pub fn abort<F: Frames + ?Sized>(
        &mut self,
        _now_us: u64,
        frames: &mut F,
        epoch: u64,
    ) -> Result<(), PathError> {
        self.end_flight(epoch)?;
        self.frozen = true;
        self.drop_svm_output(frames);
        self.request(Divergence::plain(Cause::Aborted, None));
        Ok(())
    }

    fn drop_svm_output<F: Frames + ?Sized>(&mut self, frames: &mut F) {
        for svm in core::mem::take(&mut self.deferred_svm) {
            self.ledger.recycle_svm(svm.token, frames);
        }
        for flow in self.table.iter_mut() {
            flow.body.rebase(&mut self.ledger, frames);
        }
    }

    /// The SVM has consumed the input that came before its resume: comparison deadlines of the
    /// epoch run from now on (rule 9).
    pub fn caught_up(&mut self, now_us: u64, epoch: u64) {
        if epoch == self.comparing {
            self.caught_up_us.get_or_insert(now_us);
        } else if epoch == self.epoch {
            self.early_caught_up = Some(epoch);
        }
    }

    /// A secondary joins; this is the capture of its first checkpoint. Input is mirrored from now
    /// on, output is held until the commit. Gives the epoch that the checkpoint covers.
    pub fn pair(&mut self, now_us: u64) -> Result<u64, PathError> {
        if self.paired {
            return Err(PathError::AlreadyPaired { epoch: self.epoch });
        }
        self.paired = true;
        (self.input_seq, self.input_ack) = (0, 0);
        (self.requested, self.lease_until_us) = (None, None);
        self.learnt.clear();
        self.cut(now_us)
    }

    /// A new secondary joins a host that may not speak alone and has held its output since it lost
    /// the last one (`alone = "block"`, rule 19). All of it stays held until the commit of this
    /// capture. Gives the epoch that the checkpoint covers.
    pub fn pair_again<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
    ) -> Result<u64, PathError> {
        if let Some(epoch) = self.cut {
            return Err(PathError::CheckpointInFlight { epoch });
        }
        if self.paired {
            // What the lost secondary sent says nothing about the new one.
            self.drop_svm_output(frames);
            // Input is counted anew.
            self.table
                .iter_mut()
                .for_each(|flow| flow.last_input_seq = 0);
            self.frozen = true;
            self.paired = false;
        }
        self.pair(now_us)
    }

    /// This host goes on without a secondary, by the arbiter's word: everything leaves, in
    /// production order, and the path is neither paired nor mute any more.
    pub fn go_alone<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        self.unmute_gate(now_us, frames);
        self.cancel_mirroring(frames);
        self.drop_svm_output(frames);
        let mut waiting = self.take_held();
        waiting.extend(self.deferred.drain(..).map(Waiting::from));
        self.leave_all(now_us, frames, waiting, Right::Alone);
        self.table = Table::new(self.limits.max_flows);
        self.active.clear();
        self.openers.clear();
        self.learnt.clear();
        (self.paired, self.frozen) = (false, false);
        (self.cut, self.requested) = (None, None);
        (self.caught_up_us, self.early_caught_up) = (None, None);
        self.comparing = self.epoch;
    }

    /// There is nobody to mirror to, or to ask for a checkpoint.
    fn cancel_mirroring<F: Frames + ?Sized>(&mut self, frames: &mut F) {
        for action in core::mem::take(&mut self.ledger.actions) {
            match action {
                Action::Mirror { token, .. } => frames.release(token),
                Action::Release { .. } => self.ledger.actions.push_back(action),
                _ => {}
            }
        }
    }

    /// Nothing leaves from now on, whatever is decided.
    pub fn mute(&mut self) {
        self.muted = true;
    }

    /// What has been decided meanwhile leaves, and the path goes on as before.
    pub fn unmute<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        self.unmute_gate(now_us, frames);
        if self.paired {
            self.pump_active(now_us, frames);
        }
    }

    fn unmute_gate<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        self.muted = false;
        for cleared in core::mem::take(&mut self.cleared) {
            self.leave(now_us, frames, cleared);
        }
    }

    fn take_held(&mut self) -> Vec<Waiting> {
        self.table
            .iter_mut()
            .flat_map(|flow| flow.held.drain(..))
            .map(Waiting::from)
            .collect()
    }

    fn leave_all<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        mut waiting: Vec<Waiting>,
        right: Right,
    ) {
        waiting.sort_unstable_by_key(|frame| frame.id);
        for Waiting {
            id,
            token,
            packet,
            at_us,
        } in waiting
        {
            self.leave(
                now_us,
                frames,
                Cleared::Frame {
                    id,
                    token,
                    packet,
                    at_us,
                    right,
                },
            );
        }
    }

    /// Gives back every frame that the path owns, for a shell that ends.
    pub fn close<F: Frames + ?Sized>(mut self, frames: &mut F) {
        self.drop_svm_output(frames);
        for waiting in self.take_held() {
            frames.release(waiting.token);
        }
        self.deferred
            .drain(..)
            .for_each(|frame| frames.release(frame.token));
        for cleared in core::mem::take(&mut self.cleared) {
            if let Cleared::Frame { token, .. } = cleared {
                frames.release(token);
            }
        }
        let Ledger { actions, .. } = core::mem::take(&mut self.ledger);
        for action in actions {
            if let Action::Mirror { token, .. } | Action::Release { token, .. } = action {
                frames.release(token);
            }
        }
        self.inherited.close(frames);
    }
}

impl From<Held> for Waiting {
    fn from(held: Held) -> Self {
        Self {
            id: held.id,
            token: held.token,
            packet: held.packet,
            at_us: held.at_us,
        }
    }
}

impl From<Deferred> for Waiting {
    fn from(frame: Deferred) -> Self {
        Self {
            id: frame.id,
            token: frame.token,
            packet: frame.packet,
            at_us: frame.at_us,
        }
    }
}
