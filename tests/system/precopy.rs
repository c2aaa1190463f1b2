//! Pages that travel between checkpoints: the set of the next one is what was written lately, whatever was written since
//! the last one, and nothing depends on any of it.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::topology::Host;
use colo_tests::bench::Bench;
use colo_tests::clients::ask;
use colo_tests::compare::Compare;
use colo_tests::status::number;
use colo_tests::{both_ways, loads};
use serde_json::Value;

const WAIT: Duration = Duration::from_secs(60);
/// Pages that the guest writes once.
const PAGES: u64 = 3_000;

/// Every checkpoint is audited. Two guests that write much do so in their own time.
fn settings(bench: &Bench, lines: &str) -> Settings {
    let lines = format!("[checkpoint]\naudit_every = 1\nahead_interval_ms = 20\n{lines}");
    Settings {
        compare_deadline_ms: 5_000,
        primary_extra: lines.clone(),
        secondary_extra: lines,
        ..bench.settings()
    }
}

/// Has pages written, none of them the same on both guests, or so many of a hundred.
fn dirty(pair: &Pair, pages: u64, same_pct: u32) {
    let answer = ask(
        &pair.topology.client,
        "POST",
        &format!("/dirty/{pages}/{same_pct}/4096"),
    );
    assert_eq!(answer.trim(), pages.to_string());
}

/// Pages sent ahead so far and not written again since: how often that happens depends on how fast the guest writes.
fn sent(status: &Value) -> u64 {
    let ahead = &status["ahead"];
    number(ahead, "sent_pages").saturating_sub(number(ahead, "wasted_pages"))
}

/// Waits until so many pages more than `before` were sent ahead.
fn await_sent(pair: &mut Pair, before: u64, pages: u64) -> Value {
    let all = |status: &Value| sent(status) >= before + pages;
    let status = pair.primary.wait_status("pages sent ahead", WAIT, all);
    status.unwrap()
}

/// A divergence; gives the status when its checkpoint is committed.
fn diverge(pair: &mut Pair) -> Value {
    let before = number(&pair.primary.status().unwrap(), "checkpoints");
    ask(&pair.topology.client, "GET", "/random");
    let more = |status: &Value| number(status, "checkpoints") > before;
    pair.primary
        .wait_status("a checkpoint", WAIT, more)
        .unwrap()
}

/// A large set that was left alone costs the next checkpoint next to nothing.
fn most_of_a_quiet_set_travels_before_it_is_needed(settings: &Settings, bench: &Bench) -> Pair {
    let mut pair = Pair::start(settings, bench.dir()).unwrap();
    for (round, same_pct) in [0, 0, 50].into_iter().enumerate() {
        let before = sent(&pair.primary.status().unwrap());
        dirty(&pair, PAGES, same_pct);
        await_sent(&mut pair, before, PAGES * 9 / 10);
        let status = diverge(&mut pair);
        let last = &status["last_checkpoint"];
        let (union, ahead) = (number(last, "dirty_pages"), number(last, "ahead_pages"));
        assert!(ahead >= PAGES * 9 / 10, "{round}: {last:#}");
        assert!(union - ahead < PAGES / 5, "{round}: {last:#}");
        let counted = &last["ahead"];
        let (used, equal) = (
            number(counted, "used_pages"),
            number(counted, "equal_pages"),
        );
        assert_eq!(used + equal, ahead, "{round}: {last:#}");
        let same = PAGES * u64::from(same_pct) / 100;
        assert!(equal + PAGES / 10 >= same, "{round}: {last:#}");
        // Pages that were sent before are not sent again.
        let most_bytes = (union - ahead + PAGES / 10) * 4096 + ahead * 20;
        assert!(number(last, "sent_bytes") < most_bytes, "{round}: {last:#}");
        assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
        assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
    }
    let used = number(&pair.primary.status().unwrap()["ahead"], "used_pages");
    let applied = |status: &Value| number(&status["ahead_area"], "used_pages") == used;
    let status = pair.secondary.wait_status("applied", WAIT, applied);
    let status = status.unwrap();
    assert_eq!(number(&status["ahead_area"], "refused_chunks"), 0);
    pair
}

/// Kills the primary: the secondary goes on from what came in both ways.
fn survives_a_kill(mut pair: Pair) {
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap();
    assert!(load.wait_answers(1_000, WAIT), "the service stands still");
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    assert!(load.wait_answers(1_000, WAIT), "the service stands still");
    let report = load.finish().unwrap();
    loads::assert_right(&report);
}

#[test]
fn most_of_a_quiet_set_travels_before_it_is_needed_by_the_bitmap() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let settings = settings(&bench, "dirty = \"bitmap\"\n");
    most_of_a_quiet_set_travels_before_it_is_needed(&settings, &bench);
}

#[test]
fn most_of_a_quiet_set_travels_before_it_is_needed_by_the_ring() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let settings = settings(&bench, "dirty = \"ring\"\n");
    most_of_a_quiet_set_travels_before_it_is_needed(&settings, &bench);
}

both_ways!(rule_4_a_quiet_set_of_a_guest_on_two_workers_travels_before_it_is_needed);

fn rule_4_a_quiet_set_of_a_guest_on_two_workers_travels_before_it_is_needed(compare: Compare) {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let settings = Settings {
        shards: 2,
        digests: compare == Compare::Digests,
        ..settings(&bench, "")
    };
    let pair = most_of_a_quiet_set_travels_before_it_is_needed(&settings, &bench);
    survives_a_kill(pair);
}

#[test]
fn rule_21_in_remus_mode_pages_travel_between_periodic_checkpoints() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let mut settings = settings(&bench, "");
    // Long enough for pages to be left alone in between.
    let mode = "mode = \"remus\"\nremus_interval_ms = 400\n";
    for extra in [&mut settings.primary_extra, &mut settings.secondary_extra] {
        extra.insert_str(0, mode);
    }
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    let used = |status: &Value| number(&status["ahead"], "used_pages");
    let mut status = pair.primary.status().unwrap();
    // How many of them go before the checkpoint that their answer waits for depends on when it comes.
    for round in 0.. {
        assert!(round < 20, "too few pages travel ahead: {status:#}");
        dirty(&pair, PAGES, 0);
        status = pair.primary.status().unwrap();
        if round >= 2 && used(&status) >= PAGES {
            break;
        }
    }
    assert_eq!(status["mode"], "remus", "{status:#}");
    assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
    assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
    let used = used(&status);
    let applied = |status: &Value| number(&status["ahead_area"], "used_pages") >= used;
    let waited = pair.secondary.wait_status("applied", WAIT, applied);
    assert_eq!(number(&waited.unwrap()["ahead_area"], "refused_chunks"), 0);
    survives_a_kill(pair);
}

#[test]
fn what_the_secondary_had_is_not_sent_ahead_again() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let mut pair = Pair::start(&settings(&bench, ""), bench.dir()).unwrap();
    // Nothing is known of these pages: all of them go, and three quarters for nothing.
    dirty(&pair, PAGES, 75);
    await_sent(&mut pair, 0, PAGES * 9 / 10);
    let status = diverge(&mut pair);
    let equal = number(&status["last_checkpoint"]["ahead"], "equal_pages");
    assert!(equal > PAGES * 6 / 10, "{status:#}");
    let held_back = |status: &Value| number(&status["ahead"], "held_back_pages");
    for round in 0..2 {
        let before = pair.primary.status().unwrap();
        dirty(&pair, PAGES, 75);
        let decided = |status: &Value| {
            let held_back = held_back(status) - held_back(&before);
            let went = sent(status).saturating_sub(sent(&before));
            held_back >= PAGES * 6 / 10 && went >= PAGES * 2 / 10
        };
        let waited = pair.primary.wait_status("decided about", WAIT, decided);
        waited.unwrap();
        let status = diverge(&mut pair);
        let last = &status["last_checkpoint"];
        let went = &last["ahead"];
        assert!(
            number(went, "equal_pages") < PAGES / 20,
            "{round}: {last:#}"
        );
        assert!(
            number(went, "used_pages") > PAGES * 2 / 10,
            "{round}: {last:#}"
        );
        let bytes = number(last, "sent_bytes") + number(went, "sent_bytes");
        assert!(bytes < PAGES * 4096 * 4 / 10, "{round}: {last:#}");
        assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
        assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
    }
}

#[test]
fn what_does_not_fit_goes_with_the_checkpoint() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let mut settings = settings(&bench, "");
    // The smaller limit counts, whoever has it.
    settings.secondary_extra += "ahead_mib = 4\n";
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    dirty(&pair, PAGES, 0);
    let is_full =
        |status: &Value| number(&status["ahead"], "refused_pages") > 0 && sent(status) > 900;
    pair.primary.wait_status("full", WAIT, is_full).unwrap();
    let status = diverge(&mut pair);
    let last = &status["last_checkpoint"];
    assert!(number(last, "ahead_pages") <= 1024, "{last:#}");
    assert!(number(last, "ahead_pages") > 900, "{last:#}");
    assert!(number(last, "dirty_pages") >= PAGES, "{last:#}");
    assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
    assert_eq!(status["state"], "paired");
}

#[test]
fn rule_22_a_secondary_without_an_area_gets_nothing_ahead() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let mut settings = settings(&bench, "");
    settings.secondary_extra += "ahead_mib = 0\n";
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    dirty(&pair, PAGES, 0);
    let uptime_s = |status: &Value| status["uptime_s"].as_f64().unwrap();
    let since_s = uptime_s(&pair.primary.status().unwrap());
    // So long that all of them would have gone otherwise.
    let later = |status: &Value| uptime_s(status) > since_s + 1.0;
    pair.primary.wait_status("older", WAIT, later).unwrap();
    let status = diverge(&mut pair);
    let last = &status["last_checkpoint"];
    assert!(number(last, "dirty_pages") >= PAGES, "{last:#}");
    assert_eq!(number(last, "ahead_pages"), 0, "{last:#}");
    assert_eq!(number(&status["ahead"], "sent_pages"), 0, "{status:#}");
    assert_eq!(status["state"], "paired");
}

#[test]
fn equal_pages_are_sent_to_prove_it_where_that_is_wanted() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let mut settings = settings(&bench, "verify_one_in = 4\n");
    settings.secondary_extra += "ahead_mib = 0\n";
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    dirty(&pair, PAGES, 50);
    let status = diverge(&mut pair);
    let pages = &status["last_checkpoint"]["pages"];
    let (dropped, proved) = (number(pages, "equal"), number(&pages["same"], "pages"));
    assert!(dropped + proved >= PAGES / 2, "{status:#}");
    assert!(proved >= (dropped + proved) / 4, "{status:#}");
    // What is proved wrong is not applied.
    assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
    assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
}

#[test]
fn rule_14_a_primary_that_dies_with_pages_on_their_way_leaves_the_last_commit() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    // Slowly, so that there are always some on their way.
    let settings = settings(&bench, "ahead_mib_per_s = 1\n");
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    dirty(&pair, 5_000, 0);
    await_sent(&mut pair, 0, 300);
    let status = pair.primary.status().unwrap();
    assert!(number(&status["ahead"], "sent_pages") < 4_500, "{status:#}");
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    // It goes on, and is whole enough to be the primary of another pair.
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap();
    assert!(load.wait_answers(1_000, WAIT), "the service stands still");
    pair.restart(Host::A, "secondary").unwrap();
    pair.wait_protected(Host::B).unwrap();
    let report = load.finish().unwrap();
    loads::assert_right(&report);
}
