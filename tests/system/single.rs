//! `colo run`: one guest, and clients that no one here wrote.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::Single;
use colo_lab::topology::GUEST;
use colo_tests::bench::Bench;
use colo_tests::streams::Streams;
use colo_tests::{clients, loads};

fn single() -> Option<(Bench, Single)> {
    let bench = Bench::new(&clients::PROGRAMS)?;
    let single = Single::start(&bench.settings(), bench.dir()).unwrap();
    Some((bench, single))
}

#[test]
fn curl_gets_every_byte_over_one_connection() {
    let Some((bench, single)) = single() else {
        return;
    };
    clients::curl_keeps_its_connection(&single.topology.client, bench.dir());
    clients::curl_sees_state(&single.topology.client);
}

#[test]
fn wrk_sees_no_error() {
    let Some((_bench, single)) = single() else {
        return;
    };
    for (guest, path) in GUEST.into_iter().zip(["/bytes/100", "/bytes/20000"]) {
        let rate = clients::wrk(&single.topology.client, guest, path, 32, 3);
        println!("wrk {path}: {:.0} requests/s", rate.per_second);
    }
}

#[test]
fn redis_cli_gets_redis_answers() {
    let Some((_bench, single)) = single() else {
        return;
    };
    for guest in GUEST {
        clients::redis_cli(&single.topology.client, guest);
    }
}

#[test]
fn redis_benchmark_measures_every_command() {
    let Some((_bench, single)) = single() else {
        return;
    };
    for pipeline in [1, 16] {
        let rates = clients::redis_benchmark(&single.topology.client, GUEST[0], pipeline);
        println!("redis-benchmark -P {pipeline}: {rates:?}");
    }
}

#[test]
fn ping_loses_nothing() {
    let Some((_bench, single)) = single() else {
        return;
    };
    for guest in GUEST {
        clients::ping(&single.topology.client, guest);
    }
}

#[test]
fn checked_load_on_256_connections_finds_nothing_wrong() {
    let Some((_bench, single)) = single() else {
        return;
    };
    let load = Load::start(&single.topology.client, LoadConfig::new(288, 1)).unwrap();
    assert!(load.wait_answers(20_000, Duration::from_secs(60)));
    let open = load.mark_kill();
    assert!(open >= 256, "{open} connections open at once");
    let report = load.finish().unwrap();
    let probe = report.probe.unwrap();
    loads::assert_right(&report);
    assert_eq!(report.requests, report.responses);
    assert!(
        report.responses > 1000 && report.audited > 1000 && probe.answered > 0,
        "{report:?}"
    );
}

#[test]
fn full_streams_come_back_whole() {
    let Some((_bench, single)) = single() else {
        return;
    };
    let streams = Streams::start(&single.topology.client, 16).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let bytes = streams.finish().unwrap();
    assert!(bytes > 1 << 20, "{bytes} bytes in a second");
}

#[test]
fn a_terminated_guest_ends_in_order() {
    let Some((_bench, mut single)) = single() else {
        return;
    };
    single.process.terminate().unwrap();
    let status = single.process.wait_exit(Duration::from_secs(20)).unwrap();
    assert!(status.success(), "{status}\n{}", single.process.log_tail());
}

#[test]
fn invariant_8_a_guest_that_is_not_replicated_has_no_thread_of_a_pair() {
    let Some((_bench, single)) = single() else {
        return;
    };
    let tasks = std::fs::read_dir(format!("/proc/{}/task", single.process.pid())).unwrap();
    let mut names: Vec<_> = tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap())
        .map(|name| name.trim().to_owned())
        // KVM lists a kernel thread of its own there.
        .filter(|name| !name.starts_with("kvm-"))
        .collect();
    names.sort();
    assert_eq!(names, ["colo", "vcpu0", "worker"]);
    let status = single.process.status().unwrap();
    assert!(status.get("compared").is_none(), "{status:#}");
}
