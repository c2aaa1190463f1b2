//! `colo snapshot` and `colo run --restore`, with clients that no one here wrote.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use colo_lab::load::{Load, LoadConfig, ports};
use colo_lab::netns::Netns;
use colo_lab::pair::{Pair, Settings, Single, status_socket};
use colo_lab::process::Process;
use colo_lab::topology::{GUEST, GUEST_V4, Host, Topology};
use colo_tests::bench::Bench;
use colo_tests::clients;

/// Longest wait for answers of the guest.
const PATIENCE: Duration = Duration::from_secs(30);

fn redis(client: &Netns, command: &[&str]) -> String {
    let host = IpAddr::from(GUEST_V4).to_string();
    let output = client
        .command("redis-cli")
        .args(["-h", &host])
        .args(command)
        .output()
        .unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout)
        .unwrap()
        .trim_end()
        .to_owned()
}

fn colo(bench: &Bench, arguments: &[&str]) -> Output {
    Command::new(bench.colo()).args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Takes a snapshot of the machine on `host` and gives what it cost.
fn snapshot(bench: &Bench, host: Host, file: &Path) -> serde_json::Value {
    let socket = status_socket(host, bench.dir());
    let arguments = ["snapshot", text(file), "--socket", text(&socket), "--json"];
    let output = colo(bench, &arguments);
    assert!(output.status.success(), "{output:?}");
    let report = serde_json::from_slice(&output.stdout).unwrap();
    println!("{report}");
    report
}

fn restore(bench: &Bench, topology: Topology, file: &Path, more: &[&str]) -> Single {
    let mut arguments = vec!["--restore", text(file)];
    arguments.extend(more);
    Single::start_in(topology, &bench.settings(), bench.dir(), &arguments).unwrap()
}

/// One connection to the guest's redis that is never closed.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(client: &Netns) -> Self {
        let connect = || TcpStream::connect((GUEST_V4, ports::RESP));
        let stream = client.run(connect).unwrap().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn ask(&mut self, command: &str) -> String {
        let words: Vec<_> = command.split(' ').collect();
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

#[test]
fn a_guest_and_its_connections_go_on_after_a_restore_as_often_as_one_likes() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let single = Single::start(&bench.settings(), bench.dir()).unwrap();
    let client = &single.topology.client;
    let value = "v".repeat(20_000);
    assert_eq!(redis(client, &["SET", "long", &value]), "OK");
    assert_eq!(redis(client, &["RPUSH", "list", "a", "b", "c"]), "3");
    let mut connection = Connection::open(client);
    assert_eq!(connection.ask("INCR counter"), ":1");

    let file = bench.dir().join("vm.snap");
    let report = snapshot(&bench, Host::A, &file);
    assert!(report["stored_pages"].as_u64() < report["pages"].as_u64());
    let verified = colo(&bench, &["snapshot", text(&file), "--verify"]);
    assert!(verified.status.success(), "{verified:?}");
    // The connection is as the snapshot has it until the machine is gone.
    let mut topology = kill(single);
    for more in [&[][..], &["--verify"]] {
        let single = restore(&bench, topology, &file, more);
        let client = &single.topology.client;
        assert_eq!(redis(client, &["GET", "long"]), value);
        assert_eq!(redis(client, &["LRANGE", "list", "0", "-1"]), "a\nb\nc");
        assert_eq!(redis(client, &["GET", "counter"]), "1");
        if more.is_empty() {
            assert_eq!(connection.ask("INCR counter"), ":2", "the same connection");
        }
        assert_eq!(redis(client, &["SET", "long", "other"]), "OK");
        topology = kill(single);
    }
}

fn kill(mut single: Single) -> Topology {
    single.process.kill().unwrap();
    single.topology
}

/// Bytes of its mappings of a file that a process has in memory.
fn resident(process: &Process, file: &Path) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", process.pid())).unwrap();
    let (mut is_it, mut kib) = (false, 0);
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            is_it = line.ends_with(text(file));
        } else if is_it && first == "Rss:" {
            let number = line.trim_end_matches(" kB").rsplit(' ').next();
            kib += number.and_then(|n| n.parse::<u64>().ok()).unwrap();
        }
    }
    kib * 1024
}

/// Pages that a guest of the next two tests has in use.
const USED_PAGES: u64 = 16_000;

/// A guest that uses most of its memory, in a file; the machine is gone.
fn large_snapshot(bench: &Bench, settings: &Settings) -> (Topology, PathBuf) {
    let single = Single::start(settings, bench.dir()).unwrap();
    let client = &single.topology.client;
    clients::ask(client, "POST", &format!("/dirty/{USED_PAGES}/0/4096"));
    assert_eq!(redis(client, &["SET", "key", "value"]), "OK");
    let file = bench.dir().join("vm.snap");
    let report = snapshot(bench, Host::A, &file);
    assert!(report["stored_pages"].as_u64() > Some(USED_PAGES));
    (kill(single), file)
}

fn large(bench: &Bench) -> Settings {
    Settings {
        ram_mib: 512,
        ..bench.settings()
    }
}

fn restore_large(bench: &Bench, settings: &Settings, topology: Topology, file: &Path) -> Single {
    let arguments = ["--restore", text(file)];
    Single::start_in(topology, settings, bench.dir(), &arguments).unwrap()
}

#[test]
fn a_restored_guest_takes_the_memory_that_it_touches_and_no_more() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let settings = large(&bench);
    let (topology, file) = large_snapshot(&bench, &settings);
    let single = restore_large(&bench, &settings, topology, &file);
    let client = &single.topology.client;
    assert_eq!(redis(client, &["GET", "key"]), "value");
    clients::curl_sees_state(client);
    let stored = USED_PAGES * 4096;
    let served = resident(&single.process, &file);
    println!("{served} of {stored} bytes in memory while it serves");
    // The kernel maps what lies around a page as well, if it has read it.
    assert!(0 < served && served < stored / 4, "{served}");
    // What it needs comes, and the measure sees it.
    clients::ask(client, "POST", &format!("/dirty/{USED_PAGES}/0/4096"));
    let all = resident(&single.process, &file);
    assert!(all >= stored, "{all}");
    assert_eq!(redis(client, &["GET", "key"]), "value");
}

#[test]
fn a_restored_guest_whose_file_is_changed_is_stopped_with_a_reason() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let settings = large(&bench);
    let (mut topology, file) = large_snapshot(&bench, &settings);
    let length = fs::metadata(&file).unwrap().len();
    let changes: [&dyn Fn(&File); 2] = [
        // What the guest has not looked at yet, at the end of its RAM; what it uses all the time.
        &|file| file.write_all_at(b"other", length - 4096).unwrap(),
        &|file| file.set_len(8192).unwrap(),
    ];
    for change in changes {
        let mut single = restore_large(&bench, &settings, topology, &file);
        change(&File::options().write(true).open(&file).unwrap());
        let ended = single.process.wait_exit(PATIENCE).unwrap();
        let told = single.process.log_tail();
        assert_eq!(ended.code(), Some(1), "{ended:?}: {told}");
        assert!(
            told.contains("vm.snap: changed while") || told.contains("vm.snap: a page of it"),
            "{told}"
        );
        topology = single.topology;
    }
}

#[test]
fn a_guest_under_load_survives_its_snapshots() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let single = Single::start(&bench.settings(), bench.dir()).unwrap();
    let load = Load::start(&single.topology.client, LoadConfig::new(64, 1)).unwrap();
    assert!(load.wait_answers(2000, PATIENCE));
    let file = bench.dir().join("vm.snap");
    for _ in 0..3 {
        snapshot(&bench, Host::A, &file);
    }
    let answers = load.finish().unwrap();
    assert_eq!(
        (answers.client_errors, answers.wrong_responses),
        (0, 0),
        "{:#?}",
        answers.notes
    );
    // Its connections are gone, but not the guest's mind.
    let topology = kill(single);
    let single = restore(&bench, topology, &file, &[]);
    clients::redis_cli(&single.topology.client, GUEST[0]);
}

#[test]
fn a_snapshot_of_a_protected_primary_does_not_disturb_the_pair() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = Pair::start(&bench.settings(), bench.dir()).unwrap();
    assert_eq!(redis(&pair.topology.client, &["SET", "key", "value"]), "OK");
    let load = Load::start(&pair.topology.client, LoadConfig::new(32, 1)).unwrap();
    assert!(load.wait_answers(500, PATIENCE));
    let before = pair.wait_protected(Host::A).unwrap();
    let file = bench.dir().join("vm.snap");
    for _ in 0..2 {
        snapshot(&bench, Host::A, &file);
    }
    let socket = status_socket(Host::B, bench.dir());
    let output = colo(
        &bench,
        &["snapshot", text(&file), "--socket", text(&socket)],
    );
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && why.contains("ask its primary"),
        "{why}"
    );

    let answers = load.finish().unwrap();
    assert_eq!(
        (answers.client_errors, answers.wrong_responses),
        (0, 0),
        "{:#?}",
        answers.notes
    );
    let after = pair.wait_protected(Host::A).unwrap();
    for same in ["generation", "takeovers", "sync_us", "checkpoints_aborted"] {
        assert_eq!(before[same], after[same], "{same}");
    }
    // The pair's protection holds, and the file is a machine of its own.
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    assert_eq!(redis(&pair.topology.client, &["GET", "key"]), "value");
    pair.secondary.kill().unwrap();
    let single = restore(&bench, pair.topology, &file, &["--verify"]);
    assert_eq!(redis(&single.topology.client, &["GET", "key"]), "value");
}

#[test]
fn what_cannot_be_taken_or_restored_is_refused_with_its_reason() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = bench.settings();
    let single = Single::start(&settings, bench.dir()).unwrap();
    let file = bench.dir().join("vm.snap");
    let refused = |arguments: &[&str], code: i32, reason: &str| {
        let output = colo(&bench, arguments);
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {why}");
        assert!(why.contains(reason), "{arguments:?}: {why}");
    };
    let config = settings.run_file(bench.dir()).unwrap();
    let run = ["run", text(&config), "--restore", text(&file)];
    refused(&run, 1, "No such file");
    refused(&["snapshot", text(&file)], 2, "required");
    let socket = bench.dir().join("nobody.sock");
    let arguments = ["snapshot", text(&file), "--socket", text(&socket)];
    refused(&arguments, 1, "is the machine running?");
    let nowhere = bench.dir().join("none/vm.snap");
    let arguments = ["snapshot", text(&nowhere), "--config", text(&config)];
    refused(&arguments, 1, "none/vm.snap: No such file");
    snapshot(&bench, Host::A, &file);
    clients::redis_cli(&single.topology.client, GUEST[0]);
    drop(single);

    settings.ram_mib = 64;
    settings.run_file(bench.dir()).unwrap();
    refused(&run, 2, "vm.ram_mib is 128 in the snapshot and 64 here");
    let good = fs::read(&file).unwrap();
    let damaged = File::options().write(true).open(&file).unwrap();
    damaged.write_all_at(&[good[5000] ^ 1], 5000).unwrap();
    refused(&run, 1, "damaged");
    damaged.set_len(good.len() as u64 - 4096).unwrap();
    refused(&run, 1, "cut off");
    refused(&["snapshot", text(&file), "--verify"], 1, "cut off");
}
