//! SIGINT and SIGTERM as a request to stop: a flag, and a descriptor that wakes who polls.
//!
//! Invariants: the handler only stores a flag and writes an eventfd, both of which are allowed in a
//! handler and live as long as the process.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A request to stop.
#[derive(Debug)]
pub(crate) struct Stop {
    /// Set once asked.
    pub(crate) flag: Arc<AtomicBool>,
    /// Readable once asked.
    pub(crate) wake: EventFd,
}

impl Stop {
    /// Whether somebody has asked.
    pub(crate) fn is_asked(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }

    /// The descriptor to poll.
    pub(crate) fn poll_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

static ASKED: OnceLock<(Arc<AtomicBool>, EventFd)> = OnceLock::new();

extern "C" fn on_signal(_signal: libc::c_int) {
    if let Some((flag, wake)) = ASKED.get() {
        flag.store(true, Ordering::Release);
        let _ = wake.write(1);
    }
}

/// Catches both signals from now on.
pub(crate) fn catch_signals() -> io::Result<Stop> {
    let stop = Stop {
        flag: Arc::new(AtomicBool::new(false)),
        wake: EventFd::new(EFD_NONBLOCK)?,
    };
    let shared = (stop.flag.clone(), stop.wake.try_clone()?);
    ASKED
        .set(shared)
        .map_err(|_| io::Error::other("signals are caught already"))?;
    let handler = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler is async-signal-safe and everything it uses is static.
        if unsafe { libc::signal(signal, handler) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(stop)
}
