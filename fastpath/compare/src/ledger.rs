//! What the primary path has decided and counted, and the SVM's output that it compares with.
//!
//! Invariants: each `svm_seq` is reported as released at most once per path; actions are given out
//! in the order in which they were decided.

use alloc::collections::VecDeque;

use crate::action::{Action, Right};
use crate::cause::Divergence;
use crate::frames::{Frames, Token};
use crate::limits::Limits;
use crate::list::{Ends, Lists};
use crate::stats::PrimaryStats;
use crate::wire::Layout;

/// A frame of the SVM that the comparator keeps.
#[derive(Debug)]
pub(crate) struct SvmFrame {
    pub(crate) packet: Layout,
    pub(crate) token: Token,
    pub(crate) epoch: u64,
    pub(crate) svm_seq: u64,
    pub(crate) at_us: u64,
    /// Its flow, once it is in one.
    pub(crate) flow: u32,
    /// TCP: which connection between these ports.
    pub(crate) incarnation: u32,
    /// All of it has left; it stays to be compared with retransmissions.
    pub(crate) reported: bool,
}

/// An [`Action`] without the rare big one.
#[derive(Debug)]
enum Step {
    /// Released by match, and reported then.
    Matched {
        token: Token,
        held_us: u64,
        svm_seq: u64,
    },
    Release {
        token: Token,
        right: Right,
        held_us: u64,
    },
    Mirror {
        epoch: u64,
        input_seq: u64,
        token: Token,
    },
    SvmReleased {
        svm_seq: u64,
    },
    PendingReleased {
        epoch: u64,
    },
    Checkpoint,
}

#[derive(Debug)]
pub(crate) struct Ledger {
    steps: VecDeque<Step>,
    /// The second half of a [`Step::Matched`].
    report: Option<u64>,
    /// The reason of the latest [`Step::Checkpoint`].
    checkpoint: Option<Divergence>,
    pub(crate) stats: PrimaryStats,
    pub(crate) svm: Lists<SvmFrame>,
}

impl Ledger {
    pub(crate) fn new(limits: &Limits) -> Self {
        // Everything that one call can decide: all that is held leaves, all that it stood for is
        // reported; beside it what the shell left for later.
        let steps = limits.max_held_frames + limits.max_svm_frames + 1024;
        Self {
            steps: VecDeque::with_capacity(steps),
            report: None,
            checkpoint: None,
            stats: PrimaryStats::default(),
            svm: Lists::with_capacity(limits.max_svm_frames),
        }
    }

    #[inline(always)]
    pub(crate) fn next_action(&mut self) -> Option<Action> {
        if let Some(svm_seq) = self.report.take() {
            return Some(Action::SvmReleased { svm_seq });
        }
        loop {
            return Some(match self.steps.pop_front()? {
                Step::Matched {
                    token,
                    held_us,
                    svm_seq,
                } => {
                    self.report = Some(svm_seq);
                    Action::Release {
                        token,
                        right: Right::Match,
                        held_us,
                    }
                }
                Step::Release {
                    token,
                    right,
                    held_us,
                } => Action::Release {
                    token,
                    right,
                    held_us,
                },
                Step::Mirror {
                    epoch,
                    input_seq,
                    token,
                } => Action::Mirror {
                    epoch,
                    input_seq,
                    token,
                },
                Step::SvmReleased { svm_seq } => Action::SvmReleased { svm_seq },
                Step::PendingReleased { epoch } => Action::PendingReleased { epoch },
                // A later reason has replaced this one.
                Step::Checkpoint => match self.checkpoint.take() {
                    Some(divergence) => Action::Checkpoint(divergence),
                    None => continue,
                },
            });
        }
    }

    pub(crate) fn act(&mut self, action: Action) {
        self.steps.push_back(match action {
            Action::Release {
                token,
                right,
                held_us,
            } => Step::Release {
                token,
                right,
                held_us,
            },
            Action::Mirror {
                epoch,
                input_seq,
                token,
            } => Step::Mirror {
                epoch,
                input_seq,
                token,
            },
            Action::SvmReleased { svm_seq } => Step::SvmReleased { svm_seq },
            Action::PendingReleased { epoch } => Step::PendingReleased { epoch },
            Action::Checkpoint(divergence) => {
                self.checkpoint = Some(divergence);
                Step::Checkpoint
            }
        });
    }

    /// There is nobody to mirror to, to report to, or to ask for a checkpoint.
    pub(crate) fn keep_releases_only<F: Frames + ?Sized>(&mut self, frames: &mut F) {
        (self.checkpoint, self.report) = (None, None);
        for _ in 0..self.steps.len() {
            match self.steps.pop_front() {
                Some(Step::Mirror { token, .. }) => frames.release(token),
                Some(step @ Step::Release { .. }) => self.steps.push_back(step),
                Some(Step::Matched { token, held_us, .. }) => self.steps.push_back(Step::Release {
                    token,
                    right: Right::Match,
                    held_us,
                }),
                _ => {}
            }
        }
    }

    /// Gives back every frame that is still to be sent.
    pub(crate) fn close<F: Frames + ?Sized>(&mut self, frames: &mut F) {
        for step in self.steps.drain(..) {
            match step {
                Step::Matched { token, .. }
                | Step::Mirror { token, .. }
                | Step::Release { token, .. } => frames.release(token),
                _ => {}
            }
        }
    }

    /// A frame with data leaves because the SVM's frame `svm_seq` is the same, which stands for it
    /// alone.
    #[inline(always)]
    pub(crate) fn release_match(&mut self, token: Token, held_us: u64, svm_seq: u64) {
        self.stats.compared += 1;
        self.stats.count_release(Right::Match, true);
        self.steps.push_back(Step::Matched {
            token,
            held_us,
            svm_seq,
        });
    }

    /// Everything that the SVM's frame says has left.
    #[inline]
    pub(crate) fn report_svm(&mut self, svm_seq: u64) {
        self.steps.push_back(Step::SvmReleased { svm_seq });
    }

    /// Takes a frame of the SVM out of its flow, unreported.
    pub(crate) fn recycle_svm<F: Frames + ?Sized>(
        &mut self,
        ends: &mut Ends,
        at: u32,
        frames: &mut F,
    ) {
        if let Some(frame) = self.svm.get_mut(at) {
            frames.release(frame.token.take());
            self.svm.discard(ends, at);
        }
    }

    /// Reports a frame of the SVM and takes it out of its flow.
    pub(crate) fn settle_svm<F: Frames + ?Sized>(
        &mut self,
        ends: &mut Ends,
        at: u32,
        frames: &mut F,
    ) {
        if let Some(frame) = self.svm.get(at) {
            self.report_svm(frame.svm_seq);
            self.recycle_svm(ends, at, frames);
        }
    }

    /// Forgets all output of the SVM; the lists that it was in are to be forgotten too.
    pub(crate) fn drop_svm<F: Frames + ?Sized>(
        &mut self,
        frames: &mut F,
        mut is_dropped: impl FnMut(&SvmFrame) -> bool,
    ) {
        for at in 0..self.svm.nodes() {
            if self.svm.get(at).is_some_and(&mut is_dropped)
                && let Some(frame) = self.svm.take(at)
            {
                frames.release(frame.token);
            }
        }
    }
}
