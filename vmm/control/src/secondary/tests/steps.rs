//! Steps that take too long, aborts that are answered, and a secondary that stands still (rules 13, 14, 21).

use super::*;
use crate::{Notice, Step};

fn aborted(epoch: u64) -> Msg {
    Msg::Aborted {
        generation: 4,
        epoch,
        reason: "late".into(),
    }
}

fn says_aborted(actions: &[Action], epoch: u64) -> bool {
    let is = |a: &Action| matches!(a, Action::Send(Msg::Aborted { epoch: e, .. }) if *e == epoch);
    actions.iter().any(is)
}

impl Bench {
    /// Stands still at the commit of epoch 8.
    fn halted() -> Self {
        let mut b = Self::standby();
        b.order(8, true);
        let dirty = vec![1];
        b.event(SecondaryEvent::SvmStopped { epoch: 8, dirty });
        let staged = b.event(SecondaryEvent::Staged { epoch: 8 });
        let (epoch, halt) = (8, true);
        assert_eq!(staged[1], Action::Apply { epoch, halt });
        b.event(SecondaryEvent::Applied { epoch: 8 });
        assert!(b.core.is_halted());
        b
    }

    fn order(&mut self, epoch: u64, halt: bool) -> Vec<Action> {
        let generation = 4;
        self.msg(Msg::StopSvm {
            generation,
            epoch,
            halt,
        })
    }
}

#[test]
fn rule_14_a_stop_or_a_stage_that_does_not_end_lets_the_svm_go_on() {
    let mut stopping = Bench::standby();
    stopping.stop_svm(8);
    for (mut b, step, limit_us) in [
        (stopping, Step::Stop, LIMITS.stop_us),
        (Bench::staging(), Step::Stage, LIMITS.stage_us),
    ] {
        assert!(
            !b.silence(limit_us - 1)
                .contains(&Action::Abort { epoch: 8 })
        );
        let actions = b.silence(1);
        let epoch = 8;
        let notice = Notice::StepTimedOut {
            step,
            epoch,
            limit_us,
        };
        assert_eq!(actions[0], Action::Tell(notice));
        assert!(says_aborted(&actions, 8));
        assert!(actions.contains(&Action::Abort { epoch }));
        assert_eq!(b.core.counters().timeouts[step.index()], 1);
        assert!(b.msg(aborted(8)).is_empty(), "it was said already");
        assert_eq!(b.stop_svm(8), [Action::StopSvm { epoch }]);
    }
}

#[test]
fn rule_13_an_apply_that_does_not_end_is_fatal_but_a_takeover_waits_for_it() {
    let mut b = Bench::staging();
    b.event(SecondaryEvent::Staged { epoch: 8 });
    let ended = b.silence(LIMITS.apply_us);
    assert!(
        ended
            .iter()
            .any(|a| matches!(a, Action::Stop(Outcome::Failed { .. })))
    );
    let mut b = Bench::staging();
    b.event(SecondaryEvent::Staged { epoch: 8 });
    let lost = b.lose_peer();
    assert!(b.answer(paired(), &lost).is_empty());
    assert!(b.silence(LIMITS.apply_us * 100).is_empty());
    assert_eq!(b.event(SecondaryEvent::Applied { epoch: 8 }), [TAKEN]);
}

#[test]
fn rule_14_an_abort_is_answered_once_wherever_it_finds_the_checkpoint() {
    let mut b = Bench::standby();
    b.stop_svm(8);
    let actions = b.msg(aborted(8));
    assert!(says_aborted(&actions, 8) && actions.contains(&Action::Abort { epoch: 8 }));
    let dirty = vec![];
    let late = b.event(SecondaryEvent::SvmStopped { epoch: 8, dirty });
    assert!(late.is_empty(), "it runs again");
    let mut b = Bench::staging();
    assert!(says_aborted(&b.msg(aborted(8)), 8));
    assert!(b.msg(aborted(8)).is_empty());
    assert_eq!(
        b.event(SecondaryEvent::Staged { epoch: 8 }),
        [Action::Discard { epoch: 8 }]
    );
}

#[test]
fn rule_11_the_end_of_an_aborted_stop_is_not_that_of_the_next_one() {
    let mut b = Bench::standby();
    b.stop_svm(8);
    b.msg(aborted(8));
    b.stop_svm(9);
    let dirty = vec![1];
    let late = b.event(SecondaryEvent::SvmStopped { epoch: 8, dirty });
    assert!(late.is_empty(), "the SVM has run since");
    assert_eq!(b.core.step(), Some(Step::Stop));
    let dirty = vec![3];
    let stopped = b.event(SecondaryEvent::SvmStopped { epoch: 9, dirty });
    assert!(
        matches!(&stopped[..], [Action::Send(Msg::SvmStopped { epoch: 9, dirty, .. })] if *dirty == [3]),
        "{stopped:?}"
    );
}

#[test]
fn rule_14_a_checkpoint_that_waits_for_the_apply_before_it_can_be_aborted() {
    let mut b = Bench::staging();
    b.event(SecondaryEvent::Staged { epoch: 8 });
    b.stop_svm(9);
    assert!(says_aborted(&b.msg(aborted(9)), 9));
    assert!(b.event(SecondaryEvent::Applied { epoch: 8 }).is_empty());
}

#[test]
fn rule_22_a_primary_of_the_version_before_gets_no_answer_to_its_abort() {
    let mut b = Bench::staging();
    b.core.version = 1;
    assert_eq!(b.msg(aborted(8)), [Action::Abort { epoch: 8 }]);
}

#[test]
fn rule_21_a_halted_svm_answers_at_once_that_it_has_dirtied_nothing() {
    let mut b = Bench::halted();
    let (generation, epoch, dirty) = (4, 9, vec![]);
    let stopped = Msg::SvmStopped {
        generation,
        epoch,
        dirty,
    };
    assert_eq!(b.order(9, true), [Action::Send(stopped)]);
    let staged = b.event(SecondaryEvent::Staged { epoch: 9 });
    assert_eq!(staged[1], Action::Apply { epoch, halt: true });
}

#[test]
fn rule_21_back_to_comparing_the_svm_runs_from_the_commit() {
    let mut b = Bench::halted();
    b.order(9, false);
    let staged = b.event(SecondaryEvent::Staged { epoch: 9 });
    let (epoch, halt) = (9, false);
    assert_eq!(staged[1], Action::Apply { epoch, halt });
    b.event(SecondaryEvent::Applied { epoch });
    assert!(!b.core.is_halted());
    assert_eq!(b.stop_svm(10), [Action::StopSvm { epoch: 10 }]);
}

#[test]
fn rule_21_an_abort_in_remus_mode_leaves_the_svm_where_it_stands() {
    let mut b = Bench::halted();
    b.order(9, false);
    let actions = b.msg(aborted(9));
    assert!(matches!(
        actions[..],
        [Action::Send(Msg::Aborted { epoch: 9, .. })]
    ));
    assert!(b.core.is_halted());
}

#[test]
fn rule_21_a_takeover_in_remus_mode_continues_from_the_last_commit() {
    let mut resting = Bench::halted();
    let lost = resting.lose_peer();
    assert_eq!(
        resting.answer(paired(), &lost),
        [Action::Abort { epoch: 8 }, TAKEN]
    );
    let mut staging = Bench::halted();
    staging.order(9, true);
    let lost = staging.lose_peer();
    assert_eq!(
        staging.answer(paired(), &lost),
        [Action::Abort { epoch: 9 }, TAKEN]
    );
    let mut applying = Bench::halted();
    applying.order(9, true);
    applying.event(SecondaryEvent::Staged { epoch: 9 });
    let lost = applying.lose_peer();
    assert!(applying.answer(paired(), &lost).is_empty());
    assert_eq!(
        applying.event(SecondaryEvent::Applied { epoch: 9 }),
        [Action::Abort { epoch: 9 }, TAKEN]
    );
}

#[test]
fn rule_21_the_first_commit_of_a_remus_pair_is_where_the_svm_stands() {
    let mut b = Bench::new();
    let (version, generation, halt) = (VERSION_MAX, 3, true);
    b.msg(Msg::Welcome {
        version,
        generation,
        halt,
    });
    let staged = b.event(SecondaryEvent::Staged { epoch: 7 });
    assert_eq!(staged[1], Action::Apply { epoch: 7, halt });
}
