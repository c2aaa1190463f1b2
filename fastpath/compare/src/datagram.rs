//! Frames that are compared one by one: UDP, ICMP, ARP, NDP, fragments, everything that is not an
//! unfragmented TCP segment.
//!
//! Invariants: a PVM frame is equal only to a whole SVM frame of the same flow, each used once;
//! the order of release is the PVM's. Within a small window the SVM's order does not matter.

use alloc::collections::VecDeque;

use crate::cause::{Cause, Divergence, Shown};
use crate::flow::{FlowKey, Protocol};
use crate::frames::{Frames, HEADER_MAX, Token};
use crate::ledger::Ledger;
use crate::table::Held;
use crate::tcp::Content;
use crate::wire::{Packet, mask_ignored};

#[derive(Debug)]
struct SvmDatagram {
    packet: Packet,
    token: Token,
    svm_seq: u64,
    at_us: u64,
}

/// What the SVM has sent in one flow and the PVM has not.
#[derive(Debug, Default)]
pub(crate) struct Datagrams {
    svm: VecDeque<SvmDatagram>,
}

impl Datagrams {
    pub(crate) fn svm_output(
        &mut self,
        at_us: u64,
        svm_seq: u64,
        (token, packet): (Token, Packet),
    ) {
        self.svm.push_back(SvmDatagram {
            packet,
            token,
            svm_seq,
            at_us,
        });
    }

    pub(crate) fn has_unmatched_svm(&self) -> bool {
        !self.svm.is_empty()
    }

    /// Since when the SVM's oldest datagram has had no PVM counterpart.
    pub(crate) fn surplus_since_us(&self) -> Option<u64> {
        self.svm.front().map(|datagram| datagram.at_us)
    }

    /// Judges the flow's next frame, of `held` that wait. Two that differ may be out of order:
    /// only a full window on both sides proves a difference at once.
    pub(crate) fn judge<F: Frames + ?Sized>(
        &self,
        head: &Held,
        held: usize,
        window: usize,
        frames: &F,
    ) -> Content {
        if self.position(head, window, frames).is_some() {
            Content::Matched
        } else if self.svm.len() >= window && held >= window {
            Content::Differs(self.difference_from_first(head, frames))
        } else {
            Content::Wait
        }
    }

    fn position<F: Frames + ?Sized>(
        &self,
        head: &Held,
        window: usize,
        frames: &F,
    ) -> Option<usize> {
        let equal = |other: &SvmDatagram| {
            difference(
                (&head.token, &head.packet),
                (&other.token, &other.packet),
                frames,
            )
            .is_none()
        };
        self.svm.iter().take(window).position(equal)
    }

    /// How the frame differs from the SVM's oldest one.
    pub(crate) fn difference_from_first<F: Frames + ?Sized>(
        &self,
        head: &Held,
        frames: &F,
    ) -> Divergence {
        self.svm
            .front()
            .and_then(|s| difference((&head.token, &head.packet), (&s.token, &s.packet), frames))
            .unwrap_or_else(|| Divergence::plain(Cause::Deadline, Some(head.packet.key)))
    }

    /// The frame that was judged has left.
    pub(crate) fn left<F: Frames + ?Sized>(
        &mut self,
        head: &Held,
        window: usize,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        let at = self.position(head, window, frames);
        if let Some(datagram) = at.and_then(|at| self.svm.remove(at)) {
            ledger.settle_svm(datagram.svm_seq, datagram.token, frames);
        }
    }

    /// Gives up the SVM's oldest datagram, which the PVM never sent.
    pub(crate) fn drop_surplus<F: Frames + ?Sized>(&mut self, ledger: &mut Ledger, frames: &mut F) {
        if let Some(datagram) = self.svm.pop_front() {
            ledger.stats.svm_surplus += 1;
            ledger.settle_svm(datagram.svm_seq, datagram.token, frames);
        }
    }

    /// A commit covers everything: SVM output is forgotten.
    pub(crate) fn rebase<F: Frames + ?Sized>(&mut self, ledger: &mut Ledger, frames: &mut F) {
        self.svm
            .drain(..)
            .for_each(|datagram| ledger.recycle_svm(datagram.token, frames));
    }
}

/// Address resolution runs on the guests' own timers: a surplus of it means nothing.
pub(crate) fn surplus_is_harmless(key: &FlowKey) -> bool {
    match key.protocol() {
        Protocol::Arp => true,
        Protocol::Icmpv6 => matches!(key.guest_port(), 133..=137 | 143),
        _ => false,
    }
}

fn difference<F: Frames + ?Sized>(
    (a, a_packet): (&Token, &Packet),
    (b, b_packet): (&Token, &Packet),
    frames: &F,
) -> Option<Divergence> {
    let (a_end, b_end) = (usize::from(a_packet.end), usize::from(b_packet.end));
    let end = a_end.min(b_end);
    let in_header = end.min(HEADER_MAX);
    let masked = |token: &Token, packet: &Packet| {
        let mut bytes = [0u8; HEADER_MAX];
        bytes[..in_header].copy_from_slice(&frames.header(token)[..in_header]);
        mask_ignored(&mut bytes[..in_header], packet);
        bytes
    };
    let (a_bytes, b_bytes) = (masked(a, a_packet), masked(b, b_packet));
    let at = match a_bytes.iter().zip(&b_bytes).position(|(a, b)| a != b) {
        Some(at) => at,
        None if end > in_header => {
            match frames.first_difference(a, in_header, b, in_header, end - in_header) {
                Some(at) => in_header + at,
                None if a_end != b_end => end,
                None => return None,
            }
        }
        None if a_end != b_end => end,
        None => return None,
    };
    let cause = if a_end != b_end {
        Cause::Length
    } else if at < usize::from(a_packet.l4) {
        Cause::Header
    } else {
        Cause::Payload
    };
    Some(Divergence {
        cause,
        flow: Some(a_packet.key),
        offset: at as u32,
        primary: Shown::read(a_end - at, |out| frames.copy_out(a, at, out)),
        secondary: Shown::read(b_end - at, |out| frames.copy_out(b, at, out)),
    })
}
