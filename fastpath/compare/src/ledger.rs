//! What the primary path has decided and counted: the queue of actions and the statistics, which
//! the per-flow comparators write to as well.
//!
//! Invariant: each `svm_seq` is reported as released at most once per path.

use alloc::collections::VecDeque;

use crate::action::Action;
use crate::frames::{Frames, Token};
use crate::stats::PrimaryStats;

#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) actions: VecDeque<Action>,
    pub(crate) stats: PrimaryStats,
    /// SVM frames that the comparator keeps.
    pub(crate) svm_frames: usize,
}

impl Ledger {
    /// Everything that the SVM's frame says has left.
    pub(crate) fn report_svm(&mut self, svm_seq: u64) {
        self.actions.push_back(Action::SvmReleased { svm_seq });
    }

    pub(crate) fn recycle_svm<F: Frames + ?Sized>(&mut self, token: Token, frames: &mut F) {
        self.svm_frames -= 1;
        frames.release(token);
    }

    pub(crate) fn settle_svm<F: Frames + ?Sized>(
        &mut self,
        svm_seq: u64,
        token: Token,
        frames: &mut F,
    ) {
        self.report_svm(svm_seq);
        self.recycle_svm(token, frames);
    }
}
