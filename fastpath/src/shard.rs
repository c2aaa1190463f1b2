//! Several workers for one guest: each owns the flows that hash to it.
//!
//! Invariants: everything about a flow happens on its owner ([`owner`]); frames that arrive elsewhere
//! cross to it, in rings that are never overrun: without room their source is not read. With one
//! shard none of this exists.
//!
//! Does not move frames by itself: [`crate::worker::Edge`] does, with its seat.

mod doorbell;
mod owner;
mod seat;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use doorbell::Doorbell;

pub use owner::owner;
pub(crate) use seat::{Kind, LANE_FRAMES, Outcome, Seat, seats};

/// Most shards of one guest.
pub const SHARDS_MAX: usize = 8;

/// Frames of the guest that may be on their way to one of so many shards when an epoch ends: what
/// `colo_compare::Limits::crossing_frames` has to be, and by how much a worker's pool is larger.
pub const fn crossing_frames(shards: usize) -> usize {
    shards.saturating_sub(1) * LANE_FRAMES
}

/// What the workers of one guest have in common. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ShardGroup {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    active_pairs: AtomicU32,
    doorbells: Box<[Doorbell]>,
}

impl ShardGroup {
    /// A group whose workers wait for these.
    pub(crate) fn new(wakes: impl IntoIterator<Item = Arc<EventFd>>) -> Self {
        let shared = Shared {
            active_pairs: AtomicU32::new(1),
            doorbells: wakes.into_iter().map(Doorbell::new).collect(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Number of shards.
    pub fn shards(&self) -> usize {
        self.shared.doorbells.len()
    }

    /// How many of its queue pairs the guest uses: 1 as long as its driver has not asked for more
    /// (virtio 1.3 section 5.1.6.5.6). Pair n is that of worker n.
    pub fn active_pairs(&self) -> usize {
        self.shared.active_pairs.load(Ordering::Acquire) as usize
    }

    /// Sets how many pairs the guest uses; what is more than there are shards, or none, is cut to
    /// that. Every worker heeds it from its next batch on; [`crate::worker::set_active_pairs`] waits
    /// for that.
    pub fn set_active_pairs(&self, pairs: usize) {
        let pairs = pairs.clamp(1, self.shards().max(1)) as u32;
        self.shared.active_pairs.store(pairs, Ordering::Release);
        for doorbell in &self.shared.doorbells {
            doorbell.ring_anyway();
        }
    }

    fn doorbell(&self, shard: usize) -> &Doorbell {
        &self.shared.doorbells[shard]
    }
}
