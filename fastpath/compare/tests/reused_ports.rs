//! A guest that begins all connections with the same number, and a client that uses its ports again: what the first
//! connection has sent and got says nothing about the second one.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod guests;
mod pair;

use colo_compare::testing::{Segment, Side};
use colo_compare::wire::tcp::{ACK, FIN, RST};
use colo_compare::{Cause, Right};
use guests::{VMS, Vm, both_send, connect, syn, syn_ack};
use pair::{Pair, SIDES, data};

const ISN: u32 = 100;

/// How the first connection ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// Both ends close.
    Closed,
    /// The client resets it.
    Reset,
}

/// A second connection between the same ports, after one that has sent four bytes.
fn connected_again(side: Side, end: End, first: Vm) -> Pair {
    let mut pair = Pair::new();
    connect(&mut pair, side, ISN);
    both_send(&mut pair, &data(side, ISN + 1, b"once"));
    let from_client = |seq, ack| Segment::new(side).to_guest().seq(seq).ack(ack);
    pair.input(&from_client(8, ISN + 5).bytes());
    match end {
        End::Closed => {
            let segment = Segment::new(side).flags(FIN | ACK);
            both_send(&mut pair, &segment.seq(ISN + 5).ack(500).bytes());
            pair.input(&from_client(8, ISN + 6).flags(FIN | ACK).bytes());
        }
        End::Reset => pair.input(&from_client(8, 0).flags(RST).bytes()),
    }
    pair.rights();
    pair.input(&syn(side, 70_000));
    let answer = syn_ack(side, ISN, 70_001);
    first.sends(&mut pair, &answer);
    first.other().sends(&mut pair, &answer);
    pair
}

#[test]
fn bytes_of_the_next_connection_are_compared_and_not_taken_for_old_ones() {
    for side in SIDES {
        for (end, first) in [
            (End::Closed, Vm::Pvm),
            (End::Closed, Vm::Svm),
            (End::Reset, Vm::Pvm),
        ] {
            let connected = || {
                let mut pair = connected_again(side, end, first);
                assert_eq!(pair.rights(), [Right::Match], "{side:?} {end:?}");
                pair
            };
            let mut pair = connected();
            pair.pvm(&data(side, ISN + 1, b"again"));
            assert_eq!(
                pair.rights(),
                [],
                "{side:?} {end:?}: the SVM has not sent it"
            );
            pair.svm(&data(side, ISN + 1, b"again"));
            assert_eq!((pair.rights(), pair.causes.len()), (vec![Right::Match], 0));
            pair.close();
            for vm in VMS {
                let mut pair = connected();
                vm.sends(&mut pair, &data(side, ISN + 1, b"again"));
                vm.other().sends(&mut pair, &data(side, ISN + 1, b"aGain"));
                assert_eq!(
                    (pair.rights(), &pair.causes[..]),
                    (vec![], &[Cause::Payload][..])
                );
                pair.close();
            }
        }
    }
}

/// Where the SVM's answer cannot be told from a repeated one, a checkpoint tells.
#[test]
fn what_looks_like_a_repeated_answer_costs_a_checkpoint_at_most() {
    for side in SIDES {
        let mut pair = connected_again(side, End::Reset, Vm::Svm);
        assert_eq!(pair.rights(), []);
        pair.advance(colo_compare::Limits::default().compare_deadline_us);
        assert_eq!(pair.causes.len(), 1);
        let epoch = pair.cut();
        pair.commit(epoch);
        assert_eq!(pair.rights(), [Right::Checkpoint]);
        pair.path.caught_up(pair.now_us, epoch + 1);
        pair.pvm(&data(side, ISN + 1, b"again"));
        assert_eq!(pair.rights(), []);
        pair.svm(&data(side, ISN + 1, b"again"));
        assert_eq!(pair.rights(), [Right::Match]);
        pair.close();
    }
}

/// A guest that tries again where it was refused has sent nothing that the old numbers could cover.
#[test]
fn a_refused_connection_that_is_tried_again_is_a_repeated_one() {
    for side in SIDES {
        let mut pair = Pair::new();
        let open = Segment::new(side)
            .flags(colo_compare::wire::tcp::SYN)
            .seq(ISN)
            .bytes();
        both_send(&mut pair, &open);
        assert_eq!(pair.rights(), [Right::Match]);
        let refusal = Segment::new(side)
            .to_guest()
            .flags(RST | ACK)
            .seq(0)
            .ack(ISN + 1);
        pair.input(&refusal.bytes());
        pair.svm(&open);
        pair.pvm(&open);
        assert_eq!((pair.rights(), pair.causes.len()), (vec![Right::Free], 0));
        pair.close();
    }
}
