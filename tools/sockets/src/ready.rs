//! Waiting until a socket is ready, with `poll(2)`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// One socket to wait for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Interest<'a> {
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// Waits until one of `interests` is ready (or broken, or ended) or the time is over; `None` waits
/// for ever. Gives which of them are; one that is interested in nothing never is.
pub(crate) fn wait<const N: usize>(
    interests: &[Option<Interest<'_>>; N],
    timeout_us: Option<u64>,
) -> io::Result<[bool; N]> {
    let mut fds = [libc::pollfd {
        fd: -1,
        events: 0,
        revents: 0,
    }; N];
    for (entry, interest) in fds.iter_mut().zip(interests) {
        let wanted = interest.filter(|interest| interest.read || interest.write);
        if let Some(Interest { fd, read, write }) = wanted {
            let events = [(read, libc::POLLIN), (write, libc::POLLOUT)];
            // A negative descriptor is ignored.
            entry.fd = fd.as_raw_fd();
            entry.events = events.iter().filter(|(on, _)| *on).map(|(_, e)| e).sum();
        }
    }
    // Upwards: to wake up before a deadline is to wake up twice.
    let timeout_ms = timeout_us.map_or(-1, |us| us.div_ceil(1000).min(i32::MAX as u64) as i32);
    // SAFETY: `fds` is an array of N initialised entries that outlives the call.
    let count = unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, timeout_ms) };
    if count < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        return Ok([false; N]);
    }
    Ok(fds.map(|entry| entry.revents != 0))
}
