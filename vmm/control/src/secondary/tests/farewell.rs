//! Links that are given up though both hosts live, seen from the secondary.

use super::*;

const REASON: &str = "stream 0: nothing moved";

fn pages_gone(b: &mut Bench) -> Vec<Action> {
    let reason = REASON.into();
    b.event(SecondaryEvent::PagesGone { reason })
}

fn wait(b: &mut Bench, us: u64) -> Vec<Action> {
    b.now += us;
    b.core.handle_timeout(b.now);
    core::iter::from_fn(|| b.core.poll_action()).collect()
}

fn asks(actions: &[Action]) -> bool {
    actions.iter().any(|a| matches!(a, Action::Arbiter(_)))
}

#[test]
fn rule_19_a_page_channel_of_no_use_is_no_reason_to_take_over() {
    let mut b = Bench::staging();
    let told = Action::Send(farewell(4, REASON));
    assert_eq!(pages_gone(&mut b), [told, Action::Abort { epoch: 8 }]);
    assert_eq!(b.stop_svm(9), [], "nothing would come of it");
    // The primary ends the link, and asks the arbiter before this host does.
    assert!(!asks(&b.lose_peer()));
    assert_eq!(b.core.state(), SecondaryState::TakingOver);
    assert!(!asks(&wait(&mut b, T.detection_us() - 1)));
    assert!(asks(&wait(&mut b, 1)));
}

#[test]
fn rule_19_a_primary_that_says_farewell_lives() {
    let mut b = Bench::standby();
    assert_eq!(b.msg(farewell(4, REASON)), []);
    assert!(!asks(&b.lose_peer()));
    assert!(asks(&wait(&mut b, T.detection_us())));
    // Without the word the end of a connection is the primary's.
    assert!(asks(&Bench::standby().lose_peer()));
}

#[test]
fn rule_19_a_primary_that_does_not_end_the_link_is_left() {
    let mut b = Bench::standby();
    pages_gone(&mut b);
    // It lives, as its heartbeats say.
    let (generation, sent_us) = (4, 0);
    b.now += T.detection_us() - 1;
    let answer = b.msg(Msg::Heartbeat {
        generation,
        sent_us,
    });
    assert_eq!(answer, [], "rule 18: its lease ends before");
    let actions = wait(&mut b, 1);
    assert!(
        matches!(actions[0], Action::CloseLink { .. }),
        "{actions:?}"
    );
    assert!(asks(&actions));
}

#[test]
fn rule_13_a_page_channel_that_goes_behind_the_commit_point_undoes_nothing() {
    let mut b = Bench::staging();
    b.event(SecondaryEvent::Staged { epoch: 8 });
    assert_eq!(pages_gone(&mut b), [Action::Send(farewell(4, REASON))]);
    assert_eq!(b.event(SecondaryEvent::Applied { epoch: 8 }), []);
    assert_eq!(b.core.state(), SecondaryState::Standby);
}

#[test]
fn without_a_state_a_page_channel_that_goes_ends_the_session() {
    let mut b = Bench::syncing();
    let told = Action::Send(farewell(3, REASON));
    let ended = Action::Stop(Outcome::NotSynced);
    assert_eq!(pages_gone(&mut b), [told, ended]);
}
