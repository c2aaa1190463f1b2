//! Two captures through the comparator, in the order of their times.
//!
//! Invariants: the comparator is the one of production, with its epochs, deadlines and policy; PVM
//! frames leave it in the order in which it says so; memory is bounded by the comparator's limits
//! and those of [`crate::flows`], [`crate::svm`] and the sorting window, not by the captures.

mod checkpoint;
mod findings;

use std::collections::VecDeque;

use colo_compare::wire::tcp::{ACK, RST, SYN};
use colo_compare::wire::{self, Packet};
use colo_compare::{
    Action, Direction, Divergence, FlowKey, Frames, Limits, Offsets, Opener, Policy, PrimaryPath,
    Protocol, Right, Token,
};

use crate::Side;
use crate::capture::Record;
use crate::flows::{Flows, body};
use crate::frames::MappedFrames;
use crate::openers::Openers;
use crate::report::Report;
use crate::resync::Bytes;
use crate::stream::Fate;
use crate::svm::{Output, Outputs};
use crate::view;
use checkpoint::Checkpoint;

/// A heartbeat that never gets old.
const ALWAYS_US: u64 = u64::MAX;

/// A TCP flow that diverged counts as silent after this time: both guests have finished what they
/// were saying, so that a checkpoint finds them at the same place.
const SILENT_US: u64 = 200;
/// Longest time from a divergence to its checkpoint.
const CHECKPOINT_US: u64 = 5000;

/// See the module.
#[derive(Debug)]
pub(crate) struct Replay<'a> {
    limits: Limits,
    policy: Policy,
    path: PrimaryPath,
    frames: MappedFrames<'a>,
    flows: Flows<'a>,
    openers: Openers,
    outputs: Outputs<'a>,
    /// SVM output that the comparator has not got yet; true: because of a checkpoint.
    unjudged: VecDeque<(Record<'a>, bool)>,
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
            openers: Openers::default(),
            outputs: Outputs::default(),
            unjudged: VecDeque::new(),
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
        let packet = wire::parse(record.frame, record.frame.len(), Direction::ToGuest);
        let flow = self.flows.of(self.now_us, packet.key);
        flow.note_opener(packet.tcp.as_ref(), Opener::Peer);
        let token = self.frames.insert(record);
        let token = self.path.handle_nic(self.now_us, &mut self.frames, token);
        self.path
            .handle_delivered(self.now_us, &mut self.frames, token);
        self.act();
    }

    /// The PVM sends a frame.
    pub(crate) fn pvm_sends(&mut self, record: Record<'a>) {
        let packet = view::parse(&record);
        self.note_opener(Side::Primary, &packet);
        let flow = self.flows.of(self.now_us, packet.key);
        flow.note_opener(packet.tcp.as_ref(), Opener::Guest);
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
        let awaited = awaited.into_iter().map(|record| (record, false));
        self.unjudged.extend(awaited);
        self.act();
        if !self.path.room() {
            self.take_checkpoint();
        }
    }

    /// The SVM sends a frame.
    pub(crate) fn svm_sends(&mut self, record: Record<'a>) {
        let packet = view::parse(&record);
        let key = self.openers.name(packet.key);
        if key == packet.key {
            self.note_opener(Side::Secondary, &packet);
        }
        let flow = self.flows.of(self.now_us, key);
        flow.row.secondary.count(&record);
        if packet.tcp.is_some_and(|tcp| tcp.is_pure_ack()) {
            // As in production, where the secondary keeps them to itself.
            self.report.secondary_acks += 1;
            return;
        }
        flow.segment_us = self.now_us;
        self.unjudged.push_back((record, false));
        self.act();
    }

    /// Takes note of a flow that the guest may have opened.
    fn note_opener(&mut self, side: Side, packet: &Packet) {
        let opens = match packet.tcp {
            Some(tcp) => tcp.has(SYN) && !tcp.has(ACK),
            None => {
                let flow = self.flows.get(&packet.key);
                let is_new = flow.is_none_or(|flow| !flow.row.has_output());
                packet.key.protocol() == Protocol::Udp && is_new
            }
        };
        if opens {
            self.openers.opens(side, packet.key);
        }
    }

    /// Gives the comparator what the SVM sent, if a checkpoint has not covered it meanwhile.
    fn judge(&mut self, record: Record<'a>, again: bool) {
        let packet = view::parse(&record);
        let key = self.openers.name(packet.key);
        let since_us = self.covered_since_us();
        let flow = self.flows.of(self.now_us, key);
        let fate = match &packet.tcp {
            Some(tcp) => flow.stream.svm_sends(&record, tcp, self.path.epoch()),
            None if flow.take_covered(body(&record, &packet), since_us) => Fate::Covered,
            None => Fate::Forward(Offsets::default()),
        };
        let incarnation = flow.stream.svm_incarnation();
        let offsets = match fate {
            Fate::Forward(offsets) => offsets,
            Fate::GoOn(records) => {
                let records = records.into_iter().rev();
                records.for_each(|record| self.unjudged.push_front((record, again)));
                return;
            }
            Fate::Wait | Fate::Covered => return,
        };
        let token = self.frames.insert(record);
        let header = self.frames.header_mut(&token);
        rename(header, &packet, key);
        if let Some(mut tcp) = packet.tcp {
            offsets.outbound(header, &mut tcp);
        }
        let output = Output {
            record,
            key,
            incarnation,
            again,
        };
        let (svm_seq, epoch) = (self.outputs.push(output), self.path.epoch());
        self.path
            .handle_svm_output(self.now_us, &mut self.frames, epoch, svm_seq, token);
    }

    /// Does what the comparator decided, and goes on until there is nothing left to be done now.
    fn act(&mut self) {
        loop {
            while let Some(action) = self.path.poll_action() {
                self.perform(action);
            }
            if self.wants_checkpoint_now() {
                self.begin_checkpoint();
            } else if let Some((record, again)) = self.unjudged.pop_front() {
                self.judge(record, again);
            } else {
                break;
            }
        }
    }

    fn perform(&mut self, action: Action) {
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
            Action::Checkpoint(divergence) => self.wanted = Some((divergence, self.now_us)),
            // The last of what a checkpoint lets go.
            Action::PendingReleased { .. } => self.end_checkpoint(),
            // All bytes are at hand.
            Action::Fetch { .. } => {}
        }
    }

    /// A stream is waited for; nothing else is.
    fn wants_checkpoint_now(&self) -> bool {
        let protocol = |divergence: Divergence| divergence.flow.map(|key| key.protocol());
        self.wanted
            .is_some_and(|(divergence, _)| protocol(divergence) != Some(Protocol::Tcp))
    }

    /// Takes the checkpoint that is wanted, if one is.
    fn take_checkpoint(&mut self) {
        self.begin_checkpoint();
        self.act();
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

    fn covered_since_us(&self) -> u64 {
        self.now_us.saturating_sub(self.limits.extra_deadline_us)
    }
}

/// Gives a frame of the SVM the port that the PVM uses in the same flow.
fn rename(header: &mut [u8], packet: &Packet, key: FlowKey) {
    let at = usize::from(packet.l4);
    if key != packet.key
        && let Some(port) = header.get_mut(at..at + 2)
    {
        port.copy_from_slice(&key.guest_port().to_be_bytes());
    }
}
