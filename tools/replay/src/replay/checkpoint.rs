//! Checkpoints, simulated, and what the SVM's capture goes on with.
//!
//! A checkpoint is a cut and a commit at the same instant, as soon as the flow that diverged is
//! silent. What the SVM had sent beyond the PVM is then given to the comparator again, because the
//! SVM's capture does not send it twice.
//!
//! Invariant: one begins only when none is going on, and ends before anything else happens.

use std::collections::HashMap;

use colo_compare::{Cause, Divergence, FlowKey, Protocol, seq};

use super::Replay;
use crate::capture::Record;
use crate::flows::body;
use crate::report::LISTED_MAX;
use crate::resync::Bytes;
use crate::svm::Output;
use crate::view;

/// A checkpoint that is being simulated.
#[derive(Debug)]
pub(super) struct Checkpoint<'a> {
    pub(super) divergence: Divergence,
    /// When the divergence was found.
    found_us: u64,
    /// The first PVM frame of each flow that left by it: only of the diverged flow, unless the
    /// captures have ended.
    pub(super) heads: HashMap<FlowKey, Record<'a>>,
    /// All of the diverged TCP flow.
    pub(super) pvm: Vec<Bytes<'a>>,
}

impl<'a> Replay<'a> {
    /// Takes the checkpoint that is wanted, if one is; what it lets go are the next actions.
    pub(super) fn begin_checkpoint(&mut self) {
        let Some((mut divergence, found_us)) = self.wanted.take() else {
            return;
        };
        if divergence.cause == Cause::Policy {
            // Asked for by a rule, not by a difference.
            divergence.flow = None;
        }
        self.count_checkpoint();
        self.checkpoint = Some(Checkpoint {
            divergence,
            found_us,
            heads: HashMap::new(),
            pvm: Vec::new(),
        });
        // Nothing is in flight, because each checkpoint ends at once.
        if let Ok(epoch) = self.path.cut(self.now_us) {
            let committed = self.path.commit(self.now_us, &mut self.frames, epoch);
            debug_assert!(committed.is_ok(), "{committed:?}");
        }
        self.path.caught_up(self.now_us, self.path.epoch());
    }

    pub(super) fn count_checkpoint(&mut self) {
        self.report.checkpoints += 1;
        if self.report.checkpoints_at_us.len() < LISTED_MAX {
            self.report.checkpoints_at_us.push(self.now_us);
        }
    }

    /// All that it lets go has left.
    pub(super) fn end_checkpoint(&mut self) {
        let Some(checkpoint) = self.checkpoint.take() else {
            return;
        };
        let divergence = checkpoint.divergence;
        if divergence.cause != Cause::Policy {
            let head = divergence.flow.and_then(|key| checkpoint.heads.get(&key));
            self.found(&divergence, checkpoint.found_us, head);
        }
        if self.has_ended {
            self.judge_the_rest(&checkpoint.heads, divergence.flow);
        }
        let stored = self.outputs.take();
        if self.has_ended || divergence.cause == Cause::OutputOverflow {
            self.report.dropped += stored.len() as u64;
            return;
        }
        let joined = match divergence.cause {
            Cause::OutboundTuple => divergence.flow.and_then(|key| self.openers.join(key)),
            _ => None,
        };
        let (ours, others): (Vec<_>, Vec<_>) = stored
            .into_iter()
            .partition(|output| divergence.flow == Some(output.key));
        let mut go_on = Vec::new();
        for output in others {
            // What goes by another name now is judged anew.
            let is_renamed = joined.is_some_and(|(svm, _)| svm == output.key);
            if is_renamed || self.goes_on(&output, false) {
                go_on.push(output.record);
            }
        }
        go_on.extend(match divergence.flow.map(|key| key.protocol()) {
            _ if joined.is_some() => ours.iter().map(|output| output.record).collect(),
            Some(Protocol::Tcp) => self.stream_goes_on(&checkpoint, &ours),
            _ => self.datagrams_go_on(divergence.cause, &ours),
        });
        let go_on = go_on.into_iter().map(|record| (record, true));
        // Before anything that the SVM has sent since.
        let since = std::mem::take(&mut self.unjudged);
        self.unjudged = go_on.chain(since).collect();
    }

    /// What goes on, of what the SVM had sent in the TCP flow that diverged.
    fn stream_goes_on(
        &mut self,
        checkpoint: &Checkpoint<'a>,
        ours: &[Output<'a>],
    ) -> Vec<Record<'a>> {
        let Divergence {
            flow,
            cause,
            offset,
            ..
        } = checkpoint.divergence;
        let head = flow.and_then(|key| checkpoint.heads.get(&key));
        let place = head
            .and_then(view::tcp_of)
            .map(|tcp| tcp.payload_seq().wrapping_add(offset));
        // The message that differs is over, but not what begins within the PVM's; one that is late
        // may still come.
        let is_late = cause == Cause::Deadline;
        let over = usize::from(!is_late);
        let Some(flow) = flow.and_then(|key| self.flows.get(&key)) else {
            return Vec::new();
        };
        let moved = flow.stream.offsets().seq;
        let mut svm = Vec::new();
        for output in ours {
            let tcp = view::tcp_of(&output.record).filter(|tcp| {
                let begins = tcp.payload_seq().wrapping_add(moved);
                let is_over = |place| seq::lt(begins, place) || (begins == place && offset == 0);
                let is_new = is_late || place.is_some_and(|place| !is_over(place));
                flow.stream.goes_on(tcp, output.incarnation, true) && is_new
            });
            match tcp {
                Some(tcp) => svm.push((output.record, tcp)),
                None => self.report.dropped += 1,
            }
        }
        let waiting = flow.stream.take_waiting();
        let waiting = waiting
            .into_iter()
            .filter_map(|record| Some((record, view::tcp_of(&record)?)));
        svm.extend(waiting);
        flow.stream.diverged(&checkpoint.pvm, over, &svm)
    }

    /// The same for datagrams.
    fn datagrams_go_on(&mut self, cause: Cause, ours: &[Output<'a>]) -> Vec<Record<'a>> {
        let mut go_on = Vec::new();
        // The oldest is the one that was reported.
        let mut is_reported = cause != Cause::Deadline;
        for output in ours {
            let goes_on = self.goes_on(output, true);
            if goes_on && !output.again && !std::mem::take(&mut is_reported) {
                go_on.push(output.record);
            } else {
                self.report.dropped += 1;
            }
        }
        go_on
    }

    /// Whether SVM output that was not matched before a checkpoint is to be given to the comparator
    /// again: the PVM has not sent its counterpart yet.
    fn goes_on(&mut self, output: &Output<'a>, diverged: bool) -> bool {
        let packet = view::parse(&output.record);
        let since_us = self.covered_since_us();
        let Some(flow) = self.flows.get(&output.key) else {
            return false;
        };
        match &packet.tcp {
            Some(tcp) => flow.stream.goes_on(tcp, output.incarnation, diverged),
            None if flow.take_covered(body(&output.record, &packet), since_us) => false,
            // It differs from what the PVM sent instead.
            None => !flow.forget_covered(),
        }
    }
}
