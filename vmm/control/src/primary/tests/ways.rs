//! Remus mode, the storm switch, and a guest that is too fast for its secondary (rules 14 and 21).

use super::*;
use crate::{Mode, Notice, Pace, Storm};

const STORM: Storm = Storm {
    share_pct: 10,
    window_us: 20_000,
    interval_min_us: 500,
    interval_max_us: 5_000,
    retry_us: 15_000,
    retry_max_us: 60_000,
};

fn bench(mode: Mode) -> Bench {
    let mut b = Bench::new(false);
    b.core = b.core.protected_by(Protection {
        mode,
        remus_interval_us: 4_000,
        storm: STORM,
        pace: Pace {
            ready_pages: 10,
            rest_us: 40,
            slow_us: 3_000,
            relief_us: 50_000,
            rejoin_us: 1_000,
            rejoin_max_us: 8_000,
            lag_us: 100,
            lag_look_us: 1_000,
            lag_rest_us: 10_000,
        },
    });
    b
}

/// What the order to stop the SVM and the order to capture say about the epoch after.
fn checkpoint(b: &mut Bench, begin: &[Action], took_us: u64) -> (bool, bool, Vec<Action>) {
    let halt = begin.iter().find_map(|a| match a {
        Action::Send(Msg::StopSvm { halt, .. }) => Some(*halt),
        _ => None,
    });
    let epoch = b.core.epoch();
    let captures = b.svm_stopped(epoch);
    let buffer = captures.iter().find_map(|a| match a {
        Action::Capture { buffer, .. } => Some(*buffer),
        _ => None,
    });
    b.event(PrimaryEvent::Captured { epoch });
    b.event(PrimaryEvent::Sent { epoch });
    b.now += took_us;
    let committed = b.committed(epoch);
    (halt.unwrap(), buffer.unwrap(), committed)
}

fn wanted(b: &mut Bench, after_us: u64) -> (bool, bool, Vec<Action>) {
    b.now += after_us;
    let begin = b.event(PrimaryEvent::CheckpointWanted);
    checkpoint(b, &begin, 1_000)
}

fn storm(b: &mut Bench) {
    assert_eq!(
        [wanted(b, 0).0, wanted(b, 0).0, wanted(b, 0).0],
        [false, false, true]
    );
    assert_eq!(b.core.mode(), Mode::Remus);
}

#[test]
fn rule_21_remus_mode_halts_the_svm_from_the_first_commit_on() {
    let mut b = bench(Mode::Remus);
    b.event(PrimaryEvent::LinkUp);
    let welcome = b.event(PrimaryEvent::Msg(hello()));
    assert!(matches!(
        welcome[0],
        Action::Send(Msg::Welcome { halt: true, .. })
    ));
    let capture = b.event(READY);
    assert!(matches!(
        capture[..],
        [Action::Capture {
            first: true,
            buffer: true,
            ..
        }]
    ));
}

#[test]
fn rule_21_remus_checkpoints_come_by_themselves_one_interval_after_the_other() {
    let mut b = bench(Mode::Remus);
    b.pair();
    assert_eq!(stop_svm(&b.silence(3_999)), None);
    for _ in 0..5 {
        let begin = b.silence(1);
        assert!(stop_svm(&begin).is_some());
        let (halt, buffer, committed) = checkpoint(&mut b, &begin, 1_500);
        assert!(halt && buffer);
        assert!(matches!(committed[..], [Action::Commit { .. }]));
        assert_eq!(stop_svm(&b.silence(2_499)), None, "from begin to begin");
    }
    let begin = b.silence(1);
    checkpoint(&mut b, &begin, 6_000);
    b.core.peer.as_mut().unwrap().heard_us = b.now;
    assert!(stop_svm(&b.silence(0)).is_some(), "as fast as the link can");
}

#[test]
fn rule_21_a_storm_leads_to_remus_and_is_an_event() {
    let mut b = bench(Mode::Colo);
    b.pair();
    wanted(&mut b, 0);
    wanted(&mut b, 0);
    assert_eq!(b.core.mode(), Mode::Colo);
    let (halt, buffer, actions) = wanted(&mut b, 0);
    assert!(halt && buffer);
    let is_told = |action: &Action| {
        matches!(
            action,
            Action::Tell(Notice::Storm {
                checkpoints: 3,
                share_pct: 15..=16,
                window_us: 20_000,
                retry_us: 15_000
            })
        )
    };
    assert!(actions.iter().any(is_told), "{actions:?}");
    let share_pct = b.core.checkpoint_share_pct(b.now);
    assert_eq!(share_pct, 0, "the next one begins with nothing");
    assert_eq!((b.core.mode(), b.core.counters().storms), (Mode::Remus, 1));
}

#[test]
fn rule_21_below_the_share_the_pair_goes_on_comparing() {
    let mut b = bench(Mode::Colo);
    b.pair();
    for _ in 0..20 {
        b.core.peer.as_mut().unwrap().heard_us = b.now;
        assert!(!wanted(&mut b, 10_001).0);
    }
}

#[test]
fn rule_21_comparing_is_tried_again_and_a_storm_that_goes_on_backs_off() {
    let mut b = bench(Mode::Colo);
    b.pair();
    let mut waited = Vec::new();
    for _ in 0..4 {
        storm(&mut b);
        let since = b.now;
        loop {
            b.core.peer.as_mut().unwrap().heard_us = b.now;
            let begin = b.silence(1_000);
            if stop_svm(&begin).is_none() {
                continue;
            }
            let (halt, _, actions) = checkpoint(&mut b, &begin, 100);
            if !halt {
                assert!(actions.contains(&Action::Tell(Notice::StormOver)));
                break;
            }
        }
        waited.push((b.now - since) / STORM.retry_us);
        assert_eq!(b.core.mode(), Mode::Colo);
    }
    assert_eq!(waited, [1, 2, 4, 4]);
}

#[test]
fn rule_21_a_divergence_counts_though_its_first_checkpoint_is_aborted() {
    let mut b = bench(Mode::Colo);
    b.pair();
    let epoch = b.core.epoch();
    b.event(PrimaryEvent::CheckpointWanted);
    b.svm_stopped(epoch);
    b.event(PrimaryEvent::Captured { epoch });
    let again = b.aborted(epoch);
    checkpoint(&mut b, &again, 1_000);
    assert!(b.core.checkpoint_share_pct(b.now) > 0);
    // Once: what comes by itself afterwards is nobody's wish.
    assert!(!b.core.wanted);
}

#[test]
fn rule_21_an_aborted_checkpoint_changes_no_way() {
    let mut b = bench(Mode::Colo);
    b.pair();
    wanted(&mut b, 0);
    wanted(&mut b, 0);
    b.event(PrimaryEvent::CheckpointWanted);
    let epoch = b.core.epoch();
    b.svm_stopped(epoch);
    b.event(PrimaryEvent::Captured { epoch });
    let again = b.aborted(epoch);
    assert_eq!(b.core.mode(), Mode::Colo);
    assert!(checkpoint(&mut b, &again, 1).0, "the next one does");
    assert_eq!(b.core.mode(), Mode::Remus);
}

#[test]
fn rule_14_held_output_without_room_stops_the_vcpus_until_there_is() {
    let mut b = bench(Mode::Remus);
    b.pair();
    let stopped = b.event(PrimaryEvent::HoldFull(true));
    assert_eq!(stopped[0], Action::Throttle { run_pct: 0 });
    assert!(b.event(PrimaryEvent::HoldFull(true)).is_empty());
    let runs = b.event(PrimaryEvent::HoldFull(false));
    assert_eq!(runs[0], Action::Throttle { run_pct: 100 });
}

#[test]
fn a_guest_that_dirties_faster_than_the_link_is_slowed_down_and_then_told_plainly() {
    let mut b = bench(Mode::Colo);
    b.event(PrimaryEvent::LinkUp);
    b.event(PrimaryEvent::Msg(hello()));
    let (sent_pages, dirty_pages, took_us) = (100, 100, 50);
    let round = PrimaryEvent::SyncRound {
        sent_pages,
        dirty_pages,
        took_us,
    };
    let mut shares = Vec::new();
    let told = loop {
        let actions = b.event(round.clone());
        if !actions.contains(&Action::SyncRound) {
            break actions;
        }
        let Action::Throttle { run_pct } = actions[0] else {
            panic!("{actions:?}")
        };
        shares.push(run_pct);
    };
    assert_eq!(shares.last(), Some(&1));
    assert!(shares.is_sorted_by(|a, b| a > b));
    let reason = "the guest dirties memory faster than the link carries it";
    assert!(told.iter().any(
        |a| matches!(a, Action::CloseLink { reason: why } if why.starts_with(reason) && why.contains("it dirties 2000000 pages/s (8192.0 MB/s), the link carries 2000000 pages/s (8192.0 MB/s)"))
    ));
    assert!(told.contains(&Action::Throttle { run_pct: 100 }));
    assert_eq!(b.core.state(), PrimaryState::Alone);
    // No livelock of attempts.
    assert!(matches!(
        b.event(PrimaryEvent::LinkUp)[..],
        [Action::CloseLink { .. }]
    ));
    b.now += 1_000;
    assert!(b.event(PrimaryEvent::LinkUp).is_empty());
}

#[test]
fn what_the_link_carries_in_a_moment_goes_with_the_first_checkpoint_though_slowing_helps_no_more() {
    let mut b = bench(Mode::Colo);
    b.event(PrimaryEvent::LinkUp);
    b.event(PrimaryEvent::Msg(hello()));
    let round = PrimaryEvent::SyncRound {
        sent_pages: 100,
        dirty_pages: 100,
        took_us: 40,
    };
    let begun = loop {
        let actions = b.event(round.clone());
        if !actions.contains(&Action::SyncRound) {
            break actions;
        }
    };
    assert!(
        matches!(begun[..], [Action::Capture { first: true, .. }]),
        "{begun:?}"
    );
    assert_eq!((b.core.run_pct(), b.core.counters().not_followed), (1, 0));
    b.event(PrimaryEvent::Captured { epoch: 7 });
    let committed = b.committed(7);
    assert_eq!(b.core.run_pct(), 2, "some of its time is given back");
    b.answer(&committed);
    assert_eq!(b.core.state(), PrimaryState::Paired);
}

#[test]
fn checkpoints_that_take_too_long_slow_the_guest_down_and_quick_ones_let_it_go() {
    let mut b = bench(Mode::Remus);
    b.pair();
    let throttle = |actions: &[Action]| {
        actions.iter().find_map(|a| match a {
            Action::Throttle { run_pct } => Some(*run_pct),
            _ => None,
        })
    };
    let begin = b.silence(4_000);
    assert_eq!(throttle(&checkpoint(&mut b, &begin, 3_001).2), Some(70));
    let begin = b.silence(4_000);
    assert_eq!(throttle(&checkpoint(&mut b, &begin, 3_000).2), Some(100));
}

#[test]
fn a_slowed_pair_that_needs_no_checkpoint_gets_its_time_back() {
    let mut b = bench(Mode::Colo);
    b.event(PrimaryEvent::LinkUp);
    b.event(PrimaryEvent::Msg(hello()));
    let (sent_pages, took_us) = (100, 50);
    for dirty_pages in [100, 100, 9] {
        b.event(PrimaryEvent::SyncRound {
            sent_pages,
            dirty_pages,
            took_us,
        });
    }
    assert_eq!(b.core.run_pct(), 50);
    b.event(PrimaryEvent::Captured { epoch: 7 });
    let committed = b.committed(7);
    assert_eq!(
        (b.core.state(), b.core.run_pct()),
        (PrimaryState::Pairing, 70)
    );
    b.answer(&committed);
    assert_eq!(b.core.state(), PrimaryState::Paired);
    b.now += 50_000;
    b.core.peer.as_mut().unwrap().heard_us = b.now;
    b.silence(0);
    assert_eq!(b.core.run_pct(), 100);
}

/// So many looks at a secondary that lives, each finding answers so late; what follows from each.
fn looks(b: &mut Bench, many: u32, late_us: u64) -> Vec<Action> {
    let mut all = Vec::new();
    for _ in 0..many {
        b.now += 1_000;
        b.core.peer.as_mut().unwrap().heard_us = b.now;
        let answers = 4;
        all.extend(b.event(PrimaryEvent::Answers {
            answers,
            late_us: late_us * answers,
        }));
    }
    all
}

#[test]
fn rule_16_a_lag_that_does_not_shrink_slows_the_pvm_and_is_told() {
    let mut b = bench(Mode::Colo);
    b.pair();
    assert_eq!(looks(&mut b, 2, 300), []);
    let slowed = looks(&mut b, 1, 300);
    assert_eq!(
        slowed,
        [
            Action::Tell(Notice::Lags { lag_us: 300 }),
            Action::Throttle { run_pct: 70 },
            Action::Tell(Notice::Throttled { run_pct: 70 }),
        ]
    );
    let more = looks(&mut b, 3, 300);
    assert_eq!(more[0], Action::Throttle { run_pct: 50 }, "told once");
    assert_eq!((b.core.lag_us(), b.core.counters().lag_slowed), (300, 2));
    assert_eq!(b.core.counters().lag_unhelped, 0);
}

#[test]
fn rule_16_time_comes_back_when_the_lag_is_small_and_at_once_when_slowing_does_not_help() {
    let mut b = bench(Mode::Colo);
    b.pair();
    looks(&mut b, 3, 300);
    let back = looks(&mut b, 50, 100);
    assert_eq!(back[0], Action::Throttle { run_pct: 100 });
    let vain = looks(&mut b, 18, 300);
    let unhelped = Action::Tell(Notice::LagUnhelped { lag_us: 300 });
    assert!(vain.contains(&unhelped), "{vain:?}");
    assert_eq!(b.core.run_pct(), 100);
    assert_eq!(b.core.counters().lag_unhelped, 1);
}

#[test]
fn rule_16_neither_checkpoints_nor_the_link_are_lag_and_another_secondary_begins_anew() {
    let mut b = bench(Mode::Colo);
    b.pair();
    let generation = b.core.record().generation;
    let sent_us = b.now - 250;
    b.event(PrimaryEvent::Msg(Msg::Echo {
        generation,
        sent_us,
        begun_epoch: None,
    }));
    assert_eq!(looks(&mut b, 9, 300), []);
    assert_eq!(b.core.lag_us(), 50);
    looks(&mut b, 3, 900);
    assert_eq!(b.core.run_pct(), 70);
    b.event(PrimaryEvent::LinkDown {
        reason: String::new(),
    });
    assert_eq!((b.core.run_pct(), b.core.lag_us()), (100, 0));
    assert_eq!(looks_alone(&mut b), []);
}

/// Nobody is there to lag.
fn looks_alone(b: &mut Bench) -> Vec<Action> {
    let late = PrimaryEvent::Answers {
        answers: 1,
        late_us: 1_000_000,
    };
    let late = core::iter::repeat_n(late, 9);
    late.flat_map(|event| {
        b.now += 1_000;
        b.event(event)
    })
    .collect()
}
