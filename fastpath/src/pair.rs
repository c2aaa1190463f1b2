//! The worker's roles in a pair: the packet cores of `colo-compare` between guest, NIC and link.
//!
//! Invariants: a frame that is owed to anyone is never dropped for lack of a slot, it stays where it is (link buffer,
//! guest ring, NIC queue); nothing leaves while the role is muted.
//!
//! Does not decide about roles or checkpoints: the control thread does, through the methods of the two roles.

mod delayed;
mod hold;
mod lease;
mod local;
mod primary;
mod secondary;
mod twos;

use std::any::Any;
use std::sync::mpsc::Receiver;

use colo_compare::Divergence;

use crate::worker::{Edge, Quiesced, Role, WorkerGone, WorkerHandle, quiesce_all_and};

pub use lease::Lease;
pub use local::{LocalPairRole, LocalReport, SvmSide};
pub use primary::{CutState, PrimaryReport, PrimaryRole, PrimaryRoleConfig};
pub use secondary::{SecondaryReport, SecondaryRole, SecondaryRoleConfig};

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
/// always finds one.
const RESERVED_SLOTS: usize = 512;

/// Runs `task` on the role of `worker` if it is an `R`.
fn on_role<R: Role, T: Send + 'static>(
    worker: &WorkerHandle,
    task: impl FnOnce(&mut R, &mut Edge) -> T + Send + 'static,
) -> Option<T> {
    begin_on_role(worker, task)?.recv().ok().flatten()
}

/// Runs `task` on the roles of all `workers` at the same time, each with its item. `None` if one of
/// them is gone or no `R`; the others have done it then.
fn on_roles<R: Role, I: Send + 'static, T: Send + 'static>(
    workers: &[WorkerHandle],
    items: impl IntoIterator<Item = I>,
    task: impl Fn(&mut R, &mut Edge, I) -> T + Clone + Send + 'static,
) -> Option<Vec<T>> {
    let begin = |(worker, item)| {
        let task = task.clone();
        begin_on_role(worker, move |role, edge| task(role, edge, item))
    };
    // All are told before any is waited for.
    let answers: Vec<_> = workers.iter().zip(items).map(begin).collect();
    let results: Vec<_> = answers
        .into_iter()
        .map(|answer| answer?.recv().ok().flatten())
        .collect();
    results.into_iter().collect()
}

/// Stops all `workers` at one cut and runs `task` on their roles there; `None` for one that is no `R`.
fn on_quiesced<R: Role, T: Send + 'static>(
    workers: &[WorkerHandle],
    task: impl Fn(&mut R, &mut Edge) -> T + Clone + Send + 'static,
) -> Result<Vec<Quiesced<Option<T>>>, WorkerGone> {
    quiesce_all_and(workers, move |edge, role| {
        let role: &mut dyn Any = role;
        role.downcast_mut::<R>().map(|role| task(role, edge))
    })
}

fn begin_on_role<R: Role, T: Send + 'static>(
    worker: &WorkerHandle,
    task: impl FnOnce(&mut R, &mut Edge) -> T + Send + 'static,
) -> Option<Receiver<Option<T>>> {
    let begun = worker.begin(move |edge, role| {
        let role: &mut dyn Any = role;
        role.downcast_mut::<R>().map(|role| task(role, edge))
    });
    begun.ok()
}

#[cfg(test)]
mod role_tests;
