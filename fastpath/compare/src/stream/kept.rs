//! What the SVM has sent in a TCP flow: kept by place until it is reported, and as history until
//! the client has acknowledged it.
//!
//! Invariants: `svm` is sorted by connection, then place; `mark` is its first segment that is not
//! reported, so nothing before it is looked at for bytes that have not left.

use super::segments::same_overlap;
use super::{Mark, size, tcp_of};
use crate::cause::Divergence;
use crate::frames::Frames;
use crate::ledger::{Ledger, Payload, SvmFrame};
use crate::list::{Lists, NIL};
use crate::seq;
use crate::table::{Flow, Held, seen};
use crate::wire::tcp::{ACK, FIN, RST, SYN, Tcp};

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

    /// Takes note of a segment that the PVM produced; gives its incarnation.
    #[inline]
    pub(crate) fn produced(&mut self, tcp: &Tcp) -> u32 {
        let closed = seen::GUEST_CLOSED | seen::PEER_CLOSED;
        if !tcp.has(SYN) || self.seen & closed == 0 {
            return self.stream.produced(tcp);
        }
        // Its own repetitions are no other ones.
        self.seen &= !closed;
        self.stream.produced_after(tcp, true)
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
            self.stream.raise(Mark::Base, tcp.payload_seq());
            self.settle_control(incarnation, SYN, ledger, frames);
        }
        self.stream.left_up_to(tcp.end());
        self.report_left(ledger);
        self.limit_history(max_history_bytes, ledger, frames);
    }

    /// A segment is about to leave: where it has been compared with digests, its bytes are kept as
    /// history instead, so that retransmissions that are cut otherwise can be compared. Where there
    /// is no slot for them the digest stays.
    pub(crate) fn keep_bytes<F: Frames + ?Sized>(
        &self,
        head: &Held,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        let Some(head_tcp) = &head.packet.tcp else {
            return;
        };
        let mut at = self.mark;
        while let Some(frame) = ledger.svm.get_mut(at) {
            let tcp = *tcp_of(frame);
            if !seq::lt(tcp.payload_seq(), head_tcp.payload_end()) {
                break;
            }
            let from = head_tcp.payload_offset(tcp.payload_seq());
            let is_within =
                u64::from(from) + u64::from(tcp.payload_len) <= u64::from(head_tcp.payload_len);
            if frame.payload != Payload::Bytes
                && frame.incarnation == head.incarnation
                && is_within
                && let Some(copy) = frames.duplicate(&head.token)
            {
                frames.release(core::mem::replace(&mut frame.token, copy));
                frame.payload = Payload::Bytes;
                let payload_at = head_tcp.payload_at + from as u16;
                frame.packet = head.packet;
                frame.packet.end = payload_at + tcp.payload_len;
                frame.packet.tcp = Some(Tcp { payload_at, ..tcp });
            }
            at = ledger.svm.next(at);
        }
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
    #[inline(always)]
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
            // The secondary has to keep what it has been asked for.
            let has_left = frame.incarnation == incarnation && seq::le(tcp.end(), high);
            if !frame.reported && has_left && !frame.waits_for_bytes() {
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
    #[inline]
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
    pub(super) fn enter<F: Frames + ?Sized>(
        &mut self,
        incarnation: u32,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        let stream = &mut self.stream;
        let (entered, high) = (stream.incarnation, stream.get(Mark::LeftHigh));
        stream.incarnation = incarnation;
        stream.syn_left = false;
        for mark in [Mark::JudgedIsn, Mark::Base, Mark::Una, Mark::LeftHigh] {
            stream.set(mark, None);
        }
        (stream.history_bytes, stream.laps) = (0, 0);
        for ends in [&mut self.svm, &mut self.control] {
            let mut at = ends.head;
            while let Some(frame) = ledger.svm.get(at) {
                let next = ledger.svm.next(at);
                // What has left and was only waiting for its bytes needs them no more.
                let has_left = frame.waits_for_bytes()
                    && frame.incarnation == entered
                    && high.is_some_and(|high| seq::le(tcp_of(frame).end(), high));
                if has_left && entered < incarnation {
                    ledger.settle_svm(ends, at, frames);
                } else if frame.incarnation < incarnation {
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
        let is_pvms = stream.get(Mark::PvmIsn) == Some(tcp.seq);
        let is_behind = stream.svm_incarnation < stream.pvm_incarnation;
        // A guest may begin all connections with the same number: behind a FIN it is another one, and where the PVM
        // has begun another one with it.
        let is_known = match stream.get(Mark::SvmIsn) == Some(tcp.seq) {
            true => !(stream.svm_fin || is_pvms && is_behind),
            false => is_pvms && stream.svm_incarnation == stream.pvm_incarnation,
        };
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
        let divergence = if is_next {
            None
        } else {
            self.contradiction(at, ledger, frames)
        };
        if has_left {
            self.report_left(ledger);
        }
        divergence
    }

    /// The bytes of a segment are at hand that was a digest before.
    pub(crate) fn bytes_came<F: Frames + ?Sized>(
        &mut self,
        at: u32,
        ledger: &mut Ledger,
        frames: &F,
    ) -> Option<Divergence> {
        let divergence = self.contradiction(at, ledger, frames);
        self.report_left(ledger);
        divergence
    }

    /// Compares a segment of the SVM with what the SVM sent otherwise at the same place. Asks for
    /// the bytes where digests do not tell.
    fn contradiction<F: Frames + ?Sized>(
        &self,
        new_at: u32,
        ledger: &mut Ledger,
        frames: &F,
    ) -> Option<Divergence> {
        let mut at = self.svm.head;
        while let (Some(old), Some(new)) = (ledger.svm.get(at), ledger.svm.get(new_at)) {
            let next = ledger.svm.next(at);
            if at != new_at
                && old.incarnation == new.incarnation
                && let Some(span) = tcp_of(old).overlap(tcp_of(new))
            {
                match same_overlap(old, new, span, ledger, frames) {
                    Some(Ok(())) => {}
                    Some(Err(divergence)) => return Some(divergence),
                    None => {
                        ledger.fetch(at);
                        ledger.fetch(new_at);
                    }
                }
            }
            at = next;
        }
        None
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
