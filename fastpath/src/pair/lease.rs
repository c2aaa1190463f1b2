//! Until when what needs no word of the secondary may leave (rule 18), as the control thread last said.
//!
//! More time comes with every heartbeat, and a worker needs to know of it only when it has something to release. So it
//! reads the lease instead of being told: an idle worker is not woken.
//!
//! Invariants: one thread writes; who ends a lease waits until every worker has read that; who gives more time to workers
//! that may hold something for want of it wakes them.
//!
//! Does not know the clock's present time, nor what may leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A lease that is renewed so shortly before its end may have been found ended by a worker.
const LATE_US: u64 = 10_000;

/// A lease that all workers of a primary share; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Lease(Arc<AtomicU64>);

impl Lease {
    /// Until then; 0: there is none.
    pub fn until_us(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// Gives time until `until_us`, 0: ends it. Gives whether a worker may be waiting for it.
    pub(super) fn set(&self, now_us: u64, until_us: u64) -> bool {
        let before_us = self.0.swap(until_us, Ordering::SeqCst);
        before_us < now_us + LATE_US
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_more_time_while_there_is_some() {
        let lease = Lease::default();
        assert!(lease.set(1_000, 200_000), "there was none");
        assert!(!lease.clone().set(21_000, 220_000));
        assert_eq!(lease.until_us(), 220_000);
        assert!(lease.set(219_999, 300_000), "a worker's clock may be ahead");
        assert!(!lease.set(230_000, 0));
        assert!(lease.set(240_000, 400_000), "it was ended");
    }
}
