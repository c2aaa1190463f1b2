//! How the slots of a worker's frame pool are shared out in a pair.
//!
//! Invariants: what NIC and link may borrow, what the packet core of either host may keep, and what is kept free for what
//! comes over the link are together no more than the pool, so that a checkpoint always finds room for its pending output
//! after its commit point (rule 13), and a link can be read whatever is kept.

use super::RESERVED_SLOTS;
use crate::link::XDP_SLOTS_MAX;

/// Most mirrored input that may be unacknowledged.
const UNACKED_MAX: usize = 1024;

/// How many frames of each kind may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameParts {
    /// Of each of these: PVM output that is held, SVM output and its history at the primary, SVM output that the secondary
    /// stores, input that the secondary keeps.
    pub each: usize,
    /// Mirrored input that is not acknowledged, above the input that the secondary keeps.
    pub unacked: usize,
}

impl FrameParts {
    /// The smallest pool that leaves a pair much to work with.
    pub const SLOTS_MIN: u32 = 8192;

    /// Of a pool of so many slots; `crossing` is [`crate::shard::crossing_frames`], for which the pool has as many more.
    pub const fn of(slots: u32, crossing: usize) -> Self {
        // The NIC borrows half of them at most, to receive into.
        let lent = slots as usize / 2 + XDP_SLOTS_MAX;
        // Crossing frames may be in a checkpoint's pending output and in what the secondary stores.
        let kept = (slots as usize).saturating_sub(lent + RESERVED_SLOTS + crossing);
        let unacked = if kept / 4 < UNACKED_MAX {
            kept / 4
        } else {
            UNACKED_MAX
        };
        // A secondary stores output, keeps input and takes the pending output of a checkpoint.
        let each = (kept - unacked) / 3;
        Self { each, unacked }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::crossing_frames;

    #[test]
    fn rule_13_all_parts_fit_into_the_pool_at_once() {
        for slots in [FrameParts::SLOTS_MIN, 16_384, 1 << 20] {
            for shards in [1, 2, 8] {
                let crossing = crossing_frames(shards);
                let FrameParts { each, unacked } = FrameParts::of(slots, crossing);
                let (stored, input, pending) = (each + crossing, each + unacked, each + crossing);
                let lent = slots as usize / 2 + XDP_SLOTS_MAX;
                let used = stored + input + pending + lent + RESERVED_SLOTS;
                assert!(
                    used <= slots as usize + crossing,
                    "{slots} {shards}: {used}"
                );
                assert!(each > 0 && unacked > 0);
            }
        }
    }

    #[test]
    fn a_pool_that_is_too_small_has_no_parts() {
        assert_eq!(
            FrameParts::of(1024, 0),
            FrameParts {
                each: 0,
                unacked: 0
            }
        );
    }
}
