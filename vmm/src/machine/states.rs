//! Stopping a machine's vCPUs, and the records of all that is in KVM.
//!
//! Invariants: what [`Machine::check_vcpus`] and [`Machine::check_platform`] take, a restore takes (rule
//! 13); clocks go forward only (rule 16); a record that was made while the machine stood still is never
//! handed out after it has run on.
//!
//! Does not know devices, and not who asks.

use std::sync::Mutex;
use std::time::Instant;

use super::build::{Machine, MachineError};
use super::clock::{Passed, TscControl, offsets};
use super::exits::lock;
use super::platform_state::{PlatformShape, PlatformState};
use super::record::RecordError;
use super::rehearsal::Rehearsal;
use super::vcpu::{VcpuError, VcpuHandle};
use super::vcpu_ioctl::get_tsc_offset;
use super::vcpu_state::{TscTarget, VcpuState};
use super::vm::Vm;

/// How far a restored machine's clocks may go forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockJump {
    /// By the wall clock, but not by less than has passed since the checkpoint began to come in, which was after the capture,
    /// and not by more than has passed since this machine was stopped for it, which was before (rule 11). One that was
    /// not, because it has never run or stood still at the commit before (Remus), takes the former: who is ahead once
    /// stays so.
    SinceCapture {
        /// When the checkpoint began to come in.
        begun: Instant,
    },
    /// By the wall clock. For snapshots.
    WallClock,
}

/// What a machine keeps for its states.
#[derive(Debug)]
pub(super) struct StateKeeper {
    platform: PlatformShape,
    rehearsal: Mutex<Option<Rehearsal>>,
    stopped_at: Mutex<Option<Instant>>,
}

impl StateKeeper {
    pub(super) fn new(vm: &Vm) -> Self {
        Self {
            platform: PlatformShape::probe(vm.fd()),
            rehearsal: Mutex::new(None),
            stopped_at: Mutex::new(None),
        }
    }
}

/// Every part of a platform's record under its name, clocks left out.
pub fn platform_parts(record: &[u8]) -> Result<Vec<(String, Vec<u8>)>, RecordError> {
    Ok(PlatformState::from_bytes(record)?.parts())
}

impl Machine {
    /// Stops all vCPUs between two instructions and waits for that.
    pub fn pause_vcpus(&self) -> Result<(), MachineError> {
        self.pause_and(|_| Ok(()))
    }

    /// The same; each vCPU makes its record at once, while others still do other things to the machine.
    /// [`Machine::save_vcpu_records`] has them.
    pub fn pause_vcpus_for_capture(&self) -> Result<(), MachineError> {
        self.pause_and(|vcpu| match vcpu.shape().lapic {
            // A device may still raise an interrupt there.
            true => Ok(()),
            false => vcpu.order_record(),
        })
    }

    fn pause_and(
        &self,
        then: impl Fn(&VcpuHandle) -> Result<(), VcpuError>,
    ) -> Result<(), MachineError> {
        // All are told before any is waited for.
        let mut answers = Vec::with_capacity(self.vcpus.len());
        for vcpu in &self.vcpus {
            answers.push(vcpu.begin_pause()?);
            then(vcpu)?;
        }
        for answer in answers {
            answer.recv().map_err(|_| VcpuError::Gone)?;
        }
        lock(&self.states.stopped_at).get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Lets all vCPUs run.
    pub fn resume_vcpus(&self) -> Result<(), MachineError> {
        self.vcpus.iter().for_each(VcpuHandle::discard_record);
        *lock(&self.states.stopped_at) = None;
        self.vcpus.iter().try_for_each(|vcpu| Ok(vcpu.resume()?))
    }

    /// Lets the vCPUs run this share of the time only, in percent; 0: they stand still until told otherwise. This goes
    /// beside pauses: a machine that is paused stays so, one that is let run again keeps its share.
    pub fn throttle_vcpus(&self, run_pct: u8) -> Result<(), MachineError> {
        let throttle = |vcpu: &VcpuHandle| Ok(vcpu.throttle(run_pct)?);
        self.vcpus.iter().try_for_each(throttle)
    }

    /// How long vCPUs were kept standing by [`Machine::throttle_vcpus`]; of several, the one that was longest.
    pub fn throttled_us(&self) -> u64 {
        let times = self.vcpus.iter().map(VcpuHandle::throttled_us);
        times.max().unwrap_or(0)
    }

    /// Reads all paused vCPUs.
    pub fn save_vcpus(&self) -> Result<Vec<VcpuState>, MachineError> {
        self.vcpus.iter().map(|vcpu| Ok(vcpu.save()?)).collect()
    }

    /// The records of all paused vCPUs, in the memory of `records`; one is added for each that is not there.
    pub fn save_vcpu_records(&self, records: &mut Vec<Vec<u8>>) -> Result<(), MachineError> {
        records.resize_with(self.vcpus.len(), Vec::new);
        for vcpu in &self.vcpus {
            vcpu.order_record()?;
        }
        for (vcpu, record) in self.vcpus.iter().zip(records) {
            vcpu.fetch_record(record)?;
        }
        Ok(())
    }

    /// Whether [`Machine::restore_vcpus`] would take these states, without doing it.
    pub fn check_vcpus(&self, states: &[VcpuState]) -> Result<(), MachineError> {
        self.check_count(states)?;
        for (vcpu, state) in self.vcpus.iter().zip(states) {
            state.check(vcpu.shape())?;
        }
        let mut rehearsal = lock(&self.states.rehearsal);
        if rehearsal.is_none() {
            let irqchip = self.states.platform.irqchip;
            *rehearsal = Some(Rehearsal::new(self.vm.kvm(), self.vcpus.len(), irqchip)?);
        }
        let Some(rehearsal) = &*rehearsal else {
            return Ok(());
        };
        for (index, (vcpu, state)) in self.vcpus.iter().zip(states).enumerate() {
            rehearsal.try_state(index, state, vcpu.shape())?;
        }
        Ok(())
    }

    /// Replaces the states of all paused vCPUs.
    pub fn restore_vcpus(&self, states: &[VcpuState], jump: ClockJump) -> Result<(), MachineError> {
        self.check_count(states)?;
        let passed = self.passed(jump);
        let present = self.tsc_offsets()?;
        let clocks: Vec<_> = states.iter().map(|state| state.tsc).collect();
        let offsets = offsets(&clocks, &present, passed);
        for ((vcpu, state), offset) in self.vcpus.iter().zip(states).zip(offsets) {
            vcpu.discard_record();
            let target = match (vcpu.shape().tsc, offset) {
                (TscControl::Offset, Some(offset)) => TscTarget::Offset(offset),
                (TscControl::Msr, _) => {
                    TscTarget::Value(state.tsc.after(passed.since_ns(state.tsc.realtime_ns)))
                }
                _ => TscTarget::Leave,
            };
            vcpu.restore(state.clone(), target)?;
        }
        Ok(())
    }

    fn check_count(&self, states: &[VcpuState]) -> Result<(), MachineError> {
        if states.len() == self.vcpus.len() {
            return Ok(());
        }
        Err(MachineError::Shape {
            found: states.len(),
            expected: self.vcpus.len(),
        })
    }

    fn passed(&self, jump: ClockJump) -> Passed {
        let ClockJump::SinceCapture { begun } = jump else {
            return Passed::default();
        };
        let stopped_at = *lock(&self.states.stopped_at);
        let stopped_at = stopped_at.filter(|&at| at <= begun);
        let now = Instant::now();
        Passed {
            at_least: now.saturating_duration_since(begun),
            at_most: Some(now.saturating_duration_since(stopped_at.unwrap_or(begun))),
        }
    }

    /// The present offset of each vCPU whose clock can be set by it.
    fn tsc_offsets(&self) -> Result<Vec<Option<u64>>, MachineError> {
        let offset = |vcpu: &VcpuHandle| match vcpu.shape().tsc {
            TscControl::Offset => Ok(vcpu.execute(|fd, _| get_tsc_offset(fd).ok())?),
            TscControl::Msr | TscControl::Fixed => Ok(None),
        };
        self.vcpus.iter().map(offset).collect()
    }

    /// The record of what is in KVM once a machine, in the memory of `record`. All vCPUs are paused.
    pub fn save_platform(&self, record: &mut Vec<u8>) -> Result<(), MachineError> {
        let state = PlatformState::read(self.vm.fd(), self.states.platform)?;
        *record = state.write_record(std::mem::take(record));
        Ok(())
    }

    /// Whether [`Machine::restore_platform`] would take this record, without doing it.
    pub fn check_platform(&self, record: &[u8]) -> Result<(), MachineError> {
        Ok(PlatformState::from_bytes(record)?.check(self.states.platform)?)
    }

    /// Replaces what is in KVM once a machine. All vCPUs are paused; they have been restored. Ends what counts as this
    /// stop: should the machine not run before the next restore, the capture of that one is far from here.
    pub fn restore_platform(&self, record: &[u8], jump: ClockJump) -> Result<(), MachineError> {
        let state = PlatformState::from_bytes(record)?;
        state.write(self.vm.fd(), self.states.platform, self.passed(jump))?;
        *lock(&self.states.stopped_at) = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::machine::tests::{COUNT_AND_SLEEP, lab, running};

    /// A machine's platform, as if a host had captured it whose wall clock is behind by so much.
    fn captured(machine: &Machine, behind: Duration) -> Vec<u8> {
        let mut record = Vec::new();
        machine.save_platform(&mut record).unwrap();
        let mut state = PlatformState::from_bytes(&record).unwrap();
        state.shift_realtime(-(behind.as_nanos() as i64));
        state.write_record(Vec::new())
    }

    fn clock_ns(record: &[u8]) -> u64 {
        PlatformState::from_bytes(record).unwrap().clock_ns()
    }

    #[test]
    fn rule_11_a_record_of_an_earlier_stop_is_not_given_out_after_the_guest_has_run() {
        let lab = running(COUNT_AND_SLEEP);
        // As a capture that fails before it fetches the record.
        lab.machine.pause_vcpus_for_capture().unwrap();
        let stopped = lab.machine.save_vcpus().unwrap().remove(0);
        lab.machine.resume_vcpus().unwrap();
        lab.wait_until_counter_moves();
        lab.machine.pause_vcpus().unwrap();
        let mut records = Vec::new();
        lab.machine.save_vcpu_records(&mut records).unwrap();
        let state = VcpuState::from_bytes(&records[0]).unwrap();
        assert!(state.tsc.value > stopped.tsc.value);
    }

    #[test]
    fn rule_16_a_wall_clock_that_is_ahead_moves_no_clock_unless_a_stop_for_the_capture_allows_it() {
        const AHEAD: Duration = Duration::from_millis(900);
        let primary = running(COUNT_AND_SLEEP);
        primary.machine.pause_vcpus().unwrap();
        // Younger, so its clock has shown less.
        let secondary = lab();
        let restore = |ahead: Duration| {
            let since = Instant::now();
            let record = captured(&primary.machine, ahead);
            let jump = ClockJump::SinceCapture {
                begun: Instant::now(),
            };
            secondary.machine.restore_platform(&record, jump).unwrap();
            let after = captured(&secondary.machine, Duration::ZERO);
            let jumped_ns = clock_ns(&after).saturating_sub(clock_ns(&record));
            let passed = since.elapsed() + Duration::from_millis(1);
            assert!(
                u128::from(jumped_ns) <= passed.as_nanos(),
                "{jumped_ns} ns in {passed:?}"
            );
        };
        // It has never run.
        restore(AHEAD);
        // It was stopped long ago for a commit, and stands still at that one when the next comes (Remus).
        let long_ago = Instant::now().checked_sub(Duration::from_secs(100));
        *lock(&secondary.machine.states.stopped_at) = long_ago;
        restore(Duration::ZERO);
        restore(AHEAD);
    }
}
