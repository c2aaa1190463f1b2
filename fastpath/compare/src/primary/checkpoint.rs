//! Epochs and roles: cut, commit, abort, pairing, going alone, muteness.

use super::PrimaryPath;
use crate::action::{Action, PathError, Right};
use crate::cause::{Cause, Divergence};
use crate::flow::Direction;
use crate::frames::{Frames, Token};
use crate::ledger::Payload;
use crate::list::Ends;
use crate::policy::Opener;
use crate::table::{DEFERRED, Held};
use crate::wire;

/// A frame that the checkpoint carries as pending output (rule 12).
#[derive(Debug)]
pub struct Pending<'a> {
    /// Its place in the production order.
    pub id: u64,
    /// The frame, in the PVM's guest space.
    pub token: &'a Token,
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

    /// Takes the last cut back: one capture is one cut across all shards (rule 4), and another shard could not make
    /// it. To be called before anything else happens to this path.
    pub fn uncut(&mut self, epoch: u64) -> Result<(), PathError> {
        self.end_flight(epoch)?;
        self.epoch = epoch;
        Ok(())
    }

    /// Goes on in `epoch`, if that is later than the present one: the shards of a VM that was taken over have each counted
    /// their own input, and begin in one epoch (rule 4). Only before a secondary joins.
    pub fn raise_epoch(&mut self, epoch: u64) -> Result<(), PathError> {
        if self.paired {
            return Err(PathError::AlreadyPaired { epoch: self.epoch });
        }
        self.epoch = self.epoch.max(epoch);
        self.comparing = self.epoch;
        Ok(())
    }

    /// The epoch that began with the cut is buffered, or compared again (rule 21). To be said before
    /// the commit of that cut; otherwise it is as the one before. While an epoch is buffered all its
    /// output waits for its commit, acknowledgements included, and its input is not mirrored: what
    /// the clients have had no acknowledgement of, they send again to whoever takes over.
    pub fn buffer(&mut self, buffering: bool) {
        self.buffering = buffering;
    }

    /// Whether the present epoch is buffered.
    pub fn is_buffering(&self) -> bool {
        self.buffering
    }

    /// The undecided frames that the checkpoint in flight covers, in production order.
    pub fn pending(&mut self) -> impl Iterator<Item = Pending<'_>> {
        let covered = self.cut.unwrap_or(self.epoch);
        self.put_in_order(|held| held.epoch <= covered);
        let ordered = self.order.iter();
        ordered.filter_map(|(id, at)| {
            let token = &self.held.get(*at)?.token;
            Some(Pending { id: *id, token })
        })
    }

    /// Lists the frames that have not left and of which `is_wanted`, in production order.
    fn put_in_order(&mut self, is_wanted: impl Fn(&Held) -> bool) {
        self.order.clear();
        for at in 0..self.held.nodes() {
            if let Some(held) = self.held.get(at).filter(|held| is_wanted(held)) {
                self.order.push((held.id, at));
            }
        }
        self.order.sort_unstable();
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
        self.note_covered(now_us, frames, epoch);
        self.drop_svm_of(frames, epoch);
        self.release_all(now_us, frames, Right::Checkpoint, |held| {
            held.epoch <= epoch
        });
        self.leave_pending(epoch);
        self.flows.next_generation();
        self.openers.clear();
        (self.frozen, self.table_full) = (self.buffering, false);
        self.comparing = self.epoch;
        self.epoch_start_us = now_us;
        // The word of the SVM that runs from this commit may overtake the commit itself.
        let early = self.early_caught_up.take() == Some(self.comparing);
        self.caught_up_us = early.then_some(now_us);
        self.resume_comparison(now_us, frames);
        Ok(())
    }

    /// What was never put into a flow must still raise the flow's base.
    fn note_covered<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, epoch: u64) {
        let mut at = self.deferred.head;
        while let Some(frame) = self.held.get(at).filter(|frame| frame.epoch <= epoch) {
            let is_counted = frame.is_counted;
            let packet = self.parse(frames, &frame.token, Direction::FromGuest);
            at = self.held.next(at);
            let Some(tcp) = packet.tcp.filter(|_| !is_counted) else {
                continue;
            };
            let id = self.place(now_us, frames, &packet, Opener::Guest);
            if let Some(flow) = id.and_then(|id| self.flows.get_mut(id)) {
                flow.produced(&tcp);
            }
        }
    }

    fn drop_svm_of<F: Frames + ?Sized>(&mut self, frames: &mut F, epoch: u64) {
        self.ledger.drop_svm(frames, |frame| frame.epoch <= epoch);
    }

    /// Lets frames leave in production order, wherever they wait; flows that lose theirs are to be
    /// forgotten or renewed.
    fn release_all<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        right: Right,
        is_released: impl Fn(&Held) -> bool,
    ) {
        self.put_in_order(|held| is_released(held) && !held.is_cleared());
        for n in 0..self.order.len() {
            let (_, at) = self.order[n];
            let is_deferred = self.held.get(at).is_some_and(|held| held.flow == DEFERRED);
            let taken = if is_deferred {
                self.held.remove(&mut self.deferred, at)
            } else {
                self.held.take(at)
            };
            if let Some(mut frame) = taken {
                frame.right = right;
                self.leave(now_us, frames, frame);
            }
        }
    }

    /// Reports that the pending output of a checkpoint has left, once it has.
    fn leave_pending(&mut self, epoch: u64) {
        if self.muted {
            self.cleared_pending = Some(epoch);
        } else {
            self.ledger.act(Action::PendingReleased { epoch });
        }
    }

    fn resume_comparison<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        let epoch = self.comparing;
        self.learnt.retain(|(learnt_in, _)| *learnt_in >= epoch);
        if self.frozen {
            // The SVM stands still: whatever it sent is of no use.
            self.ledger.drop_svm(frames, |_| true);
            self.deferred_svm = Ends::EMPTY;
            if !self.room() {
                self.request(Divergence::plain(Cause::HoldFull, None));
            }
            return;
        }
        for at in 0..self.learnt.len() {
            self.hold_until_commit(now_us, frames, self.learnt[at].1);
        }
        // What finds no place in the table comes back to the end of the list.
        let mut later = core::mem::take(&mut self.deferred);
        while let Some(frame) = self.held.pop_front(&mut later) {
            let packet = self.parse(frames, &frame.token, Direction::FromGuest);
            let place = self.flows.find(&packet.key);
            self.hold(now_us, frames, place, &packet, frame.again());
        }
        let mut svm = core::mem::take(&mut self.deferred_svm);
        while let Some(frame) = self.ledger.svm.pop_front(&mut svm) {
            if frame.epoch != epoch {
                self.ledger.stats.svm_stale += 1;
                frames.release(frame.token);
                continue;
            }
            let (header, len) = frames.view(&frame.token);
            let len = match frame.payload {
                Payload::Bytes => len,
                _ => usize::from(frame.packet.end),
            };
            let key = wire::parse(header, len, Direction::FromGuest).key;
            let place = self.flows.find(&key);
            self.compare_svm(now_us, frames, place, &key, frame);
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
        self.freeze(frames);
        self.request(Divergence::plain(Cause::Aborted, None));
        Ok(())
    }

    /// Nothing is compared until the next commit, which covers everything that is held.
    fn freeze<F: Frames + ?Sized>(&mut self, frames: &mut F) {
        self.frozen = true;
        self.ledger.drop_svm(frames, |_| true);
        self.deferred_svm = Ends::EMPTY;
        self.put_in_order(|held| !held.is_cleared());
        let mut deferred = Ends::EMPTY;
        for n in 0..self.order.len() {
            // One after the other out of the lists that are forgotten here.
            let (_, at) = self.order[n];
            if let Some(mut frame) = self.held.take(at) {
                frame.flow = DEFERRED;
                self.held.push_back(&mut deferred, frame);
            }
        }
        self.deferred = deferred;
        self.flows.next_generation();
    }

    /// The SVM has consumed the input that came before its resume: comparison deadlines of the
    /// epoch run from now on (rule 9).
    pub fn caught_up(&mut self, now_us: u64, epoch: u64) {
        if epoch == self.comparing {
            self.caught_up_us.get_or_insert(now_us);
            self.rearm_all(now_us);
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
        if let Some(epoch) = self.cut {
            return Err(PathError::CheckpointInFlight { epoch });
        }
        self.paired = true;
        self.buffering = false;
        // Input is numbered from 1 in each session.
        (self.session_base, self.input_ack) = (self.input_seq, self.input_seq);
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
            self.freeze(frames);
            self.paired = false;
        }
        self.pair(now_us)
    }

    /// This host goes on without a secondary, by the arbiter's word: everything leaves, in
    /// production order, and the path is neither paired nor mute any more.
    pub fn go_alone<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        self.unmute_gate(now_us, frames);
        self.ledger.keep_releases_only(frames);
        self.ledger.drop_svm(frames, |_| true);
        self.deferred_svm = Ends::EMPTY;
        self.release_all(now_us, frames, Right::Alone, |_| true);
        self.flows.clear();
        self.openers.clear();
        self.learnt.clear();
        (self.paired, self.frozen, self.table_full) = (false, false, false);
        self.buffering = false;
        (self.cut, self.requested) = (None, None);
        (self.caught_up_us, self.early_caught_up) = (None, None);
        self.comparing = self.epoch;
    }

    /// Nothing leaves from now on, whatever is decided.
    pub fn mute(&mut self) {
        self.muted = true;
    }

    /// What has been decided meanwhile leaves, and the path goes on as before.
    pub fn unmute<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        self.unmute_gate(now_us, frames);
        if self.paired {
            self.pump_all(now_us, frames);
        }
    }

    fn unmute_gate<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        self.muted = false;
        while let Some(frame) = self.held.pop_front(&mut self.cleared) {
            self.leave(now_us, frames, frame);
        }
        if let Some(epoch) = self.cleared_pending.take() {
            self.ledger.act(Action::PendingReleased { epoch });
        }
    }

    /// Gives back every frame that the path owns, for a shell that ends.
    pub fn close<F: Frames + ?Sized>(mut self, frames: &mut F) {
        self.give_back(frames);
    }

    /// The same, for a shell that drops it later: nothing else is done with it afterwards.
    pub fn give_back<F: Frames + ?Sized>(&mut self, frames: &mut F) {
        self.ledger.drop_svm(frames, |_| true);
        self.ledger.close(frames);
        for at in 0..self.held.nodes() {
            if let Some(frame) = self.held.take(at) {
                frames.release(frame.token);
            }
        }
        self.inherited.close(frames);
    }
}
