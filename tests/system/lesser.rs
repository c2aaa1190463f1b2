//! Hosts whose kernel has no AF_XDP, or that may lock little memory: a NIC that needs it is refused by name, with what to do;
//! everything else goes another way and shows it.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings, Single};
use colo_lab::topology::{GUEST, Host};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::lesser::{with_little_locked_memory, without_af_xdp};
use colo_tests::{clients, lesser, loads};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
const HOSTS: [Host; 2] = [Host::A, Host::B];
/// The host cannot do what the configuration says.
const FAILED: i32 = 1;
/// A `colo` that starts in spite of it ends like this.
const LIMIT_SECONDS: [&str; 2] = ["--kill-after=5", "20"];

fn bench() -> Option<Bench> {
    Bench::new(&[&clients::PROGRAMS[..], &lesser::PROGRAMS, &["timeout"]].concat())
}

/// A guest on an interface over AF_XDP is refused in each mode, and what is said has all these words.
fn refuses_a_nic(bench: &Bench, settings: &Settings, words: &[&str]) {
    for mode in ["auto", "zero-copy", "driver", "generic"] {
        let mut settings = settings.clone();
        settings.xdp = Some(mode.to_owned());
        let topology = settings.topology().unwrap();
        let mut command = topology.host(Host::A).command("timeout");
        command.args(LIMIT_SECONDS).arg(&settings.colo).arg("run");
        command.arg(settings.run_file(bench.dir()).unwrap());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(FAILED), "{mode}: {said}");
        assert!(!said.contains("panicked"), "{mode}: {said}");
        assert!(!said.contains("no descriptors"), "{mode}: {said}");
        for word in words {
            assert!(said.contains(word), "{mode}: {word} is not in\n{said}");
        }
        println!("{mode}: {}", said.lines().last().unwrap_or_default());
    }
}

/// A guest that is not replicated is served by a TAP device.
fn serves_alone(bench: &Bench, settings: &Settings) {
    let single = Single::start(settings, bench.dir()).unwrap();
    clients::wrk(&single.topology.client, GUEST[0], "/bytes/20000", 8, 1);
    let status = single.process.status().unwrap();
    let carrier = status["nic"]["carrier"].as_str().unwrap();
    assert!(carrier.starts_with("tap "), "{carrier}");
}

/// The packets of each host go over TCP. So often datagrams were wanted and could not be had.
fn assert_over_tcp(pair: &mut Pair, refusals: [u64; 2]) {
    for (host, refused) in HOSTS.into_iter().zip(refusals) {
        let link = pair.process(host).status().unwrap()["link"].clone();
        let counted = |name: &str| link[name].as_u64().unwrap();
        assert_eq!(link["carrier"], "tcp", "{host:?}: {link}");
        assert_eq!(counted("transport_refusals"), refused, "{host:?}: {link}");
        assert_eq!(counted("datagrams_sent"), 0, "{host:?}: {link}");
        assert!(counted("sent_bytes") > 10_000, "{host:?}: {link}");
    }
}

/// Serves clients by comparing, loses its primary in the middle of that, goes on alone.
fn serves_and_survives(pair: &mut Pair, compare: Compare, refusals: [u64; 2]) {
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 1)).unwrap();
    assert!(load.wait_answers(300, PATIENCE), "no answers");
    assert_over_tcp(pair, refusals);
    let status = pair.primary.status().unwrap();
    let matched = status["released_data_by_match"].as_u64().unwrap();
    assert!(matched > 100, "{status:#}");
    compare.assert_used(&status);
    survives_a_kill(pair, load);
}

/// Loses its primary under this load, and goes on alone.
fn survives_a_kill(pair: &mut Pair, load: Load) {
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    assert!(
        load.wait_answers(300, PATIENCE),
        "no answers after the kill"
    );
    loads::assert_survived(&load.finish().unwrap());
}

#[test]
fn without_af_xdp_a_nic_is_refused_and_a_tap_device_serves() {
    let Some(bench) = bench() else {
        return;
    };
    without_af_xdp(|| {
        let words = ["this kernel has no AF_XDP", "CONFIG_XDP_SOCKETS", "net.tap"];
        refuses_a_nic(&bench, &bench.settings(), &words);
        serves_alone(&bench, &bench.settings());
    });
}

/// Whether AF_XDP is wanted where it can be had, or asked for by name.
#[test]
fn without_af_xdp_a_pair_compares_over_tcp_and_survives() {
    for (packets, compare) in [("auto", Compare::Bytes), ("xdp", Compare::Digests)] {
        let Some(bench) = bench() else {
            return;
        };
        let mut settings = compare.settings(&bench);
        settings.packets = packets.to_owned();
        without_af_xdp(|| {
            let mut pair = Pair::start(&settings, bench.dir()).unwrap();
            serves_and_survives(&mut pair, compare, [1, 1]);
        });
    }
}

/// The primary's packets went over AF_XDP before.
#[test]
fn where_one_host_has_no_af_xdp_both_use_tcp() {
    let Some(bench) = bench() else {
        return;
    };
    let settings = bench.settings();
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    let is_xdp = |status: &Value| status["link"]["carrier"] == "xdp";
    pair.primary.wait_status("xdp", PATIENCE, is_xdp).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    without_af_xdp(|| {
        pair.restart(Host::B, "secondary").unwrap();
        pair.wait_protected(Host::A).unwrap();
        let over_tcp = |status: &Value| status["link"]["carrier"] == "tcp";
        pair.primary.wait_status("tcp", PATIENCE, over_tcp).unwrap();
        let load = Load::start(&pair.topology.client, LoadConfig::new(8, 1)).unwrap();
        assert!(load.wait_answers(300, PATIENCE), "no answers");
        for (host, refused) in HOSTS.into_iter().zip([0, 1]) {
            let link = pair.process(host).status().unwrap()["link"].clone();
            assert_eq!(link["carrier"], "tcp", "{host:?}: {link}");
            assert_eq!(link["transport_refusals"], refused, "{host:?}: {link}");
        }
        survives_a_kill(&mut pair, load);
    });
}

#[test]
fn with_little_locked_memory_a_nic_is_refused_and_a_tap_device_serves() {
    let Some(bench) = bench() else {
        return;
    };
    let mut settings = bench.settings();
    settings.colo = with_little_locked_memory(bench.colo(), bench.dir()).unwrap();
    let words = [
        "cannot be locked into memory for AF_XDP",
        "CAP_IPC_LOCK",
        "RLIMIT_MEMLOCK",
        "vm.ram_mib",
    ];
    refuses_a_nic(&bench, &settings, &words);
    serves_alone(&bench, &settings);
}

#[test]
fn with_little_locked_memory_a_pair_compares_over_tcp_and_survives() {
    let Some(bench) = bench() else {
        return;
    };
    let compare = Compare::Bytes;
    let mut settings = compare.settings(&bench);
    settings.colo = with_little_locked_memory(bench.colo(), bench.dir()).unwrap();
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    for host in HOSTS {
        let copies = |status: &Value| status["page_channel"]["unregistered_buffers"] == 1;
        let process = pair.process(host);
        process.wait_status("copying", PATIENCE, copies).unwrap();
    }
    serves_and_survives(&mut pair, compare, [1, 1]);
}
