//! A guest that is too fast for its link or for its replica, and one whose output finds no room: slowed down, stopped, given
//! up, and told plainly; the service goes on in any case.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use colo_lab::load::{Load, LoadConfig};
use colo_lab::netns::{NetError, Netns};
use colo_lab::pair::{Pair, Settings, status_socket};
use colo_lab::process::Process;
use colo_lab::topology::{GUEST_V4, Host, Topology};
use colo_tests::bench::Bench;
use colo_tests::clients::ask;
use colo_tests::quota::VcpuQuota;
use colo_tests::status::number;
use colo_tests::{clients, loads};
use serde_json::Value;

const TIMEOUT: Duration = Duration::from_secs(120);
/// Heartbeats of 20 ms: a link full of pages delays them.
const PATIENT: u32 = 500;
const PAGE_BYTES: u64 = 4096;

fn settings(bench: &Bench) -> Settings {
    Settings {
        heartbeat_count: PATIENT,
        ..bench.settings()
    }
}

/// A host a that runs alone after its secondary has gone; what host a sends over the link is limited to `rate`.
fn alone_behind(bench: &Bench, rate: &str) -> Pair {
    let mut pair = Pair::start(&settings(bench), bench.dir()).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    slow_link(&pair.topology, rate);
    pair
}

fn slow_link(topology: &Topology, rate: &str) {
    let mut tc = topology.host(Host::A).command("tc");
    let discipline = "qdisc replace dev link0 root tbf burst 64kb latency 50ms rate";
    let made = tc.args(discipline.split(' ')).arg(rate).output().unwrap();
    assert!(made.status.success(), "{made:?}");
}

/// A client that has the guest dirty the same pages again and again.
struct Writer {
    answers: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<io::Result<()>, NetError>>,
}

impl Writer {
    fn start(client: &Netns, pages: u32) -> Self {
        let (answers, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (counted, stopped) = (answers.clone(), stop.clone());
        let write = move || {
            let stream = TcpStream::connect(SocketAddr::from((GUEST_V4, 80)))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            let mut stream = BufReader::new(stream);
            while !stopped.load(Ordering::Relaxed) {
                dirty(&mut stream, pages)?;
                counted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let thread = client.spawn("writer", write).unwrap();
        Self {
            answers,
            stop,
            thread,
        }
    }

    fn wait_answers(&self, more: u64) {
        let (begun, enough) = (Instant::now(), self.answers.load(Ordering::Relaxed) + more);
        while self.answers.load(Ordering::Relaxed) < enough {
            let stands = self.thread.is_finished() || begun.elapsed() > TIMEOUT;
            assert!(!stands, "the service stands still");
            std::thread::yield_now();
        }
    }

    /// Every request had its answer.
    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap().unwrap();
    }
}

/// One request; both guests write the same.
fn dirty(stream: &mut BufReader<TcpStream>, pages: u32) -> io::Result<()> {
    let request = format!("POST /dirty/{pages}/100/4096 HTTP/1.1\r\nHost: guest\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes())?;
    let (mut line, mut length) = (String::new(), 0);
    stream.read_line(&mut line)?;
    if !line.starts_with("HTTP/1.1 200 ") {
        return Err(io::Error::other(line));
    }
    while line != "\r\n" {
        if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        line.clear();
        stream.read_line(&mut line)?;
    }
    stream.read_exact(&mut vec![0; length])
}

/// Bytes that the memory of a process's guest takes.
fn guest_memory(process: &Process) -> u64 {
    let bytes = process.memory_file_bytes("colo-guest-ram").unwrap();
    assert!(bytes > 0, "no guest memory in {}", process.name());
    bytes
}

#[test]
fn a_synchronisation_costs_what_the_guest_uses_and_takes_no_memory_of_the_primary() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    // Every checkpoint is audited; that must not touch what nobody has touched either.
    let mut settings = settings(&bench);
    settings.ram_mib = 1024;
    let ram_bytes = u64::from(settings.ram_mib) << 20;
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    let before = guest_memory(&pair.primary);
    assert!(
        before < ram_bytes / 8,
        "{before} bytes after a first synchronisation"
    );
    pair.restart(Host::B, "secondary").unwrap();
    let status = pair.wait_protected(Host::A).unwrap();
    let after = guest_memory(&pair.primary);
    // What an idle guest touches for the first time meanwhile is next to nothing.
    assert!(
        after - before < 4 << 20,
        "{before} bytes before, {after} after"
    );
    let sent = number(&status, "sync_pages");
    assert!(
        (1..=after / PAGE_BYTES + number(&status, "sync_rounds") * 256).contains(&sent),
        "{sent} pages sent, {after} bytes in use"
    );
    let theirs = guest_memory(&pair.secondary);
    assert!(
        theirs <= after + (4 << 20),
        "{theirs} bytes on the secondary, {after} here"
    );
}

#[test]
fn a_guest_that_dirties_faster_than_the_link_is_slowed_down_until_it_is_protected() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = alone_behind(&bench, "200mbit");
    let writer = Writer::start(&pair.topology.client, 2_000);
    writer.wait_answers(10);
    assert_eq!(number(&pair.primary.status().unwrap(), "throttled_us"), 0);
    pair.restart(Host::B, "secondary").unwrap();
    let slowed = |status: &Value| number(status, "run_pct") < 100 && status["state"] == "syncing";
    pair.primary
        .wait_status("slowed down", TIMEOUT, slowed)
        .unwrap();
    writer.wait_answers(1);
    let status = pair.wait_protected(Host::A).unwrap();
    assert!(number(&status, "throttled_us") > 0, "{status:#}");
    assert!(number(&status, "sync_rounds") > 2, "{status:#}");
    assert_eq!(number(&status, "not_followed"), 0, "{status:#}");
    writer.wait_answers(10);
    writer.finish();
    let at_ease = |status: &Value| number(status, "run_pct") == 100 && status["protected"] == true;
    pair.primary
        .wait_status("given its time back", TIMEOUT, at_ease)
        .unwrap();
}

#[test]
fn a_guest_that_no_slowing_helps_is_given_up_with_the_figures_and_its_service_goes_on() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = alone_behind(&bench, "10mbit");
    let writer = Writer::start(&pair.topology.client, 400);
    writer.wait_answers(10);
    pair.restart(Host::B, "secondary").unwrap();
    let given_up = |status: &Value| number(status, "not_followed") > 0;
    let status = pair
        .primary
        .wait_status("given up", TIMEOUT, given_up)
        .unwrap();
    assert_eq!(status["protected"], false, "{status:#}");
    let why = status["unprotected_reason"].as_str().unwrap();
    assert!(
        why.starts_with("the guest dirties memory faster than the link carries it: "),
        "{why}"
    );
    assert_eq!(why.matches(" pages/s (").count(), 2, "{why}");
    assert!(why.contains(" MB/s)"), "{why}");
    assert!(pair.primary.log().contains(why), "{}", pair.primary.log());
    // It has all of its time again, and nobody noticed but by the time that answers took.
    let status = pair.wait_alone(Host::A).unwrap();
    assert_eq!(number(&status, "run_pct"), 100, "{status:#}");
    writer.wait_answers(10);
    writer.finish();
    // The secondary tries again by itself; without the load it is followed.
    let status = pair
        .primary
        .wait_status("protected", TIMEOUT, |status| status["protected"] == true)
        .unwrap();
    assert_eq!(status["unprotected_reason"], "", "{status:#}");
}

#[test]
fn rule_16_an_svm_that_lags_slows_the_pvm_until_it_keeps_up_again() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = settings(&bench);
    // What is late is no divergence here: nothing but a slower PVM makes the lag smaller.
    settings.compare_deadline_ms = 5_000;
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    let Some(quota) = VcpuQuota::new(&pair.secondary, 20) else {
        return;
    };
    let writers: Vec<_> = (0..8)
        .map(|_| Writer::start(&pair.topology.client, 2_000))
        .collect();
    let slowed = |status: &Value| number(status, "run_pct") <= 50;
    let status = pair.primary.wait_status("slowed down", TIMEOUT, slowed);
    let status = status.unwrap();
    assert!(number(&status, "lag_slowed") >= 2, "{status:#}");
    assert!(number(&status, "throttled_us") > 0, "{status:#}");
    let log = pair.primary.log();
    assert!(log.contains("late and does not catch up"), "{log}");
    // The secondary's host has time again.
    drop(quota);
    for writer in writers {
        writer.wait_answers(10);
        writer.finish();
    }
    let at_ease = |status: &Value| number(status, "run_pct") == 100;
    let status = pair.primary.wait_status("at ease", TIMEOUT, at_ease);
    assert_eq!(status.unwrap()["mode"], "colo");
    pair.wait_protected(Host::A).unwrap();
}

#[test]
fn orders_are_obeyed_in_the_middle_of_a_long_round() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    // All of it would take minutes.
    let mut pair = alone_behind(&bench, "1mbit");
    let writer = Writer::start(&pair.topology.client, 2_000);
    writer.wait_answers(1);
    writer.finish();
    pair.restart(Host::B, "secondary").unwrap();
    let syncing = |status: &Value| status["state"] == "syncing";
    pair.primary
        .wait_status("syncing", TIMEOUT, syncing)
        .unwrap();
    let (file, socket) = (
        bench.dir().join("snapshot"),
        status_socket(Host::A, bench.dir()),
    );
    let mut order = Command::new(bench.colo());
    order.arg("snapshot").arg(&file).arg("--socket").arg(socket);
    let taken = order.output().unwrap();
    assert!(taken.status.success(), "{taken:?}");
    let status = pair.primary.status().unwrap();
    assert!(syncing(&status), "{status:#}");
    assert_eq!(number(&status, "sync_rounds"), 0, "{status:#}");
    pair.primary.terminate().unwrap();
    let ended = pair.primary.wait_exit(TIMEOUT).unwrap();
    assert!(ended.success(), "{ended}");
}

#[test]
fn rule_14_without_room_for_held_output_the_guest_stands_still_until_there_is() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = settings(&bench);
    let lines = "hold_frames = 8\n".to_owned();
    (settings.primary_extra, settings.secondary_extra) = (lines.clone(), lines);
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    let load = Load::start(&pair.topology.client, LoadConfig::new(16, 3)).unwrap();
    assert!(load.wait_answers(100, TIMEOUT), "no service");
    pair.secondary.freeze().unwrap();
    let stands = |status: &Value| number(status, "run_pct") == 0;
    let status = pair
        .primary
        .wait_status("stopped", TIMEOUT, stands)
        .unwrap();
    assert!(number(&status, "hold_full") > 0, "{status:#}");
    let stood_us = number(&status, "throttled_us");
    let longer = |status: &Value| number(status, "throttled_us") > stood_us + 100_000;
    let status = pair
        .primary
        .wait_status("kept standing", TIMEOUT, longer)
        .unwrap();
    assert_eq!(status["protected"], true, "{status:#}");
    pair.secondary.resume().unwrap();
    assert!(load.wait_answers(1_000, TIMEOUT), "it stands for ever");
    let report = load.finish().unwrap();
    loads::assert_right(&report);
    let status = pair.wait_protected(Host::A).unwrap();
    assert_eq!(status["unprotected_reason"], "", "{status:#}");
}

#[test]
fn the_guest_runs_on_while_the_pages_of_a_checkpoint_travel() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let pages = 3_000;
    let mut settings = settings(&bench);
    // An audit reads all memory while the guest stands still.
    settings.audit_every = 0;
    settings.compare_deadline_ms = 5_000;
    // All of them go with the checkpoint.
    settings.secondary_extra = "[checkpoint]\nahead_mib = 0\n".to_owned();
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    slow_link(&pair.topology, "100mbit");
    // A checkpoint for another reason may take the pages from the one that is asked for.
    let found = (0..5).find_map(|_| {
        ask(
            &pair.topology.client,
            "POST",
            &format!("/dirty/{pages}/0/4096"),
        );
        let before = number(&pair.primary.status().unwrap(), "checkpoints");
        ask(&pair.topology.client, "GET", "/random");
        let more = |status: &Value| number(status, "checkpoints") > before;
        let status = pair.primary.wait_status("a checkpoint", TIMEOUT, more);
        let last = status.unwrap()["last_checkpoint"].clone();
        (number(&last, "dirty_pages") >= pages).then_some(last)
    });
    let last = found.expect("a checkpoint of all pages");
    let (pause_us, transfer_us) = (number(&last, "pause_us"), number(&last, "transfer_us"));
    println!("pause {pause_us} us, transfer {transfer_us} us");
    assert!(pause_us < transfer_us / 10, "{last:#}");
}

/// What it was not given it will not have for the next checkpoint either: all that was dirty is dirty still.
#[test]
fn a_secondary_without_room_for_a_checkpoint_is_left_and_the_service_goes_on() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let mut settings = settings(&bench);
    // Nothing travels before a checkpoint needs it.
    settings.secondary_extra = "[checkpoint]\nstage_mib = 1\nahead_mib = 0\n".to_owned();
    // Both write in their own time; that it differs takes a checkpoint.
    settings.compare_deadline_ms = 5_000;
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    // Other contents on each.
    ask(&pair.topology.client, "POST", "/dirty/2000/0/4096");
    // Whatever diverges.
    let load = Load::start(&pair.topology.client, LoadConfig::new(4, 5)).unwrap();
    // The primary gives the link up and keeps the VM (rule 19); the secondary is told no.
    let alone = |status: &Value| status["state"] == "alone";
    let status = pair.primary.wait_status("alone", TIMEOUT, alone).unwrap();
    let reason = status["unprotected_reason"].as_str().unwrap();
    assert!(reason.contains("checkpoint.stage_mib = 1"), "{reason}");
    assert!(number(&status, "aborts") > 0, "{status:#}");
    let ended = pair.secondary.wait_exit(TIMEOUT).unwrap();
    assert_eq!(ended.code(), Some(3), "{}", pair.secondary.log_tail());
    assert!(
        load.wait_answers(2_000, TIMEOUT),
        "the service stands still"
    );
    let report = load.finish().unwrap();
    loads::assert_right(&report);
}
