//! What happens to a guest when its host's NIC changes under it, or cannot be had: the guest runs on, or the command
//! says why not and ends.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::netns::Netns;
use colo_lab::pair::{Settings, Single};
use colo_lab::topology::{GUEST, Host, TAP, Topology, UPLINK};
use colo_tests::bench::Bench;
use colo_tests::clients;
use serde_json::Value;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// The host cannot do what the configuration says.
const FAILED: i32 = 1;
/// A `colo` that starts in spite of it ends like this.
const LIMIT_SECONDS: [&str; 2] = ["--kill-after=5", "20"];

fn bench(xdp: Option<&str>) -> Option<(Bench, Settings)> {
    let programs = [&clients::PROGRAMS[..], &["ethtool", "timeout"]].concat();
    let bench = Bench::new(&programs)?;
    let mut settings = bench.settings();
    settings.xdp = xdp.map(str::to_owned);
    Some((bench, settings))
}

/// `ethtool -L INTERFACE rx QUEUES tx QUEUES`
fn set_queues(netns: &Netns, interface: &str, queues: u32) -> Output {
    let queues = queues.to_string();
    let mut ethtool = netns.command("ethtool");
    ethtool.args(["-L", interface, "rx", &queues, "tx", &queues]);
    ethtool.output().unwrap()
}

/// Makes host a's uplink anew: it can have so many queues, of which it and the switch use so many.
fn make_uplink(topology: &Topology, queues_max: u32, queues: u32) {
    let (port, far) = (Host::A.port(), topology.host(Host::A).name());
    let side = format!("numtxqueues {queues_max} numrxqueues {queues_max}");
    let lines = format!(
        "link add {port} {side} type veth peer name {UPLINK} {side} netns {far}\n\
         link set {port} master br0 up\n"
    );
    topology.switch.batch(&lines).unwrap();
    for (netns, interface) in [(&topology.switch, port), (topology.host(Host::A), UPLINK)] {
        let set = set_queues(netns, interface, queues);
        assert!(queues == queues_max || set.status.success(), "{set:?}");
    }
    bring_up(topology);
}

fn bring_up(topology: &Topology) {
    let line = format!("link set {UPLINK} up\n");
    topology.host(Host::A).batch(&line).unwrap();
}

fn delete(topology: &Topology, interface: &str) {
    let line = format!("link del {interface}\n");
    topology.host(Host::A).batch(&line).unwrap();
}

fn counter(status: &Value, name: &str) -> u64 {
    let value = &status["nic"][name];
    let number = value.as_u64();
    number.unwrap_or_else(|| panic!("nic.{name}: {}", status["nic"]))
}

/// Waits until a counter of the NIC says so, and gives how the NIC works then.
fn wait_for(single: &mut Single, name: &str, count: u64) -> String {
    let reached = |status: &Value| counter(status, name) == count;
    let status = single.process.wait_status(name, PATIENCE, reached).unwrap();
    status["nic"]["carrier"].as_str().unwrap().to_owned()
}

/// Clients that notice nothing.
struct Clients(Load);

impl Clients {
    fn start(single: &Single) -> Self {
        let config = LoadConfig {
            // A connection that meets two losses in a row waits for its own retransmission, longer each time.
            request_timeout: Duration::from_secs(60),
            ..LoadConfig::new(8, 1)
        };
        let clients = Self(Load::start(&single.topology.client, config).unwrap());
        clients.are_served();
        clients
    }

    fn are_served(&self) {
        assert!(self.0.wait_answers(300, PATIENCE), "no answers");
    }

    /// Each of them is answered in the end, by the connection that it had before the NIC was lost.
    fn finish(self) {
        let report = self.0.finish().unwrap();
        let survival = report.survival.unwrap();
        assert!(survival.connections_before > 0);
        assert_eq!(survival.connections_lost, 0);
        let errors = report.wrong_responses + report.client_errors;
        assert_eq!(errors, 0, "{report:?}");
    }
}

#[test]
fn a_guest_runs_on_when_the_queues_of_its_nic_change() {
    let Some((bench, settings)) = bench(Some("auto")) else {
        return;
    };
    let topology = settings.topology().unwrap();
    delete(&topology, UPLINK);
    make_uplink(&topology, 3, 1);
    let mut single = Single::start_in(topology, &settings, bench.dir(), &[]).unwrap();
    let before = wait_for(&mut single, "queues_added", 0);
    assert!(before.contains("driver, copy, 1 queue"), "{before}");
    let clients = Clients::start(&single);

    let host = single.topology.host(Host::A);
    let set = set_queues(host, UPLINK, 3);
    assert!(set.status.success(), "{set:?}");
    let more = wait_for(&mut single, "queues_added", 2);
    assert!(more.contains("driver, copy, 3 queues"), "{more}");
    // Now the switch may send by as many.
    let set = set_queues(&single.topology.switch, Host::A.port(), 3);
    assert!(set.status.success(), "{set:?}");
    clients.are_served();

    // The kernel does not take a queue away that has a socket.
    let set = set_queues(single.topology.host(Host::A), UPLINK, 1);
    assert!(!set.status.success(), "{set:?}");
    clients.are_served();
    let same = wait_for(&mut single, "nic_losses", 0);
    assert!(same.contains("driver, copy, 3 queues"), "{same}");

    // What has fewer queues is another interface of that name.
    clients.0.mark_kill();
    for (losses, queues) in [(1, 2), (2, 1)] {
        delete(&single.topology, UPLINK);
        let lost = wait_for(&mut single, "nic_losses", losses);
        assert!(lost.contains(", lost"), "{lost}");
        make_uplink(&single.topology, queues, queues);
        let back = wait_for(&mut single, "nic_returns", losses);
        assert!(
            back.contains(&format!("driver, copy, {queues} queue")),
            "{back}"
        );
        clients.are_served();
    }
    println!("{}", single.process.status().unwrap()["nic"]);
    clients.finish();
}

#[test]
fn a_guest_runs_on_when_its_tap_device_is_deleted_and_made_again() {
    let Some((bench, settings)) = bench(None) else {
        return;
    };
    let mut single = Single::start(&settings, bench.dir()).unwrap();
    let clients = Clients::start(&single);
    clients.0.mark_kill();
    for losses in 1..3 {
        delete(&single.topology, TAP);
        let lost = wait_for(&mut single, "nic_losses", losses);
        assert!(lost.ends_with(", lost"), "{lost}");
        let lines = format!("tuntap add dev {TAP} mode tap\nlink set {TAP} master br0 up\n");
        single.topology.host(Host::A).batch(&lines).unwrap();
        wait_for(&mut single, "nic_returns", losses);
        clients.are_served();
    }
    clients.finish();
}

/// Runs a `colo run` on host a that is to be refused, and gives what it said.
fn refused(topology: &Topology, settings: &Settings, dir: &Path) -> String {
    std::fs::create_dir_all(dir).unwrap();
    let mut command = topology.host(Host::A).command("timeout");
    command.args(LIMIT_SECONDS).arg(&settings.colo).arg("run");
    let output = command
        .arg(settings.run_file(dir).unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(FAILED), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[test]
fn a_nic_that_another_guest_has_is_refused_by_name_and_stays_with_that() {
    let cases: [(Option<&str>, &str, &[&str]); 2] = [
        (Some("auto"), UPLINK, &["another XDP program", "stop"]),
        (None, TAP, &["in use by another process", "stop"]),
    ];
    for (xdp, interface, words) in cases {
        let Some((bench, settings)) = bench(xdp) else {
            return;
        };
        let single = Single::start(&settings, bench.dir()).unwrap();
        for _ in 0..2 {
            let said = refused(&single.topology, &settings, &bench.dir().join("second"));
            for word in words.iter().chain([&format!("\"{interface}\"").as_str()]) {
                assert!(said.contains(word), "{word} is not in\n{said}");
            }
        }
        clients::wrk(&single.topology.client, GUEST[0], "/bytes/100", 8, 1);
    }
}

/// With fewer queues than shards the link's packets go over TCP, as `shards.rs` says; the guest's cannot be carried.
#[test]
fn fewer_queues_than_shards_are_refused_by_name() {
    let Some((bench, mut settings)) = bench(Some("auto")) else {
        return;
    };
    let topology = settings.topology().unwrap();
    settings.shards = 2;
    let said = refused(&topology, &settings, bench.dir());
    let advice = format!("`ethtool -L {UPLINK} combined 2`");
    let what = format!("\"{UPLINK}\" has 1 receive queues");
    for word in [
        "net.interface",
        &what,
        "host.shards = 2",
        &advice,
        "or lower host.shards",
    ] {
        assert!(said.contains(word), "{word} is not in\n{said}");
    }
    // And a TAP device with one queue.
    settings.xdp = None;
    let tap = format!("tuntap add dev {TAP} mode tap\n");
    topology.host(Host::A).batch(&tap).unwrap();
    let said = refused(&topology, &settings, bench.dir());
    for word in ["net.tap", TAP, "host.shards = 2", "multi_queue"] {
        assert!(said.contains(word), "{word} is not in\n{said}");
    }
}
