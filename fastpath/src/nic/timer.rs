//! A timer to wait for beside other descriptors.
//!
//! Does not repeat.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A timer of its own.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: plain system call that gives a new descriptor or -1.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made by the kernel and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Readable once, after this time (below a second); what it was set to before is forgotten.
    pub(super) fn arm(&self, wait_us: u64) -> io::Result<()> {
        let setting = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: 0,
                tv_nsec: (wait_us * 1000).min(999_999_999) as libc::c_long,
            },
        };
        let fd = self.0.as_raw_fd();
        // SAFETY: the kernel reads one itimerspec that lives on this stack.
        let answer =
            unsafe { libc::timerfd_settime(fd, 0, &raw const setting, std::ptr::null_mut()) };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    pub(super) fn poll_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
