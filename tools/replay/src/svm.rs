//! What the SVM's host would keep: output that was given to the comparator and is not reported
//! released (rule 9).
//!
//! Invariants: in the order of its numbers; at most [`STORED_MAX`] frames, the oldest go first.

use std::collections::VecDeque;

use colo_compare::FlowKey;

use crate::capture::Record;

/// More than the comparator keeps.
const STORED_MAX: usize = 1 << 16;

/// One frame of the SVM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output<'a> {
    pub(crate) record: Record<'a>,
    pub(crate) key: FlowKey,
    /// TCP: which connection between its ports.
    pub(crate) incarnation: u32,
    /// A checkpoint came in between; it was given to the comparator again.
    pub(crate) again: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Outputs<'a> {
    /// Empty places are reported already.
    stored: VecDeque<Option<Output<'a>>>,
    /// The number of the first place.
    first: u64,
    /// Frames given up for lack of room.
    pub(crate) dropped: u64,
}

impl<'a> Outputs<'a> {
    /// Stores a frame and gives its number.
    pub(crate) fn push(&mut self, output: Output<'a>) -> u64 {
        if self.stored.len() == STORED_MAX {
            let oldest = self.stored.pop_front().flatten();
            self.dropped += u64::from(oldest.is_some());
            self.first += 1;
        }
        self.stored.push_back(Some(output));
        self.first + self.stored.len() as u64 - 1
    }

    /// What it stands for has left.
    pub(crate) fn released(&mut self, svm_seq: u64) {
        let place = svm_seq.checked_sub(self.first);
        if let Some(place) = place.and_then(|at| self.stored.get_mut(at as usize)) {
            *place = None;
        }
        while let Some(None) = self.stored.front() {
            self.stored.pop_front();
            self.first += 1;
        }
    }

    /// All that is stored, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Output<'a>> {
        self.stored.iter().flatten()
    }

    /// Takes all that is stored, oldest first.
    pub(crate) fn take(&mut self) -> Vec<Output<'a>> {
        self.first += self.stored.len() as u64;
        self.stored.drain(..).flatten().collect()
    }
}
