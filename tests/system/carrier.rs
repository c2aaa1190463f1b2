//! A guest is shown whether its NIC has a link: with a TAP device, over AF_XDP, and as a pair.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::{Duration, Instant};

use colo_lab::netns::Netns;
use colo_lab::pair::{Pair, Settings, Single};
use colo_lab::process::Process;
use colo_lab::topology::{GUEST, Host, TAP, Topology};
use colo_tests::bench::Bench;
use colo_tests::clients;
use serde_json::Value;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// What the guest prints when its link goes or comes.
const DOWN: &str = "colo-guest link down";
const UP: &str = "colo-guest link up";

fn bench(xdp: Option<&str>) -> Option<(Bench, Settings)> {
    let bench = Bench::new(&clients::PROGRAMS)?;
    let mut settings = bench.settings();
    settings.xdp = xdp.map(str::to_owned);
    Some((bench, settings))
}

/// Waits until the guest has printed `line` so many times.
fn wait_line(process: &Process, line: &str, count: usize) {
    let patience = Instant::now() + PATIENCE;
    while process.log().matches(line).count() < count {
        let tail = process.log_tail();
        assert!(
            Instant::now() < patience,
            "not {count} times {line}:\n{tail}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What the guest says of its link, and how often that has changed.
fn link_page(client: &Netns) -> (String, u64) {
    let mut curl = client.command("curl");
    curl.args(["-sS", "--fail", "--max-time", "20", "--retry", "3"]);
    let output = curl.arg(format!("http://{}/link", GUEST[0])).output();
    let output = output.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (state, changes) = text.trim().split_once(' ').unwrap();
    (state.to_owned(), changes.parse().unwrap())
}

/// Takes the link away and gives it back; the guest notices both.
fn bounce(process: &Process, cut: impl FnOnce(), heal: impl FnOnce()) {
    let count = |line| process.log().matches(line).count();
    let (downs, ups) = (count(DOWN), count(UP));
    cut();
    wait_line(process, DOWN, downs + 1);
    heal();
    wait_line(process, UP, ups + 1);
}

fn set_tap(topology: &Topology, host: Host, state: &str) {
    let line = format!("link set {TAP} {state}\n");
    topology.host(host).batch(&line).unwrap();
}

#[test]
fn a_guest_sees_its_tap_device_go_and_come() {
    let Some((bench, settings)) = bench(None) else {
        return;
    };
    let single = Single::start(&settings, bench.dir()).unwrap();
    let topology = &single.topology;
    let (state, before) = link_page(&topology.client);
    assert_eq!(state, "up");
    bounce(
        &single.process,
        || set_tap(topology, Host::A, "down"),
        || set_tap(topology, Host::A, "up"),
    );
    assert_eq!(link_page(&topology.client), ("up".to_owned(), before + 2));
    clients::ping(&topology.client, GUEST[0]);
}

#[test]
fn a_guest_sees_the_carrier_of_an_interface_go_and_come() {
    let Some((bench, settings)) = bench(Some("auto")) else {
        return;
    };
    let single = Single::start(&settings, bench.dir()).unwrap();
    let topology = &single.topology;
    let (state, before) = link_page(&topology.client);
    assert_eq!(state, "up");
    bounce(
        &single.process,
        || topology.cut_uplink(Host::A).unwrap(),
        || topology.heal_uplink(Host::A).unwrap(),
    );
    assert_eq!(link_page(&topology.client), ("up".to_owned(), before + 2));
    clients::ping(&topology.client, GUEST[0]);
}

#[test]
fn a_pair_shows_one_link_and_the_survivor_its_own() {
    let Some((bench, settings)) = bench(None) else {
        return;
    };
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    let topology = &pair.topology;
    let (state, before) = link_page(&topology.client);
    assert_eq!(state, "up");
    // What the NIC showed while it was made, before this host was a secondary, counts, too.
    let changes = |status: &Value| status["worker"]["link_changes"].as_u64().unwrap();
    let shown = changes(&pair.secondary.status().unwrap());
    // The replica's NIC is none of the guest's business.
    set_tap(topology, Host::B, "down");
    bounce(
        &pair.primary,
        || set_tap(topology, Host::A, "down"),
        || set_tap(topology, Host::A, "up"),
    );
    set_tap(topology, Host::B, "up");
    assert_eq!(link_page(&topology.client), ("up".to_owned(), before + 2));
    let secondary = pair.secondary.status().unwrap();
    assert_eq!(changes(&secondary), shown, "{secondary:#}");

    pair.wait_protected(Host::A).unwrap();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    assert_eq!(link_page(&pair.topology.client).0, "up");
    bounce(
        &pair.secondary,
        || set_tap(&pair.topology, Host::B, "down"),
        || set_tap(&pair.topology, Host::B, "up"),
    );
    let (state, after) = link_page(&pair.topology.client);
    assert!(state == "up" && after >= before + 4, "{state} {after}");
}
