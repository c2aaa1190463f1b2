//! Hosts die, freeze and lose each other under load: clients keep their connections and whatever they were
//! told stays true.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use colo_lab::load::{Load, LoadConfig, LoadReport};
use colo_lab::netns::Netns;
use colo_lab::pair::{Pair, Settings, status_socket};
use colo_lab::process::Process;
use colo_lab::topology::{GUEST, GUEST_MAC, Host, pcap_frames};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::streams::Streams;
use colo_tests::{both_ways, clients, loads};
use colo_vmm::testpoint::Point;
use serde_json::Value;

// Each of them loses a host in the middle of comparing.
both_ways!(
    everything_told_before_a_kill_is_true_after_it,
    full_streams_opened_after_the_last_checkpoint_survive_a_kill,
    the_primary_goes_on_without_its_secondary,
    a_returned_host_protects_again_and_the_other_may_die,
    a_cut_link_leaves_one_voice,
    a_frozen_primary_is_silent_when_it_wakes
);

/// So many answers must come after a kill,, and in what time.
const AFTERWARDS: u64 = 5_000;
const AFTERWARDS_TIMEOUT: Duration = Duration::from_secs(60);
/// Exit code of a host that lost the VM to another.
const DEPOSED: i32 = 3;
/// Longest time until a test point is reached under a diverging load.
const POINT_TIMEOUT: Duration = Duration::from_secs(30);

fn bench() -> Option<Bench> {
    Bench::new(&[&clients::PROGRAMS[..], &["tcpdump"]].concat())
}

fn pair(settings: &Settings, bench: &Bench) -> Pair {
    Pair::start(settings, bench.dir()).unwrap()
}

/// Lets some time between half a second and two seconds go by, told so that a failure can be repeated: when a host is lost
/// must not matter, so no condition is waited for.
fn until_a_random_moment() {
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .subsec_nanos();
    let moment = Duration::from_millis(500 + u64::from(nanos) % 1500);
    println!("kill after {moment:?}");
    thread::sleep(moment);
}

fn load(pair: &Pair) -> Load {
    Load::start(&pair.topology.client, LoadConfig::new(16, 3)).unwrap()
}

/// The service does not only answer once.
fn goes_on(load: &Load) {
    assert!(
        load.wait_answers(AFTERWARDS, AFTERWARDS_TIMEOUT),
        "the service stands still"
    );
}

fn assert_clean(report: &LoadReport) {
    match report.survival {
        Some(_) => loads::assert_survived(report),
        None => loads::assert_right(report),
    }
    assert_eq!(report.requests, report.responses);
    assert!(
        report.responses > 100 && report.audited > 100,
        "{report:#?}"
    );
}

/// Kills the primary at a random moment while `client` runs, and waits for both.
fn killed_under(pair: &mut Pair, client: impl FnOnce(&Netns) + Send) {
    let Pair {
        primary, topology, ..
    } = &mut *pair;
    thread::scope(|scope| {
        let running = scope.spawn(|| client(&topology.client));
        until_a_random_moment();
        assert!(!running.is_finished(), "the client ended before the kill");
        primary.kill().unwrap();
        running.join().unwrap();
    });
    pair.wait_alone(Host::B).unwrap();
}

#[test]
fn wrk_survives_a_kill() {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&bench.settings(), &bench);
    killed_under(&mut pair, |client| {
        clients::wrk(client, GUEST[0], "/bytes/1000", 16, 5);
    });
}

#[test]
fn redis_benchmark_survives_a_kill() {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&bench.settings(), &bench);
    killed_under(&mut pair, |client| {
        clients::redis_benchmark(client, GUEST[0], 1);
    });
}

fn everything_told_before_a_kill_is_true_after_it(compare: Compare) {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&compare.settings(&bench), &bench);
    let load = load(&pair);
    until_a_random_moment();
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    goes_on(&load);
    assert_clean(&load.finish().unwrap());
}

/// A killed process's sockets are closed by its kernel; a host without power says nothing.
#[test]
fn a_host_that_falls_silent_is_replaced() {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&bench.settings(), &bench);
    let load = load(&pair);
    until_a_random_moment();
    load.mark_kill();
    pair.topology.cut_link().unwrap();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    goes_on(&load);
    let report = load.finish().unwrap();
    println!(
        "outage {:?} us",
        report.probe.and_then(|probe| probe.outage_us)
    );
    assert_clean(&report);
}

fn full_streams_opened_after_the_last_checkpoint_survive_a_kill(compare: Compare) {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&compare.settings(&bench), &bench);
    let checkpoints = |pair: &Pair| pair.primary.status().unwrap()["checkpoints"].clone();
    // A deadline missed on a busy machine makes a checkpoint; then other streams are opened.
    for _ in 0..10 {
        let before = checkpoints(&pair);
        let streams = Streams::start(&pair.topology.client, 8).unwrap();
        thread::sleep(Duration::from_millis(300));
        if checkpoints(&pair) != before {
            streams.finish().unwrap();
            continue;
        }
        pair.primary.kill().unwrap();
        assert!(streams.unacknowledged() > 0);
        pair.wait_alone(Host::B).unwrap();
        thread::sleep(Duration::from_millis(500));
        let bytes = streams.finish().unwrap();
        println!("{bytes} bytes echoed");
        return;
    }
    panic!("a checkpoint came every 300 ms although nothing diverges");
}

/// The ways that a pair works alternate over the points: bytes are compared and guests reach their clients by TAP devices, or
/// digests are, and they do by AF_XDP.
fn stopped_at_each(points: &[Point], at: Host, then: impl Fn(Point, &mut Pair, &Bench)) {
    for (n, &point) in points.iter().enumerate() {
        let compare = [Compare::Bytes, Compare::Digests][n % 2];
        stopped_at(point, at, compare, |pair, bench| then(point, pair, bench));
    }
}

/// Runs a diverging load until host `at` stops at the named point, then lets `then` act, and expects the
/// other host to go on with everything intact.
fn stopped_at(point: Point, at: Host, compare: Compare, then: impl FnOnce(&mut Pair, &Bench)) {
    let Some(bench) = bench() else { return };
    let mut settings = compare.settings(&bench);
    if compare == Compare::Digests {
        settings.xdp = Some("auto".to_owned());
    }
    // Time for the test to act before the other host acts by itself.
    settings.heartbeat_count = 50;
    // The first checkpoint is the one that makes the pair.
    let variable = (
        "COLO_TEST_STOP_AT".to_owned(),
        format!("{}:5", point.name()),
    );
    settings.environment[usize::from(at == Host::B)].push(variable);
    let mut pair = pair(&settings, &bench);
    let load = load(&pair);
    pair.process(at).wait_frozen(POINT_TIMEOUT).unwrap();
    load.mark_kill();
    then(&mut pair, &bench);
    goes_on(&load);
    let report = load.finish().unwrap();
    println!(
        "{point:?}: outage {:?} us",
        report.probe.and_then(|probe| probe.outage_us)
    );
    assert_clean(&report);
}

#[test]
fn a_primary_may_die_at_any_point_of_a_checkpoint() {
    stopped_at_each(Point::PRIMARY, Host::A, |_, pair, _| {
        pair.primary.kill().unwrap();
        pair.wait_alone(Host::B).unwrap();
    });
}

#[test]
fn a_secondary_may_die_at_any_point_of_a_checkpoint() {
    stopped_at_each(Point::SECONDARY, Host::B, |_, pair, _| {
        pair.secondary.kill().unwrap();
        pair.wait_alone(Host::A).unwrap();
    });
}

#[test]
fn a_secondary_takes_over_from_any_point_of_a_checkpoint() {
    stopped_at_each(Point::SECONDARY, Host::B, |_, pair, _| {
        pair.primary.kill().unwrap();
        pair.secondary.resume().unwrap();
        pair.wait_alone(Host::B).unwrap();
    });
}

#[test]
fn rule_18_a_primary_that_was_deposed_in_a_checkpoint_is_silent_when_it_wakes() {
    stopped_at_each(Point::PRIMARY, Host::A, |point, pair, bench| {
        // It stands still from here on.
        let voices = Voices::listen(pair, bench);
        pair.wait_alone(Host::B).unwrap();
        pair.primary.resume().unwrap();
        let awake = pair.primary.wait_exit(AFTERWARDS_TIMEOUT).unwrap();
        assert_eq!(awake.code(), Some(DEPOSED), "{point:?}");
        let [a, b] = voices.heard();
        // A worker stopped between its look at the clock and the system call sends that one frame.
        assert!(
            a.len() <= 1,
            "{point:?}: the primary sent {} frames",
            a.len()
        );
        assert!(!b.is_empty(), "{point:?}: nobody speaks");
    });
}

/// Also one that had committed: what it applies when it wakes is not asked for any more.
#[test]
fn rule_18_a_secondary_that_was_left_in_a_checkpoint_is_silent_when_it_wakes() {
    stopped_at_each(Point::SECONDARY, Host::B, |point, pair, bench| {
        let voices = Voices::listen(pair, bench);
        pair.wait_alone(Host::A).unwrap();
        pair.secondary.resume().unwrap();
        let awake = pair.secondary.wait_exit(AFTERWARDS_TIMEOUT).unwrap();
        let log = pair.secondary.log_tail();
        assert_eq!(awake.code(), Some(DEPOSED), "{point:?}: {log}");
        let [a, b] = voices.heard();
        assert_eq!(b.len(), 0, "{point:?}: the secondary sent frames");
        assert!(!a.is_empty(), "{point:?}: nobody speaks");
    });
}

#[test]
fn invariant_8_a_primary_that_never_had_a_secondary_logs_nothing() {
    let Some(bench) = bench() else { return };
    let settings = bench.settings();
    let topology = settings.topology().unwrap();
    let file = bench.dir().join("a.toml");
    std::fs::write(&file, settings.pair_file(Host::A, bench.dir())).unwrap();
    let mut command = topology.host(Host::A).command(bench.colo());
    command.arg("primary").arg(&file);
    let primary = Process::spawn("a-primary", command, bench.dir()).unwrap();
    let mut primary = primary.with_status(&status_socket(Host::A, bench.dir()));
    let is_alone = |status: &Value| status["state"] == "alone";
    let status = primary.wait_status("alone", AFTERWARDS_TIMEOUT, is_alone);
    assert_eq!(status.unwrap()["dirty_logging"], false);
}

fn the_primary_goes_on_without_its_secondary(compare: Compare) {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&compare.settings(&bench), &bench);
    assert_eq!(pair.primary.status().unwrap()["dirty_logging"], true);
    let load = load(&pair);
    until_a_random_moment();
    load.mark_kill();
    pair.secondary.kill().unwrap();
    let status = pair.wait_alone(Host::A).unwrap();
    assert_eq!(status["protected"], false);
    // Nobody is there whom a log would be for.
    let off = |status: &Value| status["dirty_logging"] == false;
    let waited = pair
        .primary
        .wait_status("logs nothing", AFTERWARDS_TIMEOUT, off);
    waited.unwrap();
    goes_on(&load);
    assert_clean(&load.finish().unwrap());
}

fn a_returned_host_protects_again_and_the_other_may_die(compare: Compare) {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&compare.settings(&bench), &bench);
    let load = load(&pair);
    until_a_random_moment();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    pair.restart(Host::A, "secondary").unwrap();
    pair.wait_protected(Host::B).unwrap();
    until_a_random_moment();
    load.mark_kill();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    goes_on(&load);
    assert_clean(&load.finish().unwrap());
}

/// When each host sent frames in the guest's name.
struct Voices {
    captures: [colo_lab::topology::Capture; 2],
}

impl Voices {
    fn listen(pair: &Pair, bench: &Bench) -> Self {
        let capture = |host: Host| {
            pair.topology
                .capture(host, &bench.dir().join(format!("{}.pcap", host.port())))
                .unwrap()
        };
        Self {
            captures: [capture(Host::A), capture(Host::B)],
        }
    }

    /// Times (microseconds) of the guest's frames, by host.
    fn heard(self) -> [Vec<u64>; 2] {
        let guest: Vec<u8> = GUEST_MAC
            .split(':')
            .map(|part| u8::from_str_radix(part, 16).unwrap())
            .collect();
        self.captures.map(|capture| {
            let frames = pcap_frames(&capture.finish().unwrap());
            let own = frames
                .into_iter()
                .filter(|frame| frame.bytes.get(6..12) == Some(&guest[..]));
            own.map(|frame| frame.at_us).collect()
        })
    }
}

/// At most one host speaks: the primary first, perhaps the secondary later, never both by turns but for
/// `residue` frames. Gives who spoke last.
fn assert_one_voice([a, b]: &[Vec<u64>; 2], residue: usize) -> Host {
    assert!(!a.is_empty(), "the primary never spoke");
    let Some(first_b) = b.first() else {
        return Host::A;
    };
    let late = a.iter().filter(|at| *at > first_b).count();
    assert!(
        late <= residue,
        "the primary sent {late} frames after the secondary's first"
    );
    Host::B
}

fn a_cut_link_leaves_one_voice(compare: Compare) {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&compare.settings(&bench), &bench);
    let voices = Voices::listen(&pair, &bench);
    let load = load(&pair);
    until_a_random_moment();
    load.mark_kill();
    pair.topology.cut_link().unwrap();
    let (winner, other) = pair.wait_winner().unwrap();
    assert_eq!(other.code(), Some(DEPOSED));
    goes_on(&load);
    assert_clean(&load.finish().unwrap());
    let speaker = assert_one_voice(&voices.heard(), 0);
    assert_eq!(speaker, winner);
}

fn a_frozen_primary_is_silent_when_it_wakes(compare: Compare) {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&compare.settings(&bench), &bench);
    let voices = Voices::listen(&pair, &bench);
    let load = load(&pair);
    until_a_random_moment();
    load.mark_kill();
    pair.primary.freeze().unwrap();
    pair.wait_alone(Host::B).unwrap();
    pair.primary.resume().unwrap();
    let awake = pair.primary.wait_exit(AFTERWARDS_TIMEOUT).unwrap();
    assert_eq!(awake.code(), Some(DEPOSED));
    goes_on(&load);
    assert_clean(&load.finish().unwrap());
    // A process stopped between its look at the clock and the system call sends that one frame.
    assert_eq!(assert_one_voice(&voices.heard(), 1), Host::B);
}

/// Keeps everybody else from the arbiter's file, as long as what is given is open.
fn locked(arbiter: &Path) -> File {
    let file = OpenOptions::new()
        .write(true)
        .open(arbiter.with_extension("lock"))
        .unwrap();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the whole call; `lock` is a valid flock the kernel only reads.
    let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLKW, &lock) };
    assert_eq!(locked, 0, "{}", std::io::Error::last_os_error());
    file
}

#[test]
fn rule_18_an_arbiter_that_does_not_answer_holds_up_no_heartbeat() {
    let Some(bench) = bench() else { return };
    let mut settings = bench.settings();
    // Silence for that long loses a peer; one wait for the lock takes a second.
    settings.heartbeat_count = 40;
    let mut pair = pair(&settings, &bench);
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    let arbiter = locked(&bench.dir().join("generation"));
    pair.restart(Host::B, "secondary").unwrap();
    let stands_by = |status: &Value| status["state"] == "standby";
    let uptime_s = |status: &Value| status["uptime_s"].as_f64().unwrap();
    let begun = pair
        .secondary
        .wait_status("has the state", AFTERWARDS_TIMEOUT, stands_by)
        .unwrap();
    let still = |status: &Value| stands_by(status) && uptime_s(status) > uptime_s(&begun) + 3.0;
    pair.secondary
        .wait_status("hears the primary", AFTERWARDS_TIMEOUT, still)
        .unwrap();
    // It has a state that no arbiter knows of.
    assert_eq!(pair.primary.status().unwrap()["protected"], false);
    drop(arbiter);
    pair.wait_protected(Host::A).unwrap();
    assert_eq!(pair.primary.status().unwrap()["takeovers"], 0);
}

/// Told to stop, it waits for the answer, which makes the VM its own: then it ends as the VM's host, so that either host may
/// start it again.
#[test]
fn rule_20_a_secondary_that_asks_for_the_vm_while_it_is_told_to_stop_notes_the_end() {
    let Some(bench) = bench() else { return };
    // A question is given up after a second, and who has none open just ends; so it may take more than one attempt.
    let won = (0..5).any(|_| {
        let _ = std::fs::remove_file(bench.dir().join("generation"));
        let mut pair = pair(&bench.settings(), &bench);
        let arbiter = locked(&bench.dir().join("generation"));
        pair.primary.kill().unwrap();
        let asks = |status: &Value| status["state"] == "taking over";
        let secondary = &mut pair.secondary;
        secondary
            .wait_status("asks the arbiter", AFTERWARDS_TIMEOUT, asks)
            .unwrap();
        secondary.terminate().unwrap();
        while !secondary.log().contains("asked to stop, but the arbiter")
            && secondary.poll_exit().unwrap().is_none()
        {
            thread::yield_now();
        }
        drop(arbiter);
        let status = secondary.wait_exit(AFTERWARDS_TIMEOUT).unwrap();
        assert!(status.success(), "{}", secondary.log_tail());
        let record = std::fs::read_to_string(bench.dir().join("generation")).unwrap();
        let has_won = secondary.log().contains(": Won(");
        assert_eq!(record.contains("standing = \"off\""), has_won, "{record}");
        has_won
    });
    assert!(won, "no answer came in time");
}
