//! What comes in on the sockets, what goes out, and how a run ends.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

mod rig;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

use colo_compare::testing::{Segment, Side, udp};
use colo_compare::wire::tcp::{ACK, FIN, SYN};
use colo_sockets::SocketsError;
use proptest::collection::vec;
use proptest::prelude::*;
use rig::{Choice, Rig, message};

fn segment(seq: u32, payload: &[u8]) -> Vec<u8> {
    Segment::new(Side::V4).seq(seq).payload(payload).bytes()
}

#[test]
fn what_both_send_leaves_as_the_primary_sent_it() {
    let mut rig = Rig::start(Choice::PATIENT);
    let primary = Segment::new(Side::V4).id(1).payload(b"abc").bytes();
    let secondary = Segment::new(Side::V4).id(2).payload(b"abc").bytes();
    rig.primary_sends(&primary);
    rig.secondary_sends(&secondary);
    assert_eq!(rig.released(), primary);
    let (rest, summary) = rig.finish();
    let summary = summary.unwrap();
    assert!(rest.is_empty() && summary.is_same() && summary.held == 0);
    assert_eq!(summary.stats.released_by_match, 1);
}

#[test]
fn a_stream_that_is_cut_differently_leaves_whole() {
    let mut rig = Rig::start(Choice::PATIENT);
    rig.primary_sends(&segment(0, b"abcdef"));
    rig.primary_sends(&segment(6, b"gh"));
    for (seq, part) in [(0, &b"ab"[..]), (2, b"cdefg"), (7, b"h")] {
        rig.secondary_sends(&segment(seq, part));
    }
    assert_eq!(rig.released(), segment(0, b"abcdef"));
    assert_eq!(rig.released(), segment(6, b"gh"));
    assert!(rig.finish().1.unwrap().is_same());
}

#[test]
fn one_side_may_send_again_what_has_left() {
    let mut rig = Rig::start(Choice::PATIENT);
    rig.both_send(&segment(0, b"abcdef"));
    assert_eq!(rig.released(), segment(0, b"abcdef"));
    rig.secondary_sends(&segment(0, b"abcdef"));
    for again in [segment(0, b"abcdef"), segment(2, b"cd")] {
        rig.primary_sends(&again);
        assert_eq!(rig.released(), again);
    }
    rig.primary_sends(&segment(2, b"cX"));
    assert_eq!(rig.notified(), "DO_CHECKPOINT");
    let (released, summary) = rig.finish();
    assert!(released.is_empty() && !summary.unwrap().is_same());
}

/// More connections that end than there is room for.
#[test]
fn connections_come_and_go_without_end() {
    const CONNECTIONS: u16 = 20_000;
    let mut rig = Rig::start(Choice::PATIENT);
    let frames = |n: u16| {
        let of = |seq| Segment::new(Side::V4).ports(80, n).seq(seq);
        let fin = of(4).flags(ACK | FIN);
        [
            of(0).flags(SYN | ACK).bytes(),
            of(1).payload(b"abc").bytes(),
            fin.bytes(),
        ]
    };
    let streams = writers(&rig);
    let threads = streams.map(|mut stream| {
        thread::spawn(move || {
            for frame in (0..CONNECTIONS).flat_map(frames) {
                stream.write_all(&message(&frame, None)).unwrap();
            }
        })
    });
    for frame in (0..CONNECTIONS).flat_map(frames) {
        assert_eq!(rig.released(), frame);
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(rig.finish().1.unwrap().is_same());
}

#[test]
fn what_diverged_leaves_by_a_checkpoint_in_the_order_of_its_making() {
    let mut rig = Rig::start(Choice::PATIENT);
    rig.primary_sends(&segment(0, b"abc"));
    rig.secondary_sends(&segment(0, b"abX"));
    assert_eq!(rig.notified(), "DO_CHECKPOINT");
    rig.primary_sends(&segment(3, b"def"));
    rig.primary_sends(&udp(Side::V4, false, 53, 9, b"x"));
    // Another flow is not stopped by it.
    let other = Segment::new(Side::V6).payload(b"other").bytes();
    rig.both_send(&other);
    assert_eq!(rig.released(), other);
    rig.notify("COLO_CHECKPOINT");
    assert_eq!(rig.released(), segment(0, b"abc"));
    assert_eq!(rig.released(), segment(3, b"def"));
    assert_eq!(rig.released(), udp(Side::V4, false, 53, 9, b"x"));
    // Now they are the same again.
    rig.both_send(&segment(6, b"ghi"));
    assert_eq!(rig.released(), segment(6, b"ghi"));
    let (rest, summary) = rig.finish();
    let summary = summary.unwrap();
    assert!(rest.is_empty() && !summary.is_same());
    assert_eq!((summary.requests, summary.checkpoints), (1, 1));
    assert_eq!(summary.divergences[0].offset, 2);
}

#[test]
fn a_checkpoint_that_nobody_asked_for_ends_an_epoch_too() {
    let mut rig = Rig::start(Choice::PATIENT);
    rig.primary_sends(&segment(0, b"abc"));
    rig.notify("COLO_CHECKPOINT");
    assert_eq!(rig.released(), segment(0, b"abc"));
    let summary = rig.finish().1.unwrap();
    assert!(summary.is_same());
    assert_eq!(summary.stats.released_by_checkpoint, 1);
}

#[test]
fn a_greeting_is_answered_and_the_rest_ignored() {
    let mut rig = Rig::start(Choice::PATIENT);
    rig.notify("SOMETHING");
    rig.notify("COLO_USERSPACE_PROXY_INIT");
    assert_eq!(rig.notified(), "COLO_COMPARE_GET_XEN_INIT");
    assert!(rig.finish().1.unwrap().is_same());
}

#[test]
fn what_the_secondary_lacks_counts_when_its_deadline_has_passed() {
    let mut rig = Rig::start(Choice {
        deadline_us: 1000,
        ..Choice::PATIENT
    });
    rig.primary_sends(&segment(0, b"abc"));
    assert_eq!(rig.notified(), "DO_CHECKPOINT");
    let summary = rig.finish().1.unwrap();
    assert_eq!((summary.requests, summary.held), (1, 1));
}

#[test]
fn what_is_unmatched_at_the_end_counts_as_late() {
    for primary_has_it in [true, false] {
        let mut rig = Rig::start(Choice {
            notify: false,
            ..Choice::PATIENT
        });
        rig.both_send(&segment(0, b"abc"));
        let surplus = udp(Side::V4, false, 53, 9, b"x");
        if primary_has_it {
            rig.primary_sends(&surplus);
        } else {
            rig.secondary_sends(&surplus);
        }
        let (released, summary) = rig.finish();
        let summary = summary.unwrap();
        assert_eq!(released, [segment(0, b"abc")]);
        assert_eq!(summary.requests, 1);
        assert_eq!(summary.held, u64::from(primary_has_it));
    }
}

#[test]
fn without_a_notify_socket_what_diverged_stays() {
    let mut rig = Rig::start(Choice {
        notify: false,
        ..Choice::PATIENT
    });
    rig.primary_sends(&segment(0, b"abc"));
    rig.secondary_sends(&segment(0, b"abX"));
    rig.both_send(&segment(3, b"def"));
    let (released, summary) = rig.finish();
    let summary = summary.unwrap();
    assert!(released.is_empty() && !summary.is_same());
    assert_eq!((summary.held, summary.checkpoints), (2, 0));
}

#[test]
fn an_observer_counts_checkpoints_as_taken() {
    let mut rig = Rig::start(Choice {
        notify: false,
        at_once: true,
        ..Choice::PATIENT
    });
    for seq in [0, 3, 6] {
        rig.primary_sends(&segment(seq, b"abc"));
        rig.secondary_sends(&segment(seq, b"abX"));
        assert_eq!(rig.released(), segment(seq, b"abc"));
    }
    let summary = rig.finish().1.unwrap();
    assert_eq!((summary.requests, summary.checkpoints), (3, 3));
}

#[test]
fn virtio_net_headers_travel_with_their_frames() {
    let mut rig = Rig::start(Choice {
        vnet_hdr: true,
        ..Choice::PATIENT
    });
    rig.both_send(&segment(0, b"abc"));
    assert_eq!(rig.released(), segment(0, b"abc"));
    rig.primary_sends(&segment(3, b"def"));
    rig.notify("COLO_CHECKPOINT");
    assert_eq!(rig.released(), segment(3, b"def"));
    assert!(rig.finish().1.unwrap().is_same());
}

/// The inputs, for other threads: their writes may take long.
fn writers(rig: &Rig) -> [UnixStream; 2] {
    [&rig.primary, &rig.secondary].map(|stream| {
        let stream = stream.as_ref().unwrap().try_clone().unwrap();
        stream.set_write_timeout(None).unwrap();
        stream
    })
}

#[test]
fn nothing_is_dropped_while_out_is_not_read() {
    let mut rig = Rig::start(Choice::PATIENT);
    let payload = [7; 1400];
    let frames = 20_000u32;
    let [mut primary, mut secondary] = writers(&rig);
    // More than all buffers hold: both writers come to a stand until OUT is read.
    let writers = thread::spawn(move || {
        for n in 0..frames {
            let message = message(&segment(n * 1400, &payload), None);
            primary.write_all(&message).unwrap();
            secondary.write_all(&message).unwrap();
        }
    });
    for n in 0..frames {
        assert_eq!(rig.released(), segment(n * 1400, &payload), "frame {n}");
    }
    writers.join().unwrap();
    assert!(rig.finish().1.unwrap().is_same());
}

#[test]
fn a_secondary_that_is_far_behind_stops_the_primary_and_nothing_else() {
    // More than the comparator holds and the sockets buffer.
    const AHEAD: u32 = 8300;
    const FRAMES: u32 = 3 * AHEAD;
    let mut rig = Rig::start(Choice::PATIENT);
    let [mut primary, mut secondary] = writers(&rig);
    let frame = |n: u32| message(&segment(n * 10, &[n as u8; 10]), None);
    let (is_ahead, ahead) = channel();
    let leader = thread::spawn(move || {
        for n in 0..FRAMES {
            if n == AHEAD {
                is_ahead.send(()).unwrap();
            }
            primary.write_all(&frame(n)).unwrap();
        }
    });
    ahead.recv().unwrap();
    let follower = thread::spawn(move || {
        (0..FRAMES).for_each(|n| secondary.write_all(&frame(n)).unwrap());
    });
    for n in 0..FRAMES {
        assert_eq!(rig.released(), segment(n * 10, &[n as u8; 10]));
    }
    leader.join().unwrap();
    follower.join().unwrap();
    let summary = rig.finish().1.unwrap();
    assert!(summary.is_same(), "{summary:?}");
}

/// Cuts bytes at random places.
fn write_in_pieces(mut stream: UnixStream, bytes: &[u8], pieces: &[usize]) {
    let (mut at, mut pieces) = (0, pieces.iter().cycle());
    while at < bytes.len() {
        let end = bytes.len().min(at + pieces.next().unwrap());
        stream.write_all(&bytes[at..end]).unwrap();
        at = end;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]
    #[test]
    fn messages_are_found_wherever_the_writes_are_cut(
        vnet_hdr: bool,
        lengths in vec(prop_oneof![4 => 1usize..1460, 1 => 1usize..60_000], 1..200),
        pieces in [vec(1usize..100_000, 1..20), vec(1usize..5000, 1..20)],
    ) {
        let mut rig = Rig::start(Choice { vnet_hdr, ..Choice::PATIENT });
        let (mut frames, mut bytes, mut seqs) = (Vec::new(), Vec::new(), [0u32; 4]);
        for (n, len) in lengths.into_iter().enumerate() {
            let (flow, payload) = (n % 4, std::vec::from_elem(n as u8, len));
            let segment = Segment::new(Side::V6).ports(80, 40_000 + flow as u16);
            let frame = segment.seq(seqs[flow]).payload(&payload).bytes();
            seqs[flow] += len as u32;
            bytes.extend_from_slice(&message(&frame, vnet_hdr.then_some(12)));
            frames.push(frame);
        }
        let bytes = Arc::new(bytes);
        let threads = writers(&rig).into_iter().zip(pieces).map(|(stream, pieces)| {
            let bytes = Arc::clone(&bytes);
            thread::spawn(move || write_in_pieces(stream, &bytes, &pieces))
        });
        let threads: Vec<_> = threads.collect();
        // Flows may overtake each other, frames of a flow may not.
        let mut released: Vec<_> = frames.iter().map(|_| rig.released()).collect();
        let flow = |frame: &Vec<u8>| frame[57];
        released.sort_by_key(flow);
        frames.sort_by_key(flow);
        prop_assert!(released == frames);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        prop_assert!(rig.finish().1.unwrap().is_same());
    }
}

/// A frame that may be anything: of a few flows and places, so that much of it meets, with bytes
/// changed.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let shape = (0u16..3, 0u32..40, 0usize..40, 0u8..64, 0usize..6);
    let changes = vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    (shape, changes, 0usize..4).prop_map(|((port, seq, len, flags, kind), changes, cut)| {
        let payload = std::vec::from_elem(b'x', len);
        let side = if kind % 2 == 0 { Side::V4 } else { Side::V6 };
        let mut frame = match kind {
            0..=3 => {
                let segment = Segment::new(side).ports(80, port).seq(seq).ack(1);
                segment.flags(flags).payload(&payload).bytes()
            }
            4 => udp(side, false, 53, port, &payload),
            _ => payload,
        };
        for (at, byte) in changes {
            if !frame.is_empty() {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
        }
        if cut == 0 {
            frame.truncate(frame.len() / 2);
        }
        if frame.is_empty() {
            b"?".to_vec()
        } else {
            frame
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]
    #[test]
    fn whatever_comes_in_each_frame_of_the_primary_leaves_once(
        frames in vec((any_frame(), any_frame(), 0u8..4), 1..120),
        notify: bool,
    ) {
        // What diverges leaves at once or when it is answered, what is late leaves at the end.
        let mut rig = Rig::start(Choice { notify, at_once: !notify, ..Choice::PATIENT });
        let answers = rig.notify.take().map(answer_every_request);
        let mut sent = Vec::new();
        for (primary, secondary, kind) in frames {
            match kind {
                0 => rig.both_send(&primary),
                1 => rig.primary_sends(&primary),
                2 => rig.secondary_sends(&secondary),
                _ => {
                    rig.primary_sends(&primary);
                    rig.secondary_sends(&secondary);
                }
            }
            if kind != 2 {
                sent.push(primary);
            }
        }
        let (mut released, summary) = rig.finish();
        let summary = summary.unwrap();
        released.sort_unstable();
        sent.sort_unstable();
        prop_assert_eq!(released, sent);
        prop_assert_eq!(summary.held, 0);
        let answers = answers.map(|thread| thread.join().unwrap());
        prop_assert_eq!(answers.unwrap_or(summary.requests), summary.requests);
    }
}

/// Says at once that each checkpoint that is asked for was taken. Gives their number.
fn answer_every_request(mut notify: UnixStream) -> JoinHandle<u64> {
    thread::spawn(move || {
        let mut request = message(b"DO_CHECKPOINT", None);
        let mut answered = 0;
        while notify.read_exact(&mut request).is_ok() {
            // Whoever has ended needs no answer.
            notify.write_all(&message(b"COLO_CHECKPOINT", None)).ok();
            answered += 1;
        }
        answered
    })
}

/// Ends a run by raw bytes on the primary's socket, and gives its error.
fn error_of(vnet_hdr: bool, bytes: &[u8]) -> SocketsError {
    let mut rig = Rig::start(Choice {
        vnet_hdr,
        ..Choice::PATIENT
    });
    let primary = rig.primary.as_mut().unwrap();
    primary.write_all(bytes).unwrap();
    primary.shutdown(Shutdown::Write).unwrap();
    let error = rig.outcome().unwrap_err();
    let text = error.to_string();
    assert!(text.contains("primary_in (connect:/"), "{text}");
    error
}

#[test]
fn a_message_without_a_frame_is_refused() {
    let mut bytes = message(&segment(0, b"abc"), None);
    let before = bytes.len() as u64;
    bytes.extend_from_slice(&[0; 4]);
    let error = error_of(false, &bytes);
    assert!(
        matches!(error, SocketsError::Length { at, found: 0, .. } if at == before),
        "{error}"
    );
}

#[test]
fn a_message_that_is_too_long_is_refused() {
    let error = error_of(false, &69_633u32.to_be_bytes());
    assert!(
        matches!(
            error,
            SocketsError::Length {
                at: 0,
                found: 69_633,
                most: 69_632,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_virtio_net_header_that_fills_its_message_is_refused() {
    let error = error_of(true, &[0, 0, 0, 12, 0, 0, 0, 12]);
    assert!(
        matches!(
            error,
            SocketsError::VnetHeader {
                at: 0,
                found: 12,
                len: 12,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_stream_that_ends_within_a_message_is_refused() {
    let whole = message(&segment(0, b"abc"), None);
    for end in [whole.len() + 2, whole.len() + 4, 2 * whole.len() - 1] {
        let twice = [whole.clone(), whole.clone()].concat();
        let error = error_of(false, &twice[..end]);
        let (position, rest) = (whole.len() as u64, end - whole.len());
        assert!(
            matches!(error, SocketsError::Truncated { at, have, .. } if at == position && have == rest),
            "{error}"
        );
    }
    let error = error_of(true, &[0, 0, 0, 40, 0, 0]);
    assert!(
        matches!(error, SocketsError::Truncated { at: 0, have: 6, .. }),
        "{error}"
    );
}

#[test]
fn an_output_that_nobody_reads_any_more_ends_the_run() {
    let mut rig = Rig::start(Choice::PATIENT);
    rig.out.shutdown(Shutdown::Both).unwrap();
    rig.both_send(&segment(0, b"abc"));
    let error = rig.outcome().unwrap_err();
    assert!(
        matches!(error, SocketsError::Write { at: 0, .. }),
        "{error}"
    );
    assert!(error.to_string().starts_with("out (connect:/"), "{error}");
}

#[test]
fn a_lost_notify_socket_ends_the_run_once_it_is_needed() {
    let mut rig = Rig::start(Choice::PATIENT);
    rig.notify = None;
    rig.both_send(&segment(0, b"abc"));
    assert_eq!(rig.released(), segment(0, b"abc"));
    rig.primary_sends(&segment(3, b"def"));
    rig.secondary_sends(&segment(3, b"deX"));
    let error = rig.outcome().unwrap_err();
    assert!(matches!(error, SocketsError::NotifyGone { .. }), "{error}");
}

#[test]
fn the_largest_message_is_taken() {
    let mut rig = Rig::start(Choice::PATIENT);
    let mut frame = segment(0, b"");
    frame.resize(69_632, 1);
    rig.primary_sends(&frame);
    rig.notify("COLO_CHECKPOINT");
    assert_eq!(rig.released(), frame);
    assert!(rig.finish().1.unwrap().is_same());
}
