//! Waiting of a control thread: a set of descriptors and a deadline.

use std::os::fd::RawFd;

use colo_fastpath::clock::now_us;

/// Collects descriptors, then waits for one of them.
#[derive(Debug, Default)]
pub struct Waiter {
    fds: Vec<libc::pollfd>,
}

impl Waiter {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.fds.clear();
    }

    /// Waits for input on `fd`, too.
    pub fn readable(&mut self, fd: RawFd) {
        self.push(libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
    }

    /// Waits for this, too.
    pub fn push(&mut self, fd: libc::pollfd) {
        self.fds.push(fd);
    }

    /// Waits until something is ready or the deadline (monotonic microseconds) has come.
    pub fn wait(&mut self, deadline_us: Option<u64>) {
        let timeout = deadline_us.map(|at| {
            let us = at.saturating_sub(now_us());
            libc::timespec {
                tv_sec: (us / 1_000_000) as libc::time_t,
                tv_nsec: (us % 1_000_000 * 1000) as libc::c_long,
            }
        });
        let timeout = timeout
            .as_ref()
            .map_or(std::ptr::null(), std::ptr::from_ref);
        let n = self.fds.len() as libc::nfds_t;
        // SAFETY: the descriptors and the optional timespec live through the call; no signal mask is given.
        unsafe { libc::ppoll(self.fds.as_mut_ptr(), n, timeout, std::ptr::null()) };
    }
}
