//! `colo compare --sockets` as a process: exit codes, messages, the JSON document.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io::Write;
use std::process::{Command, Output};
use std::time::Duration;

use colo_compare::testing::{Segment, Side, udp};
use colo_lab::comparator::{Comparator, ComparatorOptions, Kind, message};
use colo_tests::bench::colo;
use serde_json::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

fn start() -> (TempDir, Comparator) {
    start_with(tempfile::tempdir().unwrap(), &[])
}

fn start_with(dir: TempDir, arguments: &[&str]) -> (TempDir, Comparator) {
    let arguments = [&["--json"], arguments].concat();
    let options = ComparatorOptions {
        arguments: arguments.into_iter().map(str::to_owned).collect(),
        ..ComparatorOptions::default()
    };
    let comparator = Comparator::start(Kind::Colo(colo()), &options, dir.path()).unwrap();
    (dir, comparator)
}

fn segment(payload: &[u8]) -> Vec<u8> {
    Segment::new(Side::V4).payload(payload).bytes()
}

/// Closes the sockets and gives the exit code and the output.
fn end(comparator: Comparator) -> (Option<i32>, String) {
    let Comparator {
        mut process,
        primary,
        secondary,
        ..
    } = comparator;
    drop((primary, secondary));
    let status = process.wait_exit(PATIENCE).unwrap();
    (status.code(), process.log())
}

fn document(log: &str) -> Value {
    let at = log.find("{\n").expect("a document");
    serde_json::from_str(&log[at..]).expect("a whole document")
}

#[test]
fn guests_that_sent_the_same_end_with_0() {
    let (_dir, mut comparator) = start();
    comparator.primary_sends(&segment(b"abc")).unwrap();
    comparator.secondary_sends(&segment(b"abc")).unwrap();
    assert_eq!(comparator.released().unwrap(), segment(b"abc"));
    let (code, log) = end(comparator);
    let document = document(&log);
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(document["pairs"], 1);
    assert_eq!(document["released"], 1);
    assert_eq!(
        (&document["held"], &document["dropped"]),
        (&0.into(), &0.into())
    );
    assert_eq!(document["divergences"], Value::Array(Vec::new()));
    assert_eq!(document["flows"], 1);
}

#[test]
fn what_a_policy_lets_go_counts_as_released() {
    let dir = tempfile::tempdir().unwrap();
    let policy = dir.path().join("policy.toml");
    let rule = "[[rule]]\nprotocol = \"udp\"\naction = \"release\"\n";
    std::fs::write(&policy, rule).unwrap();
    let arguments = ["--policy", policy.to_str().unwrap()];
    let (_dir, mut comparator) = start_with(dir, &arguments);
    let free = udp(Side::V4, false, 53, 9, b"differs always");
    comparator.primary_sends(&free).unwrap();
    assert_eq!(comparator.released().unwrap(), free);
    comparator.primary_sends(&segment(b"abc")).unwrap();
    comparator.secondary_sends(&segment(b"abc")).unwrap();
    assert_eq!(comparator.released().unwrap(), segment(b"abc"));
    let (code, log) = end(comparator);
    let document = document(&log);
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(
        (&document["released"], &document["flows"]),
        (&2.into(), &2.into())
    );
    assert_eq!(
        (&document["pairs"], &document["held"]),
        (&1.into(), &0.into())
    );
}

#[test]
fn guests_that_diverged_end_with_1() {
    let (_dir, mut comparator) = start();
    comparator.primary_sends(&segment(b"abc")).unwrap();
    comparator.secondary_sends(&segment(b"abX")).unwrap();
    assert_eq!(comparator.notified().unwrap(), "DO_CHECKPOINT");
    comparator.checkpoint_taken().unwrap();
    assert_eq!(comparator.released().unwrap(), segment(b"abc"));
    let (code, log) = end(comparator);
    let document = document(&log);
    assert_eq!(code, Some(1), "{log}");
    assert_eq!(document["checkpoints"], 1);
    assert_eq!(document["divergences"][0]["cause"], "payload");
    assert_eq!(document["divergences"][0]["offset"], 2);
    // The primary's left by the checkpoint, the secondary's stood for nothing.
    assert_eq!(
        (&document["released"], &document["dropped"]),
        (&1.into(), &1.into())
    );
}

#[test]
fn a_stream_that_is_cut_short_ends_with_2_and_the_place() {
    let (_dir, mut comparator) = start();
    let whole = message(&segment(b"abc"), false);
    comparator.secondary.write_all(&whole).unwrap();
    comparator.secondary.write_all(&whole[..9]).unwrap();
    let (code, log) = end(comparator);
    assert_eq!(code, Some(2), "{log}");
    let place = format!("within a message at byte {}, after 9", whole.len());
    assert!(
        log.contains("secondary_in (connect:/") && log.contains(&place),
        "{log}"
    );
}

fn run(arguments: &[&str]) -> Output {
    Command::new(colo())
        .arg("compare")
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_socket_that_is_not_there_ends_with_2_and_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| format!("connect:{}", dir.path().join(name).display());
    let output = run(&["--sockets", &path("p"), &path("s"), &path("o")]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("primary_in") && text.contains(&path("p")),
        "{text}"
    );
}

#[test]
fn a_command_line_that_names_too_little_ends_with_2() {
    for arguments in [
        &["--sockets", "/a", "/b"][..],
        &["--sockets", "/a", "/b", "host:port"],
        &["--notify", "/a"],
        &["--vnet-hdr"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}
