//! Waiting of a control thread: a set of descriptors and a deadline.

use std::os::fd::RawFd;

use colo_fastpath::clock::now_us;

/// Collects descriptors, then waits for one of them.
#[derive(Debug, Default)]
pub struct Waiter {
    fds: Vec<libc::pollfd>,
    /// The descriptors say what the last wait found.
    found: bool,
}

impl Waiter {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.found = false;
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

    /// Whether there may be something to do at `fd`: not if the last wait says that nothing has come.
    pub fn may_be_ready(&self, fd: RawFd) -> bool {
        let nothing = |waited: &libc::pollfd| waited.fd == fd && waited.revents == 0;
        !(self.found && self.fds.iter().any(nothing))
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
        let ready = unsafe { libc::ppoll(self.fds.as_mut_ptr(), n, timeout, std::ptr::null()) };
        // A signal leaves the descriptors as they were.
        self.found = ready >= 0;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    #[test]
    fn only_what_a_wait_found_nothing_at_is_not_ready() {
        let quiet = EventFd::new(EFD_NONBLOCK).unwrap();
        let loud = EventFd::new(EFD_NONBLOCK).unwrap();
        loud.write(1).unwrap();
        let mut waiter = Waiter::default();
        assert!(waiter.may_be_ready(quiet.as_raw_fd()), "before any wait");
        waiter.readable(quiet.as_raw_fd());
        waiter.readable(loud.as_raw_fd());
        waiter.wait(None);
        assert!(waiter.may_be_ready(loud.as_raw_fd()));
        assert!(!waiter.may_be_ready(quiet.as_raw_fd()));
        assert!(waiter.may_be_ready(-1), "not waited for");
        waiter.clear();
        assert!(waiter.may_be_ready(quiet.as_raw_fd()));
    }
}
