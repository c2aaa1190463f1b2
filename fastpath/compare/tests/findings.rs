//! What random traces and fuzzing have found, each as a trace of its own.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod dice;
mod pair;

use colo_compare::testing::{Segment, Side, ip_frame};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use colo_compare::{
    Cause, Direction, Limits, Mode, Policy, PolicyAction, PrimaryPath, Protocol, Right, Rule, wire,
};
use dice::limits;
use pair::{Pair, SIDES};

fn data(side: Side, seq: u32, payload: &[u8]) -> Vec<u8> {
    Segment::new(side).seq(seq).ack(8).payload(payload).bytes()
}

fn syn_ack(side: Side, seq: u32) -> Vec<u8> {
    Segment::new(side).flags(SYN | ACK).seq(seq).ack(8).bytes()
}

#[test]
fn an_extension_header_that_reaches_beyond_the_packet_is_unparseable() {
    // No next header, 8 + 8 * 255 bytes long.
    let frame = ip_frame(Side::V6, false, 0, 64, 0, &[59, 255, 0, 0, 0, 0, 0, 0]);
    let packet = wire::parse(&frame, frame.len(), Direction::FromGuest);
    assert_eq!(packet.key.protocol(), Protocol::Unparseable);
    assert!(packet.l4 <= packet.end);
}

#[test]
fn numbers_half_of_the_space_apart_are_survived() {
    for side in SIDES {
        for of_pvm in [false, true] {
            let mut pair = Pair::with(limits());
            for (seq, payload) in [(0xffff_ffef, b"xxxxxxxx"), (0x7fff_fff1, b"yyyyyyyy")] {
                let frame = data(side, seq, payload);
                if of_pvm {
                    pair.pvm(&frame);
                } else {
                    pair.svm(&frame);
                }
            }
            // The other guest is no better.
            for seq in [0x7fff_ffef, 0xffff_fff1, 0xffff_ffef, 0x7fff_fff3] {
                pair.pvm(&data(side, seq, b"xxxxxxxxx"));
                pair.svm(&data(side, seq, b"xxxxxxxxx"));
            }
            pair.advance(1_000_000);
            let epoch = pair.cut();
            pair.commit(epoch);
            assert_eq!(pair.path.held_frames(), 0);
            pair.close();
        }
    }
}

#[test]
fn a_refused_pairing_changes_nothing() {
    let mut path = PrimaryPath::new(limits());
    path.cut(0).unwrap();
    assert!(path.pair(0).is_err());
    assert_eq!(path.mode(), Mode::Alone);
}

#[test]
fn output_of_a_later_epoch_is_not_compared_in_this_one() {
    for side in SIDES {
        let mut pair = Pair::with(limits());
        let covered = pair.cut();
        let frame = syn_ack(side, 100);
        pair.pvm(&frame);
        pair.svm_in(covered + 5, &frame);
        pair.commit(covered);
        assert_eq!((pair.released.len(), pair.path.held_frames()), (0, 1));
        pair.svm_in(covered + 1, &frame);
        assert_eq!(pair.rights(), [Right::Match]);
        pair.close();
    }
}

#[test]
fn input_that_found_no_place_in_a_full_table_is_waited_for() {
    let mut pair = Pair::with(Limits {
        max_flows: 2,
        ..limits()
    });
    let busy = |port| {
        Segment::new(Side::V6)
            .ports(81, port)
            .seq(5)
            .payload(b"busy")
            .bytes()
    };
    // Held frames keep their flows in the table.
    pair.pvm(&busy(1));
    pair.pvm(&busy(2));
    let request = Segment::new(Side::V4)
        .to_guest()
        .seq(8)
        .ack(100)
        .payload(b"?")
        .bytes();
    let given = pair.input_unacked(&request);
    let epoch = pair.cut();
    pair.commit(epoch);
    pair.frames_out();
    // The SVM's output makes the flow known, and the PVM's acknowledges the request.
    let answer = Segment::new(Side::V4).seq(100).ack(9).payload(b"!").bytes();
    pair.svm(&answer);
    pair.pvm(&answer);
    assert!(pair.released.is_empty(), "the ACK rule");
    pair.ack_input(given);
    assert_eq!(pair.rights(), [Right::Match]);
    pair.close();
}

#[test]
fn an_acknowledgement_from_far_below_what_was_sent_is_not_believed() {
    let mut pair = Pair::with(limits());
    let isn = 0x7fff_fff0;
    pair.pvm(&syn_ack(Side::V4, isn));
    let epoch = pair.cut();
    pair.commit(epoch);
    pair.frames_out();
    let nonsense = Segment::new(Side::V4)
        .to_guest()
        .seq(8)
        .ack(1_000_001)
        .bytes();
    pair.input(&nonsense);
    // Below the nonsense as sequence numbers go, and beyond what a commit covers.
    pair.pvm(&data(Side::V4, 0xffff_ffec, b"secret"));
    assert!(pair.released.is_empty());
    pair.close();
}

#[test]
fn an_aborted_epoch_does_not_raise_the_base_of_the_next_connection() {
    for side in SIDES {
        let mut pair = Pair::with(limits());
        // The end of one connection and the start of the next between the same ports.
        pair.pvm(&data(side, 5, b"zz"));
        pair.pvm(&syn_ack(side, 0));
        let aborted = pair.cut();
        pair.path
            .abort(pair.now_us, &mut pair.frames, aborted)
            .unwrap();
        let epoch = pair.cut();
        pair.commit(epoch);
        assert_eq!(pair.frames_out().len(), 2);
        // In the new connection nothing of this was ever sent.
        pair.pvm(&data(side, 1, b"abcd"));
        pair.pvm(&data(side, 5, b"ef"));
        assert!(pair.released.is_empty(), "output commit");
        pair.close();
    }
}

#[test]
fn ignored_bytes_are_counted_from_the_start_of_the_judged_connection() {
    let rule = Rule {
        action: PolicyAction::IgnoreBytes {
            from: 10,
            end: u32::MAX,
        },
        ..Rule::default()
    };
    let mut pair = Pair::with(limits());
    let path = PrimaryPath::with_policy(limits(), Policy::new(vec![rule]));
    std::mem::replace(&mut pair.path, path).close(&mut pair.frames);
    let first = pair.path.pair(pair.now_us).unwrap();
    pair.lease(u64::MAX);
    pair.commit(first);
    pair.pvm(&syn_ack(Side::V4, 1000));
    pair.svm(&syn_ack(Side::V4, 1000));
    pair.frames_out();
    // While the first connection's bytes wait, the PVM opens another one.
    pair.pvm(&data(Side::V4, 1001, b"secret"));
    pair.pvm(&syn_ack(Side::V4, 90_000));
    pair.svm(&data(Side::V4, 1001, b"SECRET"));
    assert!(pair.released.is_empty(), "these bytes are not left out");
    pair.close();
}

#[test]
fn a_connection_that_one_side_refuses_is_noticed_at_once() {
    for side in SIDES {
        let accepted = syn_ack(side, 100);
        let refused = Segment::new(side).flags(RST | ACK).seq(0).ack(8).bytes();
        for (pvm, svm) in [(&accepted, &refused), (&refused, &accepted)] {
            for svm_first in [false, true] {
                let mut pair = Pair::with(limits());
                pair.input(&Segment::new(side).to_guest().flags(SYN).seq(7).bytes());
                if svm_first {
                    pair.svm(svm);
                    pair.pvm(pvm);
                } else {
                    pair.pvm(pvm);
                    pair.svm(svm);
                }
                assert_eq!(pair.causes, [Cause::Flags]);
                assert!(pair.released.is_empty());
                pair.close();
            }
        }
    }
}

#[test]
fn headers_of_a_fin_without_payload_count() {
    for side in SIDES {
        let mut pair = Pair::with(limits());
        let fin = |ttl| {
            Segment::new(side)
                .flags(FIN | ACK)
                .seq(50)
                .ack(8)
                .ttl(ttl)
                .bytes()
        };
        pair.svm(&fin(63));
        pair.pvm(&fin(64));
        assert_eq!(pair.causes, [Cause::Header]);
        assert!(pair.released.is_empty());
        pair.close();
    }
}

#[test]
fn nothing_counts_behind_the_end_of_the_svms_stream() {
    for side in SIDES {
        let mut pair = Pair::with(limits());
        let end = Segment::new(side).flags(FIN | ACK).seq(50).ack(8);
        pair.svm(&end.payload(b"bye").bytes());
        pair.svm(&data(side, 53, b"more"));
        pair.pvm(&data(side, 50, b"bye"));
        assert_eq!(pair.rights(), [Right::Match]);
        pair.pvm(&data(side, 53, b"more"));
        assert_eq!(pair.causes, [Cause::Length]);
        assert!(pair.released.is_empty());
        pair.close();
    }
}

#[test]
fn what_a_repeated_syn_carries_is_compared() {
    for side in SIDES {
        let open = Segment::new(side).flags(SYN | ACK).seq(100).ack(8);
        let early = open.clone().payload(b"secret");
        let end = open.clone().flags(SYN | FIN | ACK);
        for odd in [early.bytes(), end.bytes()] {
            let mut pair = Pair::with(limits());
            pair.svm(&open.bytes());
            pair.pvm(&open.bytes());
            pair.pvm(&open.bytes());
            assert_eq!(pair.rights(), [Right::Match, Right::Free]);
            pair.pvm(&odd);
            assert!(pair.released.is_empty(), "output commit");
            pair.close();
        }
        // Data on a SYN that both sent is no more covered than any other.
        let mut pair = Pair::with(limits());
        pair.svm(&early.bytes());
        pair.pvm(&early.bytes());
        assert_eq!(pair.rights(), [Right::Match]);
        pair.pvm(&data(side, 101, b"SECRET"));
        assert!(pair.released.is_empty(), "rule 8");
        pair.close();
    }
}
