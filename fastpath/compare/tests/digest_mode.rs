//! Digests of the SVM's output, one rule at a time: equal ones release, others are asked for, and what never comes is
//! a divergence at its deadline.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

use colo_compare::testing::{Segment, Side, VecFrames, digest_key, digested, udp};
use colo_compare::{
    Action, Cause, DigestKey, Divergence, Limits, PrimaryPath, Right, SecondaryAction,
    SecondaryPath,
};

const SIDES: [Side; 2] = [Side::V4, Side::V6];

/// A paired path that is given digests by hand.
struct Follower {
    frames: VecFrames,
    path: PrimaryPath,
    now_us: u64,
    epoch: u64,
}

impl Follower {
    fn new(key: Option<DigestKey>) -> Self {
        let mut frames = VecFrames::new(1000);
        let mut path = PrimaryPath::new(Limits::default());
        path.set_digest_key(key);
        let epoch = path.pair(0).unwrap();
        path.set_lease(0, &mut frames, u64::MAX);
        path.commit(0, &mut frames, epoch).unwrap();
        path.caught_up(0, epoch + 1);
        let _ = path.poll_action();
        Self {
            frames,
            path,
            now_us: 1000,
            epoch: epoch + 1,
        }
    }

    fn pvm(&mut self, frame: &[u8]) {
        let token = self.frames.insert(frame).unwrap();
        self.path
            .handle_guest_tx(self.now_us, &mut self.frames, token);
    }

    fn digest(&mut self, svm_seq: u64, frame: &[u8]) {
        let (headers, n, digest) = digested(frame, &digest_key()).unwrap();
        self.headers(svm_seq, headers, n, digest);
    }

    fn headers(&mut self, svm_seq: u64, headers: &[u8], n: u16, digest: u128) {
        let token = self.frames.insert(headers).unwrap();
        let (now_us, epoch) = (self.now_us, self.epoch);
        let frames = &mut self.frames;
        self.path
            .handle_svm_digest(now_us, frames, epoch, svm_seq, token, n, digest);
    }

    fn bytes(&mut self, svm_seq: u64, frame: &[u8]) {
        let token = self.frames.insert(frame).unwrap();
        let (now_us, epoch) = (self.now_us, self.epoch);
        self.path
            .handle_svm_output(now_us, &mut self.frames, epoch, svm_seq, token);
    }

    /// What the path wants, in order.
    fn wants(&mut self) -> Vec<Want> {
        let mut wants = Vec::new();
        while let Some(action) = self.path.poll_action() {
            wants.push(match action {
                Action::Release { token, right, .. } => {
                    Want::Release(self.frames.take(token), right)
                }
                Action::Fetch { svm_seq } => Want::Fetch(svm_seq),
                Action::SvmReleased { svm_seq } => Want::Report(svm_seq),
                Action::Checkpoint(divergence) => Want::Checkpoint(divergence),
                Action::PendingReleased { epoch } => Want::Pending(epoch),
                other => panic!("{other:?}"),
            });
        }
        wants
    }

    fn close(mut self) {
        self.wants();
        self.path.close(&mut self.frames);
        assert_eq!(self.frames.used(), 0, "a slot leaked");
    }
}

#[derive(Debug, PartialEq)]
enum Want {
    Release(Vec<u8>, Right),
    Fetch(u64),
    Report(u64),
    Checkpoint(Divergence),
    Pending(u64),
}
use Want::{Checkpoint, Fetch, Release, Report};

fn segment(side: Side, at: u32, payload: &[u8]) -> Vec<u8> {
    Segment::new(side)
        .seq(7000u32.wrapping_add(at))
        .ack(500)
        .payload(payload)
        .bytes()
}

fn matched(frame: &[u8]) -> Want {
    Release(frame.to_vec(), Right::Match)
}

/// Both guests' frames of one stream, and of one datagram.
fn plain(side: Side) -> [Vec<u8>; 2] {
    [
        segment(side, 0, &[7; 1000]),
        udp(side, false, 53, 5000, &[7; 1000]),
    ]
}

#[test]
fn an_equal_digest_releases_whoever_comes_first() {
    for frame in SIDES.into_iter().flat_map(plain) {
        for pvm_first in [true, false] {
            let mut follower = Follower::new(Some(digest_key()));
            if pvm_first {
                follower.pvm(&frame);
                follower.digest(1, &frame);
            } else {
                follower.digest(1, &frame);
                follower.pvm(&frame);
            }
            assert_eq!(follower.wants(), [matched(&frame), Report(1)]);
            follower.close();
        }
    }
}

#[test]
fn headers_are_compared_as_with_bytes() {
    let mut follower = Follower::new(Some(digest_key()));
    let segment = |ttl| Segment::new(Side::V4).seq(1).ttl(ttl).payload(&[1; 200]);
    follower.pvm(&segment(64).bytes());
    follower.digest(1, &segment(63).bytes());
    let wants = follower.wants();
    let [Checkpoint(divergence)] = &wants[..] else {
        panic!("{wants:?}")
    };
    assert_eq!((divergence.cause, divergence.offset), (Cause::Header, 22));
    follower.close();
}

#[test]
fn other_boundaries_are_fetched_once() {
    let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
    let side = Side::V4;
    let mut follower = Follower::new(Some(digest_key()));
    let (whole, first, second) = (
        segment(side, 0, &bytes),
        segment(side, 0, &bytes[..400]),
        segment(side, 400, &bytes[400..]),
    );
    follower.pvm(&first);
    follower.digest(1, &whole);
    assert_eq!(follower.wants(), [Fetch(1)]);
    follower.pvm(&second);
    assert_eq!(follower.wants(), [], "asked for already");
    follower.bytes(1, &whole);
    let all = [matched(&first), matched(&second), Report(1)];
    assert_eq!(follower.wants(), all);
    // A second answer is no output.
    follower.close();
    // The other way round both digests are within the segment: nothing is fetched.
    let mut follower = Follower::new(Some(digest_key()));
    follower.digest(1, &first);
    follower.digest(2, &second);
    follower.pvm(&whole);
    assert_eq!(follower.wants(), [matched(&whole), Report(1), Report(2)]);
    // What has left is kept, so that it can be compared however it is cut.
    follower.pvm(&segment(side, 300, &bytes[300..500]));
    assert!(matches!(follower.wants()[..], [Release(_, Right::Free)]));
    let mut other = bytes[300..500].to_vec();
    other[150] ^= 1;
    follower.pvm(&segment(side, 300, &other));
    let wants = follower.wants();
    let [Checkpoint(divergence)] = &wants[..] else {
        panic!("{wants:?}")
    };
    assert_eq!((divergence.cause, divergence.offset), (Cause::Payload, 150));
    follower.close();
}

#[test]
fn what_the_svm_may_have_said_otherwise_waits_for_the_bytes_though_its_digest_is_equal() {
    let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
    let side = Side::V4;
    for lies in [false, true] {
        let mut repeated = bytes[300..700].to_vec();
        repeated[100] ^= u8::from(lies);
        let (whole, repeated) = (
            segment(side, 0, &bytes[..600]),
            segment(side, 300, &repeated),
        );
        let mut follower = Follower::new(Some(digest_key()));
        follower.digest(1, &whole);
        follower.digest(2, &repeated);
        assert_eq!(follower.wants(), [Fetch(1), Fetch(2)], "cut otherwise");
        follower.pvm(&whole);
        assert_eq!(follower.wants(), []);
        follower.bytes(1, &whole);
        assert_eq!(follower.wants(), []);
        follower.bytes(2, &repeated);
        let wants = follower.wants();
        if lies {
            assert!(matches!(wants[..], [Checkpoint(_)]), "{wants:?}");
        } else {
            assert_eq!(wants, [matched(&whole), Report(1)]);
            // What has left waits for nothing.
            follower.digest(3, &segment(side, 650, &bytes[650..900]));
            assert_eq!(follower.wants(), [Fetch(3)]);
            follower.pvm(&segment(side, 100, &bytes[100..300]));
            assert!(matches!(follower.wants()[..], [Release(_, Right::Free)]));
        }
        follower.close();
    }
}

#[test]
fn bytes_that_differ_are_fetched_and_shown_and_never_released() {
    for (frame, payload_at) in [
        (plain(Side::V4)[0].clone(), 54),
        (plain(Side::V4)[1].clone(), 42),
    ] {
        let mut other = frame.clone();
        other[payload_at + 600] ^= 0x40;
        let mut follower = Follower::new(Some(digest_key()));
        follower.digest(1, &other);
        follower.pvm(&frame);
        assert_eq!(follower.wants(), [Fetch(1)]);
        follower.bytes(1, &other);
        follower.now_us += 2000;
        let now_us = follower.now_us;
        follower.path.handle_timeout(now_us, &mut follower.frames);
        let wants = follower.wants();
        let [Checkpoint(divergence)] = &wants[..] else {
            panic!("{wants:?}")
        };
        assert_eq!(divergence.cause, Cause::Payload);
        assert_eq!(divergence.primary.bytes()[0], 7);
        assert_eq!(divergence.secondary.bytes()[0], 7 ^ 0x40);
        follower.close();
    }
}

#[test]
fn what_is_never_answered_ends_in_a_divergence() {
    for frame in SIDES.into_iter().flat_map(plain) {
        let mut other = frame.clone();
        *other.last_mut().unwrap() ^= 1;
        let mut follower = Follower::new(Some(digest_key()));
        follower.pvm(&frame);
        follower.digest(1, &other);
        assert_eq!(follower.wants(), [Fetch(1)]);
        let limits = Limits::default();
        let due_us = follower.now_us + limits.compare_deadline_us;
        for now_us in [due_us - 1, due_us] {
            follower.path.handle_timeout(now_us, &mut follower.frames);
        }
        let wants = follower.wants();
        let [Checkpoint(divergence)] = &wants[..] else {
            panic!("{wants:?}")
        };
        assert_eq!(divergence.cause, Cause::Deadline);
        // The answer comes late: it changes nothing, and the commit lets the frame go.
        follower.bytes(1, &other);
        assert_eq!(follower.wants(), []);
        let epoch = follower.path.cut(due_us).unwrap();
        follower
            .path
            .commit(due_us, &mut follower.frames, epoch)
            .unwrap();
        let left = follower.path.poll_action();
        let Some(Action::Release { token, right, .. }) = left else {
            panic!("{left:?}")
        };
        assert_eq!(right, Right::Checkpoint);
        assert_eq!(follower.frames.take(token), frame);
        let _ = follower.path.poll_action();
        follower.close();
    }
}

#[test]
fn without_a_key_all_bytes_are_fetched() {
    for frame in SIDES.into_iter().flat_map(plain) {
        let mut follower = Follower::new(None);
        follower.pvm(&frame);
        follower.digest(1, &frame);
        assert_eq!(follower.wants(), [Fetch(1)]);
        follower.bytes(1, &frame);
        assert_eq!(follower.wants(), [matched(&frame), Report(1)]);
        follower.close();
    }
}

#[test]
fn a_digest_whose_headers_do_not_fit_is_fetched() {
    let frame = segment(Side::V4, 0, &[7; 300]);
    let (headers, n, digest) = digested(&frame, &digest_key()).unwrap();
    let reset = Segment::new(Side::V4).seq(1).flags(4).bytes();
    let misfits: [(&[u8], u16); 5] = [
        (headers, n - 1),
        (&headers[..50], n),
        (&headers[..3], n),
        (headers, u16::MAX),
        (&reset, 0),
    ];
    let mut follower = Follower::new(Some(digest_key()));
    follower.pvm(&frame);
    for (svm_seq, (headers, n)) in (1..).zip(misfits) {
        follower.headers(svm_seq, headers, n, digest);
        assert_eq!(follower.wants(), [Fetch(svm_seq)]);
    }
    assert_eq!(follower.path.stats().bad_digests, 5);
    // The bytes are output like any other.
    follower.bytes(1, &frame);
    assert_eq!(follower.wants(), [matched(&frame), Report(1)]);
    follower.close();
}

#[test]
fn a_secondary_sends_digests_of_what_is_large_and_plain_and_bytes_once_they_are_asked_for() {
    let mut frames = VecFrames::new(100);
    let mut path = SecondaryPath::new(Limits::default());
    path.set_digests(Some(digest_key()));
    let mut record = Vec::new();
    PrimaryPath::new(Limits::default()).export_client_xlate(&mut record);
    path.commit(0, &mut frames, 1, Vec::new(), &record).unwrap();
    let with_flags = |flags| {
        let segment = Segment::new(Side::V4).seq(9000).ack(1);
        segment.flags(flags).payload(&[1; 500]).bytes()
    };
    let large = [
        segment(Side::V4, 0, &[1; 128]),
        udp(Side::V6, false, 5, 5, &[2; 1400]),
    ];
    let small = [
        segment(Side::V4, 200, &[1; 127]),
        with_flags(0x11),
        with_flags(2),
    ];
    for frame in large.iter().chain(&small) {
        let token = frames.insert(frame).unwrap();
        path.handle_guest_tx(0, &mut frames, token);
    }
    let mut actions = Vec::new();
    while let Some(action) = path.poll_action() {
        actions.push(action);
    }
    actions.retain(|action| !matches!(action, SecondaryAction::CaughtUp { .. }));
    let of = |svm_seq: u64, frame: &[u8]| {
        let (headers, payload_len, digest) = digested(frame, &digest_key()).unwrap();
        SecondaryAction::SendDigest {
            epoch: 2,
            svm_seq,
            header_len: headers.len() as u16,
            payload_len,
            digest,
        }
    };
    let bytes = |svm_seq| SecondaryAction::SendOutput { epoch: 2, svm_seq };
    let expected = [
        of(1, &large[0]),
        of(2, &large[1]),
        bytes(3),
        bytes(4),
        bytes(5),
    ];
    assert_eq!(actions, expected);
    for _ in 0..2 {
        path.fetch(2);
    }
    path.fetch(3);
    path.handle_released(&mut frames, 1);
    path.fetch(1);
    path.fetch(99);
    assert_eq!(path.poll_action(), Some(bytes(2)));
    assert_eq!(path.poll_action(), None);
    let stats = path.stats();
    assert_eq!(
        (stats.digests, stats.fetched, stats.fetched_in_vain),
        (2, 1, 4)
    );
    // What is released before it is sent again is not sent.
    path.close(&mut frames);
    assert_eq!(frames.used(), 0);
}

/// What was announced is waited for, and would be reported never: a commit has to cover it.
#[test]
fn bytes_of_another_frame_than_was_announced_are_a_divergence() {
    let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
    let whole = segment(Side::V4, 0, &bytes);
    let others = [
        segment(Side::V4, 1, &bytes),
        segment(Side::V4, 0, &bytes[1..]),
        Segment::new(Side::V4)
            .ports(81, 9)
            .seq(7000)
            .payload(&bytes)
            .bytes(),
        udp(Side::V4, false, 53, 5000, &bytes),
        segment(Side::V6, 0, &bytes),
    ];
    for other in others {
        let mut follower = Follower::new(Some(digest_key()));
        let first = segment(Side::V4, 0, &bytes[..400]);
        follower.pvm(&first);
        follower.digest(1, &whole);
        assert_eq!(follower.wants(), [Fetch(1)]);
        follower.bytes(1, &other);
        let wants = follower.wants();
        let [Checkpoint(divergence)] = &wants[..] else {
            panic!("{wants:?}")
        };
        assert_eq!(divergence.cause, Cause::Header);
        assert_eq!(follower.path.stats().bad_digests, 1);
        // Nothing comes of what follows, until there is a commit.
        follower.bytes(1, &whole);
        assert!(
            !follower
                .wants()
                .iter()
                .any(|want| matches!(want, Release(..)))
        );
        let epoch = follower.path.cut(follower.now_us).unwrap();
        let now_us = follower.now_us;
        follower
            .path
            .commit(now_us, &mut follower.frames, epoch)
            .unwrap();
        let released = Release(first, Right::Checkpoint);
        assert!(follower.wants().contains(&released));
        follower.close();
    }
}
