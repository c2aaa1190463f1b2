//! Steps that take too long, and aborts at each of them (rules 7, 13, 14).

use super::*;
use crate::{Notice, Step};

impl Bench {
    /// The peer is heard all the time, but says nothing else.
    fn wait(&mut self, us: u64) -> Vec<Action> {
        let (generation, sent_us) = (self.core.record().generation, self.now + us);
        self.now += us;
        self.core.handle(
            self.now,
            PrimaryEvent::Msg(Msg::Heartbeat {
                generation,
                sent_us,
            }),
        );
        self.core.handle_timeout(self.now);
        let is_checkpoint = |a: &Action| {
            !matches!(
                a,
                Action::Send(Msg::Heartbeat { .. } | Msg::Echo { .. })
                    | Action::Throttle { .. }
                    | Action::Tell(Notice::Throttled { .. })
            )
        };
        self.actions().into_iter().filter(is_checkpoint).collect()
    }

    /// The peer answers a heartbeat, and says which checkpoint began to come in last.
    fn echo(&mut self, begun_epoch: u64) {
        let (sent_us, begun_epoch) = (self.now, Some(begun_epoch));
        let actions = self.msg(|generation| Msg::Echo {
            generation,
            sent_us,
            begun_epoch,
        });
        assert!(matches!(actions[..], [Action::Lease { .. }]));
    }

    fn timeouts(&self, step: Step) -> u64 {
        self.core.counters().timeouts[step.index()]
    }

    /// A checkpoint that has reached `step`.
    fn at(step: Step) -> (Self, u64) {
        let mut b = Self::paired(false);
        let epoch = b.core.epoch();
        b.event(PrimaryEvent::CheckpointWanted);
        if step > Step::Stop {
            b.svm_stopped(epoch);
        }
        if step > Step::Capture {
            b.event(PrimaryEvent::Captured { epoch });
        }
        if step == Step::Begin {
            b.echo(epoch - 1);
        }
        if step > Step::Send {
            b.event(PrimaryEvent::Sent { epoch });
        }
        assert_eq!(b.core.step(), Some(step));
        (b, epoch)
    }

    /// Lets `step` take too long: the secondary is asked to let it be off.
    fn late(step: Step) -> (Self, u64) {
        let (mut b, epoch) = Self::at(step);
        let limit_us = LIMITS.of(step);
        assert_eq!(b.wait(limit_us - 1), []);
        let actions = b.wait(1);
        let notice = Notice::StepTimedOut {
            step,
            epoch,
            limit_us,
        };
        assert_eq!(actions[0], Action::Tell(notice), "{step}");
        assert!(
            matches!(actions[1..], [Action::Send(Msg::Aborted { epoch: e, .. })] if e == epoch),
            "{step}: {actions:?}"
        );
        assert_eq!(b.timeouts(step), 1);
        (b, epoch)
    }
}

const STEPS: [Step; 5] = [
    Step::Stop,
    Step::Capture,
    Step::Send,
    Step::Begin,
    Step::Commit,
];

#[test]
fn rule_14_each_step_that_takes_too_long_is_aborted_and_the_next_checkpoint_covers_both_epochs() {
    for step in STEPS {
        let (mut b, epoch) = Bench::late(step);
        if step == Step::Capture {
            assert_eq!(b.aborted(epoch), [], "our own capture has not ended");
            let actions = b.event(PrimaryEvent::Captured { epoch });
            assert_eq!(actions[0], Action::Abort { epoch });
            assert_eq!(stop_svm(&actions), Some(epoch + 1));
            continue;
        }
        let actions = b.aborted(epoch);
        assert_eq!(actions[0], Action::Abort { epoch });
        let cut = step != Step::Stop;
        assert_eq!(stop_svm(&actions), Some(epoch + u64::from(cut)), "{step}");
        assert_eq!(b.core.counters().aborts, 1);
        assert_eq!(b.core.state(), PrimaryState::Paired);
    }
}

#[test]
fn rule_14_a_checkpoint_that_comes_in_has_the_time_for_its_commit_from_then_on() {
    let (mut b, epoch) = Bench::at(Step::Begin);
    assert_eq!(b.wait(LIMITS.begin_us - 1), []);
    // Nothing new: what came in before.
    b.echo(epoch - 1);
    assert_eq!(b.core.step(), Some(Step::Begin));
    b.echo(epoch);
    assert_eq!(b.core.step(), Some(Step::Commit));
    assert_eq!(b.wait(LIMITS.commit_us - 1), []);
    b.wait(1);
    assert_eq!((b.timeouts(Step::Begin), b.timeouts(Step::Commit)), (0, 1));

    // It may come in while the rest is sent, and may be decided before anybody says that it does.
    let (mut b, epoch) = Bench::at(Step::Send);
    b.echo(epoch);
    b.event(PrimaryEvent::Sent { epoch });
    assert_eq!(b.core.step(), Some(Step::Commit));
    let (mut b, epoch) = Bench::at(Step::Begin);
    assert_eq!(b.committed(epoch)[0], Action::Commit { epoch });
}

#[test]
fn rule_17_a_checkpoint_that_takes_too_long_on_its_way_slows_the_pvm_down() {
    for step in STEPS {
        let (b, _) = Bench::late(step);
        let run_pct = match step {
            // Nothing was on its way.
            Step::Stop | Step::Capture => 100,
            _ => 70,
        };
        assert_eq!(b.core.run_pct(), run_pct, "{step}");
    }
}

#[test]
fn rule_17_output_is_held_for_the_time_of_five_checkpoints_at_most() {
    // A secondary that lives and does all at the last moment, but commits nothing.
    let mut b = Bench::paired(false);
    let begun_us = b.now;
    b.echo(b.core.epoch() - 1);
    b.event(PrimaryEvent::CheckpointWanted);
    let released = loop {
        let epoch = b.core.epoch();
        b.wait(LIMITS.stop_us - 1);
        b.svm_stopped(epoch);
        b.wait(LIMITS.capture_us - 1);
        b.event(PrimaryEvent::Captured { epoch });
        b.wait(LIMITS.send_us - 1);
        b.event(PrimaryEvent::Sent { epoch });
        b.wait(LIMITS.begin_us - 1);
        b.echo(epoch);
        b.wait(LIMITS.commit_us);
        b.wait(LIMITS.abort_us - 1);
        let actions = b.aborted(epoch);
        if b.core.state() != PrimaryState::Paired {
            break b.answer(&actions);
        }
        assert!(b.now < begun_us + 10 * T.step_timeout_us, "for ever");
    };
    assert!(released.contains(&Action::GoAlone), "{released:?}");
    let limits_us = STEPS.map(|step| LIMITS.of(step)).iter().sum::<u64>() + LIMITS.abort_us;
    assert!(b.now - begun_us <= 5 * limits_us, "{}", b.now - begun_us);
}

#[test]
fn rule_14_a_secondary_that_may_be_silent_for_long_has_as_long_to_say_what_comes_in() {
    let steps = StepLimits {
        begin_us: 1_000,
        ..LIMITS
    };
    let timing = Timing { steps, ..T };
    assert_eq!(timing.limit_us(Step::Begin), T.detection_us());
    assert_eq!(timing.limit_us(Step::Commit), LIMITS.commit_us);
    assert_eq!(T.limit_us(Step::Begin), LIMITS.begin_us);
}

#[test]
fn rule_13_an_abort_that_comes_too_late_is_a_commit() {
    for step in [Step::Send, Step::Begin, Step::Commit] {
        let (mut b, epoch) = Bench::late(step);
        assert_eq!(b.committed(epoch)[0], Action::Commit { epoch }, "{step}");
        assert_eq!(b.core.counters().late_aborts, 1);
    }
}

#[test]
fn rule_13_a_commit_that_comes_while_our_own_capture_is_late_counts_when_it_ends() {
    let (mut b, epoch) = Bench::late(Step::Capture);
    assert_eq!(b.committed(epoch), []);
    let actions = b.event(PrimaryEvent::Captured { epoch });
    assert_eq!(actions, [Action::Commit { epoch }]);
}

#[test]
fn rule_13_nothing_that_was_not_captured_is_committed() {
    let (mut b, epoch) = Bench::late(Step::Stop);
    assert_eq!(b.committed(epoch), []);
    assert_eq!(b.aborted(epoch)[0], Action::Abort { epoch });
}

#[test]
fn rule_14_the_answer_to_an_aborted_stop_is_not_taken_for_one_to_the_next() {
    let (mut b, epoch) = Bench::late(Step::Stop);
    // It was on its way; the SVM runs again since.
    assert_eq!(b.svm_stopped(epoch), []);
    assert_eq!(stop_svm(&b.event(PrimaryEvent::CheckpointWanted)), None);
    let actions = b.aborted(epoch);
    assert_eq!(stop_svm(&actions), Some(epoch));
    assert!(matches!(b.svm_stopped(epoch)[..], [Action::Capture { .. }]));
}

#[test]
fn rule_14_a_secondary_that_answers_no_abort_is_lost() {
    for step in STEPS {
        let (mut b, epoch) = Bench::late(step);
        let actions = b.wait(LIMITS.abort_us);
        assert!(matches!(
            actions[1],
            Action::Send(Msg::Aborted { epoch: 0, .. })
        ));
        assert!(matches!(actions[2], Action::CloseLink { .. }), "{step}");
        assert!(actions.contains(&Action::Abort { epoch }));
        assert!(question(&actions).is_some());
        assert_eq!(b.timeouts(Step::Abort), 1);
        assert_eq!(b.core.state(), PrimaryState::Deciding);
    }
}

#[test]
fn rule_14_a_failure_of_ours_waits_for_the_secondary_to_let_the_svm_go() {
    for captured in [false, true] {
        let (mut b, epoch) = Bench::at(Step::Capture);
        if captured {
            b.event(PrimaryEvent::Captured { epoch });
        }
        let reason = "no memory".into();
        let actions = b.event(PrimaryEvent::CheckpointFailed { epoch, reason });
        assert!(matches!(actions[..], [Action::Send(Msg::Aborted { .. })]));
        let actions = b.aborted(epoch);
        assert_eq!(actions[0], Action::Abort { epoch });
        assert_eq!(stop_svm(&actions), Some(epoch + u64::from(captured)));
    }
}

#[test]
fn rule_14_when_both_sides_abort_at_once_nobody_waits_for_an_answer() {
    let (mut b, epoch) = Bench::at(Step::Capture);
    assert_eq!(b.aborted(epoch), [], "the capture is not over");
    let reason = "no memory".into();
    let actions = b.event(PrimaryEvent::CheckpointFailed { epoch, reason });
    assert_eq!(actions[0], Action::Abort { epoch });
    assert_eq!(stop_svm(&actions), Some(epoch));
}

#[test]
fn rule_14_a_late_capture_of_a_lost_secondary_is_still_a_cut() {
    let (mut b, epoch) = Bench::late(Step::Capture);
    b.wait(LIMITS.abort_us);
    assert_eq!(b.event(PrimaryEvent::Captured { epoch }), []);
    assert_eq!(b.core.epoch(), epoch + 1);
}

#[test]
fn rule_22_a_secondary_of_the_version_before_answers_no_abort() {
    let paired = || {
        let mut b = Bench::new(false);
        b.event(PrimaryEvent::LinkUp);
        let (min, max, session, geometry) = (1, 1, 9, geometry());
        let actions = b.event(PrimaryEvent::Msg(Msg::Hello {
            min,
            max,
            session,
            geometry,
            ahead_mib: 0,
        }));
        assert!(matches!(
            actions[0],
            Action::Send(Msg::Welcome { version: 1, .. })
        ));
        b.event(READY);
        b.event(PrimaryEvent::Captured { epoch: 7 });
        let committed = b.committed(7);
        b.answer(&committed);
        b.event(PrimaryEvent::CheckpointWanted);
        b
    };
    let mut b = paired();
    let actions = b.wait(LIMITS.stop_us);
    assert!(matches!(actions[2], Action::CloseLink { .. }));
    let mut b = paired();
    b.svm_stopped(8);
    let (epoch, reason) = (8, "no memory".into());
    let actions = b.event(PrimaryEvent::CheckpointFailed { epoch, reason });
    assert_eq!(actions[1], Action::Abort { epoch });
    assert_eq!(stop_svm(&actions), Some(8));
}

#[test]
fn a_synchronisation_without_progress_loses_the_secondary() {
    let mut b = Bench::new(false);
    b.event(PrimaryEvent::LinkUp);
    b.event(PrimaryEvent::Msg(hello()));
    b.wait(LIMITS.sync_us - 1);
    let took_us = 5;
    let (sent_pages, dirty_pages) = (1000, 700);
    let again = b.event(PrimaryEvent::SyncRound {
        sent_pages,
        dirty_pages,
        took_us,
    });
    assert_eq!(again, [Action::SyncRound]);
    assert_eq!(b.wait(LIMITS.sync_us - 1), []);
    let actions = b.wait(1);
    assert!(matches!(actions[2], Action::CloseLink { .. }));
    assert_eq!(b.timeouts(Step::Sync), 1);
    assert_eq!(b.core.state(), PrimaryState::Alone);
}

#[test]
fn a_first_checkpoint_that_does_not_end_loses_the_secondary_and_the_vm_runs_on() {
    let mut b = Bench::new(false);
    b.first_capture();
    let actions = b.wait(LIMITS.commit_us);
    assert!(actions.contains(&Action::Abort { epoch: 7 }));
    assert!(actions.contains(&Action::GoAlone));
}
