//! Clauses of the rules that can be lost while all else goes on: what a commit gives back, what rests while a checkpoint is
//! under way, what a takeover owes to the guest.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod pair;
mod rig;

use colo_compare::testing::{Segment, Side, VecFrames, udp};
use colo_compare::wire::tcp::{ACK, RST, SYN};
use colo_compare::{
    Action, Cause, Limits, PrimaryPath, Right, SecondaryAction, SecondaryPath, Token,
};
use pair::{Pair, data};
use rig::Rig;

/// Later than anything is delivered again.
const LATER_US: u64 = 60_000_000;

fn answer(n: u8) -> Vec<u8> {
    udp(Side::V4, false, 7, 9000, &[n; 20])
}

fn request(payload: &[u8]) -> Vec<u8> {
    let segment = Segment::new(Side::V4).to_guest().seq(100).ack(50);
    segment.payload(payload).bytes()
}

// ---- the primary ----

#[test]
fn rule_7_what_the_svm_sent_in_an_epoch_is_given_back_with_its_end() {
    for aborted in [false, true] {
        let mut pair = Pair::new();
        pair.svm(&data(Side::V4, 10, b"unmatched"));
        pair.svm(&answer(1));
        assert!(pair.frames.used() > 0, "kept, as the PVM may send it yet");
        let epoch = pair.cut();
        if aborted {
            let (now_us, frames) = (pair.now_us, &mut pair.frames);
            pair.path.abort(now_us, frames, epoch).unwrap();
            pair.act();
        } else {
            pair.commit(epoch);
        }
        assert_eq!(pair.frames.used(), 0, "aborted: {aborted}");
        pair.close();
    }
}

#[test]
fn rule_7_nothing_is_late_while_a_checkpoint_is_in_flight() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"slow"));
    pair.pvm(&answer(1));
    let epoch = pair.cut();
    pair.advance(LATER_US);
    // Its own epoch's output still releases it.
    pair.svm_in(epoch, &data(Side::V4, 10, b"slow"));
    pair.svm_in(epoch, &answer(1));
    assert_eq!(pair.rights(), [Right::Match; 2]);
    assert_eq!(pair.path.stats().divergences.iter().sum::<u64>(), 0);
    pair.close();
}

#[test]
fn rule_9_output_that_only_the_svm_has_sent_is_late_when_it_has_caught_up_and_not_before() {
    let limits = Limits::default();
    let mut pair = Pair::new();
    let epoch = pair.cut();
    pair.commit(epoch);
    let accepts = Segment::new(Side::V4).flags(SYN | ACK).seq(9);
    pair.svm(&accepts.bytes());
    pair.advance(2 * limits.compare_deadline_us);
    assert_eq!(pair.causes, [], "the PVM's is further on in the backlog");
    pair.path.caught_up(pair.now_us, epoch + 1);
    pair.advance(limits.compare_deadline_us - 1);
    assert_eq!(pair.causes, []);
    pair.advance(1);
    assert_eq!(pair.causes, [Cause::Flags]);
    pair.close();
}

#[test]
fn rule_14_a_divergence_of_the_epoch_that_is_captured_asks_for_no_other_checkpoint() {
    let mut pair = Pair::new();
    pair.pvm(&data(Side::V4, 10, b"one"));
    let epoch = pair.cut();
    pair.svm_in(epoch, &data(Side::V4, 10, b"two"));
    assert_eq!(pair.path.stats().divergences[Cause::Payload.index()], 1);
    assert_eq!(pair.causes, [], "the one in flight covers it");
    pair.commit(epoch);
    assert_eq!(
        (pair.rights(), pair.causes.len()),
        (vec![Right::Checkpoint], 0)
    );
    pair.close();
}

#[test]
fn rule_18_a_match_releases_nothing_while_the_path_is_mute() {
    let stream = |side| data(side, 10, b"equal");
    for frame in [stream(Side::V4), stream(Side::V6), answer(1)] {
        let mut pair = Pair::new();
        pair.pvm(&frame);
        pair.path.mute();
        pair.svm(&frame);
        assert_eq!((pair.rights(), pair.reported.clone()), (vec![], vec![]));
        pair.path.unmute(pair.now_us, &mut pair.frames);
        pair.act();
        let left = (pair.rights(), pair.reported.clone());
        assert_eq!(left, (vec![Right::Match], vec![1]));
        pair.close();
    }
}

/// The lost secondary had sent the same, but not that it keeps the input; nor does what the next one keeps count for it.
#[test]
fn rule_19_what_the_lost_secondary_sent_releases_nothing_when_the_next_one_keeps_input() {
    let mut pair = Pair::new();
    let asks = Segment::new(Side::V4).to_guest();
    pair.input_unacked(&asks.clone().payload(b"req").bytes());
    pair.pvm(&data(Side::V4, 10, b"reply"));
    pair.svm(&data(Side::V4, 10, b"reply"));
    let epoch = pair.path.pair_again(pair.now_us, &mut pair.frames).unwrap();
    pair.input(&asks.seq(3).bytes());
    assert_eq!(pair.rights(), []);
    pair.commit(epoch);
    assert_eq!(pair.rights(), [Right::Checkpoint]);
    pair.close();
}

#[test]
fn rule_5_input_that_a_lost_secondary_did_not_keep_is_no_debt_of_the_next_one() {
    let mut pair = Pair::with(Limits {
        max_unacked_inputs: 1,
        ..Limits::default()
    });
    pair.input_unacked(&request(b"req"));
    assert!(!pair.path.nic_room());
    pair.path.go_alone(pair.now_us, &mut pair.frames);
    let epoch = pair.path.pair(pair.now_us).unwrap();
    pair.commit(epoch);
    assert!(pair.path.nic_room());
    pair.pvm(&answer(1));
    pair.svm(&answer(1));
    assert_eq!(pair.rights(), [Right::Match]);
    pair.close();
}

#[test]
fn rule_1_a_handshake_learnt_behind_a_cut_is_in_no_commit_before_the_next() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    rig.network_up = false;
    rig.open(42_002);
    let answers = std::mem::take(&mut rig.nic);
    rig.kill_primary();
    rig.join();
    // The client's first ACK comes when the record of this checkpoint is written.
    let snapshot = rig.begin_checkpoint();
    rig.nic.extend(answers);
    rig.network_up = true;
    rig.settle();
    rig.finish_checkpoint(snapshot);
    rig.send(42_002, b"held");
    assert_eq!(rig.clients[&42_002].received, b"");
    assert_eq!(rig.requests.len(), 1, "a commit must carry what was learnt");
    rig.checkpoint();
    rig.assert_all_echoed();
    rig.close();
}

// ---- the secondary, and what it takes over ----

/// After its first commit, in epoch 2.
struct Heir {
    frames: VecFrames,
    path: SecondaryPath,
    input_seq: u64,
}

impl Heir {
    fn new() -> Self {
        let (frames, path) = (VecFrames::new(100), SecondaryPath::new(Limits::default()));
        let mut heir = Self {
            frames,
            path,
            input_seq: 0,
        };
        heir.commit(1, &[]);
        assert_eq!(heir.actions(), [SecondaryAction::CaughtUp { epoch: 2 }]);
        heir
    }

    fn commit(&mut self, epoch: u64, pending: &[Vec<u8>]) {
        let mut record = Vec::new();
        PrimaryPath::new(Limits::default()).export_client_xlate(&mut record);
        let pending = pending.iter().map(|p| self.frames.insert(p).unwrap());
        let pending: Vec<Token> = pending.collect();
        let (path, frames) = (&mut self.path, &mut self.frames);
        path.commit(0, frames, epoch, pending, &record).unwrap();
    }

    fn mirror(&mut self, epoch: u64, bytes: &[u8]) {
        self.input_seq += 1;
        let token = self.frames.insert(bytes).unwrap();
        let (path, frames) = (&mut self.path, &mut self.frames);
        path.handle_mirror(0, frames, epoch, self.input_seq, token)
            .unwrap();
    }

    fn poll_deliver(&mut self) -> Option<Token> {
        self.path.poll_deliver(0, &mut self.frames)
    }

    fn actions(&mut self) -> Vec<SecondaryAction> {
        std::iter::from_fn(|| self.path.poll_action()).collect()
    }

    fn take_over(mut self) -> Alone {
        let path = self.path.take_over(0, &mut self.frames);
        let frames = self.frames;
        Alone { frames, path }
    }
}

/// What a secondary has become.
struct Alone {
    frames: VecFrames,
    path: PrimaryPath,
}

impl Alone {
    /// Gives the guest what is due, which it gets.
    fn deliver(&mut self, now_us: u64) -> Option<Vec<u8>> {
        let token = self.path.poll_deliver(now_us, &mut self.frames)?;
        let bytes = self.frames.bytes(&token).to_vec();
        self.path.handle_delivered(now_us, &mut self.frames, token);
        Some(bytes)
    }

    fn guest_sends(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).unwrap();
        self.path.handle_guest_tx(0, &mut self.frames, token);
        self.released();
    }

    fn released(&mut self) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        while let Some(action) = self.path.poll_action() {
            if let Action::Release { token, .. } = action {
                out.push(self.frames.take(token));
            }
        }
        out
    }

    fn close(mut self) {
        self.path.close(&mut self.frames);
        assert_eq!(self.frames.used(), 0, "a slot leaked");
    }
}

fn ack(ack: u32) -> Vec<u8> {
    Segment::new(Side::V4).seq(50).ack(ack).bytes()
}

#[test]
fn rule_9_an_svm_whose_full_ring_has_not_taken_its_backlog_has_not_caught_up() {
    let mut heir = Heir::new();
    heir.path.stop();
    heir.mirror(3, &udp(Side::V4, true, 7, 9000, b"backlog"));
    heir.commit(2, &[]);
    let token = heir.poll_deliver().unwrap();
    heir.path.undelivered(token);
    assert_eq!(heir.actions(), [SecondaryAction::AckInput { up_to: 1 }]);
    let token = heir.poll_deliver().unwrap();
    heir.frames.take(token);
    assert_eq!(heir.actions(), [SecondaryAction::CaughtUp { epoch: 3 }]);
    heir.take_over().close();
}

#[test]
fn rule_12_a_takeover_sends_the_pending_output_of_the_last_commit_alone_and_in_order() {
    let mut heir = Heir::new();
    heir.commit(2, &[answer(1), answer(2)]);
    heir.commit(3, &[answer(3), answer(4), answer(5)]);
    assert_eq!(
        heir.frames.used(),
        3,
        "what the next commit covers is given back"
    );
    let mut alone = heir.take_over();
    assert_eq!(alone.released(), [answer(3), answer(4), answer(5)]);
    alone.close();
}

#[test]
fn rule_5_after_a_takeover_unacknowledged_segments_come_again_at_once_and_until_the_guests_ack() {
    for covered in [true, false] {
        let mut heir = Heir::new();
        heir.mirror(2, &request(b"abc"));
        let token = heir.poll_deliver().unwrap();
        heir.frames.take(token);
        let mut alone = heir.take_over();
        assert_eq!(
            alone.deliver(0),
            Some(request(b"abc")),
            "nobody else sends it"
        );
        assert_eq!(alone.deliver(0), None);
        assert_eq!(alone.deliver(LATER_US), Some(request(b"abc")));
        alone.guest_sends(&ack(if covered { 103 } else { 102 }));
        assert_eq!(alone.deliver(2 * LATER_US).is_none(), covered);
        alone.close();
    }
}

#[test]
fn rule_5_after_a_takeover_input_that_the_svm_was_not_given_is_kept_until_its_ack_as_well() {
    let mut heir = Heir::new();
    heir.mirror(2, &request(b"abc"));
    heir.mirror(3, &udp(Side::V4, true, 7, 9000, b"behind"));
    let mut alone = heir.take_over();
    // A full ring: nothing is lost, and nothing overtakes it.
    let token = alone.path.poll_deliver(0, &mut alone.frames).unwrap();
    alone.path.undelivered(token);
    assert_eq!(alone.deliver(0), Some(request(b"abc")));
    assert!(alone.deliver(0).is_some(), "the datagram behind it");
    assert_eq!(alone.deliver(0), None);
    assert_eq!(alone.deliver(LATER_US), Some(request(b"abc")), "no ACK");
    alone.guest_sends(&ack(103));
    assert_eq!(alone.deliver(2 * LATER_US), None);
    alone.close();
}

#[test]
fn rule_5_after_a_takeover_a_reset_of_either_side_ends_the_deliveries() {
    for by_peer in [true, false] {
        let mut heir = Heir::new();
        heir.mirror(2, &request(b"abc"));
        let mut alone = heir.take_over();
        assert_eq!(alone.deliver(0), Some(request(b"abc")));
        let reset = Segment::new(Side::V4).flags(RST);
        if by_peer {
            let token = alone
                .frames
                .insert(&reset.to_guest().seq(103).bytes())
                .unwrap();
            let token = alone.path.handle_nic(0, &mut alone.frames, token);
            alone.path.handle_delivered(0, &mut alone.frames, token);
        } else {
            alone.guest_sends(&reset.seq(50).bytes());
        }
        assert_eq!(alone.deliver(LATER_US), None, "by_peer: {by_peer}");
        alone.close();
    }
}
