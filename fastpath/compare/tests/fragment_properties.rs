//! Datagrams in fragments: how each guest cuts one does not matter, every byte does.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod dice;
mod pair;

use colo_compare::testing::{Side, fragment, udp};
use colo_compare::{Limits, Right};
use dice::{Dice, limits, tagged};
use pair::Pair;
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Piece {
    from: usize,
    end: usize,
    frame: Vec<u8>,
}

/// The transport message of a datagram of `n` payload bytes.
fn message(dice: &mut Dice, side: Side, n: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..n).map(|_| dice.below(3) as u8).collect();
    let l4 = if side == Side::V4 { 34 } else { 54 };
    udp(side, false, 53, 5000, &payload)[l4..].to_vec()
}

/// Cuts at random, in any order; pieces may overlap where `overlaps`.
fn pieces(dice: &mut Dice, side: Side, tags: usize, message: &[u8], overlaps: bool) -> Vec<Piece> {
    let id = dice.below(65_536) as u16;
    let mut pieces = Vec::new();
    let mut from = 0;
    while from < message.len() {
        let end = (from + 8 * (1 + dice.below(12))).min(message.len());
        let from_here = if overlaps && dice.chance(30) {
            from - 8 * dice.below(from / 8 + 1)
        } else {
            from
        };
        let frame = tagged(&fragment(side, id, message, from_here, end), tags);
        pieces.push(Piece {
            from: from_here,
            end,
            frame,
        });
        from = end;
    }
    if dice.chance(40) {
        dice.shuffle(&mut pieces);
    }
    pieces
}

/// Where the pieces lie, for messages.
fn cuts(pieces: &[Piece]) -> Vec<(usize, usize)> {
    pieces.iter().map(|piece| (piece.from, piece.end)).collect()
}

fn play(dice: &mut Dice, pair: &mut Pair, pvm: &[Piece], svm: &[Piece]) {
    let (mut next_pvm, mut next_svm) = (0, 0);
    while next_pvm < pvm.len() || next_svm < svm.len() {
        let is_pvm = next_svm == svm.len() || (next_pvm < pvm.len() && dice.chance(50));
        if is_pvm {
            pair.pvm(&pvm[next_pvm].frame);
            next_pvm += 1;
        } else {
            pair.svm(&svm[next_svm].frame);
            next_svm += 1;
        }
    }
}

/// A commit covers what is still held.
fn end_by_commit(mut pair: Pair) {
    let epoch = pair.cut();
    pair.commit(epoch);
    assert_eq!(pair.path.held_frames(), 0);
    pair.close();
}

fn paired(dice: &mut Dice) -> Pair {
    Pair::with(Limits {
        reorder_window: 1 + dice.below(5),
        ..limits()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn how_a_datagram_is_cut_does_not_matter(seed in 1u64..) {
        let mut dice = Dice(seed);
        let (side, tags) = (dice.side(), dice.below(3));
        let mut pair = paired(&mut dice);
        let (mut sent, mut all) = (Vec::new(), Vec::new());
        for _ in 0..1 + dice.below(3) {
            let n = 100 + dice.below(500);
            let message = message(&mut dice, side, n);
            // Guests do not send overlapping pieces (RFC 5722).
            let pvm = pieces(&mut dice, side, tags, &message, false);
            let svm = pieces(&mut dice, side, tags, &message, false);
            play(&mut dice, &mut pair, &pvm, &svm);
            prop_assert!(pair.causes.is_empty(), "{:?} {:?} {:?}", pair.causes, cuts(&pvm), cuts(&svm));
            prop_assert_eq!(pair.path.held_frames(), 0, "{:?} {:?}", cuts(&pvm), cuts(&svm));
            all.push((cuts(&pvm), cuts(&svm)));
            sent.extend(pvm);
        }
        prop_assert!(pair.released.iter().all(|(_, right)| *right == Right::Match));
        let released = pair.frames_out();
        prop_assert!(released.iter().eq(sent.iter().map(|piece| &piece.frame)));
        let mut reported = std::mem::take(&mut pair.reported);
        reported.sort_unstable();
        let reported_all = reported.iter().copied().eq(1..=pair.svm_seq);
        prop_assert!(reported_all, "reported {reported:?} of {all:?}");
        pair.close();
    }

    #[test]
    fn a_byte_that_differs_never_leaves(seed in 1u64..) {
        let mut dice = Dice(seed);
        let (side, tags) = (dice.side(), dice.below(3));
        let mut pair = paired(&mut dice);
        let n = 60 + dice.below(500);
        let own = message(&mut dice, side, n);
        let mut other = own.clone();
        let at = dice.below(own.len());
        // A datagram in one piece is none in fragments: its checksum does not count.
        prop_assume!(!(6..8).contains(&at));
        match dice.below(3) {
            0 | 1 => other[at] ^= 1 << dice.below(8),
            _ => other.truncate(own.len() - 1),
        }
        let odd = own.iter().zip(&other).position(|(a, b)| a != b).unwrap_or(other.len());
        let overlaps = dice.chance(30);
        let pvm = pieces(&mut dice, side, tags, &own, overlaps);
        let svm = pieces(&mut dice, side, tags, &other, overlaps);
        play(&mut dice, &mut pair, &pvm, &svm);
        for frame in pair.frames_out() {
            let piece = pvm.iter().find(|piece| piece.frame == frame).unwrap();
            prop_assert!(!(piece.from..piece.end).contains(&odd), "byte {odd} left");
        }
        prop_assert!(pair.path.held_frames() > 0);
        pair.advance(1_000_000);
        prop_assert_eq!(pair.causes.len(), 1);
        end_by_commit(pair);
    }

    #[test]
    fn where_a_packet_ends_counts(seed in 1u64..) {
        let mut dice = Dice(seed);
        let (side, tags) = (dice.side(), dice.below(3));
        let mut pair = paired(&mut dice);
        let n = 100 + dice.below(400);
        let message = message(&mut dice, side, n);
        let mut pvm = pieces(&mut dice, side, tags, &message, false);
        let mut svm = pieces(&mut dice, side, tags, &message, false);
        // One piece of one side says "others follow" where the truth is the opposite.
        let of_pvm = dice.chance(50);
        let liar = if of_pvm { &mut pvm } else { &mut svm };
        let odd = dice.below(liar.len());
        let (from, end) = (liar[odd].from, liar[odd].end);
        let flag_at = if side == Side::V4 { (20, 0x20) } else { (57, 1) };
        liar[odd].frame[flag_at.0 + 4 * tags] ^= flag_at.1;
        let lie = liar[odd].frame.clone();
        play(&mut dice, &mut pair, &pvm, &svm);
        for frame in pair.frames_out() {
            prop_assert!(!of_pvm || frame != lie, "the lie left");
            let piece = pvm.iter().find(|piece| piece.frame == frame).unwrap();
            let overlaps = piece.from < end && from < piece.end;
            prop_assert!(of_pvm || !overlaps, "what the SVM lied about left");
        }
        prop_assert!(pair.path.held_frames() > 0);
        pair.advance(1_000_000);
        end_by_commit(pair);
    }

    #[test]
    fn pieces_of_one_side_that_contradict_each_other_never_leave(seed in 1u64..) {
        let mut dice = Dice(seed);
        let (side, tags) = (dice.side(), dice.below(3));
        let mut pair = paired(&mut dice);
        let own = message(&mut dice, side, 200);
        let mut other = own.clone();
        let at = 8 + dice.below(own.len() - 8);
        other[at] ^= 1;
        // A whole cut, and one piece more that says something else about one byte.
        let (mut a, mut b) = (
            pieces(&mut dice, side, tags, &own, false),
            pieces(&mut dice, side, tags, &own, false),
        );
        let (from, end) = (at / 8 * 8, (at / 8 * 8 + 8).min(own.len()));
        let of_pvm = dice.chance(50);
        let liar = if of_pvm { &mut a } else { &mut b };
        let id_bytes = if side == Side::V4 { 18..20 } else { 60..62 };
        let id_bytes = id_bytes.start + 4 * tags..id_bytes.end + 4 * tags;
        let id = &liar[0].frame[id_bytes];
        let id = u16::from_be_bytes([id[0], id[1]]);
        let frame = tagged(&fragment(side, id, &other, from, end), tags);
        let place = dice.below(liar.len() + 1);
        liar.insert(place, Piece { from, end, frame: frame.clone() });
        play(&mut dice, &mut pair, &a, &b);
        if of_pvm {
            // What the SVM did not send does not leave.
            prop_assert!(!pair.frames_out().contains(&frame));
            prop_assert!(pair.path.held_frames() > 0);
        }
        pair.advance(1_000_000);
        end_by_commit(pair);
    }
}
