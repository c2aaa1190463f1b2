//! The secondary path alone: order, epochs, retention, limits.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod follower;

use proptest::prelude::*;

use colo_compare::testing::{Segment, Side, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, RST, SYN};
use colo_compare::{Cause, Limits, PathError, SecondaryAction};
use follower::Follower;

fn message(n: u8) -> Vec<u8> {
    udp(Side::V4, true, 7, 9000, &[n])
}

fn request(seq: u32, payload: &[u8]) -> Vec<u8> {
    Segment::new(Side::V6)
        .to_guest()
        .seq(seq)
        .ack(50)
        .payload(payload)
        .bytes()
}

fn ack(ack: u32) -> Vec<u8> {
    Segment::new(Side::V6).seq(50).ack(ack).bytes()
}

#[test]
fn rule_5_input_is_acknowledged_in_batches_and_gaps_are_refused() {
    let mut follower = Follower::new();
    (0..3).for_each(|n| follower.mirror(2, &message(n)));
    assert_eq!(follower.actions(), [SecondaryAction::AckInput { up_to: 3 }]);
    for found in [3, 5] {
        let token = follower.frames.insert(&message(9)).unwrap();
        let refused = follower
            .path
            .handle_mirror(0, &mut follower.frames, 2, found, token);
        assert_eq!(refused, Err(PathError::InputGap { expected: 4, found }));
    }
    for n in 0..3 {
        assert_eq!(follower.deliver(), Some(message(n)));
    }
    assert_eq!(follower.deliver(), None);
    follower.close();
}

#[test]
fn rule_4_input_that_comes_after_the_commit_that_includes_it_is_not_delivered_again() {
    // Checkpoints and mirrored input travel by different connections.
    let mut follower = Follower::new();
    follower.path.stop();
    follower.commit(2, Vec::new());
    assert_eq!(follower.actions(), [SecondaryAction::CaughtUp { epoch: 3 }]);
    follower.mirror(2, &message(1));
    follower.mirror(2, &request(100, b"include"));
    assert_eq!(follower.actions(), [SecondaryAction::AckInput { up_to: 2 }]);
    assert_eq!(follower.deliver(), None);
    assert_eq!(
        (follower.path.input_frames(), follower.frames.used()),
        (0, 0)
    );
    assert_eq!(follower.path.stats().dropped_by_commit, 2);
    follower.mirror(3, &message(2));
    assert_eq!(follower.deliver(), Some(message(2)));
    // It counts as consumed.
    follower.path.stop();
    follower.commit(3, Vec::new());
    assert_eq!(
        follower.actions(),
        [
            SecondaryAction::CaughtUp { epoch: 4 },
            SecondaryAction::AckInput { up_to: 3 }
        ]
    );
    follower.close();
}

#[test]
fn rule_4_input_of_the_next_epoch_waits_for_the_commit() {
    let mut follower = Follower::new();
    follower.mirror(2, &message(1));
    follower.mirror(3, &message(2));
    assert_eq!(
        follower.actions(),
        [SecondaryAction::AckInput { up_to: 2 }],
        "kept all the same"
    );
    follower.path.stop();
    assert_eq!(follower.deliver(), None);
    follower.path.resume_unchanged();
    assert_eq!(follower.deliver(), Some(message(1)));
    assert_eq!(follower.deliver(), None);
    follower.path.stop();
    follower.commit(2, Vec::new());
    assert_eq!(
        follower.actions(),
        [],
        "not caught up before the backlog is delivered"
    );
    assert_eq!(follower.deliver(), Some(message(2)));
    assert_eq!(follower.actions(), [SecondaryAction::CaughtUp { epoch: 3 }]);
    follower.close();
}

#[test]
fn rule_5_a_commit_includes_queued_and_kept_input() {
    let mut follower = Follower::new();
    follower.mirror(2, &request(10, b"abc"));
    follower.mirror(2, &request(13, b"def"));
    assert!(follower.deliver().is_some());
    let token = follower.path.poll_deliver(0, &mut follower.frames).unwrap();
    follower.path.undelivered(token);
    follower.mirror(2, &message(1));
    follower.mirror(3, &message(2));
    assert_eq!(follower.path.input_frames(), 5);
    follower.path.stop();
    follower.commit(2, Vec::new());
    assert_eq!(follower.path.input_frames(), 1);
    assert_eq!(follower.deliver(), Some(message(2)));
    assert_eq!(follower.deliver(), None);
    follower.close();
}

#[test]
fn rule_5_segments_are_kept_until_the_svms_own_ack() {
    let mut follower = Follower::new();
    follower.mirror(2, &request(10, b"abc"));
    follower.mirror(2, &request(13, b"def"));
    let first = follower.deliver().unwrap();
    follower.deliver().unwrap();
    assert_eq!(follower.path.input_frames(), 2);
    follower.svm(&ack(13));
    assert_eq!(follower.path.input_frames(), 1);
    follower.now_us = follower.path.next_deadline().unwrap();
    assert_eq!(follower.deliver(), Some(request(13, b"def")), "again");
    assert_ne!(first, request(13, b"def"));
    follower.svm(&ack(16));
    assert_eq!(
        (follower.path.input_frames(), follower.path.next_deadline()),
        (0, None)
    );
    assert_eq!(follower.path.stats().pure_acks, 2);
    follower.close();
}

#[test]
fn a_reset_of_either_side_ends_redelivery() {
    let reset_by_svm = Segment::new(Side::V6).flags(RST).seq(50).bytes();
    let reset_by_peer = Segment::new(Side::V6).to_guest().flags(RST).seq(13).bytes();
    for by_peer in [true, false] {
        let mut follower = Follower::new();
        follower.mirror(2, &request(10, b"abc"));
        follower.deliver().unwrap();
        if by_peer {
            follower.mirror(2, &reset_by_peer);
            assert_eq!(follower.deliver(), Some(reset_by_peer.clone()));
        } else {
            follower.svm(&reset_by_svm);
        }
        assert_eq!(follower.path.next_deadline(), None);
        follower.close();
    }
}

#[test]
fn rule_5_a_reset_that_the_guest_does_not_believe_ends_no_redelivery() {
    for seq in [12, 14, 10, 0x8000_0000] {
        let forged = Segment::new(Side::V6)
            .to_guest()
            .flags(RST)
            .seq(seq)
            .bytes();
        let mut follower = Follower::new();
        follower.mirror(2, &request(10, b"abc"));
        follower.deliver().unwrap();
        follower.mirror(2, &forged);
        assert_eq!(
            follower.deliver(),
            Some(forged),
            "it is the guest's to judge"
        );
        assert_eq!(follower.path.input_frames(), 1);
        follower.now_us = follower.path.next_deadline().unwrap();
        assert_eq!(follower.deliver(), Some(request(10, b"abc")), "again");
        follower.close();
    }
}

#[test]
fn a_full_ring_queues_in_order() {
    let mut follower = Follower::new();
    (0..3).for_each(|n| follower.mirror(2, &message(n)));
    // Twice in vain: what did not get there does not count.
    for _ in 0..2 {
        let token = follower.path.poll_deliver(0, &mut follower.frames).unwrap();
        follower.path.undelivered(token);
        assert_eq!(follower.path.stats().delivered, 0);
    }
    for n in 0..3 {
        assert_eq!(follower.deliver(), Some(message(n)));
    }
    assert_eq!(follower.path.stats().delivered, 3);
    follower.close();
}

#[test]
fn too_much_input_asks_for_a_checkpoint_and_holds_acknowledgements_back() {
    let mut follower = Follower::with(Limits {
        max_input_frames: 2,
        ..Limits::default()
    });
    (0..3).for_each(|n| follower.mirror(2, &message(n)));
    let request = SecondaryAction::RequestCheckpoint(Cause::InputOverflow);
    assert_eq!(follower.actions(), [request]);
    follower.mirror(2, &message(3));
    assert_eq!(follower.actions(), [], "once");
    follower.deliver().unwrap();
    follower.deliver().unwrap();
    assert_eq!(follower.actions(), [SecondaryAction::AckInput { up_to: 4 }]);
    follower.close();
}

#[test]
fn rule_9_output_is_stored_until_released() {
    let mut follower = Follower::with(Limits {
        max_stored_output: 2,
        ..Limits::default()
    });
    let answer = |n: u8| udp(Side::V4, false, 7, 9000, &[n]);
    follower.svm(&answer(1));
    assert!(follower.path.room());
    follower.svm(&answer(2));
    assert!(!follower.path.room());
    let sent = |svm_seq| SecondaryAction::SendOutput { epoch: 2, svm_seq };
    let full = SecondaryAction::RequestCheckpoint(Cause::OutputOverflow);
    assert_eq!(follower.actions(), [sent(1), sent(2), full]);
    assert_eq!(
        follower.frames.bytes(follower.path.output(2).unwrap()),
        answer(2)
    );
    follower.path.handle_released(&mut follower.frames, 2);
    follower.path.handle_released(&mut follower.frames, 2);
    assert!(follower.path.output(2).is_none() && follower.path.room());
    assert_eq!(follower.path.stored_outputs(), 1);
    follower.close();
}

#[test]
fn rule_12_pending_output_may_be_reported_before_the_commit_is_done() {
    let mut follower = Follower::new();
    follower
        .path
        .handle_pending_released(&mut follower.frames, 2);
    let token = follower.frames.insert(&message(1)).unwrap();
    follower.commit(2, vec![token]);
    assert_eq!(follower.frames.used(), 0);
    let token = follower.frames.insert(&message(1)).unwrap();
    follower.commit(3, vec![token]);
    assert_eq!(follower.frames.used(), 1);
    follower.close();
}

#[test]
fn rule_13_a_bad_record_is_refused_before_anything_changes() {
    let mut follower = Follower::new();
    follower.mirror(2, &message(1));
    let token = follower.frames.insert(&message(1)).unwrap();
    assert!(follower.path.check_record(b"nonsense").is_err());
    let (frames, path) = (&mut follower.frames, &mut follower.path);
    let refused = path.commit(0, frames, 2, vec![token], b"nonsense");
    assert!(matches!(refused, Err(PathError::Record(_))));
    assert_eq!(follower.path.epoch(), 2);
    assert_eq!(follower.deliver(), Some(message(1)));
    follower.close();
}

#[test]
fn rule_2_connections_opened_by_the_guest_are_learnt_too() {
    let mut follower = Follower::new();
    let segment = || Segment::new(Side::V4).ports(5000, 443);
    follower.svm(&segment().flags(SYN).seq(1000).timestamps(10, 0).bytes());
    // The peer answers the PVM's SYN: 7000, TSval 400.
    let answer = segment()
        .to_guest()
        .flags(SYN | ACK)
        .seq(9)
        .ack(7001)
        .timestamps(1, 400);
    follower.mirror(2, &answer.bytes());
    let expected = segment()
        .to_guest()
        .flags(SYN | ACK)
        .seq(9)
        .ack(1001)
        .timestamps(1, 10);
    assert_eq!(follower.deliver(), Some(expected.bytes()));
    follower.svm(
        &segment()
            .seq(1001)
            .ack(10)
            .timestamps(12, 1)
            .payload(b"hi")
            .bytes(),
    );
    let sent = segment()
        .seq(7001)
        .ack(10)
        .timestamps(402, 1)
        .payload(b"hi")
        .bytes();
    assert_eq!(
        follower.frames.bytes(follower.path.output(2).unwrap()),
        sent
    );
    follower.close();
}

#[test]
fn rule_1_a_routers_error_quotes_what_the_svm_sent() {
    let segment = || Segment::new(Side::V6).ports(5000, 443);
    let error = |seq| {
        let mut message = Vec::from([2, 0, 0, 0, 0, 0, 5, 0]);
        let quoted = segment().seq(seq).ack(10).payload(b"too long").bytes();
        message.extend_from_slice(&quoted[14..]);
        ip_frame(Side::V6, true, 58, 64, 0, &message)
    };
    let mut follower = Follower::new();
    follower.mirror(2, &error(7001));
    assert_eq!(follower.deliver(), Some(error(7001)), "no entry, no change");
    follower.svm(&segment().flags(SYN).seq(1000).bytes());
    let answer = |ack| {
        let answer = segment().to_guest().flags(SYN | ACK);
        answer.seq(9).ack(ack).bytes()
    };
    follower.mirror(2, &answer(7001));
    assert_eq!(follower.deliver(), Some(answer(1001)));
    follower.mirror(2, &error(7001));
    assert_eq!(follower.deliver(), Some(error(1001)));
    // What still waits at the takeover, too.
    follower.mirror(2, &error(7003));
    let Follower {
        mut frames, path, ..
    } = follower;
    let mut primary = path.take_over(0, &mut frames);
    let token = primary.poll_deliver(0, &mut frames).unwrap();
    assert_eq!(frames.take(token), error(1003));
    primary.close(&mut frames);
    assert_eq!(frames.used(), 0);
}

#[test]
fn rule_2_a_late_segment_of_the_previous_connection_teaches_nothing() {
    let mut follower = Follower::new();
    let segment = || Segment::new(Side::V4).ports(80, 5000);
    follower.mirror(2, &segment().to_guest().flags(SYN).seq(70_000).bytes());
    follower.deliver().unwrap();
    follower.svm(&segment().flags(SYN | ACK).seq(1000).ack(70_001).bytes());
    follower.mirror(2, &segment().to_guest().seq(60_000).ack(4).bytes());
    follower.deliver().unwrap();
    follower.mirror(2, &segment().to_guest().seq(70_001).ack(7001).bytes());
    let expected = segment().to_guest().seq(70_001).ack(1001).bytes();
    assert_eq!(follower.deliver(), Some(expected));
    follower.close();
}

#[test]
fn a_full_pair_table_holds_input_until_a_checkpoint() {
    let mut follower = Follower::with(Limits {
        max_flows: 1,
        ..Limits::default()
    });
    let syn = |port| {
        Segment::new(Side::V4)
            .to_guest()
            .ports(80, port)
            .flags(SYN)
            .seq(1)
            .bytes()
    };
    follower.mirror(2, &syn(5000));
    follower.deliver().unwrap();
    follower.svm(
        &Segment::new(Side::V4)
            .ports(80, 5000)
            .flags(SYN | ACK)
            .ack(2)
            .bytes(),
    );
    follower.mirror(2, &syn(5002));
    assert_eq!(follower.deliver(), None);
    let full = SecondaryAction::RequestCheckpoint(Cause::TableFull);
    assert!(follower.actions().contains(&full));
    follower.mirror(3, &syn(5004));
    follower.commit(2, Vec::new());
    assert_eq!(follower.deliver(), Some(syn(5004)));
    follower.close();
}

#[test]
fn connections_that_can_be_learnt_again_make_room() {
    let mut follower = Follower::with(Limits {
        max_flows: 2,
        ..Limits::default()
    });
    let client = |port| Segment::new(Side::V4).to_guest().ports(80, port).ack(5);
    for port in 5000..5010 {
        follower.mirror(2, &client(port).bytes());
        assert_eq!(follower.deliver(), Some(client(port).bytes()));
    }
    assert_eq!(
        follower.actions(),
        [SecondaryAction::AckInput { up_to: 10 }]
    );
    follower.close();
}

#[test]
fn a_connection_of_the_svm_without_a_place_asks_for_a_checkpoint() {
    let mut follower = Follower::with(Limits {
        max_flows: 1,
        ..Limits::default()
    });
    let syn = |port| Segment::new(Side::V4).ports(port, 443).flags(SYN).bytes();
    let sent = |svm_seq| SecondaryAction::SendOutput { epoch: 2, svm_seq };
    follower.svm(&syn(5000));
    assert_eq!(follower.actions(), [sent(1)]);
    follower.svm(&syn(5001));
    let full = SecondaryAction::RequestCheckpoint(Cause::TableFull);
    assert_eq!(follower.actions(), [sent(2), full]);
    follower.close();
}

#[test]
fn what_the_svm_has_acknowledged_is_not_kept_when_it_comes_again() {
    let mut follower = Follower::new();
    follower.mirror(2, &request(10, b"abc"));
    follower.deliver().unwrap();
    follower.svm(&ack(13));
    follower.mirror(2, &request(10, b"abc"));
    assert_eq!(
        follower.deliver(),
        Some(request(10, b"abc")),
        "delivered all the same"
    );
    assert_eq!(
        (follower.path.input_frames(), follower.path.next_deadline()),
        (0, None)
    );
    follower.mirror(2, &request(12, b"cd"));
    follower.deliver().unwrap();
    assert_eq!(follower.path.input_frames(), 1);
    follower.close();
}

/// The mark of what the SVM has acknowledged ends with its connection, also where both begin with the same number and
/// an acknowledgement of the first comes behind the second one's SYN.
#[test]
fn rule_5_a_late_acknowledgement_does_not_cover_the_next_connection() {
    let segment = || Segment::new(Side::V6);
    let syn = |seq| segment().to_guest().flags(SYN).seq(seq).bytes();
    let mut follower = Follower::new();
    for (isn, late) in [(70_000, None), (500, Some(70_004))] {
        follower.mirror(2, &syn(isn));
        follower.deliver().unwrap();
        late.into_iter().for_each(|late| follower.svm(&ack(late)));
        let answer = segment().flags(SYN | ACK).seq(49);
        follower.svm(&answer.ack(isn + 1).bytes());
        follower.mirror(2, &request(isn + 1, b"abc"));
        follower.deliver().unwrap();
        assert_eq!(
            follower.path.input_frames(),
            1,
            "kept until it is acknowledged"
        );
        follower.svm(&ack(isn + 4));
        assert_eq!(follower.path.input_frames(), 0);
    }
    follower.close();
}

proptest! {
    #[test]
    fn any_bytes_are_taken_without_a_panic(
        junk in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..90), 1..8),
        ethertype in prop_oneof![Just(0x0800u16), Just(0x86dd), Just(0x0806), any::<u16>()],
        protocol in prop_oneof![Just(6u8), Just(17), Just(44), any::<u8>()],
    ) {
        let mut follower = Follower::new();
        for mut bytes in junk {
            if bytes.len() > 24 {
                bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
                let v4 = ethertype == 0x0800;
                bytes[14] = if v4 { 0x45 } else { 0x60 };
                bytes[if v4 { 23 } else { 20 }] = protocol;
                let len = (bytes.len() - if v4 { 14 } else { 54.min(bytes.len()) }) as u16;
                let at = if v4 { 16 } else { 18 };
                bytes[at..at + 2].copy_from_slice(&len.to_be_bytes());
            }
            follower.mirror(2, &bytes);
            follower.deliver();
            follower.svm(&bytes);
            follower.actions();
        }
        let Follower { mut frames, path, .. } = follower;
        let mut primary = path.take_over(0, &mut frames);
        while let Some(token) = primary.poll_deliver(0, &mut frames) {
            primary.handle_delivered(0, &mut frames, token);
            if primary.next_deadline() != Some(0) {
                break;
            }
        }
        primary.close(&mut frames);
        prop_assert_eq!(frames.used(), 0);
    }
}
