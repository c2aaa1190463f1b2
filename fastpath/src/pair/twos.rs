//! Frames of both guests that are the same, in the same order: they leave by twos, before either is taken.
//!
//! Invariants: a frame that leaves has been copied into host memory first, and those bytes were compared with the
//! other guest's, so neither guest can change what leaves (rule 10, invariant 7); two frames that take more than a
//! look stay in their queues, and nothing is concluded from what was read of them.
//!
//! Does not wait for counterparts, and does not send.

use std::ops::Range;

use colo_compare::{Frames, HEADER_MAX, Pairs, Passed, Token};

use crate::frame::{FramePool, IN_PLACE_MIN, TxMode};
use crate::worker::{FRONT_FRAMES, Front, Shown};

/// Of the SVM's frame so much is read into host memory: Ethernet, IPv4, and TCP with all its options.
const HEAD_BYTES: usize = 128;
const _: () = assert!(HEAD_BYTES <= HEADER_MAX);

/// Why no more left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// All that was shown of one guest has left, or there is no slot.
    NoneLeft,
    /// The frames at the front are not for this.
    Neither,
}

/// Lets frames leave into `out`, in order, as long as both guests have sent the same. `svm_seq`: the number of
/// the SVM's last frame. Gives how many.
#[inline]
pub(super) fn pass(
    frames: &mut FramePool,
    pairs: &mut Pairs<'_>,
    guests: &mut [Front<'_>; 2],
    mut svm_seq: u64,
    out: &mut Vec<Token>,
) -> (usize, End) {
    let [pvm, svm] = guests;
    let most = FRONT_FRAMES.min(frames.free_slots() / 2);
    let (mut passed, mut end) = (0, End::NoneLeft);
    while passed < most
        && let (Some(one), Some(other)) = (pvm.next(), svm.next())
    {
        svm_seq += 1;
        let Some(token) = pass_one(frames, pairs, [&one, &other], svm_seq) else {
            end = End::Neither;
            break;
        };
        out.push(token);
        pvm.pass(&one);
        svm.pass(&other);
        passed += 1;
    }
    pvm.count_copied();
    (passed, end)
}

/// Compares two frames, and copies the PVM's if both are the same.
#[inline(always)]
fn pass_one(
    frames: &mut FramePool,
    pairs: &mut Pairs<'_>,
    [pvm, svm]: [&Shown<'_>; 2],
    svm_seq: u64,
) -> Option<Token> {
    let len = pvm.len();
    // What leaves in place is compared where the frames are taken.
    let stays = frames.tx() == TxMode::InPlace && len >= IN_PLACE_MIN;
    if stays || svm.len() != len || !pvm.is_complete() || !svm.is_complete() {
        return None;
    }
    let mut head = [0; HEAD_BYTES];
    let head = &mut head[..len.min(HEAD_BYTES)];
    svm.copy_to(head);
    let mut passed = Passed::Neither;
    let token = frames.fill(|slot| {
        let ours = &mut slot[..len];
        pvm.copy_to(ours);
        let ours = &*ours;
        let equal = |range: Range<usize>| is_equal(ours, head, svm, range);
        let header = &ours[..len.min(HEADER_MAX)];
        passed = pairs.take_by((header, len), (head, len), equal);
        (!matches!(passed, Passed::Neither)).then_some(len)
    })?;
    if let Passed::BothAndKeep(history) = passed
        && let Some(kept) = frames.duplicate(&token)
    {
        // The payloads are the same, the headers need not be.
        frames.header_mut(&kept)[..head.len()].copy_from_slice(head);
        pairs.keep(frames, history, svm_seq, kept);
    }
    Some(token)
}

/// Whether the SVM's frame, which begins with `head`, has the same bytes in a range.
#[inline(always)]
fn is_equal(ours: &[u8], head: &[u8], svm: &Shown<'_>, range: Range<usize>) -> bool {
    let begin = range.start.min(head.len());
    let middle = range.end.min(head.len()).max(begin);
    let front = ours[begin..middle] == head[begin..middle];
    let (from, end) = (range.start.max(middle), range.end.max(middle));
    front && (from == end || svm.equals(from, &ours[from..end]))
}
