//! The primary path takes all its memory in `new`: an allocator that counts watches every call,
//! through everything that two guests, a client, a secondary and a shell may do.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod fixed;
mod life;

use colo_compare::{Cause, PrimaryPath, PrimaryStats};
use fixed::allocations;
use life::connections::inherited_record;
use life::messages::Way;
use life::{Life, Tally, limits};

/// What all lives together have seen, by name.
fn seen(all: &[(PrimaryStats, Tally)]) -> Vec<(String, u64)> {
    let mut seen: Vec<(String, u64)> = Vec::new();
    let mut note = |name: &str, count: &dyn Fn(&(PrimaryStats, Tally)) -> u64| {
        seen.push((name.into(), all.iter().map(count).sum()));
    };
    note("released_by_match", &|(s, _)| s.released_data_by_match);
    note("released_by_checkpoint", &|(s, _)| s.released_by_checkpoint);
    note("released_free", &|(s, _)| s.released_free);
    note("released_by_policy", &|(s, _)| s.released_by_policy);
    note("released_alone", &|(s, _)| s.released_alone);
    note("mirrored", &|(s, _)| s.mirrored);
    note("digests", &|(s, _)| s.digests);
    note("fetched", &|(s, _)| s.fetched);
    note("svm_stale", &|(s, _)| s.svm_stale);
    note("svm_overflow", &|(s, _)| s.svm_overflow);
    note("svm_surplus", &|(s, _)| s.svm_surplus);
    note("history_dropped", &|(s, _)| s.history_dropped);
    note("flows_evicted", &|(s, _)| s.flows_evicted);
    note("flows_expired", &|(s, _)| s.flows_expired);
    note("stripped", &|(s, _)| s.stripped);
    note("pending", &|(_, t)| t.pending);
    note("cuts", &|(_, t)| t.cuts);
    note("commits", &|(_, t)| t.commits);
    note("commits_mute", &|(_, t)| t.commits_mute);
    note("aborts", &|(_, t)| t.aborts);
    note("unmutes", &|(_, t)| t.unmutes);
    note("alone", &|(_, t)| t.alone);
    note("pairs", &|(_, t)| t.pairs);
    note("pairs_again", &|(_, t)| t.pairs_again);
    note("imports", &|(_, t)| t.imports);
    note("announcements", &|(_, t)| t.announcements);
    note("reports", &|(_, t)| t.reports);
    note("without_room", &|(_, t)| t.without_room);
    note("without_nic_room", &|(_, t)| t.without_nic_room);
    note("early_output", &|(_, t)| t.early_output);
    note("retransmissions", &|(_, t)| t.retransmissions);
    let ways = [
        Way::Equal,
        Way::Split,
        Way::Joined,
        Way::Repeated,
        Way::Ignored,
        Way::CutAlike,
        Way::CutOtherwise,
    ];
    for way in ways {
        note(&format!("{way:?}"), &|(_, t)| t.matched[way as usize]);
    }
    for cause in Cause::ALL {
        // The secondary's own.
        if cause != Cause::InputOverflow {
            note(cause.name(), &|(s, _)| {
                s.divergences[cause.index()] + s.requests[cause.index()]
            });
        }
    }
    seen
}

#[test]
fn a_primary_path_takes_no_memory_after_new() {
    let (_, count) = allocations(|| PrimaryPath::new(limits(false)));
    assert!(count > 0, "what is taken is noticed");
    let record = inherited_record();
    let mut all = Vec::new();
    for seed in 0..8 {
        // With rules or translations other ways are gone than without.
        let [has_policy, is_translating, is_tight] = [0, 1, 2].map(|bit| seed >> bit & 1 == 1);
        let record = is_translating.then(|| record.clone());
        let mut life = Life::new(seed, limits(is_tight), has_policy, record);
        (0..60_000).for_each(|_| life.step());
        all.push(life.close());
    }
    let seen = seen(&all);
    for (name, count) in seen {
        assert!(count >= 5, "{name}: only {count} times");
    }
    let differing: u64 = all
        .iter()
        .map(|(_, t)| t.matched[Way::Differs as usize])
        .sum();
    assert_eq!(differing, 0, "what differs left by a match");
}
