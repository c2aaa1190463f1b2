//! A flow that sends more in one epoch than sequence numbers can tell apart.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod pair;

use colo_compare::testing::Side;
use pair::{Pair, data};

/// Steps of a quarter of the sequence space, with nothing between: what is marked at the beginning lies
/// behind, then ahead, then behind again.
const STEP: u32 = 1 << 30;

fn after(n: u32) -> u32 {
    1000u32.wrapping_add(n.wrapping_mul(STEP - 4))
}

/// A flow whose first segment a commit covers, and of which the client has acknowledged the second.
fn committed_and_acknowledged() -> Pair {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 996, b"once"));
    let epoch = pair.cut();
    pair.commit(epoch);
    pair.path.caught_up(pair.now_us, epoch + 1);
    let frame = data(Side::V4, 1000, b"more");
    pair.pvm(&frame);
    pair.svm(&frame);
    let ack = colo_compare::testing::Segment::new(Side::V4).to_guest();
    pair.input(&ack.seq(500).ack(1004).bytes());
    pair.released.clear();
    pair
}

/// Output commit holds for byte 2^31 of an epoch as for the first: nothing leaves that the SVM has not sent.
#[test]
fn nothing_counts_as_covered_because_numbers_have_wrapped() {
    for is_pvm_first in [true, false] {
        let mut pair = committed_and_acknowledged();
        for n in 1..9 {
            let ours = data(Side::V4, after(n), b"same");
            if is_pvm_first {
                pair.pvm(&ours);
                assert_eq!(pair.rights(), [], "step {n}: the SVM has sent nothing");
                pair.svm(&ours);
            } else {
                pair.svm(&ours);
                pair.pvm(&ours);
            }
            assert_eq!(pair.rights().len(), 1, "step {n}: both have sent it");
        }
        pair.pvm(&data(Side::V4, after(9), b"same"));
        pair.svm(&data(Side::V4, after(9), b"sAme"));
        assert_eq!((pair.rights().len(), pair.causes.len()), (0, 1));
        pair.close();
    }
}

/// Half of all numbers lie behind any mark. What is further behind than a window is nothing that a commit or
/// an acknowledgement has covered.
#[test]
fn nothing_counts_as_covered_that_is_further_behind_than_a_window() {
    for jump in [1 << 31, (1 << 31) + (1 << 20), (3 << 30) - 9] {
        let mut pair = committed_and_acknowledged();
        let frame = data(Side::V4, 1004u32.wrapping_add(jump), b"made up");
        pair.pvm(&frame);
        assert_eq!(pair.rights(), [], "the SVM has sent nothing");
        pair.svm(&frame);
        assert_eq!((pair.rights().len(), pair.causes.len()), (1, 0));
        pair.close();
    }
    let mut pair = committed_and_acknowledged();
    pair.pvm(&data(Side::V4, 1004u32.wrapping_sub(1 << 29), b"old"));
    assert_eq!(pair.rights().len(), 1, "acknowledged long ago");
    pair.close();
}
