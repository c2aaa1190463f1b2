//! Remus mode: by the operator's wish, and by itself in a storm of divergences (rule 21).

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::topology::Host;
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::status::number;
use colo_tests::{both_ways, clients, loads};
use serde_json::Value;

const ANSWERS: u64 = 1_000;
const TIMEOUT: Duration = Duration::from_secs(60);

/// Both hosts get `lines` in their section of replication.
fn start(bench: &Bench, compare: Compare, lines: &str) -> Pair {
    let mut settings: Settings = compare.settings(bench);
    (settings.primary_extra, settings.secondary_extra) = (lines.to_owned(), lines.to_owned());
    Pair::start(&settings, bench.dir()).unwrap()
}

/// Kills the primary: the secondary goes on, and no client can tell.
fn survives_a_kill(mut pair: Pair, load: Load) {
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    assert!(
        load.wait_answers(ANSWERS, TIMEOUT),
        "the service stands still"
    );
    let report = load.finish().unwrap();
    loads::assert_right(&report);
}

#[test]
fn rule_21_a_pair_in_remus_mode_compares_nothing_and_survives_a_kill() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = start(
        &bench,
        Compare::Bytes,
        "mode = \"remus\"\nremus_interval_ms = 20\n",
    );
    let load = Load::start(&pair.topology.client, LoadConfig::new(16, 3)).unwrap();
    assert!(
        load.wait_answers(ANSWERS, TIMEOUT),
        "the service stands still"
    );
    let several = |status: &Value| number(status, "checkpoints") >= 10;
    let status = pair
        .primary
        .wait_status("ten checkpoints", TIMEOUT, several)
        .unwrap();
    assert_eq!(status["mode"], "remus", "{status:#}");
    assert_eq!(number(&status, "released_by_match"), 0, "{status:#}");
    assert_eq!(number(&status, "released_free"), 0, "{status:#}");
    assert!(
        number(&status, "released_by_checkpoint") >= ANSWERS,
        "{status:#}"
    );
    survives_a_kill(pair, load);
}

both_ways!(rule_21_a_storm_of_divergences_leads_to_remus_mode_and_a_kill_there_is_survived);

fn rule_21_a_storm_of_divergences_leads_to_remus_mode_and_a_kill_there_is_survived(
    compare: Compare,
) {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = start(
        &bench,
        compare,
        "storm_share_pct = 1\nstorm_window_ms = 1000\n",
    );
    let load = Load::start(&pair.topology.client, LoadConfig::new(16, 3)).unwrap();
    let stormy = |status: &Value| status["mode"] == "remus";
    let status = pair
        .primary
        .wait_status("a storm", TIMEOUT, stormy)
        .unwrap();
    assert!(number(&status, "storms") > 0, "{status:#}");
    compare.assert_used(&status);
    assert!(
        load.wait_answers(ANSWERS, TIMEOUT),
        "the service stands still"
    );
    survives_a_kill(pair, load);
}
