//! `colo demo`: what it writes, when it fails, what it leaves behind.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::path::Path;
use std::process::{Command, Output};

use colo_tests::bench::Bench;
use serde_json::Value;

fn demo(bench: &Bench, args: &[&str]) -> (Output, Value) {
    let file = bench.dir().join("out.json");
    let mut command = Command::new(bench.colo());
    command.arg("demo").args(args).arg("--json").arg(&file);
    let output = command.output().unwrap();
    let json = std::fs::read(&file).map(|text| serde_json::from_slice(&text).unwrap());
    (output, json.unwrap_or(Value::Null))
}

fn text(output: &Output) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout);
    format!(
        "{}\n{stdout}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    )
}

/// No namespace whose creator is gone.
fn assert_nothing_left() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for entry in entries {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(rest) = name.strip_prefix("colo-") else {
            continue;
        };
        let pid = rest.split('-').next().unwrap();
        assert!(
            Path::new("/proc").join(pid).exists(),
            "{name} is left behind"
        );
    }
}

#[test]
fn a_demo_with_a_kill_passes() {
    let Some(bench) = Bench::new(&[]) else { return };
    let (output, json) = demo(&bench, &["--seconds", "6"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(
        (&json["client_errors"], &json["wrong_responses"]),
        (&0.into(), &0.into())
    );
    assert_eq!(json["requests"], json["responses"]);
    assert_eq!(json["failover"]["connections_lost"], 0);
    assert!(
        json["failover"]["outage_ms"].as_f64().unwrap() > 0.0,
        "{json:#}"
    );
    for key in [
        "requests",
        "compared",
        "released_by_match",
        "divergences",
        "checkpoints",
    ] {
        assert!(json[key].as_u64().unwrap() > 0, "{key} in {json:#}");
    }
    assert_nothing_left();
}

#[test]
fn a_demo_without_a_kill_passes() {
    let Some(bench) = Bench::new(&[]) else { return };
    let args = [
        "--seconds",
        "4",
        "--no-failover",
        "--no-divergence",
        "--clients",
        "8",
    ];
    let (output, json) = demo(&bench, &args);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(json["failover"], Value::Null);
}

#[test]
fn a_comparator_that_says_equal_makes_the_demo_fail() {
    let Some(bench) = Bench::new(&[]) else { return };
    // It must be the clients who notice. A secondary that overflows asks for checkpoints even so; one that came
    // right before the kill leaves them nothing to notice, hence more than one life.
    let mut noticed = 0;
    for _ in 0..4 {
        let (output, json) = demo(&bench, &["--seconds", "6", "--test-hook", "always-equal"]);
        assert!(!output.status.success(), "{}", text(&output));
        let bad = ["wrong_responses", "client_errors"].map(|key| json[key].as_u64().unwrap());
        noticed = bad.iter().sum::<u64>();
        if noticed > 0 {
            break;
        }
    }
    assert!(noticed > 0, "no client noticed anything in four lives");
    assert_nothing_left();
}

#[test]
fn bad_arguments_are_refused() {
    let Some(bench) = Bench::new(&[]) else { return };
    for args in [
        ["--seconds", "0"],
        ["--clients", "0"],
        ["--clients", "many"],
    ] {
        let (output, json) = demo(&bench, &args);
        assert_eq!(
            (output.status.code(), json),
            (Some(2), Value::Null),
            "{}",
            text(&output)
        );
    }
}
