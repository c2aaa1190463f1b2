//! Tests of the page channel over real TCP on loopback, both ends in threads.

mod again;
mod bad_peer;
mod fixed;
mod kept;
mod laid;
mod lent;
mod limits;
mod round_trip;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;

/// Longer than anything takes that does not hang.
const LONG: Duration = Duration::from_secs(60);
const CHUNK: usize = 16 << 10;

fn settings() -> Settings {
    Settings {
        chunk_bytes: CHUNK,
        timeout: LONG,
        ..Settings::default()
    }
}

/// What happened, with the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Chunk(Kind, u64, u32, Vec<u8>),
    Complete(u64, Totals),
    Aborted(u64),
    Damaged(u64, String),
    Sendable,
    Woken,
    Closed,
    Idle,
}

impl Seen {
    fn is_damaged(&self, epoch: u64, why: &str) -> bool {
        matches!(self, Self::Damaged(e, reason) if *e == epoch && reason.contains(why))
    }
}

fn see(event: Event<'_>) -> Seen {
    match event {
        Event::Chunk(c) => Seen::Chunk(c.kind, c.epoch, c.items, c.payload.to_vec()),
        Event::Complete { epoch, totals } => Seen::Complete(epoch, totals),
        Event::Aborted { epoch } => Seen::Aborted(epoch),
        Event::Damaged { epoch, reason } => Seen::Damaged(epoch, reason),
        Event::Sendable => Seen::Sendable,
        Event::Woken => Seen::Woken,
        Event::Closed => Seen::Closed,
        Event::Idle => Seen::Idle,
    }
}

/// Connected sockets.
fn sockets(streams: usize) -> (Vec<TcpStream>, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connect = |_| {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    };
    (0..streams).map(connect).unzip()
}

/// A peer in a thread of its own.
fn peer<T: Send + 'static>(
    sockets: Vec<TcpStream>,
    settings: Settings,
    act: impl FnOnce(PageChannel) -> T + Send + 'static,
) -> JoinHandle<T> {
    thread::spawn(move || act(PageChannel::new(sockets, settings).unwrap()))
}

fn next(channel: &mut PageChannel) -> Seen {
    see(channel.poll(LONG).unwrap())
}

/// Everything until the channel is closed or fails.
fn all(channel: &mut PageChannel) -> (Vec<Seen>, Option<ChannelError>) {
    let mut seen = Vec::new();
    loop {
        match channel.poll(LONG) {
            Ok(Event::Closed) => return (seen, None),
            Ok(event) => seen.push(see(event)),
            Err(e) => return (seen, Some(e)),
        }
    }
}

/// Bytes that differ by place and seed.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(step).collect()
}

fn submit(channel: &mut PageChannel, kind: Kind, items: u32, payload: &[u8]) {
    let buffer = channel.next_buffer().unwrap();
    buffer[..payload.len()].copy_from_slice(payload);
    channel.submit(kind, items, payload.len()).unwrap();
}

/// A small checkpoint: 1 state, 2 chunks of pages.
fn send_small(channel: &mut PageChannel, epoch: u64) {
    channel.begin(epoch, b"start").unwrap();
    submit(channel, Kind::State, 1, &pattern(1, 100));
    submit(channel, Kind::Pages, 3, &pattern(2, 700));
    submit(channel, Kind::Pages, 2, &pattern(3, 300));
    channel.finish().unwrap();
}

/// What [`send_small`] arrives as on one stream.
fn seen_small(epoch: u64) -> Vec<Seen> {
    let totals = Totals {
        chunks: 3,
        states: 1,
        pages: 5,
        digests: 0,
    };
    vec![
        Seen::Chunk(Kind::Begin, epoch, 0, b"start".to_vec()),
        Seen::Chunk(Kind::State, epoch, 1, pattern(1, 100)),
        Seen::Chunk(Kind::Pages, epoch, 3, pattern(2, 700)),
        Seen::Chunk(Kind::Pages, epoch, 2, pattern(3, 300)),
        Seen::Complete(epoch, totals),
    ]
}

/// The bytes of small checkpoints on one stream.
fn bytes_of(epochs: &[u64], settings: Settings) -> Vec<u8> {
    let (near, far) = sockets(1);
    let epochs = epochs.to_vec();
    let sender = peer(near, settings, move |mut channel| {
        epochs
            .iter()
            .for_each(|&epoch| send_small(&mut channel, epoch));
    });
    let mut bytes = Vec::new();
    (&far[0]).read_to_end(&mut bytes).unwrap();
    sender.join().unwrap();
    bytes
}

/// What a channel makes of these bytes on its only stream, when the peer closes behind them.
fn made_of(bytes: &[u8], settings: Settings) -> (Vec<Seen>, Option<ChannelError>, Counters) {
    let (near, far) = sockets(1);
    let receiver = peer(near, settings, |mut channel| {
        let (seen, error) = all(&mut channel);
        (seen, error, channel.counters())
    });
    // A channel that has failed does not read on.
    let _ = (&far[0]).write_all(bytes);
    drop(far);
    receiver.join().unwrap()
}
