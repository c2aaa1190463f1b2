//! A guest on several workers: its flows are spread over them, and clients notice nothing, a kill included.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings, Single};
use colo_lab::topology::{GUEST, Host};
use colo_tests::bench::Bench;
use colo_tests::clients;
use serde_json::Value;

/// Longest wait for answers of the guest.
const PATIENCE: Duration = Duration::from_secs(30);

fn settings(bench: &Bench, xdp: Option<&str>) -> Settings {
    let mut settings = bench.settings();
    settings.shards = 2;
    settings.xdp = xdp.map(str::to_owned);
    settings
}

/// A counter of each worker.
fn each(status: &Value, counter: &str) -> Vec<u64> {
    let workers = status["workers"].as_array().unwrap();
    let of = |worker: &Value| worker[counter].as_u64().unwrap();
    workers.iter().map(of).collect()
}

#[test]
fn a_guest_is_served_by_two_workers() {
    for xdp in [None, Some("auto")] {
        let Some(bench) = Bench::new(&clients::PROGRAMS) else {
            return;
        };
        let single = Single::start(&settings(&bench, xdp), bench.dir()).unwrap();
        clients::curl_keeps_its_connection(&single.topology.client, bench.dir());
        for guest in GUEST {
            clients::ping(&single.topology.client, guest);
        }
        clients::wrk(&single.topology.client, GUEST[0], "/bytes/20000", 16, 2);
        let status = single.process.status().unwrap();
        for counter in ["guest_tx_frames", "guest_rx_frames"] {
            let counts = each(&status, counter);
            assert!(
                counts.iter().all(|&n| n > 100),
                "{xdp:?}: {counter} {counts:?}"
            );
            assert_eq!(counts.iter().sum::<u64>(), status["worker"][counter]);
        }
    }
}

#[test]
fn rule_4_a_pair_of_two_shards_takes_checkpoints_and_survives_a_kill() {
    for xdp in [None, Some("auto")] {
        let Some(bench) = Bench::new(&clients::PROGRAMS) else {
            return;
        };
        let mut pair = Pair::start(&settings(&bench, xdp), bench.dir()).unwrap();
        clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
        clients::curl_sees_state(&pair.topology.client);
        // Some of its answers differ between the guests.
        let load = Load::start(&pair.topology.client, LoadConfig::new(16, 1)).unwrap();
        assert!(load.wait_answers(2000, PATIENCE), "no answers");
        let status = pair.wait_protected(Host::A).unwrap();
        let crossed = each(&status, "crossed_in_frames");
        assert!(crossed.iter().all(|&n| n > 0), "{crossed:?}");
        let number = |key: &str| status[key].as_u64().unwrap();
        assert!(
            number("checkpoints") > 0 && number("released_by_match") > 100,
            "{status}"
        );

        load.mark_kill();
        pair.primary.kill().unwrap();
        pair.wait_alone(Host::B).unwrap();
        assert!(
            load.wait_answers(500, PATIENCE),
            "no answers after the kill"
        );
        // All shards begin in one epoch, so that the next checkpoint covers what each has held.
        pair.restart(Host::A, "secondary").unwrap();
        let before = pair.wait_protected(Host::B).unwrap();
        let checkpoints = |status: &Value| status["checkpoints"].as_u64().unwrap();
        let more = |status: &Value| checkpoints(status) > checkpoints(&before);
        let process = pair.process(Host::B);
        process.wait_status("checkpoint", PATIENCE, more).unwrap();
        assert!(load.wait_answers(500, PATIENCE), "no answers of the pair");
        let report = load.finish().unwrap();
        let survival = report.survival.unwrap();
        assert!(survival.connections_before > 0);
        assert_eq!(survival.connections_lost, 0, "{xdp:?}");
        assert_eq!(
            report.wrong_responses + report.client_errors,
            0,
            "{report:?}"
        );
    }
}

#[test]
fn hosts_with_different_numbers_of_shards_do_not_pair() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = Pair::start(&settings(&bench, None), bench.dir()).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    let mut one = settings(&bench, None);
    one.shards = 1;
    let file = bench.dir().join("one.toml");
    std::fs::write(&file, one.pair_file(Host::B, bench.dir())).unwrap();
    // The device has two queues, which a host with one shard could not open: it needs another.
    let host = pair.topology.host(Host::B);
    host.batch("link del tap0\n").unwrap();
    let output = host
        .command(bench.colo())
        .arg("secondary")
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("host.shards"), "{text}");
}
