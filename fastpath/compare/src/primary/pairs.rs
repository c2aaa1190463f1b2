//! A frame of each guest, both at hand at once: judged side by side, before either is put anywhere.
//!
//! Invariants: what leaves here would have left by [`PrimaryPath::handle_guest_tx`] and then
//! [`PrimaryPath::handle_svm_output`] as well, with the same counters, and the same state is left behind
//! but for timers, which may be early anyway; two frames that take more than a look change
//! nothing. One thing is better: where the SVM's unmatched output has taken all room, a pair still leaves.
//!
//! Does not look for counterparts: who has frames of both guests offers them in the order in which
//! they came, and most often the guests send in the same order.

use core::ops::Range;

use super::PrimaryPath;
use crate::flow::FlowKey;
use crate::frames::{Frames, HEADER_MAX, Token};
use crate::ledger::{Payload, SvmFrame};
use crate::stats::PrimaryStats;
use crate::table::{Flow, FlowId, Flows, seen};
use crate::wire::{SvmSegment, TCP_PROTOCOL, Tcp, Twins, UDP_PROTOCOL};

/// Where an IPv4 packet without VLAN tags names its protocol.
const PROTOCOL_AT: usize = 23;

/// Takes pairs of frames as long as nothing else happens: see [`PrimaryPath::pairs`].
#[derive(Debug)]
pub struct Pairs<'a> {
    path: &'a mut PrimaryPath,
    now_us: u64,
    used_s: u32,
    max_history_bytes: u32,
    /// Pairs that have left.
    matched: u64,
    /// The secondary has acknowledged all input.
    has_all_input: bool,
    /// Whose addresses were learnt last, as they are on the wire.
    sender: (u64, u32),
}

impl PrimaryPath {
    /// Takes frames of both guests by twos. `None` while each frame has to be looked at for itself:
    /// not in a pair, between two epochs, with rules for single flows, with translations, and
    /// while there are actions that [`PrimaryPath::poll_action`] has not given out.
    pub fn pairs(&mut self, now_us: u64, epoch: u64) -> Option<Pairs<'_>> {
        let is_usual = self.paired
            && !self.muted
            && !self.frozen
            && epoch == self.epoch
            && epoch == self.comparing
            && self.policy.is_empty()
            && self.client.len() == 0
            && !self.limits.canary_equal
            && self.inherited.retains_nothing()
            && self.ledger.is_settled()
            && self.held.len() + 1 < self.limits.max_held_frames;
        is_usual.then(|| Pairs {
            used_s: (now_us / 1_000_000) as u32,
            max_history_bytes: self.limits.history_bytes(),
            has_all_input: self.input_seq <= self.input_ack,
            path: self,
            now_us,
            matched: 0,
            // Of nobody: there the EtherType is.
            sender: (0, 0),
        })
    }
}

/// What became of two frames.
#[derive(Debug)]
#[must_use = "frames leave by it"]
pub enum Passed {
    /// Nothing: this says nothing about them, they are for [`PrimaryPath::handle_guest_tx`] and
    /// [`PrimaryPath::handle_svm_output`].
    Neither,
    /// The PVM's frame is released by match ([`crate::Right::Match`]): the caller sends it. The SVM's
    /// counts as reported, and nobody needs it any more.
    Both,
    /// The same, and the SVM's frame is wanted: for [`Pairs::keep`], as far as there is room.
    BothAndKeep(History),
}

/// A segment of the SVM that retransmissions will be compared with.
#[derive(Debug)]
pub struct History {
    segment: SvmSegment,
    flow: FlowId,
}

impl Pairs<'_> {
    /// Takes two whole frames that nobody can write to.
    #[inline(always)]
    pub fn take(&mut self, pvm: &[u8], svm: &[u8]) -> Passed {
        let equal = |range: Range<usize>| {
            let ours = pvm.get(range.clone());
            ours.is_some() && ours == svm.get(range)
        };
        self.take_by(view(pvm), view(svm), equal)
    }

    /// Takes two frames whose payload lies elsewhere: headers that nobody can write to, of up to
    /// [`HEADER_MAX`] bytes, and the lengths of the frames. `equal` says whether both have the same
    /// bytes in a range, which lies in both; what leaves is what it has compared (invariant 7).
    #[inline(always)]
    pub fn take_by(
        &mut self,
        pvm: (&[u8], usize),
        svm: (&[u8], usize),
        equal: impl FnOnce(Range<usize>) -> bool,
    ) -> Passed {
        // What is told apart here is not asked for again.
        match pvm.0.get(PROTOCOL_AT) {
            Some(&TCP_PROTOCOL) => self.take_segment(pvm, svm, equal),
            Some(&UDP_PROTOCOL) => self.take_datagram(pvm, svm, equal),
            _ => None,
        }
        .unwrap_or(Passed::Neither)
    }

    #[inline(always)]
    fn take_segment(
        &mut self,
        pvm: (&[u8], usize),
        svm: (&[u8], usize),
        equal: impl FnOnce(Range<usize>) -> bool,
    ) -> Option<Passed> {
        let twins = Twins::segments(pvm, svm)?;
        let path = &mut *self.path;
        let (payload, name) = (twins.payload(), twins.name());
        let end = twins.seq().wrapping_add(payload.len() as u32);
        let goes_on = |flow: &Flow| flow.stream.may_go_on(twins.seq(), end);
        let id = match path.flows.steady_mut(&name) {
            Some((id, flow)) if self.has_all_input && goes_on(flow) => {
                if !equal(payload) {
                    return None;
                }
                flow.use_again(self.used_s);
                flow.stream.goes_on(end);
                id
            }
            _ => {
                let packet = twins.packet(pvm.0)?;
                let tcp = packet.tcp.as_ref()?;
                let input = (path.input_seq, path.input_ack);
                let (id, flow) = next_segment(&mut path.flows, &packet.key, tcp, input)?;
                if !equal(payload) {
                    return None;
                }
                flow.use_again(self.used_s);
                if flow.stream.left_by_twos(tcp) {
                    flow.seen |= seen::STEADY;
                    path.flows.remember(name, id);
                }
                id
            }
        };
        self.count(&twins, pvm.0);
        let segment = twins.svm_segment();
        Some(Passed::BothAndKeep(History { segment, flow: id }))
    }

    #[inline(always)]
    fn take_datagram(
        &mut self,
        pvm: (&[u8], usize),
        svm: (&[u8], usize),
        equal: impl FnOnce(Range<usize>) -> bool,
    ) -> Option<Passed> {
        let twins = Twins::datagrams(pvm, svm)?;
        let flows = &mut self.path.flows;
        // An answer may acknowledge any input (rule 5).
        if !self.has_all_input {
            return None;
        }
        let name = twins.name();
        match flows.steady_mut(&name) {
            Some((_, flow)) => {
                if !equal(twins.payload()) {
                    return None;
                }
                flow.use_again(self.used_s);
            }
            None => {
                let packet = twins.packet(pvm.0)?;
                let (id, flow) = next_datagram(flows, &packet.key)?;
                if !equal(twins.payload()) {
                    return None;
                }
                flow.use_again(self.used_s);
                flow.seen |= seen::STEADY;
                flows.remember(name, id);
            }
        }
        self.count(&twins, pvm.0);
        Some(Passed::Both)
    }

    #[inline(always)]
    fn count(&mut self, twins: &Twins<'_>, pvm: &[u8]) {
        self.matched += 1;
        if self.sender != twins.sender() {
            self.sender = twins.sender();
            self.learn(twins, pvm);
        }
    }

    #[cold]
    fn learn(&mut self, twins: &Twins<'_>, pvm: &[u8]) {
        if let Some(packet) = twins.packet(pvm) {
            self.path.addresses.learn(pvm, &packet);
        }
    }

    /// Keeps the SVM's segment, as [`PrimaryPath::handle_svm_output`] does with one that has left.
    #[inline(always)]
    pub fn keep<F: Frames + ?Sized>(
        &mut self,
        frames: &mut F,
        history: History,
        svm_seq: u64,
        token: Token,
    ) {
        let path = &mut *self.path;
        let is_full = path.ledger.svm.len() >= path.limits.max_svm_frames;
        if is_full && !path.drop_history(frames) {
            return frames.release(token);
        }
        let History { segment, flow: id } = history;
        let Some(flow) = path.flows.history_mut(id) else {
            return frames.release(token);
        };
        let frame = SvmFrame {
            packet: segment.layout(),
            token,
            epoch: path.comparing,
            svm_seq,
            at_us: self.now_us,
            flow: id,
            incarnation: flow.stream.incarnation(),
            reported: true,
            payload: Payload::Bytes,
        };
        flow.stream.keeps(segment.payload_len());
        path.ledger.svm.push_back(&mut flow.svm, frame);
        flow.limit_history(self.max_history_bytes, &mut path.ledger, frames);
    }
}

/// The flow that a segment is the next one of, when nothing else is open there. `input`: the last input, and the
/// last that the secondary has acknowledged.
#[inline(never)]
fn next_segment<'a>(
    flows: &'a mut Flows,
    key: &FlowKey,
    tcp: &Tcp,
    (input_seq, input_ack): (u64, u64),
) -> Option<(FlowId, &'a mut Flow)> {
    let (id, flow) = flows.present_mut(key)?;
    // A flow without known input may have had some before it was known (rule 5).
    let stamp = match flow.last_input_seq {
        0 => input_seq,
        seq => seq,
    };
    let is_next = flow.must_wait(flow.stream.pvm_incarnation(), tcp) && flow.is_at_rest();
    (is_next && stamp <= input_ack).then_some((id, flow))
}

/// The flow that a datagram is the next one of, when nothing else is open there.
#[inline(never)]
fn next_datagram<'a>(flows: &'a mut Flows, key: &FlowKey) -> Option<(FlowId, &'a mut Flow)> {
    let (id, flow) = flows.present_mut(key)?;
    (flow.svm.is_empty() && flow.is_at_rest()).then_some((id, flow))
}

#[inline(always)]
fn view(frame: &[u8]) -> (&[u8], usize) {
    (&frame[..frame.len().min(HEADER_MAX)], frame.len())
}

impl Drop for Pairs<'_> {
    fn drop(&mut self) {
        let PrimaryStats {
            produced,
            svm_output,
            compared,
            released_by_match,
            released_data_by_match,
            ..
        } = &mut self.path.ledger.stats;
        for count in [
            produced,
            svm_output,
            compared,
            released_by_match,
            released_data_by_match,
        ] {
            *count += self.matched;
        }
        self.path.next_id += self.matched;
    }
}
