//! Frames of both guests that are the same, in the same order: they leave by twos, before either is taken.
//!
//! Invariants: a frame that leaves has been copied into host memory first, and those bytes were compared with the
//! other guest's, so neither guest can change what leaves (rule 10, invariant 7). With `tx = "in-place"` only the
//! header of a long datagram is copied: the payload leaves from the guest's buffer under a checksum of what was
//! compared, computed in the same pass. Two frames that take more than a look stay in their queues, and nothing is
//! concluded from what was read of them.
//!
//! Does not wait for counterparts, and does not send.

use std::ops::Range;

use colo_compare::wire::checksum::OnesSum;
use colo_compare::{Frames, HEADER_MAX, Pairs, Passed, Token};

use crate::frame::{Buffer, FramePool, IN_PLACE_MIN, TxMode};
use crate::worker::{FRONT_FRAMES, Front, Shown};

/// Of the SVM's frame so much is read into host memory: Ethernet, IPv4, and TCP with all its options.
const HEAD_BYTES: usize = 128;
const _: () = assert!(HEAD_BYTES <= HEADER_MAX && HEADER_MAX < IN_PLACE_MIN);
/// Where an IPv4 packet without VLAN tags names its protocol.
const PROTOCOL_AT: usize = 23;
const UDP: u8 = 17;

/// Why no more left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// All that was shown of one guest has left, or there is no slot, or no room in place.
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
        let both = [&one, &other];
        let stays = frames.tx() == TxMode::InPlace && one.len() >= IN_PLACE_MIN;
        if stays && passed > 0 && frames.descriptors_in_place() >= pvm.in_place_max() {
            // When these have left, there is room.
            break;
        }
        let token = match stays {
            false => pass_one(frames, pairs, both, svm_seq),
            true if frames.descriptors_in_place() >= pvm.in_place_max() => None,
            true => keep_one(frames, pairs, both, pvm.buffer_of(&one)),
        };
        let Some(token) = token else {
            end = End::Neither;
            break;
        };
        out.push(token);
        match stays {
            false => pvm.pass(&one),
            true => pvm.keep(&one),
        }
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
    if svm.len() != len || !pvm.is_complete() || !svm.is_complete() {
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

/// Compares two datagrams where they lie, but for the PVM's header, which is copied. Segments are for who takes them
/// singly: what they are compared with later has to be copied anyway.
#[inline(always)]
fn keep_one(
    frames: &mut FramePool,
    pairs: &mut Pairs<'_>,
    [pvm, svm]: [&Shown<'_>; 2],
    buffer: Buffer,
) -> Option<Token> {
    let len = pvm.len();
    if svm.len() != len || !pvm.is_complete() || !svm.is_complete() {
        return None;
    }
    let mut head = [0; HEAD_BYTES];
    svm.copy_to(&mut head);
    let mut bound = None;
    let token = frames.keep_in_place(buffer, &[pvm.behind(HEADER_MAX)], |slot| {
        let ours = &mut slot[..HEADER_MAX];
        pvm.copy_to(ours);
        let ours = &*ours;
        if ours[PROTOCOL_AT] != UDP {
            return None;
        }
        let equal = |range: Range<usize>| {
            let at = range.start;
            let binds = range.end == len && FramePool::can_bind(ours, len, at);
            if !binds || !is_equal(ours, &head, svm, at..HEADER_MAX) {
                return false;
            }
            // The header is copied to its end at an even place, or the checksum would not bind.
            bound = pvm.equal_and_sum(HEADER_MAX, svm).map(|rest| {
                let mut sum = OnesSum::default();
                sum.add(&ours[at..]);
                sum.add_sum(rest, len - HEADER_MAX);
                (at, sum.word())
            });
            bound.is_some()
        };
        let passed = pairs.take_by((ours, len), (&head, len), equal);
        matches!(passed, Passed::Both).then_some(HEADER_MAX)
    })?;
    if let Some((at, sum)) = bound {
        frames.bind(&token, at, sum);
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
