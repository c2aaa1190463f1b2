//! Rules about when anything may leave at all, in random lives: the ACK rule in every branch,
//! epochs, aborts, and that every frame leaves exactly once.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod dice;
mod pair;

use std::collections::BTreeMap;

use colo_compare::Right;
use colo_compare::testing::{Segment, Side, udp};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use dice::{Dice, limits, tagged};
use pair::Pair;
use proptest::prelude::*;

/// A guest's end of a connection that is open: everything that it sends acknowledges all input.
struct Conversation {
    side: Side,
    tags: usize,
    isn: u32,
    sent: u32,
    received: u32,
}

impl Conversation {
    fn segment(&self) -> Segment {
        Segment::new(self.side).ack(1000 + self.received)
    }

    fn place(&self) -> u32 {
        self.isn.wrapping_add(1).wrapping_add(self.sent)
    }

    /// One of the segments that both guests send, and whether the SVM's must come for it.
    fn output(&mut self, dice: &mut Dice) -> (Vec<u8>, bool) {
        let data = vec![dice.below(256) as u8; 1 + dice.below(40)];
        let at = self.place();
        let segment = self.segment().seq(at);
        let (segment, is_compared) = match dice.below(6) {
            0 => (segment, false),
            // A window update, and a probe of a byte that was sent already.
            1 => (segment.seq(at.wrapping_sub(1)), false),
            2 => (segment.flags(SYN | ACK).seq(self.isn), false),
            _ => {
                self.sent += data.len() as u32;
                (segment.payload(&data), true)
            }
        };
        (tagged(&segment.bytes(), self.tags), is_compared)
    }

    /// A request of the client, which acknowledges nothing.
    fn input(&mut self) -> Vec<u8> {
        let at = 1000 + self.received;
        self.received += 5;
        let request = Segment::new(self.side).to_guest().flags(0).seq(at);
        tagged(&request.payload(b"hello").bytes(), self.tags)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn rule_4_nothing_that_acknowledges_input_leaves_before_it_is_kept(seed in 1u64..) {
        let mut dice = Dice(seed);
        let mut pair = Pair::with(limits());
        let (side, tags) = (dice.side(), dice.below(3));
        let isn = [u32::MAX - 30, 0x7fff_ffc0, 5][dice.below(3)];
        let mut talk = Conversation { side, tags, isn, sent: 0, received: 0 };
        // Handshake, so that a repeated SYN-ACK is one.
        let syn = Segment::new(side).to_guest().flags(SYN).seq(999).bytes();
        pair.input(&tagged(&syn, tags));
        let answer = Segment::new(side).flags(SYN | ACK).seq(isn).ack(1000).bytes();
        pair.pvm(&tagged(&answer, tags));
        pair.svm(&tagged(&answer, tags));
        prop_assert_eq!(pair.frames_out().len(), 1);
        // Number of the input that each frame acknowledges.
        let (mut given, mut kept) = (1, 1);
        let mut waiting = std::collections::VecDeque::new();
        for _ in 0..80 {
            match dice.below(5) {
                0 => given = pair.input_unacked(&talk.input()),
                1 => {
                    kept += dice.below((given - kept) as usize + 1) as u64;
                    pair.ack_input(kept);
                }
                2 if dice.chance(30) => {
                    // Another flow is answered as soon as all input is kept.
                    let datagram = udp(side, false, 53, 5000, &[dice.below(256) as u8]);
                    pair.svm(&datagram);
                    pair.pvm(&datagram);
                    let left = pair.released.iter().any(|(bytes, _)| *bytes == datagram);
                    prop_assert!(!left || kept >= given, "a datagram left");
                }
                _ => {
                    let (output, is_compared) = talk.output(&mut dice);
                    waiting.push_back((output.clone(), given));
                    if is_compared && dice.chance(50) {
                        pair.svm(&output);
                        pair.pvm(&output);
                    } else {
                        pair.pvm(&output);
                        pair.svm(&output);
                    }
                }
            }
            for frame in pair.frames_out() {
                let is_it = waiting.front().is_some_and(|(bytes, _)| *bytes == frame);
                if is_it {
                    let (_, acknowledges) = waiting.pop_front().unwrap();
                    prop_assert!(acknowledges <= kept, "{acknowledges} is not kept, {kept} is");
                }
            }
        }
        // An idle connection is not stalled: everything leaves once all is kept.
        pair.ack_input(given);
        let rest = pair.frames_out();
        prop_assert_eq!(pair.path.held_frames(), 0);
        prop_assert!(waiting.iter().all(|(bytes, _)| rest.contains(bytes)));
        prop_assert!(pair.causes.is_empty(), "{:?}", pair.causes);
        pair.close();
    }

    #[test]
    fn rule_4_closing_segments_wait_too(seed in 1u64..) {
        let mut dice = Dice(seed);
        let mut pair = Pair::with(limits());
        let side = dice.side();
        let segment = Segment::new(side).seq(50).ack(1005);
        let closing = match dice.below(3) {
            0 => segment.flags(FIN | ACK),
            1 => segment.flags(RST | ACK),
            _ => segment.flags(FIN | ACK).payload(b"bye"),
        };
        let request = Segment::new(side).to_guest().flags(0).seq(1000).payload(b"hello");
        let given = pair.input_unacked(&request.bytes());
        let frame = closing.bytes();
        if dice.chance(50) {
            pair.svm(&frame);
            pair.pvm(&frame);
        } else {
            pair.pvm(&frame);
            pair.svm(&frame);
        }
        prop_assert!(pair.released.is_empty());
        pair.ack_input(given);
        prop_assert_eq!(pair.frames_out(), vec![frame]);
        pair.close();
    }

    #[test]
    fn rule_7_epochs_are_not_mixed_and_every_frame_leaves_once(seed in 1u64..) {
        let mut dice = Dice(seed);
        let mut pair = Pair::with(limits());
        let side = dice.side();
        let mut life = Life { epoch: pair.epoch, ..Life::default() };
        let mut in_flight = None;
        for _ in 0..150 {
            match dice.below(12) {
                0 if in_flight.is_none() => {
                    let epoch = pair.cut();
                    prop_assert_eq!(epoch, life.epoch);
                    life.epoch += 1;
                    in_flight = Some(epoch);
                }
                1 => if let Some(epoch) = in_flight.take() {
                    life.committed = epoch;
                    pair.commit(epoch);
                    life.frozen = false;
                },
                2 if dice.chance(30) => if let Some(epoch) = in_flight.take() {
                    pair.path.abort(pair.now_us, &mut pair.frames, epoch).unwrap();
                    pair.act();
                    life.frozen = true;
                },
                3 => pair.advance(dice.below(30_000) as u64),
                4..=7 => {
                    let frame = life.frame(&mut dice, side);
                    life.sent.push((frame.clone(), life.epoch));
                    pair.pvm(&frame);
                }
                _ => {
                    // The SVM of this epoch, of the one before, or of the one after.
                    let epoch = (pair.epoch + dice.below(3) as u64).saturating_sub(1);
                    let frame = life.frame(&mut dice, side);
                    pair.svm_in(epoch, &frame);
                    *life.said.entry((frame, epoch)).or_default() += 1;
                }
            }
            life.check(&mut pair)?;
        }
        // Two commits later nothing is left.
        for _ in 0..2 {
            let epoch = in_flight.take().unwrap_or_else(|| {
                life.epoch += 1;
                pair.cut()
            });
            life.committed = epoch;
            pair.commit(epoch);
            life.check(&mut pair)?;
        }
        prop_assert!(life.sent.is_empty(), "{} frames were lost", life.sent.len());
        prop_assert_eq!(pair.path.held_frames(), 0);
        pair.close();
    }
}

/// What both guests have sent.
#[derive(Default)]
struct Life {
    epoch: u64,
    committed: u64,
    frozen: bool,
    /// Frames of the PVM that have not left, with their epoch.
    sent: Vec<(Vec<u8>, u64)>,
    said: BTreeMap<(Vec<u8>, u64), usize>,
}

impl Life {
    /// Of few, so that those of different epochs look alike.
    fn frame(&self, dice: &mut Dice, side: Side) -> Vec<u8> {
        udp(
            side,
            false,
            53,
            5000 + dice.below(2) as u16,
            &[dice.below(3) as u8],
        )
    }

    fn check(&mut self, pair: &mut Pair) -> Result<(), TestCaseError> {
        let comparing = pair.epoch;
        for (bytes, right) in pair.released.drain(..) {
            // The oldest of those that look the same.
            let at = self.sent.iter().position(|(sent, _)| *sent == bytes);
            prop_assert!(at.is_some(), "it left twice");
            let (_, epoch) = self.sent.remove(at.unwrap());
            match right {
                Right::Checkpoint => prop_assert!(epoch <= self.committed),
                Right::Match => {
                    prop_assert!(epoch == comparing && !self.frozen);
                    let said = self.said.get_mut(&(bytes, epoch)).filter(|said| **said > 0);
                    prop_assert!(said.is_some(), "the SVM did not say it in epoch {epoch}");
                    *said.unwrap() -= 1;
                }
                other => prop_assert!(false, "by {other:?}"),
            }
        }
        Ok(())
    }
}
