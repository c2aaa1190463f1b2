//! A link that passes what one host sends, or both, through the test, to be watched, damaged or cut.
//!
//! Invariants: what the test did not ask for is passed on as it is; a channel ends on both sides when it ends on one.
//! It knows the preamble of a connection and the head of a chunk of pages, and no more of the link's protocol.
//!
//! Functions panic with what went wrong, as tests do.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;

use colo_lab::pair::{Pair, Settings};
use colo_lab::process::Process;
use colo_lab::topology::Host;

use crate::bench::Bench;

/// The packet channel of the only shard.
pub const PACKETS: u8 = 1;
/// The first stream of pages; with one shard, all channels from here on are streams of pages, but for `QUESTION`.
pub const PAGES: u8 = 2;
/// The first stream of pages that broke and were opened anew.
pub const PAGES_AGAIN: u8 = 240;
/// How many streams there may be, the joining side asks.
const QUESTION: u8 = 255;

const LINK_PORT: u16 = 7600;
const RELAY_PORT: u16 = 7700;
const PREAMBLE: usize = 20;
const HEAD: usize = 64;

/// What a chunk of a stream of pages holds, as its head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Live pages of a synchronisation.
    Sync,
    /// The first of a checkpoint, on each stream.
    Begin,
    /// A record of machine state.
    State,
    /// The last of a checkpoint, on each stream.
    End,
    /// Pages of a checkpoint.
    Pages,
    /// Digests of the stopped SVM's pages.
    Digests,
    /// Pages that travel ahead of their checkpoint.
    Ahead,
    /// Anything else.
    Other,
}

/// One chunk of a stream of pages.
#[derive(Debug)]
pub struct Chunk {
    /// Its head, with a checksum over itself and one over the payload.
    pub head: [u8; HEAD],
    /// What it carries.
    pub payload: Vec<u8>,
}

impl Chunk {
    /// Reads the next chunk.
    pub fn read(from: &mut TcpStream) -> io::Result<Self> {
        let mut head = [0; HEAD];
        from.read_exact(&mut head)?;
        let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
        let mut payload = vec![0; len as usize];
        from.read_exact(&mut payload)?;
        Ok(Self { head, payload })
    }

    /// What it holds.
    pub fn kind(&self) -> Kind {
        match self.head[6] {
            1 => Kind::Sync,
            2 => Kind::Begin,
            3 => Kind::State,
            6 => Kind::End,
            4 => Kind::Pages,
            5 => Kind::Digests,
            8 => Kind::Ahead,
            _ => Kind::Other,
        }
    }

    /// Passes it on.
    pub fn write(&self, to: &mut TcpStream) -> io::Result<()> {
        to.write_all(&self.head)?;
        to.write_all(&self.payload)
    }
}

/// Passes on what one host sends over the channel with this number, until either side ends.
pub type Pass = dyn Fn(u8, &mut TcpStream, &mut TcpStream) -> io::Result<()> + Send + Sync;

/// Passes a channel on as it is.
pub fn plainly(from: &mut TcpStream, to: &mut TcpStream) -> io::Result<()> {
    io::copy(from, to).map(drop)
}

/// Whether a host has ended a stream, though what it has sent before may not be read yet.
pub fn has_ended(stream: &TcpStream) -> bool {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one descriptor, valid during the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
}

/// A pair whose secondary joins through a relay of so many connections; `pass` gets what the primary sends.
pub fn pair_through(
    bench: &Bench,
    settings: &Settings,
    connections: usize,
    pass: Arc<Pass>,
) -> Pair {
    pair_between(
        bench,
        settings,
        connections,
        [pass, Arc::new(|_, from, to| plainly(from, to))],
    )
}

/// The same with what each host sends: the primary, then the secondary.
pub fn pair_between(
    bench: &Bench,
    settings: &Settings,
    connections: usize,
    passes: [Arc<Pass>; 2],
) -> Pair {
    let mut pair = primary_alone(bench, settings);
    join(&mut pair, bench, settings, connections, passes);
    pair.wait_protected(Host::A).unwrap();
    pair
}

/// A pair whose secondary is gone.
pub fn primary_alone(bench: &Bench, settings: &Settings) -> Pair {
    let mut pair = Pair::start(settings, bench.dir()).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    pair
}

/// Starts another secondary, which joins through a relay of so many connections. Does not wait for it.
pub fn join(
    pair: &mut Pair,
    bench: &Bench,
    settings: &Settings,
    connections: usize,
    passes: [Arc<Pass>; 2],
) {
    let host = pair.topology.host(Host::B);
    let bind = || TcpListener::bind((Host::B.link_address(), RELAY_PORT)).unwrap();
    let listener = host.run(bind).unwrap();
    host.spawn("relay", move || {
        for near in listener.incoming().take(connections) {
            // A primary that is gone refuses whoever still calls.
            let _ = forward(near.unwrap(), &passes);
        }
    })
    .unwrap();
    let text = settings.pair_file(Host::B, bench.dir());
    let peer = |host: Host, port: u16| format!("link_peer = \"{}:{port}\"", host.link_address());
    let relay = peer(Host::B, RELAY_PORT);
    assert!(text.contains(&peer(Host::A, LINK_PORT)), "{text}");
    let text = text.replace(&peer(Host::A, LINK_PORT), &relay);
    let file = bench.dir().join("through.toml");
    std::fs::write(&file, text).unwrap();
    let mut command = pair.topology.host(Host::B).command(bench.colo());
    command.arg("secondary").arg(&file);
    let through = Process::spawn("b-through", command, bench.dir()).unwrap();
    pair.secondary = through.with_status(&bench.dir().join("b.sock"));
}

/// Connects to the primary, in host b's namespace, and passes both directions on.
fn forward(mut near: TcpStream, passes: &[Arc<Pass>; 2]) -> io::Result<()> {
    let mut preamble = [0; PREAMBLE];
    near.read_exact(&mut preamble)?;
    let mut far = TcpStream::connect((Host::A.link_address(), LINK_PORT))?;
    far.write_all(&preamble)?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
    }
    let channel = preamble[10];
    let pairs = [(far.try_clone()?, near.try_clone()?), (near, far)];
    for ((mut from, mut to), pass) in pairs.into_iter().zip(passes) {
        let pass = Arc::clone(pass);
        thread::spawn(move || {
            let _ = match channel {
                QUESTION => plainly(&mut from, &mut to),
                channel => pass(channel, &mut from, &mut to),
            };
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}
