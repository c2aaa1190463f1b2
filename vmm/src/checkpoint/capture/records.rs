//! The state of a machine that stands still, as records, in memory that is kept from one checkpoint to the next.
//!
//! Invariants: where the machine is as it was, a record takes no memory in the pause; what is of one checkpoint alone is let
//! go of after it, not in the next pause. A record whose checkpoint failed before it was sent costs its memory, no more.
//!
//! Belongs to a secondary: without one nothing is kept (invariant 8). Does not know what is in a record, and does not
//! make the translations: they come with a worker's cut.

use colo_fastpath::pair::CutState;
use colo_fastpath::worker::PortState;

use crate::checkpoint::pending;
use crate::checkpoint::states::{State, StateKind};
use crate::machine::{Machine, MachineError, VCPU_RECORD_BYTES};

/// Records besides those of vCPUs begin with so many bytes.
const RECORD_BYTES: usize = 8 << 10;

/// The records, and between checkpoints their memory.
#[derive(Debug)]
pub(super) struct Records {
    states: Vec<State>,
    /// The memory of the vCPUs' records; while these are in use, what lay in their places.
    vcpus: Vec<Vec<u8>>,
}

impl Records {
    /// Memory for the records of a machine.
    pub(super) fn of(machine: &Machine) -> Self {
        let vcpus = 0..machine.vcpu_count();
        let mut records = Self {
            states: Vec::new(),
            vcpus: vcpus
                .map(|_| Vec::with_capacity(VCPU_RECORD_BYTES))
                .collect(),
        };
        for kind in [StateKind::Platform, StateKind::Devices] {
            records.place(kind, 0).reserve(RECORD_BYTES);
        }
        for shard in 0..machine.workers().len() {
            records
                .place(StateKind::Pending, shard)
                .reserve(RECORD_BYTES);
        }
        records
    }

    /// Reads a machine whose vCPUs and workers stand still.
    pub(super) fn read(
        &mut self,
        machine: &Machine,
        ports: Vec<Option<PortState>>,
        cuts: Vec<CutState>,
    ) -> Result<Vec<State>, MachineError> {
        machine.save_vcpu_records(&mut self.vcpus)?;
        for index in 0..self.vcpus.len() {
            let record = std::mem::take(&mut self.vcpus[index]);
            *self.place(StateKind::Vcpu, index) = record;
        }
        machine.save_platform(self.place(StateKind::Platform, 0))?;
        machine.save_devices_at(ports, self.place(StateKind::Devices, 0));
        for (shard, cut) in cuts.into_iter().enumerate() {
            let pending = self.place(StateKind::Pending, shard);
            *pending = pending::write_record(&cut.pending, std::mem::take(pending));
            *self.place(StateKind::Translations, shard) = cut.translations;
        }
        Ok(std::mem::take(&mut self.states))
    }

    /// They are sent: the next checkpoint has their memory.
    pub(super) fn give_back(&mut self, states: Vec<State>) {
        self.states = states;
        let is_kept = |state: &State| state.kind != StateKind::Audit as u16;
        self.states.retain(is_kept);
        for index in 0..self.vcpus.len() {
            self.vcpus[index] = std::mem::take(self.place(StateKind::Vcpu, index));
        }
        let translations = StateKind::Translations as u16;
        let translations = self.states.iter_mut().filter(|s| s.kind == translations);
        translations.for_each(|state| state.bytes = Vec::new());
    }

    /// The memory of a record.
    fn place(&mut self, kind: StateKind, index: usize) -> &mut Vec<u8> {
        let is_it = |s: &State| (s.kind, usize::from(s.index)) == (kind as u16, index);
        let at = self.states.iter().position(is_it).unwrap_or_else(|| {
            self.states.push(State::new(kind, index, Vec::new()));
            self.states.len() - 1
        });
        &mut self.states[at].bytes
    }
}

#[cfg(test)]
#[derive(Debug)]
pub(super) struct Place {
    pub(super) is_vcpu: bool,
    pub(super) at: *const u8,
    pub(super) capacity: usize,
    pub(super) bytes: usize,
}

#[cfg(test)]
impl Records {
    /// Where the memory is that is kept.
    pub(super) fn places(&self) -> Vec<Place> {
        let place = |is_vcpu, record: &Vec<u8>| Place {
            is_vcpu,
            at: record.as_ptr(),
            capacity: record.capacity(),
            bytes: record.len(),
        };
        let others = self.states.iter().filter(|s| s.bytes.capacity() > 0);
        let others = others.map(|s| place(false, &s.bytes));
        let vcpus = self.vcpus.iter().map(|record| place(true, record));
        vcpus.chain(others).collect()
    }
}
