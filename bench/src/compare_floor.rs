//! `floor`: what the kernel takes at least for a pair over the sockets of `path`: a forwarder that reads both
//! streams, as much as there is at once, looks at nothing and writes the primary's.
//!
//! Invariants: as many bytes are read from either side, and written, as by a comparator under the same load; a
//! byte leaves when both sides have sent as many. What is counted is the time on a CPU of its only thread.
//!
//! Does not cut messages, keep anything or ask for checkpoints.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use crate::compare_load::Ends;
use crate::place::BenchError;

/// Most bytes of a read, as those of `colo compare --sockets`.
const READ_MAX: usize = 64 << 10;
/// More than the load has under way.
const ROOM: usize = 1 << 20;

/// A running forwarder.
#[derive(Debug)]
pub(crate) struct Floor {
    thread: Option<JoinHandle<io::Result<()>>>,
    tid: libc::pid_t,
}

impl Floor {
    /// Starts one, and gives the other ends of its sockets.
    pub(crate) fn start() -> io::Result<(Self, Ends)> {
        let (primary, primary_in) = UnixStream::pair()?;
        let (secondary, secondary_in) = UnixStream::pair()?;
        let (out, out_in) = UnixStream::pair()?;
        let (notify, notify_in) = UnixStream::pair()?;
        let (say, hear) = mpsc::channel();
        let thread = thread::Builder::new().name("floor".into()).spawn(move || {
            // SAFETY: no preconditions.
            let _ = say.send(unsafe { libc::gettid() });
            let _open_for_as_long = notify_in;
            forward(primary_in, secondary_in, out_in)
        })?;
        let tid = hear.recv().map_err(io::Error::other)?;
        let floor = Self {
            thread: Some(thread),
            tid,
        };
        let ends = Ends {
            primary,
            secondary,
            out,
            notify,
        };
        Ok((floor, ends))
    }

    /// Its time on a CPU so far.
    pub(crate) fn cpu_ns(&self) -> Result<u64, BenchError> {
        let path = format!("/proc/self/task/{}/schedstat", self.tid);
        let text = fs::read_to_string(&path).map_err(BenchError::io(format!("read {path}")))?;
        let first = text.split_whitespace().next().and_then(|n| n.parse().ok());
        first.ok_or(BenchError::Unreadable {
            program: "/proc/self/task/TID/schedstat",
            what: "CPU time",
            output: text,
        })
    }

    /// Waits for its end, after its inputs have ended.
    pub(crate) fn end(mut self) -> Result<(), BenchError> {
        let thread = self.thread.take();
        let ended = thread.map_or(Ok(Ok(())), JoinHandle::join);
        ended
            .unwrap_or_else(|_| Err(io::Error::other("it panicked")))
            .map_err(BenchError::io("forward frames"))
    }
}

/// Until the primary's stream has ended.
fn forward(
    mut primary: UnixStream,
    mut secondary: UnixStream,
    mut out: UnixStream,
) -> io::Result<()> {
    primary.set_nonblocking(true)?;
    secondary.set_nonblocking(true)?;
    // The primary's bytes that are not written: from `written` to `filled`.
    let mut bytes = vec![0; ROOM];
    let (mut written, mut filled) = (0, 0);
    let mut scratch = vec![0; READ_MAX];
    // How many more the secondary has sent than were written.
    let mut owed = 0;
    loop {
        wait([primary.as_fd(), secondary.as_fd()])?;
        if filled + READ_MAX > ROOM {
            bytes.copy_within(written..filled, 0);
            (written, filled) = (0, filled - written);
        }
        match read(&mut primary, &mut bytes[filled..][..READ_MAX])? {
            Some(0) => return Ok(()),
            n => filled += n.unwrap_or(0),
        }
        owed += read(&mut secondary, &mut scratch)?.unwrap_or(0);
        let n = owed.min(filled - written);
        out.write_all(&bytes[written..written + n])?;
        (written, owed) = (written + n, owed - n);
        if written == filled {
            (written, filled) = (0, 0);
        }
    }
}

/// `None` when there is nothing at present.
fn read(stream: &mut UnixStream, bytes: &mut [u8]) -> io::Result<Option<usize>> {
    match stream.read(bytes) {
        Ok(n) => Ok(Some(n)),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

fn wait(streams: [BorrowedFd<'_>; 2]) -> io::Result<()> {
    let mut fds = streams.map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: `fds` is an array of two initialised entries that outlives the call.
    match unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } {
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
