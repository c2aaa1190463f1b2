//! What is done with all workers of a machine at once.
//!
//! Invariant: no worker stands still after [`Machine::resume_workers`].

use colo_fastpath::worker::{quiesce_all, resume_all};

use super::{Machine, MachineError};

impl Machine {
    /// Stops all workers at one cut across them (rule 4).
    pub fn quiesce_workers(&self) -> Result<(), MachineError> {
        quiesce_all(self.workers())?;
        Ok(())
    }

    /// Lets all workers go on, also behind one that has ended.
    pub fn resume_workers(&self) -> Result<(), MachineError> {
        Ok(resume_all(self.workers())?)
    }

    /// Makes all workers let go of the guest's queues, whose memory is about to change.
    pub fn release_queues(&self) -> Result<(), MachineError> {
        for worker in self.workers() {
            worker.restore(None)?;
        }
        Ok(())
    }
}
