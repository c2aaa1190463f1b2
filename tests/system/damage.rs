//! A link that damages data: a spoilt checkpoint is repeated, a broken stream ends the pair, and clients never
//! notice either.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::process::Process;
use colo_lab::topology::{GUEST_V4, Host};
use colo_tests::bench::Bench;

const WAIT: Duration = Duration::from_secs(30);
const PROXY_PORT: u16 = 7700;
const PREAMBLE: usize = 20;
const PACKETS: u8 = 1;
const PAGES: u8 = 2;
/// The head of a chunk on the page channel.
const HEAD: usize = 64;
const KIND_PAGES: u8 = 4;
const KIND_AHEAD: u8 = 8;

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
    /// The packet channel turns into noise.
    Packets,
}

/// A link that damages what the primary sends.
struct Proxy {
    armed: Arc<AtomicBool>,
}

impl Proxy {
    /// Listens on host b and connects to host a from there.
    fn start(pair: &Pair, damage: Damage) -> Self {
        let armed = Arc::new(AtomicBool::new(false));
        let trigger = armed.clone();
        let host = pair.topology.host(Host::B);
        let bind = || TcpListener::bind((Host::B.link_address(), PROXY_PORT)).unwrap();
        let listener = host.run(bind).unwrap();
        host.spawn("proxy", move || {
            for stream in listener.incoming().take(3) {
                forward(stream.unwrap(), damage, &trigger).unwrap();
            }
        })
        .unwrap();
        Self { armed }
    }

    fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    fn has_struck(&self) -> bool {
        !self.armed.load(Ordering::SeqCst)
    }
}

fn forward(mut near: TcpStream, damage: Damage, armed: &Arc<AtomicBool>) -> io::Result<()> {
    let mut preamble = [0; PREAMBLE];
    near.read_exact(&mut preamble)?;
    let mut far = TcpStream::connect((Host::A.link_address(), 7600))?;
    far.write_all(&preamble)?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
    }
    let (mut up_from, mut up_to) = (near.try_clone()?, far.try_clone()?);
    thread::spawn(move || {
        let _ = io::copy(&mut up_from, &mut up_to);
        let _ = up_to.shutdown(Shutdown::Both);
    });
    let (channel, armed) = (preamble[10], armed.clone());
    thread::spawn(move || {
        let _ = match (channel, damage) {
            (PAGES, Damage::Page | Damage::Record | Damage::Head | Damage::Ahead) => {
                chunks(&mut far, &mut near, damage, &armed)
            }
            (PACKETS, Damage::Packets) => noise(&mut far, &mut near, &armed),
            _ => io::copy(&mut far, &mut near).map(drop),
        };
        let _ = near.shutdown(Shutdown::Both);
    });
    Ok(())
}

/// Passes the chunks of the page channel on, one of them damaged.
fn chunks(
    from: &mut TcpStream,
    to: &mut TcpStream,
    damage: Damage,
    armed: &AtomicBool,
) -> io::Result<()> {
    let kind = match damage {
        Damage::Ahead => KIND_AHEAD,
        _ => KIND_PAGES,
    };
    loop {
        let mut head = [0; HEAD];
        from.read_exact(&mut head)?;
        let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
        let mut payload = vec![0; len];
        from.read_exact(&mut payload)?;
        if head[6] == kind && armed.swap(false, Ordering::SeqCst) {
            match damage {
                Damage::Head => head[25] ^= 0x20,
                Damage::Record => payload[12] ^= 0x20,
                _ => payload[len / 2] ^= 0x20,
            }
        }
        to.write_all(&head)?;
        to.write_all(&payload)?;
    }
}

fn noise(from: &mut TcpStream, to: &mut TcpStream, armed: &AtomicBool) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        if armed.swap(false, Ordering::SeqCst) {
            buffer[..n].fill(0xdb);
        }
        to.write_all(&buffer[..n])?;
    }
}

/// A pair whose link goes through a proxy.
fn pair_through(bench: &Bench, settings: &Settings, damage: Damage) -> (Pair, Proxy) {
    let mut pair = Pair::start(settings, bench.dir()).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    let proxy = Proxy::start(&pair, damage);
    let text = settings.pair_file(Host::B, bench.dir());
    let peer = |host: Host, port: u16| format!("link_peer = \"{}:{port}\"", host.link_address());
    let text = text.replace(&peer(Host::A, 7600), &peer(Host::B, PROXY_PORT));
    let file = bench.dir().join("through.toml");
    std::fs::write(&file, text).unwrap();
    let mut command = pair.topology.host(Host::B).command(bench.colo());
    command.arg("secondary").arg(&file);
    let through = Process::spawn("b-through", command, bench.dir()).unwrap();
    pair.secondary = through.with_status(&bench.dir().join("b.sock"));
    pair.wait_protected(Host::A).unwrap();
    (pair, proxy)
}

fn load(pair: &Pair) -> Load {
    Load::start(&pair.topology.client, LoadConfig::new(8, 5)).unwrap()
}

fn finish(load: Load) {
    assert!(load.wait_answers(2_000, WAIT), "the service stands still");
    let report = load.finish().unwrap();
    assert_eq!(
        (report.client_errors, report.wrong_responses),
        (0, 0),
        "{:#?}",
        report.notes
    );
    assert_eq!(report.requests, report.responses);
    assert!(report.audited > 10, "{report:#?}");
}

#[test]
fn rule_14_a_damaged_checkpoint_is_taken_again_and_the_pair_goes_on() {
    for damage in [Damage::Page, Damage::Record] {
        damaged_checkpoint(damage);
    }
}

fn damaged_checkpoint(damage: Damage) {
    let Some(bench) = Bench::new(&[]) else { return };
    let (mut pair, proxy) = pair_through(&bench, &bench.settings(), damage);
    let load = load(&pair);
    proxy.arm();
    let aborted = |status: &serde_json::Value| status["checkpoints_aborted"] == 1;
    let status = pair.primary.wait_status("aborted", WAIT, aborted).unwrap();
    assert!(proxy.has_struck());
    assert_eq!(status["state"], "paired");
    let before = status["checkpoints"].as_u64().unwrap();
    let more = |status: &serde_json::Value| status["checkpoints"].as_u64() > Some(before + 3);
    pair.primary
        .wait_status("more checkpoints", WAIT, more)
        .unwrap();
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
    let (mut pair, proxy) = pair_through(&bench, &settings, Damage::Ahead);
    let ask = |pair: &Pair, method: &str, path: &str| {
        let mut curl = pair.topology.client.command("curl");
        curl.args(["-sS", "--fail", "--max-time", "60", "-X", method]);
        let url = format!("http://{GUEST_V4}{path}");
        let output = curl.arg(url).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    proxy.arm();
    ask(&pair, "POST", "/dirty/2000/0/4096");
    let sent = |status: &serde_json::Value| status["ahead"]["sent_pages"].as_u64() >= Some(1_900);
    let status = pair.primary.wait_status("sent ahead", WAIT, sent).unwrap();
    assert!(proxy.has_struck());
    let before = status["checkpoints"].as_u64().unwrap();
    ask(&pair, "GET", "/random");
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
fn a_broken_stream_ends_the_pair_and_one_host_goes_on() {
    for damage in [Damage::Head, Damage::Packets] {
        let Some(bench) = Bench::new(&[]) else { return };
        let (mut pair, proxy) = pair_through(&bench, &bench.settings(), damage);
        let load = load(&pair);
        load.mark_kill();
        proxy.arm();
        let (_, other) = pair.wait_winner().unwrap();
        assert!(proxy.has_struck());
        // 3: another host holds the VM now.
        assert_eq!(other.code(), Some(3), "{damage:?}");
        finish(load);
    }
}
