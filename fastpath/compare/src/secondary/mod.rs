//! The packet path of the host that follows: feeds the SVM with the PVM's input and sends its
//! output, translated, to the comparator.
//!
//! Invariants: input reaches the SVM in the PVM's order, none of an epoch that the SVM has not
//! reached or that a commit includes; a TCP segment is kept until the SVM's own ACK covers it or a commit includes it
//! (rule 5); output is kept until the primary says that it has left (rule 9). Nothing here reaches
//! a client before [`SecondaryPath::take_over`]. Nothing allocates after `new` before that, as long
//! as the primary keeps to [`Limits::max_unacked_inputs`] and the shell asks
//! [`SecondaryPath::room`]; who does not is served all the same.

mod output;
mod pair;

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::action::{Action, PathError, Right, SecondaryAction};
use crate::announce::Addresses;
use crate::cause::Cause;
use crate::digest::DigestKey;
use crate::flat::Slot;
use crate::flow::{Direction, FlowKey};
use crate::frames::{Frames, Token};
use crate::limits::Limits;
use crate::primary::{Inherited, PrimaryPath};
use crate::record::{self, RecordError};
use crate::retain::Retain;
use crate::stats::SecondaryStats;
use crate::wire::tcp::{ACK, RST, SYN, Tcp};
use crate::wire::{self, Packet, Quoted};
use crate::xlate::ClientTable;
use output::Stored;
use pair::PairTable;

/// Input on its way to the guest.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) epoch: u64,
    pub(crate) input_seq: u64,
    pub(crate) token: Token,
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
    /// Output from here on has not been given to the shell for sending.
    unsent_svm_seq: u64,
    digest_key: Option<DigestKey>,
    /// Output of which the primary needs the bytes, after all.
    fetched: VecDeque<u64>,
    /// Pending output of the last commit, until it is reported released (rule 12).
    pending: VecDeque<Token>,
    pending_epoch: u64,
    pending_released: u64,
    client: ClientTable,
    addresses: Addresses,
    /// The latest epoch in which a checkpoint was requested.
    requested: Option<u64>,
    /// The request is still to be given to the shell.
    request: Option<Cause>,
    stats: SecondaryStats,
}

impl SecondaryPath {
    /// A path that has joined but has no VM yet: input is kept until the first commit.
    pub fn new(limits: Limits) -> Self {
        let (inputs, seed) = (limits.input_capacity(), limits.hash_seed);
        Self {
            limits,
            epoch: 0,
            running: false,
            queue: VecDeque::with_capacity(inputs),
            ready: None,
            retain: Retain::new(inputs, seed),
            received_seq: 0,
            acked_seq: 0,
            delivered_seq: 0,
            catch_up_to: None,
            pairs: PairTable::new(limits.max_flows, seed),
            outputs: VecDeque::with_capacity(limits.max_stored_output + limits.crossing_frames),
            next_svm_seq: 1,
            unsent_svm_seq: 1,
            digest_key: None,
            fetched: VecDeque::with_capacity(limits.max_stored_output + limits.crossing_frames),
            pending: VecDeque::with_capacity(limits.max_held_frames + limits.crossing_frames),
            pending_epoch: 0,
            pending_released: 0,
            client: ClientTable::new(limits.max_translations, seed),
            addresses: Addresses::default(),
            requested: None,
            request: None,
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

    /// How many frames it takes at the end of an epoch, when those on their way between shards come
    /// ([`Limits::crossing_frames`]).
    pub fn last_room_frames(&self) -> usize {
        let max = self.limits.max_stored_output + self.limits.crossing_frames;
        max.saturating_sub(self.outputs.len())
    }

    /// What is to be done next.
    pub fn poll_action(&mut self) -> Option<SecondaryAction> {
        if let Some(action) = self.next_send() {
            return Some(action);
        }
        if let Some(cause) = self.request.take() {
            return Some(SecondaryAction::RequestCheckpoint(cause));
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
        if epoch < self.epoch {
            // The commit has overtaken it on the link: the SVM has it already (rule 4).
            frames.release(token);
            self.delivered_seq = input_seq;
            self.stats.dropped_by_commit += 1;
            return Ok(());
        }
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
            self.stats.delivered += 1;
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
        let Queued {
            epoch,
            input_seq,
            token,
        } = self.queue.pop_front()?;
        let packet = parse(frames, &token, Direction::ToGuest);
        let delivered = match packet.tcp {
            Some(tcp) => self.deliver_segment(now_us, frames, token, (packet.key, &tcp)),
            None => Ok(token),
        };
        match delivered {
            Ok(token) => {
                self.translate_input(frames, &token, &packet);
                self.delivered_seq = input_seq;
                Some(token)
            }
            Err(token) => {
                self.queue.push_front(Queued {
                    epoch,
                    input_seq,
                    token,
                });
                None
            }
        }
    }

    /// Takes note of a segment, and keeps it where it must be kept. Gives what is to be delivered,
    /// or the segment back when something has no room.
    fn deliver_segment<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: Token,
        (key, tcp): (FlowKey, &Tcp),
    ) -> Result<Token, Token> {
        let Some(slot) = self.pairs.place(key) else {
            self.request(Cause::TableFull);
            return Err(token);
        };
        let learnt = self.pairs.input(slot, frames.header(&token), tcp);
        self.stats.learnt += u64::from(learnt);
        if tcp.has(RST) {
            self.retain.reset(&key, tcp.seq, frames);
        }
        // What the peer sends again after the SVM's ACK needs no keeping: guests answer it late or
        // not at all. A SYN may be a new connection's.
        let is_repeated = !tcp.has(SYN) && self.pairs.is_acknowledged(slot, tcp.end());
        if !tcp.takes_space() || tcp.has(RST) || is_repeated {
            self.retain.heard(&key, frames.header(&token), tcp);
            return Ok(token);
        }
        let due_us = now_us + self.limits.redeliver_us;
        let kept = self.retain.keep(frames, key, tcp, token, due_us);
        if kept.is_err() && self.retain.is_full() {
            self.request(Cause::InputOverflow);
        }
        kept
    }

    fn deliver_again<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) -> Option<Token> {
        let wait_us = self.limits.redeliver_us;
        let copy = self.retain.poll_due(now_us, wait_us, frames)?;
        self.stats.redelivered += 1;
        let packet = parse(frames, &copy, Direction::ToGuest);
        self.translate_input(frames, &copy, &packet);
        Some(copy)
    }

    /// From the PVM's space to the SVM's: a segment, or one that an ICMP error quotes.
    fn translate_input<F: Frames + ?Sized>(&self, frames: &mut F, token: &Token, packet: &Packet) {
        let header = frames.header_mut(token);
        if let Some(mut tcp) = packet.tcp {
            let offsets = self.pairs.offsets_of(&packet.key);
            offsets.inbound(header, &mut tcp);
        } else if let Some(quoted) = Quoted::parse(header, packet) {
            let offsets = self.pairs.offsets_of(&quoted.key);
            offsets.inbound_quoted(header, &quoted);
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
            let slot = self.note_guest_tcp(now_us, frames, &token, (&packet.key, &tcp));
            if tcp.is_pure_ack() {
                self.stats.pure_acks += 1;
                frames.release(token);
                return;
            }
            if let Some(slot) = slot {
                let offsets = self.pairs.offsets(slot);
                offsets.outbound(frames.header_mut(&token), &mut tcp);
            }
        }
        let svm_seq = self.next_svm_seq;
        self.next_svm_seq += 1;
        let stored = self.stored(frames, &packet, svm_seq, token);
        self.outputs.push_back(stored);
        self.stats.sent += 1;
        if !self.room() {
            self.request(Cause::OutputOverflow);
        }
    }

    /// Gives the connection's place in the pair table.
    fn note_guest_tcp<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: &Token,
        (key, tcp): (&FlowKey, &Tcp),
    ) -> Option<Slot> {
        if tcp.has(ACK) {
            let wait_us = self.limits.redeliver_us;
            self.retain.covered(now_us, wait_us, key, tcp.ack, frames);
        }
        let mut slot = self.pairs.find(key);
        let mut is_over = tcp.has(RST);
        if tcp.has(SYN) {
            slot = self.pairs.place(*key);
            match slot {
                Some(slot) => is_over |= self.pairs.svm_syn(slot, frames.header(token), tcp),
                // Without a place its numbers would not be known at a takeover.
                None => self.request(Cause::TableFull),
            }
        }
        if is_over {
            // What is still kept belongs to a connection that the SVM no longer has.
            self.retain.forget(key, frames);
        }
        if tcp.has(ACK)
            && !tcp.has(RST)
            && let Some(slot) = slot
        {
            self.pairs.svm_ack(slot, tcp.ack);
        }
        slot
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

    /// Appends the client-facing translations and the guest's addresses that the last commit left here, as
    /// [`PrimaryPath::export_client_xlate`] does: for an audit (rule 16).
    pub fn export_client_xlate(&self, out: &mut Vec<u8>) {
        record::write(&self.client, &self.addresses, out);
    }

    /// How many frames of pending output [`SecondaryPath::commit`] takes: to be asked before the
    /// commit point (rule 13).
    pub fn max_pending(&self) -> usize {
        self.limits.max_held_frames + self.limits.crossing_frames
    }

    /// A checkpoint of `epoch` is past its commit point: gives back what belongs to the SVM's old
    /// state, so that the pending output of the checkpoint finds slots.
    pub fn leave_epoch<F: Frames + ?Sized>(&mut self, frames: &mut F, epoch: u64) {
        self.drop_epoch(frames, epoch);
        self.pending
            .drain(..)
            .for_each(|token| frames.release(token));
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
        self.leave_epoch(frames, epoch);
        self.pending.extend(pending);
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
        self.fetched.clear();
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
            self.request = Some(cause);
        }
    }

    /// The SVM becomes the VM, by the arbiter's word: its translations become client-facing, what
    /// the primary did not report released is sent, and the kept input is delivered (rules 1, 3,
    /// 5, 9, 12 and 14). Takes the memory of a [`PrimaryPath`]. Announcements are queued:
    /// [`PrimaryPath::poll_announcement`].
    pub fn take_over<F: Frames + ?Sized>(mut self, now_us: u64, frames: &mut F) -> PrimaryPath {
        self.translate_unsent(now_us, frames);
        for queued in &self.queue {
            let packet = parse(frames, &queued.token, Direction::ToGuest);
            if let Some(tcp) = packet.tcp
                && let Some(slot) = self.pairs.place(packet.key)
            {
                self.pairs.input(slot, frames.header(&queued.token), &tcp);
            }
            self.translate_input(frames, &queued.token, &packet);
        }
        for token in self.retain.tokens() {
            let packet = parse(frames, token, Direction::ToGuest);
            self.translate_input(frames, token, &packet);
        }
        self.retain.inbound(|key| self.pairs.offsets_of(key));
        let last_epoch = self.queue.back().map_or(self.epoch, |queued| queued.epoch);
        self.retain.hurry(now_us);
        let slack = self.limits.takeover_ts_slack;
        self.pairs.compose(&mut self.client, now_us, slack);
        let stored = self.outputs.into_iter().map(|stored| stored.token);
        let unsent = self.pending.into_iter().chain(stored);
        let unsent = unsent.map(|token| Action::Release {
            token,
            right: Right::Alone,
            held_us: 0,
        });
        let epoch = last_epoch.max(self.epoch) + 1;
        PrimaryPath::inheriting(
            now_us,
            self.limits,
            epoch,
            self.client,
            self.addresses,
            Inherited::new(self.ready, self.queue, self.retain),
            unsent,
        )
    }

    /// Puts pending output, then stored SVM output, through the translation that the PVM had.
    fn translate_unsent<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        let stored = self.outputs.iter().map(|stored| &stored.token);
        for token in self.pending.iter().chain(stored) {
            let mut packet = parse(frames, token, Direction::FromGuest);
            self.client
                .outbound(now_us, frames.header_mut(token), &mut packet);
        }
    }

    /// Gives back every frame that the path owns, for a shell that ends.
    pub fn close<F: Frames + ?Sized>(mut self, frames: &mut F) {
        self.give_back(frames);
    }

    /// The same, for a shell that drops it later: nothing else is done with it afterwards.
    pub fn give_back<F: Frames + ?Sized>(&mut self, frames: &mut F) {
        self.drop_epoch(frames, u64::MAX);
        self.pending
            .drain(..)
            .for_each(|token| frames.release(token));
    }
}

fn parse<F: Frames + ?Sized>(frames: &F, token: &Token, direction: Direction) -> Packet {
    wire::parse(frames.header(token), frames.len(token), direction)
}
