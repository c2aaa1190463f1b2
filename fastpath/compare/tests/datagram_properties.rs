//! Datagrams of every kind in two captures: equal ones leave in the PVM's order, whatever the
//! SVM's order within the window and whatever the noise; of unequal ones none leaves before a
//! commit.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod dice;
mod pair;

use colo_compare::{Limits, Right};
use dice::{Dice, Kind, limits};
use pair::Pair;
use proptest::prelude::*;

fn payloads(dice: &mut Dice) -> Vec<Vec<u8>> {
    let byte = |dice: &mut Dice| dice.below(3) as u8;
    let payload = |dice: &mut Dice| (0..dice.below(300)).map(|_| byte(dice)).collect();
    (0..1 + dice.below(24)).map(|_| payload(dice)).collect()
}

/// Orders both captures in time. Each one's order is kept.
fn interleave(dice: &mut Dice, pair: &mut Pair, pvm: &[Vec<u8>], svm: &[Vec<u8>]) {
    let (mut next_pvm, mut next_svm) = (0, 0);
    while next_pvm < pvm.len() || next_svm < svm.len() {
        let is_pvm = next_svm == svm.len() || (next_pvm < pvm.len() && dice.chance(50));
        if is_pvm {
            pair.pvm(&pvm[next_pvm]);
            next_pvm += 1;
        } else {
            pair.svm(&svm[next_svm]);
            next_svm += 1;
        }
    }
}

fn frames(dice: &mut Dice, kind: Kind, payloads: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let noise = |dice: &mut Dice| dice.below(65_536) as u16;
    let frame = |payload: &Vec<u8>| kind.frame(payload, noise(dice));
    payloads.iter().map(frame).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn equal_datagrams_leave_in_the_order_of_the_pvm(seed in 1u64..) {
        let mut dice = Dice(seed);
        let window = 1 + dice.below(6);
        let mut pair = Pair::with(Limits { reorder_window: window, ..limits() });
        let (kind, payloads) = (Kind::draw(&mut dice), payloads(&mut dice));
        let pvm = frames(&mut dice, kind, &payloads);
        let mut svm = frames(&mut dice, kind, &payloads);
        // Within a chunk of a window nothing is overtaken by a whole window.
        svm.chunks_mut(window).for_each(|chunk| dice.shuffle(chunk));
        interleave(&mut dice, &mut pair, &pvm, &svm);
        prop_assert!(pair.causes.is_empty(), "{:?}", pair.causes);
        prop_assert_eq!(pair.path.held_frames(), 0);
        let released: Vec<_> = pair.released.drain(..).collect();
        prop_assert!(released.iter().all(|(_, right)| *right == Right::Match));
        prop_assert!(released.iter().map(|(bytes, _)| bytes).eq(&pvm), "order or bytes");
        // Rule 9: each of the SVM's is reported once.
        let mut reported = std::mem::take(&mut pair.reported);
        reported.sort_unstable();
        prop_assert!(reported.into_iter().eq(1..=pair.svm_seq));
        pair.close();
    }

    #[test]
    fn a_datagram_that_differs_waits_for_a_commit(seed in 1u64..) {
        let mut dice = Dice(seed);
        let mut pair = Pair::with(limits());
        let (kind, mut payloads) = (Kind::draw(&mut dice), payloads(&mut dice));
        // All differ, so that none stands for another.
        payloads.iter_mut().enumerate().for_each(|(n, payload)| payload.insert(0, n as u8));
        let pvm = frames(&mut dice, kind, &payloads);
        let mut svm = frames(&mut dice, kind, &payloads);
        let odd = dice.below(svm.len());
        match dice.below(4) {
            0 => drop(svm.remove(odd)),
            1 if kind.carried == 3 => svm[odd].push(1),
            // Where the length is part of the headers, they say so.
            1 if kind.carried < 3 => {
                let mut longer = payloads[odd].clone();
                longer.push(1);
                svm[odd] = kind.frame(&longer, 0);
            }
            _ => {
                let ignored = kind.ignored();
                let (at, bit) = (dice.below(svm[odd].len()), 1 << dice.below(8));
                let is_ignored = ignored.iter().any(|(i, mask)| *i == at && mask & bit != 0);
                prop_assume!(!is_ignored);
                svm[odd][at] ^= bit;
            }
        }
        interleave(&mut dice, &mut pair, &pvm, &svm);
        let released = pair.frames_out();
        prop_assert!(released.iter().eq(&pvm[..odd]), "{} of {odd} left", released.len());
        // It is noticed at once or when its time has passed.
        pair.advance(1_000_000);
        prop_assert_eq!(pair.causes.len(), 1);
        prop_assert!(pair.released.is_empty());
        let epoch = pair.cut();
        pair.commit(epoch);
        let rights = pair.released.iter().all(|(_, right)| *right == Right::Checkpoint);
        prop_assert!(rights && pair.frames_out().iter().eq(&pvm[odd..]));
        pair.close();
    }
}
