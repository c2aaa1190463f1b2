//! The packet path of the host that follows: feeds the SVM with the PVM's input and sends its
//! output, translated, to the comparator.
//!
//! Invariants: input reaches the SVM in the PVM's order, none of an epoch that the SVM has not
//! reached; a TCP segment is kept until the SVM's own ACK covers it or a commit includes it
//! (rule 5); output is kept until the primary says that it has left (rule 9). Nothing here reaches
//! a client before [`SecondaryPath::take_over`].

mod pair;

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::action::{Action, PathError, Right, SecondaryAction};
use crate::announce::Addresses;
use crate::cause::Cause;
use crate::flow::Direction;
use crate::frames::{Frames, Token};
use crate::limits::Limits;
use crate::primary::{Inherited, PrimaryPath};
use crate::record::{self, RecordError};
use crate::retain::Retain;
use crate::stats::SecondaryStats;
use crate::wire::tcp::{ACK, RST, SYN};
use crate::wire::{self, Packet};
use crate::xlate::ClientTable;
use pair::PairTable;

#[derive(Debug)]
struct Queued {
    epoch: u64,
    input_seq: u64,
    token: Token,
}

#[derive(Debug)]
struct Stored {
    svm_seq: u64,
    token: Token,
}

/// See the module.
#[derive(Debug)]
pub struct SecondaryPath {
    limits: Limits,
    /// The epoch that the SVM is in; 0 before the first commit.
    epoch: u64,
    running: bool,
    /// Input that the SVM has not got, in order.
    queue: VecDeque<Queued>,
    /// A frame in the SVM's space that its full ring did not take.
    ready: Option<Token>,
    retain: Retain,
    received_seq: u64,
    acked_seq: u64,
    delivered_seq: u64,
    /// The backlog at the SVM's resume ends here.
    catch_up_to: Option<u64>,
    pairs: PairTable,
    /// SVM output in the PVM's space, by `svm_seq`, not reported released.
    outputs: VecDeque<Stored>,
    next_svm_seq: u64,
    /// Pending output of the last commit, until it is reported released (rule 12).
    pending: VecDeque<Token>,
    pending_epoch: u64,
    pending_released: u64,
    client: ClientTable,
    addresses: Addresses,
    /// The latest epoch in which a checkpoint was requested.
    requested: Option<u64>,
    actions: VecDeque<SecondaryAction>,
    stats: SecondaryStats,
}

impl SecondaryPath {
    /// A path that has joined but has no VM yet: input is kept until the first commit.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            epoch: 0,
            running: false,
            queue: VecDeque::new(),
            ready: None,
            retain: Retain::default(),
            received_seq: 0,
            acked_seq: 0,
            delivered_seq: 0,
            catch_up_to: None,
            pairs: PairTable::default(),
            outputs: VecDeque::new(),
            next_svm_seq: 1,
            pending: VecDeque::new(),
            pending_epoch: 0,
            pending_released: 0,
            client: ClientTable::new(limits.max_translations, limits.hash_seed),
            addresses: Addresses::default(),
            requested: None,
            actions: VecDeque::new(),
            stats: SecondaryStats::default(),
        }
    }

    /// The epoch that the SVM is in; 0 before the first commit.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Counters.
    pub fn stats(&self) -> &SecondaryStats {
        &self.stats
    }

    /// Input frames that are kept here: not delivered, or not acknowledged by the SVM.
    pub fn input_frames(&self) -> usize {
        self.queue.len() + self.retain.len() + usize::from(self.ready.is_some())
    }

    /// SVM output that the primary has not reported released.
    pub fn stored_outputs(&self) -> usize {
        self.outputs.len()
    }

    /// Whether the shell may read another frame from guest_tx.
    pub fn room(&self) -> bool {
        self.outputs.len() < self.limits.max_stored_output
    }

    /// What is to be done next.
    pub fn poll_action(&mut self) -> Option<SecondaryAction> {
        if let Some(action) = self.actions.pop_front() {
            return Some(action);
        }
        let caught_up = self
            .catch_up_to
            .is_some_and(|end| self.delivered_seq >= end);
        if caught_up && self.ready.is_none() && self.running {
            self.catch_up_to = None;
            return Some(SecondaryAction::CaughtUp { epoch: self.epoch });
        }
        // What is not acknowledged holds the primary's output and, in the end, its NIC back.
        if self.acked_seq < self.received_seq && self.input_frames() <= self.limits.max_input_frames
        {
            self.acked_seq = self.received_seq;
            return Some(SecondaryAction::AckInput {
                up_to: self.acked_seq,
            });
        }
        None
    }

    /// Takes a mirrored input frame. Numbers go up by one, from 1 in each session.
    pub fn handle_mirror<F: Frames + ?Sized>(
        &mut self,
        _now_us: u64,
        frames: &mut F,
        epoch: u64,
        input_seq: u64,
        token: Token,
    ) -> Result<(), PathError> {
        let expected = self.received_seq + 1;
        if input_seq != expected {
            frames.release(token);
            return Err(PathError::InputGap {
                expected,
                found: input_seq,
            });
        }
        self.received_seq = input_seq;
        self.stats.mirrored += 1;
        self.queue.push_back(Queued {
            epoch,
            input_seq,
            token,
        });
        if self.input_frames() > self.limits.max_input_frames {
            self.request(Cause::InputOverflow);
        }
        Ok(())
    }

    /// The next frame for the SVM's guest_rx, in the SVM's space. The shell gives the slot back
    /// when the frame is in the ring, or calls [`SecondaryPath::undelivered`].
    pub fn poll_deliver<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
    ) -> Option<Token> {
        if !self.running {
            return None;
        }
        if let Some(token) = self.ready.take() {
            return Some(token);
        }
        let token = if self
            .queue
            .front()
            .is_some_and(|queued| queued.epoch <= self.epoch)
        {
            self.deliver_next(now_us, frames)?
        } else {
            self.deliver_again(now_us, frames)?
        };
        self.stats.delivered += 1;
        Some(token)
    }

    fn deliver_next<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) -> Option<Token> {
        let queued = self.queue.pop_front()?;
        let input_seq = queued.input_seq;
        let packet = parse(frames, &queued.token, Direction::ToGuest);
        let Some(tcp) = packet.tcp else {
            self.delivered_seq = input_seq;
            return Some(queued.token);
        };
        if !self.pairs.has_room(&packet.key, self.limits.max_flows) {
            self.queue.push_front(queued);
            self.request(Cause::TableFull);
            return None;
        }
        // What the peer sends again after the SVM's ACK needs no keeping: guests answer it late or
        // not at all. A SYN may be a new connection's.
        let is_repeated = !tcp.has(SYN) && self.pairs.is_acknowledged(&packet.key, tcp.end());
        let is_kept = tcp.takes_space() && !tcp.has(RST) && !is_repeated;
        let copy = if is_kept {
            frames.duplicate(&queued.token)
        } else {
            None
        };
        if is_kept && copy.is_none() {
            self.queue.push_front(queued);
            return None;
        }
        self.stats.learnt += u64::from(self.pairs.input(
            packet.key,
            frames.header(&queued.token),
            &tcp,
        ));
        if tcp.has(RST) {
            self.retain.forget(&packet.key, frames);
        }
        let token = match copy {
            Some(copy) => {
                let due_us = now_us + self.limits.redeliver_us;
                self.retain
                    .keep(packet.key, tcp.end(), queued.token, due_us);
                copy
            }
            None => queued.token,
        };
        self.translate_input(frames, &token, &packet);
        self.delivered_seq = input_seq;
        Some(token)
    }

    fn deliver_again<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) -> Option<Token> {
        let (_, copy) = self
            .retain
            .poll_due(now_us, self.limits.redeliver_us, frames)?;
        self.stats.redelivered += 1;
        let packet = parse(frames, &copy, Direction::ToGuest);
        self.translate_input(frames, &copy, &packet);
        Some(copy)
    }

    fn translate_input<F: Frames + ?Sized>(&self, frames: &mut F, token: &Token, packet: &Packet) {
        if let Some(mut tcp) = packet.tcp {
            let offsets = self.pairs.offsets(&packet.key);
            offsets.inbound(frames.header_mut(token), &mut tcp);
        }
    }

    /// The full guest_rx did not take what [`SecondaryPath::poll_deliver`] gave.
    pub fn undelivered(&mut self, token: Token) {
        self.stats.delivered -= 1;
        self.ready = Some(token);
    }

    /// Takes a frame that the SVM sent.
    pub fn handle_guest_tx<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: Token,
    ) {
        self.stats.produced += 1;
        let packet = parse(frames, &token, Direction::FromGuest);
        self.addresses.learn(frames.header(&token), &packet);
        if let Some(mut tcp) = packet.tcp {
            self.note_guest_tcp(now_us, frames, &token, &packet);
            if tcp.is_pure_ack() {
                self.stats.pure_acks += 1;
                frames.release(token);
                return;
            }
            let offsets = self.pairs.offsets(&packet.key);
            offsets.outbound(frames.header_mut(&token), &mut tcp);
        }
        let (svm_seq, epoch) = (self.next_svm_seq, self.epoch);
        self.next_svm_seq += 1;
        self.outputs.push_back(Stored { svm_seq, token });
        self.stats.sent += 1;
        self.actions
            .push_back(SecondaryAction::SendOutput { epoch, svm_seq });
        if !self.room() {
            self.request(Cause::OutputOverflow);
        }
    }

    fn note_guest_tcp<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: &Token,
        packet: &Packet,
    ) {
        let (Some(tcp), key) = (packet.tcp, packet.key) else {
            return;
        };
        if tcp.has(ACK) {
            self.retain
                .covered(now_us, self.limits.redeliver_us, &key, tcp.ack, frames);
        }
        let new = tcp.has(SYN)
            && self.pairs.has_room(&key, self.limits.max_flows)
            && self.pairs.svm_syn(key, frames.header(token), &tcp);
        if new || tcp.has(RST) {
            // What is still kept belongs to a connection that the SVM no longer has.
            self.retain.forget(&key, frames);
        }
        if tcp.has(ACK) && !tcp.has(RST) {
            self.pairs.svm_ack(&key, tcp.ack);
        }
    }

    /// The stored output of that number, in the PVM's space.
    pub fn output(&self, svm_seq: u64) -> Option<&Token> {
        self.position(svm_seq).map(|at| &self.outputs[at].token)
    }

    fn position(&self, svm_seq: u64) -> Option<usize> {
        self.outputs
            .binary_search_by_key(&svm_seq, |stored| stored.svm_seq)
            .ok()
    }

    /// The primary has released what this output stands for (rule 9).
    pub fn handle_released<F: Frames + ?Sized>(&mut self, frames: &mut F, svm_seq: u64) {
        let stored = self
            .position(svm_seq)
            .and_then(|at| self.outputs.remove(at));
        stored
            .into_iter()
            .for_each(|stored| frames.release(stored.token));
    }

    /// The primary has released the pending output of the checkpoint of `epoch` (rule 12). May
    /// come before [`SecondaryPath::commit`] of that epoch is done.
    pub fn handle_pending_released<F: Frames + ?Sized>(&mut self, frames: &mut F, epoch: u64) {
        self.pending_released = self.pending_released.max(epoch);
        if self.pending_epoch <= self.pending_released {
            self.pending
                .drain(..)
                .for_each(|token| frames.release(token));
        }
    }

    /// The SVM stops for a checkpoint: it gets no input any more.
    pub fn stop(&mut self) {
        self.running = false;
    }

    /// The checkpoint was aborted: the SVM goes on from where it stopped (rule 14).
    pub fn resume_unchanged(&mut self) {
        self.running = self.epoch != 0;
    }

    /// Whether [`SecondaryPath::commit`] will take this record: to be asked before the commit
    /// point (rule 13).
    pub fn check_record(&self, record: &[u8]) -> Result<(), RecordError> {
        record::check(record, self.limits.max_translations)
    }

    /// The SVM now is what the PVM was at the end of `epoch`, and runs. `pending` is the
    /// checkpoint's pending output in production order, `record` what
    /// [`PrimaryPath::export_client_xlate`] gave.
    pub fn commit<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        epoch: u64,
        pending: Vec<Token>,
        record: &[u8],
    ) -> Result<(), PathError> {
        if let Err(error) = record::read(record, now_us, &mut self.client, &mut self.addresses) {
            pending.into_iter().for_each(|token| frames.release(token));
            return Err(error.into());
        }
        self.drop_epoch(frames, epoch);
        self.pending
            .drain(..)
            .for_each(|token| frames.release(token));
        self.pending = pending.into();
        self.pending_epoch = epoch;
        self.handle_pending_released(frames, self.pending_released);
        self.epoch = epoch + 1;
        self.running = true;
        self.catch_up_to = Some(self.received_seq);
        self.delivered_seq = self.received_seq - self.queue.len() as u64;
        Ok(())
    }

    /// What belongs to the SVM's old state.
    fn drop_epoch<F: Frames + ?Sized>(&mut self, frames: &mut F, epoch: u64) {
        let mut dropped = self.retain.clear(frames);
        self.ready
            .take()
            .into_iter()
            .for_each(|token| frames.release(token));
        let covered = self.queue.partition_point(|queued| queued.epoch <= epoch);
        self.queue
            .drain(..covered)
            .for_each(|queued| frames.release(queued.token));
        dropped += covered;
        self.stats.dropped_by_commit += dropped as u64;
        self.outputs
            .drain(..)
            .for_each(|stored| frames.release(stored.token));
        self.actions
            .retain(|action| !matches!(action, SecondaryAction::SendOutput { .. }));
        self.pairs.clear();
    }

    /// When [`SecondaryPath::poll_deliver`] has something to deliver again.
    pub fn next_deadline(&self) -> Option<u64> {
        if self.running {
            self.retain.next_due_us()
        } else {
            None
        }
    }

    fn request(&mut self, cause: Cause) {
        if self.requested != Some(self.epoch) {
            self.requested = Some(self.epoch);
            self.stats.requests[cause.index()] += 1;
            self.actions
                .push_back(SecondaryAction::RequestCheckpoint(cause));
        }
    }

    /// The SVM becomes the VM, by the arbiter's word: its translations become client-facing, what
    /// the primary did not report released is sent, and the kept input is delivered (rules 1, 3,
    /// 5, 9, 12 and 14). Announcements are queued: [`PrimaryPath::poll_announcement`].
    pub fn take_over<F: Frames + ?Sized>(mut self, now_us: u64, frames: &mut F) -> PrimaryPath {
        let unsent = self.translate_unsent(now_us, frames);
        for queued in &self.queue {
            let packet = parse(frames, &queued.token, Direction::ToGuest);
            if let Some(tcp) = packet.tcp {
                self.pairs
                    .input(packet.key, frames.header(&queued.token), &tcp);
                self.translate_input(frames, &queued.token, &packet);
            }
        }
        for (_, token) in self.retain.tokens() {
            let packet = parse(frames, token, Direction::ToGuest);
            self.translate_input(frames, token, &packet);
        }
        let last_epoch = self.queue.back().map_or(self.epoch, |queued| queued.epoch);
        self.retain.hurry(now_us);
        let queue = self.queue.into_iter().map(|queued| queued.token).collect();
        let inherited = Inherited::new(self.ready, queue, self.retain);
        let client = self
            .pairs
            .compose(self.client, now_us, self.limits.takeover_ts_slack);
        let epoch = last_epoch.max(self.epoch) + 1;
        PrimaryPath::inheriting(
            now_us,
            self.limits,
            epoch,
            client,
            self.addresses,
            inherited,
            unsent,
        )
    }

    /// Pending output, then stored SVM output, through the translation that the PVM had.
    fn translate_unsent<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
    ) -> VecDeque<Action> {
        let stored = self.outputs.drain(..).map(|stored| stored.token);
        let unsent = self.pending.drain(..).chain(stored).collect::<Vec<_>>();
        let release = |token: Token| {
            let mut packet = parse(frames, &token, Direction::FromGuest);
            self.client
                .outbound(now_us, frames.header_mut(&token), &mut packet);
            Action::Release {
                token,
                right: Right::Alone,
                held_us: 0,
            }
        };
        unsent.into_iter().map(release).collect()
    }

    /// Gives back every frame that the path owns, for a shell that ends.
    pub fn close<F: Frames + ?Sized>(mut self, frames: &mut F) {
        self.drop_epoch(frames, u64::MAX);
        self.pending
            .drain(..)
            .for_each(|token| frames.release(token));
    }
}

fn parse<F: Frames + ?Sized>(frames: &F, token: &Token, direction: Direction) -> Packet {
    wire::parse(frames.header(token), frames.len(token), direction)
}
