//! Echo streams that are full in both directions all the time.
//!
//! Invariants: every byte tells its place in its stream; a stream ends only by the client's FIN, after which
//! everything sent must have come back.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use colo_lab::load::ports;
use colo_lab::netns::Netns;
use colo_lab::topology::GUEST;

/// A stream without progress for so long has failed.
const TIMEOUT: Duration = Duration::from_secs(15);
const CHUNK: usize = 8 << 10;

/// Running streams.
#[derive(Debug)]
pub struct Streams {
    stop: Arc<AtomicBool>,
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<io::Result<u64>>>,
}

impl Streams {
    /// Opens connections to the guest, by turns over IPv4 and IPv6, and keeps them busy.
    pub fn start(client: &Netns, count: usize) -> io::Result<Self> {
        let open = || (0..count).map(connect).collect::<io::Result<Vec<_>>>();
        let sockets = client.run(open).map_err(io::Error::other)??;
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (number, socket) in sockets.iter().enumerate() {
            let (writer, reader) = (socket.try_clone()?, socket.try_clone()?);
            let stop = Arc::clone(&stop);
            threads.push(thread::spawn(move || {
                stream(number as u64, writer, reader, &stop)
            }));
        }
        Ok(Self {
            stop,
            sockets,
            threads,
        })
    }

    /// Bytes that the guest has not acknowledged, over all streams.
    pub fn unacknowledged(&self) -> usize {
        let queued = |socket: &TcpStream| {
            let mut bytes: libc::c_int = 0;
            // SAFETY: the descriptor is open; TIOCOUTQ (SIOCOUTQ for sockets) writes one int.
            unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
            usize::try_from(bytes).unwrap_or(0)
        };
        self.sockets.iter().map(queued).sum()
    }

    /// Stops writing and waits until every byte has come back. Gives how many there were.
    pub fn finish(self) -> io::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let mut bytes = 0;
        for thread in self.threads {
            let joined = thread.join();
            bytes += joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(bytes)
    }
}

fn connect(number: usize) -> io::Result<TcpStream> {
    let target = SocketAddr::new(GUEST[number % GUEST.len()], ports::ECHO);
    let socket = TcpStream::connect_timeout(&target, TIMEOUT)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

/// Byte `at` of stream `number`.
fn pattern(number: u64, at: u64) -> u8 {
    // Only the low byte matters.
    (at ^ (at >> 8).wrapping_mul(29) ^ (at >> 16).wrapping_mul(53) ^ number.wrapping_mul(97)) as u8
}

fn stream(
    number: u64,
    mut writer: TcpStream,
    reader: TcpStream,
    stop: &AtomicBool,
) -> io::Result<u64> {
    let reading = thread::spawn(move || read_back(number, reader));
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) && !reading.is_finished() {
        let chunk: Vec<u8> = (sent..sent + CHUNK as u64)
            .map(|at| pattern(number, at))
            .collect();
        writer.write_all(&chunk)?;
        sent += CHUNK as u64;
    }
    writer.shutdown(Shutdown::Write)?;
    let back = reading
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    if back == sent {
        return Ok(sent);
    }
    Err(io::Error::other(format!(
        "stream {number}: {back} bytes of {sent} came back"
    )))
}

fn read_back(number: u64, mut reader: TcpStream) -> io::Result<u64> {
    let mut buffer = [0; CHUNK];
    let mut heard = 0;
    loop {
        let count = reader.read(&mut buffer)?;
        if count == 0 {
            return Ok(heard);
        }
        for &byte in &buffer[..count] {
            if byte != pattern(number, heard) {
                let what = format!("stream {number}: byte {heard} is {byte:#04x}");
                return Err(io::Error::other(what));
            }
            heard += 1;
        }
    }
}
