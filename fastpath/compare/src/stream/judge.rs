//! What the contents of a flow's next segment allow.
//!
//! Invariant: nothing here changes what is kept of the SVM, but for entering a new connection.

use super::segments::{
    compare_bytes, different_flags, different_headers, headers_at, judge_digest, same_message,
    unseen,
};
use super::{Content, IgnoredBytes, Mark, holds, tcp_of};
use crate::cause::{Cause, Divergence};
use crate::frames::Frames;
use crate::ledger::{Ledger, SvmFrame};
use crate::list::{Ends, Lists};
use crate::seq;
use crate::span::Span;
use crate::table::{Flow, Held};
use crate::wire::tcp::{ACK, CWR, ECE, FIN, RST, SYN, Tcp, URG};

/// TCP judgement of one flow.
impl Flow {
    /// Judges the flow's next frame.
    pub(crate) fn judge_segment<F: Frames + ?Sized>(
        &mut self,
        head: &mut Held,
        tcp: &Tcp,
        ignored: Option<Span>,
        ledger: &mut Ledger,
        frames: &mut F,
    ) -> Content {
        if tcp.flags & (SYN | RST) != 0
            && let Some(other) = self.other_answer(tcp, ledger)
        {
            return Content::Differs(different_flags(head, other, frames));
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

    fn counterpart<'a>(&self, head: &Held, flag: u8, ledger: &'a Ledger) -> Option<&'a SvmFrame> {
        let mut control = ledger.svm.iter(&self.control).map(|(_, frame)| frame);
        control.find(|s| s.incarnation == head.incarnation && tcp_of(s).has(flag))
    }

    fn judge_reset<F: Frames + ?Sized>(
        &self,
        head: &Held,
        tcp: &Tcp,
        ledger: &Ledger,
        frames: &F,
    ) -> Content {
        let Some(other) = self.counterpart(head, RST, ledger) else {
            // All that the PVM sent before has left: what the SVM has beyond it, it sent instead.
            return match self.svm_beyond(head.incarnation, ledger) {
                Some(other) => Content::Differs(different_flags(head, other, frames)),
                None => Content::Wait,
            };
        };
        if tcp.flags & ACK != tcp_of(other).flags & ACK {
            return Content::Differs(different_flags(head, other, frames));
        }
        same_message(head, tcp, other, frames)
    }

    /// One VM accepts a connection and the other refuses it: their answers to the peer's SYN, a
    /// SYN-ACK and a reset, acknowledge the same number.
    fn other_answer<'a>(&self, tcp: &Tcp, ledger: &'a Ledger) -> Option<&'a SvmFrame> {
        let opposite = if tcp.has(RST) { SYN } else { RST };
        let mut control = ledger.svm.iter(&self.control).map(|(_, other)| other);
        control.find(|other| {
            let other = tcp_of(other);
            tcp.has(ACK) && other.has(opposite | ACK) && other.ack == tcp.ack
        })
    }

    /// The first of the SVM's segments that has not been matched. What has left and is only waiting
    /// for its bytes is none.
    fn svm_beyond<'a>(&self, incarnation: u32, ledger: &'a Ledger) -> Option<&'a SvmFrame> {
        let from = Ends {
            head: self.mark,
            tail: self.svm.tail,
        };
        let all = ledger.svm.iter(&from).map(|(_, frame)| frame);
        let mut open = all.filter(|frame| {
            let has_left = frame.waits_for_bytes() && self.stream.has_left(tcp_of(frame).end());
            !frame.reported && !has_left
        });
        open.next().filter(|next| next.incarnation == incarnation)
    }

    fn judge_syn<F: Frames + ?Sized>(
        &self,
        head: &Held,
        tcp: &Tcp,
        ledger: &Ledger,
        frames: &F,
    ) -> Content {
        if self.stream.syn_left {
            // Repeated. What it may carry beside (RFC 7413) is compared the first time only, so
            // then a commit has to cover it.
            let is_bare = tcp.payload_len == 0 && !tcp.has(FIN);
            return if is_bare {
                Content::Free
            } else {
                Content::Wait
            };
        }
        let Some(other) = self.counterpart(head, SYN, ledger) else {
            return self.wait_unless_reset(head, ledger, frames);
        };
        let other_tcp = tcp_of(other);
        const COUNTED: u8 = SYN | ACK | FIN | ECE | CWR | URG;
        if tcp.flags & COUNTED != other_tcp.flags & COUNTED {
            return Content::Differs(different_flags(head, other, frames));
        }
        let headers = (frames.header(&head.token), frames.header(&other.token));
        if !tcp.same_syn_options(headers.0, other_tcp, headers.1) {
            return Content::Differs(headers_at(Cause::SynOptions, 20, head, other, frames));
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
        let floor = self.stream.floor(tcp.payload_seq());
        let mut at = floor;
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
            let Some((node, other)) = self.holder(head.incarnation, at, &ledger.svm) else {
                head.matched_to = Some(at);
                return self.wait_unless_reset(head, ledger, frames);
            };
            if let Some(divergence) = different_headers(head, tcp, other, frames) {
                return Content::Differs(divergence);
            }
            let other_tcp = tcp_of(other);
            if let Some(digest) = other.payload.digest() {
                let other_end = other_tcp.payload_end();
                let is_whole = svm_end.is_none_or(|svm_end| seq::le(other_end, svm_end));
                let found = (other, digest);
                match judge_digest((&head.token, tcp), found, is_whole, ledger, frames) {
                    Some(true) => {
                        at = other_end;
                        continue;
                    }
                    // What has left is held by nobody any more: a commit has to cover the rest.
                    None if other.reported => {
                        head.matched_to = Some(at);
                        return self.wait_unless_reset(head, ledger, frames);
                    }
                    Some(false) if other.reported => {
                        let counts = seq::le(floor, other_tcp.payload_seq()) && ignored.is_none();
                        return match counts {
                            true => Content::Differs(unseen(head, tcp, other_tcp, frames)),
                            false => self.wait_unless_reset(head, ledger, frames),
                        };
                    }
                    _ => {
                        head.matched_to = Some(at);
                        return Content::Fetch(node);
                    }
                }
            }
            let left = |tcp: &Tcp| u32::from(tcp.payload_len) - tcp.payload_offset(at);
            let end = at.wrapping_add(left(tcp).min(left(other_tcp)));
            let end = svm_end.map_or(end, |svm_end| seq::min(end, svm_end));
            let sides = ((&head.token, tcp), (&other.token, other_tcp));
            if let Some(divergence) = compare_bytes(sides, at, end, ignored, frames) {
                return Content::Differs(divergence);
            }
            at = end;
        }
        head.matched_to = Some(at);
        if tcp.has(FIN) {
            let Some(other) = self.fin_at(head.incarnation, at, ledger) else {
                return self.missing_fin(head, tcp, at, ledger, frames);
            };
            if let Some(divergence) = different_headers(head, tcp, other, frames) {
                return Content::Differs(divergence);
            }
        }
        if self.stream.has_left(tcp.end()) {
            return Content::Free;
        }
        if self.is_in_doubt(head.incarnation, floor, tcp, ledger) {
            return self.wait_unless_reset(head, ledger, frames);
        }
        Content::Matched
    }

    /// Whether the bytes were asked for of a segment of the SVM that reaches into what has not left of this one: until they
    /// are here, nobody knows whether the SVM has said otherwise there than where it agrees.
    fn is_in_doubt(&self, incarnation: u32, floor: u32, tcp: &Tcp, ledger: &Ledger) -> bool {
        if ledger.asks_nothing() {
            return false;
        }
        let (from, end) = (self.stream.get(Mark::LeftHigh), tcp.payload_end());
        let from = seq::max_known(floor, from);
        let unreported = Ends {
            head: self.mark,
            tail: self.svm.tail,
        };
        ledger.svm.iter(&unreported).any(|(_, other)| {
            let other_tcp = tcp_of(other);
            other.waits_for_bytes()
                && other.incarnation == incarnation
                && seq::lt(other_tcp.payload_seq(), end)
                && seq::lt(from, other_tcp.payload_end())
        })
    }

    /// The SVM's segment that has the byte at `at`.
    fn holder<'a>(
        &self,
        incarnation: u32,
        at: u32,
        svm: &'a Lists<SvmFrame>,
    ) -> Option<(u32, &'a SvmFrame)> {
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
            .take_while(|(_, s)| {
                s.incarnation < incarnation
                    || s.incarnation == incarnation && seq::le(tcp_of(s).payload_seq(), at)
            })
            .find(|(_, s)| holds(s, incarnation, at))
    }

    fn missing_fin<F: Frames + ?Sized>(
        &self,
        head: &Held,
        tcp: &Tcp,
        at: u32,
        ledger: &Ledger,
        frames: &F,
    ) -> Content {
        let Some((_, other)) = self.holder(head.incarnation, at, &ledger.svm) else {
            return self.wait_unless_reset(head, ledger, frames);
        };
        let other_tcp = tcp_of(other);
        let place = usize::from(other_tcp.payload_at) + other_tcp.payload_offset(at) as usize;
        let secondary = (&other.token, other.known_end(), place);
        let plain = Divergence::plain(Cause::Length, None);
        let offset = tcp.payload_offset(at) as usize;
        Content::Differs(plain.showing(frames, offset, None, Some(secondary)))
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
        let offset = tcp.payload_offset(at) as usize;
        let place = usize::from(tcp.payload_at) + offset;
        let primary = (&head.token, head.packet.end, place);
        let plain = Divergence::plain(Cause::Length, None);
        plain.showing(frames, offset, Some(primary), None)
    }

    /// An SVM that has reset the connection will not send what is missing.
    fn wait_unless_reset<F: Frames + ?Sized>(
        &self,
        head: &Held,
        ledger: &Ledger,
        frames: &F,
    ) -> Content {
        if self.control.is_empty() {
            return Content::Wait;
        }
        match self.counterpart(head, RST, ledger) {
            Some(other) => Content::Differs(different_flags(head, other, frames)),
            None => Content::Wait,
        }
    }
}
