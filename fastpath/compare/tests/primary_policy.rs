//! Policies of the primary path: what is compared, held, released, and with which bytes left out.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod guests;
mod pair;

use colo_compare::testing::{Segment, Side, echo, udp};
use colo_compare::wire::tcp::SYN;
use colo_compare::{Cause, Limits, Opener, Policy, PolicyAction, PolicyProtocol, Right, Rule};
use guests::{Vm, assert_diverged, both_send, connect, one_of_each, syn, syn_ack};
use pair::{Pair, SIDES, data};

fn rule(action: PolicyAction) -> Rule {
    Rule {
        action,
        ..Rule::default()
    }
}

fn with_rules(rules: &[Rule]) -> Pair {
    Pair::with_policy(Limits::default(), Policy::new(rules.to_vec()))
}

#[test]
fn policy_hold_leaves_by_commits_only() {
    let deadline_us = Limits::default().compare_deadline_us;
    for frame in SIDES.iter().flat_map(|side| one_of_each(*side)) {
        let mut pair = with_rules(&[rule(PolicyAction::Hold)]);
        pair.pvm(&frame);
        pair.svm(&frame);
        pair.svm(&frame);
        assert_eq!((pair.rights(), pair.reported.clone()), (vec![], vec![]));
        pair.advance(deadline_us - 1);
        assert_eq!(pair.causes, []);
        pair.advance(1);
        assert_diverged(pair, Cause::Policy, 1);
    }
}

#[test]
fn policy_release_needs_a_fresh_heartbeat_and_the_ack_rule_and_no_svm() {
    for side in SIDES {
        let requests = [
            Segment::new(side).to_guest().payload(b"ask").bytes(),
            udp(side, true, 80, 9000, b"ask"),
            echo(side, true, 1, b"ask"),
        ];
        for (frame, request) in one_of_each(side).iter().zip(requests) {
            let mut pair = with_rules(&[rule(PolicyAction::Release)]);
            pair.pvm(frame);
            assert_eq!(pair.rights(), [Right::Policy]);
            let up_to = pair.input_unacked(&request);
            pair.pvm(frame);
            assert_eq!(pair.rights(), [], "what it answers is not assured");
            pair.ack_input(up_to);
            assert_eq!(pair.rights(), [Right::Policy]);
            pair.lease(pair.now_us);
            pair.now_us += 1;
            pair.pvm(frame);
            assert_eq!(pair.rights(), [], "no heartbeat");
            pair.svm(&udp(side, false, 80, 9000, b"something else"));
            pair.svm(&data(side, 10, b"another"));
            assert_eq!(pair.reported, [1, 2], "nobody waits for it");
            assert_eq!(pair.rights(), [], "the SVM's word is not asked for");
            pair.lease(pair.now_us);
            assert_eq!(pair.rights(), [Right::Policy]);
            assert_eq!((pair.causes.len(), pair.path.held_frames()), (0, 0));
            pair.close();
        }
    }
}

const IGNORED: PolicyAction = PolicyAction::IgnoreBytes { from: 4, end: 8 };

/// Sends one stream on each side, each in its own segments; gives the causes, nothing when all left.
fn streams(pair: &mut Pair, side: Side, isn: u32, pvm: &[&[u8]], svm: &[&[u8]]) -> Vec<Cause> {
    for (vm, segments) in [(Vm::Pvm, pvm), (Vm::Svm, svm)] {
        let mut seq = isn.wrapping_add(1);
        for payload in segments {
            vm.sends(pair, &data(side, seq, payload));
            seq = seq.wrapping_add(payload.len() as u32);
        }
    }
    let left = pair.rights();
    assert_eq!(left.len() == pvm.len(), pair.causes.is_empty());
    std::mem::take(&mut pair.causes)
}

#[test]
fn policy_ignored_bytes_of_a_stream_count_from_its_start() {
    type Stream<'a> = &'a [&'a [u8]];
    let cases: [(Stream, Stream, bool); 9] = [
        (&[b"abcdEFGHijkl"], &[b"abcdXXXXijkl"], true),
        (&[b"abcdEFGHijkl"], &[b"abcXEFGHijkl"], false),
        (&[b"abcdEFGHijkl"], &[b"abcdEFGHXjkl"], false),
        // The span lies across segments, cut alike and not.
        (&[b"abcdEF", b"GHijkl"], &[b"abcdXX", b"XXijkl"], true),
        (&[b"abcdEF", b"GHijkl"], &[b"abcdXX", b"XXXjkl"], false),
        (
            &[b"abc", b"dEFGH", b"ijkl"],
            &[b"abcdXX", b"X", b"Xijkl"],
            true,
        ),
        (
            &[b"abc", b"dEFGH", b"ijkl"],
            &[b"abXdXX", b"X", b"Xijkl"],
            false,
        ),
        (
            &[b"abcd", b"EFGH", b"ijkl"],
            &[b"abcd", b"XXXX", b"ijkl"],
            true,
        ),
        // Bytes that do not count must still be there.
        (&[b"abcd", b"EFGH"], &[b"abcd"], false),
    ];
    for side in SIDES {
        for (pvm, svm, agree) in cases {
            let mut pair = with_rules(&[rule(IGNORED)]);
            connect(&mut pair, side, u32::MAX - 6);
            let causes = if pvm.concat().len() == svm.concat().len() {
                streams(&mut pair, side, u32::MAX - 6, pvm, svm)
            } else {
                pair.pvm(&data(side, u32::MAX - 5, &pvm.concat()));
                pair.svm(&data(side, u32::MAX - 5, &svm.concat()));
                pair.advance(Limits::default().compare_deadline_us);
                pair.causes.clone()
            };
            assert_eq!(causes.is_empty(), agree, "{pvm:?} against {svm:?}");
            pair.close();
        }
    }
}

#[test]
fn policy_ignored_bytes_are_none_where_the_start_of_the_stream_is_unknown() {
    for side in SIDES {
        let mut pair = with_rules(&[rule(IGNORED)]);
        let causes = streams(&mut pair, side, 99, &[b"abcdEFGH"], &[b"abcdXXXX"]);
        assert_eq!(causes, [Cause::Payload]);
        pair.close();
        // All of a stream whose start is unknown, too.
        let all = PolicyAction::IgnoreBytes {
            from: 0,
            end: u32::MAX,
        };
        let mut pair = with_rules(&[rule(all)]);
        let causes = streams(&mut pair, side, 99, &[b"abcd"], &[b"abcX"]);
        assert_eq!(causes, [Cause::Payload]);
        pair.close();
    }
}

#[test]
fn policy_ignored_bytes_outlive_a_commit_and_begin_again_with_a_new_connection() {
    for side in SIDES {
        let mut pair = with_rules(&[rule(IGNORED)]);
        connect(&mut pair, side, 100);
        pair.pvm(&data(side, 101, b"abcdE"));
        let epoch = pair.cut();
        pair.commit(epoch);
        assert_eq!(pair.rights(), [Right::Checkpoint]);
        let causes = streams(&mut pair, side, 105, &[b"FGHi"], &[b"XXXi"]);
        assert_eq!(causes, []);
        // The next connection's numbers begin within the span of the old one.
        pair.input(&syn(side, 700));
        both_send(&mut pair, &syn_ack(side, 102, 701));
        assert_eq!(pair.rights(), [Right::Match]);
        let causes = streams(&mut pair, side, 102, &[b"abcdEFGHi"], &[b"abcdXXXXi"]);
        assert_eq!(causes, []);
        pair.input(&syn(side, 800));
        both_send(&mut pair, &syn_ack(side, 104, 801));
        assert_eq!(pair.rights(), [Right::Match]);
        let causes = streams(&mut pair, side, 104, &[b"abcd"], &[b"abcX"]);
        assert_eq!(causes, [Cause::Payload]);
        pair.close();
    }
}

#[test]
fn policy_ignored_bytes_of_a_datagram_count_from_its_payload() {
    for side in SIDES {
        let udp = |payload: &[u8]| udp(side, false, 80, 9000, payload);
        let echo = |payload: &[u8]| echo(side, false, 1, payload);
        for make in [&udp as &dyn Fn(&[u8]) -> Vec<u8>, &echo] {
            for svm_first in [false, true] {
                let verdict = |a: &[u8], b: &[u8]| {
                    let mut pair = with_rules(&[rule(IGNORED)]);
                    let (a, b) = (make(a), make(b));
                    if svm_first {
                        pair.svm(&b);
                    }
                    pair.pvm(&a);
                    if !svm_first {
                        pair.svm(&b);
                    }
                    pair.advance(Limits::default().settle_us);
                    let out = (pair.rights().len(), pair.causes.first().copied());
                    pair.close();
                    out
                };
                assert_eq!(verdict(b"abcdEFGHi", b"abcdXXXXi"), (1, None));
                assert_eq!(verdict(b"abcdEF", b"abcdXX"), (1, None));
                let differs = (0, Some(Cause::Payload));
                assert_eq!(verdict(b"abcdEFGHi", b"abcXEFGHi"), differs);
                assert_eq!(verdict(b"abcdEFGHi", b"abcdEFGHX"), differs);
                assert_eq!(verdict(b"abcdEF", b"abcdXXX"), (0, Some(Cause::Length)));
            }
        }
    }
}

#[test]
fn the_first_rule_that_matches_decides_for_a_flow() {
    let of_port = |port, action| Rule {
        protocol: Some(PolicyProtocol::Udp),
        guest_ports: Some((port, port)),
        ..rule(action)
    };
    let rules = [
        of_port(7, PolicyAction::Compare),
        of_port(8, PolicyAction::Hold),
        Rule {
            protocol: Some(PolicyProtocol::Udp),
            ..rule(PolicyAction::Release)
        },
        of_port(9, PolicyAction::Hold),
    ];
    let mut pair = with_rules(&rules);
    let mut right_of = |port| {
        let frame = udp(Side::V4, false, port, 9000, b"x");
        pair.pvm(&frame);
        let at_once = pair.rights();
        pair.svm(&frame);
        (at_once, pair.rights())
    };
    assert_eq!(right_of(7), (vec![], vec![Right::Match]));
    assert_eq!(right_of(8), (vec![], vec![]));
    assert_eq!(right_of(9), (vec![Right::Policy], vec![]));
    pair.pvm(&echo(Side::V4, false, 1, b"no rule"));
    assert_eq!(pair.rights(), []);
    pair.close();
}

#[test]
fn a_rule_for_one_direction_heeds_who_sent_the_first_frame() {
    let syn_from_guest = |side| {
        let segment = Segment::new(side).flags(SYN);
        segment.seq(9).bytes()
    };
    for side in SIDES {
        for direction in [Opener::Guest, Opener::Peer] {
            let one_way = Rule {
                direction: Some(direction),
                ..rule(PolicyAction::Release)
            };
            let is_released = |input: Option<Vec<u8>>, first: Vec<u8>| {
                let mut pair = with_rules(&[one_way]);
                if let Some(input) = input {
                    pair.input(&input);
                }
                pair.pvm(&first);
                let left = pair.rights();
                pair.close();
                left == [Right::Policy]
            };
            let (by_guest, by_peer) = (direction == Opener::Guest, direction == Opener::Peer);
            let answer = udp(side, false, 7, 9000, b"a");
            let request = udp(side, true, 7, 9000, b"q");
            assert_eq!(is_released(None, answer.clone()), by_guest);
            assert_eq!(is_released(Some(request), answer), by_peer);
            assert_eq!(is_released(None, syn_from_guest(side)), by_guest);
            let accepted = is_released(Some(syn(side, 7)), syn_ack(side, 1, 8));
            assert_eq!(accepted, by_peer);
            // Under way: nobody knows, and what is not known is protected.
            assert!(!is_released(None, data(side, 10, b"x")));
        }
    }
}

/// Bytes are left out at their place in the stream, not 4 GiB behind it as well.
#[test]
fn policy_ignored_bytes_of_a_long_stream_do_not_come_again() {
    const STEP: u32 = (1 << 30) - 4;
    let open = PolicyAction::IgnoreBytes {
        from: 4,
        end: u32::MAX,
    };
    for (action, is_open) in [(IGNORED, false), (open, true)] {
        for commits in [false, true] {
            let isn = 70u32.wrapping_neg();
            let start = isn.wrapping_add(1);
            let mut pair = with_rules(&[rule(action)]);
            connect(&mut pair, Side::V4, isn);
            // Four bytes at each quarter of the way, three times round, less 12 bytes each time.
            for n in 0..13u32 {
                let seq = start.wrapping_add(n.wrapping_mul(STEP + 1));
                both_send(&mut pair, &data(Side::V4, seq, b"same"));
                if commits && n % 2 == 1 {
                    let epoch = pair.cut();
                    pair.commit(epoch);
                    pair.path.caught_up(pair.now_us, epoch + 1);
                }
            }
            both_send(&mut pair, &data(Side::V4, start, b"same"));
            pair.released.clear();
            // Where bytes 4 to 8 would be, were the count not of 64 bits.
            let seq = start.wrapping_add(4);
            pair.pvm(&data(Side::V4, seq, b"this"));
            pair.svm(&data(Side::V4, seq, b"that"));
            assert_eq!(pair.rights().len(), usize::from(is_open));
            assert_eq!(pair.causes.is_empty(), is_open);
            pair.close();
        }
    }
}
