//! Guests and pairs whose NIC is an interface over AF_XDP: the clients of `single.rs` and `pair.rs` notice nothing,
//! and the host goes on using the interface.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::netns::Netns;
use colo_lab::pair::{Pair, Settings, Single};
use colo_lab::topology::{GUEST, GUEST_V4, Host, UPLINK, pcap_frames};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::{both_ways, clients, deaf, loads};
use serde_json::Value;

/// Longest wait for answers of the guest.
const PATIENCE: Duration = Duration::from_secs(30);
/// Payload of an echo request whose answer is one frame, longer than those of Ethernet usually are.
const LONG_PING: usize = 1900;
/// An address of host a itself, on the interface that it shares with its guest.
const HOST_ADDRESS: &str = "10.77.0.200";

fn bench(mode: &str) -> Option<(Bench, Settings)> {
    bench_of(mode, Compare::Bytes)
}

fn bench_of(mode: &str, compare: Compare) -> Option<(Bench, Settings)> {
    let bench = Bench::new(&clients::PROGRAMS)?;
    let mut settings = compare.settings(&bench);
    settings.xdp = Some(mode.to_owned());
    Some((bench, settings))
}

fn carrier(status: &Value) -> &str {
    status["nic"]["carrier"].as_str().unwrap()
}

fn host_is_reached(client: &Netns) -> bool {
    let mut ping = client.command("ping");
    ping.args(["-c", "3", "-i", "0.2", "-W", "5", HOST_ADDRESS]);
    let output = ping.output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    output.status.success()
}

fn serves_in(mode: &str, expected: &str) {
    let Some((bench, settings)) = bench(mode) else {
        return;
    };
    let single = Single::start(&settings, bench.dir()).unwrap();
    let client = &single.topology.client;
    clients::curl_keeps_its_connection(client, bench.dir());
    clients::curl_sees_state(client);
    for guest in GUEST {
        clients::ping(client, guest);
        clients::redis_cli(client, guest);
    }
    clients::wrk(client, GUEST[0], "/bytes/20000", 16, 2);
    let status = single.process.status().unwrap();
    assert!(carrier(&status).contains(expected), "{}", carrier(&status));
    println!("{}", status["nic"]);
}

#[test]
fn a_guest_is_served_in_the_driver() {
    serves_in("driver", "driver, copy");
}

#[test]
fn a_guest_is_served_behind_the_driver() {
    serves_in("generic", "generic");
}

#[test]
fn the_host_goes_on_using_the_interface() {
    let Some((bench, settings)) = bench("auto") else {
        return;
    };
    let single = Single::start(&settings, bench.dir()).unwrap();
    let host = single.topology.host(Host::A);
    host.batch(&format!("address add {HOST_ADDRESS}/24 dev {UPLINK}\n"))
        .unwrap();
    clients::wrk(&single.topology.client, GUEST[0], "/bytes/100", 8, 1);
    assert!(host_is_reached(&single.topology.client));
    clients::ping(&single.topology.client, GUEST[0]);
}

both_ways!(
    a_pair_is_served_and_survives_a_kill,
    a_pair_with_long_frames_is_served_and_survives_a_kill,
);

fn a_pair_is_served_and_survives_a_kill(compare: Compare) {
    let Some((bench, settings)) = bench_of("auto", compare) else {
        return;
    };
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    clients::wrk(&pair.topology.client, GUEST[1], "/bytes/20000", 16, 2);
    let status = pair.wait_protected(Host::A).unwrap();
    println!("{} {}", status["nic"], status["worker"]);
    assert!(status["compared"].as_u64().unwrap() > 0, "{status}");
    compare.assert_used(&status);
    let secondary = pair.secondary.status().unwrap();
    let sent = secondary["worker"]["nic_tx_frames"].as_u64().unwrap();
    assert_eq!(sent, 0, "a secondary is silent");
    deaf::assert_drops_the_guests_frames(&mut pair, Host::B);
    survives_a_kill(&mut pair);
}

/// Clients notice nothing when the primary is lost.
fn survives_a_kill(pair: &mut Pair) {
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 1)).unwrap();
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

/// The guest's longest frame with TCP over IPv4, of those that a capture has.
fn longest_tcp_frame(pcap: &[u8]) -> usize {
    let frames = pcap_frames(pcap).into_iter().map(|frame| frame.bytes);
    let is_tcp = |frame: &Vec<u8>| frame[12..14] == [0x08, 0x00] && frame[23] == 6;
    frames
        .filter(is_tcp)
        .map(|frame| frame.len())
        .max()
        .unwrap()
}

fn a_pair_with_long_frames_is_served_and_survives_a_kill(compare: Compare) {
    let Some((bench, mut settings)) = bench_of("auto", compare) else {
        return;
    };
    // As much as the demo guest's buffers take.
    settings.mtu = 2000;
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    let before = pair.primary.status().unwrap();
    let file = bench.dir().join("long.pcap");
    let capture = pair.topology.capture(Host::A, &file).unwrap();
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    clients::ping_with(&pair.topology.client, GUEST_V4.into(), LONG_PING);
    let longest = longest_tcp_frame(&capture.finish().unwrap());
    assert!((1800..=2014).contains(&longest), "{longest}");
    let status = pair.primary.status().unwrap();
    for same in ["protected", "state", "generation"] {
        assert_eq!(status[same], before[same], "{same}: {status:#}");
    }
    compare.assert_used(&status);
    survives_a_kill(&mut pair);
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    clients::ping_with(&pair.topology.client, GUEST_V4.into(), LONG_PING);
}
