//! `echo`: datagrams through a guest and back, over AF_XDP and, as the baseline, over a TAP device.
//!
//! Invariants: both serve the same client, whose kernel computes the checksums in either case; CPU
//! time is that of the process under test alone, over the same seconds as the packets; it ends where
//! the frames leave the host, for what lies behind is done by threads of the kernel.
//!
//! Guest, client and switch share the cores with the worker, so packets a second say less than
//! packets a second of CPU.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use colo_lab::load::ports;
use colo_lab::netns::Netns;
use colo_lab::pair::Single;
use colo_lab::topology::{GUEST_V4, Host, Topology, UPLINK};

use crate::datapath::DatapathArgs;
use crate::datapath_client::{Client, Echoes};
use crate::datapath_cpu::CpuTimes;
use crate::datapath_row::{Figures, Row};
use crate::place::{BenchError, Place};

/// Before measurements: polling times are learnt, caches filled.
const WARM_UP: Duration = Duration::from_millis(300);
const BRIDGE_SETTINGS: &str = "/proc/sys/net/bridge";

/// Runs it.
pub(crate) fn run(args: &DatapathArgs, place: &Place) -> Result<Vec<Row>, BenchError> {
    let payloads: Vec<usize> = args.payloads().collect();
    let mut rounds = vec![Vec::new(); payloads.len()];
    for round in 1..=args.rounds {
        eprintln!("echo, round {round} of {}", args.rounds);
        let own = measure(args, place, &payloads, args.xdp())?;
        let peer = measure(args, place, &payloads, None)?;
        for ((rounds, own), peer) in rounds.iter_mut().zip(own).zip(peer) {
            rounds.push(own.with_all("peer_", peer));
        }
    }
    let rows = payloads.iter().zip(rounds);
    Ok(rows
        .map(|(&payload, rounds)| {
            let mut figures = Figures::median(&rounds);
            for (name, of) in [
                ("ratio", "packets_per_cpu_s"),
                ("process_ratio", "packets_per_process_cpu_s"),
                ("rate_ratio", "packets_per_s"),
            ] {
                if let Some(ratio) = figures.against_peer(of) {
                    figures = figures.with(name, ratio);
                }
            }
            Row::new("echo", Some(payload), figures)
                .label(
                    "nic",
                    if args.xdp().is_some() {
                        "af_xdp"
                    } else {
                        "tap"
                    },
                )
                .label("peer_nic", "tap")
                .label("poll", args.poll())
        })
        .collect())
}

/// A fresh guest behind such a NIC, and all payloads.
fn measure(
    args: &DatapathArgs,
    place: &Place,
    payloads: &[usize],
    xdp: Option<String>,
) -> Result<Vec<Figures>, BenchError> {
    let dir = place.scratch()?;
    let mut settings = place.settings();
    settings.poll = args.poll();
    settings.xdp = xdp;
    let single = Single::start(&settings, dir.path())?;
    let (client, pid) = (&single.topology.client, single.process.pid());
    prepare(&single.topology)?;
    let each = payloads
        .iter()
        .map(|&payload| client.run(|| exchange(args, pid, payload))?);
    each.collect()
}

/// The client's part, in its namespace.
fn exchange(args: &DatapathArgs, pid: u32, payload: usize) -> Result<Figures, BenchError> {
    let failed = || BenchError::io("exchange datagrams with the guest");
    let target = (GUEST_V4, ports::ECHO).into();
    let mut client = Client::connect(target, payload).map_err(failed())?;
    let window = u64::from(args.window);
    client.saturate(window, WARM_UP).map_err(failed())?;
    let before = CpuTimes::read(pid)?;
    let full = client.saturate(window, args.time()).map_err(failed())?;
    let used = CpuTimes::read(pid)?.since(&before);
    let period = Duration::from_secs(1) / args.rate;
    client.pace(period, WARM_UP).map_err(failed())?;
    let paced = client.pace(period, args.time()).map_err(failed())?;
    for echoes in [&full, &paced] {
        check(echoes)?;
    }
    Ok(figures(&full, &paced, &used))
}

fn figures(full: &Echoes, paced: &Echoes, used: &CpuTimes) -> Figures {
    let packets = full.received as f64;
    Figures::default()
        .with("packets_per_s", full.per_s())
        .with("packets_per_cpu_s", packets / used.worker_s())
        .with("packets_per_process_cpu_s", packets / used.process_s())
        .with("worker_cpu_percent", used.worker_s() / full.seconds * 100.0)
        .with(
            "process_cpu_percent",
            used.process_s() / full.seconds * 100.0,
        )
        .with("p50_us", paced.us(0.5))
        .with("p99_us", paced.us(0.99))
        .with("p999_us", paced.us(0.999))
        .with("lost_percent", lost_percent(paced))
        .with("saturated_p50_us", full.us(0.5))
        .with("saturated_p99_us", full.us(0.99))
        .with("saturated_p999_us", full.us(0.999))
        .with("saturated_lost_percent", lost_percent(full))
}

fn lost_percent(echoes: &Echoes) -> f64 {
    echoes.lost as f64 / echoes.sent as f64 * 100.0
}

/// A measurement counts when something came back, and nothing strange.
pub(crate) fn check(echoes: &Echoes) -> Result<(), BenchError> {
    if echoes.received == 0 || echoes.foreign > echoes.lost {
        let text = format!(
            "of {} datagrams {} came back and {} were lost; {} answers had no question",
            echoes.sent, echoes.received, echoes.lost, echoes.foreign
        );
        return Err(BenchError::Failed(text));
    }
    Ok(())
}

/// Makes the worker responsible for its host and nothing else, in either case.
fn prepare(topology: &Topology) -> Result<(), BenchError> {
    // Veth pairs pass frames on without checksums, which AF_XDP does not allow; so that both sides
    // are sent the same, the client's kernel computes them for both.
    ip_exec(&topology.client, &["ethtool", "-K", "eth0", "tx", "off"])?;
    // What leaves the host is taken over by a thread of the switch's, as by the far end of a wire.
    // A veth port without segmentation offloads at its other end has such a thread.
    let port = Host::A.port();
    ip_exec(
        topology.host(Host::A),
        &["ethtool", "-K", UPLINK, "tso", "off"],
    )?;
    ip_exec(&topology.switch, &["ethtool", "-K", port, "gro", "on"])?;
    let threaded = format!("echo 1 > /sys/class/net/{port}/threaded");
    ip_exec(&topology.switch, &["sh", "-c", &threaded])?;
    // Bridges look at no firewall.
    for netns in [&topology.switch, topology.host(Host::A)] {
        if Path::new(BRIDGE_SETTINGS).exists() {
            for table in ["iptables", "ip6tables", "arptables"] {
                netns.set_sysctl(&format!("bridge/bridge-nf-call-{table}"), "0")?;
            }
        }
    }
    Ok(())
}

/// Runs a command inside, with the sysfs of that namespace.
fn ip_exec(netns: &Netns, command: &[&str]) -> Result<(), BenchError> {
    let output = Command::new("ip")
        .args(["netns", "exec", netns.name()])
        .args(command)
        .output()
        .map_err(BenchError::io("run ip netns exec"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(BenchError::Failed(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath_cpu::ThreadTime;

    fn echoes(sent: u64, lost: u64) -> Echoes {
        let mut echoes = Echoes::new();
        (echoes.sent, echoes.lost, echoes.seconds) = (sent, lost, 2.0);
        (0..sent - lost).for_each(|_| echoes.count(50_000));
        echoes
    }

    #[test]
    fn packets_are_counted_by_the_seconds_of_worker_and_process() {
        let thread = |name: &str, cpu_ns| ThreadTime {
            id: 1,
            name: name.to_owned(),
            cpu_ns,
            sleeps: 0,
        };
        let used = CpuTimes(vec![
            thread("worker", 500_000_000),
            thread("vcpu0", 1_500_000_000),
        ]);
        let figures = figures(&echoes(1000, 100), &echoes(10, 0), &used);
        for (name, value) in [
            ("packets_per_s", 450.0),
            ("packets_per_cpu_s", 1800.0),
            ("packets_per_process_cpu_s", 450.0),
            ("worker_cpu_percent", 25.0),
            ("saturated_lost_percent", 10.0),
            ("lost_percent", 0.0),
        ] {
            assert_eq!(figures.get(name), Some(value), "{name}");
        }
        let p50_us = figures.get("p50_us").unwrap();
        assert!((49.9..50.2).contains(&p50_us), "{p50_us}");
    }

    #[test]
    fn silence_and_strange_answers_are_no_measurement() {
        assert!(check(&echoes(10, 9)).is_ok());
        assert!(check(&echoes(10, 10)).is_err());
        let mut strange = echoes(10, 0);
        strange.foreign = 1;
        assert!(check(&strange).is_err());
    }
}
