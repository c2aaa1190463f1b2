//! Pairs whose workers never sleep, and pairs whose workers sleep whenever there is nothing to do: also where there
//! are more such threads than processors, guests, hosts and clients get on, and a kill is survived.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::Pair;
use colo_lab::topology::{GUEST, Host};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::status::number;
use colo_tests::{both_ways, clients, loads};
use serde_json::Value;

/// So many answers must come before a kill and after it, and in what time.
const ANSWERS: u64 = 2_000;
const PATIENCE: Duration = Duration::from_secs(60);

/// A life of a pair with this `host.poll`: clients, a kill, a new secondary. Gives what both hosts' workers have
/// counted before the kill.
fn live(poll: &str, compare: Compare) -> Option<[Value; 2]> {
    let bench = Bench::new(&clients::PROGRAMS)?;
    let mut settings = compare.settings(&bench);
    settings.poll = poll.to_owned();
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    for guest in GUEST {
        clients::redis_cli(&pair.topology.client, guest);
    }
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 11)).unwrap();
    assert!(load.wait_answers(ANSWERS, PATIENCE), "no answers");
    let before = pair.wait_protected(Host::A).unwrap();
    assert!(number(&before, "compared") > 0, "{before:#}");
    compare.assert_used(&before);
    assert_eq!(number(&before, "takeovers"), 0, "{before:#}");
    let counted =
        [&pair.primary, &pair.secondary].map(|host| host.status().unwrap()["worker"].clone());
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    assert!(load.wait_answers(ANSWERS, PATIENCE), "none after the kill");
    pair.restart(Host::A, "secondary").unwrap();
    pair.wait_protected(Host::B).unwrap();
    assert!(load.wait_answers(ANSWERS, PATIENCE), "none of a new pair");
    let report = load.finish().unwrap();
    loads::assert_survived(&report);
    Some(counted)
}

both_ways!(
    a_pair_that_never_sleeps_serves_and_survives_a_kill,
    a_pair_that_sleeps_at_once_serves_and_survives_a_kill,
);

fn a_pair_that_never_sleeps_serves_and_survives_a_kill(compare: Compare) {
    let Some(counted) = live("busy", compare) else {
        return;
    };
    for worker in counted {
        // The guests would wait for a processor otherwise.
        assert!(number(&worker, "yields") > 0, "{worker:#}");
    }
}

fn a_pair_that_sleeps_at_once_serves_and_survives_a_kill(compare: Compare) {
    let Some(counted) = live("interrupt", compare) else {
        return;
    };
    for worker in counted {
        assert!(number(&worker, "sleeps") > 0, "{worker:#}");
        assert_eq!(number(&worker, "yields"), 0, "{worker:#}");
    }
}
