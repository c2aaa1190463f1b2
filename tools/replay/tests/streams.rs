//! TCP: the same stream however it is cut, and what differs in it.

#![allow(clippy::unwrap_used, reason = "what fails in a rig fails its test")]

mod rig;

use colo_compare::testing::{Segment, Side};
use colo_compare::wire::tcp::{ACK, SYN};
use colo_compare::{Opener, Policy, PolicyAction, Rule};
use colo_replay::{Settings, table};
use rig::*;

const ISN: [u32; 2] = [1000, u32::MAX - 20];

fn pair(side: Side) -> [Connection; 2] {
    [
        Connection::accepted(side, ISN[0], 0),
        Connection::accepted(side, ISN[1], 300),
    ]
}

/// A request's answer a millisecond, from both.
fn answers(each: [&[&[u8]]; 2]) -> [Connection; 2] {
    let mut both = pair(Side::V4);
    for (connection, answers) in both.iter_mut().zip(each) {
        let skew_us = connection.at_us;
        for (n, answer) in answers.iter().enumerate() {
            connection.at(1000 * (n as u64 + 1) + skew_us);
            connection.send(answer, 1448).ack();
        }
    }
    both
}

#[test]
fn one_stream_cut_and_numbered_differently_is_the_same() {
    for side in [Side::V4, Side::V6] {
        let [mut pvm, mut svm] = pair(side);
        let bytes = text(5000);
        pvm.at(1000).send(&bytes, 1448).ack().at(2000).fin();
        svm.at(900).send(&bytes[..100], 7).send(&bytes[100..], 999);
        svm.again(&bytes[4000..], 1000).at(2100).ack().fin();
        let report = compare(&pvm.frames, &svm.frames);
        assert_same(&report);
        // SYN-ACK, four segments, an ACK that needs no counterpart, FIN.
        assert_eq!((report.released, report.pairs), (7, 6));
        assert_eq!((report.flows, report.secondary_acks), (1, 1));
    }
}

#[test]
fn reordering_is_not_a_difference() {
    let [mut pvm, mut svm] = pair(Side::V6);
    let bytes = text(3000);
    pvm.at(1000).send(&bytes, 1000);
    svm.at(1000).send(&bytes, 500);
    svm.frames.0[1..].reverse();
    pvm.frames.0.swap(2, 3);
    assert_same(&compare(&pvm.frames, &svm.frames));
}

#[test]
fn one_byte_that_differs_is_found_at_its_place() {
    let same = text(2000);
    let mut other = same.clone();
    other[1700] ^= 0x20;
    let [pvm, svm] = answers([&[&same, b"tail", b"more"], &[&other, b"tail", b"more"]]);
    let report = compare(&pvm.frames, &svm.frames);
    assert_eq!(causes(&report), ["payload"], "{report:#?}");
    // The answer's ACK waits behind it.
    assert_eq!((report.checkpoints, report.held, report.dropped), (1, 2, 1));
    let found = &report.divergences[0];
    // In the second segment.
    assert_eq!(found.offset, 1700 - 1448);
    let shown = (found.offset - found.view_at) as usize;
    assert_eq!(found.primary.bytes[shown], same[1700]);
    assert_eq!(found.secondary.bytes[shown], other[1700]);
    assert_eq!(found.primary.bytes[..shown], same[1700 - shown..1700]);
    assert_eq!(found.primary.frame, Some(3));
    assert_eq!(found.secondary.frame, Some(3));
    let text = table(&report);
    assert!(text.contains("diverged: payload"), "{text}");
    assert!(text.contains("^^"), "{text}");
}

#[test]
fn a_difference_while_the_svm_is_ahead_is_one_difference() {
    let same = text(20_000);
    let mut other = same.clone();
    other[5000] ^= 1;
    let [mut pvm, mut svm] = pair(Side::V4);
    svm.at(500).send(&other, 1448);
    for (n, part) in same.chunks(1448).enumerate() {
        pvm.at(1000 + 100 * n as u64).send(part, 1448);
    }
    let report = compare(&pvm.frames, &svm.frames);
    assert_eq!(causes(&report), ["payload"], "{report:#?}");
    // The checkpoint waits for a pause; there is none until the end.
    assert_eq!((report.checkpoints, report.held), (1, 11));
}

#[test]
fn a_difference_while_the_pvm_is_ahead_is_one_difference() {
    let same = text(20_000);
    let mut other = same.clone();
    other[5000] ^= 1;
    let [mut pvm, mut svm] = pair(Side::V4);
    pvm.at(500).send(&same, 1448);
    for (n, part) in other.chunks(1448).enumerate() {
        svm.at(1000 + 100 * n as u64).send(part, 1448);
    }
    let report = compare(&pvm.frames, &svm.frames);
    assert_eq!(causes(&report), ["payload"], "{report:#?}");
    assert_eq!(report.checkpoints, 1);
}

#[test]
fn messages_of_different_lengths_diverge_once_each() {
    for lengths in [(10, 9), (9, 10), (100, 1)] {
        let numbers = ["1".repeat(lengths.0), "2".repeat(lengths.1)];
        let each = numbers.each_ref().map(|number| {
            [
                b"first\n".as_slice(),
                number.as_bytes(),
                b"second answer\n",
                b"third answer\n",
            ]
        });
        let [pvm, svm] = answers(each.each_ref().map(|answers| answers.as_slice()));
        let report = compare(&pvm.frames, &svm.frames);
        assert_eq!(causes(&report), ["payload"], "{lengths:?}: {report:#?}");
        // The answer's ACK waits behind it.
        assert_eq!((report.checkpoints, report.held), (1, 2), "{lengths:?}");
    }
}

#[test]
fn other_messages_of_the_same_length_do_not_end_at_the_same_place() {
    // The SVM has said two messages when the PVM says its first, and they add up to it.
    let [mut pvm, mut svm] = pair(Side::V4);
    svm.at(1000).send(b"another", 1448).at(2000);
    svm.send(b"the second answer", 1448).at(8000);
    pvm.at(4000)
        .send(b"the first answer, longer", 1448)
        .at(9000);
    pvm.send(b"the second answer", 1448).at(10_000);
    for connection in [&mut pvm, &mut svm] {
        connection.send(b"the third answer", 1448).fin();
    }
    let report = compare(&pvm.frames, &svm.frames);
    assert_eq!(causes(&report), ["payload"], "{report:#?}");
}

#[test]
fn a_byte_that_occurs_elsewhere_does_not_tell_where_a_stream_goes_on() {
    let [mut pvm, mut svm] = pair(Side::V4);
    // In segments of five; a whole one of the SVM's is the beginning of one of the PVM's.
    svm.at(1000).send(b"12345e", 5).at(2000);
    svm.send(b"the second answer", 1448).at(8000);
    pvm.at(4000).send(b"abcd-efgh-ijkl", 5).at(9000);
    pvm.send(b"the second answer", 1448).at(10_000);
    for connection in [&mut pvm, &mut svm] {
        connection.send(b"the third answer", 1448).fin();
    }
    let report = compare(&pvm.frames, &svm.frames);
    assert_eq!(causes(&report), ["payload"], "{report:#?}");
}

#[test]
fn a_late_answer_is_a_checkpoint_and_then_both_go_on() {
    let [mut pvm, mut svm] = pair(Side::V4);
    pvm.at(1000)
        .send(b"early", 100)
        .at(90_000)
        .send(b"same", 100);
    svm.at(41_000)
        .send(b"early", 100)
        .at(90_100)
        .send(b"same", 100);
    let report = compare(&pvm.frames, &svm.frames);
    assert_eq!(causes(&report), ["deadline"], "{report:#?}");
    assert_eq!(report.divergences[0].at_us, 21_000);
    assert_eq!((report.held, report.checkpoints), (1, 1));
    let patient = Settings {
        deadline_ms: 41,
        ..Settings::default()
    };
    assert_same(&compare_with(&pvm.frames, &svm.frames, &patient));
}

#[test]
fn a_lost_answer_is_one_difference() {
    let [mut pvm, mut svm] = pair(Side::V4);
    pvm.at(1000)
        .send(b"lost", 100)
        .at(90_000)
        .send(b"later", 100);
    pvm.at(190_000).send(b"last", 100);
    svm.at(90_000)
        .send(b"later", 100)
        .at(190_000)
        .send(b"last", 100);
    let report = compare(&pvm.frames, &svm.frames);
    assert_eq!(causes(&report), ["deadline"], "{report:#?}");
}

#[test]
fn a_reset_of_one_side_is_a_difference() {
    for one_sided in [0, 1] {
        let mut both = answers([&[b"same"], &[b"same"]]);
        both[one_sided].at(3000).reset();
        let report = compare(&both[0].frames, &both[1].frames);
        assert_eq!(report.divergences.len(), 1, "{report:#?}");
        assert_eq!(report.checkpoints, 1);
        both[1 - one_sided].at(3100).reset();
        assert_same(&compare(&both[0].frames, &both[1].frames));
    }
}

#[test]
fn a_capture_that_ends_early_leaves_output_unmatched() {
    let answer = text(4000);
    let [pvm, svm] = answers([&[b"same", &answer], &[b"same", &answer]]);
    let mut short = svm.frames.clone();
    short.0.truncate(4);
    let report = compare(&pvm.frames, &short);
    assert_eq!(causes(&report), ["deadline"], "{report:#?}");
    assert_eq!(report.divergences[0].secondary.frame, None);
    assert_eq!(report.checkpoints, 1);
    let mut short = pvm.frames.clone();
    short.0.truncate(4);
    let report = compare(&short, &svm.frames);
    assert_eq!(causes(&report), ["extra"], "{report:#?}");
    assert_eq!((report.checkpoints, report.held), (1, 0));
    assert!(report.dropped > 0);
    assert!(report.divergences[0].secondary.frame.is_some());
}

#[test]
fn each_unmatched_flow_is_named_but_one_checkpoint_covers_them() {
    let mut each = [Frames::default(), Frames::default()];
    for port in 40_000..40_003 {
        for (n, frames) in each.iter_mut().enumerate() {
            let mut connection = Connection::accepted(Side::V4, ISN[n], 0);
            connection.port = port;
            connection.frames.0.clear();
            connection.send(b"both", 100);
            if n == 0 || port == 40_000 {
                connection.send(b"one", 100);
            }
            frames.0.extend(connection.frames.0);
        }
    }
    // Without a handshake the numbers must agree.
    let report = compare(&each[0], &each[0]);
    assert_same(&report);
    assert_eq!(report.flows, 3);
    each[1] = each[0].clone();
    each[1].0.retain(|(_, frame)| !frame.ends_with(b"one"));
    let report = compare(&each[0], &each[1]);
    assert_eq!(causes(&report), ["deadline"; 3], "{report:#?}");
    assert_eq!((report.checkpoints, report.held), (1, 3));
    assert!(report.flow_table.iter().all(|row| row.divergences == 1));
}

#[test]
fn without_a_handshake_numbers_are_taken_as_they_are() {
    let bytes = text(300);
    let both = |isn: [u32; 2]| {
        isn.map(|isn| {
            let mut connection = Connection::going_on(Side::V4, isn, 0);
            connection.send(&bytes, 100);
            connection.frames
        })
    };
    let [pvm, svm] = both([5, 5]);
    assert_same(&compare(&pvm, &svm));
    let [pvm, svm] = both([5, 6]);
    assert!(!compare(&pvm, &svm).is_same());
}

#[test]
fn an_svm_that_is_ahead_of_the_pvms_handshake_waits_for_it() {
    let bytes = text(300);
    let mut pvm = Connection::accepted(Side::V4, ISN[0], 5000);
    pvm.send(&bytes, 1000).fin();
    let mut svm = Connection::accepted(Side::V4, ISN[1], 100);
    svm.send(&bytes, 100).fin();
    assert_same(&compare(&pvm.frames, &svm.frames));
}

#[test]
fn ports_that_are_used_again_are_other_connections() {
    let mut each = [Frames::default(), Frames::default()];
    for n in 0..20u32 {
        for (side, frames) in each.iter_mut().enumerate() {
            let isn = ISN[side].wrapping_mul(n + 1).wrapping_add(n << 20);
            let at_us = 5000 * u64::from(n) + 400 * (side as u64);
            let mut connection = Connection::accepted(Side::V4, isn, at_us);
            connection.send(&text(100 + n as usize), 60).fin();
            frames.0.extend(connection.frames.0);
        }
    }
    let report = compare(&each[0], &each[1]);
    assert_same(&report);
    assert_eq!(report.flows, 1);
}

#[test]
fn connections_that_the_guest_opens_are_translated_too() {
    let each = ISN.map(|isn| {
        let mut connection = Connection::going_on(Side::V6, isn, 0);
        let syn = Segment::new(Side::V6).ports(80, 40_000).seq(isn);
        connection.frames.push(0, syn.flags(SYN).bytes());
        connection.at(700).ack().send(b"hello", 100);
        connection.frames
    });
    assert_same(&compare(&each[0], &each[1]));
}

#[test]
fn a_connection_that_the_guests_open_from_other_ports_is_one_difference() {
    let each = [(ISN[0], 5000, 0), (ISN[1], 6000, 400)].map(|(isn, port, skew_us)| {
        let mut frames = Frames::default();
        let segment = |seq: u32| Segment::new(Side::V4).ports(port, 443).seq(seq);
        frames.push(skew_us, segment(isn).flags(SYN).bytes());
        for n in 0..10u32 {
            let at_us = 30_000 * u64::from(n + 1) + skew_us;
            let seq = isn.wrapping_add(1 + 5 * n);
            frames.push(at_us, segment(seq).payload(b"hello").bytes());
        }
        frames
    });
    let report = compare(&each[0], &each[1]);
    assert_eq!(causes(&report), ["outbound_tuple"], "{report:#?}");
    assert_eq!((report.checkpoints, report.held), (1, 1));
    // In a flow of their own there are the SVM's first frames only.
    let rows: Vec<_> = report.flow_table.iter().collect();
    assert_eq!(
        (rows[0].secondary.packets, rows[1].secondary.packets),
        (10, 1)
    );
}

#[test]
fn options_of_the_handshake_are_compared() {
    let mut each = pair(Side::V4).map(|connection| connection.frames);
    let syn = Segment::new(Side::V4).ports(80, 40_000).seq(ISN[1]);
    let syn = syn.flags(SYN | ACK).ack(PEER_ISN + 1);
    each[1].0[0].1 = syn.option(&[2, 4, 5, 0xa0]).bytes();
    let report = compare(&each[0], &each[1]);
    assert_eq!(causes(&report), ["syn_options"], "{report:#?}");
}

#[test]
fn a_policy_with_a_direction_is_for_flows_whose_opening_is_seen() {
    let [pvm, svm] = answers([&[b"one", b"two"], &[b"one", b"TWO"]]);
    let with = |direction| {
        let rule = Rule {
            direction: Some(direction),
            action: PolicyAction::Release,
            ..Rule::default()
        };
        Settings {
            policy: Policy::new(vec![rule]),
            ..Settings::default()
        }
    };
    let inbound = compare_with(&pvm.frames, &svm.frames, &with(Opener::Peer));
    assert!(inbound.is_same(), "{inbound:#?}");
    assert_eq!((inbound.released, inbound.pairs), (5, 0));
    for (opener, from) in [(Opener::Guest, 0), (Opener::Peer, 1)] {
        let part = |frames: &Frames| Frames(frames.0[from..].to_vec());
        let settings = with(opener);
        let report = compare_with(&part(&pvm.frames), &part(&svm.frames), &settings);
        assert!(!report.is_same(), "{report:#?}");
    }
}

#[test]
fn a_header_that_differs_is_shown() {
    let [pvm, mut svm] = answers([&[b"one"], &[b"one"]]);
    // The TTL.
    svm.frames.0[1].1[22] = 63;
    let report = compare(&pvm.frames, &svm.frames);
    assert_eq!(causes(&report), ["header"], "{report:#?}");
    let found = &report.divergences[0];
    let at = (found.offset - found.view_at) as usize;
    assert_eq!((found.offset, found.primary.bytes[at]), (22, 64));
    assert_eq!(found.secondary.bytes[at], 63);
}

#[test]
fn input_of_the_primary_is_given_to_the_comparator() {
    let [mut pvm, svm] = answers([&[b"one", b"two"], &[b"one", b"two"]]);
    let guest = pvm.clone();
    for n in 0..2 {
        let segment = Segment::new(Side::V4).to_guest().ports(80, 40_000);
        let ack = ISN[0].wrapping_add(1 + 3 * n);
        let segment = segment.seq(PEER_ISN + 1 + 8 * n).ack(ack);
        let at_us = 900 + 1000 * u64::from(n);
        pvm.frames
            .push(at_us, segment.payload(b"request\n").bytes());
    }
    let settings = Settings {
        guest_mac: Some(colo_compare::testing::GUEST_MAC),
        ..Settings::default()
    };
    let report = compare_with(&pvm.frames.sorted(), &svm.frames, &settings);
    assert_same(&report);
    assert_eq!(report.primary_input.packets, 2);
    let without = compare_with(&guest.frames, &svm.frames, &settings);
    assert_eq!(without.pairs, report.pairs);
}
