//! Checkpoints over several TCP streams: spread over all of them, whole on arrival, and as safe as on one when a stream
//! damages a page, breaks, or the primary dies.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::topology::Host;
use colo_tests::bench::Bench;
use colo_tests::clients::ask;
use colo_tests::loads;
use colo_tests::relay::{self, Chunk, Kind, PAGES, PAGES_AGAIN};
use colo_tests::status::number;
use serde_json::Value;

const WAIT: Duration = Duration::from_secs(60);

/// Pages of both guests differ when they are told to write them, each in its own time.
fn settings(bench: &Bench, primary: &str, secondary: &str) -> Settings {
    let lines = |lines: &str| format!("[checkpoint]\naudit_every = 1\n{lines}\n");
    Settings {
        compare_deadline_ms: 5_000,
        primary_extra: lines(primary),
        secondary_extra: lines(secondary),
        ..bench.settings()
    }
}

/// Has so many pages written, then a divergence; gives the status when its checkpoint is committed.
fn checkpoint(pair: &mut Pair, pages: u64) -> Value {
    ask(
        &pair.topology.client,
        "POST",
        &format!("/dirty/{pages}/0/4096"),
    );
    diverge(pair)
}

fn diverge(pair: &mut Pair) -> Value {
    let before = number(&pair.primary.status().unwrap(), "checkpoints");
    ask(&pair.topology.client, "GET", "/random");
    let more = |status: &Value| number(status, "checkpoints") > before;
    pair.primary.wait_status("a commit", WAIT, more).unwrap()
}

/// Clients that have been served by both hosts notice nothing of the primary's end.
fn kill_primary(mut pair: Pair) {
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap();
    assert!(load.wait_answers(500, WAIT), "the service stands still");
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    finish(load);
}

fn finish(load: Load) {
    assert!(load.wait_answers(2_000, WAIT), "the service stands still");
    let report = load.finish().unwrap();
    loads::assert_right(&report);
    assert_eq!(report.requests, report.responses);
    assert!(report.audited > 10, "{report:#?}");
}

#[test]
fn audited_checkpoints_and_a_takeover_over_two_and_four_streams() {
    for (ours, theirs, both) in [(2, 2, 2), (4, 8, 4)] {
        let Some(bench) = Bench::new(&["curl"]) else {
            return;
        };
        let lines = |streams: u32| format!("streams = {streams}\nahead_mib = 0");
        let settings = settings(&bench, &lines(ours), &lines(theirs));
        let mut pair = Pair::start(&settings, bench.dir()).unwrap();
        for host in [Host::A, Host::B] {
            let status = pair.wait_protected(host).unwrap();
            assert_eq!(status["page_streams"], both, "the smaller number of both");
        }
        for _ in 0..3 {
            let status = checkpoint(&mut pair, 3_000);
            let last = &status["last_checkpoint"];
            assert!(number(last, "sent_bytes") > 3_000 * 4096, "{last:#}");
            assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
            assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
        }
        // Each has at least as many pages as the guest was asked to write.
        let staged = |status: &Value| number(&status["staged_pages"], "in_place") >= 9_000;
        let status = pair.secondary.wait_status("staged", WAIT, staged).unwrap();
        let staged = &status["staged_pages"];
        assert_eq!(
            number(staged, "copied"),
            0,
            "pages stay where they were received"
        );
        kill_primary(pair);
    }
}

#[test]
fn pages_sent_ahead_are_there_when_a_checkpoint_on_other_streams_names_them() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let lines = "streams = 4\nahead_interval_ms = 20";
    let mut pair = Pair::start(&settings(&bench, lines, lines), bench.dir()).unwrap();
    let ahead = |pair: &Pair, key| number(&pair.primary.status().unwrap()["ahead"], key);
    // How many of those sent are not written again depends on how fast the guest is.
    for round in 0.. {
        assert!(round < 20, "too few pages travel ahead");
        let before = ahead(&pair, "sent_pages");
        ask(&pair.topology.client, "POST", "/dirty/3000/0/4096");
        let sent = |status: &Value| number(&status["ahead"], "sent_pages") >= before + 2_700;
        pair.primary.wait_status("sent ahead", WAIT, sent).unwrap();
        let status = diverge(&mut pair);
        assert_eq!(number(&status, "checkpoints_aborted"), 0, "{status:#}");
        assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
        if round >= 2 && ahead(&pair, "used_pages") >= 1_000 {
            break;
        }
    }
    let used = ahead(&pair, "used_pages");
    let applied = |status: &Value| number(&status["ahead_area"], "used_pages") == used;
    let waited = pair.secondary.wait_status("applied", WAIT, applied);
    let status = waited.unwrap();
    assert_eq!(number(&status["ahead_area"], "refused_chunks"), 0);
}

/// What the link does once it is armed, once, to a chunk of pages on the stream that `pair_through` got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    /// It flips a bit in the middle.
    Damage,
    /// It closes the stream in the middle.
    Cut,
}

#[derive(Debug, Default)]
struct Seen {
    armed: AtomicBool,
    /// Chunks of pages, by stream.
    chunks: [AtomicU64; 8],
}

/// Joins through a link that strikes one of four streams, and takes so many more connections afterwards.
fn pair_through(bench: &Bench, blow: Blow, stream: usize, more: usize) -> (Pair, Arc<Seen>) {
    let lines = "streams = 4\nahead_mib = 0";
    let settings = settings(bench, lines, lines);
    let seen = Arc::new(Seen::default());
    let noted = seen.clone();
    let pass = move |channel, from: &mut TcpStream, to: &mut TcpStream| match channel {
        ..PAGES | PAGES_AGAIN.. => relay::plainly(from, to),
        PAGES.. => {
            let number = usize::from(channel - PAGES);
            let strike = (number == stream).then_some(blow);
            chunks((from, to), number, strike, &noted)
        }
    };
    // The question, control, packets and four streams of pages.
    let pair = relay::pair_through(bench, &settings, 7 + more, Arc::new(pass));
    assert_eq!(pair.primary.status().unwrap()["page_streams"], 4);
    (pair, seen)
}

/// Passes the chunks of a stream on, but for the one that is struck.
fn chunks(
    (from, to): (&mut TcpStream, &mut TcpStream),
    stream: usize,
    strike: Option<Blow>,
    seen: &Seen,
) -> io::Result<()> {
    loop {
        let mut chunk = Chunk::read(from)?;
        if chunk.kind() == Kind::Pages {
            seen.chunks[stream].fetch_add(1, Ordering::SeqCst);
            let strikes = |_: &Blow| seen.armed.swap(false, Ordering::SeqCst);
            let half = chunk.payload.len() / 2;
            match strike.filter(strikes) {
                Some(Blow::Damage) => chunk.payload[half] ^= 0x20,
                Some(Blow::Cut) => {
                    chunk.payload.truncate(half);
                    return chunk.write(to);
                }
                None => {}
            }
        }
        chunk.write(to)?;
    }
}

#[test]
fn rule_14_damage_on_one_of_four_streams_costs_one_checkpoint_and_not_the_pair() {
    for stream in [0, 3] {
        let Some(bench) = Bench::new(&["curl"]) else {
            return;
        };
        let (mut pair, seen) = pair_through(&bench, Blow::Damage, stream, 0);
        checkpoint(&mut pair, 3_000);
        let counts = seen.chunks.each_ref().map(|n| n.load(Ordering::SeqCst));
        assert!(counts[..4].iter().all(|&n| n > 3), "{counts:?}");
        seen.armed.store(true, Ordering::SeqCst);
        let status = checkpoint(&mut pair, 3_000);
        assert!(!seen.armed.load(Ordering::SeqCst));
        assert_eq!(number(&status, "checkpoints_aborted"), 1, "{status:#}");
        let status = checkpoint(&mut pair, 3_000);
        assert_eq!(number(&status, "checkpoints_aborted"), 1, "{status:#}");
        assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
        kill_primary(pair);
    }
}

#[test]
fn rule_14_a_stream_that_breaks_in_the_middle_is_opened_anew_with_the_others_and_the_pair_goes_on()
{
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let (mut pair, seen) = pair_through(&bench, Blow::Cut, 2, 4);
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap();
    assert!(load.wait_answers(500, WAIT), "the service stands still");
    seen.armed.store(true, Ordering::SeqCst);
    ask(&pair.topology.client, "POST", "/dirty/3000/0/4096");
    let reopened = |status: &Value| number(status, "streams_reopened") == 1;
    let status = pair.primary.wait_status("reopened", WAIT, reopened);
    let status = status.unwrap();
    assert!(!seen.armed.load(Ordering::SeqCst));
    assert_eq!(
        (&status["state"], &status["page_streams"]),
        (&"paired".into(), &4.into())
    );
    let status = checkpoint(&mut pair, 3_000);
    assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    finish(load);
}

#[test]
fn streams_that_cannot_be_opened_anew_end_the_link_and_the_pair_forms_again() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let (mut pair, seen) = pair_through(&bench, Blow::Cut, 2, 0);
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap();
    assert!(load.wait_answers(500, WAIT), "the service stands still");
    load.mark_kill();
    seen.armed.store(true, Ordering::SeqCst);
    ask(&pair.topology.client, "POST", "/dirty/3000/0/4096");
    let (winner, other) = pair.wait_winner().unwrap();
    assert!(!seen.armed.load(Ordering::SeqCst));
    // The primary lives, so nobody takes the VM from it (rule 19). 3: another host holds it.
    assert_eq!((winner, other.code()), (Host::A, Some(3)));
    let status = pair.primary.status().unwrap();
    assert_eq!(number(&status, "links_given_up"), 1, "{status:#}");
    pair.restart(winner.other(), "secondary").unwrap();
    let status = pair.wait_protected(winner).unwrap();
    assert_eq!(status["page_streams"], 4);
    finish(load);
}
