//! Pairs whose hosts have one interface each: the guest's traffic, the link's packets over AF_XDP, its TCP connections and
//! what the hosts say for themselves share it.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::topology::{GUEST, Host, Topology, UPLINK};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::{clients, deaf, loads};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
/// The client's address in the hosts' network.
const CLIENT: &str = "10.78.0.3/29";
const HOSTS: [Host; 2] = [Host::A, Host::B];

/// The network of `settings`, where the hosts reach each other by the interface of their guests.
fn one_nic(settings: &Settings, mtu: u32) -> Topology {
    let topology = settings.topology().unwrap();
    topology.host(Host::A).batch("link del link0\n").unwrap();
    for host in HOSTS {
        let (port, address) = (host.port(), host.link_address());
        let lines = format!("link set {UPLINK} mtu {mtu}\naddress add {address}/29 dev {UPLINK}\n");
        topology.host(host).batch(&lines).unwrap();
        let line = format!("link set {port} mtu {mtu}\n");
        topology.switch.batch(&line).unwrap();
    }
    let line = format!("address add {CLIENT} dev eth0\n");
    topology.client.batch(&line).unwrap();
    topology
}

fn count(status: &Value, part: &str, name: &str) -> u64 {
    let value = &status[part][name];
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{part}.{name}: {value}"))
}

/// Waits until a host says that its packets go through the guest's NIC.
fn wait_shared(pair: &mut Pair, host: Host) -> Value {
    let process = pair.process(host);
    let is_xdp = |status: &Value| status["link"]["carrier"] == "xdp";
    let status = process.wait_status("xdp", PATIENCE, is_xdp).unwrap();
    let carrier = status["nic"]["carrier"].as_str().unwrap();
    assert!(carrier.contains("link packets too"), "{carrier}");
    status
}

/// The host answers a ping and a connection by the same interface.
fn host_is_reached(pair: &Pair, host: Host) {
    let address = host.link_address();
    let client = &pair.topology.client;
    clients::ping(client, address.parse().unwrap());
    let listen = || TcpListener::bind((address, 0)).unwrap();
    let listener = pair.topology.host(host).run(listen).unwrap();
    let to = listener.local_addr().unwrap();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut said = [0; 9];
        stream.read_exact(&mut said).unwrap();
        stream.write_all(&said).unwrap();
    });
    let heard = client.run(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"are you t").unwrap();
        let mut heard = [0; 9];
        stream.read_exact(&mut heard).unwrap();
        heard
    });
    assert_eq!(&heard.unwrap(), b"are you t");
    echo.join().unwrap();
}

/// Serves clients, loses its primary in the middle of that, goes on alone.
fn survives(pair: &mut Pair, primary: Host, compare: Compare) {
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 1)).unwrap();
    assert!(load.wait_answers(300, PATIENCE), "no answers");
    for host in HOSTS {
        let status = wait_shared(pair, host);
        println!("{host:?}: {} {}", status["link"], status["nic"]);
        assert!(count(&status, "link", "datagrams_sent") > 200);
        assert!(count(&status, "nic", "link_frames") > 200);
        for never in ["fallbacks", "foreign", "damaged", "transport_refusals"] {
            assert_eq!(count(&status, "link", never), 0, "{never}");
        }
        for never in ["xdp_link_unbound_frames", "link_spoilt_frames"] {
            assert_eq!(count(&status, "nic", never), 0, "{never}");
        }
    }
    deaf::assert_drops_the_guests_frames(pair, primary.other());
    compare.assert_used(&pair.process(primary).status().unwrap());
    load.mark_kill();
    pair.process(primary).kill().unwrap();
    pair.wait_alone(primary.other()).unwrap();
    assert!(
        load.wait_answers(300, PATIENCE),
        "no answers after the kill"
    );
    let report = load.finish().unwrap();
    loads::assert_survived(&report);
}

fn serves_and_survives(mode: &str, compare: Compare) {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = compare.settings(&bench);
    settings.xdp = Some(mode.to_owned());
    let topology = one_nic(&settings, 1500);
    let mut pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    for host in HOSTS {
        wait_shared(&mut pair, host);
        host_is_reached(&pair, host);
    }
    survives(&mut pair, Host::A, compare);
    let alone = pair.process(Host::B).status().unwrap();
    let carrier = alone["nic"]["carrier"].as_str().unwrap();
    assert!(!carrier.contains("link packets"), "{carrier}");
    pair.restart(Host::A, "secondary").unwrap();
    pair.wait_protected(Host::B).unwrap();
    for host in HOSTS {
        wait_shared(&mut pair, host);
        host_is_reached(&pair, host);
    }
    survives(&mut pair, Host::B, compare);
    for guest in GUEST {
        clients::ping(&pair.topology.client, guest);
    }
    host_is_reached(&pair, Host::A);
}

#[test]
fn one_interface_carries_all_in_the_driver() {
    serves_and_survives("driver", Compare::Bytes);
}

#[test]
fn one_interface_carries_all_behind_the_driver() {
    serves_and_survives("generic", Compare::Digests);
}

#[test]
fn with_a_larger_mtu_frames_are_compared_where_they_were_received() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = bench.settings();
    settings.xdp = Some("auto".to_owned());
    let topology = one_nic(&settings, 2000);
    let mut pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    for host in HOSTS {
        wait_shared(&mut pair, host);
    }
    clients::wrk(&pair.topology.client, GUEST[0], "/bytes/20000", 16, 2);
    for host in HOSTS {
        let status = wait_shared(&mut pair, host);
        println!("{host:?}: {} {}", status["link"], status["nic"]);
        assert_eq!(count(&status, "link", "pool_refusals"), 0);
        assert_eq!(count(&status, "link", "split"), 0);
        let in_place = count(&status, "link", "frames_in_place");
        // What the secondary hears is short.
        assert!(host == Host::B || in_place > 1000, "{}", status["link"]);
    }
}

/// Frames of the guest's that need several buffers of AF_XDP, and several datagrams of the link beside them.
#[test]
fn frames_of_9000_bytes_pass_beside_the_link() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = Compare::Bytes.settings(&bench);
    settings.xdp = Some("driver".to_owned());
    settings.mtu = 9000;
    let topology = one_nic(&settings, 9100);
    let mut pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    for host in HOSTS {
        wait_shared(&mut pair, host);
    }
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    let status = wait_shared(&mut pair, Host::A);
    let frames = count(&status, "worker", "guest_tx_frames");
    let bytes = count(&status, "worker", "guest_tx_bytes");
    assert!(bytes > 3000 * frames, "{bytes} bytes in {frames} frames");
    for never in ["guest_rx_too_small", "guest_tx_bad", "nic_rx_oversize"] {
        assert_eq!(count(&status, "worker", never), 0, "{never}");
    }
    survives(&mut pair, Host::A, Compare::Bytes);
    clients::curl_keeps_its_connection(&pair.topology.client, bench.dir());
    host_is_reached(&pair, Host::B);
}
