//! What a capture does to keep its pages: before the pause it looks at the dirty log and copies what there is, while the guest
//! runs; in the pause it looks again, and the rest is kept.
//!
//! Invariant: whatever the log names is among the pages in flight at once, so that nothing is forgotten if the capture fails
//! (rule 14); the log is collected before a page is copied, so that what is written meanwhile comes with the next look.
//!
//! Does not decide whether it pays: `stabilise` does.

use std::time::Instant;

use super::{CaptureCost, CaptureError, CaptureThread};
use crate::checkpoint::stabilise::Stable;

impl CaptureThread {
    /// Copies what the next capture is known to keep, unless most of it would be written again before the pause.
    pub(super) fn copy_early(&mut self, cost: &mut CaptureCost) -> Result<(), CaptureError> {
        self.written.clear();
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        let policy = self.settings.stabilise;
        let known = self.in_flight.count() as u64;
        if !session.stabiliser.wants_early(policy, known) {
            return Ok(());
        }
        let begun = Instant::now();
        self.collect()?;
        if let Some(session) = &mut self.session {
            let keep = session.outbound.to_keep(&self.in_flight);
            cost.early_pages = session.stabiliser.copy_early(keep);
        }
        // For the next look, which has to be quick.
        self.written.clear();
        cost.early_us = begun.elapsed().as_micros() as u64;
        Ok(())
    }

    /// Adds what the log names since it was read last to the pages in flight. Gives how many the secondary has already of
    /// those that it is owed.
    pub(super) fn collect(&mut self) -> Result<u64, CaptureError> {
        let taken = self.machine.take_dirty(&mut self.written);
        self.in_flight.merge(&self.written);
        taken?;
        let session = self.session.as_mut();
        Ok(session.map_or(0, |session| session.outbound.captured(&self.written)))
    }

    /// Keeps the pages in flight as they are now; the guest stands still, and the log was looked at.
    pub(super) fn keep(&mut self, cost: &mut CaptureCost) -> Result<Stable, CaptureError> {
        let session = self.session.as_mut().ok_or(CaptureError::NoSecondary)?;
        let policy = self.settings.stabilise;
        let keep = session.outbound.to_keep(&self.in_flight);
        let again_before = session.stabiliser.early_again_pages();
        let stable = session.stabiliser.take_since(keep, &self.written, policy)?;
        cost.again_pages = session.stabiliser.early_again_pages() - again_before;
        Ok(stable)
    }
}

#[cfg(test)]
#[path = "early_tests.rs"]
mod tests;
