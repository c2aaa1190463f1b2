//! Page streams that tear or stand still while all else of the link lives: the primary's guest serves on, the status says what
//! became of the link and why, and a secondary gets the state again.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::topology::{GUEST_V4, Host};
use colo_tests::bench::Bench;
use colo_tests::clients::ask;
use colo_tests::loads;
use colo_tests::relay::{self, Chunk, Kind, PAGES, Pass};
use colo_tests::status::number;
use serde_json::{Value, json};

const WAIT: Duration = Duration::from_secs(60);
/// Connections that a relay takes: more than all sessions of a test have.
const MANY: usize = 64;
/// How often a link looks whether what it holds up has ended.
const LOOK: Duration = Duration::from_millis(20);
/// More than the kernel takes in on the way.
const MANY_PAGES: u64 = 8_000;
const FEW_PAGES: u64 = 3_000;

/// What the link does to one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    /// It ends the stream in the middle of it.
    Cut,
    /// It flips a bit of its head.
    Damage,
    /// It takes nothing more, from there on; the end of the stream passes.
    Hold,
    /// The same, but not even the end passes.
    Swallow,
}

/// When: the so many-th chunk of a kind on a stream, once.
#[derive(Clone, Copy, Debug)]
struct Strike {
    blow: Blow,
    kind: Kind,
    nth: u64,
    stream: u8,
}

/// A link that strikes once it is armed.
#[derive(Debug, Default)]
struct Striker {
    /// Chunks to go until it does; 0: it does not.
    left: AtomicU64,
    /// Whether the test is over.
    over: Mutex<bool>,
    ends: Condvar,
}

impl Striker {
    fn arm(&self, strike: Strike) {
        self.left.store(strike.nth, Ordering::SeqCst);
    }

    fn has_struck(&self) -> bool {
        self.left.load(Ordering::SeqCst) == 0
    }

    fn is_due(&self) -> bool {
        let count = |left: u64| left.checked_sub(1);
        let before = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, count);
        before == Ok(1)
    }

    /// Takes nothing and passes nothing on until the test is over, or the stream.
    fn hold(&self, from: &TcpStream, passes_end: bool) {
        let mut over = self.over.lock().unwrap();
        let has_ended = || passes_end && relay::has_ended(from);
        while !(*over || has_ended()) {
            over = self.ends.wait_timeout(over, LOOK).unwrap().0;
        }
    }

    fn chunks(&self, from: &mut TcpStream, to: &mut TcpStream, strike: Strike) -> io::Result<()> {
        loop {
            let mut chunk = Chunk::read(from)?;
            if chunk.kind() == strike.kind && self.is_due() {
                match strike.blow {
                    Blow::Damage => chunk.head[25] ^= 0x20,
                    Blow::Hold | Blow::Swallow => {
                        self.hold(from, strike.blow == Blow::Hold);
                        return Ok(());
                    }
                    Blow::Cut => {
                        chunk.payload.truncate(chunk.payload.len() / 2);
                        chunk.write(to)?;
                        return from.shutdown(Shutdown::Both);
                    }
                }
            }
            chunk.write(to)?;
        }
    }

    /// What passes through a link that strikes: of the primary's, and of the secondary's.
    fn passes(self: &Arc<Self>, strike: Strike) -> [Arc<Pass>; 2] {
        let striker = Arc::clone(self);
        let pass = move |channel: u8, from: &mut TcpStream, to: &mut TcpStream| match channel
            == PAGES + strike.stream
        {
            true => striker.chunks(from, to, strike),
            false => relay::plainly(from, to),
        };
        let struck: Arc<Pass> = Arc::new(pass);
        let plain: Arc<Pass> = Arc::new(|_, from, to| relay::plainly(from, to));
        match strike.kind {
            Kind::Digests => [plain, struck],
            _ => [struck, plain],
        }
    }
}

/// Lets go what a link holds, when a test ends one way or the other.
struct Over(Arc<Striker>);

impl Drop for Over {
    fn drop(&mut self) {
        *self.0.over.lock().unwrap() = true;
        self.0.ends.notify_all();
    }
}

fn settings(bench: &Bench, streams: u32) -> Settings {
    let lines = format!(
        "[checkpoint]\naudit_every = 1\nahead_mib = 0\nstreams = {streams}\nstall_ms = 1000\n"
    );
    Settings {
        ram_mib: 256,
        // Pages of both guests differ when they are told to write them, each in its own time.
        compare_deadline_ms: 5_000,
        primary_extra: lines.clone(),
        secondary_extra: lines,
        ..bench.settings()
    }
}

/// A request that both guests answer differently.
fn differing(pair: &Pair) -> std::process::Child {
    let mut curl = pair.topology.client.command("curl");
    curl.args(["-sS", "--fail", "--max-time", "60", "-o", "/dev/null"]);
    let url = format!("http://{GUEST_V4}/random");
    curl.arg(url).spawn().unwrap()
}

fn load(pair: &Pair) -> Load {
    let load = Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap();
    assert!(load.wait_answers(500, WAIT), "the service stands still");
    load
}

fn finish(load: Load) {
    assert!(load.wait_answers(2_000, WAIT), "the service stands still");
    let report = load.finish().unwrap();
    loads::assert_right(&report);
    assert_eq!(report.requests, report.responses);
}

/// What the primary says when it has given the link up.
fn given_up(pair: &mut Pair) -> String {
    let told = |status: &Value| number(status, "links_given_up") == 1;
    let waited = pair.primary.wait_status("given up", WAIT, told);
    let status = waited.unwrap();
    status["link_given_up_reason"].as_str().unwrap().to_owned()
}

#[test]
fn a_synchronisation_whose_streams_tear_ends_with_a_name_and_the_next_one_gives_the_state() {
    let on = |blow, kind, nth, stream| Strike {
        blow,
        kind,
        nth,
        stream,
    };
    let strikes = [
        // The first of the live pages, some in the middle, and what comes behind the last.
        (1, on(Blow::Cut, Kind::Sync, 1, 0)),
        (1, on(Blow::Damage, Kind::Sync, 20, 0)),
        (1, on(Blow::Cut, Kind::Begin, 1, 0)),
        // The first checkpoint: some has come, and all but the end.
        (1, on(Blow::Damage, Kind::State, 1, 0)),
        (1, on(Blow::Cut, Kind::End, 1, 0)),
        // One stream of several has begun it, another one has not.
        (4, on(Blow::Cut, Kind::Begin, 1, 2)),
        (4, on(Blow::Damage, Kind::End, 1, 3)),
    ];
    for (streams, strike) in strikes {
        torn_synchronisation(streams, strike);
    }
}

fn torn_synchronisation(streams: u32, strike: Strike) {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let settings = settings(&bench, streams);
    let mut pair = relay::primary_alone(&bench, &settings);
    ask(
        &pair.topology.client,
        "POST",
        &format!("/dirty/{FEW_PAGES}/0/4096"),
    );
    let load = load(&pair);
    let striker = Arc::new(Striker::default());
    striker.arm(strike);
    let passes = striker.passes(strike);
    relay::join(&mut pair, &bench, &settings, MANY, passes);
    let reason = given_up(&mut pair);
    assert!(striker.has_struck(), "{strike:?}");
    assert!(
        reason.contains("page channel: stream"),
        "{strike:?}: {reason}"
    );
    // The secondary comes back by itself, with a guest that has never run.
    let status = pair.wait_protected(Host::A).unwrap();
    assert_eq!(number(&status, "links_given_up"), 1, "{strike:?}");
    assert_eq!(number(&status, "streams_reopened"), 0, "{strike:?}");
    assert_eq!(status["unprotected_reason"], "", "{strike:?}");
    load.mark_kill();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    finish(load);
}

#[test]
fn rule_19_streams_that_stand_still_cost_the_link_and_the_primary_goes_on() {
    let hold = |kind, nth| Strike {
        blow: Blow::Hold,
        kind,
        nth,
        stream: 0,
    };
    // A checkpoint's begin, its states, its pages, what is needed for the answer, and the SVM's digests.
    let strikes = [
        hold(Kind::Begin, 1),
        hold(Kind::State, 1),
        hold(Kind::Pages, 4),
        hold(Kind::End, 1),
        hold(Kind::Digests, 1),
    ];
    for strike in strikes {
        stalled_checkpoint(strike);
    }
}

fn stalled_checkpoint(strike: Strike) {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let settings = settings(&bench, 1);
    let mut pair = relay::primary_alone(&bench, &settings);
    let striker = Arc::new(Striker::default());
    let _over = Over(striker.clone());
    let passes = striker.passes(strike);
    relay::join(&mut pair, &bench, &settings, MANY, passes);
    pair.wait_protected(Host::A).unwrap();
    ask(
        &pair.topology.client,
        "POST",
        &format!("/dirty/{MANY_PAGES}/0/4096"),
    );
    striker.arm(strike);
    // Differs, and is answered when the primary goes on alone.
    let mut question = differing(&pair);
    let reason = given_up(&mut pair);
    assert!(question.wait().unwrap().success());
    assert!(striker.has_struck(), "{strike:?}");
    assert!(
        reason.contains("page channel: stream 0") && reason.contains("nothing moved for"),
        "{strike:?}: {reason}"
    );
    // 3: another host holds the VM.
    let ended = pair.secondary.wait_exit(WAIT).unwrap();
    assert_eq!(ended.code(), Some(3), "{strike:?}");
    pair.restart(Host::B, "secondary").unwrap();
    pair.wait_protected(Host::A).unwrap();
    finish(load(&pair));
}

#[test]
fn live_pages_that_stand_still_cost_the_link_and_the_next_synchronisation_gives_the_state() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let settings = settings(&bench, 1);
    let mut pair = relay::primary_alone(&bench, &settings);
    ask(
        &pair.topology.client,
        "POST",
        &format!("/dirty/{MANY_PAGES}/0/4096"),
    );
    let load = load(&pair);
    let strike = Strike {
        blow: Blow::Hold,
        kind: Kind::Sync,
        nth: 8,
        stream: 0,
    };
    let striker = Arc::new(Striker::default());
    let _over = Over(striker.clone());
    striker.arm(strike);
    let passes = striker.passes(strike);
    relay::join(&mut pair, &bench, &settings, MANY, passes);
    let reason = given_up(&mut pair);
    assert!(striker.has_struck());
    assert!(
        reason.contains("page channel: stream 0, sending a chunk: nothing moved for"),
        "{reason}"
    );
    // The secondary comes back by itself.
    pair.wait_protected(Host::A).unwrap();
    finish(load);
}

/// A checkpoint small enough to go into the kernel's buffers does not begin on the secondary: nobody waits to send, and nothing
/// has come that would have to go on. Gives the number of commits before.
fn stuck_checkpoint(bench: &Bench, blow: Blow) -> (Pair, Over, u64) {
    let strike = Strike {
        blow,
        kind: Kind::Begin,
        nth: 1,
        stream: 0,
    };
    let settings = settings(bench, 1);
    let mut pair = relay::primary_alone(bench, &settings);
    let striker = Arc::new(Striker::default());
    let over = Over(striker.clone());
    let passes = striker.passes(strike);
    relay::join(&mut pair, bench, &settings, MANY, passes);
    let status = pair.wait_protected(Host::A).unwrap();
    striker.arm(strike);
    (pair, over, number(&status, "checkpoints"))
}

#[test]
fn rule_14_a_checkpoint_stuck_in_its_streams_is_aborted_and_the_next_one_goes_over_others() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let (mut pair, over, before) = stuck_checkpoint(&bench, Blow::Hold);
    ask(&pair.topology.client, "GET", "/random");
    assert!(over.0.has_struck());
    let more = |status: &Value| number(status, "checkpoints") > before;
    let waited = pair.primary.wait_status("a commit", WAIT, more);
    let status = waited.unwrap();
    let timeouts = &status["step_timeouts"];
    assert_eq!(timeouts, &json!({ "begin": 1 }), "{status:#}");
    assert!(
        pair.primary.log().contains("step begin of the checkpoint"),
        "{}",
        pair.primary.log_tail()
    );
    assert_eq!(number(&status, "streams_reopened"), 1, "{status:#}");
    assert_eq!(number(&status, "links_given_up"), 0, "{status:#}");
    assert_eq!(status["state"], "paired", "rule 16: the audit agrees");
}

#[test]
fn a_checkpoint_stuck_in_streams_of_which_not_even_the_end_arrives_costs_the_link() {
    let Some(bench) = Bench::new(&["curl"]) else {
        return;
    };
    let (mut pair, over, _) = stuck_checkpoint(&bench, Blow::Swallow);
    ask(&pair.topology.client, "GET", "/random");
    assert!(over.0.has_struck());
    let reason = given_up(&mut pair);
    assert!(
        reason.contains("page channel: its streams broke and were not opened anew"),
        "{reason}"
    );
    let ended = pair.secondary.wait_exit(WAIT).unwrap();
    assert_eq!(ended.code(), Some(3));
}
