//! Frames of both guests taken by twos: what leaves, what is reported, asked for and counted is the same as when
//! each is given for itself, whatever else happens.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod dice;
mod pair;

use colo_compare::testing::{Segment, Side, udp};
use colo_compare::wire::tcp::{ACK, FIN, PSH, RST, SYN};
use colo_compare::{Limits, Passed};
use dice::{Dice, limits};
use pair::Pair;
use proptest::prelude::*;

/// Gives both frames, by twos if that is possible. Says whether it was.
fn both(pair: &mut Pair, pvm: &[u8], svm: &[u8]) -> bool {
    let seq = pair.svm_seq + 1;
    if let Some(mut pairs) = pair.path.pairs(pair.now_us, pair.epoch) {
        let passed = pairs.take(pvm, svm);
        let is_passed = !matches!(passed, Passed::Neither);
        if let Passed::BothAndKeep(history) = passed {
            let token = pair.frames.insert(svm).unwrap();
            pairs.keep(&mut pair.frames, history, seq, token);
        }
        drop(pairs);
        if is_passed {
            pair.svm_seq = seq;
            pair.released
                .push((pvm.to_vec(), colo_compare::Right::Match));
            pair.reported.push(seq);
            return true;
        }
    }
    pair.pvm(pvm);
    pair.svm(svm);
    false
}

/// Lets time pass from deadline to deadline: of two flows that are late at one look, either may be named as the
/// cause.
fn advance(pair: &mut Pair, us: u64) {
    let until_us = pair.now_us + us;
    while let Some(due_us) = pair.path.next_deadline().filter(|at_us| *at_us < until_us) {
        pair.advance(due_us.saturating_sub(pair.now_us).max(1));
    }
    pair.advance(until_us.saturating_sub(pair.now_us));
}

/// One of few flows, with what its guest sends next.
#[derive(Debug, Clone, Copy)]
struct Flow {
    port: u16,
    is_tcp: bool,
    next: u32,
}

impl Flow {
    /// The next frame, an old one again, or one beyond the next; with what need not be equal.
    fn frame(&self, dice: &mut Dice, seq: u32, payload: &[u8]) -> Vec<u8> {
        let noise = dice.below(65_536) as u16;
        if !self.is_tcp {
            return udp(Side::V4, false, self.port, 9, payload);
        }
        let flags = match dice.below(40) {
            0 => FIN | ACK,
            1 => RST | ACK,
            2 => SYN | ACK,
            3..10 => PSH | ACK,
            _ => ACK,
        };
        let segment = Segment::new(Side::V4).ports(self.port, 9).flags(flags);
        let segment = segment.seq(seq).ack(500 + u32::from(noise & 1)).id(noise);
        segment
            .timestamps(u32::from(noise), 2)
            .payload(payload)
            .bytes()
    }
}

/// What both guests send, each for itself: mostly the same.
fn frames(dice: &mut Dice, flow: &mut Flow) -> [Vec<u8>; 2] {
    let len = dice.below(20);
    let payload: Vec<u8> = (0..len)
        .map(|n| flow.next.wrapping_add(n as u32) as u8)
        .collect();
    let seq = match dice.below(12) {
        0 => flow.next.wrapping_sub(dice.below(30) as u32),
        1 => flow.next.wrapping_add(dice.below(30) as u32),
        _ => {
            let seq = flow.next;
            flow.next = seq.wrapping_add(len as u32);
            seq
        }
    };
    // Old bytes are the old ones, new ones those that belong there.
    let payload: Vec<u8> = match flow.is_tcp {
        true => (0..len as u32).map(|n| seq.wrapping_add(n) as u8).collect(),
        false => payload,
    };
    let pvm = flow.frame(dice, seq, &payload);
    let mut svm = match dice.chance(70) {
        true => pvm.clone(),
        false => flow.frame(dice, seq, &payload),
    };
    if dice.chance(3) {
        let at = dice.below(svm.len());
        svm[at] ^= 1 << dice.below(8);
    }
    [pvm, svm]
}

/// One step of both lives. Gives how many pairs were taken by twos.
fn step(dice: &mut Dice, flows: &mut [Flow], by_twos: &mut Pair, singly: &mut Pair) -> usize {
    let at = dice.below(flows.len());
    let [pvm, svm] = frames(dice, &mut flows[at]);
    let flow = flows[at];
    let mut each = |act: &dyn Fn(&mut Pair)| {
        act(by_twos);
        act(singly);
    };
    each(&|pair| pair.now_us += 1);
    match dice.below(20) {
        0 => each(&|pair| pair.pvm(&pvm)),
        1 => each(&|pair| pair.svm(&svm)),
        2 => {
            let us = dice.below(30_000) as u64;
            each(&|pair| advance(pair, us));
        }
        3 => {
            let input = Segment::new(Side::V4).to_guest().ports(flow.port, 9);
            let input = input
                .seq(500)
                .ack(flow.next.wrapping_sub(dice.below(20) as u32));
            let input = input.payload(&b"more"[..dice.below(5)]).bytes();
            let is_acked = dice.chance(70);
            each(&|pair| {
                let up_to = pair.input_unacked(&input);
                if is_acked {
                    pair.ack_input(up_to);
                }
            });
        }
        4 if dice.chance(30) => each(&|pair| {
            let epoch = pair.cut();
            pair.commit(epoch);
            pair.path.caught_up(pair.now_us, epoch + 1);
        }),
        _ => {
            singly.pvm(&pvm);
            singly.svm(&svm);
            return usize::from(both(by_twos, &pvm, &svm));
        }
    }
    0
}

fn flows() -> Vec<Flow> {
    let flow = |n: u16| Flow {
        port: 80 + n,
        is_tcp: n != 2,
        // Over the wrap.
        next: u32::MAX - 100 * u32::from(n),
    };
    (0..3).map(flow).collect()
}

fn compare_lives(seed: u64, steps: usize) -> Result<usize, TestCaseError> {
    let mut dice = Dice(seed);
    let limits = Limits {
        max_svm_frames: 64,
        max_history_bytes: 200,
        ..limits()
    };
    let (mut by_twos, mut singly) = (Pair::with(limits), Pair::with(limits));
    let mut flows = flows();
    let mut taken = 0;
    for _ in 0..steps {
        taken += step(&mut dice, &mut flows, &mut by_twos, &mut singly);
        prop_assert_eq!(&by_twos.released, &singly.released);
        prop_assert_eq!(&by_twos.reported, &singly.reported);
        prop_assert_eq!(&by_twos.causes, &singly.causes);
        prop_assert_eq!(by_twos.path.stats(), singly.path.stats());
        prop_assert_eq!(by_twos.path.held_frames(), singly.path.held_frames());
        prop_assert_eq!(by_twos.path.flows(), singly.path.flows());
    }
    by_twos.close();
    singly.close();
    Ok(taken)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn by_twos_is_as_one_by_one(seed in 1u64..) {
        compare_lives(seed, 60)?;
    }
}

/// The property says something: many pairs are taken by twos.
#[test]
fn what_is_the_same_is_taken_by_twos() {
    let taken: usize = (1..50).map(|seed| compare_lives(seed, 60).unwrap()).sum();
    assert!(taken > 200, "{taken} pairs");
    let mut pair = Pair::new();
    for n in 0..10 {
        let frame = pair::data(Side::V4, 100 + 4 * n, b"data");
        // The first pair makes the flow known.
        assert_eq!(both(&mut pair, &frame, &frame), n > 0);
    }
    assert_eq!((pair.rights().len(), pair.path.held_frames()), (10, 0));
    // A retransmission with other bytes is noticed against what was kept.
    pair.pvm(&pair::data(Side::V4, 104, b"dAta"));
    assert_eq!((pair.rights().len(), pair.causes.len()), (0, 1));
    pair.close();
}
