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
    assert!(
        (pages..pages + pages / 8 + SLACK).contains(&many),
        "{many} bytes"
    );

    let after = gives_back(&mut pair);
    println!("{} MiB when it gives back no more", after / MIB);
    assert!(after < before + SPARE + SLACK, "{after} bytes");
    audits_come_at_the_rate_asked_for(&mut pair);
}

/// Small checkpoints until the secondary's memory becomes no less. Gives how much it is then.
fn gives_back(pair: &mut Pair) -> u64 {
    loop {
        let before = Memory::of(&pair.secondary).own;
        checkpoint(pair, 1, 0);
        let after = Memory::of(&pair.secondary).own;
        if after + MIB > before {
            return after;
        }
    }
}

/// The counters of both hosts over two rounds of audits, wherever in a round they begin.
fn audits_come_at_the_rate_asked_for(pair: &mut Pair) {
    let counts = |process: &Process| {
        let status = process.status().unwrap();
        ["checkpoints", "audits", "checkpoints_aborted"].map(|name| number(&status, name))
    };
    let of_both = |pair: &Pair| [counts(&pair.primary), counts(&pair.secondary)];
    let before = of_both(pair);
    for _ in 0..2 * AUDIT_EVERY {
        checkpoint(pair, 1, 0);
    }
    let after = of_both(pair);
    for (before, after) in before.iter().zip(after) {
        let grown = [0, 1, 2].map(|n| after[n] - before[n]);
        assert_eq!(grown, [2 * AUDIT_EVERY, 2, 0], "{before:?}, {after:?}");
    }
}
