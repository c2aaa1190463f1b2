//! The end of an epoch, in all shards or in none (rule 4).
//!
//! Invariants: all cuts are of one epoch; those of a cut that fails are taken back before a worker goes on.
//!
//! Workers stand still afterwards, whatever comes of it, until somebody resumes them.

use colo_fastpath::pair::{CutState, OnWorkers, PrimaryRole};
use colo_fastpath::worker::{PortState, WorkerHandle};

use super::CaptureError;
use crate::machine::MachineError;

/// What the workers of a machine give at a cut: the states of their queues, and what the packet side has.
pub(super) type Cut = (Vec<Option<PortState>>, Vec<CutState>);

/// Stops the workers and ends the epoch in all shards, or in none. `buffer`: the next one is not compared. All in one order
/// to each worker, while the guest stands still: each costs a wake-up.
pub(super) fn cut_all(
    workers: &[WorkerHandle],
    first: bool,
    buffer: bool,
) -> Result<Cut, CaptureError> {
    let quiesced = PrimaryRole::on_quiesced(workers, move |role, edge| {
        let cut = role.cut(edge, first)?;
        Some((cut, role.buffer(buffer)))
    });
    let (ports, cuts): (Vec<_>, Vec<_>) = quiesced.map_err(MachineError::from)?.into_iter().unzip();
    let cuts: Vec<_> = cuts.into_iter().map(Option::flatten).collect();
    let epochs: Option<Vec<_>> = cuts
        .iter()
        .map(|cut| cut.as_ref().map(|(cut, _)| cut.epoch))
        .collect();
    let failure = match epochs {
        Some(epochs) if epochs.iter().all(|&epoch| epoch == epochs[0]) => {
            let cuts = cuts.into_iter().flatten().map(|(cut, _)| cut);
            return Ok((ports, cuts.collect()));
        }
        Some(_) => CaptureError::Epochs,
        None => CaptureError::Role,
    };
    let before = cuts
        .into_iter()
        .map(|cut| cut.map(|(cut, was)| (cut.epoch, was)));
    let _ = PrimaryRole::on_each(workers, before.collect::<Vec<_>>(), |role, _, before| {
        if let Some((epoch, was_buffering)) = before {
            role.uncut(epoch);
            role.buffer(was_buffering);
        }
    });
    Err(failure)
}

#[cfg(test)]
mod tests {
    use colo_fastpath::nic::{Nic, SocketNic};

    use super::super::lab::as_primary;
    use super::*;
    use crate::machine::{Machine, tests::config};

    /// A machine of two shards with a secondary that says nothing, and what must live as long.
    fn shards() -> (Machine, impl Sized) {
        let mut config = config();
        (config.host.shards, config.host.frame_slots) = (2, 1024);
        let (mut nics, mut wires) = (Vec::<Box<dyn Nic>>::new(), Vec::new());
        for _ in 0..2 {
            let (nic, wire) = SocketNic::pair(1500).unwrap();
            nics.push(Box::new(nic));
            wires.push(wire);
        }
        let console = Box::new(std::io::sink());
        let (machine, events) = Machine::create_stopped(&config, nics, console).unwrap();
        let peers = as_primary(&machine);
        (machine, (wires, events, peers))
    }

    fn epochs(machine: &Machine) -> Vec<u64> {
        PrimaryRole::on_workers(machine.workers(), |role, _| role.epoch()).unwrap()
    }

    #[test]
    fn rule_4_shards_in_different_epochs_are_not_cut() {
        let (machine, _kept) = shards();
        let workers = machine.workers();
        PrimaryRole::on_worker(&workers[1], |role, _| role.raise_epoch(4)).unwrap();
        let refused = cut_all(workers, true, true).unwrap_err();
        assert!(matches!(refused, CaptureError::Epochs), "{refused}");
        assert_eq!(epochs(&machine), [1, 4], "the cuts are taken back");
        let buffering = PrimaryRole::on_workers(workers, |role, _| role.buffer(false));
        assert_eq!(buffering, Some(vec![false; 2]), "and what they began");
    }

    #[test]
    fn rule_4_shards_that_begin_in_one_epoch_are_cut_together() {
        let (machine, _kept) = shards();
        let workers = machine.workers();
        PrimaryRole::on_worker(&workers[1], |role, _| role.raise_epoch(4)).unwrap();
        assert_eq!(PrimaryRole::begin_in_one_epoch(workers), Some(4));
        let (_, cuts) = cut_all(workers, true, false).unwrap();
        assert_eq!(cuts.iter().map(|cut| cut.epoch).collect::<Vec<_>>(), [4, 4]);
        assert_eq!(epochs(&machine), [5, 5]);
    }
}
