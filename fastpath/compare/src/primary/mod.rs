//! The packet path of whoever speaks: decides what of the VM's output leaves, and when.
//!
//! Invariants: in a pair, a frame leaves only because the SVM sent the same in the same epoch, a
//! checkpoint covers it, it needs no counterpart and the heartbeat is fresh, or this host goes
//! alone; per flow, frames leave in production order; nothing is dropped. Everything is in the
//! guest's space except at the NIC edge: [`PrimaryPath::handle_nic`] translates what comes in,
//! [`Action::Release`] carries what goes out in client space.
//!
//! Does not do I/O and keeps no time: the shell gives `now_us` and carries out actions in order.

mod checkpoint;
mod inherited;
mod judge;

use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec::Vec;

use crate::action::{Action, Right};
use crate::announce::{ANNOUNCEMENT_MAX, Addresses, Again};
use crate::cause::{Cause, Divergence};
use crate::flow::{Direction, FlowKey};
use crate::frames::{Frames, Token};
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::policy::Policy;
use crate::record::{self, RecordError};
use crate::stats::PrimaryStats;
use crate::table::{Body, FlowId, Held, Table};
use crate::wire::{self, Packet, tcp::RST};
use crate::xlate::ClientTable;
pub use checkpoint::Pending;
pub(crate) use inherited::Inherited;

/// What a [`PrimaryPath`] does with output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Unprotected: everything leaves at once.
    Alone,
    /// Output is compared.
    Paired,
    /// Nothing leaves; everything is held.
    Mute,
}

/// A PVM frame of an epoch that is not compared yet, or for which the flow table had no room.
#[derive(Debug)]
struct Deferred {
    id: u64,
    epoch: u64,
    token: Token,
    packet: Packet,
    stamp: u64,
    at_us: u64,
}

#[derive(Debug)]
struct DeferredSvm {
    epoch: u64,
    svm_seq: u64,
    token: Token,
}

/// What may leave, but not while the path is mute.
#[derive(Debug)]
enum Cleared {
    Frame {
        id: u64,
        token: Token,
        packet: Packet,
        at_us: u64,
        right: Right,
    },
    Pending {
        epoch: u64,
    },
}

/// See the module.
#[derive(Debug)]
pub struct PrimaryPath {
    limits: Limits,
    policy: Policy,
    paired: bool,
    muted: bool,
    /// The epoch that input and output belong to now.
    epoch: u64,
    /// The epoch whose output is compared.
    comparing: u64,
    /// The epoch that the checkpoint in flight covers.
    cut: Option<u64>,
    /// A checkpoint was aborted: everything waits for the next commit (rule 14).
    frozen: bool,
    epoch_start_us: u64,
    caught_up_us: Option<u64>,
    /// The SVM has caught up in this epoch, whose comparison has not begun yet.
    early_caught_up: Option<u64>,
    lease_until_us: Option<u64>,
    input_seq: u64,
    input_ack: u64,
    next_id: u64,
    table: Table,
    /// Flows in which time can bring something about.
    active: BTreeSet<FlowId>,
    /// Flows that a guest opened and that have output on one side only.
    openers: Vec<FlowKey>,
    deferred: VecDeque<Deferred>,
    deferred_svm: VecDeque<DeferredSvm>,
    cleared: VecDeque<Cleared>,
    held_frames: usize,
    /// The latest epoch in which a checkpoint was requested.
    requested: Option<u64>,
    client: ClientTable,
    /// Handshakes that a translation completed, unknown to the secondary until a commit.
    learnt: Vec<(u64, FlowKey)>,
    addresses: Addresses,
    next_announcement: Option<usize>,
    announce_again: Again,
    inherited: Inherited,
    ledger: Ledger,
}

impl PrimaryPath {
    /// A path that is alone, in epoch 1, without translations.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            policy: Policy::default(),
            paired: false,
            muted: false,
            epoch: 1,
            comparing: 1,
            cut: None,
            frozen: false,
            epoch_start_us: 0,
            caught_up_us: None,
            early_caught_up: None,
            lease_until_us: None,
            input_seq: 0,
            input_ack: 0,
            next_id: 0,
            table: Table::new(limits.max_flows),
            active: BTreeSet::new(),
            openers: Vec::new(),
            deferred: VecDeque::new(),
            deferred_svm: VecDeque::new(),
            cleared: VecDeque::new(),
            held_frames: 0,
            requested: None,
            client: ClientTable::new(limits.max_translations, limits.hash_seed),
            learnt: Vec::new(),
            addresses: Addresses::default(),
            next_announcement: None,
            announce_again: Again::default(),
            inherited: Inherited::default(),
            ledger: Ledger::default(),
        }
    }

    /// The same, with rules for single flows.
    pub fn with_policy(limits: Limits, policy: Policy) -> Self {
        Self {
            policy,
            ..Self::new(limits)
        }
    }

    /// Replaces the rules for single flows; flows that are known already keep theirs.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// The rules for single flows.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The path of a host that takes over: alone, with the translations it has inherited.
    pub(crate) fn inheriting(
        now_us: u64,
        limits: Limits,
        epoch: u64,
        client: ClientTable,
        addresses: Addresses,
        inherited: Inherited,
        unsent: VecDeque<Action>,
    ) -> Self {
        let mut path = Self::new(limits);
        path.ledger.stats.released_alone = unsent.len() as u64;
        path.ledger.actions = unsent;
        (path.epoch, path.comparing) = (epoch, epoch);
        path.client = client;
        path.addresses = addresses;
        path.inherited = inherited;
        path.ledger.stats.translations_evicted += path.client.evicted();
        path.announce();
        path.announce_again = Again::from(now_us);
        path
    }

    /// What the path does with output now.
    pub fn mode(&self) -> Mode {
        match (self.muted, self.paired) {
            (true, _) => Mode::Mute,
            (false, true) => Mode::Paired,
            (false, false) => Mode::Alone,
        }
    }

    /// The epoch that input and output belong to now.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Counters.
    pub fn stats(&self) -> &PrimaryStats {
        &self.ledger.stats
    }

    /// PVM frames that have not left.
    pub fn held_frames(&self) -> usize {
        self.held_frames
    }

    /// Whether the shell may read another frame from guest_tx.
    pub fn room(&self) -> bool {
        self.held_frames < self.limits.max_held_frames
    }

    /// Whether the shell may read another frame from the NIC.
    pub fn nic_room(&self) -> bool {
        !self.paired || self.input_seq - self.input_ack < self.limits.max_unacked_inputs
    }

    /// What is to be done next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.ledger.actions.pop_front()
    }

    /// Takes a frame from the NIC and gives it back in the guest's space, to be put in guest_rx.
    pub fn handle_nic<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: Token,
    ) -> Token {
        if self.client.len() == 0 {
            return token;
        }
        self.client.expire(now_us);
        let mut packet = self.parse(frames, &token, Direction::ToGuest);
        let header = frames.header_mut(&token);
        let learnt = self.client.inbound(now_us, header, &mut packet);
        if learnt && self.paired {
            self.note_learnt(frames, packet.key);
        }
        token
    }

    /// The frame has been put in guest_rx: in a pair it is mirrored, in this order (rule 4).
    /// Frames that the full ring did not take are the shell's to release.
    pub fn handle_delivered<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: Token,
    ) {
        let packet = self.parse(frames, &token, Direction::ToGuest);
        if packet.tcp.is_some_and(|tcp| tcp.has(RST)) {
            self.inherited.forget(&packet.key, frames);
        }
        if !self.paired {
            frames.release(token);
            return;
        }
        self.input_seq += 1;
        if let Some(id) = self.table.place(packet.key, &mut self.ledger, frames)
            && let Some(flow) = self.table.get_mut(id)
        {
            flow.last_input_seq = self.input_seq;
            if let (Body::Tcp(stream), Some(tcp)) = (&mut flow.body, packet.tcp)
                && tcp.has(wire::tcp::ACK)
            {
                stream.acknowledged(tcp.ack, &mut self.ledger, frames);
                self.pump(now_us, frames, id);
            }
        }
        self.ledger.stats.mirrored += 1;
        let (epoch, input_seq) = (self.epoch, self.input_seq);
        self.ledger.actions.push_back(Action::Mirror {
            epoch,
            input_seq,
            token,
        });
    }

    /// Takes a frame that the guest sent.
    pub fn handle_guest_tx<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: Token,
    ) {
        let packet = self.parse(frames, &token, Direction::FromGuest);
        self.addresses.learn(frames.header(&token), &packet);
        self.inherited
            .guest_sent(now_us, &self.limits, &packet, frames);
        self.ledger.stats.produced += 1;
        self.next_id += 1;
        self.held_frames += 1;
        let (id, epoch, at_us) = (self.next_id, self.epoch, now_us);
        if !self.paired {
            let right = Right::Alone;
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
            return;
        }
        let stamp = self.stamp(&packet);
        let deferred = Deferred {
            id,
            epoch,
            token,
            packet,
            stamp,
            at_us,
        };
        if self.epoch == self.comparing && !self.frozen {
            self.hold(now_us, frames, deferred);
        } else {
            self.deferred.push_back(deferred);
        }
        if !self.room() {
            self.request(Divergence::plain(Cause::HoldFull, None));
        }
    }

    /// The input that a frame may acknowledge: that of its flow, or all (rule 5).
    fn stamp(&self, packet: &Packet) -> u64 {
        match self.table.find(&packet.key) {
            Some(flow) if packet.tcp.is_some() => flow.last_input_seq,
            _ => self.input_seq,
        }
    }

    fn hold<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, frame: Deferred) {
        let Some(id) = self.table.place(frame.packet.key, &mut self.ledger, frames) else {
            let key = frame.packet.key;
            self.deferred.push_back(frame);
            self.request(Divergence::plain(Cause::TableFull, Some(key)));
            return;
        };
        let Some(flow) = self.table.get_mut(id) else {
            return;
        };
        let incarnation = match (&mut flow.body, &frame.packet.tcp) {
            (Body::Tcp(stream), Some(tcp)) => stream.produced(tcp),
            _ => 0,
        };
        let Deferred {
            id: place,
            token,
            packet,
            stamp,
            at_us,
            ..
        } = frame;
        flow.held.push_back(Held {
            id: place,
            token,
            packet,
            stamp,
            at_us,
            incarnation,
            matched_to: None,
        });
        flow.pvm_sent = true;
        self.pump(now_us, frames, id);
        self.check_openers(id);
    }

    /// Takes a frame that the SVM sent in `epoch`, in the PVM's guest space.
    pub fn handle_svm_output<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        epoch: u64,
        svm_seq: u64,
        token: Token,
    ) {
        self.ledger.stats.svm_output += 1;
        if !self.paired || epoch < self.comparing || (self.frozen && epoch == self.comparing) {
            // The next commit, or the takeover, decides about what it would have released.
            self.ledger.stats.svm_stale += 1;
            frames.release(token);
        } else if self.limits.canary_equal {
            frames.release(token);
            self.ledger.report_svm(svm_seq);
        } else if self.ledger.svm_frames >= self.limits.max_svm_frames {
            // The secondary still stores it; only the comparison lacks it, so output stays held.
            self.ledger.stats.svm_overflow += 1;
            frames.release(token);
            self.request(Divergence::plain(Cause::OutputOverflow, None));
        } else if epoch > self.comparing {
            // Only the epoch that follows the cut can send before its commit is known here.
            self.ledger.svm_frames += 1;
            self.deferred_svm.push_back(DeferredSvm {
                epoch,
                svm_seq,
                token,
            });
        } else {
            self.ledger.svm_frames += 1;
            self.compare_svm(now_us, frames, svm_seq, token);
        }
    }

    fn compare_svm<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        svm_seq: u64,
        token: Token,
    ) {
        let packet = self.parse(frames, &token, Direction::FromGuest);
        let Some(id) = self.table.place(packet.key, &mut self.ledger, frames) else {
            self.ledger.recycle_svm(token, frames);
            self.request(Divergence::plain(Cause::TableFull, Some(packet.key)));
            return;
        };
        let Some(flow) = self.table.get_mut(id) else {
            return;
        };
        flow.svm_sent = true;
        let divergence = match (&mut flow.body, packet.tcp) {
            (Body::Tcp(stream), Some(tcp)) => {
                let output = (token, packet, tcp);
                stream.svm_output(now_us, svm_seq, output, &mut self.ledger, frames)
            }
            (Body::Datagram(datagrams), _) => {
                datagrams.svm_output(now_us, svm_seq, (token, packet));
                None
            }
            // The key says TCP if and only if the view is there.
            (Body::Tcp(_), None) => {
                self.ledger.recycle_svm(token, frames);
                None
            }
        };
        match divergence {
            Some(divergence) => self.diverge(id, divergence),
            None => self.pump(now_us, frames, id),
        }
        self.check_openers(id);
    }

    /// The secondary keeps all input up to this number (rule 5).
    pub fn handle_input_ack<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        up_to: u64,
    ) {
        if up_to > self.input_ack && up_to <= self.input_seq {
            self.input_ack = up_to;
            self.pump_active(now_us, frames);
        }
    }

    /// The heartbeat is fresh until then: what needs no counterpart may leave (rule 18).
    pub fn set_lease<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, until_us: u64) {
        self.lease_until_us = Some(until_us);
        if self.paired && self.lease_is_fresh(now_us) {
            self.pump_active(now_us, frames);
        }
    }

    fn lease_is_fresh(&self, now_us: u64) -> bool {
        self.lease_until_us
            .is_some_and(|until_us| now_us <= until_us)
    }

    /// Appends the client-facing translations and the guest's addresses, as of now, in the form
    /// that `SecondaryPath` reads (rule 1). Called at the cut. Takes no memory when `out` has room
    /// for [`PrimaryPath::xlate_record_len`] bytes.
    pub fn export_client_xlate(&self, out: &mut Vec<u8>) {
        record::write(&self.client, &self.addresses, out);
    }

    /// How many bytes [`PrimaryPath::export_client_xlate`] appends now; never more than
    /// [`Limits::xlate_record_max`].
    pub fn xlate_record_len(&self) -> usize {
        record::len(&self.client, &self.addresses)
    }

    /// Replaces the client-facing translations by those of a record.
    pub fn import_client_xlate(&mut self, now_us: u64, bytes: &[u8]) -> Result<(), RecordError> {
        record::read(bytes, now_us, &mut self.client, &mut self.addresses)
    }

    /// Tells whose frames these are before the guest has sent one, and announces it to the
    /// switches, which may remember it elsewhere.
    pub fn set_guest_mac(&mut self, mac: [u8; 6]) {
        self.addresses.set_mac(mac);
        self.announce();
    }

    /// Announces the guest's addresses (again): [`PrimaryPath::poll_announcement`] gives frames.
    pub fn announce(&mut self) {
        self.next_announcement = Some(0);
    }

    /// Writes the next announcement frame and gives its length. Nothing while mute, nor in a pair
    /// without a fresh heartbeat (rule 18).
    pub fn poll_announcement(
        &mut self,
        now_us: u64,
        out: &mut [u8; ANNOUNCEMENT_MAX],
    ) -> Option<usize> {
        if self.muted || (self.paired && !self.lease_is_fresh(now_us)) {
            return None;
        }
        let n = self.next_announcement?;
        let len = self.addresses.write(n, out);
        self.next_announcement = len.map(|_| n + 1);
        len
    }

    /// Input that this host inherited at its takeover, to be put in guest_rx before anything from
    /// the NIC; afterwards [`PrimaryPath::handle_delivered`] or [`PrimaryPath::undelivered`].
    pub fn poll_deliver<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
    ) -> Option<Token> {
        self.inherited
            .poll_deliver(now_us, &self.limits, &mut self.ledger.stats, frames)
    }

    /// The full guest_rx did not take what [`PrimaryPath::poll_deliver`] gave.
    pub fn undelivered(&mut self, token: Token) {
        self.inherited.undelivered(token);
    }

    fn parse<F: Frames + ?Sized>(&self, frames: &F, token: &Token, direction: Direction) -> Packet {
        wire::parse(frames.header(token), frames.len(token), direction)
    }

    /// A handshake that is learnt while a secondary follows: the flow's output waits for a commit,
    /// because a takeover before it would have to learn the same again, from the same first ACK.
    fn note_learnt<F: Frames + ?Sized>(&mut self, frames: &mut F, key: FlowKey) {
        self.learnt.push((self.epoch, key));
        if self.epoch == self.comparing && !self.frozen {
            self.hold_until_commit(frames, key);
        }
    }
}
