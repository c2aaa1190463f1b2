//! Two guests in lockstep, both alive: the clients of `single.rs` notice nothing.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::testpmd::HugePages;
use colo_lab::topology::{GUEST, Host};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::status::number;
use colo_tests::{clients, loads};
use serde_json::Value;

/// Longest wait for answers of the guest.
const PATIENCE: Duration = Duration::from_secs(30);

fn pair() -> Option<(Bench, Pair)> {
    let bench = Bench::new(&clients::PROGRAMS)?;
    let pair = Pair::start(&bench.settings(), bench.dir()).unwrap();
    Some((bench, pair))
}

/// How the primary's payload went out: bytes sent from where they lay, and bytes copied, by cause.
fn ways_of_payload(status: &Value) -> (u64, Vec<(String, u64)>) {
    let worker = status["worker"].as_object().unwrap();
    let copied = worker
        .iter()
        .filter(|(name, _)| name.starts_with("copied_"));
    let copied = copied.map(|(name, bytes)| (name.clone(), bytes.as_u64().unwrap()));
    (
        number(&status["worker"], "tx_in_place_bytes"),
        copied.collect(),
    )
}

#[test]
fn long_payload_leaves_uncopied_and_stages_are_timed() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = bench.settings();
    settings.stages = true;
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    clients::wrk(&pair.topology.client, GUEST[0], "/bytes/20000", 8, 3);
    assert_paired(&mut pair);
    let status = pair.primary.status().unwrap();
    let (in_place, copied) = ways_of_payload(&status);
    let all: u64 = in_place + copied.iter().map(|(_, bytes)| bytes).sum::<u64>();
    println!("in place: {in_place} of {all} bytes; copied: {copied:?}");
    assert!(in_place <= number(&status["worker"], "guest_tx_bytes"));
    let share = status["tx_in_place_pct"].as_f64().unwrap();
    assert!((90.0..=100.0).contains(&share), "{share} % in place");
    for stage in status["stages"].as_array().unwrap() {
        assert!(number(stage, "count") > 0, "{}", stage["stage"]);
        assert!(number(stage, "p50_ns") <= number(stage, "max_ns"));
    }
    let out = bench.dir().join("hgrm");
    std::fs::create_dir(&out).unwrap();
    let socket = pair.primary.status_socket().unwrap().to_owned();
    let export = std::process::Command::new(bench.colo())
        .arg("status")
        .arg(&socket)
        .arg("--hgrm")
        .arg(&out)
        .output()
        .unwrap();
    assert!(export.status.success(), "{export:?}");
    for stage in ["nic_to_guest", "guest_to_compare", "hold", "compare_to_nic"] {
        let text = std::fs::read_to_string(out.join(format!("{stage}.hgrm"))).unwrap();
        let last = text.lines().rfind(|line| !line.starts_with('#')).unwrap();
        let quantile: f64 = last.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert_eq!(quantile, 1.0, "{stage}: {text}");
    }
}

/// The pair is still one, and has compared something.
fn assert_paired(pair: &mut Pair) {
    let status = pair.wait_protected(Host::A).unwrap();
    assert_eq!(
        (&status["role"], &status["state"]),
        (&"primary".into(), &"paired".into())
    );
    assert!(number(&status, "compared") > 0, "{status}");
}

#[test]
fn curl_and_ping_notice_nothing() {
    let Some((bench, mut pair)) = pair() else {
        return;
    };
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    clients::curl_sees_state(&pair.topology.client);
    for guest in GUEST {
        clients::ping(&pair.topology.client, guest);
    }
    assert_paired(&mut pair);
}

/// Clients of a pair whose compared payload leaves like this. Gives the bytes that left in place, and those that
/// were copied for the comparison.
fn payload_sent(tx: &str) -> Option<(u64, u64)> {
    let bench = Bench::new(&clients::PROGRAMS)?;
    let mut settings = bench.settings();
    settings.tx = tx.to_owned();
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    clients::wrk(&pair.topology.client, GUEST[1], "/bytes/20000", 8, 2);
    assert_paired(&mut pair);
    let (in_place, copied) = ways_of_payload(&pair.primary.status().unwrap());
    let compared = copied
        .iter()
        .find(|(name, _)| name == "copied_compared_bytes");
    Some((in_place, compared.unwrap().1))
}

#[test]
fn rule_10_payload_may_leave_in_place_under_a_checksum() {
    if let Some((in_place, copied)) = payload_sent("in-place") {
        assert!(in_place > copied, "{in_place} in place, {copied} copied");
    }
}

#[test]
fn rule_10_payload_may_be_copied_before_it_is_compared() {
    if let Some((in_place, copied)) = payload_sent("exact") {
        assert!(copied > in_place, "{in_place} in place, {copied} copied");
    }
}

fn digesting_pair() -> Option<(Bench, Pair)> {
    let bench = Bench::new(&clients::PROGRAMS)?;
    let pair = Pair::start(&Compare::Digests.settings(&bench), bench.dir()).unwrap();
    Some((bench, pair))
}

#[test]
fn digests_take_little_of_the_link_and_clients_notice_nothing() {
    let Some((bench, mut pair)) = digesting_pair() else {
        return;
    };
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    clients::curl_sees_state(&pair.topology.client);
    for guest in GUEST {
        clients::redis_cli(&pair.topology.client, guest);
        clients::ping(&pair.topology.client, guest);
    }
    assert_paired(&mut pair);
    let link_bytes = |pair: &Pair| {
        let status = pair.primary.status().unwrap();
        (
            number(&status, "link_bytes"),
            number(&status["worker"], "guest_tx_bytes"),
        )
    };
    let mut shares = [0.0; 3];
    for share in &mut shares {
        let before = link_bytes(&pair);
        clients::wrk(&pair.topology.client, GUEST[0], "/bytes/1000000", 4, 2);
        let after = link_bytes(&pair);
        let (link, output) = (after.0 - before.0, after.1 - before.1);
        *share = link as f64 / output as f64;
        println!(
            "link {link} bytes both ways for {output} bytes of output: {:.2} %",
            *share * 100.0
        );
    }
    shares.sort_by(f64::total_cmp);
    // Lost and repeated datagrams are in it, and the mirrored input, of which the client decides: it acknowledges each
    // segment or every other one.
    assert!(shares[1] < 0.05, "{shares:?}");
    assert_paired(&mut pair);
    let status = pair.primary.status().unwrap();
    assert!(number(&status, "digests") > 1000, "{status}");
    println!(
        "{} digests, {} fetched",
        status["digests"], status["fetched"]
    );
}

#[test]
fn a_pair_that_compares_digests_survives_a_kill() {
    let Some((_bench, mut pair)) = digesting_pair() else {
        return;
    };
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap();
    assert!(load.wait_answers(200, PATIENCE), "no answers");
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    assert!(
        load.wait_answers(200, PATIENCE),
        "no answers after the kill"
    );
    let report = load.finish().unwrap();
    loads::assert_survived(&report);
}

#[test]
fn wrk_notices_nothing() {
    let Some((_bench, mut pair)) = pair() else {
        return;
    };
    for (guest, path) in GUEST.into_iter().zip(["/bytes/100", "/bytes/20000"]) {
        let rate = clients::wrk(&pair.topology.client, guest, path, 32, 3);
        println!("pair: wrk {path}: {:.0} requests/s", rate.per_second);
    }
    assert_paired(&mut pair);
}

#[test]
fn redis_clients_notice_nothing() {
    let Some((_bench, mut pair)) = pair() else {
        return;
    };
    for guest in GUEST {
        clients::redis_cli(&pair.topology.client, guest);
    }
    for pipeline in [1, 16] {
        let rates = clients::redis_benchmark(&pair.topology.client, GUEST[0], pipeline);
        println!("pair: redis-benchmark -P {pipeline}: {rates:?}");
    }
    assert_paired(&mut pair);
}

#[test]
fn what_does_not_diverge_is_released_by_match() {
    let Some((_bench, mut pair)) = pair() else {
        return;
    };
    let before = pair.primary.status().unwrap();
    let mut config = LoadConfig::new(16, 1);
    config.deterministic = true;
    let load = Load::start(&pair.topology.client, config).unwrap();
    assert!(load.wait_answers(10_000, Duration::from_secs(60)));
    let report = load.finish().unwrap();
    loads::assert_right(&report);
    let after = pair.primary.status().unwrap();
    let grown = |key| number(&after, key) - number(&before, key);
    let (matched, covered) = (
        grown("released_data_by_match"),
        grown("released_data_by_checkpoint"),
    );
    println!("data packets: {matched} by match, {covered} by checkpoint");
    assert!(matched > 1000 && matched >= 99 * covered, "{after:#}");
    assert_paired(&mut pair);
}

/// A line of the log that says where two answers differ, with the bytes of both guests.
fn shows_a_divergence(line: &str) -> bool {
    let bytes = |name: &str| -> Option<String> {
        let hex = line.split_once(name)?.1.chars();
        Some(hex.take_while(char::is_ascii_hexdigit).collect())
    };
    let (primary, secondary) = (bytes(": primary "), bytes(", secondary "));
    line.contains("checkpoint wanted: payload in Tcp ")
        && line.contains(" at byte ")
        && primary.as_ref().is_some_and(|bytes| !bytes.is_empty())
        && primary != secondary
}

#[test]
fn what_diverges_is_released_by_checkpoint() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = bench.settings();
    settings.environment[0].push(("COLO_LOG".to_owned(), "debug".to_owned()));
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    let load = Load::start(&pair.topology.client, LoadConfig::new(16, 2)).unwrap();
    assert!(load.wait_answers(10_000, Duration::from_secs(60)));
    let report = load.finish().unwrap();
    loads::assert_right(&report);
    let status = pair.primary.status().unwrap();
    assert!(number(&status, "checkpoints") > 0, "{status:#}");
    assert!(number(&status, "released_by_checkpoint") > 0, "{status:#}");
    assert!(
        pair.primary.log().lines().any(shows_a_divergence),
        "no divergence in {}",
        pair.primary.log_tail()
    );
    assert_paired(&mut pair);
}

#[test]
fn checkpoints_come_periodically_when_asked_for_and_cover_what_was_written() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = bench.settings();
    settings.checkpoint_interval_ms = 50;
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    clients::redis_cli(&pair.topology.client, GUEST[0]);
    let several = |status: &Value| number(status, "checkpoints") >= 10;
    let status = pair
        .primary
        .wait_status("ten checkpoints", Duration::from_secs(30), several)
        .unwrap();
    assert!(
        number(&status["checkpoint_pause_us"], "max") > 0,
        "{status:#}"
    );
    assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
    let last = &status["last_checkpoint"];
    assert!(number(last, "audit_us") > 0, "audited: {last:#}");
    assert_eq!(last["cause"], "periodic");
    let sum = |document: &Value, parts: &[&str]| -> u64 {
        parts.iter().map(|part| number(document, part)).sum()
    };
    let parts = ["quiesce_us", "state_us", "collect_us", "stabilise_us"];
    let parts = sum(last, &parts) + sum(last, &["audit_us", "resume_us"]);
    assert_eq!(parts, number(last, "pause_us"), "{last:#}");
    let applied = pair.secondary.status().unwrap()["last_checkpoint"].take();
    let parts = ["write_us", "load_us", "audit_us", "resume_us"];
    assert_eq!(sum(&applied, &parts), number(&applied, "apply_us"));
    assert!(
        parts.iter().all(|part| number(&applied, part) > 0),
        "{applied:#}"
    );
    assert!(number(&applied, "stage_us") > 0, "{applied:#}");
    let pages = &status["pages"];
    let sent: u64 = ["zero", "delta", "lz4", "raw"]
        .iter()
        .map(|kind| number(&pages[kind], "pages"))
        .sum();
    assert!(sent > 0 && number(pages, "equal") > 0, "{pages:#}");
    assert_paired(&mut pair);
}

/// Memory of huge pages that a process has, in KiB.
fn huge_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let of = |line: &str| -> Option<u64> {
        let (name, value) = line.split_once(':')?;
        let is_huge = matches!(name, "Shared_Hugetlb" | "Private_Hugetlb");
        is_huge.then(|| value.trim().trim_end_matches(" kB").parse().unwrap())
    };
    text.lines().filter_map(of).sum()
}

#[test]
fn memory_of_huge_pages_stays_so_when_dirty_logging_begins() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let settings = Settings {
        huge_pages: true,
        ..bench.settings()
    };
    // Of both guests.
    let _reserved = HugePages::reserve(2 * settings.ram_mib as usize).unwrap();
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    clients::redis_cli(&pair.topology.client, GUEST[0]);
    let status = pair.primary.status().unwrap();
    assert_eq!(status["dirty_logging"], true, "{status:#}");
    let kib = [&pair.primary, &pair.secondary].map(|host| huge_kib(host.pid()));
    assert!(kib.iter().all(|kib| *kib > 0), "{kib:?}");
    // What runs on alone has no less, and logs nothing.
    pair.secondary.kill().unwrap();
    let off = |status: &Value| status["dirty_logging"] == false;
    let timeout = Duration::from_secs(30);
    pair.primary
        .wait_status("logs nothing", timeout, off)
        .unwrap();
    assert!(huge_kib(pair.primary.pid()) >= kib[0]);
}
