//! The primary path alone, rule by rule: input and SVM output are given by hand.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

use colo_compare::testing::{Segment, Side, VecFrames, echo, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use colo_compare::{Action, Cause, Limits, Mode, PathError, PrimaryPath, Right};

const SIDES: [Side; 2] = [Side::V4, Side::V6];

/// A paired path; keeps what leaves, what is mirrored, reported and requested.
struct Pair {
    frames: VecFrames,
    path: PrimaryPath,
    now_us: u64,
    epoch: u64,
    svm_seq: u64,
    mirrored: Vec<(u64, u64)>,
    released: Vec<(Vec<u8>, Right)>,
    reported: Vec<u64>,
    causes: Vec<Cause>,
    pending_released: Vec<u64>,
}

impl Pair {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let mut pair = Self {
            frames: VecFrames::new(10_000),
            path: PrimaryPath::new(limits),
            now_us: 1000,
            epoch: 0,
            svm_seq: 0,
            mirrored: Vec::new(),
            released: Vec::new(),
            reported: Vec::new(),
            causes: Vec::new(),
            pending_released: Vec::new(),
        };
        let first = pair.path.pair(pair.now_us).unwrap();
        pair.lease(u64::MAX);
        pair.commit(first);
        pair.path.caught_up(pair.now_us, first + 1);
        pair.epoch = first + 1;
        pair.pending_released.clear();
        pair
    }

    fn lease(&mut self, until_us: u64) {
        self.path.set_lease(self.now_us, &mut self.frames, until_us);
        self.act();
    }

    fn commit(&mut self, epoch: u64) {
        self.path
            .commit(self.now_us, &mut self.frames, epoch)
            .unwrap();
        self.epoch = epoch + 1;
        self.act();
    }

    fn cut(&mut self) -> u64 {
        self.path.cut(self.now_us).unwrap()
    }

    fn input_unacked(&mut self, bytes: &[u8]) -> u64 {
        let token = self.frames.insert(bytes).unwrap();
        let token = self.path.handle_nic(self.now_us, &mut self.frames, token);
        self.path
            .handle_delivered(self.now_us, &mut self.frames, token);
        self.act();
        self.mirrored.last().map_or(0, |(_, input_seq)| *input_seq)
    }

    fn ack_input(&mut self, up_to: u64) {
        self.path
            .handle_input_ack(self.now_us, &mut self.frames, up_to);
        self.act();
    }

    fn input(&mut self, bytes: &[u8]) {
        let up_to = self.input_unacked(bytes);
        self.ack_input(up_to);
    }

    fn pvm(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).unwrap();
        self.path
            .handle_guest_tx(self.now_us, &mut self.frames, token);
        self.act();
    }

    fn svm_in(&mut self, epoch: u64, bytes: &[u8]) {
        self.svm_seq += 1;
        let token = self.frames.insert(bytes).unwrap();
        let (now_us, svm_seq) = (self.now_us, self.svm_seq);
        self.path
            .handle_svm_output(now_us, &mut self.frames, epoch, svm_seq, token);
        self.act();
    }

    fn svm(&mut self, bytes: &[u8]) {
        self.svm_in(self.epoch, bytes);
    }

    fn act(&mut self) {
        while let Some(action) = self.path.poll_action() {
            match action {
                Action::Release { token, right, .. } => {
                    let bytes = self.frames.take(token);
                    self.released.push((bytes, right));
                }
                Action::Mirror {
                    epoch,
                    input_seq,
                    token,
                } => {
                    self.frames.take(token);
                    self.mirrored.push((epoch, input_seq));
                }
                Action::SvmReleased { svm_seq } => self.reported.push(svm_seq),
                Action::PendingReleased { epoch } => self.pending_released.push(epoch),
                Action::Checkpoint(divergence) => self.causes.push(divergence.cause),
            }
        }
    }

    fn advance(&mut self, us: u64) {
        self.now_us += us;
        self.path.handle_timeout(self.now_us, &mut self.frames);
        self.act();
    }

    /// The rights by which frames have left since the last call.
    fn rights(&mut self) -> Vec<Right> {
        self.released.drain(..).map(|(_, right)| right).collect()
    }

    fn frames_out(&mut self) -> Vec<Vec<u8>> {
        self.released.drain(..).map(|(bytes, _)| bytes).collect()
    }

    fn close(self) {
        let mut frames = self.frames;
        self.path.close(&mut frames);
        assert_eq!(frames.used(), 0, "a slot leaked");
    }
}

fn data(side: Side, seq: u32, payload: &[u8]) -> Vec<u8> {
    Segment::new(side)
        .seq(seq)
        .ack(500)
        .payload(payload)
        .bytes()
}

#[test]
fn rule_4_input_is_numbered_and_gets_its_epoch_at_delivery() {
    let mut pair = Pair::new();
    let request = Segment::new(Side::V4).to_guest().payload(b"a").bytes();
    pair.input(&request);
    let epoch = pair.cut();
    pair.input(&request);
    pair.commit(epoch);
    pair.input(&request);
    assert_eq!(pair.mirrored, [(epoch, 1), (epoch + 1, 2), (epoch + 1, 3)]);
    pair.close();
}

#[test]
fn rule_5_nothing_acknowledges_input_that_the_secondary_does_not_keep() {
    for side in SIDES {
        let mut pair = Pair::new();
        pair.input(&Segment::new(side).to_guest().ports(80, 50_000).bytes());
        let up_to = pair.input_unacked(&Segment::new(side).to_guest().payload(b"req").bytes());
        // Another flow is not concerned.
        let other = Segment::new(side).ports(80, 50_000).seq(1).bytes();
        pair.pvm(&other);
        assert_eq!(pair.rights(), [Right::Free]);
        pair.pvm(&Segment::new(side).seq(10).ack(503).bytes());
        pair.pvm(&data(side, 10, b"reply"));
        pair.svm(&data(side, 10, b"reply"));
        assert_eq!(
            pair.rights(),
            [],
            "neither the pure ACK nor the matched reply"
        );
        pair.ack_input(up_to);
        assert_eq!(pair.rights(), [Right::Free, Right::Match]);
        pair.close();
    }
}

#[test]
fn rule_5_a_datagram_waits_for_all_input() {
    let mut pair = Pair::new();
    let up_to = pair.input_unacked(&udp(Side::V4, true, 7, 9000, b"ping"));
    pair.pvm(&udp(Side::V4, false, 8, 9001, b"other"));
    pair.svm(&udp(Side::V4, false, 8, 9001, b"other"));
    assert_eq!(pair.rights(), []);
    pair.ack_input(up_to);
    assert_eq!(pair.rights(), [Right::Match]);
    pair.close();
}

#[test]
fn rule_6_a_missing_input_ack_has_its_own_longer_deadline() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    pair.input_unacked(&Segment::new(Side::V4).to_guest().payload(b"req").bytes());
    pair.pvm(&data(Side::V4, 10, b"reply"));
    pair.svm(&data(Side::V4, 10, b"reply"));
    pair.advance(limits.compare_deadline_us + 1);
    assert_eq!(pair.causes, []);
    assert_eq!(
        pair.path.next_deadline(),
        Some(1000 + limits.ack_deadline_us)
    );
    pair.advance(limits.ack_deadline_us);
    assert_eq!(pair.causes, [Cause::AckDeadline]);
    pair.close();
}

#[test]
fn rule_7_epochs_are_never_compared_with_each_other() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"old"));
    let epoch = pair.cut();
    pair.pvm(&data(Side::V4, 13, b"new"));
    // Output of the old epoch still releases output of the old epoch, and only that.
    pair.svm_in(epoch, &data(Side::V4, 10, b"oldnew"));
    assert_eq!(pair.rights(), [Right::Match]);
    assert_eq!(pair.path.held_frames(), 1);
    assert_eq!(
        pair.path.cut(pair.now_us),
        Err(PathError::CheckpointInFlight { epoch })
    );
    // Output of the new epoch may come before the commit is known here.
    pair.svm_in(epoch + 1, &data(Side::V4, 13, b"new"));
    assert_eq!(pair.rights(), []);
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Match]);
    // What is late is not compared.
    pair.pvm(&data(Side::V4, 16, b"x"));
    pair.svm_in(epoch, &data(Side::V4, 16, b"x"));
    assert_eq!((pair.rights().len(), pair.path.stats().svm_stale), (0, 1));
    pair.close();
}

#[test]
fn rule_8_below_the_base_everything_is_covered() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V6, u32::MAX - 1, b"abcd"));
    let epoch = pair.cut();
    assert_eq!(pair.path.pending().count(), 1);
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Checkpoint]);
    assert_eq!(pair.pending_released, [epoch]);
    // A retransmission of it needs nothing; what goes beyond needs the SVM.
    pair.pvm(&data(Side::V6, u32::MAX - 1, b"abcd"));
    assert_eq!(pair.rights(), [Right::Free]);
    pair.pvm(&data(Side::V6, u32::MAX, b"bcde"));
    assert_eq!(pair.rights(), []);
    pair.svm(&data(Side::V6, 2, b"e"));
    assert_eq!(pair.rights(), [Right::Match]);
    pair.close();
}

#[test]
fn rule_9_deadlines_start_when_the_svm_has_caught_up() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    let epoch = pair.cut();
    pair.commit(epoch);
    pair.pvm(&data(Side::V4, 10, b"late"));
    pair.advance(limits.compare_deadline_us * 2);
    assert_eq!(pair.causes, []);
    pair.path.caught_up(pair.now_us, epoch);
    assert_eq!(
        pair.path.next_deadline(),
        Some(1000 + limits.lag_deadline_us),
        "an old epoch"
    );
    pair.path.caught_up(pair.now_us, epoch + 1);
    pair.advance(limits.compare_deadline_us - 1);
    assert_eq!(pair.causes, []);
    pair.advance(1);
    assert_eq!(pair.causes, [Cause::Deadline]);
    pair.close();

    let mut pair = Pair::new();
    let epoch = pair.cut();
    pair.commit(epoch);
    pair.pvm(&data(Side::V4, 10, b"never"));
    pair.advance(limits.lag_deadline_us);
    assert_eq!(pair.causes, [Cause::Lag]);
    pair.close();
}

#[test]
fn rule_9_the_svm_may_catch_up_before_its_commit_is_known_here() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    let epoch = pair.cut();
    pair.path.caught_up(pair.now_us, epoch + 1);
    pair.commit(epoch);
    pair.pvm(&data(Side::V4, 10, b"late"));
    pair.advance(limits.compare_deadline_us);
    assert_eq!(pair.causes, [Cause::Deadline]);
    pair.close();
}

#[test]
fn rule_9_svm_output_is_reported_when_released_and_not_when_judged() {
    let mut pair = Pair::new();
    pair.svm(&data(Side::V4, 10, b"abc"));
    pair.svm(&data(Side::V4, 13, b"def"));
    pair.pvm(&data(Side::V4, 10, b"ab"));
    assert_eq!(
        (pair.rights(), pair.reported.clone()),
        (vec![Right::Match], vec![])
    );
    pair.path.mute();
    pair.pvm(&data(Side::V4, 12, b"cdef"));
    assert_eq!((pair.rights(), pair.reported.clone()), (vec![], vec![]));
    pair.path.unmute(pair.now_us, &mut pair.frames);
    pair.act();
    assert_eq!(
        (pair.rights(), pair.reported.clone()),
        (vec![Right::Match], vec![1, 2])
    );
    pair.close();
}

#[test]
fn rule_14_after_an_abort_the_next_commit_covers_both_epochs() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"one"));
    let epoch = pair.cut();
    pair.pvm(&udp(Side::V4, false, 7, 9000, b"two"));
    let deferred = Segment::new(Side::V6).seq(900).payload(b"deferred").bytes();
    pair.pvm(&deferred);
    pair.path
        .abort(pair.now_us, &mut pair.frames, epoch)
        .unwrap();
    pair.act();
    assert_eq!(pair.causes, [Cause::Aborted]);
    pair.svm_in(epoch, &data(Side::V4, 10, b"one"));
    pair.svm_in(epoch, &udp(Side::V4, false, 7, 9000, b"two"));
    pair.svm_in(epoch + 1, &udp(Side::V4, false, 7, 9000, b"two"));
    pair.svm_in(epoch + 1, &data(Side::V4, 13, b"three"));
    pair.advance(10_000_000);
    assert_eq!(
        (pair.rights().len(), pair.causes.len()),
        (0, 1),
        "held, without deadlines"
    );
    assert_eq!(pair.path.next_deadline(), None);
    let again = pair.cut();
    assert_eq!(again, epoch + 1);
    pair.pvm(&data(Side::V4, 13, b"three"));
    assert_eq!(pair.path.pending().count(), 3);
    let wrong = pair.path.commit(pair.now_us, &mut pair.frames, epoch);
    assert_eq!(
        wrong,
        Err(PathError::WrongEpoch {
            expected: again,
            found: epoch
        })
    );
    pair.commit(again);
    assert_eq!(pair.rights(), [Right::Checkpoint; 3]);
    pair.pvm(&deferred);
    assert_eq!(pair.rights(), [Right::Free], "the base covers it (rule 8)");
    pair.svm(&data(Side::V4, 13, b"three"));
    assert_eq!(pair.rights(), [Right::Match]);
    let none = pair.path.commit(pair.now_us, &mut pair.frames, again);
    assert_eq!(none, Err(PathError::NoCheckpoint { epoch: again }));
    pair.close();
}

#[test]
fn rule_14_requests_are_coalesced_until_the_commit() {
    let mut pair = Pair::new();
    for port in [40_000, 40_002] {
        let segment = Segment::new(Side::V4).ports(80, port).seq(1);
        pair.pvm(&segment.clone().payload(b"a").bytes());
        pair.svm(&segment.payload(b"b").bytes());
    }
    assert_eq!(pair.causes, [Cause::Payload]);
    assert_eq!(pair.path.stats().divergences[Cause::Payload.index()], 2);
    let epoch = pair.cut();
    pair.pvm(&udp(Side::V4, false, 7, 9000, b"x"));
    pair.commit(epoch);
    pair.path.caught_up(pair.now_us, epoch + 1);
    pair.advance(1_000_000);
    assert_eq!(pair.causes, [Cause::Payload, Cause::Deadline]);
    pair.close();
}

#[test]
fn rule_18_without_a_fresh_heartbeat_only_the_secondarys_word_releases() {
    let mut pair = Pair::new();
    pair.lease(pair.now_us + 10);
    pair.now_us += 11;
    pair.pvm(&Segment::new(Side::V4).seq(10).bytes());
    pair.pvm(&data(Side::V4, 10, b"abc"));
    pair.svm(&data(Side::V4, 10, b"abc"));
    assert_eq!(
        pair.rights(),
        [],
        "the pure ACK waits, and order within the flow is kept"
    );
    pair.pvm(&udp(Side::V6, false, 7, 9000, b"matched"));
    pair.svm(&udp(Side::V6, false, 7, 9000, b"matched"));
    assert_eq!(pair.rights(), [Right::Match]);
    pair.advance(1_000_000);
    assert_eq!(pair.causes, [], "a missing heartbeat is not a divergence");
    pair.lease(pair.now_us);
    assert_eq!(pair.rights(), [Right::Free, Right::Match]);
    // Where the lease is never fresh, a checkpoint lets it leave.
    pair.now_us += 1;
    pair.pvm(&Segment::new(Side::V4).seq(13).bytes());
    pair.advance(10_000_000);
    assert_eq!(pair.causes, [Cause::AckDeadline]);
    let epoch = pair.cut();
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Checkpoint]);
    pair.close();
}

#[test]
fn a_commit_releases_in_production_order_over_all_flows() {
    let mut pair = Pair::new();
    let frames: Vec<_> = (0..20u16)
        .map(|n| match n % 3 {
            0 => udp(Side::V4, false, 7, 9000 + n % 2, &n.to_be_bytes()),
            1 => Segment::new(Side::V6)
                .seq(u32::from(n))
                .payload(b"x")
                .bytes(),
            _ => echo(Side::V6, false, n, b"pong"),
        })
        .collect();
    frames.iter().for_each(|bytes| pair.pvm(bytes));
    let epoch = pair.cut();
    let order: Vec<_> = pair
        .path
        .pending()
        .map(|p| pair.frames.bytes(p.token).to_vec())
        .collect();
    assert_eq!(order, frames);
    pair.commit(epoch);
    assert_eq!(pair.frames_out(), frames);
    pair.close();
}

#[test]
fn going_alone_releases_everything_in_order_and_stops_mirroring() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"one"));
    pair.cut();
    pair.pvm(&data(Side::V4, 13, b"two"));
    pair.path.mute();
    let token = pair
        .frames
        .insert(&udp(Side::V4, true, 7, 9000, b"in"))
        .unwrap();
    pair.path
        .handle_delivered(pair.now_us, &mut pair.frames, token);
    pair.path.go_alone(pair.now_us, &mut pair.frames);
    pair.pvm(&data(Side::V4, 16, b"three"));
    assert_eq!(pair.mirrored, []);
    assert_eq!(pair.path.mode(), Mode::Alone);
    let expected = [(10, "one"), (13, "two"), (16, "three")];
    let expected: Vec<_> = expected
        .iter()
        .map(|(s, d)| data(Side::V4, *s, d.as_bytes()))
        .collect();
    assert_eq!(pair.frames_out(), expected);
    pair.close();
}

#[test]
fn mute_lets_nothing_out_not_even_alone() {
    let mut frames = VecFrames::new(10);
    let mut path = PrimaryPath::new(Limits::default());
    path.mute();
    let token = frames.insert(&data(Side::V4, 1, b"x")).unwrap();
    path.handle_guest_tx(0, &mut frames, token);
    assert_eq!(
        (path.poll_action(), path.mode(), path.held_frames()),
        (None, Mode::Mute, 1)
    );
    path.unmute(5, &mut frames);
    let Some(Action::Release {
        token,
        right: Right::Alone,
        held_us: 5,
    }) = path.poll_action()
    else {
        panic!("not released")
    };
    frames.take(token);
    path.close(&mut frames);
    assert_eq!(frames.used(), 0);
}

#[test]
fn rule_2_a_guest_opened_flow_from_another_port_is_found_at_once() {
    let udp_from = |port| udp(Side::V4, false, port, 53, b"query");
    let syn_from = |port| {
        Segment::new(Side::V6)
            .ports(port, 443)
            .flags(SYN)
            .seq(9)
            .bytes()
    };
    for (pvm, svm) in [
        (udp_from(1000), udp_from(2000)),
        (syn_from(1000), syn_from(2000)),
    ] {
        for pvm_first in [true, false] {
            let mut pair = Pair::new();
            if pvm_first {
                pair.pvm(&pvm);
                pair.svm(&svm);
            } else {
                pair.svm(&svm);
                pair.pvm(&pvm);
            }
            assert_eq!(pair.causes, [Cause::OutboundTuple]);
            assert_eq!(pair.path.held_frames(), 1);
            pair.close();
        }
        let mut pair = Pair::new();
        pair.pvm(&pvm);
        pair.svm(&pvm);
        assert_eq!((pair.causes.len(), pair.rights()), (0, vec![Right::Match]));
        pair.close();
    }
}

#[test]
fn syn_ack_is_compared_by_flags_and_binding_options() {
    let syn_ack = |options: &[u8], seq| {
        Segment::new(Side::V4)
            .flags(SYN | ACK)
            .seq(seq)
            .ack(8)
            .option(options)
            .bytes()
    };
    let mss = [2, 4, 5, 0xb4];
    let mss_scale = [2, 4, 5, 0xb4, 1, 3, 3, 7];
    let scale_mss = [3, 3, 7, 1, 2, 4, 5, 0xb4];
    let verdict = |a: &[u8], b: &[u8]| {
        let mut pair = Pair::new();
        pair.pvm(&syn_ack(a, 77));
        pair.svm(&syn_ack(b, 99));
        let out = (pair.rights(), pair.causes.clone());
        pair.close();
        out
    };
    assert_eq!(
        verdict(&mss_scale, &scale_mss),
        (vec![Right::Match], vec![])
    );
    assert_eq!(verdict(&mss, &mss_scale), (vec![], vec![Cause::SynOptions]));
    assert_eq!(
        verdict(&mss, &[2, 4, 5, 0xb5]),
        (vec![], vec![Cause::SynOptions])
    );
    assert_eq!(verdict(&mss, &[]), (vec![], vec![Cause::SynOptions]));
}

#[test]
fn a_reset_needs_a_reset() {
    let reset = Segment::new(Side::V4)
        .flags(RST | ACK)
        .seq(10)
        .ack(5)
        .bytes();
    let mut pair = Pair::new();
    pair.pvm(&reset);
    assert_eq!(pair.rights(), []);
    pair.svm(&reset);
    assert_eq!(
        (pair.rights(), pair.reported.len()),
        (vec![Right::Match], 1)
    );
    // One side alone.
    pair.pvm(&reset);
    pair.advance(Limits::default().compare_deadline_us);
    assert_eq!(pair.causes, [Cause::Deadline]);
    pair.close();
    let mut pair = Pair::new();
    pair.svm(&reset);
    pair.advance(Limits::default().extra_deadline_us);
    assert_eq!(pair.causes, [Cause::Flags]);
    pair.close();
}

#[test]
fn streams_of_different_length_differ() {
    let fin = Segment::new(Side::V6).flags(FIN | ACK);
    let mut pair = Pair::new();
    pair.svm(&fin.clone().seq(10).payload(b"ab").bytes());
    pair.pvm(&data(Side::V6, 10, b"abc"));
    assert_eq!(
        (pair.rights().len(), pair.causes.clone()),
        (0, vec![Cause::Length])
    );
    pair.close();
    let mut pair = Pair::new();
    pair.svm(&data(Side::V6, 10, b"abc"));
    pair.pvm(&fin.seq(10).payload(b"ab").bytes());
    assert_eq!(
        (pair.rights().len(), pair.causes.clone()),
        (0, vec![Cause::Length])
    );
    pair.close();
}

#[test]
fn a_new_connection_between_the_same_ports_starts_afresh() {
    let mut pair = Pair::new();
    let syn = |seq| {
        Segment::new(Side::V4)
            .to_guest()
            .flags(SYN)
            .seq(seq)
            .bytes()
    };
    let syn_ack = |seq| {
        Segment::new(Side::V4)
            .flags(SYN | ACK)
            .seq(seq)
            .ack(8)
            .bytes()
    };
    pair.input(&syn(7));
    pair.pvm(&syn_ack(1000));
    pair.svm(&syn_ack(2000));
    pair.pvm(&data(Side::V4, 1001, b"abc"));
    pair.svm(&data(Side::V4, 1001, b"abc"));
    assert_eq!(pair.rights(), [Right::Match; 2]);
    pair.input(&syn(70_000));
    // The SVM is ahead; its numbers lie below and within those of the old connection.
    pair.svm(&syn_ack(777));
    pair.svm(&data(Side::V4, 1002, b"xyz"));
    pair.pvm(&data(Side::V4, 1001, b"abc"));
    pair.pvm(&syn_ack(1001));
    pair.pvm(&data(Side::V4, 1002, b"xyz"));
    assert_eq!(pair.rights(), [Right::Free, Right::Match, Right::Match]);
    assert_eq!((pair.causes.len(), pair.path.held_frames()), (0, 0));
    pair.close();
}

#[test]
fn header_fields_count_unless_they_may_rightly_differ() {
    let verdict = |a: &[u8], b: &[u8]| {
        let mut pair = Pair::new();
        pair.pvm(a);
        pair.svm(b);
        pair.advance(Limits::default().compare_deadline_us);
        let out = (pair.rights().len(), pair.causes.first().copied());
        pair.close();
        out
    };
    for side in SIDES {
        let tcp = Segment::new(side).seq(5).payload(b"x");
        assert_eq!(
            verdict(&tcp.bytes(), &tcp.clone().id(99).bytes()),
            (1, None)
        );
        let ttl = tcp.clone().ttl(63).bytes();
        assert_eq!(verdict(&tcp.bytes(), &ttl), (0, Some(Cause::Header)));
        let stamped = |t| tcp.clone().timestamps(t, t + 1).bytes();
        assert_eq!(verdict(&stamped(1), &stamped(2)), (1, None));
        let message = |ttl, id| ip_frame(side, false, 132, ttl, id, b"sctp or so");
        assert_eq!(verdict(&message(64, 1), &message(64, 2)), (1, None));
        assert_eq!(
            verdict(&message(64, 1), &message(63, 1)),
            (0, Some(Cause::Header))
        );
    }
}

#[test]
fn datagrams_match_within_a_reorder_window_and_leave_in_the_pvms_order() {
    for side in SIDES {
        let mut pair = Pair::new();
        let message = |n: u8| udp(side, false, 7, 9000, &[n]);
        [0, 1, 2].iter().for_each(|n| pair.pvm(&message(*n)));
        [2, 0].iter().for_each(|n| pair.svm(&message(*n)));
        assert_eq!(pair.frames_out(), [message(0)]);
        pair.svm(&message(1));
        assert_eq!(pair.frames_out(), [message(1), message(2)]);
        assert_eq!(pair.reported, [2, 3, 1]);
        assert_eq!((pair.causes.len(), pair.path.held_frames()), (0, 0));
        // Equal ones are used once.
        pair.pvm(&message(5));
        pair.pvm(&message(5));
        pair.svm(&message(5));
        assert_eq!(pair.frames_out().len(), 1);
        pair.close();
    }
}

#[test]
fn a_datagram_that_differs_is_a_divergence_before_its_deadline() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    pair.pvm(&echo(Side::V6, false, 1, b"abc"));
    pair.svm(&echo(Side::V6, false, 1, b"abd"));
    pair.advance(limits.settle_us);
    assert_eq!(pair.causes, [Cause::Payload]);
    pair.close();
    let mut pair = Pair::new();
    pair.pvm(&udp(Side::V4, false, 7, 9000, b"abc"));
    pair.svm(&udp(Side::V4, false, 7, 9000, b"ab"));
    pair.advance(limits.settle_us);
    assert_eq!(pair.causes, [Cause::Length]);
    pair.close();
    // A full window on both sides needs no time.
    let mut pair = Pair::new();
    for n in 0..limits.reorder_window as u8 {
        pair.pvm(&udp(Side::V4, false, 7, 9000, &[n]));
        pair.svm(&udp(Side::V4, false, 7, 9000, &[n + 100]));
    }
    assert_eq!(pair.causes, [Cause::Payload]);
    pair.close();
}

#[test]
fn surplus_svm_output_is_a_divergence_unless_it_resolves_addresses() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    let mut arp = vec![0xff; 12];
    arp.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.resize(60, 1);
    pair.svm(&arp);
    pair.advance(limits.extra_deadline_us);
    assert_eq!((pair.causes.len(), pair.path.stats().svm_surplus), (0, 1));
    pair.svm(&udp(Side::V4, false, 7, 9000, b"alone"));
    pair.advance(limits.extra_deadline_us);
    assert_eq!(pair.causes, [Cause::Extra]);
    pair.close();
}

#[test]
fn fragments_and_unknown_frames_are_compared_whole() {
    let mut fragment = ip_frame(Side::V4, false, 17, 64, 7, &[3; 40]);
    fragment[20] = 0x20;
    let mut other = fragment.clone();
    other[18] = 0xaa; // Identification.
    let mut pair = Pair::new();
    pair.pvm(&fragment);
    pair.svm(&other);
    assert_eq!(pair.rights(), [Right::Match]);
    let unknown = [[0x22; 12].to_vec(), vec![0x88, 0xb5, 1, 2, 3]].concat();
    pair.pvm(&unknown);
    pair.svm(&unknown);
    assert_eq!(pair.rights(), [Right::Match]);
    pair.pvm(&[1, 2, 3]);
    pair.advance(Limits::default().compare_deadline_us);
    assert_eq!(pair.causes, [Cause::Unparseable]);
    pair.close();
}

#[test]
fn limits_give_back_pressure_and_a_checkpoint_and_drop_nothing() {
    let mut pair = Pair::with(Limits {
        max_held_frames: 3,
        ..Limits::default()
    });
    for n in 0..4 {
        assert_eq!(pair.path.room(), n < 3);
        pair.pvm(&udp(Side::V4, false, 7, 9000, &[n]));
    }
    assert_eq!(pair.causes, [Cause::HoldFull]);
    let epoch = pair.cut();
    pair.commit(epoch);
    assert_eq!((pair.rights().len(), pair.path.room()), (4, true));
    pair.close();

    let mut pair = Pair::with(Limits {
        max_flows: 2,
        ..Limits::default()
    });
    for port in 0..3 {
        pair.pvm(&udp(Side::V4, false, port, 9000 + port, b"x"));
    }
    assert_eq!(pair.causes, [Cause::TableFull]);
    let epoch = pair.cut();
    assert_eq!(pair.path.pending().count(), 3);
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Checkpoint; 3]);
    pair.pvm(&udp(Side::V4, false, 9, 9009, b"x"));
    pair.svm(&udp(Side::V4, false, 9, 9009, b"x"));
    assert_eq!(
        (pair.rights(), pair.path.stats().flows_evicted),
        (vec![Right::Match], 1)
    );
    pair.close();

    let mut pair = Pair::with(Limits {
        max_svm_frames: 2,
        ..Limits::default()
    });
    for n in 0..3 {
        pair.svm(&udp(Side::V4, false, 7, 9000, &[n]));
    }
    assert_eq!(pair.causes, [Cause::OutputOverflow]);
    assert_eq!(
        (pair.path.stats().svm_overflow, pair.reported.len()),
        (1, 0)
    );
    pair.close();

    let mut pair = Pair::with(Limits {
        max_unacked_inputs: 2,
        ..Limits::default()
    });
    let request = udp(Side::V4, true, 7, 9000, b"x");
    pair.input_unacked(&request);
    assert!(pair.path.nic_room());
    let up_to = pair.input_unacked(&request);
    assert!(!pair.path.nic_room());
    pair.ack_input(up_to + 1);
    assert!(
        !pair.path.nic_room(),
        "an acknowledgement of what was never sent is ignored"
    );
    pair.ack_input(up_to);
    assert!(pair.path.nic_room());
    pair.close();
}

#[test]
fn history_above_its_limit_makes_retransmissions_wait_and_nothing_worse() {
    let mut pair = Pair::with(Limits {
        max_history_bytes: 4,
        ..Limits::default()
    });
    for n in 0..3u32 {
        pair.pvm(&data(Side::V4, 10 + 3 * n, b"abc"));
        pair.svm(&data(Side::V4, 10 + 3 * n, b"abc"));
    }
    assert_eq!(
        (pair.rights(), pair.path.stats().history_dropped),
        (vec![Right::Match; 3], 2)
    );
    pair.pvm(&data(Side::V4, 16, b"abc"));
    assert_eq!(pair.rights(), [Right::Free]);
    pair.pvm(&data(Side::V4, 10, b"abc"));
    assert_eq!(pair.rights(), []);
    pair.advance(Limits::default().compare_deadline_us);
    assert_eq!(pair.causes, [Cause::Deadline]);
    pair.close();
}

#[test]
fn a_client_cannot_acknowledge_what_has_not_left() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"abc"));
    pair.svm(&data(Side::V4, 10, b"abc"));
    pair.input(&Segment::new(Side::V4).to_guest().ack(1000).bytes());
    pair.pvm(&data(Side::V4, 13, b"secret"));
    assert_eq!(pair.rights(), [Right::Match]);
    pair.close();
}

#[test]
fn an_svm_that_contradicts_itself_is_a_divergence() {
    let mut pair = Pair::new();
    pair.svm(&data(Side::V4, 10, b"abcdef"));
    pair.svm(&data(Side::V4, 12, b"cdxf"));
    assert_eq!(pair.causes, [Cause::Payload]);
    pair.pvm(&data(Side::V4, 10, b"abcdef"));
    assert_eq!(pair.rights(), []);
    pair.close();
}

#[test]
fn the_canary_releases_what_differs() {
    let mut pair = Pair::with(Limits {
        canary_equal: true,
        ..Limits::default()
    });
    pair.pvm(&data(Side::V4, 10, b"abc"));
    pair.svm(&data(Side::V4, 10, b"xyz"));
    assert_eq!(
        (pair.rights(), pair.reported.clone()),
        (vec![Right::Match], vec![1])
    );
    pair.close();
}

#[test]
fn a_divergence_shows_where_and_what() {
    let mut pair = Pair::new();
    let segment = |payload: &[u8]| data(Side::V6, 10, payload);
    let token = pair.frames.insert(&segment(b"hello world")).unwrap();
    pair.path
        .handle_guest_tx(pair.now_us, &mut pair.frames, token);
    let token = pair.frames.insert(&segment(b"hello there")).unwrap();
    pair.path
        .handle_svm_output(pair.now_us, &mut pair.frames, pair.epoch, 1, token);
    let Some(Action::Checkpoint(divergence)) = pair.path.poll_action() else {
        panic!("no request")
    };
    assert_eq!((divergence.cause, divergence.offset), (Cause::Payload, 6));
    assert_eq!(
        (divergence.primary.bytes(), divergence.secondary.bytes()),
        (&b"world"[..], &b"there"[..])
    );
    let flow = divergence.flow.expect("a flow");
    assert_eq!((flow.guest_port, flow.peer_port), (80, 40_000));
    pair.close();
}

#[test]
fn a_new_vm_is_announced_by_its_mac_address_alone() {
    let mut path = PrimaryPath::new(Limits::default());
    let mut out = [0; colo_compare::ANNOUNCEMENT_MAX];
    assert_eq!(path.poll_announcement(0, &mut out), None);
    path.set_guest_mac([2, 0, 0, 0, 0, 9]);
    assert_eq!(path.poll_announcement(0, &mut out), Some(60));
    assert_eq!(
        out[..14],
        [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 0x80, 0x35]
    );
    assert_eq!(path.poll_announcement(0, &mut out), None);
    // In a pair it needs a fresh heartbeat (rule 18).
    path.pair(0).unwrap();
    assert_eq!(path.pair(0), Err(PathError::AlreadyPaired { epoch: 2 }));
    path.announce();
    assert_eq!(path.poll_announcement(0, &mut out), None);
    path.set_lease(0, &mut VecFrames::new(0), 5);
    assert_eq!(path.poll_announcement(5, &mut out), Some(60));
}
