//! Epochs that are buffered instead of compared (Remus mode, rule 21).
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

use colo_compare::testing::{Segment, Side, VecFrames, udp};
use colo_compare::wire::tcp::ACK;
use colo_compare::{Action, Cause, Limits, PrimaryPath, Right};

/// Frames that left, with the right to it.
type Left = Vec<(Vec<u8>, Right)>;

struct Bench {
    path: PrimaryPath,
    frames: VecFrames,
    svm_seq: u64,
}

fn answer(n: u8) -> Vec<u8> {
    udp(Side::V4, false, 7, 4000, &[n; 20])
}

impl Bench {
    /// In a pair, in epoch 2.
    fn new(limits: Limits, buffering: bool) -> Self {
        let mut frames = VecFrames::new(1000);
        let mut path = PrimaryPath::new(limits);
        let first = path.pair(0).unwrap();
        path.buffer(buffering);
        path.commit(1, &mut frames, first).unwrap();
        path.set_lease(1, &mut frames, u64::MAX);
        let svm_seq = 0;
        let mut bench = Self {
            path,
            frames,
            svm_seq,
        };
        bench.actions();
        bench
    }

    fn pvm(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).unwrap();
        self.path.handle_guest_tx(10, &mut self.frames, token);
    }

    fn svm(&mut self, bytes: &[u8]) {
        self.svm_seq += 1;
        let token = self.frames.insert(bytes).unwrap();
        let epoch = self.path.epoch();
        let (path, frames) = (&mut self.path, &mut self.frames);
        path.handle_svm_output(10, frames, epoch, self.svm_seq, token);
    }

    fn input(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).unwrap();
        let token = self.path.handle_nic(10, &mut self.frames, token);
        self.path.handle_delivered(10, &mut self.frames, token);
    }

    fn cut(&mut self, buffering: bool) -> u64 {
        let epoch = self.path.cut(20).unwrap();
        self.path.buffer(buffering);
        epoch
    }

    fn commit(&mut self, epoch: u64) -> Left {
        self.path.commit(30, &mut self.frames, epoch).unwrap();
        self.actions().0
    }

    /// What leaves, how many are mirrored, and causes of checkpoints.
    fn actions(&mut self) -> (Left, usize, Vec<Cause>) {
        let mut all = (Vec::new(), 0, Vec::new());
        while let Some(action) = self.path.poll_action() {
            match action {
                Action::Release { token, right, .. } => {
                    all.0.push((self.frames.take(token), right));
                }
                Action::Mirror { token, .. } => {
                    self.frames.take(token);
                    all.1 += 1;
                }
                Action::Checkpoint(divergence) => all.2.push(divergence.cause),
                _ => {}
            }
        }
        all
    }

    fn close(mut self) {
        self.path.close(&mut self.frames);
        assert_eq!(self.frames.used(), 0);
    }
}

#[test]
fn rule_21_buffered_output_waits_for_its_commit_whatever_the_svm_says() {
    let mut b = Bench::new(Limits::default(), true);
    let ack = Segment::new(Side::V4).flags(ACK).seq(5).ack(9).bytes();
    for bytes in [answer(1), ack.clone(), answer(2)] {
        b.svm(&bytes);
        b.pvm(&bytes);
    }
    assert_eq!(b.path.next_deadline(), None, "nothing is late");
    b.path.handle_timeout(u64::MAX / 2, &mut b.frames);
    assert_eq!(b.actions(), (vec![], 0, vec![]));
    let epoch = b.cut(true);
    b.pvm(&answer(3));
    let left = [answer(1), ack, answer(2)].map(|bytes| (bytes, Right::Checkpoint));
    assert_eq!(b.commit(epoch), left);
    let epoch = b.cut(true);
    assert_eq!(b.commit(epoch), [(answer(3), Right::Checkpoint)]);
    b.close();
}

#[test]
fn rule_21_input_of_a_buffered_epoch_is_not_mirrored_and_numbers_go_on_behind_it() {
    let mut b = Bench::new(Limits::default(), true);
    let request = udp(Side::V4, true, 7, 4000, b"?");
    b.input(&request);
    assert_eq!(b.actions().1, 0);
    let epoch = b.cut(false);
    b.input(&request);
    assert_eq!(b.actions().1, 1, "that of the next epoch is");
    b.commit(epoch);
    b.path.handle_input_ack(40, &mut b.frames, 1);
    b.pvm(&answer(1));
    b.svm(&answer(1));
    assert_eq!(b.actions().0, [(answer(1), Right::Match)]);
    b.close();
}

#[test]
fn rule_21_the_epoch_before_is_compared_while_its_checkpoint_travels() {
    let mut b = Bench::new(Limits::default(), false);
    b.pvm(&answer(1));
    b.pvm(&answer(2));
    let epoch = b.cut(true);
    b.pvm(&answer(3));
    let token = b.frames.insert(&answer(1)).unwrap();
    let (path, frames) = (&mut b.path, &mut b.frames);
    path.handle_svm_output(21, frames, epoch, 1, token);
    assert_eq!(b.actions().0, [(answer(1), Right::Match)]);
    assert_eq!(b.commit(epoch), [(answer(2), Right::Checkpoint)]);
    b.svm(&answer(3));
    assert_eq!(b.actions().0, []);
    assert!(b.path.is_buffering());
    b.close();
}

#[test]
fn rule_14_an_aborted_buffered_epoch_leaves_with_the_next_commit() {
    for next in [false, true] {
        let mut b = Bench::new(Limits::default(), true);
        b.pvm(&answer(1));
        let epoch = b.cut(!next);
        b.pvm(&answer(2));
        b.path.abort(22, &mut b.frames, epoch).unwrap();
        assert_eq!(b.actions(), (vec![], 0, vec![Cause::Aborted]));
        let epoch = b.cut(next);
        b.pvm(&answer(3));
        let left = [answer(1), answer(2)].map(|bytes| (bytes, Right::Checkpoint));
        assert_eq!(b.commit(epoch), left);
        b.svm(&answer(3));
        assert_eq!(b.actions().0.len(), usize::from(!next));
        b.close();
    }
}

#[test]
fn rule_14_a_full_hold_queue_asks_for_the_next_checkpoint_at_once() {
    let limits = Limits {
        max_held_frames: 2,
        ..Limits::default()
    };
    let mut b = Bench::new(limits, true);
    b.pvm(&answer(1));
    assert_eq!(b.actions().2, []);
    b.pvm(&answer(2));
    assert!(!b.path.room());
    assert_eq!(b.actions().2, [Cause::HoldFull]);
    let epoch = b.cut(true);
    b.commit(epoch);
    assert!(b.path.room());
    b.close();
}

#[test]
fn rule_18_who_goes_alone_releases_what_was_buffered_and_buffers_no_more() {
    let mut b = Bench::new(Limits::default(), true);
    b.pvm(&answer(1));
    b.path.go_alone(40, &mut b.frames);
    b.pvm(&answer(2));
    let left = [answer(1), answer(2)].map(|bytes| (bytes, Right::Alone));
    assert_eq!(b.actions().0, left);
    b.close();
}
