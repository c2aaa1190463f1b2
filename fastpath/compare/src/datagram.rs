//! Frames that are compared one by one: UDP, ICMP, ARP, NDP, fragments, everything that is not an
//! unfragmented TCP segment.
//!
//! Invariants: a PVM frame is equal only to a whole SVM frame of the same flow, each used once;
//! the order of release is the PVM's. Within a small window the SVM's order does not matter.
//! Fragments that the two sides cut differently are compared as what they make up together.

use crate::cause::{Cause, Divergence, Shown};
use crate::flow::{FlowKey, Protocol};
use crate::frames::{Frames, HEADER_MAX, Token};
use crate::ledger::{Ledger, Payload, SvmFrame};
use crate::list::{Lists, NIL};
use crate::span::Span;
use crate::stream::Content;
use crate::table::{Flow, Held};
use crate::wire::{Layout, mask_ignored};

/// Longest part of a frame that is compared with a mask: the rest is payload.
const MASKED_MAX: usize = HEADER_MAX;

/// What a judgement of datagrams needs beside the flow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// How many SVM datagrams the next PVM datagram is compared with.
    pub(crate) window: usize,
    pub(crate) ignored: Option<Span>,
}

impl Flow {
    /// Since when the SVM's oldest datagram has had no PVM counterpart.
    pub(crate) fn surplus_since_us(&self, svm: &Lists<SvmFrame>) -> Option<u64> {
        let mut all = svm.iter(&self.svm).map(|(_, datagram)| datagram);
        all.find(|datagram| !datagram.reported)
            .map(|datagram| datagram.at_us)
    }

    /// The same of one whose bytes are at hand, if they are needed.
    pub(crate) fn comparable_since_us(&self, svm: &Lists<SvmFrame>) -> Option<u64> {
        let mut all = svm.iter(&self.svm).map(|(_, datagram)| datagram);
        let is_comparable =
            |datagram: &&SvmFrame| !datagram.reported && !datagram.waits_for_bytes();
        all.find(|datagram| is_comparable(datagram))
            .map(|datagram| datagram.at_us)
    }

    /// Judges the flow's next frame. Two that differ may be out of order: only a full window on
    /// both sides proves a difference at once.
    pub(crate) fn judge_datagram<F: Frames + ?Sized>(
        &mut self,
        head: u32,
        held: &mut Lists<Held>,
        rules: Rules,
        ledger: &mut Ledger,
        frames: &F,
    ) -> Content {
        let Some(frame) = held.get(head) else {
            return Content::Wait;
        };
        let mut doubtful = NIL;
        let mut is_equal = |at: u32, other: &SvmFrame| {
            let sides = ((&frame.token, &frame.packet), (&other.token, &other.packet));
            let Some(digest) = other.payload.digest() else {
                return difference(sides, rules.ignored, frames).is_none();
            };
            let verdict = by_digest(sides, digest, ledger, frames);
            // Bytes say what it is that differs, and whether a policy leaves it out.
            let says_enough = match verdict {
                ByDigest::Same | ByDigest::OtherHeaders => true,
                ByDigest::OtherDigest => rules.ignored.is_none() && at != self.svm.head,
                ByDigest::NoKey => false,
            };
            if !says_enough && doubtful == NIL {
                doubtful = at;
            }
            verdict == ByDigest::Same
        };
        // A decided piece of a fragmented packet is no counterpart of another one.
        let found = ledger
            .svm
            .iter(&self.svm)
            .take(rules.window)
            .find(|(at, other)| !other.reported && is_equal(*at, other));
        self.mark = found.map_or(NIL, |(at, _)| at);
        if self.mark != NIL {
            return Content::Matched;
        }
        if doubtful != NIL {
            return Content::Fetch(doubtful);
        }
        let svm = &mut ledger.svm;
        if frame.packet.fragment.is_some() {
            let judged = self.judge_fragment(head, held, svm, rules.window, frames);
            return judged.unwrap_or(Content::Wait);
        }
        let is_full = svm.iter(&self.svm).nth(rules.window - 1).is_some()
            && held.iter(&self.held).nth(rules.window - 1).is_some();
        if is_full {
            Content::Differs(self.difference_from_first(frame, rules, svm, frames))
        } else {
            Content::Wait
        }
    }

    /// How the frame differs from the SVM's oldest one.
    pub(crate) fn difference_from_first<F: Frames + ?Sized>(
        &self,
        frame: &Held,
        rules: Rules,
        svm: &Lists<SvmFrame>,
        frames: &F,
    ) -> Divergence {
        let first = svm.get(self.svm.head);
        first
            .and_then(|other| {
                let sides = ((&frame.token, &frame.packet), (&other.token, &other.packet));
                match other.payload {
                    Payload::Bytes => difference(sides, rules.ignored, frames),
                    _ => Some(difference_unseen(sides, frames)),
                }
            })
            .unwrap_or_else(|| Divergence::plain(Cause::Deadline, None))
    }

    /// The frame that was judged has left: its counterpart has done its duty.
    pub(crate) fn datagram_left<F: Frames + ?Sized>(
        &mut self,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        if self.mark != NIL {
            ledger.settle_svm(&mut self.svm, self.mark, frames);
            self.mark = NIL;
        }
    }

    /// Gives up the SVM's oldest datagram, which the PVM never sent.
    pub(crate) fn drop_surplus<F: Frames + ?Sized>(&mut self, ledger: &mut Ledger, frames: &mut F) {
        ledger.stats.svm_surplus += 1;
        let first = self.svm.head;
        ledger.settle_svm(&mut self.svm, first, frames);
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

/// Compares two whole frames, but for what may rightly differ.
pub(crate) fn difference<F: Frames + ?Sized>(
    ((a, a_packet), (b, b_packet)): ((&Token, &Layout), (&Token, &Layout)),
    ignored: Option<Span>,
    frames: &F,
) -> Option<Divergence> {
    let (a_end, b_end) = (usize::from(a_packet.end), usize::from(b_packet.end));
    let end = a_end.min(b_end);
    // A policy's byte numbers count from there.
    let payload = usize::from(a_packet.payload_at()).min(end);
    let masked = payload.min(MASKED_MAX);
    let in_headers = masked_difference(
        (frames.header(a), a_packet),
        (frames.header(b), b_packet),
        masked,
    );
    let compare = |at: usize, n: usize| frames.first_difference(a, at, b, at, n);
    let in_payload = || match ignored {
        None if frames.match_payload(a, masked, b, masked, end - masked) => None,
        None => compare(masked, end - masked).map(|at| masked + at),
        Some(span) => {
            let between = payload - masked;
            let before = compare(masked, between).map(|at| masked + at);
            before.or_else(|| {
                let at = span.first_counted(0, end - payload, |at, n| compare(payload + at, n));
                at.map(|at| payload + at)
            })
        }
    };
    let in_length = || (a_end != b_end).then_some(end);
    let at = in_headers.or_else(in_payload).or_else(in_length)?;
    let cause = if a_end != b_end {
        Cause::Length
    } else if at < usize::from(a_packet.l4) {
        Cause::Header
    } else {
        Cause::Payload
    };
    Some(Divergence {
        cause,
        flow: None,
        offset: at as u32,
        primary: Shown::read(a_end - at, |out| frames.copy_out(a, at, out)),
        secondary: Shown::read(b_end - at, |out| frames.copy_out(b, at, out)),
    })
}

/// What a digest says about a frame and the headers that came with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ByDigest {
    Same,
    /// The headers differ, or the length.
    OtherHeaders,
    OtherDigest,
    /// The digest says nothing.
    NoKey,
}

/// Compares a whole frame with the headers of another one and the digest of what is behind them.
pub(crate) fn by_digest<F: Frames + ?Sized>(
    ((a, a_packet), (b, b_packet)): ((&Token, &Layout), (&Token, &Layout)),
    digest: u128,
    ledger: &Ledger,
    frames: &F,
) -> ByDigest {
    let payload = usize::from(b_packet.payload_at());
    let sides = ((frames.header(a), a_packet), (frames.header(b), b_packet));
    let same_place = a_packet.payload_at() == b_packet.payload_at() && a_packet.end == b_packet.end;
    if !same_place || masked_difference(sides.0, sides.1, payload).is_some() {
        return ByDigest::OtherHeaders;
    }
    let n = usize::from(a_packet.end) - payload;
    match ledger.digest_is(digest, frames, (a, payload, n)) {
        Some(true) => ByDigest::Same,
        Some(false) => ByDigest::OtherDigest,
        None => ByDigest::NoKey,
    }
}

/// How a frame differs from another one of which there are only the headers.
fn difference_unseen<F: Frames + ?Sized>(
    ((a, a_packet), (b, b_packet)): ((&Token, &Layout), (&Token, &Layout)),
    frames: &F,
) -> Divergence {
    let (a_end, b_payload) = (usize::from(a_packet.end), b_packet.payload_at());
    let n = usize::from(a_packet.payload_at().min(b_payload));
    let sides = ((frames.header(a), a_packet), (frames.header(b), b_packet));
    let in_headers = masked_difference(sides.0, sides.1, n);
    let cause = match in_headers {
        _ if a_packet.end != b_packet.end => Cause::Length,
        Some(at) if at < usize::from(a_packet.l4) => Cause::Header,
        _ => Cause::Payload,
    };
    let at = in_headers.unwrap_or(n);
    let plain = Divergence::plain(cause, None);
    let primary = (a, a_packet.end, at.min(a_end));
    plain.showing(frames, at, Some(primary), Some((b, b_payload, at)))
}

/// Compares the first `n` bytes of two frames. Most are equal byte for byte or differ only in the
/// identification and its checksum, so copies are masked only where the bytes differ.
fn masked_difference(
    (a, a_packet): (&[u8], &Layout),
    (b, b_packet): (&[u8], &Layout),
    n: usize,
) -> Option<usize> {
    if a[..n] == b[..n] {
        return None;
    }
    let masked = |header: &[u8], packet: &Layout| {
        let mut bytes = [0u8; MASKED_MAX];
        bytes[..n].copy_from_slice(&header[..n]);
        mask_ignored(&mut bytes[..n], packet);
        bytes
    };
    let (a, b) = (masked(a, a_packet), masked(b, b_packet));
    a[..n].iter().zip(&b[..n]).position(|(a, b)| a != b)
}
