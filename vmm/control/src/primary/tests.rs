//! The primary's rules, each in a test that carries its number.

use super::*;
use crate::{StepLimits, VERSION_BULK, VERSION_SPARSE};
use alloc::vec;
use alloc::vec::Vec;

mod farewell;
mod steps;
mod ways;

const STEP: u64 = 1_000_000;
/// Different for each step, and less than the silence that loses the peer.
const LIMITS: StepLimits = StepLimits {
    stop_us: 10_000,
    capture_us: 11_000,
    send_us: 12_000,
    begin_us: 45_000,
    commit_us: 13_000,
    abort_us: 14_000,
    sync_us: 35_000,
    ..StepLimits::DEFAULT
};
const T: Timing = Timing {
    heartbeat_us: 10_000,
    heartbeat_count: 4,
    checkpoint_interval_us: 0,
    step_timeout_us: STEP,
    steps: LIMITS,
    arbiter_retry_us: 5_000,
};

/// A core, the arbiter's record, and what the shell was told to do.
struct Bench {
    core: Primary,
    record: Record,
    now: u64,
}

fn geometry() -> Geometry {
    vec![("ram_bytes".into(), "4096".into())]
}

/// Nothing is left to send.
const READY: PrimaryEvent = PrimaryEvent::SyncRound {
    sent_pages: 1,
    dirty_pages: 0,
    took_us: 1,
};

fn alone() -> Record {
    Record {
        generation: 3,
        holder: "a".into(),
        standing: Standing::Alone,
    }
}

fn hello() -> Msg {
    Msg::Hello {
        min: VERSION_MIN,
        max: VERSION_MAX,
        session: 9,
        geometry: geometry(),
        ahead_mib: 64,
    }
}

impl Bench {
    fn new(block_alone: bool) -> Self {
        Self::timed(block_alone, T)
    }

    fn timed(block_alone: bool, timing: Timing) -> Self {
        let core = Primary::new("a".into(), timing, block_alone, geometry(), alone(), 7);
        let (record, now) = (alone(), 1_000);
        Self { core, record, now }
    }

    fn paired(block_alone: bool) -> Self {
        let mut b = Self::new(block_alone);
        b.pair();
        b
    }

    /// Joins a secondary of session 9, ends paired.
    fn pair(&mut self) {
        self.first_capture();
        let epoch = self.core.epoch() - 1;
        let committed = self.msg(|generation| Msg::Committed { generation, epoch });
        assert_eq!(self.core.state(), PrimaryState::Pairing);
        self.answer(&committed);
        assert_eq!(self.core.state(), PrimaryState::Paired);
    }

    /// Joins up to the first capture, which is sent.
    fn first_capture(&mut self) {
        self.event(PrimaryEvent::LinkUp);
        self.event(PrimaryEvent::Msg(hello()));
        if self.core.state() == PrimaryState::Blocked {
            panic!("answer the question first");
        }
        self.event(READY);
        let epoch = self.core.epoch();
        self.event(PrimaryEvent::Captured { epoch });
        self.event(PrimaryEvent::Sent { epoch });
    }

    fn event(&mut self, event: PrimaryEvent) -> Vec<Action> {
        self.core.handle(self.now, event);
        self.actions()
    }

    fn actions(&mut self) -> Vec<Action> {
        core::iter::from_fn(|| self.core.poll_action()).collect()
    }

    /// A message of the present generation.
    fn msg(&mut self, make: impl FnOnce(u64) -> Msg) -> Vec<Action> {
        let msg = make(self.core.record().generation);
        self.event(PrimaryEvent::Msg(msg))
    }

    /// Lets the arbiter decide the question among `actions`, and gives its answer to the core.
    fn answer(&mut self, actions: &[Action]) -> Vec<Action> {
        let reply = self.decide(actions);
        self.event(PrimaryEvent::Arbiter(reply))
    }

    fn decide(&mut self, actions: &[Action]) -> Reply {
        match self.record.decide(&question(actions).expect("a question")) {
            Ok(record) => {
                self.record = record.clone();
                Reply::Won(record)
            }
            Err(record) => Reply::Lost(record),
        }
    }

    /// The secondary wins the generation.
    fn take_over(&mut self) {
        self.record.generation += 1;
        self.record.holder = "b".into();
        self.record.standing = Standing::Alone;
    }

    fn silence(&mut self, us: u64) -> Vec<Action> {
        self.now += us;
        self.core.handle_timeout(self.now);
        self.actions()
    }

    fn lose_peer(&mut self) -> Vec<Action> {
        let reason = "reset".into();
        self.event(PrimaryEvent::LinkDown { reason })
    }

    /// Checkpoint of the present epoch up to `SvmStopped`: the capture is asked for.
    fn stopped(&mut self) -> u64 {
        let epoch = self.core.epoch();
        self.event(PrimaryEvent::CheckpointWanted);
        let actions = self.svm_stopped(epoch);
        assert!(matches!(actions[..], [Action::Capture { .. }]));
        epoch
    }

    fn svm_stopped(&mut self, epoch: u64) -> Vec<Action> {
        self.msg(|generation| Msg::SvmStopped {
            generation,
            epoch,
            dirty: vec![5],
        })
    }

    fn captured_and_sent(&mut self) -> u64 {
        let epoch = self.stopped();
        self.event(PrimaryEvent::Captured { epoch });
        self.event(PrimaryEvent::Sent { epoch });
        epoch
    }

    /// The secondary's word: off.
    fn aborted(&mut self, epoch: u64) -> Vec<Action> {
        self.msg(|generation| Msg::Aborted {
            generation,
            epoch,
            reason: "as asked".into(),
        })
    }

    fn committed(&mut self, epoch: u64) -> Vec<Action> {
        self.msg(|generation| Msg::Committed { generation, epoch })
    }
}

fn question(actions: &[Action]) -> Option<Cas> {
    actions.iter().find_map(|a| match a {
        Action::Arbiter(cas) => Some(cas.clone()),
        _ => None,
    })
}

fn stop_svm(actions: &[Action]) -> Option<u64> {
    actions.iter().find_map(|a| match a {
        Action::Send(Msg::StopSvm { epoch, .. }) => Some(*epoch),
        _ => None,
    })
}

#[test]
fn rule_7_one_checkpoint_is_in_flight_at_most() {
    let mut b = Bench::paired(false);
    let first = b.event(PrimaryEvent::CheckpointWanted);
    assert_eq!(stop_svm(&first), Some(8));
    assert!(b.event(PrimaryEvent::CheckpointWanted).is_empty());
    b.svm_stopped(8);
    assert!(b.event(PrimaryEvent::CheckpointWanted).is_empty());
    assert_eq!(b.core.counters().coalesced, 1, "the second begins the next");
    b.event(PrimaryEvent::Captured { epoch: 8 });
    b.event(PrimaryEvent::Sent { epoch: 8 });
    assert!(b.event(PrimaryEvent::CheckpointWanted).is_empty());
    assert_eq!(b.core.counters().coalesced, 2);
    assert_eq!(b.committed(8)[0], Action::Commit { epoch: 8 });
}

#[test]
fn rule_7_a_commit_of_another_epoch_releases_nothing() {
    let mut b = Bench::paired(false);
    let epoch = b.captured_and_sent();
    assert!(b.committed(epoch - 1).is_empty());
    assert!(b.committed(epoch + 1).is_empty());
    assert_eq!(b.committed(epoch), [Action::Commit { epoch }]);
    assert!(b.committed(epoch).is_empty(), "released once");
}

#[test]
fn rule_11_the_capture_follows_the_stop_of_the_svm_and_takes_its_dirty_set() {
    let mut b = Bench::paired(false);
    assert_eq!(b.core.epoch(), 8);
    let wanted = b.event(PrimaryEvent::CheckpointWanted);
    assert!(matches!(wanted[..], [Action::Send(Msg::StopSvm { .. })]));
    let (epoch, first, svm_dirty) = (8, false, vec![5]);
    let capture = Action::Capture {
        epoch,
        first,
        svm_dirty,
        buffer: false,
    };
    assert_eq!(b.svm_stopped(8), [capture]);
    assert!(b.svm_stopped(8).is_empty(), "captured once");
}

#[test]
fn rule_13_a_commit_counts_only_once_the_stage_can_be_whole() {
    let mut b = Bench::paired(false);
    let epoch = b.stopped();
    assert!(
        b.committed(epoch).is_empty(),
        "it overtook the report of the capture"
    );
    let captured = b.event(PrimaryEvent::Captured { epoch });
    assert_eq!(captured, [Action::Commit { epoch }]);
    let epoch = b.stopped();
    b.event(PrimaryEvent::Captured { epoch });
    // It may overtake our own `Sent`.
    assert_eq!(b.committed(epoch), [Action::Commit { epoch }]);
}

#[test]
fn rule_14_an_abort_that_overtakes_the_report_of_the_capture_counts_from_there() {
    let mut b = Bench::paired(false);
    let epoch = b.stopped();
    let refused = b.msg(|generation| Msg::Aborted {
        generation,
        epoch,
        reason: "checksum".into(),
    });
    assert!(refused.is_empty());
    let actions = b.event(PrimaryEvent::Captured { epoch });
    assert_eq!(actions[0], Action::Abort { epoch });
    assert_eq!(stop_svm(&actions), Some(epoch + 1));
}

#[test]
fn rule_13_a_failure_behind_the_sent_stage_aborts_nothing() {
    let mut b = Bench::paired(false);
    let epoch = b.captured_and_sent();
    let reason = "late".into();
    assert!(
        b.event(PrimaryEvent::CheckpointFailed { epoch, reason })
            .is_empty()
    );
    assert_eq!(b.committed(epoch), [Action::Commit { epoch }]);
}

#[test]
fn rule_14_an_abort_keeps_the_epochs_held_and_asks_for_the_next_checkpoint() {
    let mut b = Bench::paired(false);
    let epoch = b.captured_and_sent();
    let actions = b.msg(|generation| Msg::Aborted {
        generation,
        epoch,
        reason: "checksum".into(),
    });
    assert_eq!(actions[0], Action::Abort { epoch });
    assert_eq!(stop_svm(&actions), Some(epoch + 1), "the next covers both");
    assert!(!actions.iter().any(|a| matches!(a, Action::Commit { .. })));
    assert!(b.committed(epoch).is_empty(), "it is off");
}

#[test]
fn rule_14_a_request_after_the_capture_is_served_after_the_commit() {
    let mut b = Bench::paired(false);
    let epoch = b.captured_and_sent();
    assert!(b.event(PrimaryEvent::CheckpointWanted).is_empty());
    let actions = b.committed(epoch);
    assert_eq!(actions[0], Action::Commit { epoch });
    assert_eq!(stop_svm(&actions), Some(epoch + 1));
}

#[test]
fn rule_14_a_request_before_the_capture_is_part_of_it() {
    let mut b = Bench::paired(false);
    b.event(PrimaryEvent::CheckpointWanted);
    b.event(PrimaryEvent::CheckpointWanted);
    b.svm_stopped(8);
    b.event(PrimaryEvent::Captured { epoch: 8 });
    assert_eq!(b.committed(8), [Action::Commit { epoch: 8 }]);
}

#[test]
fn rule_14_a_request_while_the_pair_is_formed_is_served_when_it_is() {
    let mut b = Bench::new(false);
    b.first_capture();
    assert!(b.event(PrimaryEvent::CheckpointWanted).is_empty());
    let committed = b.committed(7);
    let actions = b.answer(&committed);
    assert_eq!(actions[1], Action::Commit { epoch: 7 });
    assert_eq!(stop_svm(&actions), Some(8));
}

#[test]
fn rule_14_many_aborts_in_a_row_mean_a_lost_secondary() {
    let mut b = Bench::paired(false);
    for n in 1..=ABORTS_MAX {
        let epoch = b.core.epoch();
        if n == 1 {
            b.event(PrimaryEvent::CheckpointWanted);
        }
        b.svm_stopped(epoch);
        let reason = "no room".into();
        b.event(PrimaryEvent::CheckpointFailed { epoch, reason });
        let actions = b.aborted(epoch);
        assert!(actions.contains(&Action::Abort { epoch }));
        assert_eq!(question(&actions).is_some(), n == ABORTS_MAX);
    }
    assert_eq!(b.core.state(), PrimaryState::Deciding);
}

#[test]
fn rule_18_nobody_goes_alone_without_the_arbiters_word() {
    let mut b = Bench::paired(false);
    let lost = b.lose_peer();
    assert!(!lost.contains(&Action::GoAlone));
    assert!(lost.contains(&Action::Lease { until_us: 0 }));
    let unavailable = Reply::Unavailable("down".into());
    assert!(b.event(PrimaryEvent::Arbiter(unavailable)).is_empty());
    assert_eq!(b.core.state(), PrimaryState::Deciding);
    let again = b.silence(T.arbiter_retry_us);
    assert_eq!(b.answer(&again), [Action::GoAlone]);
    assert_eq!(b.core.state(), PrimaryState::Alone);
}

#[test]
fn rule_18_the_loser_is_mute_and_stops() {
    let mut b = Bench::paired(false);
    let lost = b.lose_peer();
    b.take_over();
    let actions = b.answer(&lost);
    assert_eq!(actions[0], Action::Mute(true));
    assert!(matches!(
        &actions[1],
        Action::Stop(Outcome::Deposed { record }) if record.holder == "b"
    ));
    assert!(b.event(PrimaryEvent::LinkUp).is_empty());
}

#[test]
fn rule_18_an_answer_that_got_lost_counts_as_done() {
    let mut b = Bench::paired(false);
    let lost = b.lose_peer();
    b.decide(&lost);
    b.event(PrimaryEvent::Arbiter(Reply::Unavailable("timeout".into())));
    let again = b.silence(T.arbiter_retry_us);
    assert_eq!(b.answer(&again), [Action::GoAlone]);
}

#[test]
fn rule_18_a_lost_answer_to_pairing_counts_as_done() {
    let mut b = Bench::new(false);
    b.first_capture();
    let committed = b.committed(7);
    b.decide(&committed);
    b.event(PrimaryEvent::Arbiter(Reply::Unavailable("timeout".into())));
    let again = b.silence(T.arbiter_retry_us);
    let actions = b.answer(&again);
    assert_eq!(actions[0], Action::Send(Msg::Paired { generation: 4 }));
}

#[test]
fn rule_18_a_pair_lost_while_it_is_noted_is_decided_at_the_arbiter() {
    let mut b = Bench::new(false);
    b.first_capture();
    let committed = b.committed(7);
    assert!(question(&b.lose_peer()).is_none(), "one question at a time");
    let actions = b.answer(&committed);
    assert!(!actions.contains(&Action::GoAlone));
    assert_eq!(b.answer(&actions), [Action::GoAlone]);
}

#[test]
fn rule_18_a_clock_gap_mutes_until_the_record_is_read_again() {
    let mut b = Bench::paired(false);
    let gap = b.event(PrimaryEvent::ClockGap);
    assert_eq!(
        gap[..2],
        [Action::Mute(true), Action::Lease { until_us: 0 }]
    );
    assert_eq!(question(&gap), Some(Cas::Confirm(b.record.clone())));
    b.event(PrimaryEvent::Arbiter(Reply::Unavailable("down".into())));
    let again = b.silence(T.arbiter_retry_us);
    assert_eq!(b.answer(&again), [Action::Mute(false)]);
}

#[test]
fn rule_18_after_a_clock_gap_a_deposed_primary_stays_mute() {
    let mut b = Bench::paired(false);
    let gap = b.event(PrimaryEvent::ClockGap);
    b.take_over();
    let actions = b.answer(&gap);
    assert!(!actions.contains(&Action::Mute(false)));
    assert_eq!(b.core.state(), PrimaryState::Ended);
}

#[test]
fn rule_18_an_answer_from_before_the_gap_confirms_nothing() {
    let mut b = Bench::new(false);
    b.first_capture();
    let committed = b.committed(7);
    let old = b.decide(&committed);
    b.take_over();
    assert!(question(&b.event(PrimaryEvent::ClockGap)).is_none());
    let actions = b.event(PrimaryEvent::Arbiter(old));
    assert!(!actions.contains(&Action::Mute(false)));
    b.answer(&actions);
    assert_eq!(b.core.state(), PrimaryState::Ended);
}

#[test]
fn rule_18_a_message_of_an_older_generation_is_refused() {
    let mut b = Bench::paired(false);
    b.lose_peer();
    let asked = b.core.question.clone().map(Action::Arbiter);
    b.answer(&[asked.expect("a question")]);
    b.first_capture();
    let generation = b.core.record().generation - 1;
    let epoch = b.core.epoch() - 1;
    let old = Msg::Committed { generation, epoch };
    assert!(b.event(PrimaryEvent::Msg(old)).is_empty());
    assert_eq!(b.core.state(), PrimaryState::FirstCheckpoint);
}

#[test]
fn rule_18_the_lease_counts_from_the_heartbeat_that_was_answered() {
    let mut b = Bench::paired(false);
    let sent_us = b.now;
    b.now += 7_000;
    let actions = b.msg(|generation| Msg::Echo {
        generation,
        sent_us,
        begun_epoch: None,
    });
    let until_us = sent_us + T.lease_us();
    assert_eq!(actions, [Action::Lease { until_us }]);
    let from_the_future = b.msg(|generation| Msg::Echo {
        generation,
        sent_us: u64::MAX / 2,
        begun_epoch: None,
    });
    let until_us = b.now + T.lease_us();
    assert_eq!(from_the_future, [Action::Lease { until_us }]);
    assert!(T.lease_us() < T.detection_us());
}

#[test]
fn rule_19_silence_proposes_and_heartbeats_keep_the_pair() {
    let mut b = Bench::paired(false);
    for _ in 0..20 {
        let actions = b.silence(T.heartbeat_us);
        assert!(question(&actions).is_none());
        let sent_us = b.now;
        b.msg(|generation| Msg::Heartbeat {
            generation,
            sent_us,
        });
    }
    let actions = b.silence(T.detection_us());
    assert!(matches!(actions[0], Action::CloseLink { .. }));
    assert!(question(&actions).is_some());
    assert_eq!(b.core.state(), PrimaryState::Deciding);
}

#[test]
fn rule_19_before_there_is_a_state_to_take_over_silence_is_borne_longer() {
    let steps = StepLimits::DEFAULT;
    let mut b = Bench::timed(false, Timing { steps, ..T });
    b.event(PrimaryEvent::LinkUp);
    b.event(PrimaryEvent::Msg(hello()));
    let silence_us = T.sync_silence_us();
    assert!(silence_us > 2 * T.detection_us());
    let closes = |actions: &[Action]| {
        let is_close = |action: &Action| matches!(action, Action::CloseLink { .. });
        actions.iter().any(is_close)
    };
    assert!(!closes(&b.silence(silence_us - 1)));
    assert!(closes(&b.silence(1)));

    // Output waits for the first checkpoint.
    let mut b = Bench::new(false);
    b.first_capture();
    assert!(closes(&b.silence(T.detection_us())));
}

#[test]
fn rule_19_block_means_that_a_lost_secondary_is_not_replaced_by_loneliness() {
    let mut b = Bench::paired(true);
    let lost = b.lose_peer();
    assert!(question(&lost).is_none());
    assert!(
        lost.contains(&Action::Detach),
        "nobody needs what is tracked"
    );
    assert_eq!(b.core.state(), PrimaryState::Blocked);
    // Another secondary may join, but only after the lost one can no longer win.
    b.event(PrimaryEvent::LinkUp);
    let asked = b.event(PrimaryEvent::Msg(hello()));
    let actions = b.answer(&asked);
    assert!(matches!(
        actions[..],
        [Action::Send(Msg::Welcome { .. }), Action::StartSync]
    ));
    assert_eq!(b.core.state(), PrimaryState::Syncing);
    assert!(b.lose_peer().contains(&Action::Detach));
    assert_eq!(b.core.state(), PrimaryState::Blocked);
}

#[test]
fn rule_19_a_blocked_primary_welcomes_only_who_said_hello() {
    let mut b = Bench::paired(true);
    b.lose_peer();
    b.event(PrimaryEvent::LinkUp);
    let asked = b.event(PrimaryEvent::Msg(hello()));
    b.lose_peer();
    b.event(PrimaryEvent::LinkUp);
    assert!(b.answer(&asked).is_empty());
    assert_eq!(b.core.state(), PrimaryState::Blocked);
    let asked = b.event(PrimaryEvent::Msg(hello()));
    assert_eq!(b.answer(&asked).len(), 2);
}

#[test]
fn rule_19_a_hello_during_another_question_is_not_forgotten() {
    let mut b = Bench::paired(true);
    b.lose_peer();
    let gap = b.event(PrimaryEvent::ClockGap);
    b.event(PrimaryEvent::LinkUp);
    assert!(question(&b.event(PrimaryEvent::Msg(hello()))).is_none());
    let confirmed = b.answer(&gap);
    let actions = b.answer(&confirmed);
    assert!(actions.contains(&Action::StartSync));
}

#[test]
fn rule_19_a_pair_lost_while_it_is_noted_leaves_no_checkpoint_in_flight() {
    let mut b = Bench::paired(true);
    b.lose_peer();
    b.event(PrimaryEvent::LinkUp);
    let asked = b.event(PrimaryEvent::Msg(hello()));
    b.answer(&asked);
    b.event(READY);
    b.event(PrimaryEvent::Captured { epoch: 8 });
    let committed = b.committed(8);
    assert!(b.lose_peer().contains(&Action::Abort { epoch: 8 }));
    let actions = b.answer(&committed);
    b.answer(&actions);
    assert_eq!(b.core.state(), PrimaryState::Blocked);
}

#[test]
fn rule_19_a_secondary_lost_before_it_was_paired_changes_nothing() {
    let mut b = Bench::new(true);
    b.first_capture();
    assert_eq!(b.lose_peer(), [Action::Abort { epoch: 7 }, Action::GoAlone]);
    assert_eq!(b.core.state(), PrimaryState::Alone);
}

#[test]
fn rule_20_a_shut_down_vm_is_noted_and_acknowledged() {
    let mut b = Bench::paired(false);
    let asked = b.event(PrimaryEvent::ShutDown);
    let told = b.answer(&asked);
    assert_eq!(b.record.standing, Standing::Off);
    assert_eq!(told, [Action::Send(Msg::Off { generation: 5 })]);
    let ended = b.msg(|generation| Msg::OffAck { generation });
    assert_eq!(ended[1], Action::Stop(Outcome::Off));
}

#[test]
fn rule_20_without_an_arbiter_the_secondary_must_acknowledge_the_end() {
    let mut b = Bench::paired(false);
    b.event(PrimaryEvent::ShutDown);
    b.event(PrimaryEvent::Arbiter(Reply::Unavailable("down".into())));
    b.core.peer.as_mut().unwrap().heard_us += STEP;
    let told = b.silence(STEP);
    assert!(told.contains(&Action::Send(Msg::Off { generation: 4 })));
    assert_eq!(b.core.state(), PrimaryState::ShuttingDown);
    b.msg(|generation| Msg::OffAck { generation });
    assert_eq!(b.core.state(), PrimaryState::Ended);
}

#[test]
fn rule_20_with_neither_arbiter_nor_secondary_the_end_waits() {
    let mut b = Bench::paired(false);
    b.event(PrimaryEvent::ShutDown);
    b.event(PrimaryEvent::Arbiter(Reply::Unavailable("down".into())));
    b.lose_peer();
    let again = b.silence(STEP);
    assert_eq!(b.core.state(), PrimaryState::ShuttingDown);
    let ended = b.answer(&again);
    assert_eq!(ended[1], Action::Stop(Outcome::Off));
}

#[test]
fn rule_20_an_unprotected_vm_just_stops() {
    let mut b = Bench::new(false);
    b.event(PrimaryEvent::ShutDown);
    b.event(PrimaryEvent::Arbiter(Reply::Unavailable("down".into())));
    assert!(b.silence(STEP).contains(&Action::Stop(Outcome::Off)));
}

#[test]
fn rule_22_versions_that_do_not_overlap_are_refused_by_name() {
    let mut b = Bench::new(false);
    b.event(PrimaryEvent::LinkUp);
    let actions = b.event(PrimaryEvent::Msg(Msg::Hello {
        min: VERSION_MAX + 1,
        max: VERSION_MAX + 4,
        session: 9,
        geometry: geometry(),
        ahead_mib: 64,
    }));
    assert!(matches!(&actions[0], Action::Send(Msg::Refuse { reason }) if reason.contains("5..8")));
    assert_eq!(b.core.state(), PrimaryState::Alone);
}

#[test]
fn rule_22_a_newer_secondary_is_welcomed_with_our_version() {
    let mut b = Bench::new(false);
    b.event(PrimaryEvent::LinkUp);
    let actions = b.event(PrimaryEvent::Msg(Msg::Hello {
        min: VERSION_MIN,
        max: VERSION_MAX + 1,
        session: 9,
        geometry: geometry(),
        ahead_mib: 64,
    }));
    let (version, generation) = (VERSION_MAX, 3);
    let welcome = Msg::Welcome {
        version,
        generation,
        halt: false,
    };
    assert_eq!(actions[0], Action::Send(welcome));
}

#[test]
fn rule_22_a_secondary_is_known_by_what_it_speaks() {
    let versions = [VERSION_BULK - 1, VERSION_BULK, VERSION_SPARSE];
    for max in versions {
        let mut b = Bench::new(false);
        b.event(PrimaryEvent::LinkUp);
        let _ = b.event(PrimaryEvent::Msg(Msg::Hello {
            min: VERSION_MIN,
            max,
            session: 9,
            geometry: geometry(),
            ahead_mib: 0,
        }));
        assert_eq!(b.core.peer_version(), max);
        b.lose_peer();
        assert_eq!(b.core.peer_version(), VERSION_MIN);
    }
}

#[test]
fn rule_22_geometry_that_differs_is_refused_by_name() {
    for (geometry, word) in [
        (vec![("ram_bytes".into(), "8192".into())], "8192"),
        (vec![], "does not name its ram_bytes"),
    ] {
        let mut b = Bench::new(false);
        b.event(PrimaryEvent::LinkUp);
        let actions = b.event(PrimaryEvent::Msg(Msg::Hello {
            min: VERSION_MIN,
            max: VERSION_MAX,
            session: 9,
            geometry,
            ahead_mib: 64,
        }));
        assert!(
            matches!(&actions[0], Action::Send(Msg::Refuse { reason }) if reason.contains(word))
        );
        assert!(
            matches!(&actions[1], Action::CloseLink { reason } if reason.contains("ram_bytes"))
        );
    }
}

#[test]
fn rule_18_a_secondary_of_the_same_name_is_refused() {
    let named = |host: &str| {
        let mut b = Bench::new(false);
        b.event(PrimaryEvent::LinkUp);
        let (session, timing) = (9, T);
        let mut secondary = crate::Secondary::new(host.into(), timing, session, geometry());
        secondary.handle(0, crate::SecondaryEvent::LinkUp);
        let Some(Action::Send(hello)) = secondary.poll_action() else {
            panic!("no hello");
        };
        b.event(PrimaryEvent::Msg(hello))
    };
    let refused = |a: &Action| matches!(a, Action::Send(Msg::Refuse { reason }) if reason.contains("link_listen makes a"));
    // "a" is the primary's.
    assert!(named("a").iter().any(refused));
    assert!(matches!(named("b")[0], Action::Send(Msg::Welcome { .. })));
}

#[test]
fn rule_22_a_secondary_that_cannot_have_the_state_says_why() {
    let mut b = Bench::new(false);
    b.first_capture();
    let reason = || "TSC frequency".into();
    let refused = b.event(PrimaryEvent::Msg(Msg::Refuse { reason: reason() }));
    assert_eq!(
        refused[..2],
        [
            Action::Tell(Notice::Refused { reason: reason() }),
            Action::CloseLink { reason: reason() },
        ]
    );
    assert_eq!(b.core.state(), PrimaryState::Alone);
    assert_eq!(b.core.counters().refusals, 1);
}

#[test]
fn rule_22_an_older_peer_has_none_of_what_it_does_not_name() {
    let with = |value: &str| {
        let mut ours = geometry();
        ours.push(("compare.policy".into(), value.into()));
        difference(&ours, &geometry())
    };
    assert_eq!(with(NOTHING), None);
    let mut ours = geometry();
    ours.extend(LATER.map(|name| (name.into(), "8192".into())));
    assert_eq!(difference(&ours, &geometry()), None);
    let mut theirs = ours.clone();
    theirs[2].1 = "4096".into();
    assert!(difference(&ours, &theirs).unwrap().contains(LATER[1]));
    assert!(with("2 rules").unwrap().contains("compare.policy"));
}

#[test]
fn a_peer_that_connects_and_says_nothing_is_dropped() {
    let mut b = Bench::new(false);
    b.event(PrimaryEvent::LinkUp);
    assert_eq!(b.core.next_deadline(), Some(b.now + STEP));
    assert!(matches!(b.silence(STEP)[..], [Action::CloseLink { .. }]));
    b.first_capture();
    assert_eq!(b.core.state(), PrimaryState::FirstCheckpoint);
}

#[test]
fn checkpoints_come_by_themselves_when_an_interval_is_set() {
    let checkpoint_interval_us = 30_000;
    let timing = Timing {
        checkpoint_interval_us,
        ..T
    };
    let mut b = Bench::timed(false, timing);
    b.pair();
    assert_eq!(stop_svm(&b.silence(29_999)), None);
    assert_eq!(stop_svm(&b.silence(1)), Some(8));
}
