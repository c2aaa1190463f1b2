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
mod exact;
mod inherited;
mod input;
mod judge;
mod pairs;
mod svm;

use alloc::vec::Vec;

use crate::action::{Action, PathError};
use crate::announce::{ANNOUNCEMENT_MAX, Addresses, Again};
use crate::cause::{Cause, Divergence};
use crate::digest::DigestKey;
use crate::flat::Hash;
use crate::flow::{Direction, FlowKey};
use crate::frames::{Frames, Token};
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::list::{Ends, Lists};
use crate::policy::{Opener, Policy};
use crate::record::{self, RecordError};
use crate::stats::PrimaryStats;
use crate::table::{FlowId, Flows, Held, Produced, seen};
use crate::wire::tcp::{ACK, SYN};
use crate::wire::{self, Packet};
use crate::xlate::ClientTable;
pub use checkpoint::Pending;
pub(crate) use inherited::Inherited;
pub use pairs::{History, Pairs, Passed};

/// Most flows that are watched for another port on the other side (rule 2).
const MAX_OPENERS: usize = 64;
/// Most flows that [`PrimaryPath::expect`] fetches ahead.
const EXPECTED_MAX: usize = 64;
/// Flows that the caches keep anyway.
const EXPECT_FROM_FLOWS: usize = 4096;

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
    /// Nothing is compared and everything waits for the next commit: a checkpoint was aborted
    /// (rule 14), or this epoch is buffered.
    frozen: bool,
    /// The present epoch is buffered (Remus, rule 21).
    buffering: bool,
    epoch_start_us: u64,
    caught_up_us: Option<u64>,
    /// The SVM has caught up in this epoch, whose comparison has not begun yet.
    early_caught_up: Option<u64>,
    lease_until_us: Option<u64>,
    /// Counts all input since the path began; that of a session begins behind `session_base`.
    input_seq: u64,
    input_ack: u64,
    session_base: u64,
    next_id: u64,
    flows: Flows,
    /// Every PVM frame that has not left, in its flow's list or in one of the two below.
    held: Lists<Held>,
    /// Frames of an epoch that is not compared yet, or for which the flow table had no room, in
    /// production order.
    deferred: Ends,
    /// Frames that may leave, but not while the path is mute.
    cleared: Ends,
    /// The pending output of this epoch's checkpoint has left, when what is cleared has.
    cleared_pending: Option<u64>,
    /// A frame found no place in the flow table: new flows wait for the commit, so that none
    /// overtakes it.
    table_full: bool,
    /// SVM output of the epoch that follows the cut.
    deferred_svm: Ends,
    /// Where [`PrimaryPath::drop_history`] looked last.
    history_hand: u32,
    /// Hashes of the flows that are needed next.
    expected: Vec<Hash>,
    /// Room to put frames of many flows in order.
    order: Vec<(u64, u32)>,
    /// Flows that a guest opened and that have output on one side only.
    openers: Vec<FlowKey>,
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
    /// A path that is alone, in epoch 1, without translations. All its memory is taken here.
    pub fn new(limits: Limits) -> Self {
        Self::with_policy(limits, Policy::default())
    }

    /// The same, with rules for single flows.
    pub fn with_policy(limits: Limits, policy: Policy) -> Self {
        Self {
            limits,
            policy,
            paired: false,
            muted: false,
            epoch: 1,
            comparing: 1,
            cut: None,
            frozen: false,
            buffering: false,
            epoch_start_us: 0,
            caught_up_us: None,
            early_caught_up: None,
            lease_until_us: None,
            input_seq: 0,
            input_ack: 0,
            session_base: 0,
            next_id: 0,
            flows: Flows::new(&limits),
            held: Lists::with_capacity(limits.max_held_frames + limits.crossing_frames),
            deferred: Ends::EMPTY,
            cleared: Ends::EMPTY,
            cleared_pending: None,
            table_full: false,
            deferred_svm: Ends::EMPTY,
            history_hand: 0,
            expected: Vec::with_capacity(EXPECTED_MAX),
            order: Vec::with_capacity(limits.max_held_frames + limits.crossing_frames),
            openers: Vec::with_capacity(MAX_OPENERS),
            requested: None,
            client: ClientTable::new(limits.max_translations, limits.hash_seed),
            learnt: Vec::with_capacity(limits.max_translations),
            addresses: Addresses::default(),
            next_announcement: None,
            announce_again: Again::default(),
            inherited: Inherited::default(),
            ledger: Ledger::new(&limits),
        }
    }

    /// Replaces the rules for single flows. Not while a secondary follows: flows that are compared
    /// keep the rule that they began with.
    pub fn set_policy(&mut self, policy: Policy) -> Result<(), PathError> {
        if self.paired {
            return Err(PathError::AlreadyPaired { epoch: self.epoch });
        }
        self.policy = policy;
        Ok(())
    }

    /// What the secondary digests with, agreed when the two hosts paired; without it, the bytes of
    /// each digest are asked for.
    pub fn set_digest_key(&mut self, key: Option<DigestKey>) {
        self.ledger.digest_key = key;
    }

    /// The path of a host that takes over: alone, with the translations it has inherited.
    pub(crate) fn inheriting(
        now_us: u64,
        limits: Limits,
        epoch: u64,
        client: ClientTable,
        addresses: Addresses,
        inherited: Inherited,
        unsent: impl IntoIterator<Item = Action>,
    ) -> Self {
        let mut path = Self::new(limits);
        for action in unsent {
            path.ledger.stats.released_alone += 1;
            path.ledger.act(action);
        }
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
        self.held.len()
    }

    /// Flows that are known to the comparator.
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// Whether the shell may read another frame from guest_tx.
    pub fn room(&self) -> bool {
        self.held.len() < self.limits.max_held_frames
    }

    /// Where the large tables lie, and how many bytes they take: for a shell that wants huge pages
    /// behind them.
    pub fn table_memory(&self) -> [(*const u8, usize); 2] {
        self.flows.memory()
    }

    /// How many frames the shell may read from guest_tx.
    pub fn room_frames(&self) -> usize {
        self.limits.max_held_frames.saturating_sub(self.held.len())
    }

    /// How many frames it takes at the end of an epoch, when those on their way between shards come
    /// ([`Limits::crossing_frames`]).
    pub fn last_room_frames(&self) -> usize {
        self.room_frames() + self.crossing_room()
    }

    fn crossing_room(&self) -> usize {
        let above = self.held.len().saturating_sub(self.limits.max_held_frames);
        self.limits.crossing_frames.saturating_sub(above)
    }

    /// Whether the shell may read another frame from the NIC.
    pub fn nic_room(&self) -> bool {
        !self.paired || self.input_seq - self.input_ack < self.limits.max_unacked_inputs
    }

    /// What is to be done next.
    #[inline(always)]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.ledger.next_action()
    }

    /// Says which frames come next, up to a batch, so that their flows are on their way from memory
    /// when [`PrimaryPath::handle_guest_tx`] or [`PrimaryPath::handle_svm_output`] need them. With
    /// few flows, which stay in the cache, this does nothing.
    pub fn expect<'a, F: Frames + ?Sized>(
        &mut self,
        frames: &F,
        tokens: impl Iterator<Item = &'a Token>,
    ) {
        if !self.paired || self.flows.len() < EXPECT_FROM_FLOWS {
            return;
        }
        self.expected.clear();
        for token in tokens.take(EXPECTED_MAX) {
            let packet = self.parse(frames, token, Direction::FromGuest);
            let hash = self.flows.hash(&packet.key);
            frames.prefetch(self.flows.bucket_address(hash));
            self.expected.push(hash);
        }
        for hash in &self.expected {
            for address in self.flows.entry_lines(*hash) {
                frames.prefetch(address);
            }
        }
    }

    /// Takes a frame that the guest sent. Only while there is [`PrimaryPath::room`]: beyond it the
    /// path takes more memory rather than lose a frame.
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
        if !self.paired {
            let frame = self.undecided(now_us, token, 0);
            self.leave(now_us, frames, frame.held(&packet));
            return;
        }
        let place = self.flows.find(&packet.key);
        let stamp = self.stamp(&packet, place.1);
        let frame = self.undecided(now_us, token, stamp);
        if self.epoch == self.comparing && !self.frozen {
            self.hold(now_us, frames, place, &packet, frame);
        } else {
            self.held.push_back(&mut self.deferred, frame.held(&packet));
        }
        if !self.room() {
            self.request(Divergence::plain(Cause::HoldFull, None));
        }
    }

    #[inline(always)]
    fn undecided(&self, now_us: u64, token: Token, stamp: u64) -> Produced {
        Produced {
            id: self.next_id,
            epoch: self.epoch,
            token,
            stamp,
            at_us: now_us,
        }
    }

    /// The input that a frame may acknowledge: that of its flow, or all (rule 5).
    #[inline]
    fn stamp(&self, packet: &Packet, id: Option<FlowId>) -> u64 {
        let of_flow = id.and_then(|id| self.flows.last_input_seq(id));
        match of_flow {
            // A flow without known input may have had some before it was known.
            Some(seq) if packet.tcp.is_some() && seq != 0 => seq,
            _ => self.input_seq,
        }
    }

    /// The flow's place, made when it is new; `None` when the table is full of flows that cannot
    /// be forgotten.
    fn place<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        packet: &Packet,
        sender: Opener,
    ) -> Option<FlowId> {
        let place = self.flows.find(&packet.key);
        let name = (&packet.key, packet.tcp.map(|tcp| tcp.flags));
        self.place_hashed(now_us, frames, place, name, sender)
    }

    #[inline(always)]
    fn place_hashed<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        (hash, id): (Hash, Option<FlowId>),
        (key, tcp_flags): (&FlowKey, Option<u8>),
        sender: Opener,
    ) -> Option<FlowId> {
        match id {
            Some(id) => Some(id),
            None if self.table_full => None,
            None => self.make_place(now_us, frames, hash, (key, tcp_flags), sender),
        }
    }

    #[inline(never)]
    fn make_place<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        hash: Hash,
        (key, tcp_flags): (&FlowKey, Option<u8>),
        sender: Opener,
    ) -> Option<FlowId> {
        let opener = opener_of(tcp_flags, sender);
        let rule = self.policy.rule_number(key, opener);
        let name = (hash, *key);
        self.flows
            .insert(name, rule, now_us, &mut self.ledger, frames)
    }

    #[inline]
    fn hold<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        place: (Hash, Option<FlowId>),
        packet: &Packet,
        frame: Produced,
    ) {
        let tcp = packet.tcp.as_ref();
        let name = (&packet.key, tcp.map(|tcp| tcp.flags));
        let id = self.place_hashed(now_us, frames, place, name, Opener::Guest);
        let Some((id, flow)) = id.and_then(|id| Some((id, self.flows.get_mut(id)?))) else {
            self.table_full = true;
            self.held.push_back(&mut self.deferred, frame.held(packet));
            self.request(Divergence::plain(Cause::TableFull, Some(packet.key)));
            return;
        };
        // A datagram has nothing to be compared with before the SVM has sent one.
        let mut must_wait = flow.svm.is_empty();
        let mut incarnation = 0;
        if let Some(tcp) = tcp {
            incarnation = flow.produced(tcp);
            // Behind another one, or before the SVM has sent anything, there is nothing to judge.
            must_wait = flow.must_wait(incarnation, tcp) || !flow.held.is_empty();
        }
        let held = Held {
            flow: id,
            incarnation,
            is_counted: tcp.is_some(),
            ..frame.held(packet)
        };
        self.held.push_back(&mut flow.held, held);
        flow.use_now(now_us, seen::PVM);
        let may_be_opener = flow.last_input_seq == 0;
        if must_wait && self.policy.is_empty() && !self.limits.canary_equal {
            // Behind another frame, and mostly otherwise, the timer is armed already.
            let (due_us, _) = self.peer_deadline(now_us);
            self.flows.arm(id, now_us, due_us);
        } else {
            self.pump(now_us, frames, id);
        }
        if may_be_opener {
            self.check_openers(id);
        }
    }

    /// The heartbeat is fresh until then: what needs no counterpart may leave (rule 18).
    pub fn set_lease<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, until_us: u64) {
        self.lease_until_us = Some(until_us);
        if self.paired && self.lease_is_fresh(now_us) {
            self.pump_waiting(now_us, frames);
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

    #[inline(always)]
    fn parse<F: Frames + ?Sized>(&self, frames: &F, token: &Token, direction: Direction) -> Packet {
        let (header, len) = frames.view(token);
        wire::parse(header, len, direction)
    }
}

/// Who opened a flow whose first known frame is this; unknown in the middle of a connection.
fn opener_of(tcp_flags: Option<u8>, sender: Opener) -> Option<Opener> {
    let other = match sender {
        Opener::Guest => Opener::Peer,
        Opener::Peer => Opener::Guest,
    };
    match tcp_flags.map(|flags| flags & (SYN | ACK)) {
        None | Some(SYN) => Some(sender),
        Some(flags) if flags == SYN | ACK => Some(other),
        Some(_) => None,
    }
}
