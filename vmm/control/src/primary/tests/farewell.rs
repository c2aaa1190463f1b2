//! Links that are given up though both hosts live, seen from the primary.

use super::*;
use crate::farewell::farewell;

fn pages_gone(b: &mut Bench) -> Vec<Action> {
    let reason = "stream 0: nothing moved".into();
    b.event(PrimaryEvent::PagesGone { reason })
}

fn told(actions: &[Action]) -> bool {
    let reason = "stream 0: nothing moved".to_string();
    actions.contains(&Action::Tell(Notice::GivenUp { reason }))
}

#[test]
fn rule_19_a_page_channel_of_no_use_is_told_to_the_secondary_before_the_link_ends() {
    let mut b = Bench::paired(false);
    let epoch = b.stopped();
    let generation = b.core.record().generation;
    let actions = pages_gone(&mut b);
    let word = farewell(generation, "stream 0: nothing moved");
    assert_eq!(actions[0], Action::Send(word));
    assert!(matches!(actions[1], Action::CloseLink { .. }));
    assert!(actions.contains(&Action::Abort { epoch }) && told(&actions));
    assert_eq!(b.core.counters().given_up, 1);
    b.answer(&actions);
    assert_eq!(b.core.state(), PrimaryState::Alone);
    assert_eq!(pages_gone(&mut b), [], "there is no link any more");
}

#[test]
fn rule_19_a_secondary_that_says_farewell_is_let_go_at_once() {
    let mut b = Bench::paired(false);
    let word = farewell(b.core.record().generation, "stream 0: nothing moved");
    let actions = b.event(PrimaryEvent::Msg(word));
    assert!(matches!(actions[1], Action::CloseLink { .. }) && told(&actions));
    b.answer(&actions);
    assert_eq!(b.core.state(), PrimaryState::Alone);
    // It may come back.
    b.pair();
}

#[test]
fn a_synchronisation_without_a_page_channel_ends_with_a_name_and_the_next_one_pairs() {
    for checkpoint in [false, true] {
        let mut b = Bench::new(false);
        match checkpoint {
            true => b.first_capture(),
            false => {
                b.event(PrimaryEvent::LinkUp);
                b.event(PrimaryEvent::Msg(hello()));
            }
        }
        let actions = pages_gone(&mut b);
        assert!(told(&actions) && actions.contains(&Action::GoAlone));
        assert!(
            question(&actions).is_none(),
            "it holds the VM alone already"
        );
        assert_eq!(b.core.counters().given_up, 1);
        b.pair();
    }
}
