//! What the primary path has decided and counted, and the SVM's output that it compares with.
//!
//! Invariants: each `svm_seq` is reported as released at most once per path; actions are given out
//! in the order in which they were decided.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::action::{Action, Right};
use crate::cause::Divergence;
use crate::digest::DigestKey;
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
    pub(crate) payload: Payload,
}

/// What is at hand of a frame's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Payload {
    /// The bytes, in the frame.
    Bytes,
    /// A digest; the frame ends with its headers.
    Digest([u8; 16]),
    /// The same, and the bytes have been asked for.
    Asked([u8; 16]),
}

impl Payload {
    #[inline(always)]
    pub(crate) fn digest_of(digest: u128) -> Self {
        Self::Digest(digest.to_le_bytes())
    }

    /// The digest, where the bytes are not at hand.
    #[inline(always)]
    pub(crate) fn digest(&self) -> Option<u128> {
        match self {
            Self::Bytes => None,
            Self::Digest(digest) | Self::Asked(digest) => Some(u128::from_le_bytes(*digest)),
        }
    }
}

impl SvmFrame {
    /// The secondary has been asked for the bytes, and must keep them.
    pub(crate) fn waits_for_bytes(&self) -> bool {
        matches!(self.payload, Payload::Asked(_)) && !self.reported
    }

    /// Where the bytes end that are at hand.
    pub(crate) fn known_end(&self) -> u16 {
        match self.payload {
            Payload::Bytes => self.packet.end,
            _ => self.packet.payload_at(),
        }
    }
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
    Fetch {
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
    /// Compares with digests; without it bytes are asked for.
    pub(crate) digest_key: Option<DigestKey>,
    /// What this epoch has asked the bytes of and not got, in order.
    asked: Vec<u64>,
    max_asked: usize,
}

impl Ledger {
    pub(crate) fn new(limits: &Limits) -> Self {
        // Everything that one call can decide: all that is held leaves, all that it stood for is
        // reported; beside it what the shell left for later.
        let steps = limits.max_held_frames + limits.crossing_frames + limits.max_svm_frames + 1024;
        Self {
            steps: VecDeque::with_capacity(steps),
            report: None,
            checkpoint: None,
            stats: PrimaryStats::default(),
            svm: Lists::with_capacity(limits.max_svm_frames),
            digest_key: None,
            asked: Vec::with_capacity(limits.max_svm_frames),
            max_asked: limits.max_svm_frames,
        }
    }

    /// Nothing is decided that has not been given out, and nothing is asked for.
    #[inline]
    pub(crate) fn is_settled(&self) -> bool {
        self.steps.is_empty() && self.report.is_none() && self.asked.is_empty()
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
                Step::Fetch { svm_seq } => Action::Fetch { svm_seq },
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
            Action::Fetch { svm_seq } => Step::Fetch { svm_seq },
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

    /// Whether `n` bytes of a frame at `at` have this digest; `None` without a key.
    #[inline]
    pub(crate) fn digest_is<F: Frames + ?Sized>(
        &self,
        digest: u128,
        frames: &F,
        (token, at, n): (&Token, usize, usize),
    ) -> Option<bool> {
        let key = self.digest_key.as_ref()?;
        Some(frames.digest(token, at, n, key) == digest)
    }

    /// Asks for the bytes of a frame of which there is only a digest, once. What has been reported
    /// the secondary has no more. What finds no room to be remembered waits for its deadline.
    pub(crate) fn fetch(&mut self, at: u32) {
        let Some(frame) = self.svm.get_mut(at).filter(|frame| !frame.reported) else {
            return;
        };
        if let Payload::Digest(digest) = frame.payload
            && self.asked.len() < self.max_asked
        {
            frame.payload = Payload::Asked(digest);
            let svm_seq = frame.svm_seq;
            let place = self.asked.partition_point(|asked| *asked < svm_seq);
            self.asked.insert(place, svm_seq);
            self.stats.fetched += 1;
            self.act(Action::Fetch { svm_seq });
        }
    }

    /// No bytes are on their way.
    #[inline(always)]
    pub(crate) fn asks_nothing(&self) -> bool {
        self.asked.is_empty()
    }

    /// Whether these bytes were asked for. Says so once.
    #[inline(always)]
    pub(crate) fn is_answer(&mut self, svm_seq: u64) -> bool {
        !self.asked.is_empty() && self.take_answer(svm_seq)
    }

    #[cold]
    fn take_answer(&mut self, svm_seq: u64) -> bool {
        let place = self.asked.binary_search(&svm_seq);
        place.is_ok_and(|place| self.asked.remove(place) == svm_seq)
    }

    /// Takes a frame of the SVM out of its flow, unreported.
    #[inline]
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
        // What was asked of an epoch that is over is answered to nobody.
        self.asked.clear();
        for at in 0..self.svm.nodes() {
            if self.svm.get(at).is_some_and(&mut is_dropped)
                && let Some(frame) = self.svm.take(at)
            {
                frames.release(frame.token);
            }
        }
    }
}
