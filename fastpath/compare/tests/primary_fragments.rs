//! Fragments on the primary path: pieces of one packet, cut alike or not, in whatever order.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod pair;

use colo_compare::testing::{Side, fragment, ip_frame, udp};
use colo_compare::{Cause, Limits, Right};
use pair::{Pair, SIDES};

/// What a cut packet carries: a UDP header, and bytes that tell their place.
fn message(len: u8) -> Vec<u8> {
    let header = [0, 7, 0x23, 0x28, 0, 8 + len, 0, 0];
    header.into_iter().chain(0..len).collect()
}

/// Bytes `from..end` of a packet, as a fragment; both in units of 8 bytes, the end of the last
/// piece is the end of the packet.
fn piece(side: Side, id: u16, message: &[u8], (from, end): (usize, usize)) -> Vec<u8> {
    let end = (end * 8).min(message.len());
    fragment(side, id, message, from * 8, end)
}

fn pieces(side: Side, id: u16, message: &[u8], cuts: &[(usize, usize)]) -> Vec<Vec<u8>> {
    let cuts = cuts.iter();
    cuts.map(|cut| piece(side, id, message, *cut)).collect()
}

/// 60 bytes of transport: seven units and a half.
const LEN: u8 = 52;
const ALL: usize = 8;

/// Gives the pieces to a pair in this order, the SVM's first or last; what is left to be done.
fn exchange(pvm: &[Vec<u8>], svm: &[Vec<u8>], svm_first: bool) -> Pair {
    let mut pair = Pair::new();
    let send_svm = |pair: &mut Pair| svm.iter().for_each(|bytes| pair.svm(bytes));
    if svm_first {
        send_svm(&mut pair);
    }
    pvm.iter().for_each(|bytes| pair.pvm(bytes));
    if !svm_first {
        send_svm(&mut pair);
    }
    pair
}

/// All left, in the PVM's order, and all of the SVM's was reported once.
fn assert_all_left(mut pair: Pair, pvm: &[Vec<u8>], svm: usize) {
    assert_eq!(pair.causes, []);
    assert_eq!(pair.path.held_frames(), 0);
    assert!(
        pair.released
            .iter()
            .all(|(_, right)| *right == Right::Match)
    );
    assert_eq!(pair.frames_out(), pvm);
    pair.reported.sort_unstable();
    assert!(pair.reported.iter().copied().eq(1..=svm as u64));
    pair.advance(10_000_000);
    assert_eq!(pair.causes, [], "nothing is left over");
    pair.close();
}

#[test]
fn pieces_that_are_cut_alike_match_one_by_one() {
    for side in SIDES {
        let message = message(LEN);
        let cuts = [(0, 3), (3, 6), (6, ALL)];
        let pvm = pieces(side, 7, &message, &cuts);
        let svm = pieces(side, 9, &message, &cuts);
        let mut pair = Pair::new();
        for (n, (p, s)) in pvm.iter().zip(&svm).enumerate() {
            pair.pvm(p);
            assert_eq!(pair.rights(), []);
            pair.svm(s);
            assert_eq!(pair.rights(), [Right::Match], "before the packet is whole");
            assert_eq!(pair.reported.len(), n + 1);
        }
        pair.close();
    }
}

#[test]
fn the_ecn_codepoint_of_a_datagram_counts_in_its_pieces_but_not_that_one_met_congestion() {
    let message = message(LEN);
    let with_codepoint = |side: Side, mut frames: Vec<Vec<u8>>, codepoint: u8| {
        for frame in &mut frames {
            frame[15] |= if side == Side::V4 {
                codepoint
            } else {
                codepoint << 4
            };
        }
        frames
    };
    let cuts: [&[(usize, usize)]; 2] = [&[(0, 3), (3, ALL)], &[(0, 5), (5, ALL)]];
    for (side, cut) in SIDES
        .into_iter()
        .flat_map(|side| cuts.map(|cut| (side, cut)))
    {
        for (codepoint, other, agree) in [(2, 3, true), (3, 2, true), (2, 0, false), (0, 2, false)]
        {
            let pvm = with_codepoint(side, pieces(side, 7, &message, cuts[0]), codepoint);
            let svm = with_codepoint(side, pieces(side, 9, &message, cut), other);
            let mut pair = exchange(&pvm, &svm, false);
            if agree {
                assert_all_left(pair, &pvm, svm.len());
                continue;
            }
            pair.advance(Limits::default().compare_deadline_us);
            assert_eq!((pair.rights(), pair.causes.len()), (vec![], 1));
            pair.close();
        }
    }
}

#[test]
fn pieces_that_are_cut_differently_match_as_a_whole() {
    let message = message(LEN);
    // The last are out of order.
    let cuts: [&[(usize, usize)]; 5] = [
        &[(0, 3), (3, ALL)],
        &[(0, 2), (2, 4), (4, ALL)],
        &[(0, 7), (7, ALL)],
        &[(5, ALL), (0, 5)],
        &[(3, 6), (6, ALL), (0, 1), (1, 3)],
    ];
    for side in SIDES {
        for (a, b) in cuts.iter().flat_map(|a| cuts.map(|b| (*a, b))) {
            for svm_first in [false, true] {
                let pvm = pieces(side, 7, &message, a);
                let svm = pieces(side, 9, &message, b);
                let pair = exchange(&pvm, &svm, svm_first);
                assert_all_left(pair, &pvm, svm.len());
            }
        }
    }
}

#[test]
fn pieces_of_two_packets_may_be_mixed() {
    for side in SIDES {
        let (one, mut two) = (message(LEN), message(LEN));
        // One byte, and so the checksum.
        (two[6], two[40]) = (1, two[40] ^ 1);
        let mixed = |ids: [u16; 2], [a, b]: [&[(usize, usize)]; 2]| {
            let one = pieces(side, ids[0], &one, a);
            let two = pieces(side, ids[1], &two, b);
            let mut mixed = Vec::new();
            let (mut one, mut two) = (one.into_iter(), two.into_iter());
            loop {
                let next = [one.next(), two.next()];
                if next == [None, None] {
                    return mixed;
                }
                mixed.extend(next.into_iter().flatten());
            }
        };
        let halves: &[(usize, usize)] = &[(0, 4), (4, ALL)];
        let thirds: &[(usize, usize)] = &[(0, 3), (3, 5), (5, ALL)];
        let pvm = mixed([7, 8], [halves, thirds]);
        for svm in [
            mixed([70, 80], [thirds, halves]),
            mixed([8, 7], [thirds, halves]),
            mixed([70, 80], [halves, thirds]),
        ] {
            for svm_first in [false, true] {
                let pair = exchange(&pvm, &svm, svm_first);
                assert_all_left(pair, &pvm, svm.len());
            }
        }
        // Another flow's datagram between them does not wait.
        let other = udp(side, false, 9, 9, b"other");
        let mut pair = exchange(&pvm[..2], &[], false);
        pair.pvm(&other);
        pair.svm(&other);
        assert_eq!(pair.rights(), [Right::Match]);
        pair.close();
    }
}

#[test]
fn pieces_that_overlap_must_agree() {
    let good = message(LEN);
    let mut bad = good.clone();
    bad[3 * 8 + 2] ^= 1;
    let whole = [(0, 4), (4, ALL)];
    for side in SIDES {
        let straight = pieces(side, 9, &good, &whole);
        let overlapping = |second: &[u8]| {
            let mut all = pieces(side, 7, &good, &[(0, 5)]);
            all.push(piece(side, 7, second, (3, 6)));
            all.push(piece(side, 7, &good, (6, ALL)));
            all
        };
        for svm_first in [false, true] {
            let (pvm, svm) = (overlapping(&good), &straight);
            assert_all_left(exchange(&pvm, svm, svm_first), &pvm, svm.len());
            let (pvm, svm) = (&straight, overlapping(&good));
            assert_all_left(exchange(pvm, &svm, svm_first), pvm, svm.len());
            // A receiver may take either: nothing leaves.
            for (pvm, svm) in [
                (&overlapping(&bad), &straight),
                (&straight, &overlapping(&bad)),
            ] {
                let mut pair = exchange(pvm, svm, svm_first);
                pair.advance(Limits::default().compare_deadline_us);
                assert_eq!((pair.rights(), pair.causes.len()), (vec![], 1));
                pair.close();
            }
        }
    }
}

#[test]
fn a_missing_piece_is_waited_for_until_the_deadline() {
    let limits = Limits::default();
    let message = message(LEN);
    for side in SIDES {
        let pvm = pieces(side, 7, &message, &[(0, 4), (4, ALL)]);
        let svm = pieces(side, 9, &message, &[(0, 2), (2, 6), (6, ALL)]);
        for missing in 0..3 {
            let mut svm = svm.clone();
            let late = svm.remove(missing);
            for comes in [true, false] {
                let mut pair = exchange(&pvm, &svm, false);
                pair.advance(limits.settle_us - 1);
                assert_eq!((pair.rights(), pair.causes.len()), (vec![], 0));
                if comes {
                    pair.svm(&late);
                    assert_all_left(pair, &pvm, 3);
                    continue;
                }
                pair.advance(limits.compare_deadline_us);
                assert_eq!((pair.rights(), pair.causes.len()), (vec![], 1));
                assert_eq!(pair.path.held_frames(), 2);
                pair.close();
            }
        }
        // The SVM has sent nothing at all.
        let mut pair = exchange(&pvm, &[], false);
        pair.advance(limits.compare_deadline_us - 1);
        assert_eq!(pair.causes, []);
        pair.advance(1);
        assert_eq!(
            (pair.rights(), pair.causes.clone()),
            (vec![], vec![Cause::Deadline])
        );
        pair.close();
        // The PVM's packet is not whole.
        let mut pair = exchange(&pvm[..1], &svm, false);
        pair.advance(limits.compare_deadline_us);
        assert_eq!((pair.rights(), pair.causes.len()), (vec![], 1));
        pair.close();
    }
}

#[test]
fn one_differing_byte_or_length_is_held() {
    let good = message(LEN);
    for side in SIDES {
        let pvm = pieces(side, 7, &good, &[(0, 4), (4, ALL)]);
        let cuts = [(0, 2), (2, 6), (6, ALL)];
        let mut others: Vec<_> = (0..good.len())
            .map(|at| {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                pieces(side, 9, &bad, &cuts)
            })
            .collect();
        others.push(pieces(side, 9, &message(LEN - 1), &cuts));
        others.push(pieces(side, 9, &message(LEN + 1), &cuts));
        // It ends where the PVM's first piece does.
        others.push(pieces(side, 9, &good[..32], &cuts[..2]));
        let mut ttl = pieces(side, 9, &good, &cuts);
        ttl[1][if side == Side::V4 { 22 } else { 21 }] -= 1;
        others.push(ttl);
        let mut protocol = pieces(side, 9, &good, &cuts);
        let at = if side == Side::V4 { 23 } else { 54 };
        protocol.iter_mut().for_each(|frame| frame[at] = 136);
        others.push(protocol);
        for (n, svm) in others.iter().enumerate() {
            for svm_first in [false, true] {
                let mut pair = exchange(&pvm, svm, svm_first);
                pair.advance(Limits::default().compare_deadline_us);
                assert_eq!(pair.rights(), [], "{side:?}, case {n}");
                assert_eq!((pair.causes.len(), pair.reported.len()), (1, 0));
                let epoch = pair.cut();
                pair.commit(epoch);
                assert_eq!(pair.rights(), [Right::Checkpoint; 2]);
                pair.close();
            }
        }
    }
}

#[test]
fn a_packet_that_only_one_side_cut_is_held() {
    let good = message(LEN);
    for side in SIDES {
        let whole = ip_frame(side, false, 17, 64, 3, &good);
        let cut = pieces(side, 7, &good, &[(0, 4), (4, ALL)]);
        for (pvm, svm) in [(&cut, &vec![whole.clone()]), (&vec![whole.clone()], &cut)] {
            let mut pair = exchange(pvm, svm, false);
            pair.advance(Limits::default().compare_deadline_us);
            assert_eq!(pair.rights(), []);
            assert_eq!(pair.causes, [Cause::Deadline]);
            pair.close();
        }
    }
}

#[test]
fn the_svms_pieces_are_reported_when_the_last_of_the_pvms_has_left() {
    let good = message(LEN);
    for side in SIDES {
        let pvm = pieces(side, 7, &good, &[(0, 3), (3, ALL)]);
        let svm = pieces(side, 9, &good, &[(0, 2), (2, 6), (6, ALL)]);
        let mut pair = Pair::new();
        pair.pvm(&pvm[0]);
        let up_to = pair.input_unacked(&udp(side, true, 9, 9, b"input"));
        pair.pvm(&pvm[1]);
        svm.iter().for_each(|bytes| pair.svm(bytes));
        assert_eq!(pair.rights(), [Right::Match]);
        assert_eq!(pair.reported, []);
        // What comes between does not disturb what is decided.
        pair.svm(&piece(side, 11, &good, (0, 2)));
        assert_eq!((pair.rights(), pair.reported.clone()), (vec![], vec![]));
        pair.ack_input(up_to);
        assert_eq!(pair.rights(), [Right::Match]);
        assert_eq!(pair.reported, [1, 2, 3]);
        pair.close();
    }
}

#[test]
fn with_several_shards_fragments_of_tcp_wait_for_a_commit() {
    let tcp = |mut frame: Vec<u8>| {
        frame[23] = 6;
        frame
    };
    let cases = [(0, 2), (8, 0)];
    for ((crossing_frames, leave), pvm_first) in cases
        .into_iter()
        .flat_map(|case| [(case, false), (case, true)])
    {
        let limits = Limits {
            crossing_frames,
            ..Limits::default()
        };
        let mut pair = Pair::with(limits);
        let all = pieces(Side::V4, 1, &message(LEN), &[(0, 4), (4, ALL)]);
        let all: Vec<_> = all.into_iter().map(tcp).collect();
        for piece in &all {
            if pvm_first {
                pair.pvm(piece);
                pair.svm(piece);
            } else {
                pair.svm(piece);
                pair.pvm(piece);
            }
        }
        assert_eq!(pair.rights().len(), leave, "{crossing_frames} {pvm_first}");
        // Other fragments leave as ever.
        let other = piece(Side::V6, 2, &message(LEN), (0, ALL / 2));
        pair.svm(&other);
        pair.pvm(&other);
        assert_eq!(pair.rights().len(), 1);
        pair.advance(limits.compare_deadline_us);
        let asked = usize::from(leave == 0);
        assert_eq!(pair.causes.len(), asked);
        pair.close();
    }
}
