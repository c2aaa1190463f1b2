//! The primary path, rule by rule.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod pair;

use colo_compare::testing::{Segment, Side, VecFrames, echo, udp};
use colo_compare::wire::tcp::SYN;
use colo_compare::{Action, Cause, Limits, Mode, PathError, PrimaryPath, Right};
use pair::{Pair, SIDES, data};

#[test]
fn rule_4_input_is_numbered_and_gets_its_epoch_at_delivery() {
    let mut pair = Pair::new();
    let request = Segment::new(Side::V4).to_guest().payload(b"a").bytes();
    pair.input(&request);
    let epoch = pair.cut();
    pair.input(&request);
    pair.commit(epoch);
    pair.input(&request);
    assert_eq!(pair.mirrored, [(epoch, 1), (epoch + 1, 2), (epoch + 1, 3)]);
    pair.close();
}

#[test]
fn rule_5_nothing_acknowledges_input_that_the_secondary_does_not_keep() {
    for side in SIDES {
        let mut pair = Pair::new();
        pair.input(&Segment::new(side).to_guest().ports(80, 50_000).bytes());
        let up_to = pair.input_unacked(&Segment::new(side).to_guest().payload(b"req").bytes());
        // Another flow is not concerned.
        let other = Segment::new(side).ports(80, 50_000).seq(1).bytes();
        pair.pvm(&other);
        assert_eq!(pair.rights(), [Right::Free]);
        pair.pvm(&Segment::new(side).seq(10).ack(503).bytes());
        pair.pvm(&data(side, 10, b"reply"));
        pair.svm(&data(side, 10, b"reply"));
        assert_eq!(
            pair.rights(),
            [],
            "neither the pure ACK nor the matched reply"
        );
        pair.ack_input(up_to);
        assert_eq!(pair.rights(), [Right::Free, Right::Match]);
        pair.close();
    }
}

#[test]
fn rule_5_a_datagram_waits_for_all_input() {
    let mut pair = Pair::new();
    let up_to = pair.input_unacked(&udp(Side::V4, true, 7, 9000, b"ping"));
    pair.pvm(&udp(Side::V4, false, 8, 9001, b"other"));
    pair.svm(&udp(Side::V4, false, 8, 9001, b"other"));
    assert_eq!(pair.rights(), []);
    pair.ack_input(up_to);
    assert_eq!(pair.rights(), [Right::Match]);
    pair.close();
}

#[test]
fn rule_6_a_missing_input_ack_has_its_own_longer_deadline() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    pair.input_unacked(&Segment::new(Side::V4).to_guest().payload(b"req").bytes());
    pair.pvm(&data(Side::V4, 10, b"reply"));
    pair.svm(&data(Side::V4, 10, b"reply"));
    pair.advance(limits.compare_deadline_us + 1);
    assert_eq!(pair.causes, []);
    assert_eq!(
        pair.path.next_deadline(),
        Some(1000 + limits.ack_deadline_us)
    );
    pair.advance(limits.ack_deadline_us);
    assert_eq!(pair.causes, [Cause::AckDeadline]);
    pair.close();
}

#[test]
fn rule_7_epochs_are_never_compared_with_each_other() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"old"));
    let epoch = pair.cut();
    pair.pvm(&data(Side::V4, 13, b"new"));
    // Output of the old epoch still releases output of the old epoch, and only that.
    pair.svm_in(epoch, &data(Side::V4, 10, b"oldnew"));
    assert_eq!(pair.rights(), [Right::Match]);
    assert_eq!(pair.path.held_frames(), 1);
    assert_eq!(
        pair.path.cut(pair.now_us),
        Err(PathError::CheckpointInFlight { epoch })
    );
    // Output of the new epoch may come before the commit is known here.
    pair.svm_in(epoch + 1, &data(Side::V4, 13, b"new"));
    assert_eq!(pair.rights(), []);
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Match]);
    // What is late is not compared.
    pair.pvm(&data(Side::V4, 16, b"x"));
    pair.svm_in(epoch, &data(Side::V4, 16, b"x"));
    assert_eq!((pair.rights().len(), pair.path.stats().svm_stale), (0, 1));
    pair.close();
}

#[test]
fn rule_8_below_the_base_everything_is_covered() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V6, u32::MAX - 1, b"abcd"));
    let epoch = pair.cut();
    assert_eq!(pair.path.pending().count(), 1);
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Checkpoint]);
    assert_eq!(pair.pending_released, [epoch]);
    // A retransmission of it needs nothing; what goes beyond needs the SVM.
    pair.pvm(&data(Side::V6, u32::MAX - 1, b"abcd"));
    assert_eq!(pair.rights(), [Right::Free]);
    pair.pvm(&data(Side::V6, u32::MAX, b"bcde"));
    assert_eq!(pair.rights(), []);
    pair.svm(&data(Side::V6, 2, b"e"));
    assert_eq!(pair.rights(), [Right::Match]);
    pair.close();
}

#[test]
fn rule_9_deadlines_start_when_the_svm_has_caught_up() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    let epoch = pair.cut();
    pair.commit(epoch);
    pair.pvm(&data(Side::V4, 10, b"late"));
    pair.advance(limits.compare_deadline_us * 2);
    assert_eq!(pair.causes, []);
    pair.path.caught_up(pair.now_us, epoch);
    assert_eq!(
        pair.path.next_deadline(),
        Some(1000 + limits.lag_deadline_us),
        "an old epoch"
    );
    pair.path.caught_up(pair.now_us, epoch + 1);
    pair.advance(limits.compare_deadline_us - 1);
    assert_eq!(pair.causes, []);
    pair.advance(1);
    assert_eq!(pair.causes, [Cause::Deadline]);
    pair.close();

    let mut pair = Pair::new();
    let epoch = pair.cut();
    pair.commit(epoch);
    pair.pvm(&data(Side::V4, 10, b"never"));
    pair.advance(limits.lag_deadline_us);
    assert_eq!(pair.causes, [Cause::Lag]);
    pair.close();
}

#[test]
fn rule_9_the_svm_may_catch_up_before_its_commit_is_known_here() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    let epoch = pair.cut();
    pair.path.caught_up(pair.now_us, epoch + 1);
    pair.commit(epoch);
    pair.pvm(&data(Side::V4, 10, b"late"));
    pair.advance(limits.compare_deadline_us);
    assert_eq!(pair.causes, [Cause::Deadline]);
    pair.close();
}

#[test]
fn rule_9_svm_output_is_reported_when_released_and_not_when_judged() {
    let mut pair = Pair::new();
    pair.svm(&data(Side::V4, 10, b"abc"));
    pair.svm(&data(Side::V4, 13, b"def"));
    pair.pvm(&data(Side::V4, 10, b"ab"));
    assert_eq!(
        (pair.rights(), pair.reported.clone()),
        (vec![Right::Match], vec![])
    );
    pair.path.mute();
    pair.pvm(&data(Side::V4, 12, b"cdef"));
    assert_eq!((pair.rights(), pair.reported.clone()), (vec![], vec![]));
    pair.path.unmute(pair.now_us, &mut pair.frames);
    pair.act();
    assert_eq!(
        (pair.rights(), pair.reported.clone()),
        (vec![Right::Match], vec![1, 2])
    );
    pair.close();
}

#[test]
fn rule_14_after_an_abort_the_next_commit_covers_both_epochs() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"one"));
    let epoch = pair.cut();
    pair.pvm(&udp(Side::V4, false, 7, 9000, b"two"));
    let deferred = Segment::new(Side::V6).seq(900).payload(b"deferred").bytes();
    pair.pvm(&deferred);
    pair.path
        .abort(pair.now_us, &mut pair.frames, epoch)
        .unwrap();
    pair.act();
    assert_eq!(pair.causes, [Cause::Aborted]);
    pair.svm_in(epoch, &data(Side::V4, 10, b"one"));
    pair.svm_in(epoch, &udp(Side::V4, false, 7, 9000, b"two"));
    pair.svm_in(epoch + 1, &udp(Side::V4, false, 7, 9000, b"two"));
    pair.svm_in(epoch + 1, &data(Side::V4, 13, b"three"));
    pair.advance(10_000_000);
    assert_eq!(
        (pair.rights().len(), pair.causes.len()),
        (0, 1),
        "held, without deadlines"
    );
    assert_eq!(pair.path.next_deadline(), None);
    let again = pair.cut();
    assert_eq!(again, epoch + 1);
    pair.pvm(&data(Side::V4, 13, b"three"));
    assert_eq!(pair.path.pending().count(), 3);
    let wrong = pair.path.commit(pair.now_us, &mut pair.frames, epoch);
    assert_eq!(
        wrong,
        Err(PathError::WrongEpoch {
            expected: again,
            found: epoch
        })
    );
    pair.commit(again);
    assert_eq!(pair.rights(), [Right::Checkpoint; 3]);
    pair.pvm(&deferred);
    assert_eq!(pair.rights(), [Right::Free], "the base covers it (rule 8)");
    pair.svm(&data(Side::V4, 13, b"three"));
    assert_eq!(pair.rights(), [Right::Match]);
    let none = pair.path.commit(pair.now_us, &mut pair.frames, again);
    assert_eq!(none, Err(PathError::NoCheckpoint { epoch: again }));
    pair.close();
}

#[test]
fn rule_14_requests_are_coalesced_until_the_commit() {
    let mut pair = Pair::new();
    for port in [40_000, 40_002] {
        let segment = Segment::new(Side::V4).ports(80, port).seq(1);
        pair.pvm(&segment.clone().payload(b"a").bytes());
        pair.svm(&segment.payload(b"b").bytes());
    }
    assert_eq!(pair.causes, [Cause::Payload]);
    assert_eq!(pair.path.stats().divergences[Cause::Payload.index()], 2);
    let epoch = pair.cut();
    pair.pvm(&udp(Side::V4, false, 7, 9000, b"x"));
    pair.commit(epoch);
    pair.path.caught_up(pair.now_us, epoch + 1);
    pair.advance(1_000_000);
    assert_eq!(pair.causes, [Cause::Payload, Cause::Deadline]);
    pair.close();
}

#[test]
fn rule_18_without_a_fresh_heartbeat_only_the_secondarys_word_releases() {
    let mut pair = Pair::new();
    pair.lease(pair.now_us + 10);
    pair.now_us += 11;
    pair.pvm(&Segment::new(Side::V4).seq(10).bytes());
    pair.pvm(&data(Side::V4, 10, b"abc"));
    pair.svm(&data(Side::V4, 10, b"abc"));
    assert_eq!(
        pair.rights(),
        [],
        "the pure ACK waits, and order within the flow is kept"
    );
    pair.pvm(&udp(Side::V6, false, 7, 9000, b"matched"));
    pair.svm(&udp(Side::V6, false, 7, 9000, b"matched"));
    assert_eq!(pair.rights(), [Right::Match]);
    pair.advance(1_000_000);
    assert_eq!(pair.causes, [], "a missing heartbeat is not a divergence");
    pair.lease(pair.now_us);
    assert_eq!(pair.rights(), [Right::Free, Right::Match]);
    // Where the lease is never fresh, a checkpoint lets it leave.
    pair.now_us += 1;
    pair.pvm(&Segment::new(Side::V4).seq(13).bytes());
    pair.advance(10_000_000);
    assert_eq!(pair.causes, [Cause::AckDeadline]);
    let epoch = pair.cut();
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Checkpoint]);
    pair.close();
}

#[test]
fn a_commit_releases_in_production_order_over_all_flows() {
    let mut pair = Pair::new();
    let frames: Vec<_> = (0..20u16)
        .map(|n| match n % 3 {
            0 => udp(Side::V4, false, 7, 9000 + n % 2, &n.to_be_bytes()),
            1 => Segment::new(Side::V6)
                .seq(u32::from(n))
                .payload(b"x")
                .bytes(),
            _ => echo(Side::V6, false, n, b"pong"),
        })
        .collect();
    frames.iter().for_each(|bytes| pair.pvm(bytes));
    let epoch = pair.cut();
    let order: Vec<_> = pair
        .path
        .pending()
        .map(|p| pair.frames.bytes(p.token).to_vec())
        .collect();
    assert_eq!(order, frames);
    pair.commit(epoch);
    assert_eq!(pair.frames_out(), frames);
    pair.close();
}

#[test]
fn going_alone_releases_everything_in_order_and_stops_mirroring() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"one"));
    pair.cut();
    pair.pvm(&data(Side::V4, 13, b"two"));
    pair.path.mute();
    let token = pair
        .frames
        .insert(&udp(Side::V4, true, 7, 9000, b"in"))
        .unwrap();
    pair.path
        .handle_delivered(pair.now_us, &mut pair.frames, token);
    pair.path.go_alone(pair.now_us, &mut pair.frames);
    pair.pvm(&data(Side::V4, 16, b"three"));
    assert_eq!(pair.mirrored, []);
    assert_eq!(pair.path.mode(), Mode::Alone);
    let expected = [(10, "one"), (13, "two"), (16, "three")];
    let expected: Vec<_> = expected
        .iter()
        .map(|(s, d)| data(Side::V4, *s, d.as_bytes()))
        .collect();
    assert_eq!(pair.frames_out(), expected);
    pair.close();
}

#[test]
fn mute_lets_nothing_out_not_even_alone() {
    let mut frames = VecFrames::new(10);
    let mut path = PrimaryPath::new(Limits::default());
    path.mute();
    let token = frames.insert(&data(Side::V4, 1, b"x")).unwrap();
    path.handle_guest_tx(0, &mut frames, token);
    assert_eq!(
        (path.poll_action(), path.mode(), path.held_frames()),
        (None, Mode::Mute, 1)
    );
    path.unmute(5, &mut frames);
    let Some(Action::Release {
        token,
        right: Right::Alone,
        held_us: 5,
    }) = path.poll_action()
    else {
        panic!("not released")
    };
    frames.take(token);
    path.close(&mut frames);
    assert_eq!(frames.used(), 0);
}

#[test]
fn rule_2_a_guest_opened_flow_from_another_port_is_found_at_once() {
    let udp_from = |port| udp(Side::V4, false, port, 53, b"query");
    let syn_from = |port| {
        Segment::new(Side::V6)
            .ports(port, 443)
            .flags(SYN)
            .seq(9)
            .bytes()
    };
    for (pvm, svm) in [
        (udp_from(1000), udp_from(2000)),
        (syn_from(1000), syn_from(2000)),
    ] {
        for pvm_first in [true, false] {
            let mut pair = Pair::new();
            if pvm_first {
                pair.pvm(&pvm);
                pair.svm(&svm);
            } else {
                pair.svm(&svm);
                pair.pvm(&pvm);
            }
            assert_eq!(pair.causes, [Cause::OutboundTuple]);
            assert_eq!(pair.path.held_frames(), 1);
            pair.close();
        }
        let mut pair = Pair::new();
        pair.pvm(&pvm);
        pair.svm(&pvm);
        assert_eq!((pair.causes.len(), pair.rights()), (0, vec![Right::Match]));
        pair.close();
    }
}
