//! `colo compare` on what tcpdump sees of real guests and clients, and the policy file in a pair.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::collections::{HashMap, HashSet};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use colo_compare::wire::tcp::{FIN, SYN};
use colo_compare::{Direction, wire};
use colo_lab::load::{self, ports};
use colo_lab::netns::Netns;
use colo_lab::pair::{Pair, Single};
use colo_lab::process::Process;
use colo_lab::topology::{GUEST_MAC, GUEST_V4, Host, Topology};
use colo_replay::capture;
use colo_replay::testing::{Format, capture as written};
use colo_tests::bench::Bench;
use colo_tests::status::number;
use serde_json::Value;

/// Two runs of a guest are as far apart as their clients.
const PATIENCE_MS: &str = "120000";
const TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// The last datagram of a run.
const MARK: &[u8] = b"the end of this run";
/// Address resolution runs on the guest's and the client's own timers.
const NEIGHBORS: &str = "[[rule]]\nprotocol = \"arp\"\naction = \"release\"\n\
                         [[rule]]\nprotocol = \"icmpv6\"\naction = \"release\"\n";

fn bench() -> Option<Bench> {
    Bench::new(&["curl", "redis-benchmark", "tcpdump", "timeout"])
}

/// One guest after the other, in the same network, so that addresses are the same.
struct Runs {
    single: Single,
    bench: Bench,
}

impl Runs {
    fn new() -> Option<Self> {
        let bench = bench()?;
        let single = Single::start(&bench.settings(), bench.dir()).unwrap();
        // A port that curl has used is free at once.
        let client = &single.topology.client;
        client.set_sysctl("ipv4/tcp_max_tw_buckets", "0").unwrap();
        Some(Self { single, bench })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bench.dir().join(name)
    }

    /// Another guest, just as new.
    fn restart(&mut self) {
        let Single { process, topology } = &mut self.single;
        process.terminate().unwrap();
        process.wait_exit(TIMEOUT).unwrap();
        let mut command = topology.host(Host::A).command(self.bench.colo());
        command.arg("run").arg(self.bench.dir().join("run.toml"));
        *process = Process::spawn("again", command, self.bench.dir()).unwrap();
        for port in [ports::HTTP, ports::RESP] {
            let target = (GUEST_V4, port).into();
            load::wait_for_guest(&topology.client, target, TIMEOUT, || true).unwrap();
        }
    }

    /// What passes the guest's port of the switch, both ways, while `work` runs.
    fn capture(&self, name: &str, arguments: &[&str], work: impl FnOnce(&Netns)) -> PathBuf {
        let file = self.path(name);
        let topology = &self.single.topology;
        let port = Host::A.port();
        let mut tcpdump = Tcpdump::start(topology, port, &file, arguments, self.bench.dir());
        work(&topology.client);
        mark(&topology.client);
        tcpdump.finish();
        file
    }

    fn compare(&self, arguments: &[&str], files: [&Path; 2]) -> Output {
        let mut command = Command::new(self.bench.colo());
        command.arg("compare").args(arguments).args(files);
        command.output().unwrap()
    }

    fn policy(&self, name: &str, text: &str) -> String {
        let file = self.path(name);
        std::fs::write(&file, text).unwrap();
        file.display().to_string()
    }
}

struct Tcpdump {
    process: Process,
    file: PathBuf,
}

impl Tcpdump {
    fn start(
        topology: &Topology,
        interface: &str,
        file: &Path,
        arguments: &[&str],
        dir: &Path,
    ) -> Self {
        let mut command = topology.switch.command("tcpdump");
        command.args(["-i", interface, "-p", "-n", "-U", "--immediate-mode"]);
        // Whole packets, in a buffer that holds thousands of them.
        command.args(["-s", "2048", "-B", "16384", "-Z", "root", "-w"]);
        command.arg(file).args(arguments);
        let mut process = Process::spawn("tcpdump", command, dir).unwrap();
        wait("tcpdump listens", || {
            assert!(process.poll_exit().unwrap().is_none(), "{}", process.log());
            process.log().contains("listening on")
        });
        let file = file.to_owned();
        Self { process, file }
    }

    /// Ends when the guest has said its last word and it is in the file.
    fn finish(&mut self) {
        wait("the end of the run is captured", || {
            !self.keeps_everything() || is_over(&std::fs::read(&self.file).unwrap())
        });
        self.process.terminate().unwrap();
        self.process.wait_exit(TIMEOUT).unwrap();
        let log = self.process.log();
        assert!(log.contains("\n0 packets dropped by kernel"), "{log}");
    }

    /// Captures that are made to be refused need no mark.
    fn keeps_everything(&self) -> bool {
        !self.file.to_string_lossy().contains("refused")
    }
}

/// The mark was answered, and the guest has closed every connection that it has accepted.
fn is_over(bytes: &[u8]) -> bool {
    let mac = colo_replay::parse_mac(GUEST_MAC).unwrap();
    let (mut is_marked, mut open) = (false, HashSet::new());
    // The last record may not be there as a whole.
    let records = capture::read(bytes).into_iter().flatten().flatten();
    for record in records.filter(|record| record.frame[6..12] == mac) {
        let frame = record.frame;
        is_marked |= frame.ends_with(MARK);
        let packet = wire::parse(frame, frame.len(), Direction::FromGuest);
        match packet.tcp {
            Some(tcp) if tcp.has(SYN) => drop(open.insert(packet.key)),
            Some(tcp) if tcp.has(FIN) => drop(open.remove(&packet.key)),
            _ => {}
        }
    }
    is_marked && open.is_empty()
}

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not after {TIMEOUT:?}");
        thread::sleep(POLL);
    }
}

/// Sends the guest a datagram from a port of its own and waits for its echo.
fn mark(client: &Netns) {
    let asked = client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:42000").unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.send_to(MARK, (GUEST_V4, ports::ECHO)).unwrap();
        let mut answer = [0; 64];
        let n = socket.recv(&mut answer).unwrap();
        assert_eq!(&answer[..n], MARK);
    });
    asked.unwrap();
}

fn curl(client: &Netns, local_port: u16, path: &str) {
    let url = format!("http://{GUEST_V4}{path}");
    let port = local_port.to_string();
    let mut command = client.command("timeout");
    let arguments = ["60", "curl", "-sS", "--fail", "-o", "/dev/null"];
    command.args(arguments).args(["--local-port", &port, &url]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "curl {url}: {said}");
}

fn benchmark(client: &Netns) {
    let mut command = client.command("timeout");
    command.args(["60", "redis-benchmark", "-h", &GUEST_V4.to_string()]);
    command.args([
        "-t",
        "set,get,incr,lpush,lpop",
        "-c",
        "1",
        "-n",
        "300",
        "-d",
        "300",
        "-q",
    ]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "redis-benchmark: {said}");
}

/// The same capture with clients' ports in the order in which they opened their connections: what
/// redis-benchmark lets the kernel choose is otherwise another flow in each run.
fn with_ports_in_order(file: &Path) -> PathBuf {
    let bytes = std::fs::read(file).unwrap();
    let mac = colo_replay::parse_mac(GUEST_MAC).unwrap();
    let mut known = HashMap::new();
    let mut frames = Vec::new();
    for record in capture::read(&bytes).unwrap() {
        let record = record.unwrap();
        let mut frame = record.frame.to_vec();
        let direction = match frame[6..12] == mac {
            true => Direction::FromGuest,
            false => Direction::ToGuest,
        };
        let packet = wire::parse(&frame, frame.len(), direction);
        if let Some(tcp) = packet.tcp {
            let ends = (
                packet.key.guest(),
                packet.key.guest_port(),
                packet.key.peer_port(),
            );
            if direction == Direction::ToGuest && tcp.has(SYN) {
                let next = 50_000 + known.len() as u16;
                known.entry(ends).or_insert(next);
            }
            let at = usize::from(tcp.at)
                + if direction == Direction::FromGuest {
                    2
                } else {
                    0
                };
            if let Some(port) = known.get(&ends) {
                frame[at..at + 2].copy_from_slice(&port.to_be_bytes());
            }
        }
        frames.push((record.at_ns, frame));
    }
    let format = Format::Pcapng {
        resolution: Some(9),
        big_endian: true,
    };
    let renamed = file.with_extension("pcapng");
    std::fs::write(&renamed, written(format, &frames)).unwrap();
    renamed
}

fn said(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

#[track_caller]
fn report(output: &Output, code: i32) -> Value {
    assert_eq!(output.status.code(), Some(code), "{}", said(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn two_runs_that_answer_the_same_are_the_same() {
    let Some(mut runs) = Runs::new() else { return };
    let work = |client: &Netns| {
        for (n, path) in ["/", "/bytes/100", "/bytes/200000", "/counter"]
            .iter()
            .enumerate()
        {
            curl(client, 42_001 + n as u16, path);
        }
        benchmark(client);
    };
    let first = runs.capture("first.pcap", &[], work);
    runs.restart();
    let second = runs.capture("second.pcap", &["--time-stamp-precision=nano"], work);
    let files = [with_ports_in_order(&first), with_ports_in_order(&second)];
    let policy = runs.policy("neighbors.toml", NEIGHBORS);
    let arguments = ["--guest-mac", GUEST_MAC, "--policy", &policy];
    let patient = [&arguments[..], &["--deadline-ms", PATIENCE_MS, "--json"]].concat();
    let [first, second] = &files;
    let found = report(&runs.compare(&patient, [first, second]), 0);
    for key in ["held", "checkpoints", "dropped"] {
        assert_eq!(found[key], 0, "{key} in {found:#}");
    }
    assert_eq!(found["divergences"], Value::Array(Vec::new()));
    // Five benchmarks of 300 commands, four pages, and the mark.
    assert!(found["pairs"].as_u64().unwrap() > 1500, "{found:#}");
    assert!(found["flows"].as_u64().unwrap() >= 10, "{found:#}");
    // A capture is the same as itself, by its own clock and with the deadline of a pair.
    let itself = [&arguments[..], &["--json"]].concat();
    report(&runs.compare(&itself, [first, first]), 0);
}

#[test]
fn what_two_runs_answer_differently_is_found() {
    let Some(mut runs) = Runs::new() else { return };
    let work = |client: &Netns| {
        curl(client, 42_001, "/bytes/3000");
        curl(client, 42_002, "/random");
        curl(client, 42_003, "/bytes/3000");
    };
    let first = runs.capture("first.pcap", &[], work);
    runs.restart();
    let second = runs.capture("second.pcap", &[], work);
    let policy = runs.policy("neighbors.toml", NEIGHBORS);
    let compare = |policy: &str, more: &[&str]| {
        let mut arguments = vec!["--guest-mac", GUEST_MAC, "--deadline-ms", PATIENCE_MS];
        arguments.extend(["--policy", policy]);
        arguments.extend(more);
        runs.compare(&arguments, [&first, &second])
    };
    let found = report(&compare(&policy, &["--json"]), 1);
    let divergences = found["divergences"].as_array().unwrap();
    assert_eq!(
        (divergences.len(), &found["checkpoints"]),
        (1, &1.into()),
        "{found:#}"
    );
    let divergence = &divergences[0];
    let flow = divergence["flow"].as_str().unwrap();
    assert_eq!(divergence["cause"], "payload");
    assert!(
        flow.contains("10.77.0.10:80") && flow.contains(":42002"),
        "{flow}"
    );
    let text = said(&compare(&policy, &[]));
    assert!(
        text.contains("diverged: payload") && text.contains("^^"),
        "{text}"
    );
    let release = "[[rule]]\nprotocol = \"tcp\"\nguest_port = 80\npeer_port = 42002\n";
    let release = format!("{release}action = \"release\"\n{NEIGHBORS}");
    let release = runs.policy("release.toml", &release);
    report(&compare(&release, &["--json"]), 0);
}

#[test]
fn captures_that_cannot_tell_are_refused_by_name_and_byte() {
    let Some(runs) = Runs::new() else { return };
    let page = |client: &Netns| curl(client, 42_001, "/bytes/3000");
    let good = runs.capture("good.pcap", &[], page);
    let cut = runs.capture("refused-cut.pcap", &["-s", "100"], page);
    let whole = std::fs::read(&good).unwrap();
    let short = runs.path("short.pcap");
    std::fs::write(&short, &whole[..whole.len() - 5]).unwrap();
    let text = runs.path("text.pcap");
    std::fs::write(&text, "no capture at all").unwrap();
    let empty = runs.path("empty.pcap");
    std::fs::write(&empty, "").unwrap();
    let any = runs.path("refused-any.pcap");
    let mut tcpdump = Tcpdump::start(&runs.single.topology, "any", &any, &[], runs.bench.dir());
    mark(&runs.single.topology.client);
    tcpdump.finish();
    let cases: [(&Path, &[&str]); 7] = [
        (&cut, &["refused-cut.pcap: byte ", "-s 0"]),
        (&short, &["short.pcap: byte ", "left; copy it again"]),
        (&text, &["text.pcap: byte 0: not a capture"]),
        (&empty, &["empty.pcap: byte 0: the file is empty"]),
        (
            &any,
            &["refused-any.pcap: byte 20: link type", "not on \"any\""],
        ),
        (Path::new("absent.pcap"), &["absent.pcap: cannot be opened"]),
        (runs.bench.dir(), &["not a regular file"]),
    ];
    for (file, words) in cases {
        for files in [[&good, file], [file, &good]] {
            let output = runs.compare(&["--guest-mac", GUEST_MAC, "--json"], files);
            let said = said(&output);
            assert_eq!(output.status.code(), Some(2), "{said}");
            assert!(
                output.stdout.is_empty() && !said.contains("panicked"),
                "{said}"
            );
            for word in words {
                assert!(said.contains(word), "{word} is not in\n{said}");
            }
        }
    }
    for arguments in [["--guest-mac", "nonsense"], ["--policy", "absent.toml"]] {
        let output = runs.compare(&arguments, [&good, &good]);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    }
}

/// Answers that always differ: by checkpoint from port 80, at once from port 8080.
fn assert_policy_holds(pair: &mut Pair, host: Host) {
    let random = |pair: &Pair, port: u16| {
        for _ in 0..10 {
            let client = &pair.topology.client;
            let url = format!("http://{GUEST_V4}:{port}/random");
            let mut command = client.command("timeout");
            let output = command
                .args(["60", "curl", "-sS", "--fail", &url])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", said(&output));
        }
    };
    let before = pair.process(host).status().unwrap();
    random(pair, 8080);
    let between = pair.process(host).status().unwrap();
    random(pair, 80);
    let after = pair.process(host).status().unwrap();
    let payload = |status: &Value| status["divergences"]["payload"].as_u64().unwrap_or(0);
    let released = number(&between, "released_by_policy") - number(&before, "released_by_policy");
    // At least the handshake and the answer of each connection.
    assert!(released >= 20, "{between:#}");
    assert_eq!(payload(&between), payload(&before), "{between:#}");
    assert!(payload(&after) > payload(&between), "{after:#}");
}

#[test]
fn a_policy_lets_a_flow_of_a_pair_go_before_and_after_a_takeover() {
    let Some(bench) = bench() else { return };
    let policy = "[[rule]]\nprotocol = \"tcp\"\nguest_port = 8080\naction = \"release\"\n";
    std::fs::write(bench.dir().join("flows.toml"), policy).unwrap();
    let mut settings = bench.settings();
    let extra = "[compare]\npolicy = \"flows.toml\"\n".to_owned();
    (settings.primary_extra, settings.secondary_extra) = (extra.clone(), extra);
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    assert_policy_holds(&mut pair, Host::A);
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    pair.restart(Host::A, "secondary").unwrap();
    pair.wait_protected(Host::B).unwrap();
    assert_policy_holds(&mut pair, Host::B);
}

#[test]
fn rule_22_hosts_that_would_judge_differently_do_not_pair() {
    let Some(bench) = bench() else { return };
    let rule = "[[rule]]\nprotocol = \"arp\"\naction = \"release\"\n";
    std::fs::write(bench.dir().join("flows.toml"), rule).unwrap();
    let mut settings = bench.settings();
    let extra = "[compare]\npolicy = \"flows.toml\"\n".to_owned();
    (settings.primary_extra, settings.secondary_extra) = (extra.clone(), extra);
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    let join = |text: &str, name: &str| {
        let file = bench.dir().join(name);
        std::fs::write(&file, text).unwrap();
        let mut command = pair.topology.host(Host::B).command("timeout");
        command.args(["60"]).arg(bench.colo()).arg("secondary");
        command.arg(&file).output().unwrap()
    };
    let good = settings.pair_file(Host::B, bench.dir());
    std::fs::write(bench.dir().join("other.toml"), rule.replace("arp", "icmp")).unwrap();
    let other = good.replace("flows.toml", "other.toml");
    let none = good.replace("policy = \"flows.toml\"\n", "");
    for (text, theirs) in [(other, "and 1 rules, "), (none, "and none")] {
        let output = join(&text, "spoilt.toml");
        let said = said(&output);
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains("compare.policy is 1 rules, "), "{said}");
        assert!(said.contains(theirs), "{said}");
    }
    // Comments and order say nothing.
    let same = "# the neighbours\n[[rule]]\naction = \"release\"\nprotocol = \"arp\"\n";
    std::fs::write(bench.dir().join("flows.toml"), same).unwrap();
    pair.restart(Host::B, "secondary").unwrap();
    pair.wait_protected(Host::A).unwrap();
}
