//! The load of `path` and `instructions`: two equal streams of frames without end, and what comes out.
//!
//! Invariants: both comparators get the same bytes from the same code; at most `window` frames are under
//! way, so that QEMU's queues never overflow; every frame that goes in is awaited.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use colo_compare::testing::{Segment, Side, udp};
use colo_lab::comparator::{Comparator, message};

/// Frames under way. A TCP window of 375 kB, at 1448 bytes a segment.
pub(crate) const WINDOW: usize = 256;
/// Longest write: as much as an unlimited sender would find room for.
const WRITE_MAX: usize = 64 << 10;
/// How long nothing may come out.
const PATIENCE_MS: i32 = 60_000;

/// What the frames carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// The shape of a load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) protocol: Protocol,
    pub(crate) payload: usize,
    pub(crate) flows: usize,
}

/// One side's stream: a lap of messages, which become the next ones when they have been sent.
#[derive(Debug)]
struct Lap {
    shape: Shape,
    bytes: Vec<u8>,
    message_bytes: usize,
    /// Bytes of the stream that have been taken.
    taken: u64,
}

/// Messages of a lap: few, so that it is not the load's memory that is measured.
const LAP: usize = 512;
/// Ethernet and IPv4 without options, behind a message's length.
const PORTS_AT: usize = 4 + 14 + 20;

impl Lap {
    fn new(shape: Shape) -> Self {
        let body: Vec<u8> = (0..shape.payload).map(|at| at as u8).collect();
        let frame = match shape.protocol {
            Protocol::Tcp => Segment::new(Side::V4).payload(&body).bytes(),
            Protocol::Udp => udp(Side::V4, false, 0, 0, &body),
        };
        let message = message(&frame, false);
        let mut lap = Self {
            shape,
            bytes: message.repeat(LAP),
            message_bytes: message.len(),
            taken: 0,
        };
        lap.renew();
        lap
    }

    /// Makes the messages those that come next. Checksums stay behind: neither comparator looks at
    /// them.
    fn renew(&mut self) {
        let first = self.taken / self.message_bytes as u64;
        let Shape {
            protocol,
            payload,
            flows,
        } = self.shape;
        for (message, n) in self.bytes.chunks_exact_mut(self.message_bytes).zip(first..) {
            let (flow, round) = ((n % flows as u64) as u32, (n / flows as u64) as u32);
            // The guest's port and the client's: up to 2^28 flows.
            let ports = (80 + (flow >> 14)) << 16 | (20_000 + (flow & 0x3fff));
            let (number_at, number) = match protocol {
                Protocol::Tcp => (PORTS_AT + 4, round.wrapping_mul(payload as u32)),
                Protocol::Udp => (PORTS_AT + 8, round),
            };
            message[PORTS_AT..PORTS_AT + 4].copy_from_slice(&ports.to_be_bytes());
            message[number_at..number_at + 4].copy_from_slice(&number.to_be_bytes());
        }
    }

    /// What is next in the stream, up to its byte `until`, at most [`WRITE_MAX`].
    fn next(&self, until: u64) -> &[u8] {
        let at = (self.taken % self.bytes.len() as u64) as usize;
        let end = (at as u64 + until - self.taken).min((at + WRITE_MAX) as u64);
        &self.bytes[at..self.bytes.len().min(end as usize)]
    }

    fn take(&mut self, n: usize) {
        self.taken += n as u64;
        if self.taken.is_multiple_of(self.bytes.len() as u64) {
            self.renew();
        }
    }
}

/// This process' ends of the sockets.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) primary: UnixStream,
    pub(crate) secondary: UnixStream,
    pub(crate) out: UnixStream,
    pub(crate) notify: UnixStream,
}

impl Ends {
    pub(crate) fn of(comparator: &Comparator) -> io::Result<Self> {
        Ok(Self {
            primary: comparator.primary.try_clone()?,
            secondary: comparator.secondary.try_clone()?,
            out: comparator.out.try_clone()?,
            notify: comparator.notify.try_clone()?,
        })
    }
}

/// Both streams into a comparator, and what came out.
#[derive(Debug)]
pub(crate) struct Load {
    ends: Ends,
    primary: Lap,
    secondary: Lap,
    received: u64,
    /// Bytes of requests for checkpoints.
    requested: u64,
    scratch: Vec<u8>,
}

impl Load {
    pub(crate) fn new(ends: Ends, shape: Shape) -> io::Result<Self> {
        let Ends {
            primary,
            secondary,
            out,
            notify,
        } = &ends;
        for stream in [primary, secondary, out, notify] {
            stream.set_nonblocking(true)?;
        }
        Ok(Self {
            ends,
            primary: Lap::new(shape),
            secondary: Lap::new(shape),
            received: 0,
            requested: 0,
            scratch: vec![0; WRITE_MAX],
        })
    }

    /// Checkpoints asked for, although all frames are equal.
    pub(crate) fn requests(&self) -> u64 {
        self.requested / message(b"DO_CHECKPOINT", false).len() as u64
    }

    /// Bytes of one frame.
    pub(crate) fn frame_bytes(&self) -> usize {
        self.primary.message_bytes - 4
    }

    /// Sends so many more pairs and waits until all of them have come out.
    pub(crate) fn pass(&mut self, pairs: u64) -> io::Result<()> {
        let message_bytes = self.primary.message_bytes as u64;
        let total = self.received + pairs * message_bytes;
        while self.received < total {
            let until = total.min(self.received + WINDOW as u64 * message_bytes);
            let wrote = write(&mut self.ends.primary, &mut self.primary, until)?
                | write(&mut self.ends.secondary, &mut self.secondary, until)?;
            if !self.read()? && !wrote {
                self.wait(until)?;
            }
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<bool> {
        match self.ends.out.read(&mut self.scratch) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                self.received += n as u64;
                Ok(true)
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn wait(&mut self, until: u64) -> io::Result<()> {
        let Ends {
            primary,
            secondary,
            out,
            notify,
        } = &self.ends;
        let writes = |lap: &Lap| if lap.taken < until { libc::POLLOUT } else { 0 };
        let ready = poll([
            (primary.as_fd(), writes(&self.primary)),
            (secondary.as_fd(), writes(&self.secondary)),
            (out.as_fd(), libc::POLLIN),
            (notify.as_fd(), libc::POLLIN),
        ])?;
        match ready {
            0 => Err(ErrorKind::TimedOut.into()),
            _ => self.forget_requests(),
        }
    }

    /// QEMU's takes datagrams last in, first out, and asks for a checkpoint whenever one side is
    /// ahead. Nobody answers; the frames leave when the other side has caught up.
    fn forget_requests(&mut self) -> io::Result<()> {
        match self.ends.notify.read(&mut self.scratch) {
            Ok(n) => self.requested += n as u64,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

fn write(stream: &mut UnixStream, lap: &mut Lap, until: u64) -> io::Result<bool> {
    if lap.taken >= until {
        return Ok(false);
    }
    match stream.write(lap.next(until)) {
        Ok(n) => {
            lap.take(n);
            Ok(true)
        }
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

fn poll<const N: usize>(entries: [(BorrowedFd<'_>, i16); N]) -> io::Result<i32> {
    let mut fds = entries.map(|(fd, events)| libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    });
    // SAFETY: `fds` is an array of N initialised entries that outlives the call.
    match unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, PATIENCE_MS) } {
        n if n < 0 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}
