//! One TCP flow as two byte streams: what the PVM holds against what the SVM has sent.
//!
//! Invariants: a PVM segment counts as equal only when every byte that the client does not have
//! yet, by commit (base) or by its own ACK (una), equals a byte that the SVM put at the same
//! place; SVM segments stay as history until the client's ACK passes them, so that retransmissions
//! and overlaps are compared too (rule 8). Segmentation, order and repetition do not matter. All
//! numbers are in the PVM's guest space.
//!
//! The numbers are here, the judgement of what the PVM holds is in `judge`, what the SVM has sent
//! is kept by `kept`, and `segments` puts two segments side by side. Does not know epochs, the ACK
//! rule, deadlines or leases: the path does.

mod judge;
mod kept;
mod segments;

use crate::cause::Divergence;
use crate::ledger::SvmFrame;
use crate::seq;
use crate::span::Span;
use crate::wire::tcp::{FIN, RST, SYN, Tcp};

/// What the contents of the next frame allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// The SVM has sent the same.
    Matched,
    /// Nothing in it needs a counterpart.
    Free,
    /// The SVM has not sent enough yet.
    Wait,
    /// The SVM has sent it, but only the bytes at this node say whether it is the same.
    Fetch(u32),
    /// The SVM has sent something else.
    Differs(Divergence),
}

/// How far behind what has left a mark may lie: the most that a TCP window spans (RFC 7323 section 2.2).
pub(crate) const FAR_BEHIND: u32 = 1 << 30;

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
    /// How often what has left has gone past all sequence numbers since the judged connection's start; 2 means
    /// more, too. Counted where frames are judged one by one, as they are with a policy.
    laps: u8,
    /// Incarnation of the latest PVM frame, of the latest SVM frame, of what is judged now.
    pvm_incarnation: u32,
    svm_incarnation: u32,
    incarnation: u32,
    history_bytes: u32,
}

impl Stream {
    #[inline]
    fn get(&self, mark: Mark) -> Option<u32> {
        (self.known >> mark as u8 & 1 != 0).then(|| self.marks[mark as usize])
    }

    #[inline]
    fn set(&mut self, mark: Mark, value: Option<u32>) {
        self.known &= !(1 << mark as u8);
        if let Some(value) = value {
            self.marks[mark as usize] = value;
            self.known |= 1 << mark as u8;
        }
    }

    #[inline]
    fn raise(&mut self, mark: Mark, value: u32) {
        self.set(mark, Some(seq::max_known(value, self.get(mark))));
    }

    /// Takes note of a segment that the PVM produced; gives its incarnation.
    #[inline]
    pub(crate) fn produced(&mut self, tcp: &Tcp) -> u32 {
        self.produced_after(tcp, false)
    }

    /// The same when the connection before may be over, `has_closed`: then a SYN begins another one although it has
    /// the same number, unless there is nothing that the old numbers could cover.
    #[inline]
    pub(crate) fn produced_after(&mut self, tcp: &Tcp, has_closed: bool) -> u32 {
        let is_repeated = || {
            let is_bare = self.get(Mark::PvmHigh) == Some(tcp.seq.wrapping_add(1));
            self.get(Mark::PvmIsn) == Some(tcp.seq) && (is_bare || !has_closed)
        };
        if tcp.has(SYN) && !is_repeated() {
            self.pvm_incarnation += 1;
            self.set(Mark::PvmIsn, Some(tcp.seq));
            self.set(Mark::PvmHigh, None);
        }
        if !tcp.has(RST) {
            self.raise(Mark::PvmHigh, tcp.end());
        }
        self.pvm_incarnation
    }

    /// Where bytes from `from` on begin to need a counterpart. What is further behind than a window, or as
    /// well ahead, no client takes and no commit can be said to cover.
    fn floor(&self, from: u32) -> u32 {
        let covers = |number: &u32| number.wrapping_sub(from) <= FAR_BEHIND;
        let mark = |mark| self.get(mark).filter(covers);
        let floor = seq::max_known(from, mark(Mark::Base));
        seq::max_known(floor, mark(Mark::Una))
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
    #[inline]
    pub(crate) fn incarnation(&self) -> u32 {
        self.incarnation
    }

    /// The connection of what the PVM sends now.
    #[inline]
    pub(crate) fn pvm_incarnation(&self) -> u32 {
        self.pvm_incarnation
    }

    /// Whether plain new data of both sides' connection may begin here, and nothing of the SVM's
    /// lies beyond.
    #[inline(always)]
    pub(crate) fn expects(&self, incarnation: u32, tcp: &Tcp) -> bool {
        tcp.is_plain_data
            && incarnation == self.incarnation
            && incarnation == self.svm_incarnation
            && !self.svm_fin
            && self.is_beyond(Mark::SvmHigh, tcp.seq)
            && self.is_new(tcp.seq)
    }

    /// Whether the client has nothing from `at` on.
    #[inline(always)]
    fn is_new(&self, at: u32) -> bool {
        match self.get(Mark::LeftHigh) {
            // What is committed or acknowledged has left.
            Some(high) => seq::le(high, at),
            None => self.is_beyond(Mark::Base, at) && self.is_beyond(Mark::Una, at),
        }
    }

    /// Everything up to `end` has left. Marks that are far behind are forgotten: beyond 2^31 they
    /// would lie ahead, and what was never compared would count as covered.
    #[inline]
    fn left(&mut self, end: u32) {
        self.set(Mark::LeftHigh, Some(end));
        let marks = [Mark::Base, Mark::Una];
        if marks.iter().any(|mark| self.is_far_behind(*mark, end)) {
            self.forget_far(end);
        }
    }

    /// Everything up to `end` has left, at least.
    fn left_up_to(&mut self, end: u32) {
        let high = self.get(Mark::LeftHigh);
        let end = seq::max_known(end, high);
        if let (Some(high), Some(isn)) = (high, self.get(Mark::JudgedIsn)) {
            let place = |number: u32| number.wrapping_sub(isn.wrapping_add(1));
            let has_passed_start = place(end) < place(high);
            self.laps = (self.laps + u8::from(has_passed_start)).min(2);
        }
        self.left(end);
    }

    #[inline]
    fn is_far_behind(&self, mark: Mark, at: u32) -> bool {
        let distance = self.get(mark).map(|number| at.wrapping_sub(number));
        distance.is_some_and(|distance| distance >= FAR_BEHIND)
    }

    #[cold]
    fn forget_far(&mut self, at: u32) {
        for mark in [Mark::Base, Mark::Una] {
            if self.is_far_behind(mark, at) {
                self.set(mark, None);
            }
        }
    }

    /// Both sides have sent this segment, and it has left.
    #[inline]
    pub(crate) fn left_exactly(&mut self, tcp: &Tcp) {
        let end = tcp.payload_end();
        self.left(end);
        self.set(Mark::SvmHigh, Some(end));
    }

    /// Both sides have sent this segment by twos, and it has left: as [`Stream::produced`] and
    /// [`Stream::left_exactly`]. Says whether the next one may be taken by [`Stream::goes_on`].
    pub(crate) fn left_by_twos(&mut self, tcp: &Tcp) -> bool {
        self.produced(tcp);
        self.left_exactly(tcp);
        let end = tcp.payload_end();
        // What is unknown counts as near, until all that is far is looked for.
        for mark in [Mark::Base, Mark::Una] {
            if self.get(mark).is_none() {
                self.marks[mark as usize] = end;
            }
        }
        self.get(Mark::PvmHigh) == Some(end)
    }

    /// Whether plain data from `seq` to `end`, which both sides have sent, is where all numbers have come to; otherwise
    /// more has to be looked at.
    #[inline(always)]
    pub(crate) fn may_go_on(&self, seq: u32, end: u32) -> bool {
        let is_near = |mark: Mark| end.wrapping_sub(self.marks[mark as usize]) < FAR_BEHIND;
        self.marks[Mark::LeftHigh as usize] == seq && is_near(Mark::Base) && is_near(Mark::Una)
    }

    /// Plain data goes on that both sides have sent, and it has left; only where [`Stream::may_go_on`].
    #[inline(always)]
    pub(crate) fn goes_on(&mut self, end: u32) {
        for mark in [Mark::LeftHigh, Mark::PvmHigh, Mark::SvmHigh] {
            self.marks[mark as usize] = end;
        }
    }

    /// A segment that has left exactly is kept as history.
    #[inline]
    pub(crate) fn keeps(&mut self, payload_len: u16) {
        self.history_bytes += u32::from(payload_len);
    }

    /// A commit covers everything that the PVM has produced (rule 8).
    pub(crate) fn rebase(&mut self) {
        if self.incarnation != self.pvm_incarnation {
            self.set(Mark::Una, None);
            self.set(Mark::LeftHigh, None);
            self.laps = 0;
        }
        self.incarnation = self.pvm_incarnation;
        self.svm_incarnation = self.pvm_incarnation;
        self.set(Mark::SvmIsn, self.get(Mark::PvmIsn));
        self.set(Mark::JudgedIsn, self.get(Mark::PvmIsn));
        self.syn_left = self.get(Mark::PvmIsn).is_some();
        self.set(Mark::Base, self.get(Mark::PvmHigh));
        match self.get(Mark::PvmHigh) {
            Some(high) => self.left_up_to(high),
            None => self.set(Mark::LeftHigh, None),
        }
        self.set(Mark::SvmHigh, None);
        self.svm_fin = false;
        self.history_bytes = 0;
    }

    /// The bytes that a policy leaves out, as they lie in the sequence space of this connection.
    /// Unknown, and so nothing, where its start has not been seen.
    pub(crate) fn ignored(&self, span: Option<Span>) -> Option<IgnoredBytes> {
        let start = self.get(Mark::JudgedIsn)?.wrapping_add(1);
        let near = self.get(Mark::LeftHigh).unwrap_or(start);
        let lap_bytes = u64::from(self.laps) << 32;
        span.map(|span| IgnoredBytes {
            near,
            place: lap_bytes + u64::from(near.wrapping_sub(start)),
            span,
        })
    }
}

/// A span of the guest's stream whose bytes count as equal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IgnoredBytes {
    /// A number near to those that are asked about, and its place in the stream.
    near: u32,
    place: u64,
    span: Span,
}

impl IgnoredBytes {
    /// The place of a byte; `None` before the stream's start.
    fn place_of(&self, at: u32) -> Option<u64> {
        let distance = at.wrapping_sub(self.near) as i32;
        self.place.checked_add_signed(i64::from(distance))
    }
}

#[inline]
fn tcp_of(frame: &SvmFrame) -> &Tcp {
    match &frame.packet.tcp {
        Some(tcp) => tcp,
        None => unreachable!("a TCP flow holds segments only"),
    }
}

/// What a segment counts for in the history: a FIN without payload takes a frame too.
#[inline]
fn size(tcp: &Tcp) -> u32 {
    u32::from(tcp.payload_len) + u32::from(tcp.has(FIN))
}

/// Guests choose the numbers, and comparisons mean little when they are far apart: whether a byte
/// is in a segment is asked by distance.
fn holds(frame: &SvmFrame, incarnation: u32, at: u32) -> bool {
    let tcp = tcp_of(frame);
    frame.incarnation == incarnation && tcp.payload_offset(at) < u32::from(tcp.payload_len)
}
