//! Pairs whose guests have an MTU of 9000: datagrams, streams and pages in frames that take several of a guest's buffers, before
//! and after a checkpoint and the loss of a host.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use colo_lab::load::ports;
use colo_lab::netns::Netns;
use colo_lab::pair::{Pair, Settings};
use colo_lab::topology::{GUEST_V4, Host, pcap_frames};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::status::number;
use colo_tests::streams::Streams;
use colo_tests::{both_ways, clients};
use serde_json::Value;

const MTU: u32 = 9000;
/// Payload of the longest datagram over IPv4, and of a segment.
const DATAGRAM_MAX: usize = MTU as usize - 20 - 8;
const SEGMENT_MAX: usize = MTU as usize - 20 - 20;
const PATIENCE: Duration = Duration::from_secs(30);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const HOSTS: [Host; 2] = [Host::A, Host::B];

/// What a pair is made of: the guest's NIC (a mode of AF_XDP, or a TAP device), how the link's packets travel, and the MTU of
/// the link where it is not the laboratory's own.
struct Way {
    xdp: Option<&'static str>,
    packets: &'static str,
    link_mtu: Option<u32>,
}

fn settings(bench: &Bench, compare: Compare, way: &Way) -> Settings {
    let mut settings = compare.settings(bench);
    settings.mtu = MTU;
    settings.xdp = way.xdp.map(str::to_owned);
    settings.packets = way.packets.to_owned();
    settings
}

fn pair(bench: &Bench, compare: Compare, way: &Way) -> Pair {
    let settings = settings(bench, compare, way);
    let topology = settings.topology().unwrap();
    if let Some(mtu) = way.link_mtu {
        for host in HOSTS {
            let line = format!("link set link0 mtu {mtu}\n");
            topology.host(host).batch(&line).unwrap();
        }
    }
    let mut pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    wait_carried(&mut pair, way);
    pair
}

/// Waits until packets of both hosts travel as they should.
fn wait_carried(pair: &mut Pair, way: &Way) {
    let carried = |status: &Value| status["link"]["carrier"] == way.packets;
    for host in HOSTS {
        let process = pair.process(host);
        process.wait_status(way.packets, PATIENCE, carried).unwrap();
    }
}

/// One datagram after the other of all sorts of lengths, in turn shorter and as long as can be; each comes back as it went.
fn datagrams_come_back(client: &Netns, rounds: usize) {
    let echo = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket
            .connect(SocketAddr::from((GUEST_V4, ports::ECHO)))
            .unwrap();
        socket.set_read_timeout(Some(ANSWER_TIMEOUT)).unwrap();
        let lengths = [1, 1400, 2022, 4000, 4083, 8179, 8900, DATAGRAM_MAX];
        let mut heard = vec![0; DATAGRAM_MAX + 1];
        for (n, len) in (0..rounds).flat_map(|_| lengths).enumerate() {
            let said: Vec<u8> = (0..len).map(|at| (at * 7 + at / 253 + n) as u8).collect();
            socket.send(&said).unwrap();
            let count = socket
                .recv(&mut heard)
                .unwrap_or_else(|e| panic!("datagram {n}, {len} bytes: {e}"));
            assert!(heard[..count] == said, "datagram {n}, {len} bytes");
        }
    };
    client.run(echo).unwrap();
}

/// The longest payload of TCP over IPv4 in a capture.
fn longest_segment(pcap: &[u8]) -> usize {
    let frames = pcap_frames(pcap).into_iter().map(|frame| frame.bytes);
    let is_tcp = |frame: &Vec<u8>| frame[12..14] == [0x08, 0x00] && frame[23] == 6;
    let payload = |frame: Vec<u8>| frame.len() - 34 - usize::from(frame[46] >> 4) * 4;
    frames.filter(is_tcp).map(payload).max().unwrap()
}

/// What must not happen to frames on the way has not, on either host.
fn assert_nothing_lost(pair: &mut Pair) {
    for host in HOSTS {
        let status = pair.process(host).status().unwrap();
        for never in [
            "guest_rx_too_small",
            "guest_tx_bad",
            "nic_rx_oversize",
            "nic_rx_errors",
            "nic_tx_errors",
            "ring_errors",
            "copied_scattered_bytes",
        ] {
            let count = number(&status["worker"], never);
            assert_eq!(count, 0, "{never} at {host:?}: {:#}", status["worker"]);
        }
    }
}

/// Causes of divergence that are not a matter of time on a busy machine.
fn unlike(status: &Value) -> Vec<&String> {
    let causes = status["divergences"].as_object().unwrap().keys();
    causes.filter(|name| !name.contains("deadline")).collect()
}

/// How payload left, in the bytes since `before`: in place, and in all.
fn left_since(status: &Value, before: &Value) -> (u64, u64) {
    let grown = |name: &str| number(&status["worker"], name) - number(&before["worker"], name);
    (grown("tx_in_place_bytes"), grown("guest_tx_bytes"))
}

/// Datagrams, pages, requests of `ping` and streams in long frames; then a checkpoint while streams are full, then the loss of
/// the primary while they are, and another secondary.
fn serves_in_long_frames(compare: Compare, way: &Way) {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = pair(&bench, compare, way);
    let before = pair.primary.status().unwrap();
    let capture = bench.dir().join("long.pcap");
    let capture = pair.topology.capture(Host::A, &capture).unwrap();
    datagrams_come_back(&pair.topology.client, 4);
    clients::ping_with(&pair.topology.client, GUEST_V4.into(), DATAGRAM_MAX);
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    let longest = longest_segment(&capture.finish().unwrap());
    assert!((8900..=SEGMENT_MAX).contains(&longest), "{longest}");
    let status = pair.wait_protected(Host::A).unwrap();
    assert_eq!(unlike(&status), Vec::<&String>::new(), "{status:#}");
    compare.assert_used(&status);
    let (in_place, all) = left_since(&status, &before);
    println!("{in_place} of {all} bytes in place: {}", status["worker"]);
    // What is digested was copied for it.
    let most = compare == Compare::Bytes;
    assert!(
        in_place <= all && (in_place > all * 9 / 10) == most,
        "{in_place} of {all}"
    );
    assert_nothing_lost(&mut pair);

    let streams = Streams::start(&pair.topology.client, 4).unwrap();
    let checkpoints = number(&status, "checkpoints");
    clients::ask(&pair.topology.client, "GET", "/random");
    let more = |status: &Value| number(status, "checkpoints") > checkpoints;
    let primary = pair.process(Host::A);
    let status = primary.wait_status("more", PATIENCE, more).unwrap();
    let echoed = number(&status["worker"], "guest_tx_bytes");
    let far = |status: &Value| number(&status["worker"], "guest_tx_bytes") > echoed + (4 << 20);
    pair.primary.wait_status("far", PATIENCE, far).unwrap();
    assert_nothing_lost(&mut pair);
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    println!("{} bytes echoed", streams.finish().unwrap());
    pair.restart(Host::A, "secondary").unwrap();
    pair.wait_protected(Host::B).unwrap();
    wait_carried(&mut pair, way);
    datagrams_come_back(&pair.topology.client, 2);
    clients::ping_with(&pair.topology.client, GUEST_V4.into(), DATAGRAM_MAX);
    assert_nothing_lost(&mut pair);
}

both_ways!(by_tap_over_datagrams_that_are_cut, by_af_xdp_in_the_driver);

fn by_tap_over_datagrams_that_are_cut(compare: Compare) {
    let way = Way {
        xdp: None,
        packets: "udp",
        link_mtu: None,
    };
    serves_in_long_frames(compare, &way);
}

fn by_af_xdp_in_the_driver(compare: Compare) {
    let way = Way {
        xdp: Some("driver"),
        packets: "xdp",
        link_mtu: None,
    };
    serves_in_long_frames(compare, &way);
}

#[test]
fn by_af_xdp_behind_the_driver_over_tcp() {
    let way = Way {
        xdp: Some("generic"),
        packets: "tcp",
        link_mtu: None,
    };
    serves_in_long_frames(Compare::Bytes, &way);
}

#[test]
fn a_link_with_room_for_it_carries_a_long_frame_in_one_datagram() {
    let way = Way {
        xdp: None,
        packets: "udp",
        link_mtu: Some(MTU + 114),
    };
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = pair(&bench, Compare::Bytes, &way);
    datagrams_come_back(&pair.topology.client, 4);
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    for host in HOSTS {
        let status = pair.process(host).status().unwrap();
        assert!(number(&status["link"], "datagrams_sent") > 100);
        assert_eq!(number(&status["link"], "split"), 0, "{}", status["link"]);
    }
    assert_nothing_lost(&mut pair);
}
