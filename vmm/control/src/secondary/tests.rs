//! The secondary's rules, each in a test that carries its number.

use super::*;
use crate::farewell::farewell;
use crate::{Cas, Record, Standing, StepLimits};
use alloc::vec;

mod farewell;
mod steps;

const T: Timing = Timing {
    heartbeat_us: 10_000,
    heartbeat_count: 4,
    checkpoint_interval_us: 0,
    step_timeout_us: 1_000_000,
    steps: LIMITS,
    arbiter_retry_us: 5_000,
};
const SESSION: u64 = 9;
/// Less than the silence that loses the peer.
const LIMITS: StepLimits = StepLimits {
    stop_us: 10_000,
    stage_us: 20_000,
    apply_us: 30_000,
    ..StepLimits::DEFAULT
};

struct Bench {
    core: Secondary,
    now: u64,
}

fn paired() -> Record {
    Record {
        generation: 4,
        holder: "a".into(),
        standing: Standing::Paired { session: SESSION },
    }
}

impl Bench {
    /// Connected and said hello.
    fn new() -> Self {
        let core = Secondary::new("b".into(), T, SESSION, vec![]);
        let mut b = Self { core, now: 1_000 };
        let hello = b.event(SecondaryEvent::LinkUp);
        assert!(matches!(
            hello[..],
            [Action::Send(Msg::Hello {
                session: SESSION,
                ..
            })]
        ));
        b
    }

    fn syncing() -> Self {
        let mut b = Self::new();
        let (version, generation) = (VERSION_MAX, 3);
        b.msg(Msg::Welcome {
            version,
            generation,
            halt: false,
        });
        b
    }

    /// The first state is applied and the pair is noted, generation 4.
    fn standby() -> Self {
        let mut b = Self::syncing();
        b.core.note_begun(7);
        let staged = b.event(SecondaryEvent::Staged { epoch: 7 });
        let (generation, epoch) = (3, 7);
        let committed = Msg::Committed { generation, epoch };
        assert_eq!(
            staged,
            [
                Action::Send(committed),
                Action::Apply { epoch, halt: false }
            ]
        );
        b.event(SecondaryEvent::Applied { epoch: 7 });
        b.msg(Msg::Paired { generation: 4 });
        assert_eq!(b.core.state(), SecondaryState::Standby);
        b
    }

    /// The SVM stands for the checkpoint of epoch 8.
    fn staging() -> Self {
        let mut b = Self::standby();
        let stop = b.stop_svm(8);
        assert_eq!(stop, [Action::StopSvm { epoch: 8 }]);
        let dirty = vec![1];
        let stopped = b.event(SecondaryEvent::SvmStopped { epoch: 8, dirty });
        assert!(matches!(
            stopped[..],
            [Action::Send(Msg::SvmStopped {
                generation: 4,
                epoch: 8,
                ..
            })]
        ));
        b
    }

    fn event(&mut self, event: SecondaryEvent) -> Vec<Action> {
        self.core.handle(self.now, event);
        core::iter::from_fn(|| self.core.poll_action()).collect()
    }

    fn msg(&mut self, msg: Msg) -> Vec<Action> {
        self.event(SecondaryEvent::Msg(msg))
    }

    fn stop_svm(&mut self, epoch: u64) -> Vec<Action> {
        let generation = 4;
        let halt = false;
        self.msg(Msg::StopSvm {
            generation,
            epoch,
            halt,
        })
    }

    fn lose_peer(&mut self) -> Vec<Action> {
        let reason = "reset".into();
        self.event(SecondaryEvent::LinkDown { reason })
    }

    /// The arbiter, where `record` stands, answers.
    fn answer(&mut self, record: Record, actions: &[Action]) -> Vec<Action> {
        let cas = question(actions).expect("a question");
        let reply = match record.decide(&cas) {
            Ok(record) => Reply::Won(record),
            Err(record) => Reply::Lost(record),
        };
        self.event(SecondaryEvent::Arbiter(reply))
    }

    fn silence(&mut self, us: u64) -> Vec<Action> {
        self.now += us;
        self.core.handle_timeout(self.now);
        core::iter::from_fn(|| self.core.poll_action()).collect()
    }
}

fn question(actions: &[Action]) -> Option<Cas> {
    actions.iter().find_map(|a| match a {
        Action::Arbiter(cas) => Some(cas.clone()),
        _ => None,
    })
}

const TAKEN: Action = Action::TakeOver { generation: 5 };

#[test]
fn rule_13_behind_the_commit_point_a_takeover_finishes_the_apply() {
    let mut b = Bench::staging();
    let staged = b.event(SecondaryEvent::Staged { epoch: 8 });
    assert_eq!(
        staged[1],
        Action::Apply {
            epoch: 8,
            halt: false
        }
    );
    let lost = b.lose_peer();
    assert!(
        b.answer(paired(), &lost).is_empty(),
        "the apply is not done"
    );
    assert_eq!(b.event(SecondaryEvent::Applied { epoch: 8 }), [TAKEN]);
    assert_eq!(b.core.state(), SecondaryState::TookOver);
}

#[test]
fn rule_13_behind_the_commit_point_nothing_aborts() {
    let mut b = Bench::staging();
    b.event(SecondaryEvent::Staged { epoch: 8 });
    let (generation, epoch, reason) = (4, 8, "late".into());
    let aborted = b.msg(Msg::Aborted {
        generation,
        epoch,
        reason,
    });
    assert!(aborted.is_empty());
    let reason = "late".into();
    assert!(
        b.event(SecondaryEvent::StageFailed { epoch, reason })
            .is_empty()
    );
}

#[test]
fn rule_13_a_failed_apply_never_takes_over() {
    let mut b = Bench::staging();
    b.event(SecondaryEvent::Staged { epoch: 8 });
    let lost = b.lose_peer();
    let reason = "KVM_SET_SREGS".to_string();
    let ended = b.event(SecondaryEvent::ApplyFailed { reason });
    assert!(matches!(ended[..], [Action::Stop(Outcome::Failed { .. })]));
    assert!(b.answer(paired(), &lost).is_empty());
    assert_eq!(b.core.state(), SecondaryState::Ended);
}

#[test]
fn rule_13_a_stage_nobody_announced_is_not_applied() {
    let mut b = Bench::standby();
    let discarded = |epoch| [Action::Discard { epoch }];
    assert_eq!(b.event(SecondaryEvent::Staged { epoch: 8 }), discarded(8));
    b.stop_svm(8);
    let staged = b.event(SecondaryEvent::Staged { epoch: 8 });
    assert_eq!(staged, discarded(8), "the SVM runs");
    let mut b = Bench::staging();
    assert_eq!(b.event(SecondaryEvent::Staged { epoch: 7 }), discarded(7));
    assert_eq!(b.core.counters().discarded, 1);
}

#[test]
fn rule_14_before_the_commit_point_a_takeover_continues_the_old_svm() {
    let mut b = Bench::staging();
    let lost = b.lose_peer();
    let actions = b.answer(paired(), &lost);
    assert_eq!(actions, [Action::Abort { epoch: 8 }, TAKEN]);
    assert!(b.event(SecondaryEvent::Staged { epoch: 8 }).is_empty());
}

#[test]
fn rule_14_a_takeover_while_the_svm_stops_continues_it() {
    let mut b = Bench::standby();
    b.stop_svm(8);
    let lost = b.lose_peer();
    let actions = b.answer(paired(), &lost);
    assert_eq!(actions, [Action::Abort { epoch: 8 }, TAKEN]);
    let dirty = vec![];
    assert!(
        b.event(SecondaryEvent::SvmStopped { epoch: 8, dirty })
            .is_empty()
    );
}

#[test]
fn rule_14_an_abort_lets_the_svm_go_on_and_the_next_checkpoint_come() {
    let mut b = Bench::staging();
    let (generation, epoch) = (4, 8);
    let reason = "no memory".to_string();
    let aborted = b.msg(Msg::Aborted {
        generation,
        epoch,
        reason,
    });
    let answer = Msg::Aborted {
        generation,
        epoch,
        reason: "as asked".into(),
    };
    assert_eq!(aborted, [Action::Abort { epoch }, Action::Send(answer)]);
    assert_eq!(b.stop_svm(9), [Action::StopSvm { epoch: 9 }]);
}

fn pages_lost(b: &mut Bench) -> Vec<Action> {
    let reason = "damaged".into();
    b.event(SecondaryEvent::PagesLost { reason })
}

#[test]
fn rule_14_page_streams_that_break_abort_the_checkpoint_and_the_pair_goes_on() {
    let mut b = Bench::staging();
    let (generation, epoch) = (4, 8);
    let aborted = Msg::Aborted {
        generation,
        epoch,
        reason: "damaged".into(),
    };
    let expected = [Action::Send(aborted), Action::Abort { epoch }];
    assert_eq!(pages_lost(&mut b), expected);
    assert_eq!(b.core.state(), SecondaryState::Standby);
    assert!(pages_lost(&mut b).is_empty(), "nothing is under way");
    // Before the SVM has stopped, too.
    b.stop_svm(9);
    assert!(matches!(pages_lost(&mut b)[1], Action::Abort { epoch: 9 }));
    assert_eq!(b.stop_svm(10), [Action::StopSvm { epoch: 10 }]);
}

#[test]
fn rule_13_page_streams_that_break_behind_the_commit_point_abort_nothing() {
    let mut b = Bench::staging();
    b.event(SecondaryEvent::Staged { epoch: 8 });
    assert!(pages_lost(&mut b).is_empty());
    b.event(SecondaryEvent::Applied { epoch: 8 });
    assert_eq!(b.stop_svm(9), [Action::StopSvm { epoch: 9 }]);
}

#[test]
fn page_streams_of_a_synchronisation_are_not_opened_anew() {
    let ended = pages_lost(&mut Bench::syncing());
    let told = farewell(3, "damaged");
    let expected = [Action::Send(told), Action::Stop(Outcome::NotSynced)];
    assert_eq!(ended, expected);
}

#[test]
fn rule_14_a_refused_stage_is_reported_and_the_svm_goes_on() {
    let mut b = Bench::staging();
    let (generation, epoch) = (4, 8);
    let reason = "page 77 twice".to_string();
    let actions = b.event(SecondaryEvent::StageFailed {
        epoch,
        reason: reason.clone(),
    });
    let aborted = Msg::Aborted {
        generation,
        epoch,
        reason,
    };
    assert_eq!(actions, [Action::Send(aborted), Action::Abort { epoch }]);
}

#[test]
fn rule_14_a_stop_that_comes_during_the_apply_is_served_after_it() {
    let mut b = Bench::staging();
    b.event(SecondaryEvent::Staged { epoch: 8 });
    assert!(b.stop_svm(9).is_empty());
    let applied = b.event(SecondaryEvent::Applied { epoch: 8 });
    assert_eq!(applied, [Action::StopSvm { epoch: 9 }]);
}

#[test]
fn rule_18_nothing_is_taken_over_without_the_arbiters_word() {
    let mut b = Bench::standby();
    let lost = b.lose_peer();
    assert!(matches!(lost[..], [Action::Arbiter(_)]));
    let down = Reply::Unavailable("down".into());
    assert!(b.event(SecondaryEvent::Arbiter(down)).is_empty());
    assert_eq!(b.core.state(), SecondaryState::TakingOver);
    assert_eq!(b.core.next_deadline(), Some(b.now + T.arbiter_retry_us));
    let again = b.silence(T.arbiter_retry_us);
    assert_eq!(b.answer(paired(), &again), [TAKEN]);
    assert_eq!(b.core.generation(), 5);
}

#[test]
fn rule_18_the_loser_stops() {
    let mut b = Bench::standby();
    let lost = b.lose_peer();
    let (generation, standing) = (5, Standing::Alone);
    let record = Record {
        generation,
        standing,
        ..paired()
    };
    let ended = b.answer(record.clone(), &lost);
    assert_eq!(ended, [Action::Stop(Outcome::Deposed { record })]);
}

#[test]
fn rule_18_an_answer_that_got_lost_counts_as_won() {
    let mut b = Bench::standby();
    b.lose_peer();
    b.event(SecondaryEvent::Arbiter(Reply::Unavailable(
        "timeout".into(),
    )));
    let again = b.silence(T.arbiter_retry_us);
    let record = Record {
        generation: 5,
        holder: "b".into(),
        standing: Standing::Alone,
    };
    assert_eq!(b.answer(record, &again), [TAKEN]);
}

#[test]
fn rule_18_an_older_record_with_our_name_is_no_victory() {
    let mut b = Bench::standby();
    b.lose_peer();
    let record = Record {
        generation: 4,
        holder: "b".into(),
        standing: Standing::Alone,
    };
    let ended = b.event(SecondaryEvent::Arbiter(Reply::Lost(record)));
    assert!(matches!(ended[..], [Action::Stop(Outcome::Deposed { .. })]));
}

#[test]
fn rule_18_a_message_of_an_older_generation_is_refused() {
    let mut b = Bench::standby();
    let (generation, epoch) = (3, 8);
    assert!(
        b.msg(Msg::StopSvm {
            generation,
            epoch,
            halt: false
        })
        .is_empty()
    );
    assert_eq!(b.stop_svm(8).len(), 1);
}

#[test]
fn rule_18_who_never_held_a_whole_state_does_not_propose() {
    for mut b in [Bench::new(), Bench::syncing()] {
        assert_eq!(b.lose_peer(), [Action::Stop(Outcome::NotSynced)]);
    }
}

#[test]
fn rule_19_silence_proposes_and_heartbeats_keep_the_pair() {
    let mut b = Bench::standby();
    for _ in 0..20 {
        assert!(question(&b.silence(T.heartbeat_us)).is_none());
        let (generation, sent_us) = (4, b.now);
        let echo = b.msg(Msg::Heartbeat {
            generation,
            sent_us,
        });
        let expected = Msg::Echo {
            generation,
            sent_us,
            begun_epoch: Some(7),
        };
        assert_eq!(echo, [Action::Send(expected)]);
    }
    let actions = b.silence(T.detection_us());
    assert!(matches!(actions[0], Action::CloseLink { .. }));
    assert!(question(&actions).is_some());
    assert_eq!(b.core.state(), SecondaryState::TakingOver);
}

#[test]
fn rule_19_an_echo_stands_for_a_heartbeat_and_without_one_there_are_heartbeats() {
    let heartbeats = |actions: &[Action]| {
        let is_one = |a: &&Action| matches!(a, Action::Send(Msg::Heartbeat { .. }));
        actions.iter().filter(is_one).count()
    };
    let mut b = Bench::standby();
    for _ in 0..20 {
        let (generation, sent_us) = (4, b.now);
        b.msg(Msg::Heartbeat {
            generation,
            sent_us,
        });
        assert_eq!(b.core.heard_us(), b.now);
        assert_eq!(heartbeats(&b.silence(T.heartbeat_us)), 0);
    }
    // The primary's way to us alone is cut: it must not miss a sign of us for longer than it takes to propose anything.
    let mut signs = 0;
    for _ in 1..T.heartbeat_count {
        signs += heartbeats(&b.silence(T.heartbeat_us));
    }
    assert!(signs as u32 >= T.heartbeat_count - 2, "{signs}");
}

#[test]
fn rule_19_before_there_is_a_state_to_take_over_silence_is_borne_longer() {
    let silence_us = T.sync_silence_us();
    assert!(silence_us > 2 * T.detection_us());
    let closes = |actions: &[Action]| matches!(actions.first(), Some(Action::CloseLink { .. }));
    for mut b in [Bench::new(), Bench::syncing()] {
        let deadline = b.core.next_deadline().unwrap();
        assert!(deadline <= b.now + silence_us);
        assert!(!closes(&b.silence(silence_us - 1)));
        assert!(closes(&b.silence(1)));
        assert_eq!(b.core.state(), SecondaryState::Ended);
    }

    // Past the commit point of the first state.
    let mut b = Bench::syncing();
    b.core.timing.steps = StepLimits::DEFAULT;
    b.event(SecondaryEvent::Staged { epoch: 7 });
    let actions = b.silence(T.detection_us());
    assert!(closes(&actions) && question(&actions).is_some());
    assert_eq!(b.core.state(), SecondaryState::TakingOver);
}

#[test]
fn rule_20_a_shut_down_vm_is_not_resurrected() {
    let mut b = Bench::standby();
    let actions = b.msg(Msg::Off { generation: 5 });
    let ack = Action::Send(Msg::OffAck { generation: 5 });
    assert_eq!(actions, [ack, Action::Stop(Outcome::Off)]);
    assert!(b.lose_peer().is_empty());

    let mut b = Bench::standby();
    let lost = b.lose_peer();
    let (generation, standing) = (5, Standing::Off);
    let record = Record {
        generation,
        standing,
        ..paired()
    };
    assert_eq!(b.answer(record, &lost), [Action::Stop(Outcome::Off)]);
}

#[test]
fn rule_22_a_refusal_ends_with_its_reason() {
    let mut b = Bench::new();
    let reason = "cpuid differs".to_string();
    let ended = b.msg(Msg::Refuse {
        reason: reason.clone(),
    });
    assert_eq!(ended, [Action::Stop(Outcome::Refused { reason })]);
}

#[test]
fn rule_22_a_first_state_that_does_not_fit_is_refused_for_good_and_the_primary_told_why() {
    let unfit = |epoch| SecondaryEvent::Unfit {
        epoch,
        reason: "TSC frequency".into(),
    };
    let mut b = Bench::syncing();
    let reason = || "TSC frequency".to_string();
    assert_eq!(
        b.event(unfit(7)),
        [
            Action::Send(Msg::Refuse { reason: reason() }),
            Action::Stop(Outcome::Refused { reason: reason() }),
        ]
    );
    // Who holds a state keeps it.
    let mut b = Bench::staging();
    let (generation, epoch) = (4, 8);
    let told = Msg::Aborted {
        generation,
        epoch,
        reason: reason(),
    };
    assert_eq!(
        b.event(unfit(8)),
        [Action::Send(told), Action::Abort { epoch: 8 }]
    );
}

#[test]
fn rule_22_the_primary_says_which_version_the_secondary_speaks() {
    for version in VERSION_MIN..=VERSION_MAX {
        let mut b = Bench::new();
        assert_eq!(b.core.version(), VERSION_MIN);
        b.msg(Msg::Welcome {
            version,
            generation: 3,
            halt: false,
        });
        assert_eq!(b.core.version(), version);
    }
}
