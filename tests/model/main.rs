//! The comparator against a slow one that was written from the rules: on random traces both must
//! decide the same after every event, with the SVM's output as bytes and as digests.
//!
//! `COLO_MODEL_SEED=n` replays one seed and shows its trace; `COLO_MODEL_SEEDS=count` sets how many
//! are run, `COLO_MODEL_FIRST=n` the first.
#![allow(missing_docs, reason = "a test")]

mod datagrams;
mod decision;
mod guests;
mod message;
mod overdue;
#[allow(dead_code, reason = "shared with the simulation")]
#[path = "../sim/prng.rs"]
mod prng;
mod reference;
mod run;
mod stream;

use decision::Flaw;
use run::{Report, run};

const SEEDS: u64 = if cfg!(debug_assertions) { 500 } else { 5000 };

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn describe(seed: u64, report: &Report) -> String {
    let failure = report.failure.as_deref().unwrap_or("agreed");
    let trace = &report.trace;
    format!("{trace}\nseed {seed}: {failure}\nreplay with COLO_MODEL_SEED={seed}")
}

#[test]
fn both_comparators_decide_the_same() {
    if let Some(seed) = number("COLO_MODEL_SEED") {
        for digests in [false, true] {
            let report = run(seed, Flaw::None, digests);
            println!("digests {digests}: {}", describe(seed, &report));
            assert!(report.failure.is_none());
        }
        return;
    }
    let seeds = number("COLO_MODEL_SEEDS").unwrap_or(SEEDS);
    let first = number("COLO_MODEL_FIRST").unwrap_or(0);
    let mut total = Report::default();
    let mut open = 0;
    for seed in first..first + seeds {
        let report = run(seed, Flaw::None, false);
        assert!(report.failure.is_none(), "{}", describe(seed, &report));
        let digests = run(seed, Flaw::None, true);
        assert!(
            digests.failure.is_none(),
            "with digests: {}",
            describe(seed, &digests)
        );
        total.events += report.events;
        total.matched += report.matched;
        total.free += report.free;
        total.commits += report.commits;
        open += u64::from(report.ended_open);
        for (class, count) in report.divergences {
            *total.divergences.entry(class).or_default() += count;
        }
    }
    println!(
        "{seeds} seeds: {} events, {} matched, {} free, {} commits, divergences {:?}, {open} ended open",
        total.events, total.matched, total.free, total.commits, total.divergences
    );
    if seeds < SEEDS {
        return;
    }
    assert!(open * 10 < seeds, "too many runs end early: {open}");
    assert!(
        total.matched > seeds * 5 && total.divergences.len() >= 9,
        "too little happens"
    );
}

/// Within so many seeds a flaw must show.
const FLAW_SEEDS: u64 = 2000;

fn caught(flaw: Flaw) {
    let shows = |seed: &u64| run(*seed, flaw, false).failure.is_some();
    let seed = (0..FLAW_SEEDS).find(shows);
    println!("{flaw:?}: seed {seed:?}");
    assert!(
        seed.is_some(),
        "{flaw:?} passes as right in {FLAW_SEEDS} seeds"
    );
}

macro_rules! flaws {
    ($($test:ident: $flaw:ident,)*) => {
        $(#[test]
        fn $test() {
            caught(Flaw::$flaw);
        })*
    };
}

flaws! {
    canary_everything_counts_as_equal: AlwaysEqual,
    canary_acks_leave_at_once: NoAckRule,
    canary_leases_are_not_needed: NoLease,
    canary_fins_are_not_compared: NoFin,
    canary_headers_are_not_compared: NoHeaders,
    canary_options_are_not_compared: NoSynOptions,
    canary_resets_are_not_compared: NoReset,
    canary_epochs_are_mixed: EpochsMixed,
    canary_retransmissions_are_not_compared: FreeRetransmissions,
    canary_acknowledged_bytes_are_compared: NoUna,
    canary_committed_bytes_are_compared: NoBase,
    canary_datagrams_are_last_in_first_out: LastInFirstOut,
    canary_datagrams_must_keep_their_order: NoReorder,
    canary_deadlines_run_during_the_backlog: DeadlineFromCommit,
    canary_an_abort_changes_nothing: AbortIgnored,
    canary_reports_come_early: EarlyReport,
    canary_numbers_that_wrap_are_small: WrapUnsafe,
    canary_identifications_count: NoiseCounts,
    canary_policies_are_not_read: NoPolicy,
}
