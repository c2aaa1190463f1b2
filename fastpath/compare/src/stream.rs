//! One TCP flow as two byte streams: what the PVM holds against what the SVM has sent.
//!
//! Invariants: a PVM segment counts as equal only when every byte that the client does not have
//! yet, by commit (base) or by its own ACK (una), equals a byte that the SVM put at the same
//! place; SVM segments stay as history until the client's ACK passes them, so that retransmissions
//! and overlaps are compared too (rule 8). Segmentation, order and repetition do not matter. All
//! numbers are in the PVM's guest space.
//!
//! Does not know epochs, the ACK rule, deadlines or leases: the path does.

use crate::cause::{Cause, Divergence, Shown};
use crate::flow::FlowKey;
use crate::frames::{Frames, Token};
use crate::ledger::{Ledger, SvmFrame};
use crate::list::{Ends, Lists, NIL};
use crate::seq;
use crate::span::Span;
use crate::table::{Flow, Held, seen};
use crate::wire::header_difference;
use crate::wire::tcp::{ACK, CWR, ECE, FIN, RST, SYN, Tcp, URG};

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

/// A sequence number that may be unknown.
#[derive(Debug, Clone, Copy)]
enum Mark {
    PvmIsn,
    SvmIsn,
    /// Initial number of the connection that is judged.
    JudgedIsn,
    /// Below it everything is covered by a commit.
    Base,
    /// Below it the client has acknowledged everything.
    Una,
    /// Highest end of what has left.
    LeftHigh,
    /// Highest end of what the PVM has produced.
    PvmHigh,
    /// Highest end of the SVM's payload in its latest incarnation.
    SvmHigh,
}

/// The numbers of one TCP flow. An *incarnation* counts the connections between the same ports: it
/// goes up on each side with each new initial sequence number.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    marks: [u32; 8],
    known: u8,
    /// The judged incarnation's SYN or SYN-ACK has left.
    syn_left: bool,
    /// The SVM's latest incarnation has sent a FIN.
    svm_fin: bool,
    /// Incarnation of the latest PVM frame, of the latest SVM frame, of what is judged now.
    pvm_incarnation: u32,
    svm_incarnation: u32,
    incarnation: u32,
    history_bytes: u32,
}

impl Stream {
    fn get(&self, mark: Mark) -> Option<u32> {
        (self.known >> mark as u8 & 1 != 0).then(|| self.marks[mark as usize])
    }

    fn set(&mut self, mark: Mark, value: Option<u32>) {
        self.known &= !(1 << mark as u8);
        if let Some(value) = value {
            self.marks[mark as usize] = value;
            self.known |= 1 << mark as u8;
        }
    }

    fn raise(&mut self, mark: Mark, value: u32) {
        self.set(mark, Some(seq::max_known(value, self.get(mark))));
    }

    /// Takes note of a segment that the PVM produced; gives its incarnation.
    pub(crate) fn produced(&mut self, tcp: &Tcp) -> u32 {
        if tcp.has(SYN) && self.get(Mark::PvmIsn) != Some(tcp.seq) {
            self.pvm_incarnation += 1;
            self.set(Mark::PvmIsn, Some(tcp.seq));
            self.set(Mark::PvmHigh, None);
        }
        if !tcp.has(RST) {
            self.raise(Mark::PvmHigh, tcp.end());
        }
        self.pvm_incarnation
    }

    /// Where bytes begin to need a counterpart.
    fn floor(&self, from: u32) -> u32 {
        let from = seq::max_known(from, self.get(Mark::Base));
        seq::max_known(from, self.get(Mark::Una))
    }

    fn has_left(&self, end: u32) -> bool {
        self.get(Mark::LeftHigh)
            .is_some_and(|high| seq::le(end, high))
    }

    /// Whether `at` is not before anything that is marked.
    #[inline]
    fn is_beyond(&self, mark: Mark, at: u32) -> bool {
        self.get(mark).is_none_or(|high| seq::le(high, at))
    }

    /// The connection that is judged now.
    pub(crate) fn incarnation(&self) -> u32 {
        self.incarnation
    }

    /// Whether plain new data of both sides' connection may begin here, and nothing of the SVM's
    /// lies beyond.
    #[inline]
    pub(crate) fn expects(&self, incarnation: u32, tcp: &Tcp) -> bool {
        tcp.is_plain_data()
            && incarnation == self.incarnation
            && incarnation == self.svm_incarnation
            && !self.svm_fin
            && self.is_beyond(Mark::LeftHigh, tcp.seq)
            && self.is_beyond(Mark::SvmHigh, tcp.seq)
            && self.is_beyond(Mark::Base, tcp.seq)
            && self.is_beyond(Mark::Una, tcp.seq)
    }

    /// Both sides have sent this segment, and it has left.
    #[inline]
    pub(crate) fn left_exactly(&mut self, tcp: &Tcp) {
        let end = tcp.payload_end();
        self.set(Mark::LeftHigh, Some(end));
        self.set(Mark::SvmHigh, Some(end));
        self.history_bytes += u32::from(tcp.payload_len);
    }

    /// A commit covers everything that the PVM has produced (rule 8).
    pub(crate) fn rebase(&mut self) {
        if self.incarnation != self.pvm_incarnation {
            self.set(Mark::Una, None);
        }
        self.incarnation = self.pvm_incarnation;
        self.svm_incarnation = self.pvm_incarnation;
        self.set(Mark::SvmIsn, self.get(Mark::PvmIsn));
        self.set(Mark::JudgedIsn, self.get(Mark::PvmIsn));
        self.syn_left = self.get(Mark::PvmIsn).is_some();
        self.set(Mark::Base, self.get(Mark::PvmHigh));
        self.set(Mark::LeftHigh, self.get(Mark::PvmHigh));
        self.set(Mark::SvmHigh, None);
        self.svm_fin = false;
        self.history_bytes = 0;
    }

    /// The bytes that a policy leaves out, as they lie in the sequence space of this connection.
    /// Unknown, and so nothing, where its start has not been seen.
    pub(crate) fn ignored(&self, span: Option<Span>) -> Option<IgnoredBytes> {
        let start = self.get(Mark::JudgedIsn)?.wrapping_add(1);
        span.map(|span| IgnoredBytes { start, span })
    }
}

/// A span of the guest's stream whose bytes count as equal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IgnoredBytes {
    start: u32,
    span: Span,
}

fn tcp_of(frame: &SvmFrame) -> &Tcp {
    match &frame.packet.tcp {
        Some(tcp) => tcp,
        None => unreachable!("a TCP flow holds segments only"),
    }
}

/// What a segment counts for in the history: a FIN without payload takes a frame too.
fn size(tcp: &Tcp) -> u32 {
    u32::from(tcp.payload_len) + u32::from(tcp.has(FIN))
}

/// Guests choose the numbers, and comparisons mean little when they are far apart: whether a byte
/// is in a segment is asked by distance.
fn holds(frame: &SvmFrame, incarnation: u32, at: u32) -> bool {
    let tcp = tcp_of(frame);
    frame.incarnation == incarnation && tcp.payload_offset(at) < u32::from(tcp.payload_len)
}

/// TCP judgement of one flow.
impl Flow {
    /// The client acknowledged `ack`. What was never sent cannot be acknowledged.
    pub(crate) fn acknowledged<F: Frames + ?Sized>(
        &mut self,
        ack: u32,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        let stream = &mut self.stream;
        // Below the base the client may say what it likes: the commit covers it.
        let is_new = stream.get(Mark::Una).is_none_or(|una| seq::lt(una, ack))
            && stream.is_beyond(Mark::Base, ack);
        if is_new && stream.has_left(ack) {
            stream.set(Mark::Una, Some(ack));
            self.prune(u32::MAX, ledger, frames);
        }
    }

    /// Judges the flow's next frame.
    pub(crate) fn judge_segment<F: Frames + ?Sized>(
        &mut self,
        head: &mut Held,
        tcp: &Tcp,
        ignored: Option<Span>,
        ledger: &mut Ledger,
        frames: &mut F,
    ) -> Content {
        if tcp.flags & (SYN | RST) != 0 && self.is_answered_otherwise(tcp, ledger) {
            let key = Some(head.packet.key);
            return Content::Differs(Divergence::plain(Cause::Flags, key));
        }
        if head.incarnation != self.stream.incarnation {
            self.enter(head.incarnation, ledger, frames);
        }
        if tcp.has(RST) {
            self.judge_reset(head, tcp, ledger, frames)
        } else if tcp.has(SYN) {
            self.stream.set(Mark::JudgedIsn, Some(tcp.seq));
            self.judge_syn(head, tcp, ledger, frames)
        } else if tcp.takes_space() {
            let ignored = self.stream.ignored(ignored);
            self.judge_bytes(head, tcp, ignored, ledger, frames)
        } else {
            Content::Free
        }
    }

    fn counterpart<'a>(
        &self,
        head: &Held,
        flag: u8,
        ledger: &'a Ledger,
    ) -> Option<(u32, &'a SvmFrame)> {
        let mut control = ledger.svm.iter(&self.control);
        control.find(|(_, s)| s.incarnation == head.incarnation && tcp_of(s).has(flag))
    }

    fn judge_reset<F: Frames + ?Sized>(
        &self,
        head: &Held,
        tcp: &Tcp,
        ledger: &Ledger,
        frames: &F,
    ) -> Content {
        let flags = Content::Differs(Divergence::plain(Cause::Flags, Some(head.packet.key)));
        let Some((_, other)) = self.counterpart(head, RST, ledger) else {
            // All that the PVM sent before has left: what the SVM has beyond it, it sent instead.
            return if self.svm_goes_on(head.incarnation, ledger) {
                flags
            } else {
                Content::Wait
            };
        };
        if tcp.flags & ACK != tcp_of(other).flags & ACK {
            return flags;
        }
        same_message(head, tcp, other, frames)
    }

    /// One VM accepts a connection and the other refuses it: their answers to the peer's SYN, a
    /// SYN-ACK and a reset, acknowledge the same number.
    fn is_answered_otherwise(&self, tcp: &Tcp, ledger: &Ledger) -> bool {
        let opposite = if tcp.has(RST) { SYN } else { RST };
        tcp.has(ACK)
            && ledger.svm.iter(&self.control).any(|(_, other)| {
                let other = tcp_of(other);
                other.has(opposite | ACK) && other.ack == tcp.ack
            })
    }

    fn svm_goes_on(&self, incarnation: u32, ledger: &Ledger) -> bool {
        ledger
            .svm
            .get(self.mark)
            .is_some_and(|next| next.incarnation == incarnation)
    }

    fn judge_syn<F: Frames + ?Sized>(
        &self,
        head: &Held,
        tcp: &Tcp,
        ledger: &Ledger,
        frames: &F,
    ) -> Content {
        if self.stream.syn_left {
            return Content::Free;
        }
        let flags = Content::Differs(Divergence::plain(Cause::Flags, Some(head.packet.key)));
        let Some((_, other)) = self.counterpart(head, SYN, ledger) else {
            return if self.counterpart(head, RST, ledger).is_some() {
                flags
            } else {
                Content::Wait
            };
        };
        let other_tcp = tcp_of(other);
        const COUNTED: u8 = SYN | ACK | FIN | ECE | CWR | URG;
        if tcp.flags & COUNTED != other_tcp.flags & COUNTED {
            return flags;
        }
        let options = tcp.syn_options(frames.header(&head.token));
        if options != other_tcp.syn_options(frames.header(&other.token)) {
            return Content::Differs(Divergence::plain(Cause::SynOptions, Some(head.packet.key)));
        }
        same_message(head, tcp, other, frames)
    }

    fn judge_bytes<F: Frames + ?Sized>(
        &self,
        head: &mut Held,
        tcp: &Tcp,
        ignored: Option<IgnoredBytes>,
        ledger: &Ledger,
        frames: &F,
    ) -> Content {
        let mut at = self.stream.floor(tcp.payload_seq());
        if seq::le(tcp.end(), at) {
            return Content::Free;
        }
        at = seq::max_known(at, head.matched_to);
        let len = u32::from(tcp.payload_len);
        if tcp.payload_offset(at) > len {
            at = tcp.payload_seq();
        }
        let svm_end = self.svm_end(head.incarnation, ledger);
        while tcp.payload_offset(at) < len {
            // Where the SVM's stream ends, whatever it sends behind its FIN counts for nothing.
            if svm_end.is_some_and(|end| seq::le(end, at)) {
                return Content::Differs(self.too_long(head, tcp, at, frames));
            }
            let Some(other) = self.holder(head.incarnation, at, &ledger.svm) else {
                head.matched_to = Some(at);
                return self.wait_unless_reset(head, ledger);
            };
            if let Some(divergence) = different_headers(head, tcp, other, frames) {
                return Content::Differs(divergence);
            }
            let other_tcp = tcp_of(other);
            let left = |tcp: &Tcp| u32::from(tcp.payload_len) - tcp.payload_offset(at);
            let end = at.wrapping_add(left(tcp).min(left(other_tcp)));
            let end = svm_end.map_or(end, |svm_end| seq::min(end, svm_end));
            let sides = ((&head.token, tcp), (&other.token, other_tcp));
            let key = &head.packet.key;
            if let Some(divergence) = compare_bytes(key, sides, at, end, ignored, frames) {
                return Content::Differs(divergence);
            }
            at = end;
        }
        head.matched_to = Some(at);
        if tcp.has(FIN) {
            let Some(other) = self.fin_at(head.incarnation, at, ledger) else {
                return self.missing_fin(head, at, ledger);
            };
            if let Some(divergence) = different_headers(head, tcp, other, frames) {
                return Content::Differs(divergence);
            }
        }
        if self.stream.has_left(tcp.end()) {
            Content::Free
        } else {
            Content::Matched
        }
    }

    /// The SVM's segment that has the byte at `at`.
    fn holder<'a>(
        &self,
        incarnation: u32,
        at: u32,
        svm: &'a Lists<SvmFrame>,
    ) -> Option<&'a SvmFrame> {
        let stream = &self.stream;
        if incarnation == stream.svm_incarnation
            && stream
                .get(Mark::SvmHigh)
                .is_none_or(|high| seq::le(high, at))
        {
            return None;
        }
        // What holds a byte that has not left is not reported, so it is not before the mark.
        let is_new = stream
            .get(Mark::LeftHigh)
            .is_none_or(|high| seq::le(high, at));
        let head = if is_new { self.mark } else { self.svm.head };
        let from = Ends {
            head,
            tail: self.svm.tail,
        };
        svm.iter(&from)
            .map(|(_, frame)| frame)
            .take_while(|s| {
                s.incarnation < incarnation
                    || s.incarnation == incarnation && seq::le(tcp_of(s).payload_seq(), at)
            })
            .find(|s| holds(s, incarnation, at))
    }

    fn missing_fin(&self, head: &Held, at: u32, ledger: &Ledger) -> Content {
        if self.holder(head.incarnation, at, &ledger.svm).is_some() {
            Content::Differs(Divergence::plain(Cause::Length, Some(head.packet.key)))
        } else {
            self.wait_unless_reset(head, ledger)
        }
    }

    fn fin_at<'a>(&self, incarnation: u32, at: u32, ledger: &'a Ledger) -> Option<&'a SvmFrame> {
        if !self.stream.svm_fin && incarnation == self.stream.svm_incarnation {
            return None;
        }
        let is_fin = |s: &SvmFrame| {
            let tcp = tcp_of(s);
            s.incarnation == incarnation && tcp.has(FIN) && tcp.payload_end() == at
        };
        let mut all = ledger.svm.iter(&self.svm).map(|(_, frame)| frame);
        all.find(|frame| is_fin(frame))
    }

    /// Where the SVM's stream ends, once that is known.
    fn svm_end(&self, incarnation: u32, ledger: &Ledger) -> Option<u32> {
        if !self.stream.svm_fin && incarnation == self.stream.svm_incarnation {
            return None;
        }
        let all = ledger.svm.iter(&self.svm).map(|(_, frame)| frame);
        let of_this = all.filter(|frame| frame.incarnation == incarnation);
        let mut ends = of_this.map(tcp_of).filter(|tcp| tcp.has(FIN));
        ends.next().map(Tcp::payload_end)
    }

    /// The PVM's stream goes on at `at`, where the SVM's has ended.
    fn too_long<F: Frames + ?Sized>(
        &self,
        head: &Held,
        tcp: &Tcp,
        at: u32,
        frames: &F,
    ) -> Divergence {
        let offset = tcp.payload_offset(at);
        let from = usize::from(tcp.payload_at) + offset as usize;
        let left = usize::from(tcp.payload_len) - offset as usize;
        let primary = Shown::read(left, |out| frames.copy_out(&head.token, from, out));
        Divergence {
            offset,
            primary,
            ..Divergence::plain(Cause::Length, Some(head.packet.key))
        }
    }

    /// An SVM that has reset the connection will not send what is missing.
    fn wait_unless_reset(&self, head: &Held, ledger: &Ledger) -> Content {
        if !self.control.is_empty() && self.counterpart(head, RST, ledger).is_some() {
            Content::Differs(Divergence::plain(Cause::Flags, Some(head.packet.key)))
        } else {
            Content::Wait
        }
    }

    /// The frame that was judged has left.
    pub(crate) fn segment_left<F: Frames + ?Sized>(
        &mut self,
        incarnation: u32,
        tcp: &Tcp,
        max_history_bytes: u32,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        if tcp.flags & (FIN | RST) != 0 {
            self.seen |= seen::GUEST_CLOSED;
        }
        if tcp.has(RST) {
            self.settle_control(incarnation, RST, ledger, frames);
            return;
        }
        if !tcp.takes_space() {
            return;
        }
        if tcp.has(SYN) {
            self.seen &= !(seen::GUEST_CLOSED | seen::PEER_CLOSED);
            self.stream.syn_left = true;
            self.stream.raise(Mark::Base, tcp.end());
            self.settle_control(incarnation, SYN, ledger, frames);
        }
        self.stream.raise(Mark::LeftHigh, tcp.end());
        self.report_left(ledger);
        self.limit_history(max_history_bytes, ledger, frames);
    }

    #[inline]
    pub(crate) fn limit_history<F: Frames + ?Sized>(
        &mut self,
        max_history_bytes: u32,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        if self.stream.history_bytes > max_history_bytes {
            self.prune(max_history_bytes, ledger, frames);
        }
    }

    /// Whether the segment, the flow's next one, has to wait: it is plain new data, and the SVM has
    /// sent nothing beyond what has left.
    #[inline]
    pub(crate) fn must_wait(&self, incarnation: u32, tcp: &Tcp) -> bool {
        self.mark == NIL && self.control.is_empty() && self.stream.expects(incarnation, tcp)
    }

    /// One reset stands for one; all SYNs of a connection are the same.
    fn settle_control<F: Frames + ?Sized>(
        &mut self,
        incarnation: u32,
        flag: u8,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        let mut at = self.control.head;
        while let Some(frame) = ledger.svm.get(at) {
            let next = ledger.svm.next(at);
            if frame.incarnation == incarnation && tcp_of(frame).has(flag) {
                ledger.settle_svm(&mut self.control, at, frames);
                if flag == RST {
                    break;
                }
            }
            at = next;
        }
    }

    /// Reports the SVM's segments all of whose bytes have left (rule 9), and moves the mark to the
    /// first that is not reported.
    fn report_left(&mut self, ledger: &mut Ledger) {
        let Some(high) = self.stream.get(Mark::LeftHigh) else {
            return;
        };
        let incarnation = self.stream.incarnation;
        let mut first_unreported = NIL;
        let mut at = self.mark;
        while let Some(frame) = ledger.svm.get_mut(at) {
            let tcp = *tcp_of(frame);
            let can_have_left = frame.incarnation <= incarnation
                && (seq::lt(tcp.payload_seq(), high) || seq::le(tcp.end(), high));
            if !can_have_left {
                if !frame.reported && first_unreported == NIL {
                    first_unreported = at;
                }
                break;
            }
            if !frame.reported && frame.incarnation == incarnation && seq::le(tcp.end(), high) {
                frame.reported = true;
                let svm_seq = frame.svm_seq;
                self.stream.history_bytes += size(&tcp);
                ledger.report_svm(svm_seq);
            } else if !frame.reported && first_unreported == NIL {
                first_unreported = at;
            }
            at = ledger.svm.next(at);
        }
        self.mark = first_unreported;
    }

    /// Gives up history that the client has acknowledged, and the oldest above `max_bytes`.
    fn prune<F: Frames + ?Sized>(&mut self, max_bytes: u32, ledger: &mut Ledger, frames: &mut F) {
        let stream = &self.stream;
        let floor = match (stream.get(Mark::Una), stream.get(Mark::Base)) {
            (Some(una), base) => Some(seq::max_known(una, base)),
            (None, base) => base,
        };
        let mut at = self.svm.head;
        while let Some(frame) = ledger.svm.get(at) {
            let tcp = tcp_of(frame);
            let below = |number| floor.is_some_and(|floor| seq::le(number, floor));
            let is_surplus = self.stream.history_bytes > max_bytes;
            if !frame.reported || !(is_surplus || below(tcp.payload_seq())) {
                break;
            }
            let next = ledger.svm.next(at);
            let is_covered = below(tcp.end());
            if is_covered || is_surplus {
                self.stream.history_bytes -= size(tcp);
                ledger.stats.history_dropped += u64::from(!is_covered);
                ledger.recycle_svm(&mut self.svm, at, frames);
            }
            at = next;
        }
    }

    /// Gives up one reported segment, whether the client has acknowledged it or not.
    pub(crate) fn drop_history<F: Frames + ?Sized>(
        &mut self,
        at: u32,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        if let Some(frame) = ledger.svm.get(at).filter(|frame| frame.reported) {
            self.stream.history_bytes -= size(tcp_of(frame));
            ledger.stats.history_dropped += 1;
            ledger.recycle_svm(&mut self.svm, at, frames);
        }
    }

    /// The PVM's next connection between the same ports begins to be judged.
    fn enter<F: Frames + ?Sized>(&mut self, incarnation: u32, ledger: &mut Ledger, frames: &mut F) {
        let stream = &mut self.stream;
        stream.incarnation = incarnation;
        stream.syn_left = false;
        for mark in [Mark::JudgedIsn, Mark::Base, Mark::Una, Mark::LeftHigh] {
            stream.set(mark, None);
        }
        stream.history_bytes = 0;
        for ends in [&mut self.svm, &mut self.control] {
            let mut at = ends.head;
            while let Some(frame) = ledger.svm.get(at) {
                let next = ledger.svm.next(at);
                if frame.incarnation < incarnation {
                    ledger.recycle_svm(ends, at, frames);
                }
                at = next;
            }
        }
        self.mark = self.svm.head;
    }

    /// Takes a segment of the SVM. Gives a divergence when the SVM contradicts itself.
    pub(crate) fn svm_segment<F: Frames + ?Sized>(
        &mut self,
        mut frame: SvmFrame,
        ledger: &mut Ledger,
        frames: &mut F,
    ) -> Option<Divergence> {
        let tcp = *tcp_of(&frame);
        let stream = &mut self.stream;
        // After learning, the secondary translates a repeated SYN to the PVM's number.
        let is_known = stream.get(Mark::SvmIsn) == Some(tcp.seq)
            || (stream.get(Mark::PvmIsn) == Some(tcp.seq)
                && stream.svm_incarnation == stream.pvm_incarnation);
        if tcp.has(SYN) && !is_known {
            stream.svm_incarnation += 1;
            stream.set(Mark::SvmIsn, Some(tcp.seq));
            stream.set(Mark::SvmHigh, None);
            stream.svm_fin = false;
        }
        frame.incarnation = stream.svm_incarnation;
        let is_current = frame.incarnation == stream.incarnation;
        let is_repeated_syn = tcp.has(SYN) && stream.syn_left && is_current;
        // A refusal begins no connection: it belongs to the one that the PVM is opening.
        let may_refuse = tcp.has(RST | ACK) && !stream.syn_left;
        let is_old = frame.incarnation < stream.incarnation && !may_refuse;
        if is_old || !(tcp.takes_space() || tcp.has(RST)) || is_repeated_syn {
            settle_new(frame, ledger, frames);
        } else if tcp.flags & (RST | SYN) != 0 {
            ledger.svm.push_back(&mut self.control, frame);
        } else if is_current && seq::le(tcp.end(), stream.floor(tcp.payload_seq())) {
            settle_new(frame, ledger, frames);
        } else {
            return self.insert(frame, &tcp, ledger, frames);
        }
        None
    }

    fn insert<F: Frames + ?Sized>(
        &mut self,
        frame: SvmFrame,
        tcp: &Tcp,
        ledger: &mut Ledger,
        frames: &mut F,
    ) -> Option<Divergence> {
        let (incarnation, from) = (frame.incarnation, tcp.payload_seq());
        let stream = &mut self.stream;
        stream.svm_fin |= tcp.has(FIN);
        // Beyond everything that the SVM has sent: nothing to compare with, and the place is known.
        let is_next = stream
            .get(Mark::SvmHigh)
            .is_none_or(|high| seq::le(high, from));
        stream.raise(Mark::SvmHigh, tcp.payload_end());
        let has_left = incarnation == stream.incarnation && stream.has_left(tcp.end());
        let divergence = if is_next {
            None
        } else {
            self.contradiction(&frame, tcp, &ledger.svm, frames)
        };
        let is_before = |old: &SvmFrame| {
            old.incarnation < incarnation
                || (old.incarnation == incarnation && seq::le(tcp_of(old).payload_seq(), from))
        };
        let mut prev = self.svm.tail;
        let mut passed_mark = false;
        while let Some(old) = ledger.svm.get(prev)
            && !is_before(old)
        {
            passed_mark |= prev == self.mark;
            prev = ledger.svm.prev(prev);
        }
        let at = ledger.svm.insert_after(&mut self.svm, prev, frame);
        // Everything behind the mark may be unreported; before it nothing is.
        if self.mark == NIL || passed_mark {
            self.mark = at;
        }
        if has_left {
            self.report_left(ledger);
        }
        divergence
    }

    /// Compares a new SVM segment with what the SVM sent before at the same place.
    fn contradiction<F: Frames + ?Sized>(
        &self,
        new: &SvmFrame,
        new_tcp: &Tcp,
        svm: &Lists<SvmFrame>,
        frames: &F,
    ) -> Option<Divergence> {
        svm.iter(&self.svm)
            .map(|(_, old)| old)
            .filter(|old| old.incarnation == new.incarnation)
            .find_map(|old| {
                let old_tcp = tcp_of(old);
                let (from, end) = old_tcp.overlap(new_tcp)?;
                let sides = ((&old.token, old_tcp), (&new.token, new_tcp));
                compare_bytes(&new.packet.key, sides, from, end, None, frames)
            })
    }

    /// Since when the SVM's reset or SYN has had no PVM counterpart.
    pub(crate) fn control_since_us(&self, svm: &Lists<SvmFrame>) -> Option<u64> {
        svm.iter(&self.control).map(|(_, s)| s.at_us).min()
    }
}

fn settle_new<F: Frames + ?Sized>(frame: SvmFrame, ledger: &mut Ledger, frames: &mut F) {
    ledger.report_svm(frame.svm_seq);
    frames.release(frame.token);
}

/// Compares headers and payload of two frames that stand for each other one to one.
fn same_message<F: Frames + ?Sized>(
    head: &Held,
    tcp: &Tcp,
    other: &SvmFrame,
    frames: &F,
) -> Content {
    if let Some(divergence) = different_headers(head, tcp, other, frames) {
        return Content::Differs(divergence);
    }
    let other_tcp = tcp_of(other);
    let n = usize::from(tcp.payload_len.min(other_tcp.payload_len));
    let (a_at, b_at) = (
        usize::from(tcp.payload_at),
        usize::from(other_tcp.payload_at),
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
        None if tcp.payload_len != other_tcp.payload_len => Content::Differs(plain),
        None => Content::Matched,
    }
}

fn different_headers<F: Frames + ?Sized>(
    head: &Held,
    tcp: &Tcp,
    other: &SvmFrame,
    frames: &F,
) -> Option<Divergence> {
    let (a, b) = (frames.header(&head.token), frames.header(&other.token));
    if let Some(offset) = header_difference(a, &head.packet, b, &other.packet) {
        return Some(Divergence {
            offset,
            ..Divergence::plain(Cause::Header, Some(head.packet.key))
        });
    }
    let urgent = |tcp: &Tcp| {
        tcp.has(URG)
            .then(|| tcp.seq.wrapping_add(u32::from(tcp.urgent)))
    };
    (urgent(tcp) != urgent(tcp_of(other)))
        .then(|| Divergence::plain(Cause::Flags, Some(head.packet.key)))
}

/// Compares the bytes `from..end` of the stream in two segments that both hold them.
fn compare_bytes<F: Frames + ?Sized>(
    key: &FlowKey,
    ((a, a_tcp), (b, b_tcp)): ((&Token, &Tcp), (&Token, &Tcp)),
    from: u32,
    end: u32,
    ignored: Option<IgnoredBytes>,
    frames: &F,
) -> Option<Divergence> {
    let offset_in = |tcp: &Tcp| from.wrapping_sub(tcp.payload_seq()) as usize;
    let (a_from, b_from) = (offset_in(a_tcp), offset_in(b_tcp));
    let (a_at, b_at) = (
        usize::from(a_tcp.payload_at) + a_from,
        usize::from(b_tcp.payload_at) + b_from,
    );
    let n = end.wrapping_sub(from) as usize;
    let at = match ignored {
        None => frames.first_difference(a, a_at, b, b_at, n)?,
        Some(IgnoredBytes { start, span }) => {
            let place = u64::from(from.wrapping_sub(start));
            span.first_counted(place, n, |at, n| {
                frames.first_difference(a, a_at + at, b, b_at + at, n)
            })?
        }
    };
    let a_left = usize::from(a_tcp.payload_len) - a_from - at;
    let b_left = usize::from(b_tcp.payload_len) - b_from - at;
    Some(Divergence {
        cause: Cause::Payload,
        flow: Some(*key),
        offset: (a_from + at) as u32,
        primary: Shown::read(a_left, |out| frames.copy_out(a, a_at + at, out)),
        secondary: Shown::read(b_left, |out| frames.copy_out(b, b_at + at, out)),
    })
}
