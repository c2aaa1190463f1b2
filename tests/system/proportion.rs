//! What a checkpoint takes of a secondary's host follows the checkpoint, not the guest's memory, and audits come at the rate that
//! was asked for.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::time::Duration;

use colo_lab::pair::{Pair, Settings};
use colo_lab::process::Process;
use colo_tests::bench::Bench;
use colo_tests::clients::ask;
use colo_tests::status::number;
use serde_json::Value;

const WAIT: Duration = Duration::from_secs(60);
const RAM_MIB: u32 = 1024;
const AUDIT_EVERY: u64 = 3;
const FEW_PAGES: u64 = 2_000;
const MANY_PAGES: u64 = 30_000;
const MIB: u64 = 1 << 20;
/// Of each checkpoint: what its staging memory is rounded up to, what an audit of such a guest digests into, the rest.
const SLACK: u64 = 32 * MIB;
/// Staging memory that is kept for the next checkpoint.
const SPARE: u64 = 64 * MIB;

/// Memory of a process in bytes, as the kernel accounts for it.
#[derive(Clone, Copy, Debug)]
struct Memory {
    /// Its own; a guest's RAM is memory of a file.
    own: u64,
    /// Of files, guest RAM among them.
    of_files: u64,
    /// The most that it had of both together, since [`forget_most`].
    most: u64,
}

impl Memory {
    fn of(process: &Process) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
        let bytes = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.unwrap().trim_start_matches(':').trim();
            kib.trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
        };
        Self {
            own: bytes("RssAnon"),
            of_files: bytes("RssFile") + bytes("RssShmem"),
            most: bytes("VmHWM"),
        }
    }
}

/// Lets the kernel look for a new maximum.
fn forget_most(process: &Process) {
    std::fs::write(format!("/proc/{}/clear_refs", process.pid()), "5").unwrap();
}

/// Has so many pages written, then a divergence, and waits until the checkpoint is applied. Gives the most memory of its own
/// that the secondary had meanwhile, beyond `before`: it has most of it when the last page is written, and the host's mapping
/// of the guest's RAM has all pages by then.
fn checkpoint(pair: &mut Pair, pages: u64, before: u64) -> u64 {
    let client = &pair.topology.client;
    ask(client, "POST", &format!("/dirty/{pages}/0/4096"));
    forget_most(&pair.secondary);
    let committed = number(&pair.primary.status().unwrap(), "checkpoints");
    let applied = number(&pair.secondary.status().unwrap(), "checkpoints");
    ask(&pair.topology.client, "GET", "/random");
    let more = |counted: u64| move |status: &Value| number(status, "checkpoints") > counted;
    pair.primary
        .wait_status("a commit", WAIT, more(committed))
        .unwrap();
    pair.secondary
        .wait_status("applied", WAIT, more(applied))
        .unwrap();
    let after = Memory::of(&pair.secondary);
    let own = after.most.saturating_sub(after.of_files);
    own.saturating_sub(before)
}

#[test]
fn staging_memory_follows_the_checkpoint_and_one_checkpoint_in_so_many_is_audited() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let lines = format!("[checkpoint]\naudit_every = {AUDIT_EVERY}\nahead_mib = 0\n");
    let settings = Settings {
        ram_mib: RAM_MIB,
        // Pages of both guests differ when they are told to write them, each in its own time.
        compare_deadline_ms: 5_000,
        primary_extra: lines.clone(),
        secondary_extra: lines,
        ..bench.settings()
    };
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    // What the secondary needs for every checkpoint.
    checkpoint(&mut pair, 1, 0);
    let before = Memory::of(&pair.secondary).own;
    let few = checkpoint(&mut pair, FEW_PAGES, before);
    let many = checkpoint(&mut pair, MANY_PAGES, before);
    println!(
        "{} MiB before; {} MiB more for {FEW_PAGES} pages, {} for {MANY_PAGES}",
        before / MIB,
        few / MIB,
        many / MIB
    );
    assert!(few < FEW_PAGES * 4096 + SLACK, "{few} bytes");
    let pages = MANY_PAGES * 4096;
    // Some are equal, or zeros, which take none.
    assert!(
        (pages / 4 * 3..pages + pages / 8 + SLACK).contains(&many),
        "{many} bytes"
    );

    gives_back_down_to(&mut pair, before + SPARE + SLACK);
    audits_come_at_the_rate_asked_for(&mut pair);
}

/// Each small checkpoint gives some of what a large one took back to the system, behind its apply.
fn gives_back_down_to(pair: &mut Pair, limit: u64) {
    for checkpoints in 0..20 {
        let own = Memory::of(&pair.secondary).own;
        if own < limit {
            println!("{} MiB after {checkpoints} small checkpoints", own / MIB);
            return;
        }
        checkpoint(pair, 1, 0);
    }
    panic!("{} MiB are kept", Memory::of(&pair.secondary).own / MIB);
}

/// The counters of each host over whole rounds of audits, wherever in a round they begin: so many that no other rate would do.
fn audits_come_at_the_rate_asked_for(pair: &mut Pair) {
    let counts = |process: &Process| {
        let status = process.status().unwrap();
        ["checkpoints", "audits"].map(|name| number(&status, name))
    };
    let of_both = |pair: &Pair| [counts(&pair.primary), counts(&pair.secondary)];
    let before = of_both(pair);
    let mut is_right = [false; 2];
    for _ in 0..12 * AUDIT_EVERY {
        checkpoint(pair, 1, 0);
        for (host, after) in of_both(pair).into_iter().enumerate() {
            let [checkpoints, audits] = [0, 1].map(|n| after[n] - before[host][n]);
            if checkpoints >= 4 * AUDIT_EVERY && checkpoints.is_multiple_of(AUDIT_EVERY) {
                assert_eq!(audits, checkpoints / AUDIT_EVERY, "of {checkpoints}");
                is_right[host] = true;
            }
        }
        if is_right == [true; 2] {
            break;
        }
    }
    assert_eq!(is_right, [true; 2]);
    let status = pair.primary.status().unwrap();
    assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
}
