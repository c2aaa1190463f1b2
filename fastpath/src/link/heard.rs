//! When the peer was heard last on the control channel, for the packet channels beside it.
//!
//! The silence there is what a takeover is proposed for, so it says better than any question of our own whether packets may
//! still be said as datagrams (rule 18), and it costs no wake-up.
//!
//! Invariants: one thread writes; the time is that of the look at the message, never a later one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared by the control thread and the packet channels of a host; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct PeerHeard(Arc<AtomicU64>);

impl PeerHeard {
    /// A message came then.
    pub fn note(&self, heard_us: u64) {
        self.0.store(heard_us, Ordering::Relaxed);
    }

    /// When one came last; 0: never.
    pub fn last_us(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
