//! The bytes of both sides at a divergence, cut out of the captures.
//!
//! Invariant: both sides begin at the same place of the stream or message; bytes that the
//! comparator reported are never contradicted, what the captures have around them is added.

use colo_compare::wire::tcp::{RST, SYN};
use colo_compare::wire::{self, Packet, Tcp};
use colo_compare::{Cause, Direction, Divergence};

use crate::capture::Record;
use crate::report::{Found, Shown};

/// Bytes of a row.
pub(crate) const ROW_BYTES: usize = 8;
/// Bytes shown of each side.
const VIEW_BYTES: usize = 4 * ROW_BYTES;

/// The headers of a frame that a guest sent.
pub(crate) fn parse(record: &Record<'_>) -> Packet {
    let frame = record.frame;
    wire::parse(frame, frame.len(), Direction::FromGuest)
}

/// The TCP view of a frame that a guest sent.
pub(crate) fn tcp_of(record: &Record<'_>) -> Option<Tcp> {
    parse(record).tcp
}

/// Fills in the shown bytes. `pvm` is the frame that was judged; `svm` are frames of the same flow
/// that the SVM has sent, oldest first, with what is added to their sequence numbers.
pub(crate) fn fill(
    found: &mut Found,
    divergence: &Divergence,
    pvm: Option<&Record<'_>>,
    svm: &[(Record<'_>, u32)],
) {
    found.view_at = divergence.offset;
    found.primary.bytes = divergence.primary.bytes().to_vec();
    found.secondary.bytes = divergence.secondary.bytes().to_vec();
    found.primary.frame = pvm.map(|record| record.number);
    let Some(pvm) = pvm else {
        if let Some((record, _)) = svm.first().filter(|_| found.secondary.bytes.is_empty()) {
            found.view_at = u32::from(parse(record).l4);
            found.secondary = from_frame(record, i64::from(found.view_at));
        }
        return;
    };
    let packet = parse(pvm);
    let bytes_differ = matches!(divergence.cause, Cause::Payload | Cause::Length);
    match packet.tcp {
        Some(tcp) if bytes_differ && tcp.payload_len > 0 => {
            fill_stream(found, divergence, (pvm, &tcp), svm);
        }
        Some(tcp) => {
            let kind = tcp.flags & (SYN | RST);
            let same = |tcp: Tcp| tcp.flags & (SYN | RST) == kind;
            let other = svm
                .iter()
                .find(|(other, _)| tcp_of(other).is_some_and(same));
            fill_message(found, (pvm, &packet), other.map(|(other, _)| other));
        }
        None => fill_message(found, (pvm, &packet), svm.first().map(|(other, _)| other)),
    }
}

/// TCP payload: both sides at the same sequence numbers.
fn fill_stream(
    found: &mut Found,
    divergence: &Divergence,
    (pvm, tcp): (&Record<'_>, &Tcp),
    svm: &[(Record<'_>, u32)],
) {
    let place = tcp.payload_seq().wrapping_add(divergence.offset);
    // How far the place is from the start of the SVM's payload; one past its end counts, too.
    let within = |other: &Tcp, moved: u32| {
        let at = place.wrapping_sub(other.payload_seq().wrapping_add(moved));
        (at <= u32::from(other.payload_len)).then_some(at)
    };
    let other = svm.iter().filter_map(|(record, moved)| {
        let other = tcp_of(record)?;
        Some((record, other, within(&other, *moved)?))
    });
    let other =
        other.max_by_key(|(record, other, at)| (*at < u32::from(other.payload_len), record.number));
    let mut view_at = view_start(divergence.offset);
    if let Some((_, _, at)) = other {
        view_at = view_at.max(divergence.offset.saturating_sub(at));
    }
    let base = i64::from(tcp.payload_at);
    let primary = from_frame(pvm, base + i64::from(view_at));
    let secondary = other.map(|(record, other, at)| {
        let base = i64::from(other.payload_at) + i64::from(at) - i64::from(divergence.offset);
        from_frame(record, base + i64::from(view_at))
    });
    show(found, divergence, view_at, primary, secondary);
}

fn show(
    found: &mut Found,
    divergence: &Divergence,
    view_at: u32,
    primary: Shown,
    secondary: Option<Shown>,
) {
    let skip = (divergence.offset - view_at) as usize;
    let agrees = |shown: &Shown, known: &[u8]| {
        let bytes = shown.bytes.get(skip..).unwrap_or_default();
        bytes.iter().zip(known).all(|(a, b)| a == b)
    };
    let secondary = secondary.unwrap_or_default();
    let known = (divergence.primary.bytes(), divergence.secondary.bytes());
    let is_missing = secondary.frame.is_none() && !known.1.is_empty();
    if agrees(&primary, known.0) && agrees(&secondary, known.1) && !is_missing {
        found.view_at = view_at;
        (found.primary, found.secondary) = (primary, secondary);
    }
}

/// Frames that stand for each other one to one.
fn fill_message(
    found: &mut Found,
    (pvm, packet): (&Record<'_>, &Packet),
    svm: Option<&Record<'_>>,
) {
    let at = match packet.tcp {
        // Flags and options: the whole TCP header.
        Some(_) if found.cause != Cause::Header.name() => u32::from(packet.l4),
        _ => view_start(found.view_at),
    };
    found.view_at = at;
    found.primary = from_frame(pvm, i64::from(at));
    found.secondary = svm.map_or_else(Shown::default, |record| from_frame(record, i64::from(at)));
}

/// One row before the place, at the start of a row.
fn view_start(offset: u32) -> u32 {
    let row = ROW_BYTES as u32;
    (offset / row * row).saturating_sub(row)
}

/// The bytes of a frame from `at` on.
fn from_frame(record: &Record<'_>, at: i64) -> Shown {
    let frame = record.frame;
    let packet = parse(record);
    // Padding is not part of the message.
    let end = usize::from(packet.end).min(frame.len());
    let at = usize::try_from(at).unwrap_or(0).min(end);
    Shown {
        frame: Some(record.number),
        bytes: frame[at..end.min(at + VIEW_BYTES)].to_vec(),
    }
}
