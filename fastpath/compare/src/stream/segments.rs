//! Two segments side by side.
//!
//! Invariant: whatever differs and counts is told, with its place and the first bytes of both.

use super::{Content, IgnoredBytes, tcp_of};
use crate::cause::{Cause, Divergence, Shown};
use crate::frames::{Frames, Token};
use crate::ledger::{Ledger, SvmFrame};
use crate::table::Held;
use crate::wire::header_difference;
use crate::wire::tcp::{Tcp, URG};

/// Compares headers and payload of two frames that stand for each other one to one.
pub(super) fn same_message<F: Frames + ?Sized>(
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
    let whole = tcp.payload_len == other_tcp.payload_len;
    if whole && frames.match_payload(&head.token, a_at, &other.token, b_at, n) {
        return Content::Matched;
    }
    let difference = frames.first_difference(&head.token, a_at, &other.token, b_at, n);
    let cause = match difference {
        Some(_) => Cause::Payload,
        None if tcp.payload_len != other_tcp.payload_len => Cause::Length,
        None => return Content::Matched,
    };
    let at = difference.unwrap_or(n);
    let plain = Divergence::plain(cause, None);
    let primary = (&head.token, head.packet.end, a_at + at);
    let secondary = (&other.token, other.packet.end, b_at + at);
    Content::Differs(plain.showing(frames, at, Some(primary), Some(secondary)))
}

/// A divergence of the two segments' TCP headers, `at` bytes from their starts.
pub(super) fn headers_at<F: Frames + ?Sized>(
    cause: Cause,
    at: usize,
    head: &Held,
    other: &SvmFrame,
    frames: &F,
) -> Divergence {
    let plain = Divergence::plain(cause, None);
    let (a_at, b_at) = (usize::from(head.packet.l4), usize::from(other.packet.l4));
    let primary = (&head.token, head.packet.end, a_at + at);
    let secondary = (&other.token, other.known_end(), b_at + at);
    plain.showing(frames, a_at + at, Some(primary), Some(secondary))
}

/// The segments' flags differ.
pub(super) fn different_flags<F: Frames + ?Sized>(
    head: &Held,
    other: &SvmFrame,
    frames: &F,
) -> Divergence {
    headers_at(Cause::Flags, 13, head, other, frames)
}

pub(super) fn different_headers<F: Frames + ?Sized>(
    head: &Held,
    tcp: &Tcp,
    other: &SvmFrame,
    frames: &F,
) -> Option<Divergence> {
    let (a, b) = (frames.header(&head.token), frames.header(&other.token));
    if let Some(offset) = header_difference(a, &head.packet, b, &other.packet) {
        let plain = Divergence::plain(Cause::Header, None);
        let at = offset as usize;
        let primary = (&head.token, head.packet.end, at);
        let secondary = (&other.token, other.known_end(), at);
        return Some(plain.showing(frames, at, Some(primary), Some(secondary)));
    }
    let urgent = |tcp: &Tcp| {
        tcp.has(URG)
            .then(|| tcp.seq.wrapping_add(u32::from(tcp.urgent)))
    };
    (urgent(tcp) != urgent(tcp_of(other))).then(|| different_flags(head, other, frames))
}

/// Whether the part of a segment that another one covers has that one's digest. `None` when the
/// other one is not all within, or without a key.
pub(super) fn judge_digest<F: Frames + ?Sized>(
    (token, tcp): (&Token, &Tcp),
    (other, digest): (&SvmFrame, u128),
    is_whole: bool,
    ledger: &Ledger,
    frames: &F,
) -> Option<bool> {
    let other_tcp = tcp_of(other);
    let n = other_tcp.payload_len;
    let from = tcp.payload_offset(other_tcp.payload_seq());
    let is_within = u64::from(from) + u64::from(n) <= u64::from(tcp.payload_len);
    if !is_within || !is_whole {
        return None;
    }
    let at = usize::from(tcp.payload_at) + from as usize;
    ledger.digest_is(digest, frames, (token, at, usize::from(n)))
}

/// A divergence from bytes of which there is only the digest.
pub(super) fn unseen<F: Frames + ?Sized>(
    head: &Held,
    tcp: &Tcp,
    other: &Tcp,
    frames: &F,
) -> Divergence {
    let from = tcp.payload_offset(other.payload_seq()) as usize;
    let primary = (
        &head.token,
        head.packet.end,
        usize::from(tcp.payload_at) + from,
    );
    Divergence::plain(Cause::Payload, None).showing(frames, from, Some(primary), None)
}

/// Whether two segments of the SVM say the same where they overlap; `None` when only bytes tell that
/// are not at hand.
pub(super) fn same_overlap<F: Frames + ?Sized>(
    old: &SvmFrame,
    new: &SvmFrame,
    (from, end): (u32, u32),
    ledger: &Ledger,
    frames: &F,
) -> Option<Result<(), Divergence>> {
    let (a, b) = (tcp_of(old), tcp_of(new));
    let is_same = match (old.payload.digest(), new.payload.digest()) {
        (None, None) => {
            let sides = ((&old.token, a), (&new.token, b));
            let divergence = compare_bytes(sides, from, end, None, frames);
            return Some(divergence.map_or(Ok(()), Err));
        }
        (None, Some(digest)) => judge_digest((&old.token, a), (new, digest), true, ledger, frames)?,
        (Some(digest), None) => judge_digest((&new.token, b), (old, digest), true, ledger, frames)?,
        (Some(x), Some(y)) => {
            let same_place = (a.payload_seq(), a.payload_len) == (b.payload_seq(), b.payload_len);
            same_place.then_some(x == y)?
        }
    };
    Some(match is_same {
        true => Ok(()),
        false => Err(Divergence::plain(Cause::Payload, None)),
    })
}

/// Compares the bytes `from..end` of the stream in two segments that both hold them.
pub(super) fn compare_bytes<F: Frames + ?Sized>(
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
    let whole = [a_tcp, b_tcp].map(|tcp| usize::from(tcp.payload_len)) == [n, n];
    let at = match ignored {
        None if whole && frames.match_payload(a, a_at, b, b_at, n) => return None,
        None => frames.first_difference(a, a_at, b, b_at, n)?,
        Some(ignored) => {
            let difference =
                |at: usize, n: usize| frames.first_difference(a, a_at + at, b, b_at + at, n);
            match ignored.place_of(from) {
                Some(place) => ignored.span.first_counted(place, n, difference)?,
                None => difference(0, n)?,
            }
        }
    };
    let a_left = usize::from(a_tcp.payload_len) - a_from - at;
    let b_left = usize::from(b_tcp.payload_len) - b_from - at;
    Some(Divergence {
        cause: Cause::Payload,
        flow: None,
        offset: (a_from + at) as u32,
        primary: Shown::read(a_left, |out| frames.copy_out(a, a_at + at, out)),
        secondary: Shown::read(b_left, |out| frames.copy_out(b, b_at + at, out)),
    })
}
