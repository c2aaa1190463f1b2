//! What the primary path finds equal, different or too much.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod pair;

use colo_compare::testing::{Segment, Side, VecFrames, echo, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use colo_compare::{Action, Cause, Limits, PathError, PrimaryPath, Right};
use pair::{Pair, SIDES, data};

#[test]
fn syn_ack_is_compared_by_flags_and_binding_options() {
    let syn_ack = |options: &[u8], seq| {
        Segment::new(Side::V4)
            .flags(SYN | ACK)
            .seq(seq)
            .ack(8)
            .option(options)
            .bytes()
    };
    let mss = [2, 4, 5, 0xb4];
    let mss_scale = [2, 4, 5, 0xb4, 1, 3, 3, 7];
    let scale_mss = [3, 3, 7, 1, 2, 4, 5, 0xb4];
    let verdict = |a: &[u8], b: &[u8]| {
        let mut pair = Pair::new();
        pair.pvm(&syn_ack(a, 77));
        pair.svm(&syn_ack(b, 99));
        let out = (pair.rights(), pair.causes.clone());
        pair.close();
        out
    };
    assert_eq!(
        verdict(&mss_scale, &scale_mss),
        (vec![Right::Match], vec![])
    );
    assert_eq!(verdict(&mss, &mss_scale), (vec![], vec![Cause::SynOptions]));
    assert_eq!(
        verdict(&mss, &[2, 4, 5, 0xb5]),
        (vec![], vec![Cause::SynOptions])
    );
    assert_eq!(verdict(&mss, &[]), (vec![], vec![Cause::SynOptions]));
    // Options that no one here knows: a key (RFC 8684), twice a cookie.
    let key = |last: u8| [30, 12, 0, 0x81, 1, 2, 3, 4, 5, 6, 7, last];
    let with_mss = |options: &[u8]| [&mss[..], options].concat();
    let mss_last = [&key(8)[..], &mss].concat();
    assert_eq!(
        verdict(&with_mss(&key(8)), &mss_last),
        (vec![Right::Match], vec![])
    );
    let (one, two) = ([34, 4, 1, 1], [34, 4, 1, 2]);
    let different = [
        (with_mss(&key(8)), with_mss(&key(9))),
        (with_mss(&key(8)), mss.to_vec()),
        (mss.to_vec(), with_mss(&key(8))),
        ([one, one, two].concat(), [one, two, two].concat()),
    ];
    for (pvm, svm) in different {
        assert_eq!(verdict(&pvm, &svm), (vec![], vec![Cause::SynOptions]));
    }
}

#[test]
fn a_reset_needs_a_reset() {
    let reset = Segment::new(Side::V4)
        .flags(RST | ACK)
        .seq(10)
        .ack(5)
        .bytes();
    let mut pair = Pair::new();
    pair.pvm(&reset);
    assert_eq!(pair.rights(), []);
    pair.svm(&reset);
    assert_eq!(
        (pair.rights(), pair.reported.len()),
        (vec![Right::Match], 1)
    );
    // One side alone.
    pair.pvm(&reset);
    pair.advance(Limits::default().compare_deadline_us);
    assert_eq!(pair.causes, [Cause::Deadline]);
    pair.close();
    let mut pair = Pair::new();
    pair.svm(&reset);
    pair.advance(Limits::default().extra_deadline_us);
    assert_eq!(pair.causes, [Cause::Flags]);
    pair.close();
}

#[test]
fn streams_of_different_length_differ() {
    let fin = Segment::new(Side::V6).flags(FIN | ACK);
    let mut pair = Pair::new();
    pair.svm(&fin.clone().seq(10).payload(b"ab").bytes());
    pair.pvm(&data(Side::V6, 10, b"abc"));
    assert_eq!(
        (pair.rights().len(), pair.causes.clone()),
        (0, vec![Cause::Length])
    );
    pair.close();
    let mut pair = Pair::new();
    pair.svm(&data(Side::V6, 10, b"abc"));
    pair.pvm(&fin.seq(10).payload(b"ab").bytes());
    assert_eq!(
        (pair.rights().len(), pair.causes.clone()),
        (0, vec![Cause::Length])
    );
    pair.close();
}

#[test]
fn a_new_connection_between_the_same_ports_starts_afresh() {
    let mut pair = Pair::new();
    let syn = |seq| {
        Segment::new(Side::V4)
            .to_guest()
            .flags(SYN)
            .seq(seq)
            .bytes()
    };
    let syn_ack = |seq| {
        Segment::new(Side::V4)
            .flags(SYN | ACK)
            .seq(seq)
            .ack(8)
            .bytes()
    };
    pair.input(&syn(7));
    pair.pvm(&syn_ack(1000));
    pair.svm(&syn_ack(2000));
    pair.pvm(&data(Side::V4, 1001, b"abc"));
    pair.svm(&data(Side::V4, 1001, b"abc"));
    assert_eq!(pair.rights(), [Right::Match; 2]);
    pair.input(&syn(70_000));
    // The SVM is ahead; its numbers lie below and within those of the old connection.
    pair.svm(&syn_ack(777));
    pair.svm(&data(Side::V4, 1002, b"xyz"));
    pair.pvm(&data(Side::V4, 1001, b"abc"));
    pair.pvm(&syn_ack(1001));
    pair.pvm(&data(Side::V4, 1002, b"xyz"));
    assert_eq!(pair.rights(), [Right::Free, Right::Match, Right::Match]);
    assert_eq!((pair.causes.len(), pair.path.held_frames()), (0, 0));
    pair.close();
}

#[test]
fn header_fields_count_unless_they_may_rightly_differ() {
    let verdict = |a: &[u8], b: &[u8]| {
        let mut pair = Pair::new();
        pair.pvm(a);
        pair.svm(b);
        pair.advance(Limits::default().compare_deadline_us);
        let out = (pair.rights().len(), pair.causes.first().copied());
        pair.close();
        out
    };
    for side in SIDES {
        let tcp = Segment::new(side).seq(5).payload(b"x");
        assert_eq!(
            verdict(&tcp.bytes(), &tcp.clone().id(99).bytes()),
            (1, None)
        );
        let ttl = tcp.clone().ttl(63).bytes();
        assert_eq!(verdict(&tcp.bytes(), &ttl), (0, Some(Cause::Header)));
        let stamped = |t| tcp.clone().timestamps(t, t + 1).bytes();
        assert_eq!(verdict(&stamped(1), &stamped(2)), (1, None));
        let message = |ttl, id| ip_frame(side, false, 132, ttl, id, b"sctp or so");
        assert_eq!(verdict(&message(64, 1), &message(64, 2)), (1, None));
        assert_eq!(
            verdict(&message(64, 1), &message(63, 1)),
            (0, Some(Cause::Header))
        );
    }
}

#[test]
fn datagrams_match_within_a_reorder_window_and_leave_in_the_pvms_order() {
    for side in SIDES {
        let mut pair = Pair::new();
        let message = |n: u8| udp(side, false, 7, 9000, &[n]);
        [0, 1, 2].iter().for_each(|n| pair.pvm(&message(*n)));
        [2, 0].iter().for_each(|n| pair.svm(&message(*n)));
        assert_eq!(pair.frames_out(), [message(0)]);
        pair.svm(&message(1));
        assert_eq!(pair.frames_out(), [message(1), message(2)]);
        assert_eq!(pair.reported, [2, 3, 1]);
        assert_eq!((pair.causes.len(), pair.path.held_frames()), (0, 0));
        // Equal ones are used once.
        pair.pvm(&message(5));
        pair.pvm(&message(5));
        pair.svm(&message(5));
        assert_eq!(pair.frames_out().len(), 1);
        pair.close();
    }
}

#[test]
fn a_datagram_that_differs_is_a_divergence_before_its_deadline() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    pair.pvm(&echo(Side::V6, false, 1, b"abc"));
    pair.svm(&echo(Side::V6, false, 1, b"abd"));
    pair.advance(limits.settle_us);
    assert_eq!(pair.causes, [Cause::Payload]);
    pair.close();
    let mut pair = Pair::new();
    pair.pvm(&udp(Side::V4, false, 7, 9000, b"abc"));
    pair.svm(&udp(Side::V4, false, 7, 9000, b"ab"));
    pair.advance(limits.settle_us);
    assert_eq!(pair.causes, [Cause::Length]);
    pair.close();
    // A full window on both sides needs no time.
    let mut pair = Pair::new();
    for n in 0..limits.reorder_window as u8 {
        pair.pvm(&udp(Side::V4, false, 7, 9000, &[n]));
        pair.svm(&udp(Side::V4, false, 7, 9000, &[n + 100]));
    }
    assert_eq!(pair.causes, [Cause::Payload]);
    pair.close();
}

#[test]
fn surplus_svm_output_is_a_divergence_unless_it_resolves_addresses() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    let mut arp = vec![0xff; 12];
    arp.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.resize(60, 1);
    pair.svm(&arp);
    pair.advance(limits.extra_deadline_us);
    assert_eq!((pair.causes.len(), pair.path.stats().svm_surplus), (0, 1));
    pair.svm(&udp(Side::V4, false, 7, 9000, b"alone"));
    pair.advance(limits.extra_deadline_us);
    assert_eq!(pair.causes, [Cause::Extra]);
    pair.close();
}

#[test]
fn fragments_and_unknown_frames_are_compared_whole() {
    let mut fragment = ip_frame(Side::V4, false, 17, 64, 7, &[3; 40]);
    fragment[20] = 0x20;
    let mut other = fragment.clone();
    other[18] = 0xaa; // Identification.
    let mut pair = Pair::new();
    pair.pvm(&fragment);
    pair.svm(&other);
    assert_eq!(pair.rights(), [Right::Match]);
    let unknown = [[0x22; 12].to_vec(), vec![0x88, 0xb5, 1, 2, 3]].concat();
    pair.pvm(&unknown);
    pair.svm(&unknown);
    assert_eq!(pair.rights(), [Right::Match]);
    pair.pvm(&[1, 2, 3]);
    pair.advance(Limits::default().compare_deadline_us);
    assert_eq!(pair.causes, [Cause::Unparseable]);
    pair.close();
}

#[test]
fn limits_give_back_pressure_and_a_checkpoint_and_drop_nothing() {
    let mut pair = Pair::with(Limits {
        max_held_frames: 3,
        ..Limits::default()
    });
    for n in 0..4 {
        assert_eq!(pair.path.room(), n < 3);
        pair.pvm(&udp(Side::V4, false, 7, 9000, &[n]));
    }
    assert_eq!(pair.causes, [Cause::HoldFull]);
    let epoch = pair.cut();
    pair.commit(epoch);
    assert_eq!((pair.rights().len(), pair.path.room()), (4, true));
    pair.close();

    let mut pair = Pair::with(Limits {
        max_flows: 2,
        ..Limits::default()
    });
    for port in 0..3 {
        pair.pvm(&udp(Side::V4, false, port, 9000 + port, b"x"));
    }
    assert_eq!(pair.causes, [Cause::TableFull]);
    let epoch = pair.cut();
    assert_eq!(pair.path.pending().count(), 3);
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Checkpoint; 3]);
    pair.pvm(&udp(Side::V4, false, 9, 9009, b"x"));
    pair.svm(&udp(Side::V4, false, 9, 9009, b"x"));
    assert_eq!(
        (pair.rights(), pair.path.stats().flows_evicted),
        (vec![Right::Match], 1)
    );
    pair.close();

    let mut pair = Pair::with(Limits {
        max_svm_frames: 2,
        ..Limits::default()
    });
    for n in 0..3 {
        pair.svm(&udp(Side::V4, false, 7, 9000, &[n]));
    }
    assert_eq!(pair.causes, [Cause::OutputOverflow]);
    assert_eq!(
        (pair.path.stats().svm_overflow, pair.reported.len()),
        (1, 0)
    );
    pair.close();

    let mut pair = Pair::with(Limits {
        max_unacked_inputs: 2,
        ..Limits::default()
    });
    let request = udp(Side::V4, true, 7, 9000, b"x");
    pair.input_unacked(&request);
    assert!(pair.path.nic_room());
    let up_to = pair.input_unacked(&request);
    assert!(!pair.path.nic_room());
    pair.ack_input(up_to + 1);
    assert!(
        !pair.path.nic_room(),
        "an acknowledgement of what was never sent is ignored"
    );
    pair.ack_input(up_to);
    assert!(pair.path.nic_room());
    pair.close();
}

#[test]
fn history_above_its_limit_makes_retransmissions_wait_and_nothing_worse() {
    let mut pair = Pair::with(Limits {
        max_history_bytes: 4,
        ..Limits::default()
    });
    for n in 0..3u32 {
        pair.pvm(&data(Side::V4, 10 + 3 * n, b"abc"));
        pair.svm(&data(Side::V4, 10 + 3 * n, b"abc"));
    }
    assert_eq!(
        (pair.rights(), pair.path.stats().history_dropped),
        (vec![Right::Match; 3], 2)
    );
    pair.pvm(&data(Side::V4, 16, b"abc"));
    assert_eq!(pair.rights(), [Right::Free]);
    pair.pvm(&data(Side::V4, 10, b"abc"));
    assert_eq!(pair.rights(), []);
    pair.advance(Limits::default().compare_deadline_us);
    assert_eq!(pair.causes, [Cause::Deadline]);
    pair.close();
}

#[test]
fn a_client_cannot_acknowledge_what_has_not_left() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"abc"));
    pair.svm(&data(Side::V4, 10, b"abc"));
    pair.input(&Segment::new(Side::V4).to_guest().ack(1000).bytes());
    pair.pvm(&data(Side::V4, 13, b"secret"));
    assert_eq!(pair.rights(), [Right::Match]);
    pair.close();
}

#[test]
fn an_svm_that_contradicts_itself_is_a_divergence() {
    let mut pair = Pair::new();
    pair.svm(&data(Side::V4, 10, b"abcdef"));
    pair.svm(&data(Side::V4, 12, b"cdxf"));
    assert_eq!(pair.causes, [Cause::Payload]);
    pair.pvm(&data(Side::V4, 10, b"abcdef"));
    assert_eq!(pair.rights(), []);
    pair.close();
}

#[test]
fn the_canary_releases_what_differs() {
    let mut pair = Pair::with(Limits {
        canary_equal: true,
        ..Limits::default()
    });
    pair.pvm(&data(Side::V4, 10, b"abc"));
    pair.svm(&data(Side::V4, 10, b"xyz"));
    assert_eq!(
        (pair.rights(), pair.reported.clone()),
        (vec![Right::Match], vec![1])
    );
    pair.close();
}

#[test]
fn a_divergence_shows_where_and_what() {
    let mut pair = Pair::new();
    let segment = |payload: &[u8]| data(Side::V6, 10, payload);
    let token = pair.frames.insert(&segment(b"hello world")).unwrap();
    pair.path
        .handle_guest_tx(pair.now_us, &mut pair.frames, token);
    let token = pair.frames.insert(&segment(b"hello there")).unwrap();
    pair.path
        .handle_svm_output(pair.now_us, &mut pair.frames, pair.epoch, 1, token);
    let Some(Action::Checkpoint(divergence)) = pair.path.poll_action() else {
        panic!("no request")
    };
    assert_eq!((divergence.cause, divergence.offset), (Cause::Payload, 6));
    assert_eq!(
        (divergence.primary.bytes(), divergence.secondary.bytes()),
        (&b"world"[..], &b"there"[..])
    );
    let flow = divergence.flow.expect("a flow");
    assert_eq!((flow.guest_port(), flow.peer_port()), (80, 40_000));
    pair.close();
}

#[test]
fn a_new_vm_is_announced_by_its_mac_address_alone() {
    let mut path = PrimaryPath::new(Limits::default());
    let mut out = [0; colo_compare::ANNOUNCEMENT_MAX];
    assert_eq!(path.poll_announcement(0, &mut out), None);
    path.set_guest_mac([2, 0, 0, 0, 0, 9]);
    assert_eq!(path.poll_announcement(0, &mut out), Some(60));
    assert_eq!(
        out[..14],
        [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 0x80, 0x35]
    );
    assert_eq!(path.poll_announcement(0, &mut out), None);
    // In a pair it needs a fresh heartbeat (rule 18).
    path.pair(0).unwrap();
    assert_eq!(path.pair(0), Err(PathError::AlreadyPaired { epoch: 2 }));
    path.announce();
    assert_eq!(path.poll_announcement(0, &mut out), None);
    path.set_lease(0, &mut VecFrames::new(0), 5);
    assert_eq!(path.poll_announcement(5, &mut out), Some(60));
}
