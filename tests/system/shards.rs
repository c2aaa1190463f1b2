//! A guest on several workers: its flows are spread over them, and clients notice nothing, a kill included.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::thread;
use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings, Single};
use colo_lab::topology::{GUEST, Host, Topology, UPLINK};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::wire::Wire;
use colo_tests::{both_ways, clients, loads};
use serde_json::Value;

/// Longest wait for answers of the guest.
const PATIENCE: Duration = Duration::from_secs(30);
const HOSTS: [Host; 2] = [Host::A, Host::B];

fn settings(bench: &Bench, compare: Compare, xdp: Option<&str>) -> Settings {
    let mut settings = compare.settings(bench);
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

/// The kernel has guest RAM and frames from the NIC's sockets once, whichever shard they are of; of each shard's frames it
/// has another registration if the link's sockets are on them.
fn assert_registered_once(nic: &Value, settings: &Settings, link_ends: u64) {
    let of_umem = |what: &str| nic[format!("umem_{what}")].as_u64().unwrap();
    println!("{link_ends} with link sockets: {nic}");
    assert_eq!(of_umem("registrations"), 1 + link_ends, "{nic}");
    assert_eq!(of_umem("registered_again"), 0, "{nic}");
    assert!(
        of_umem("registered_bytes") > u64::from(settings.ram_mib) << 20,
        "{nic}"
    );
}

/// Puts an interface with two queues into each host, at the other end of which a bridge has one: all that a host receives
/// comes by its first queue.
fn by_one_queue(topology: &Topology, bridge: &str, interface: &str, ports: [&str; 2]) {
    for (host, port) in HOSTS.into_iter().zip(ports) {
        let far = topology.host(host).name();
        topology
            .switch
            .batch(&format!(
                "link add {port} mtu 2000 numtxqueues 1 numrxqueues 1 type veth \
                 peer name {interface} mtu 2000 numtxqueues 2 numrxqueues 2 netns {far}\n\
                 link set {port} master {bridge} up\n"
            ))
            .unwrap();
        let address = host.link_address();
        let lines = format!("address add {address}/29 dev {interface}\nlink set {interface} up\n");
        topology.host(host).batch(&lines).unwrap();
    }
}

/// The hosts' link goes over a bridge with one queue.
fn link_by_one_queue(settings: &Settings) -> Topology {
    let topology = settings.topology().unwrap();
    topology.host(Host::A).batch("link del link0\n").unwrap();
    let bridge = "link add br1 mtu 2000 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
                  link set br1 up\n";
    topology.switch.batch(bridge).unwrap();
    by_one_queue(&topology, "br1", "link0", ["link-a", "link-b"]);
    topology
}

/// Each host has one interface, for the guest and the link, and the switch one queue for it.
fn all_by_one_queue(settings: &Settings) -> Topology {
    let topology = settings.topology().unwrap();
    topology.host(Host::A).batch("link del link0\n").unwrap();
    for host in HOSTS {
        let line = format!("link del {UPLINK}\n");
        topology.host(host).batch(&line).unwrap();
    }
    by_one_queue(&topology, "br0", UPLINK, HOSTS.map(Host::port));
    topology
}

fn of_link(status: &Value, counter: &str) -> u64 {
    let value = &status["link"][counter];
    value
        .as_u64()
        .unwrap_or_else(|| panic!("link.{counter}: {value}"))
}

/// Waits until a host says that the packets of all its shards go over AF_XDP.
fn wait_xdp(pair: &mut Pair, host: Host) -> Value {
    let is_xdp = |status: &Value| status["link"]["carrier"] == "xdp";
    let status = pair.process(host).wait_status("xdp", PATIENCE, is_xdp);
    let status = status.unwrap();
    for never in ["fallbacks", "foreign", "damaged", "transport_refusals"] {
        assert_eq!(of_link(&status, never), 0, "{never}: {}", status["link"]);
    }
    status
}

/// Serves clients by packets that go over AF_XDP and come to the wrong shard, loses its primary, pairs again.
fn crosses_and_survives(mut pair: Pair, compare: Compare) {
    for (primary, role) in [(Host::A, "secondary"), (Host::B, "")] {
        for host in HOSTS {
            wait_xdp(&mut pair, host);
        }
        let load = Load::start(&pair.topology.client, LoadConfig::new(16, 1)).unwrap();
        assert!(load.wait_answers(1000, PATIENCE), "no answers");
        for host in HOSTS {
            let status = wait_xdp(&mut pair, host);
            println!("{host:?}: {}", status["link"]);
            for counter in ["crossed_out", "crossed_in", "datagrams_sent"] {
                let count = of_link(&status, counter);
                assert!(count > 100, "{counter}: {}", status["link"]);
            }
        }
        compare.assert_used(&pair.process(primary).status().unwrap());
        load.mark_kill();
        pair.process(primary).kill().unwrap();
        pair.wait_alone(primary.other()).unwrap();
        assert!(
            load.wait_answers(300, PATIENCE),
            "no answers after the kill"
        );
        if !role.is_empty() {
            pair.restart(primary, role).unwrap();
            pair.wait_protected(primary.other()).unwrap();
            assert!(load.wait_answers(300, PATIENCE), "no answers of the pair");
        }
        let report = load.finish().unwrap();
        loads::assert_survived(&report);
    }
}

both_ways!(rule_4_the_links_packets_cross_to_their_shards);

fn rule_4_the_links_packets_cross_to_their_shards(compare: Compare) {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let settings = settings(&bench, compare, None);
    let topology = link_by_one_queue(&settings);
    let pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    crosses_and_survives(pair, compare);
}

#[test]
fn rule_4_the_links_packets_cross_where_the_guest_has_the_same_nic() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let compare = Compare::Digests;
    let settings = settings(&bench, compare, Some("auto"));
    let topology = all_by_one_queue(&settings);
    let pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    crosses_and_survives(pair, compare);
}

/// Without a queue for each shard, or where it is told to, all of them use TCP, and it shows.
#[test]
fn with_fewer_queues_than_shards_the_links_packets_go_over_tcp() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let settings = settings(&bench, Compare::Bytes, None);
    let topology = settings.topology().unwrap();
    topology.host(Host::B).batch("link del link0\n").unwrap();
    let far = topology.host(Host::B).name();
    let lines = format!(
        "link add link0 numtxqueues 2 numrxqueues 2 type veth \
         peer name link0 numtxqueues 1 numrxqueues 1 netns {far}\n"
    );
    topology.host(Host::A).batch(&lines).unwrap();
    for host in HOSTS {
        let address = host.link_address();
        let lines = format!("address add {address}/29 dev link0\nlink set link0 up\n");
        topology.host(host).batch(&lines).unwrap();
    }
    let mut pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    clients::wrk(&pair.topology.client, GUEST[0], "/bytes/20000", 16, 1);
    for (host, refusals) in [(Host::A, 0), (Host::B, 2)] {
        let status = pair.process(host).status().unwrap();
        assert_eq!(status["link"]["carrier"], "tcp", "{}", status["link"]);
        let refused = of_link(&status, "transport_refusals");
        assert_eq!(refused, refusals, "{}", status["link"]);
    }
}

#[test]
fn a_guest_is_served_by_two_workers() {
    for xdp in [None, Some("auto")] {
        let Some(bench) = Bench::new(&clients::PROGRAMS) else {
            return;
        };
        let settings = settings(&bench, Compare::Bytes, xdp);
        let single = Single::start(&settings, bench.dir()).unwrap();
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
        if xdp.is_some() {
            assert_registered_once(&status["nic"], &settings, 0);
        }
    }
}

#[test]
fn rule_4_a_pair_of_two_shards_takes_checkpoints_and_survives_a_kill() {
    for (xdp, compare) in [(None, Compare::Bytes), (Some("auto"), Compare::Digests)] {
        let Some(bench) = Bench::new(&clients::PROGRAMS) else {
            return;
        };
        let settings = settings(&bench, compare, xdp);
        let mut pair = Pair::start(&settings, bench.dir()).unwrap();
        clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
        clients::curl_sees_state(&pair.topology.client);
        // Some of its answers differ between the guests.
        let load = Load::start(&pair.topology.client, LoadConfig::new(16, 1)).unwrap();
        assert!(load.wait_answers(2000, PATIENCE), "no answers");
        for host in HOSTS {
            let status = wait_xdp(&mut pair, host);
            if xdp.is_some() {
                assert_registered_once(&status["nic"], &settings, 2);
            }
        }
        let status = pair.wait_protected(Host::A).unwrap();
        let crossed = each(&status, "crossed_in_frames");
        assert!(crossed.iter().all(|&n| n > 0), "{crossed:?}");
        let number = |key: &str| status[key].as_u64().unwrap();
        assert!(
            number("checkpoints") > 0 && number("released_by_match") > 100,
            "{status}"
        );
        compare.assert_used(&status);

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
        loads::assert_survived(&report);
    }
}

#[test]
fn hosts_with_different_numbers_of_shards_do_not_pair() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = Pair::start(&settings(&bench, Compare::Bytes, None), bench.dir()).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    let mut one = settings(&bench, Compare::Bytes, None);
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

/// Where things are in a frame of the link's: `link/datagram`.
const ETHERNET: usize = 14;
const KEY: usize = ETHERNET + 8;
const HEADER: usize = ETHERNET + 48;

/// Frames with data that host a sends over the link while clients are served.
fn link_frames(pair: &Pair, from_a: &Wire, count: usize) -> Vec<Vec<u8>> {
    let client = &pair.topology.client;
    thread::scope(|scope| {
        scope.spawn(|| clients::wrk(client, GUEST[0], "/bytes/20000", 16, 2));
        let frames = std::iter::from_fn(|| from_a.receive(PATIENCE).unwrap());
        let is_data = |frame: &Vec<u8>| {
            frame.len() > HEADER && frame[12..ETHERNET] == [0x88, 0xb5] && frame[ETHERNET + 3] == 0
        };
        frames.filter(is_data).take(count).collect()
    })
}

/// Whoever is on the link's network hears its frames and repeats them, as they were or changed.
#[test]
fn frames_that_are_old_cut_changed_or_foreign_reach_no_shard_and_are_counted() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let settings = settings(&bench, Compare::Bytes, None);
    let topology = link_by_one_queue(&settings);
    let mut pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    for host in HOSTS {
        wait_xdp(&mut pair, host);
    }
    let switch = &pair.topology.switch;
    let wire = |port: &'static str| switch.run(move || Wire::open(port).unwrap()).unwrap();
    let (from_a, to_b) = (wire("link-a"), wire("link-b"));
    let heard = link_frames(&pair, &from_a, 100);
    let shards = [0, 1].map(|bit| heard.iter().any(|frame| frame[KEY] & 1 == bit));
    assert_eq!(shards, [true; 2], "both shards are spoken to");
    let changed = |frame: &[u8], at: usize, bits: u8| {
        let mut frame = frame.to_vec();
        frame[at] ^= bits;
        frame
    };
    let before = pair.secondary.status().unwrap();
    let mut counts = [0; 4];
    // One that finds no room is lost, as from everybody.
    for (n, frame) in heard.iter().cycle().take(10_000).enumerate() {
        // The other shard's key; nobody's; another payload; cut; noise.
        for frame in [
            frame.clone(),
            changed(frame, KEY, 1),
            changed(frame, KEY + 4, 0x40),
            changed(frame, HEADER, 1),
            frame[..HEADER - 1].to_vec(),
            [&frame[..ETHERNET], &[0xdb; 200]].concat(),
        ] {
            to_b.send(&frame).unwrap();
        }
        if n % 20 == 19 {
            let status = pair.secondary.status().unwrap();
            counts = ["duplicates", "damaged", "foreign", "truncated"]
                .map(|counter| of_link(&status, counter) - of_link(&before, counter));
            if counts.iter().all(|&count| count > 100) {
                break;
            }
        }
    }
    assert!(counts.iter().all(|&count| count > 100), "{counts:?}");
    clients::wrk(&pair.topology.client, GUEST[0], "/bytes/20000", 16, 1);
    let status = pair.wait_protected(Host::A).unwrap();
    let causes = status["divergences"].as_object().unwrap();
    let in_time = |cause: &&String| !cause.contains("deadline");
    assert_eq!(causes.keys().find(in_time), None, "{causes:?}");
    for host in HOSTS {
        let status = pair.process(host).status().unwrap();
        assert_eq!(of_link(&status, "fallbacks"), 0, "{}", status["link"]);
        assert_eq!(status["link"]["carrier"], "xdp");
    }
}
