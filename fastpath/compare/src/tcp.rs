//! One TCP flow as two byte streams: what the PVM holds against what the SVM has sent.
//!
//! Invariants: a PVM segment counts as equal only when every byte that the client does not have
//! yet, by commit (base) or by its own ACK (una), equals a byte that the SVM put at the same
//! place; SVM segments stay as history until the client's ACK passes them, so that retransmissions
//! and overlaps are compared too (rule 8). Segmentation, order and repetition do not matter. All
//! numbers are in the PVM's guest space.
//!
//! Does not know epochs, the ACK rule, deadlines or leases: the path does.

use alloc::vec::Vec;

use crate::cause::{Cause, Divergence, Shown};
use crate::flow::FlowKey;
use crate::frames::{Frames, Token};
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::seq;
use crate::table::Held;
use crate::wire::tcp::{ACK, CWR, ECE, FIN, RST, SYN, Tcp, URG};
use crate::wire::{Packet, header_difference};

/// What the contents of the next frame allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// The SVM has sent the same.
    Matched,
    /// Nothing in it needs a counterpart.
    Free,
    /// The SVM has not sent enough yet.
    Wait,
    /// The SVM has sent something else.
    Differs(Divergence),
}

#[derive(Debug)]
struct SvmSegment {
    tcp: Tcp,
    packet: Packet,
    incarnation: u32,
    token: Token,
    svm_seq: u64,
    at_us: u64,
    reported: bool,
}

impl SvmSegment {
    fn holds(&self, incarnation: u32, at: u32) -> bool {
        self.incarnation == incarnation
            && seq::le(self.tcp.payload_seq(), at)
            && seq::lt(at, self.tcp.payload_end())
    }

    fn has_fin_at(&self, incarnation: u32, at: u32) -> bool {
        self.incarnation == incarnation && self.tcp.has(FIN) && self.tcp.payload_end() == at
    }
}

/// The state of one TCP flow. An *incarnation* counts the connections between the same ports: it
/// goes up on each side with each new initial sequence number.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// Sorted by incarnation, then sequence number; history included.
    svm: Vec<SvmSegment>,
    /// SYNs and resets of the SVM that have not been matched.
    svm_syns: Vec<SvmSegment>,
    svm_resets: Vec<SvmSegment>,
    /// Incarnation of the latest PVM frame, of the latest SVM frame, of what is judged now.
    pvm_incarnation: u32,
    svm_incarnation: u32,
    incarnation: u32,
    pvm_isn: Option<u32>,
    svm_isn: Option<u32>,
    /// The judged incarnation's SYN or SYN-ACK has left.
    syn_left: bool,
    /// Below it everything is covered by a commit.
    base: Option<u32>,
    /// Below it the client has acknowledged everything.
    una: Option<u32>,
    /// Highest end of what has left.
    left_high: Option<u32>,
    /// Highest end of what the PVM has produced.
    pvm_high: Option<u32>,
    history_bytes: usize,
}

impl Stream {
    /// Takes note of a segment that the PVM produced; gives its incarnation.
    pub(crate) fn produced(&mut self, tcp: &Tcp) -> u32 {
        if tcp.has(SYN) && self.pvm_isn != Some(tcp.seq) {
            self.pvm_incarnation += 1;
            self.pvm_isn = Some(tcp.seq);
            self.pvm_high = None;
        }
        if !tcp.has(RST) {
            self.pvm_high = Some(seq::max_known(tcp.end(), self.pvm_high));
        }
        self.pvm_incarnation
    }

    /// Whether SVM output waits for a PVM counterpart.
    pub(crate) fn has_unmatched_svm(&self) -> bool {
        !self.svm_syns.is_empty()
            || !self.svm_resets.is_empty()
            || self.svm.iter().any(|segment| !segment.reported)
    }

    /// Since when the SVM's reset or SYN has had no PVM counterpart.
    pub(crate) fn surplus_since_us(&self) -> Option<u64> {
        self.svm_resets
            .iter()
            .chain(&self.svm_syns)
            .map(|segment| segment.at_us)
            .min()
    }

    /// The client acknowledged `ack`. What was never sent cannot be acknowledged.
    pub(crate) fn acknowledged<F: Frames + ?Sized>(
        &mut self,
        ack: u32,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        let sent = self.left_high.is_some_and(|high| seq::le(ack, high));
        if sent && self.una.is_none_or(|una| seq::lt(una, ack)) {
            self.una = Some(ack);
            self.prune(usize::MAX, ledger, frames);
        }
    }

    /// Where bytes begin to need a counterpart.
    fn floor(&self, from: u32) -> u32 {
        seq::max_known(seq::max_known(from, self.base), self.una)
    }

    fn has_left(&self, end: u32) -> bool {
        self.left_high.is_some_and(|high| seq::le(end, high))
    }

    /// Judges the flow's next frame.
    pub(crate) fn judge<F: Frames + ?Sized>(
        &mut self,
        head: &mut Held,
        tcp: &Tcp,
        ledger: &mut Ledger,
        frames: &mut F,
    ) -> Content {
        if head.incarnation != self.incarnation {
            self.enter(head.incarnation, ledger, frames);
        }
        if tcp.has(RST) {
            self.judge_reset(head, tcp, frames)
        } else if tcp.has(SYN) {
            self.judge_syn(head, tcp, frames)
        } else if tcp.takes_space() {
            self.judge_bytes(head, tcp, frames)
        } else {
            Content::Free
        }
    }

    fn judge_reset<F: Frames + ?Sized>(&self, head: &Held, tcp: &Tcp, frames: &F) -> Content {
        let counterpart = self
            .svm_resets
            .iter()
            .find(|s| s.incarnation == head.incarnation);
        let Some(other) = counterpart else {
            return Content::Wait;
        };
        if tcp.flags & ACK != other.tcp.flags & ACK {
            return Content::Differs(Divergence::plain(Cause::Flags, Some(head.packet.key)));
        }
        same_message(head, tcp, other, frames)
    }

    fn judge_syn<F: Frames + ?Sized>(&self, head: &Held, tcp: &Tcp, frames: &F) -> Content {
        if self.syn_left {
            return Content::Free;
        }
        let counterpart = self
            .svm_syns
            .iter()
            .find(|s| s.incarnation == head.incarnation);
        let Some(other) = counterpart else {
            return Content::Wait;
        };
        const COUNTED: u8 = SYN | ACK | FIN | ECE | CWR | URG;
        if tcp.flags & COUNTED != other.tcp.flags & COUNTED {
            return Content::Differs(Divergence::plain(Cause::Flags, Some(head.packet.key)));
        }
        if tcp.options != other.tcp.options {
            return Content::Differs(Divergence::plain(Cause::SynOptions, Some(head.packet.key)));
        }
        same_message(head, tcp, other, frames)
    }

    fn judge_bytes<F: Frames + ?Sized>(&self, head: &mut Held, tcp: &Tcp, frames: &F) -> Content {
        let key = head.packet.key;
        let mut at = self.floor(tcp.payload_seq());
        if seq::le(tcp.end(), at) {
            return Content::Free;
        }
        at = seq::max_known(at, head.matched_to);
        while seq::lt(at, tcp.payload_end()) {
            let Some(other) = self.svm.iter().find(|s| s.holds(head.incarnation, at)) else {
                head.matched_to = Some(at);
                return self.missing_byte(head, tcp, at, frames);
            };
            if let Some(divergence) = different_headers(head, tcp, other, frames) {
                return Content::Differs(divergence);
            }
            let end = seq::min(tcp.payload_end(), other.tcp.payload_end());
            let same = compare_bytes(
                key,
                (&head.token, tcp),
                (&other.token, &other.tcp),
                at,
                end,
                frames,
            );
            if let Some(divergence) = same {
                return Content::Differs(divergence);
            }
            at = end;
        }
        head.matched_to = Some(at);
        if tcp.has(FIN) && !self.svm.iter().any(|s| s.has_fin_at(head.incarnation, at)) {
            let goes_on = self.svm.iter().any(|s| s.holds(head.incarnation, at));
            return if goes_on {
                Content::Differs(Divergence::plain(Cause::Length, Some(key)))
            } else {
                Content::Wait
            };
        }
        if self.has_left(tcp.end()) {
            Content::Free
        } else {
            Content::Matched
        }
    }

    /// The SVM has no byte at `at`: perhaps not yet, perhaps its stream ends there.
    fn missing_byte<F: Frames + ?Sized>(
        &self,
        head: &Held,
        tcp: &Tcp,
        at: u32,
        frames: &F,
    ) -> Content {
        if !self.svm.iter().any(|s| s.has_fin_at(head.incarnation, at)) {
            return Content::Wait;
        }
        let offset = at.wrapping_sub(tcp.payload_seq());
        let from = usize::from(tcp.payload_at) + offset as usize;
        let left = usize::from(tcp.payload_len) - offset as usize;
        let primary = Shown::read(left, |out| frames.copy_out(&head.token, from, out));
        let plain = Divergence::plain(Cause::Length, Some(head.packet.key));
        Content::Differs(Divergence {
            offset,
            primary,
            ..plain
        })
    }

    /// The frame that was judged has left.
    pub(crate) fn left<F: Frames + ?Sized>(
        &mut self,
        head: &Held,
        tcp: &Tcp,
        limits: &Limits,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        if tcp.has(RST) {
            let counterpart = self
                .svm_resets
                .iter()
                .position(|s| s.incarnation == head.incarnation);
            if let Some(at) = counterpart {
                let segment = self.svm_resets.remove(at);
                ledger.settle_svm(segment.svm_seq, segment.token, frames);
            }
            return;
        }
        if !tcp.takes_space() {
            return;
        }
        if tcp.has(SYN) {
            self.syn_left = true;
            self.base = Some(seq::max_known(tcp.end(), self.base));
            self.settle_syns(head.incarnation, ledger, frames);
        }
        self.left_high = Some(seq::max_known(tcp.end(), self.left_high));
        self.report_left(ledger);
        self.prune(limits.max_history_bytes, ledger, frames);
    }

    fn settle_syns<F: Frames + ?Sized>(
        &mut self,
        incarnation: u32,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        for segment in self
            .svm_syns
            .extract_if(.., |s| s.incarnation == incarnation)
        {
            ledger.settle_svm(segment.svm_seq, segment.token, frames);
        }
    }

    /// Reports the SVM's segments all of whose bytes have left (rule 9).
    fn report_left(&mut self, ledger: &mut Ledger) {
        let Some(high) = self.left_high else { return };
        for segment in &mut self.svm {
            if !segment.reported
                && segment.incarnation == self.incarnation
                && seq::le(segment.tcp.end(), high)
            {
                segment.reported = true;
                self.history_bytes += usize::from(segment.tcp.payload_len);
                ledger.report_svm(segment.svm_seq);
            }
        }
    }

    /// Gives up history that the client has acknowledged, and the oldest above `max_bytes`.
    fn prune<F: Frames + ?Sized>(&mut self, max_bytes: usize, ledger: &mut Ledger, frames: &mut F) {
        let floor = match (self.una, self.base) {
            (Some(una), base) => Some(seq::max_known(una, base)),
            (None, base) => base,
        };
        let mut at = 0;
        while let Some(segment) = self.svm.get(at) {
            let covered = floor.is_some_and(|floor| seq::le(segment.tcp.end(), floor));
            if segment.reported && (covered || self.history_bytes > max_bytes) {
                let segment = self.svm.remove(at);
                self.history_bytes -= usize::from(segment.tcp.payload_len);
                ledger.stats.history_dropped += u64::from(!covered);
                ledger.recycle_svm(segment.token, frames);
            } else {
                at += 1;
            }
        }
    }

    /// The PVM's next connection between the same ports begins to be judged.
    fn enter<F: Frames + ?Sized>(&mut self, incarnation: u32, ledger: &mut Ledger, frames: &mut F) {
        self.incarnation = incarnation;
        self.syn_left = false;
        (self.base, self.una, self.left_high) = (None, None, None);
        self.history_bytes = 0;
        for list in [&mut self.svm, &mut self.svm_syns, &mut self.svm_resets] {
            for segment in list.extract_if(.., |s| s.incarnation < incarnation) {
                ledger.recycle_svm(segment.token, frames);
            }
        }
    }

    /// Takes a segment of the SVM. Gives a divergence when the SVM contradicts itself.
    pub(crate) fn svm_output<F: Frames + ?Sized>(
        &mut self,
        at_us: u64,
        svm_seq: u64,
        (token, packet, tcp): (Token, Packet, Tcp),
        ledger: &mut Ledger,
        frames: &mut F,
    ) -> Option<Divergence> {
        // After learning, the secondary translates a repeated SYN to the PVM's number.
        let known = self.svm_isn == Some(tcp.seq)
            || (self.pvm_isn == Some(tcp.seq) && self.svm_incarnation == self.pvm_incarnation);
        if tcp.has(SYN) && !known {
            self.svm_incarnation += 1;
            self.svm_isn = Some(tcp.seq);
        }
        let incarnation = self.svm_incarnation;
        let segment = SvmSegment {
            tcp,
            packet,
            incarnation,
            token,
            svm_seq,
            at_us,
            reported: false,
        };
        let repeated_syn = tcp.has(SYN) && self.syn_left && incarnation == self.incarnation;
        if incarnation < self.incarnation || !(tcp.takes_space() || tcp.has(RST)) || repeated_syn {
            ledger.settle_svm(svm_seq, segment.token, frames);
        } else if tcp.has(RST) {
            self.svm_resets.push(segment);
        } else if tcp.has(SYN) {
            self.svm_syns.push(segment);
        } else {
            return self.insert(segment, ledger, frames);
        }
        None
    }

    fn insert<F: Frames + ?Sized>(
        &mut self,
        segment: SvmSegment,
        ledger: &mut Ledger,
        frames: &mut F,
    ) -> Option<Divergence> {
        let (incarnation, from, end) = (
            segment.incarnation,
            segment.tcp.payload_seq(),
            segment.tcp.end(),
        );
        let current = incarnation == self.incarnation;
        if current && seq::le(end, self.floor(from)) {
            ledger.settle_svm(segment.svm_seq, segment.token, frames);
            return None;
        }
        let divergence = self.contradiction(&segment, frames);
        let before = |s: &SvmSegment| {
            s.incarnation < incarnation
                || (s.incarnation == incarnation && seq::le(s.tcp.payload_seq(), from))
        };
        let at = self.svm.iter().rposition(before).map_or(0, |at| at + 1);
        self.svm.insert(at, segment);
        if current && self.has_left(end) {
            self.report_left(ledger);
        }
        divergence
    }

    /// Compares a new SVM segment with what the SVM sent before at the same place.
    fn contradiction<F: Frames + ?Sized>(
        &self,
        new: &SvmSegment,
        frames: &F,
    ) -> Option<Divergence> {
        self.svm
            .iter()
            .filter(|old| old.incarnation == new.incarnation)
            .find_map(|old| {
                let from = seq::max(new.tcp.payload_seq(), old.tcp.payload_seq());
                let end = seq::min(new.tcp.payload_end(), old.tcp.payload_end());
                seq::lt(from, end).then_some(())?;
                let sides = ((&old.token, &old.tcp), (&new.token, &new.tcp));
                compare_bytes(new.packet.key, sides.0, sides.1, from, end, frames)
            })
    }

    /// A commit covers everything that the PVM has produced (rule 8): SVM output is forgotten.
    pub(crate) fn rebase<F: Frames + ?Sized>(&mut self, ledger: &mut Ledger, frames: &mut F) {
        for list in [&mut self.svm, &mut self.svm_syns, &mut self.svm_resets] {
            list.drain(..)
                .for_each(|segment| ledger.recycle_svm(segment.token, frames));
        }
        if self.incarnation != self.pvm_incarnation {
            self.una = None;
        }
        self.incarnation = self.pvm_incarnation;
        self.svm_incarnation = self.pvm_incarnation;
        self.svm_isn = self.pvm_isn;
        self.syn_left = self.pvm_isn.is_some();
        self.base = self.pvm_high;
        self.left_high = self.pvm_high;
        self.history_bytes = 0;
    }
}

/// Compares headers and payload of two frames that stand for each other one to one.
fn same_message<F: Frames + ?Sized>(
    head: &Held,
    tcp: &Tcp,
    other: &SvmSegment,
    frames: &F,
) -> Content {
    if let Some(divergence) = different_headers(head, tcp, other, frames) {
        return Content::Differs(divergence);
    }
    let n = usize::from(tcp.payload_len.min(other.tcp.payload_len));
    let (a_at, b_at) = (
        usize::from(tcp.payload_at),
        usize::from(other.tcp.payload_at),
    );
    let plain = Divergence::plain(Cause::Length, Some(head.packet.key));
    match frames.first_difference(&head.token, a_at, &other.token, b_at, n) {
        Some(at) => {
            let offset = at as u32;
            Content::Differs(Divergence {
                cause: Cause::Payload,
                offset,
                ..plain
            })
        }
        None if tcp.payload_len != other.tcp.payload_len => Content::Differs(plain),
        None => Content::Matched,
    }
}

fn different_headers<F: Frames + ?Sized>(
    head: &Held,
    tcp: &Tcp,
    other: &SvmSegment,
    frames: &F,
) -> Option<Divergence> {
    let (a, b) = (frames.header(&head.token), frames.header(&other.token));
    let key = Some(head.packet.key);
    if let Some(offset) = header_difference(a, &head.packet, b, &other.packet) {
        return Some(Divergence {
            offset,
            ..Divergence::plain(Cause::Header, key)
        });
    }
    let urgent = |tcp: &Tcp| {
        tcp.has(URG)
            .then(|| tcp.seq.wrapping_add(u32::from(tcp.urgent)))
    };
    (urgent(tcp) != urgent(&other.tcp)).then(|| Divergence::plain(Cause::Flags, key))
}

/// Compares the bytes `from..end` of the stream in two segments that both hold them.
fn compare_bytes<F: Frames + ?Sized>(
    key: FlowKey,
    (a, a_tcp): (&Token, &Tcp),
    (b, b_tcp): (&Token, &Tcp),
    from: u32,
    end: u32,
    frames: &F,
) -> Option<Divergence> {
    let place = |tcp: &Tcp| {
        let offset = from.wrapping_sub(tcp.payload_seq()) as usize;
        (
            usize::from(tcp.payload_at) + offset,
            usize::from(tcp.payload_len) - offset,
        )
    };
    let ((a_at, a_len), (b_at, b_len)) = (place(a_tcp), place(b_tcp));
    let n = end.wrapping_sub(from) as usize;
    let at = frames.first_difference(a, a_at, b, b_at, n)?;
    Some(Divergence {
        cause: Cause::Payload,
        flow: Some(key),
        offset: from.wrapping_sub(a_tcp.payload_seq()) + at as u32,
        primary: Shown::read(a_len - at, |out| frames.copy_out(a, a_at + at, out)),
        secondary: Shown::read(b_len - at, |out| frames.copy_out(b, b_at + at, out)),
    })
}
