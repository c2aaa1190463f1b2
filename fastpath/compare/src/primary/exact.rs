//! The case that nearly all frames are: the SVM's frame is, byte for byte, what its flow holds next,
//! and nothing else is open. It is judged here in a few steps instead of many.
//!
//! Invariant: whatever is released here would have been released by [`PrimaryPath::pump`] as well,
//! and leaves the same state behind; what is not plain is left to it.

use super::PrimaryPath;
use super::judge::may_acknowledge_elsewhere;
use crate::datagram::{ByDigest, by_digest, difference};
use crate::frames::{Frames, Token};
use crate::ledger::{Payload, SvmFrame};
use crate::table::{FlowId, Wait, seen};
use crate::wire::{Packet, Tcp, header_difference};

impl PrimaryPath {
    /// Releases the flow's next frame if this one is its counterpart, and takes the token. False
    /// when it takes more than a look to tell.
    #[inline(always)]
    pub(super) fn match_exactly<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        id: FlowId,
        packet: &Packet,
        output: (u64, &mut Token, Option<u128>),
    ) -> bool {
        // With rules or translations there is more to do.
        if self.frozen || self.muted || !self.policy.is_empty() || self.client.len() > 0 {
            return false;
        }
        match &packet.tcp {
            Some(tcp) => self.match_segment(now_us, frames, id, (packet, tcp), output),
            None => self.match_datagram(now_us, frames, id, packet, output),
        }
    }

    #[inline(always)]
    fn match_segment<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        id: FlowId,
        (packet, tcp): (&Packet, &Tcp),
        (svm_seq, token, digest): (u64, &mut Token, Option<u128>),
    ) -> bool {
        let Some(flow) = self.flows.get_mut(id) else {
            return false;
        };
        let at = flow.held.head;
        let Some(head) = self.held.get_mut(at) else {
            return false;
        };
        let Some(head_tcp) = &head.packet.tcp else {
            return false;
        };
        let is_counterpart = head_tcp.seq == tcp.seq
            && head_tcp.payload_len == tcp.payload_len
            && head_tcp.is_plain_data
            && head.matched_to.is_none_or(|to| to == tcp.seq)
            && head.stamp <= self.input_ack
            && flow.wait != Wait::Commit
            && flow.must_wait(head.incarnation, tcp);
        if !is_counterpart {
            return false;
        }
        let headers = (frames.header(&head.token), frames.header(token));
        if header_difference(headers.0, &head.packet, headers.1, packet).is_some() {
            return false;
        }
        let (a, b) = (head_tcp.payload_at, tcp.payload_at);
        let (a, b, n) = (usize::from(a), usize::from(b), usize::from(tcp.payload_len));
        let is_equal = match digest {
            None => frames.match_payload(&head.token, a, token, b, n),
            Some(digest) => {
                self.ledger.digest_is(digest, frames, (&head.token, a, n)) == Some(true)
            }
        };
        if !is_equal {
            return false;
        }
        // Where the SVM's bytes are not here, those that leave are kept as history.
        let copy = digest.and_then(|_| frames.duplicate(&head.token));
        let pvm_packet = head.packet;
        let (pvm_token, held_us) = (head.token.take(), now_us.saturating_sub(head.at_us));
        self.held.discard(&mut flow.held, at);
        self.ledger.release_match(pvm_token, held_us, svm_seq);
        flow.wait = Wait::Peer;
        flow.use_now(now_us, seen::SVM);
        flow.stream.left_exactly(tcp);
        flow.stream.keeps(tcp.payload_len);
        let mut history = SvmFrame {
            packet: packet.layout,
            token: token.take(),
            epoch: self.comparing,
            svm_seq,
            at_us: now_us,
            flow: id,
            incarnation: flow.stream.incarnation(),
            reported: true,
            payload: digest.map_or(Payload::Bytes, Payload::digest_of),
        };
        if let Some(copy) = copy {
            frames.release(core::mem::replace(&mut history.token, copy));
            (history.packet, history.payload) = (pvm_packet, Payload::Bytes);
        }
        self.ledger.svm.push_back(&mut flow.svm, history);
        let max_bytes = self.limits.history_bytes();
        flow.limit_history(max_bytes, &mut self.ledger, frames);
        let has_waited = flow.is_waiting();
        if has_waited {
            self.flows.set_waiting(id, false);
        }
        self.judge_rest(now_us, frames, id, has_waited);
        true
    }

    #[inline]
    fn match_datagram<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        id: FlowId,
        packet: &Packet,
        (svm_seq, token, digest): (u64, &mut Token, Option<u128>),
    ) -> bool {
        let Some(flow) = self.flows.get_mut(id) else {
            return false;
        };
        let at = flow.held.head;
        let Some(head) = self.held.get_mut(at) else {
            return false;
        };
        let is_next = flow.svm.is_empty()
            && flow.wait != Wait::Commit
            && head.stamp <= self.input_ack
            && head.matched_to.is_none()
            && !may_acknowledge_elsewhere(&self.limits, &head.packet);
        let sides = ((&head.token, &head.packet), (&*token, &packet.layout));
        let is_equal = || match digest {
            None => difference(sides, None, frames).is_none(),
            Some(digest) => by_digest(sides, digest, &self.ledger, frames) == ByDigest::Same,
        };
        if !is_next || !is_equal() {
            return false;
        }
        let (pvm_token, held_us) = (head.token.take(), now_us.saturating_sub(head.at_us));
        self.held.discard(&mut flow.held, at);
        self.ledger.release_match(pvm_token, held_us, svm_seq);
        frames.release(token.take());
        flow.wait = Wait::Peer;
        flow.use_now(now_us, seen::SVM);
        if flow.is_waiting() {
            self.flows.set_waiting(id, false);
            self.rearm(now_us, id);
        }
        // What is behind it has nothing to be compared with, and is due later.
        true
    }

    /// What the flow holds behind a frame that has just left.
    #[inline]
    fn judge_rest<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        id: FlowId,
        has_waited: bool,
    ) {
        let Some(flow) = self.flows.get(id) else {
            return;
        };
        let Some(next) = self.held.get(flow.held.head) else {
            return;
        };
        match &next.packet.tcp {
            // Due later than what has left, so the timer stays; but not than another kind of wait.
            Some(tcp) if flow.must_wait(next.incarnation, tcp) => {
                if has_waited {
                    self.rearm(now_us, id);
                }
            }
            _ => self.pump(now_us, frames, id),
        }
    }
}
