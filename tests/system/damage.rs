//! A link that damages data: a spoilt checkpoint is repeated, broken page streams are opened anew, a broken packet stream ends
//! the pair, and clients never notice any of it.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::topology::Host;
use colo_tests::bench::Bench;
use colo_tests::clients::ask;
use colo_tests::compare::Compare;
use colo_tests::relay::{self, Chunk, Kind, PACKETS, PAGES};
use colo_tests::{both_ways, loads};

const WAIT: Duration = Duration::from_secs(30);

/// What the link damages once it is armed, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    /// A bit in the contents of a page of a checkpoint.
    Page,
    /// A bit in the records before the pages.
    Record,
    /// A bit in the head of a chunk of pages.
    Head,
    /// A bit in a page that travels ahead of its checkpoint.
    Ahead,
    /// A bit in the SVM's digests, on their way to the primary.
    Digests,
    /// A bit in the head of a chunk of them.
    DigestHead,
    /// The packet channel turns into noise.
    Packets,
}

/// Told to strike once, and whether it has.
#[derive(Clone, Debug, Default)]
struct Trigger(Arc<AtomicBool>);

impl Trigger {
    fn arm(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn strikes(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }

    fn has_struck(&self) -> bool {
        !self.0.load(Ordering::SeqCst)
    }
}

/// Passes the chunks of the page channel on, one of them damaged.
fn chunks(
    from: &mut TcpStream,
    to: &mut TcpStream,
    damage: Damage,
    trigger: &Trigger,
) -> io::Result<()> {
    let kind = match damage {
        Damage::Ahead => Kind::Ahead,
        Damage::Digests | Damage::DigestHead => Kind::Digests,
        _ => Kind::Pages,
    };
    loop {
        let mut chunk = Chunk::read(from)?;
        if chunk.kind() == kind && trigger.strikes() {
            let middle = chunk.payload.len() / 2;
            match damage {
                Damage::Head | Damage::DigestHead => chunk.head[25] ^= 0x20,
                Damage::Record => chunk.payload[12] ^= 0x20,
                _ => chunk.payload[middle] ^= 0x20,
            }
        }
        chunk.write(to)?;
    }
}

fn noise(from: &mut TcpStream, to: &mut TcpStream, trigger: &Trigger) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        if trigger.strikes() {
            buffer[..n].fill(0xdb);
        }
        to.write_all(&buffer[..n])?;
    }
}

/// A pair whose link damages what one of the hosts sends.
fn pair_through(bench: &Bench, settings: &Settings, damage: Damage) -> (Pair, Trigger) {
    let trigger = Trigger::default();
    let inner = trigger.clone();
    let pass = move |channel, from: &mut TcpStream, to: &mut TcpStream| match channel {
        PACKETS if damage == Damage::Packets => noise(from, to, &inner),
        PAGES if damage != Damage::Packets => chunks(from, to, damage, &inner),
        _ => relay::plainly(from, to),
    };
    let damaged: Arc<relay::Pass> = Arc::new(pass);
    let plain: Arc<relay::Pass> = Arc::new(|_, from, to| relay::plainly(from, to));
    let passes = match damage {
        Damage::Digests | Damage::DigestHead => [plain, damaged],
        _ => [damaged, plain],
    };
    // Control, packets and pages, and pages again.
    let pair = relay::pair_between(bench, settings, 4, passes);
    (pair, trigger)
}

fn load(pair: &Pair) -> Load {
    Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap()
}

fn finish(load: Load) {
    assert!(load.wait_answers(2_000, WAIT), "the service stands still");
    let report = load.finish().unwrap();
    loads::assert_right(&report);
    assert_eq!(report.requests, report.responses);
    assert!(report.audited > 10, "{report:#?}");
}

#[test]
fn rule_14_a_damaged_checkpoint_is_taken_again_and_the_pair_goes_on() {
    let ways = [
        (Damage::Page, Compare::Bytes),
        (Damage::Page, Compare::Digests),
        (Damage::Record, Compare::Bytes),
        (Damage::Digests, Compare::Digests),
    ];
    for (damage, compare) in ways {
        damaged_checkpoint(damage, compare);
    }
}

fn damaged_checkpoint(damage: Damage, compare: Compare) {
    let Some(bench) = Bench::new(&[]) else { return };
    let (mut pair, trigger) = pair_through(&bench, &compare.settings(&bench), damage);
    let load = load(&pair);
    trigger.arm();
    let aborted = |status: &serde_json::Value| status["checkpoints_aborted"] == 1;
    let status = pair.primary.wait_status("aborted", WAIT, aborted).unwrap();
    assert!(trigger.has_struck());
    assert_eq!(status["state"], "paired");
    let before = status["checkpoints"].as_u64().unwrap();
    let more = |status: &serde_json::Value| status["checkpoints"].as_u64() > Some(before + 3);
    let waited = pair.primary.wait_status("more checkpoints", WAIT, more);
    let status = waited.unwrap();
    assert_eq!(status["checkpoints_aborted"], 1, "{damage:?}");
    compare.assert_used(&status);
    // What came after the damage is as good as what came before.
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    finish(load);
}

#[test]
fn rule_14_a_damaged_page_ahead_costs_the_checkpoint_that_names_it_and_no_more() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let settings = Settings {
        // What the guests write in their own time is no divergence.
        compare_deadline_ms: 5_000,
        ..bench.settings()
    };
    let (mut pair, trigger) = pair_through(&bench, &settings, Damage::Ahead);
    trigger.arm();
    ask(&pair.topology.client, "POST", "/dirty/2000/0/4096");
    let sent = |status: &serde_json::Value| status["ahead"]["sent_pages"].as_u64() >= Some(1_900);
    let status = pair.primary.wait_status("sent ahead", WAIT, sent).unwrap();
    assert!(trigger.has_struck());
    let before = status["checkpoints"].as_u64().unwrap();
    ask(&pair.topology.client, "GET", "/random");
    let more = |status: &serde_json::Value| status["checkpoints"].as_u64() > Some(before);
    let status = pair.primary.wait_status("a commit", WAIT, more).unwrap();
    assert_eq!(status["checkpoints_aborted"], 1, "{status:#}");
    assert_eq!(status["state"], "paired");
    let last = &status["last_checkpoint"];
    assert!(last["dirty_pages"].as_u64() >= Some(2_000), "{last:#}");
    assert_eq!(last["ahead"]["used_pages"], 0, "the next one is whole");
    let refused = |status: &serde_json::Value| status["ahead_area"]["refused_chunks"] == 1;
    let waited = pair.secondary.wait_status("applied", WAIT, refused);
    waited.unwrap();
    // What came after the damage is as good as what came before.
    let load = load(&pair);
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    finish(load);
}

#[test]
fn rule_14_page_streams_that_break_are_opened_anew_and_the_pair_goes_on() {
    for damage in [Damage::Head, Damage::DigestHead] {
        broken_streams(damage);
    }
}

fn broken_streams(damage: Damage) {
    let Some(bench) = Bench::new(&[]) else { return };
    let (mut pair, trigger) = pair_through(&bench, &bench.settings(), damage);
    let load = load(&pair);
    trigger.arm();
    let reopened = |status: &serde_json::Value| status["streams_reopened"] == 1;
    let waited = pair.primary.wait_status("reopened", WAIT, reopened);
    let status = waited.unwrap();
    assert!(trigger.has_struck());
    assert_eq!(status["state"], "paired", "{damage:?}");
    let before = status["checkpoints"].as_u64().unwrap();
    let more = |status: &serde_json::Value| status["checkpoints"].as_u64() > Some(before + 3);
    let waited = pair.primary.wait_status("more checkpoints", WAIT, more);
    let status = waited.unwrap();
    let aborted = status["checkpoints_aborted"].as_u64().unwrap();
    assert!((1..=4).contains(&aborted), "{damage:?}: {aborted}");
    let waited = pair.secondary.wait_status("reopened", WAIT, reopened);
    waited.unwrap();
    // What came after the damage is as good as what came before.
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    finish(load);
}

both_ways!(a_broken_packet_stream_ends_the_pair_and_one_host_goes_on);

fn a_broken_packet_stream_ends_the_pair_and_one_host_goes_on(compare: Compare) {
    let Some(bench) = Bench::new(&[]) else { return };
    let settings = compare.settings(&bench);
    let (mut pair, trigger) = pair_through(&bench, &settings, Damage::Packets);
    let load = load(&pair);
    load.mark_kill();
    trigger.arm();
    let (_, other) = pair.wait_winner().unwrap();
    assert!(trigger.has_struck());
    // 3: another host holds the VM now.
    assert_eq!(other.code(), Some(3));
    finish(load);
}
