//! What must hold of a [`colo_compare::PrimaryPath`], whatever happens to it.
//!
//! Invariants that are checked, from the protocol's rules and not from the code:
//! - output commit: a frame leaves by a match only if the SVM sent every byte that the client may
//!   still take in the same epoch, by a checkpoint only if a committed one covers it, freely only
//!   with a fresh heartbeat, and alone only if it was this host's to decide;
//! - a frame leaves once, whole, unchanged, and per flow in the order of production;
//! - nothing leaves while mute or after an abort; the ACK rule; reports follow what has left;
//! - one checkpoint request an epoch, none while one is in flight.
//!
//! Does not say when something has to leave: that is the reference comparator's part.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use colo_compare::wire::Packet;
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use colo_compare::{Divergence, FlowKey, Opener, Policy, PolicyAction, Protocol, Right, seq};

use super::blank::{Unit, blank, header_signature, stream_bytes};
use super::guest::Frame;

/// The state of the world at a step.
#[derive(Debug, Default)]
pub struct Now {
    /// Monotonic time.
    pub us: u64,
    /// What the PVM does belongs to it.
    pub epoch: u64,
    /// What the SVM does is compared in it.
    pub comparing: u64,
    /// The latest epoch that the secondary has committed.
    pub committed: u64,
    /// The epoch that the checkpoint in flight covers.
    pub cut: Option<u64>,
    /// After an abort, until the next commit.
    pub is_frozen: bool,
    /// No secondary follows.
    pub is_alone: bool,
    /// Nothing may leave.
    pub is_mute: bool,
    /// The heartbeat is fresh until then.
    pub lease_until_us: u64,
    /// The secondary keeps all input up to this number.
    pub input_ack: u64,
}

#[derive(Debug)]
struct Produced {
    id: u64,
    epoch: u64,
    bytes: Vec<u8>,
    packet: Packet,
    /// Input that it may acknowledge.
    stamp: u64,
    /// This host decided about it alone.
    alone: bool,
}

#[derive(Debug)]
struct SvmFrame {
    key: FlowKey,
    epoch: u64,
    bytes: Vec<u8>,
    packet: Packet,
    /// A PVM datagram has left because of it.
    used: bool,
    reported: bool,
}

/// What the clients of one flow may have seen.
#[derive(Debug, Default)]
struct FlowState {
    produced: VecDeque<Produced>,
    last_input: u64,
    isn: Option<u32>,
    /// Below it a commit covers everything.
    base: Option<u32>,
    /// Below it the client has everything.
    una: Option<u32>,
    left_high: Option<u32>,
    reset_left: bool,
    /// A number that was seen, and whether all others are near it: sequence arithmetic says
    /// nothing about numbers that are half of the space apart, and honest guests use none.
    origin: Option<u32>,
    is_scattered: bool,
    /// The PVM has sent a SYN: what the SVM sends may be of the connection before, and nobody waits
    /// for that any more.
    reused: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Checker {
    flows: BTreeMap<FlowKey, FlowState>,
    produced: u64,
    released: u64,
    svm: BTreeMap<u64, SvmFrame>,
    input_seq: u64,
    last_requested: Option<u64>,
    last_pending: Option<u64>,
    last_by_checkpoint: u64,
    policy: Policy,
    /// Frames are translated at the NIC edge.
    is_translated: bool,
}

impl Checker {
    /// The rules do not ask who opened a flow.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            ..Self::default()
        }
    }

    /// For a path that has translations.
    pub fn translated() -> Self {
        Self {
            is_translated: true,
            ..Self::default()
        }
    }

    /// Whether frames are translated at the NIC edge.
    pub fn is_translated(&self) -> bool {
        self.is_translated
    }

    /// How many frames have not left.
    pub fn held(&self) -> usize {
        (self.produced - self.released) as usize
    }

    /// The PVM sends a frame.
    pub fn produced(&mut self, packet: Packet, frame: &Frame, now: &Now) {
        self.produced += 1;
        let (id, all_input) = (self.produced, self.input_seq);
        let flow = self.flows.entry(packet.key).or_default();
        flow.see(packet.tcp.map(|tcp| tcp.seq));
        flow.reused |= packet.tcp.is_some_and(|tcp| tcp.has(SYN));
        let is_tcp = packet.tcp.is_some();
        let stamp = if is_tcp { flow.last_input } else { all_input };
        flow.produced.push_back(Produced {
            id,
            epoch: now.epoch,
            bytes: frame.bytes().to_vec(),
            packet,
            stamp,
            alone: now.is_alone,
        });
    }

    /// The SVM sends a frame.
    pub fn svm_sent(&mut self, packet: Packet, frame: &Frame, epoch: u64, svm_seq: u64) {
        let sent = SvmFrame {
            key: packet.key,
            epoch,
            bytes: frame.bytes().to_vec(),
            packet,
            used: false,
            reported: false,
        };
        let flow = self.flows.entry(packet.key).or_default();
        flow.see(packet.tcp.map(|tcp| tcp.seq));
        self.svm.insert(svm_seq, sent);
    }

    /// Input is delivered in a pair.
    pub fn input(&mut self, packet: Packet, input_seq: u64) {
        self.input_seq = input_seq;
        let flow = self.flows.entry(packet.key).or_default();
        flow.last_input = input_seq;
        flow.see(packet.tcp.filter(|tcp| tcp.has(ACK)).map(|tcp| tcp.ack));
        if let Some(tcp) = packet.tcp.filter(|tcp| tcp.has(ACK))
            && flow.left_high.is_some_and(|high| seq::le(tcp.ack, high))
        {
            flow.una = Some(seq::max_known(tcp.ack, flow.una));
        }
    }

    /// A secondary joins: input is counted anew, and what the last SVM said says nothing.
    pub fn joined(&mut self) {
        self.input_seq = 0;
        self.svm.clear();
        for flow in self.flows.values_mut() {
            flow.last_input = 0;
            flow.produced.iter_mut().for_each(|frame| frame.stamp = 0);
        }
        self.last_requested = None;
    }

    /// This host goes on alone.
    pub fn alone(&mut self) {
        let held = self.flows.values_mut().flat_map(|flow| &mut flow.produced);
        held.for_each(|frame| frame.alone = true);
        self.last_requested = None;
    }

    /// What a commit releases leaves in the order of production; older SVM output is forgotten.
    pub fn commit_begins(&mut self, comparing: u64) {
        self.last_by_checkpoint = 0;
        for flow in self.flows.values_mut() {
            let mut tcp = flow.produced.iter().filter_map(|frame| frame.packet.tcp);
            flow.reused = tcp.any(|tcp| tcp.has(SYN));
            flow.base = flow.left_high.map(|high| seq::max_known(high, flow.base));
        }
        self.svm.retain(|_, frame| frame.epoch >= comparing);
    }

    /// The pending output is what has not left, in the order of production.
    pub fn check_pending(&self, epoch: u64, pending: impl Iterator<Item = u64>) {
        let held = self.flows.values().flat_map(|flow| &flow.produced);
        let mut ids: Vec<u64> = held.filter(|f| f.epoch <= epoch).map(|f| f.id).collect();
        ids.sort_unstable();
        assert!(
            pending.eq(ids),
            "pending output is all that is held, in order"
        );
    }

    /// A frame leaves.
    pub fn released(&mut self, bytes: &[u8], packet: &Packet, right: Right, now: &Now) {
        assert!(!now.is_mute, "a frame left while mute");
        let flow = self
            .flows
            .get_mut(&packet.key)
            .expect("a frame that nobody sent");
        let frame = flow.produced.pop_front().expect("a frame that nobody sent");
        let is_it = if self.is_translated && packet.tcp.is_some() {
            // Without its payload while the handshake is not learnt.
            let own = payload(&frame.bytes, &frame.packet);
            [own, &[]].contains(&payload(bytes, packet))
        } else {
            frame.bytes == bytes
        };
        assert!(is_it, "changed, or out of order");
        self.released += 1;
        match right {
            Right::Checkpoint => {
                assert!(frame.epoch <= now.committed, "no commit covers it");
                assert!(
                    frame.id > self.last_by_checkpoint,
                    "not in the order of production"
                );
                self.last_by_checkpoint = frame.id;
            }
            Right::Alone => assert!(frame.alone, "this host is not alone"),
            Right::Match | Right::Free | Right::Policy => {
                assert!(!now.is_alone && !now.is_frozen);
                assert_eq!(frame.epoch, now.comparing, "of another epoch");
                assert!(frame.stamp <= now.input_ack, "the ACK rule");
                assert!(
                    right == Right::Match || now.us <= now.lease_until_us,
                    "no heartbeat"
                );
                let action = self.policy.action(&packet.key, Opener::Peer);
                match action {
                    PolicyAction::Hold => panic!("the policy says that it is held"),
                    PolicyAction::Release => assert_eq!(right, Right::Policy),
                    PolicyAction::Compare | PolicyAction::IgnoreBytes { .. } => {
                        assert!(right != Right::Policy, "no policy says so");
                        let said = self.svm.values_mut();
                        let said = said.filter(|s| s.key == packet.key && s.epoch == now.comparing);
                        flow.check_evidence(&frame, action, said.collect());
                    }
                }
            }
        }
        flow.note_left(&frame, right);
    }

    /// The secondary is told that an output has left.
    pub fn reported(&mut self, svm_seq: u64, now: &Now) {
        let frame = self
            .svm
            .get_mut(&svm_seq)
            .expect("reported, but not sent in this epoch");
        assert!(!frame.reported, "reported twice");
        frame.reported = true;
        let (key, epoch, packet) = (frame.key, frame.epoch, frame.packet);
        let flow = self.flows.entry(key).or_default();
        // A commit covers what only muteness holds back: it is pending output of the secondary.
        let is_covered = flow.produced.iter().any(|held| held.epoch <= now.committed);
        let action = self.policy.action(&key, Opener::Peer);
        match &packet.tcp {
            _ if action == PolicyAction::Release => {}
            _ if action == PolicyAction::Hold => panic!("the secondary keeps it"),
            Some(_) if is_covered || flow.is_scattered => {}
            Some(tcp) if tcp.has(RST) => assert!(flow.reset_left || flow.reused),
            Some(tcp) if tcp.has(SYN) => assert!(flow.isn.is_some(), "no SYN has left"),
            Some(tcp) => {
                let highs = [flow.left_high, flow.base, flow.una];
                let is_out = highs.iter().flatten().any(|high| seq::le(tcp.end(), *high));
                assert!(
                    is_out || flow.reused || !tcp.takes_space(),
                    "reported before it left"
                );
            }
            None if surplus_is_harmless(&key) || key.protocol() == Protocol::Fragment => {}
            None if frame.used => {}
            None => {
                // Equal datagrams stand for each other.
                let blanked = blank(&frame.bytes, &packet);
                let mut others = self.svm.values_mut().filter(|other| {
                    other.key == key && other.epoch == epoch && other.used && !other.reported
                });
                let other = others.find(|other| blank(&other.bytes, &other.packet) == blanked);
                other.expect("a datagram was reported before it left").used = false;
            }
        }
    }

    /// The secondary is told that the pending output of a checkpoint has left.
    pub fn pending_released(&mut self, epoch: u64, now: &Now) {
        assert!(!now.is_mute && epoch <= now.committed);
        assert!(self.last_pending < Some(epoch), "told twice");
        self.last_pending = Some(epoch);
        let mut held = self.flows.values().flat_map(|flow| &flow.produced);
        assert!(
            held.all(|frame| frame.epoch > epoch),
            "some of it has not left"
        );
    }

    /// A checkpoint is asked for.
    pub fn requested(&mut self, _divergence: &Divergence, now: &Now) {
        assert!(
            !now.is_alone && now.cut.is_none(),
            "nobody can take one now"
        );
        assert!(self.last_requested != Some(now.epoch), "asked for twice");
        self.last_requested = Some(now.epoch);
    }
}

impl FlowState {
    fn see(&mut self, number: Option<u32>) {
        let Some(number) = number else { return };
        let origin = *self.origin.get_or_insert(number);
        let distance = number.wrapping_sub(origin).min(origin.wrapping_sub(number));
        self.is_scattered |= distance > 1 << 28;
    }

    /// Whether the SVM said the same, as far as the client may still take it.
    fn check_evidence(&self, frame: &Produced, action: PolicyAction, mut said: Vec<&mut SvmFrame>) {
        let Some(tcp) = frame.packet.tcp else {
            check_datagram(frame, action, &mut said);
            return;
        };
        let mut tcp_said = said.iter().filter_map(|s| Some((s.packet.tcp?, s)));
        if tcp.has(RST) {
            assert!(
                tcp_said.any(|(other, _)| other.has(RST)),
                "a reset of one side"
            );
            return;
        }
        if tcp.has(SYN) && self.isn != Some(tcp.seq) {
            // Each guest has a number of its own; the data behind it is the same.
            let units = |bytes: &[u8], packet: &Packet| -> Vec<Unit> {
                let places = stream_bytes(bytes, packet);
                places.into_iter().map(|(_, unit)| unit).collect()
            };
            let own = units(&frame.bytes, &frame.packet);
            let is_same = |other: &SvmFrame| units(&other.bytes, &other.packet) == own;
            let flags = SYN | ACK | FIN;
            let same = |other: &&SvmFrame| {
                let its = other.packet.tcp.map_or(0, |its| its.flags & flags);
                its == tcp.flags & flags && is_same(other)
            };
            assert!(
                tcp_said.any(|(_, s)| same(&&**s)),
                "a handshake of one side"
            );
            return;
        }
        drop(tcp_said);
        let units_said = units_said(frame, &said);
        for (at, byte) in stream_bytes(&frame.bytes, &frame.packet) {
            let covered = |floor: &Option<u32>| floor.is_some_and(|floor| seq::lt(at, floor));
            let is_said = || units_said.contains(&(at, byte));
            let fine = self.is_scattered
                || covered(&self.base)
                || covered(&self.una)
                || self.ignores(action, at, byte)
                || is_said();
            assert!(fine, "output commit: {byte:?} at {at}");
        }
    }

    /// Whether the policy leaves out the byte at that place of the guest's stream.
    fn ignores(&self, action: PolicyAction, at: u32, unit: Unit) -> bool {
        let Some(isn) = self.isn else { return false };
        unit != Unit::End && action_ignores(action, at.wrapping_sub(isn.wrapping_add(1)))
    }

    fn note_left(&mut self, frame: &Produced, right: Right) {
        let Some(tcp) = frame.packet.tcp else { return };
        if tcp.has(RST) {
            self.reset_left = true;
            return;
        }
        if tcp.has(SYN) && self.isn != Some(tcp.seq) {
            self.isn = Some(tcp.seq);
            (self.base, self.una, self.left_high) = (None, None, None);
        }
        let is_covered = matches!(right, Right::Checkpoint | Right::Alone);
        if tcp.has(SYN) || is_covered {
            // A SYN's number is not the SVM's; its data is compared like any other.
            let end = if is_covered {
                tcp.end()
            } else {
                tcp.payload_seq()
            };
            self.base = Some(seq::max_known(end, self.base));
        }
        self.left_high = Some(seq::max_known(tcp.end(), self.left_high));
    }
}

fn payload<'a>(frame: &'a [u8], packet: &Packet) -> &'a [u8] {
    let from = packet.tcp.map_or(packet.l4, |tcp| tcp.payload_at);
    &frame[usize::from(from)..usize::from(packet.end)]
}

/// What the SVM said under the same headers.
fn units_said(frame: &Produced, said: &[&mut SvmFrame]) -> BTreeSet<(u32, Unit)> {
    let signature = header_signature(&frame.bytes, &frame.packet);
    let alike = said
        .iter()
        .filter(|s| header_signature(&s.bytes, &s.packet) == signature);
    alike
        .flat_map(|s| stream_bytes(&s.bytes, &s.packet))
        .collect()
}

fn check_datagram(frame: &Produced, action: PolicyAction, said: &mut [&mut SvmFrame]) {
    if frame.packet.key.protocol() == Protocol::Fragment {
        let units_said = units_said(frame, said);
        for place in stream_bytes(&frame.bytes, &frame.packet) {
            let is_said = units_said.contains(&place);
            assert!(is_said, "output commit: {place:?} of a fragment");
        }
        return;
    }
    let counted = |bytes: &[u8], packet: &Packet| {
        let mut counted = blank(bytes, packet);
        let payload = payload_at(packet);
        for (n, byte) in counted.iter_mut().skip(payload).enumerate() {
            *byte = if action_ignores(action, n as u32) {
                0
            } else {
                *byte
            };
        }
        counted
    };
    let own = counted(&frame.bytes, &frame.packet);
    let same = |s: &&mut &mut SvmFrame| !s.used && counted(&s.bytes, &s.packet) == own;
    let same = said.iter_mut().find(same);
    same.expect("output commit: the SVM did not send this datagram")
        .used = true;
}

/// Where the payload of a datagram begins.
fn payload_at(packet: &Packet) -> usize {
    let header = match packet.key.protocol() {
        Protocol::Udp | Protocol::Icmp | Protocol::Icmpv6 => 8,
        _ => 0,
    };
    usize::from(packet.l4) + header
}

fn action_ignores(action: PolicyAction, place: u32) -> bool {
    match action {
        PolicyAction::IgnoreBytes { from, end } => {
            from <= place && (place < end || end == u32::MAX)
        }
        _ => false,
    }
}

/// Address resolution runs on the guests' own timers.
fn surplus_is_harmless(key: &FlowKey) -> bool {
    matches!(key.protocol(), Protocol::Arp | Protocol::Icmpv6)
}
