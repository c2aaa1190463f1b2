//! The ends of `transfer` through the page channel, and through write(2) and read(2).
//!
//! Invariants: an end is done when all bytes are handed over, or the peer has closed. It gives the CPU
//! time that other threads than the calling one have spent, and a receiver its bytes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use colo_vmm::checkpoint::channel::{Event, Kind, PageChannel, Settings};

use crate::datapath_cpu::thread_cpu_ns;
use crate::place::BenchError;
use crate::transfer::CHUNK_BYTES;

/// Longer than any measurement that goes on.
const TIMEOUT: Duration = Duration::from_secs(30);

fn settings(zero_copy: bool) -> Settings {
    Settings {
        chunk_bytes: CHUNK_BYTES,
        timeout: TIMEOUT,
        zero_copy,
        ..Settings::default()
    }
}

fn failed(error: impl std::fmt::Display) -> BenchError {
    BenchError::Failed(error.to_string())
}

/// One checkpoint, `chunks` of it for each stream.
pub(crate) fn send_channel(
    sockets: Vec<TcpStream>,
    chunks: u64,
    zero_copy: bool,
) -> Result<u64, BenchError> {
    let chunks = chunks * sockets.len() as u64;
    let mut channel = PageChannel::new(sockets, settings(zero_copy)).map_err(failed)?;
    channel.begin(1, &[]).map_err(failed)?;
    for _ in 0..chunks {
        channel.next_buffer().map_err(failed)?;
        channel
            .submit(Kind::Pages, 64, CHUNK_BYTES)
            .map_err(failed)?;
    }
    channel.finish().map_err(failed)?;
    Ok(0)
}

/// Until the checkpoint is complete.
pub(crate) fn receive_channel(sockets: Vec<TcpStream>) -> Result<(u64, u64), BenchError> {
    let mut channel = PageChannel::new(sockets, settings(true)).map_err(failed)?;
    let mut bytes = 0;
    loop {
        match channel.poll(TIMEOUT).map_err(failed)? {
            Event::Chunk(chunk) => bytes += chunk.payload.len() as u64,
            Event::Complete { .. } => return Ok((bytes, 0)),
            other => {
                return Err(BenchError::Failed(format!(
                    "the page channel gave {other:?}"
                )));
            }
        }
    }
}

/// A thread for each stream.
pub(crate) fn send_blocking(sockets: Vec<TcpStream>, chunks: u64) -> Result<u64, BenchError> {
    let write = move |mut socket: TcpStream| {
        let buffer = vec![7; CHUNK_BYTES];
        let sent = (0..chunks).try_for_each(|_| socket.write_all(&buffer));
        let sent = sent.and_then(|()| socket.shutdown(Shutdown::Write));
        sent.map(|()| thread_cpu_ns())
    };
    let threads = sockets
        .into_iter()
        .map(|socket| thread::spawn(move || write(socket)));
    let mut cpu_ns = 0;
    for thread in threads.collect::<Vec<_>>() {
        let sent = thread.join().map_err(|_| failed("a sender panicked"))?;
        cpu_ns += sent.map_err(BenchError::io("write to a socket"))?;
    }
    Ok(cpu_ns)
}

/// A thread for each stream.
pub(crate) fn receive_blocking(sockets: Vec<TcpStream>) -> Result<(u64, u64), BenchError> {
    let read = |mut socket: TcpStream| {
        let (mut buffer, mut bytes) = (vec![0; CHUNK_BYTES], 0);
        loop {
            match socket.read(&mut buffer)? {
                0 => return Ok((bytes, thread_cpu_ns())),
                some => bytes += some as u64,
            }
        }
    };
    let threads = sockets
        .into_iter()
        .map(|socket| thread::spawn(move || read(socket)));
    let mut total = (0, 0);
    for thread in threads.collect::<Vec<_>>() {
        let got: std::io::Result<_> = thread.join().map_err(|_| failed("a receiver panicked"))?;
        let (bytes, cpu_ns) = got.map_err(BenchError::io("read from a socket"))?;
        total = (total.0 + bytes, total.1 + cpu_ns);
    }
    Ok(total)
}
