//! The worker's roles in a pair: the packet cores of `colo-compare` between guest, NIC and link.
//!
//! Invariants: a frame that is owed to anyone is never dropped for lack of a slot, it stays where it is (link buffer,
//! guest ring, NIC queue); nothing leaves while the role is muted.
//!
//! Does not decide about roles or checkpoints: the control thread does, through the methods of the two roles.

mod answers;
mod delayed;
mod hold;
mod lease;
mod local;
mod on_workers;
mod parts;
mod primary;
mod reports;
mod secondary;
mod twos;

use colo_compare::Divergence;

pub use answers::Answers;
pub use lease::Lease;
pub use local::{LocalPairRole, LocalReport, SvmSide};
pub use on_workers::OnWorkers;
pub use parts::FrameParts;
pub use primary::{CutState, PrimaryReport, PrimaryRole, PrimaryRoleConfig};
pub use secondary::{PacketSide, SecondaryReport, SecondaryRole, SecondaryRoleConfig};

/// What a role tells the control thread.
#[derive(Debug)]
pub enum PairEvent {
    /// Outputs differ, are late, or a limit is reached.
    CheckpointWanted(Divergence),
    /// The secondary has reached a limit.
    PeerWantsCheckpoint,
    /// The packet channel is unusable; the role has let go of it.
    LinkDown {
        /// In words.
        reason: String,
    },
    /// A shard has had no room for more held output for a while (true), or has room again (rule 14).
    HoldFull(bool),
    /// The thread stood still for too long; the role is muted (rule 18).
    ClockGap {
        /// For how long.
        gap_us: u64,
        /// How many times so far.
        gaps: u64,
    },
}

/// Slots that must be free before frames are taken from the NIC or the guest, so that what comes over the link
/// finds one; see [`FrameParts`].
const RESERVED_SLOTS: usize = 512;

#[cfg(test)]
mod role_tests;
