//! The last word on a link that is given up although both hosts live: `Aborted`, of no epoch.
//!
//! Invariants: it is no reason to take the VM away from a primary that says it or is told it (rule 19 knows none but
//! silence): the primary asks the arbiter at once, the secondary only when the primary has had the time for that, or is
//! silent; a peer that does not know the word takes it for the abort of a checkpoint that there is not (rule 22).

use alloc::string::ToString;

use crate::Msg;

/// Epochs count from 1.
pub(crate) const NO_EPOCH: u64 = 0;

/// What is said.
pub(crate) fn farewell(generation: u64, reason: &str) -> Msg {
    Msg::Aborted {
        generation,
        epoch: NO_EPOCH,
        reason: reason.to_string(),
    }
}
