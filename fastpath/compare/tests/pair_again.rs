//! A host that may not speak alone (rule 19) holds its output from the loss of one secondary to the
//! commit of the next one.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

use colo_compare::testing::{Side, VecFrames, udp};
use colo_compare::{Action, Limits, PathError, PrimaryPath, Right};

fn produce(path: &mut PrimaryPath, frames: &mut VecFrames, bytes: &[u8]) {
    let token = frames.insert(bytes).unwrap();
    path.handle_guest_tx(10, frames, token);
}

fn released(path: &mut PrimaryPath, frames: &mut VecFrames) -> Vec<(Vec<u8>, Right)> {
    let mut out = Vec::new();
    while let Some(action) = path.poll_action() {
        if let Action::Release { token, right, .. } = action {
            out.push((frames.take(token), right));
        }
    }
    out
}

fn answer(n: u8) -> Vec<u8> {
    udp(Side::V4, false, 7, 4000, &[n; 20])
}

#[test]
fn rule_19_output_held_since_the_loss_leaves_with_the_next_commit_in_order() {
    for abort in [false, true] {
        let mut frames = VecFrames::new(100);
        let mut path = PrimaryPath::new(Limits::default());
        let first = path.pair_again(0, &mut frames).unwrap();
        path.commit(1, &mut frames, first).unwrap();
        produce(&mut path, &mut frames, &answer(1));
        if abort {
            let cut = path.cut(2).unwrap();
            assert_eq!(
                path.pair_again(2, &mut frames),
                Err(PathError::CheckpointInFlight { epoch: cut })
            );
            path.abort(3, &mut frames, cut).unwrap();
        } else {
            // What the lost secondary said must not release anything afterwards.
            let token = frames.insert(&answer(2)).unwrap();
            path.handle_svm_output(3, &mut frames, path.epoch(), 1, token);
        }
        let epoch = path.pair_again(4, &mut frames).unwrap();
        produce(&mut path, &mut frames, &answer(2));
        assert_eq!(released(&mut path, &mut frames), []);
        assert_eq!(path.pending().count(), 1);
        path.commit(5, &mut frames, epoch).unwrap();
        let left = released(&mut path, &mut frames);
        assert_eq!(left, [(answer(1), Right::Checkpoint)], "abort: {abort}");
        assert_eq!(path.held_frames(), 1);
        path.close(&mut frames);
        assert_eq!(frames.used(), 0);
    }
}

#[test]
fn rule_4_a_cut_that_another_shard_could_not_make_is_taken_back() {
    let mut frames = VecFrames::new(100);
    let mut path = PrimaryPath::new(Limits::default());
    let first = path.pair_again(0, &mut frames).unwrap();
    path.commit(1, &mut frames, first).unwrap();
    let epoch = path.epoch();
    produce(&mut path, &mut frames, &answer(1));
    let cut = path.cut(2).unwrap();
    assert_eq!(
        path.uncut(cut + 1).unwrap_err(),
        PathError::WrongEpoch {
            expected: cut,
            found: cut + 1
        }
    );
    path.uncut(cut).unwrap();
    assert_eq!((cut, path.epoch()), (epoch, epoch));
    // The epoch goes on: its output is compared as if nothing had been.
    let token = frames.insert(&answer(1)).unwrap();
    path.handle_svm_output(3, &mut frames, epoch, 1, token);
    let left = released(&mut path, &mut frames);
    assert_eq!(left, [(answer(1), Right::Match)]);
    assert_eq!(path.cut(4), Ok(epoch));
    path.close(&mut frames);
}
