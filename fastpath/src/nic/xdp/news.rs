//! How one end of a NIC tells the others that there is something to look at.
//!
//! Invariant: an end that has looked and then waits for its descriptor misses nothing: a change that it has not heeded
//! keeps the descriptor readable.
//!
//! Does not say what has changed.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Counts changes, and wakes the ends that sleep.
#[derive(Debug)]
pub(super) struct News {
    changes: AtomicU64,
    /// One for each end.
    wakes: Box<[EventFd]>,
}

impl News {
    /// For so many ends.
    pub(super) fn new(ends: u32) -> io::Result<Self> {
        let wakes = (0..ends).map(|_| EventFd::new(EFD_NONBLOCK));
        Ok(Self {
            changes: AtomicU64::new(0),
            wakes: wakes.collect::<io::Result<_>>()?,
        })
    }

    /// Changes so far.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// There is one more.
    pub(super) fn tell(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        for wake in &self.wakes {
            let _ = wake.write(1);
        }
    }

    /// Readable when there was a change; for an end that sleeps.
    pub(super) fn poll_fd(&self, end: u32) -> RawFd {
        self.wakes[end as usize].as_raw_fd()
    }

    /// An end is about to look at all that there is: which changes that covers.
    pub(super) fn heed(&self, end: u32) -> u64 {
        self.heed_with(end, || {})
    }

    /// The same; something may happen `meanwhile`.
    fn heed_with(&self, end: u32, meanwhile: impl FnOnce()) -> u64 {
        // In this order: whoever tells counts before it wakes, so that a change whose wake-up is taken here is counted.
        let _ = self.wakes[end as usize].read();
        meanwhile();
        self.changes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nic::testing::is_readable;

    #[test]
    fn a_change_that_comes_while_an_end_heeds_another_is_heeded_or_wakes_it() {
        let news = News::new(2).unwrap();
        assert!(!is_readable(news.poll_fd(0)));
        news.tell();
        assert!(is_readable(news.poll_fd(0)) && is_readable(news.poll_fd(1)));
        let heeded = news.heed_with(0, || news.tell());
        assert!(heeded == news.changes() || is_readable(news.poll_fd(0)));
        assert_eq!(news.heed(0), 2);
        assert!(!is_readable(news.poll_fd(0)) && is_readable(news.poll_fd(1)));
    }
}
