//! Two captures through the comparator, in the order of their times.
//!
//! Invariants: the comparator is the one of production, with its epochs, deadlines and policy; PVM
//! frames leave it in the order in which it says so; memory is bounded by the comparator's limits
//! and those of [`crate::flows`], [`crate::svm`] and the sorting window, not by the captures.
//!
//! A checkpoint is a cut and a commit at the same instant, as soon as the flow that diverged is
//! silent. What the SVM had sent beyond the PVM is then given to the comparator again, because the
//! SVM's capture does not send it twice.

use std::collections::HashMap;

use colo_compare::wire::{self, tcp::RST};
use colo_compare::{
    Action, Cause, Direction, Divergence, FlowKey, Frames, Limits, Offsets, Opener, Policy,
    PolicyAction, PrimaryPath, Protocol, Right, Token, seq,
};

use crate::capture::Record;
use crate::flows::{Flows, body};
use crate::frames::MappedFrames;
use crate::report::{Found, LISTED_MAX, Report};
use crate::resync::Bytes;
use crate::stream::Fate;
use crate::svm::{Output, Outputs};
use crate::view;

/// A heartbeat that never gets old.
const ALWAYS_US: u64 = u64::MAX;

/// A TCP flow that diverged counts as silent after this time: both guests have finished what they
/// were saying, so that a checkpoint finds them at the same place.
const SILENT_US: u64 = 200;
/// Longest time from a divergence to its checkpoint.
const CHECKPOINT_US: u64 = 5000;

/// A checkpoint that is being simulated.
#[derive(Debug)]
struct Checkpoint<'a> {
    divergence: Divergence,
    /// When the divergence was found.
    found_us: u64,
    /// The first PVM frame of each flow that left by it: only of the diverged flow, unless the
    /// captures have ended.
    heads: HashMap<FlowKey, Record<'a>>,
    /// All of the diverged TCP flow.
    pvm: Vec<Bytes<'a>>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Replay<'a> {
    limits: Limits,
    policy: Policy,
    path: PrimaryPath,
    frames: MappedFrames<'a>,
    flows: Flows<'a>,
    outputs: Outputs<'a>,
    now_us: u64,
    /// A divergence, and when it was found: a checkpoint is to be taken.
    wanted: Option<(Divergence, u64)>,
    checkpoint: Option<Checkpoint<'a>>,
    has_ended: bool,
    report: Report,
}

impl<'a> Replay<'a> {
    /// A pair that has just begun to compare.
    pub(crate) fn new(limits: Limits, policy: Policy) -> Self {
        let mut this = Self {
            limits,
            path: PrimaryPath::with_policy(limits, policy.clone()),
            policy,
            frames: MappedFrames::default(),
            flows: Flows::default(),
            outputs: Outputs::default(),
            now_us: 0,
            wanted: None,
            checkpoint: None,
            has_ended: false,
            report: Report::default(),
        };
        let paired = this.path.pair(0);
        let epoch = paired.expect("a new path has no secondary");
        let committed = this.path.commit(0, &mut this.frames, epoch);
        committed.expect("the epoch is the one that was cut");
        this.path.caught_up(0, this.path.epoch());
        this.path.set_lease(0, &mut this.frames, ALWAYS_US);
        while let Some(action) = this.path.poll_action() {
            debug_assert!(matches!(action, Action::PendingReleased { .. }));
        }
        this
    }

    /// Time goes on to `now_us`: deadlines pass.
    pub(crate) fn advance(&mut self, now_us: u64) {
        self.pass_deadlines(now_us);
        self.now_us = now_us;
    }

    /// Lets every deadline up to `until_us` pass, each at its time.
    fn pass_deadlines(&mut self, until_us: u64) {
        let mut not_before_us = self.now_us;
        loop {
            let deadline_us = self.path.next_deadline().map(|due| due.max(not_before_us));
            let checkpoint_us = self.checkpoint_due_us();
            let due_us = deadline_us.into_iter().chain(checkpoint_us).min();
            let Some(due_us) = due_us.filter(|due| *due <= until_us) else {
                break;
            };
            self.now_us = self.now_us.max(due_us);
            if checkpoint_us == Some(due_us) {
                self.take_checkpoint();
                continue;
            }
            self.path.handle_timeout(self.now_us, &mut self.frames);
            self.act();
            // The path may look at a flow too early, but not twice at the same time.
            not_before_us = due_us + 1;
        }
    }

    /// When the checkpoint that is wanted is to be taken.
    fn checkpoint_due_us(&mut self) -> Option<u64> {
        let (divergence, found_us) = self.wanted.as_ref()?;
        let flow = divergence.flow.and_then(|key| self.flows.get(&key));
        let silent_us = flow.map_or(0, |flow| flow.segment_us + SILENT_US);
        let due_us = silent_us.min(found_us + CHECKPOINT_US);
        Some(due_us.max(*found_us))
    }

    /// The PVM gets a frame.
    pub(crate) fn input(&mut self, record: Record<'a>) {
        let token = self.frames.insert(record);
        let token = self.path.handle_nic(self.now_us, &mut self.frames, token);
        let packet = wire::parse(record.frame, record.frame.len(), Direction::ToGuest);
        let flow = self.flows.of(self.now_us, packet.key);
        flow.opened_by(Opener::Peer);
        self.path
            .handle_delivered(self.now_us, &mut self.frames, token);
        self.act();
    }

    /// The PVM sends a frame.
    pub(crate) fn pvm_sends(&mut self, record: Record<'a>) {
        let packet = view::parse(&record);
        let flow = self.flows.of(self.now_us, packet.key);
        flow.opened_by(Opener::Guest);
        flow.row.primary.count(&record);
        flow.waiting += 1;
        let mut awaited = Vec::new();
        if let Some(tcp) = &packet.tcp {
            flow.segment_us = self.now_us;
            let epoch = self.path.epoch();
            awaited = flow.stream.pvm_sends(&record, tcp, epoch);
        }
        let token = self.frames.insert(record);
        self.path
            .handle_guest_tx(self.now_us, &mut self.frames, token);
        self.act();
        if !self.path.room() {
            self.take_checkpoint();
        }
        for record in awaited {
            self.judge(record, false);
        }
    }

    /// The SVM sends a frame.
    pub(crate) fn svm_sends(&mut self, record: Record<'a>) {
        let packet = view::parse(&record);
        let flow = self.flows.of(self.now_us, packet.key);
        flow.row.secondary.count(&record);
        if packet.tcp.is_some_and(|tcp| tcp.is_pure_ack()) {
            // As in production, where the secondary keeps them to itself.
            self.report.secondary_acks += 1;
            return;
        }
        flow.segment_us = self.now_us;
        self.judge(record, false);
    }

    /// Gives the comparator what the SVM sent, if a checkpoint has not covered it meanwhile.
    fn judge(&mut self, record: Record<'a>, again: bool) {
        let packet = view::parse(&record);
        let since_us = self.covered_since_us();
        let flow = self.flows.of(self.now_us, packet.key);
        let fate = match &packet.tcp {
            Some(tcp) => flow.stream.svm_sends(&record, tcp, self.path.epoch()),
            None if flow.take_covered(body(&record, &packet), since_us) => Fate::Covered,
            None => Fate::Forward(Offsets::default()),
        };
        let incarnation = flow.stream.svm_incarnation();
        let Fate::Forward(offsets) = fate else {
            return;
        };
        let token = self.frames.insert(record);
        if let Some(mut tcp) = packet.tcp {
            offsets.outbound(self.frames.header_mut(&token), &mut tcp);
        }
        let key = packet.key;
        let svm_seq = self.outputs.push(Output {
            record,
            key,
            incarnation,
            again,
        });
        let epoch = self.path.epoch();
        self.path
            .handle_svm_output(self.now_us, &mut self.frames, epoch, svm_seq, token);
        self.act();
    }

    /// Does what the comparator decided.
    fn act(&mut self) {
        while let Some(action) = self.path.poll_action() {
            match action {
                Action::Release { token, right, .. } => {
                    self.count_released(&token, right);
                    self.frames.release(token);
                }
                Action::Mirror {
                    input_seq, token, ..
                } => {
                    self.frames.release(token);
                    self.path
                        .handle_input_ack(self.now_us, &mut self.frames, input_seq);
                }
                Action::SvmReleased { svm_seq } => self.outputs.released(svm_seq),
                Action::Checkpoint(divergence) => {
                    self.wanted = Some((divergence, self.now_us));
                }
                // The last of what a checkpoint lets go.
                Action::PendingReleased { .. } => self.end_checkpoint(),
            }
        }
        let is_stream = self.wanted.is_some_and(|(divergence, _)| {
            let protocol = divergence.flow.map(|key| key.protocol());
            protocol == Some(Protocol::Tcp)
        });
        if !is_stream {
            self.take_checkpoint();
        }
    }

    /// Takes the checkpoint that is wanted, if one is.
    fn take_checkpoint(&mut self) {
        if let Some((divergence, found_us)) = self.wanted.take() {
            self.begin_checkpoint(divergence, found_us);
            self.act();
        }
    }

    fn count_released(&mut self, token: &Token, right: Right) {
        let record = self.frames.record(token);
        let packet = view::parse(&record);
        let flow = self.flows.of(self.now_us, packet.key);
        flow.waiting = flow.waiting.saturating_sub(1);
        if right != Right::Checkpoint {
            flow.row.released += 1;
            return;
        }
        flow.row.held += 1;
        match &packet.tcp {
            Some(tcp) if tcp.has(RST) => flow.stream.reset_is_covered(),
            Some(_) => {}
            None => flow.cover(self.now_us, body(&record, &packet)),
        }
        if let Some(checkpoint) = &mut self.checkpoint {
            let diverged = checkpoint.divergence.flow == Some(packet.key);
            if diverged || self.has_ended {
                checkpoint.heads.entry(packet.key).or_insert(record);
            }
            if let Some(tcp) = packet.tcp.filter(|_| diverged) {
                checkpoint.pvm.push(Bytes::of(&record, &tcp, 0));
            }
        }
    }

    fn begin_checkpoint(&mut self, mut divergence: Divergence, found_us: u64) {
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

    fn count_checkpoint(&mut self) {
        self.report.checkpoints += 1;
        if self.report.checkpoints_at_us.len() < LISTED_MAX {
            self.report.checkpoints_at_us.push(self.now_us);
        }
    }

    fn end_checkpoint(&mut self) {
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
        let (ours, others): (Vec<_>, Vec<_>) = stored
            .into_iter()
            .partition(|output| divergence.flow == Some(output.key));
        let mut go_on = Vec::new();
        for output in others {
            if self.goes_on(&output, false) {
                go_on.push(output.record);
            }
        }
        let is_stream = divergence
            .flow
            .is_some_and(|key| key.protocol() == Protocol::Tcp);
        go_on.extend(match is_stream {
            true => self.stream_goes_on(&checkpoint, &ours),
            false => self.datagrams_go_on(divergence.cause, &ours),
        });
        for record in go_on {
            self.judge(record, true);
        }
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
        // The message that differs is over; one that is late may still come.
        let is_late = cause == Cause::Deadline;
        let pvm = match is_late {
            true => &checkpoint.pvm[..],
            false => checkpoint.pvm.get(1..).unwrap_or_default(),
        };
        let Some(flow) = flow.and_then(|key| self.flows.get(&key)) else {
            return Vec::new();
        };
        let moved = flow.stream.offsets().seq;
        let mut svm = Vec::new();
        for output in ours {
            let tcp = view::tcp_of(&output.record).filter(|tcp| {
                let is_over = |place| seq::le(tcp.payload_seq().wrapping_add(moved), place);
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
        flow.stream.diverged(pvm.to_vec(), svm)
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

    fn covered_since_us(&self) -> u64 {
        self.now_us.saturating_sub(self.limits.extra_deadline_us)
    }

    /// Notes a divergence, with what the captures have at its place.
    fn found(&mut self, divergence: &Divergence, at_us: u64, head: Option<&Record<'a>>) {
        let key = divergence.flow;
        let mut found = Found {
            cause: divergence.cause.name(),
            flow: key.map(|key| key.to_string()),
            offset: divergence.offset,
            at_us,
            ..Found::default()
        };
        let moved = key
            .and_then(|key| self.flows.get(&key))
            .map_or(0, |flow| flow.stream.offsets().seq);
        let of_flow = self.outputs.iter().filter(|o| Some(o.key) == key);
        let svm: Vec<_> = of_flow.map(|output| (output.record, moved)).collect();
        view::fill(&mut found, divergence, head, &svm);
        if let Some(flow) = key.and_then(|key| self.flows.get(&key)) {
            flow.row.divergences += 1;
            flow.row.cause.get_or_insert(divergence.cause.name());
        }
        if self.report.divergences.len() < LISTED_MAX {
            self.report.divergences.push(found);
        } else {
            self.report.divergences_omitted += 1;
        }
    }

    /// Both captures have ended: whatever is unmatched is late, or superfluous.
    pub(crate) fn finish(mut self) -> Report {
        self.take_checkpoint();
        self.has_ended = true;
        for (_, flow) in self.flows.iter_mut() {
            self.report.dropped += flow.stream.give_up_waiting() as u64;
        }
        // Longer than any deadline.
        let limits = &self.limits;
        let longest_us = limits.extra_deadline_us + limits.lag_deadline_us + limits.settle_us;
        self.pass_deadlines(self.now_us.saturating_add(longest_us.saturating_mul(2)));
        let before = self.report.divergences.len();
        self.judge_the_rest(&HashMap::new(), None);
        if self.report.divergences.len() > before {
            self.count_checkpoint();
        }
        self.into_report()
    }

    /// At the end one checkpoint covers everything; here is what it covers besides the divergence
    /// that it was asked for.
    fn judge_the_rest(&mut self, heads: &HashMap<FlowKey, Record<'a>>, known: Option<FlowKey>) {
        let policy = &self.policy;
        let mut late = Vec::new();
        let mut surplus = Vec::new();
        for (key, flow) in self.flows.iter_mut() {
            let action = policy.action(&key, flow.opener());
            if Some(key) == known || matches!(action, PolicyAction::Hold | PolicyAction::Release) {
                continue;
            }
            if let Some(head) = heads.get(&key) {
                late.push((key, *head));
            } else if flow.row.divergences == 0 && flow.stream.svm_surplus() {
                surplus.push(key);
            }
        }
        for (key, head) in late {
            let divergence = Divergence::plain(Cause::Deadline, Some(key));
            self.found(&divergence, self.now_us, Some(&head));
        }
        for key in surplus {
            let of_flow = |output: &&Output<'_>| output.key == key;
            self.report.dropped += self.outputs.iter().filter(of_flow).count() as u64;
            let divergence = Divergence::plain(Cause::Extra, Some(key));
            self.found(&divergence, self.now_us, None);
        }
    }

    fn into_report(mut self) -> Report {
        let stats = *self.path.stats();
        for (_, flow) in self.flows.iter_mut() {
            // A policy may hold a flow until a checkpoint that no other flow asked for.
            flow.row.held += std::mem::take(&mut flow.waiting);
        }
        let mut report = self.report;
        let (rows, others) = self.flows.into_rows();
        report.flows = rows.len() as u64;
        report.flow_table = rows;
        if let Some((forgotten, row)) = others {
            report.flows += forgotten;
            report.other_flows = Some(row);
        }
        for row in report.flow_table.iter().chain(&report.other_flows) {
            report.released += row.released;
            report.held += row.held;
        }
        report.pairs = stats.compared;
        report.dropped += stats.svm_surplus + self.outputs.dropped;
        self.path.close(&mut self.frames);
        report
    }
}
