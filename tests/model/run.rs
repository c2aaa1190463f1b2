//! One run: a pair of guests, random events, both comparators side by side.
//!
//! Invariant: after each event both comparators have decided the same; where the rules leave
//! something open the run ends.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;

use colo_compare::testing::{SvmSource, VecFrames};
use colo_compare::{
    Action, Cause, Direction, FlowKey, Limits, Policy, PolicyAction, PrimaryPath, Right, Rule, wire,
};

use crate::decision::{Class, Flaw, Outcome};
use crate::guests::{self, Guest};
use crate::message::{FlowPlan, Kind, Message, client_frame};
use crate::prng::Prng;
use crate::reference::Reference;

/// What happened in a run.
#[derive(Debug, Default)]
pub struct Report {
    pub trace: String,
    /// The first disagreement.
    pub failure: Option<String>,
    pub events: usize,
    pub matched: u64,
    pub free: u64,
    pub divergences: BTreeMap<Class, u64>,
    pub commits: u64,
    pub ended_open: bool,
}

/// Both comparators and what is around them.
struct Run {
    prng: Prng,
    plans: Vec<FlowPlan>,
    limits: Limits,
    fast: PrimaryPath,
    frames: VecFrames,
    slow: Reference,
    pvm: Guest,
    svm: Guest,
    /// The PVM at the cut that is in flight.
    snapshot: Option<Guest>,
    svm_seq: u64,
    svm_source: SvmSource,
    /// Decided by the fast comparator in this event.
    decided: VecDeque<Action>,
    svm_epoch: u64,
    /// Datagrams of the SVM that are overtaken by others.
    delayed: VecDeque<Message>,
    now_us: u64,
    is_muted: bool,
    encoded: BTreeMap<u64, Vec<u8>>,
    open_reports: BTreeSet<u64>,
    last_divergences: [u64; Cause::COUNT],
    report: Report,
}

fn limits(prng: &mut Prng, flaw: Flaw) -> Limits {
    Limits {
        max_flows: 64,
        max_translations: 8,
        max_held_frames: if prng.chance(100) { 6 } else { 400 },
        max_svm_frames: 1000,
        max_unacked_inputs: 100,
        max_input_frames: 64,
        max_stored_output: 64,
        compare_deadline_us: 500,
        ack_deadline_us: 900,
        lag_deadline_us: 3000,
        extra_deadline_us: 700,
        settle_us: 100,
        reorder_window: 1 + prng.below(4) as usize,
        hash_seed: prng.next(),
        canary_equal: flaw == Flaw::AlwaysEqual,
        ..Limits::default()
    }
}

fn policy(plans: &[FlowPlan]) -> Policy {
    let rule = |plan: &FlowPlan| Rule {
        protocol: plan.policy_protocol(),
        peer_ports: Some((plan.peer_port, plan.peer_port)),
        action: plan.policy,
        ..Rule::default()
    };
    // Without rules the fast comparator takes shorter ways.
    let named = plans
        .iter()
        .filter(|plan| plan.policy != PolicyAction::Compare);
    Policy::new(named.map(rule).collect())
}

fn class(cause: Cause) -> Class {
    match cause {
        Cause::Payload | Cause::Length | Cause::Header => Class::Contents,
        Cause::Flags => Class::Flags,
        Cause::SynOptions => Class::SynOptions,
        Cause::Deadline => Class::Deadline,
        Cause::AckDeadline => Class::AckDeadline,
        Cause::Lag => Class::Lag,
        Cause::Extra => Class::Extra,
        Cause::OutboundTuple => Class::OutboundTuple,
        Cause::HoldFull => Class::HoldFull,
        Cause::Aborted => Class::Aborted,
        Cause::Policy => Class::Policy,
        other => panic!("nothing here gives cause to {}", other.name()),
    }
}

/// Frames that leave, per flow and in order. What a commit releases leaves in the order of the
/// whole VM: it is one list.
type Leaving<'a> = BTreeMap<Option<FlowKey>, Vec<(&'a [u8], Right)>>;

fn by_flow<'a>(frames: impl Iterator<Item = (&'a [u8], Right)>) -> Leaving<'a> {
    let mut flows = Leaving::new();
    for (bytes, right) in frames {
        let packet = wire::parse(bytes, bytes.len(), Direction::FromGuest);
        let key = (right != Right::Checkpoint).then_some(packet.key);
        flows.entry(key).or_default().push((bytes, right));
    }
    flows
}

/// Plays one seed.
pub fn run(seed: u64, flaw: Flaw, digests: bool) -> Report {
    let mut run = Run::new(seed, flaw, digests);
    if digests {
        run.svm_source = SvmSource::digesting(&mut run.fast);
    }
    let events = 50 + run.prng.below(350);
    for _ in 0..events {
        let told = run.step();
        if let Err(failure) = told.and_then(|()| run.compare()) {
            run.report.failure = Some(failure);
            return run.report;
        }
        run.report.events += 1;
        if (0..run.plans.len()).any(|flow| run.slow.is_open(flow)) {
            run.report.ended_open = true;
            break;
        }
    }
    run.finish()
}

impl Run {
    fn new(seed: u64, flaw: Flaw, digests: bool) -> Self {
        let mut prng = Prng::new(seed);
        let plans = guests::plans(&mut prng);
        let mut limits = limits(&mut prng, flaw);
        if digests {
            // What waits for the bytes of a digest takes room for a moment.
            limits.max_held_frames = 400;
        }
        let mut fast = PrimaryPath::with_policy(limits, policy(&plans));
        let mut frames = VecFrames::new(4000);
        let first = fast.pair(0).expect("alone before");
        fast.commit(0, &mut frames, first).expect("in flight");
        let _ = fast.poll_action();
        let pvm = Guest::new(&plans, prng.chance(500));
        Self {
            slow: Reference::new(limits, &plans, flaw),
            svm: pvm.as_svm(),
            pvm,
            prng,
            plans,
            limits,
            fast,
            frames,
            snapshot: None,
            svm_seq: 0,
            svm_source: SvmSource::default(),
            decided: VecDeque::new(),
            svm_epoch: 2,
            delayed: VecDeque::new(),
            now_us: 0,
            is_muted: false,
            encoded: BTreeMap::new(),
            open_reports: BTreeSet::new(),
            last_divergences: [0; Cause::COUNT],
            report: Report::default(),
        }
    }

    fn note(&mut self, what: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.report.trace, "{} us: {what}", self.now_us);
    }

    fn step(&mut self) -> Result<(), String> {
        match self.prng.below(100) {
            0..=27 => self.pvm(),
            28..=57 => self.svm(),
            58..=67 => self.input(),
            68..=75 => self.input_ack(),
            76..=80 => self.lease(),
            81..=88 => self.pass_time(),
            89 | 90 => self.caught_up(),
            91 | 92 => return self.cut(),
            93..=96 => self.commit(),
            97 => self.abort(),
            98 => self.twist(),
            _ => self.mute(),
        }
        Ok(())
    }

    fn flow(&mut self) -> usize {
        self.prng.below(self.plans.len() as u64) as usize
    }

    fn pvm(&mut self) {
        let flow = self.flow();
        if !self.fast.room() {
            return;
        }
        if let Some(message) = self.pvm.say(&mut self.prng, &self.plans, flow) {
            self.note(format_args!("PVM: {message:?}"));
            let bytes = message.encode(&self.plans[flow]);
            let token = self.frames.insert(&bytes).expect("a slot");
            self.fast
                .handle_guest_tx(self.now_us, &mut self.frames, token);
            self.answer();
            let id = self.slow.pvm(message);
            self.encoded.insert(id, bytes);
        }
    }

    fn svm(&mut self) {
        let flow = self.flow();
        let message = self.svm.say(&mut self.prng, &self.plans, flow);
        if let Some(message) = message {
            let is_ordered = message.kind != Kind::Data;
            if is_ordered {
                // What opens or ends a connection is not overtaken.
                self.say_delayed_of(flow);
            } else if self.prng.chance(150) {
                self.delayed.push_back(message);
                return;
            }
            self.svm_says(message);
        }
        while self.prng.chance(400)
            && let Some(message) = self.delayed.pop_front()
        {
            self.svm_says(message);
        }
    }

    fn say_delayed_of(&mut self, flow: usize) {
        for message in std::mem::take(&mut self.delayed) {
            if message.flow == flow {
                self.svm_says(message);
            } else {
                self.delayed.push_back(message);
            }
        }
    }

    fn svm_says(&mut self, message: Message) {
        self.svm_seq += 1;
        let (svm_seq, epoch) = (self.svm_seq, self.svm_epoch);
        self.note(format_args!("SVM {svm_seq} in {epoch}: {message:?}"));
        let bytes = message.encode(&self.plans[message.flow]);
        let name = (epoch, svm_seq);
        self.svm_source
            .send(&mut self.fast, &mut self.frames, self.now_us, name, &bytes);
        self.answer();
        self.slow.svm(epoch, svm_seq, message);
    }

    /// A client acknowledges something, or opens a connection.
    fn input(&mut self) {
        let flow = self.flow();
        if self.slow.unacked_inputs() >= self.limits.max_unacked_inputs
            || self.plans[flow].twin.is_some()
        {
            return;
        }
        let (connection, sent) = self.pvm.sent(flow);
        let ack = self
            .prng
            .chance(900)
            .then(|| self.prng.below(sent as u64 + 3) as i64);
        self.note(format_args!(
            "input in flow {flow}: ack {ack:?} of {connection}"
        ));
        let bytes = client_frame(&self.plans[flow], connection, ack);
        let token = self.frames.insert(&bytes).expect("a slot");
        let token = self.fast.handle_nic(self.now_us, &mut self.frames, token);
        self.fast
            .handle_delivered(self.now_us, &mut self.frames, token);
        self.slow.input(flow, connection, ack);
    }

    fn input_ack(&mut self) {
        let behind = if self.prng.chance(700) {
            0
        } else {
            self.prng.below(4)
        };
        let up_to = self.slow.input_seq().saturating_sub(behind);
        self.note(format_args!("input is kept up to {up_to}"));
        self.fast
            .handle_input_ack(self.now_us, &mut self.frames, up_to);
        self.slow.input_ack(up_to);
    }

    fn lease(&mut self) {
        let until_us = self.now_us + self.prng.below(400);
        self.note(format_args!("lease until {until_us}"));
        self.fast.set_lease(self.now_us, &mut self.frames, until_us);
        self.slow.lease(until_us);
    }

    fn pass_time(&mut self) {
        self.now_us += if self.prng.chance(800) {
            self.prng.below(150)
        } else {
            self.prng.below(4000)
        };
        self.slow.now_us = self.now_us;
        self.note(format_args!("time out"));
        self.fast.handle_timeout(self.now_us, &mut self.frames);
        self.slow.timeout();
    }

    fn caught_up(&mut self) {
        let epoch = self.svm_epoch + u64::from(self.prng.chance(200));
        self.note(format_args!("caught up in {epoch}"));
        self.fast.caught_up(self.now_us, epoch);
        self.slow.caught_up(epoch);
    }

    fn cut(&mut self) -> Result<(), String> {
        let (fast, slow) = (self.fast.cut(self.now_us).ok(), self.slow.cut());
        self.note(format_args!("cut: {slow:?}"));
        if fast != slow {
            return Err(format!("cut: fast {fast:?}, slow {slow:?}"));
        }
        let pending: Vec<u64> = self.fast.pending().map(|pending| pending.id).collect();
        if slow.is_some() {
            self.snapshot = Some(self.pvm.as_svm());
            if pending != self.slow.pending() {
                return Err(format!("pending: {pending:?}, {:?}", self.slow.pending()));
            }
        }
        Ok(())
    }

    fn commit(&mut self) {
        let Some(svm) = self.snapshot.take() else {
            return;
        };
        let epoch = self.slow.epoch - 1;
        // The SVM that runs from the commit may speak before it is known here.
        let is_early = self.prng.chance(300);
        if is_early {
            self.restart_svm(svm.clone(), epoch);
            for _ in 0..self.prng.below(6) {
                self.svm();
            }
        }
        self.note(format_args!("commit of {epoch}"));
        let committed = self.fast.commit(self.now_us, &mut self.frames, epoch);
        committed.expect("in flight");
        self.slow.commit();
        self.report.commits += 1;
        if !is_early {
            self.restart_svm(svm, epoch);
        }
    }

    fn restart_svm(&mut self, svm: Guest, epoch: u64) {
        self.svm = svm;
        self.svm_epoch = epoch + 1;
        self.delayed.clear();
    }

    fn abort(&mut self) {
        if self.snapshot.take().is_none() {
            return;
        }
        let epoch = self.slow.epoch - 1;
        self.note(format_args!("abort of {epoch}"));
        let aborted = self.fast.abort(self.now_us, &mut self.frames, epoch);
        aborted.expect("in flight");
        self.slow.abort();
    }

    fn twist(&mut self) {
        let flow = self.flow();
        if self.plans[flow].twin.is_none() {
            self.svm.twist(&mut self.prng, flow);
            self.note(format_args!("the SVM begins to differ in flow {flow}"));
        }
    }

    fn mute(&mut self) {
        // Mostly not for long.
        self.is_muted = !self.is_muted && self.prng.chance(300);
        let is_muted = self.is_muted;
        self.note(format_args!("mute: {is_muted}"));
        if is_muted {
            self.fast.mute();
            self.slow.mute();
        } else {
            self.fast.unmute(self.now_us, &mut self.frames);
            self.slow.unmute();
        }
    }

    /// What the fast comparator asks for it gets at once.
    fn answer(&mut self) {
        loop {
            while let Some(action) = self.fast.poll_action() {
                match action {
                    Action::Fetch { svm_seq } => self.svm_source.fetch(svm_seq),
                    action => self.decided.push_back(action),
                }
            }
            let (source, frames) = (&mut self.svm_source, &mut self.frames);
            if !source.answer(&mut self.fast, frames, self.now_us) {
                return;
            }
        }
    }

    /// What the fast comparator decided in this event against what the slow one did.
    fn compare(&mut self) -> Result<(), String> {
        let slow = self.slow.outcome();
        let mut released: Vec<(Vec<u8>, Right)> = Vec::new();
        let (mut reported, mut requested) = (BTreeSet::new(), None);
        let mut pending_released = None;
        self.answer();
        while let Some(action) = self.decided.pop_front() {
            self.note(format_args!("  fast: {action:?}"));
            match action {
                Action::Release { token, right, .. } => {
                    released.push((self.frames.take(token), right));
                }
                Action::Mirror { token, .. } => drop(self.frames.take(token)),
                Action::SvmReleased { svm_seq } => {
                    self.svm_source.released(svm_seq);
                    if !reported.insert(svm_seq) {
                        return Err(format!("{svm_seq} is reported twice"));
                    }
                }
                Action::PendingReleased { epoch } => pending_released = Some(epoch),
                Action::Fetch { .. } => unreachable!("it is answered"),
                Action::Checkpoint(divergence) => requested = Some(class(divergence.cause)),
            }
        }
        let ended_open = (0..self.plans.len()).any(|flow| self.slow.is_open(flow));
        if ended_open {
            return Ok(());
        }
        self.note(format_args!("  slow: {slow:?}"));
        if pending_released != slow.pending_released {
            return Err(format!("pending: fast {pending_released:?}"));
        }
        self.compare_releases(&released, &slow)?;
        self.compare_reports(&reported, &slow)?;
        self.compare_divergences(requested, &slow)?;
        if self.fast.held_frames() != self.slow.held() {
            let (fast, slow) = (self.fast.held_frames(), self.slow.held());
            return Err(format!("held: fast {fast}, slow {slow}"));
        }
        Ok(())
    }

    fn compare_releases(
        &mut self,
        fast: &[(Vec<u8>, Right)],
        slow: &Outcome,
    ) -> Result<(), String> {
        let slow = slow.released.iter();
        let slow = slow.map(|(id, right)| (&self.encoded[id][..], *right));
        let fast = fast.iter().map(|(bytes, right)| (&bytes[..], *right));
        let (fast, slow) = (by_flow(fast), by_flow(slow));
        if fast != slow {
            return Err(format!("releases: fast {fast:?}\nslow {slow:?}"));
        }
        for right in fast.values().flatten().map(|(_, right)| *right) {
            self.report.matched += u64::from(right == Right::Match);
            self.report.free += u64::from(right == Right::Free);
        }
        Ok(())
    }

    fn compare_reports(&mut self, fast: &BTreeSet<u64>, slow: &Outcome) -> Result<(), String> {
        self.open_reports.extend(&slow.notes.open_reports);
        let slow: BTreeSet<u64> = slow.notes.reports.iter().copied().collect();
        let open = &self.open_reports;
        let differing = fast.symmetric_difference(&slow);
        let differing: Vec<_> = differing.filter(|seq| !open.contains(seq)).collect();
        if differing.is_empty() {
            Ok(())
        } else {
            Err(format!("reports: {differing:?} of one side only"))
        }
    }

    fn compare_divergences(&mut self, fast: Option<Class>, slow: &Outcome) -> Result<(), String> {
        let now = self.fast.stats().divergences;
        let mut found: BTreeMap<Class, u64> = BTreeMap::new();
        for (at, cause) in Cause::ALL.into_iter().enumerate() {
            let new = now[at] - self.last_divergences[at];
            if new > 0 {
                *found.entry(class(cause)).or_default() += new;
            }
        }
        self.last_divergences = now;
        let mut expected: BTreeMap<Class, u64> = BTreeMap::new();
        for (_, class) in &slow.divergences {
            *expected.entry(*class).or_default() += 1;
            *self.report.divergences.entry(*class).or_default() += 1;
        }
        if found != expected {
            return Err(format!("divergences: fast {found:?}, slow {expected:?}"));
        }
        match fast {
            None if slow.requests.is_empty() => Ok(()),
            Some(class) if slow.requests.contains(&class) => {
                self.slow.note_requested();
                Ok(())
            }
            _ => Err(format!("request: fast {fast:?}, slow {:?}", slow.requests)),
        }
    }

    /// Everything leaves when the host goes alone, and no slot is lost.
    fn finish(mut self) -> Report {
        self.fast.go_alone(self.now_us, &mut self.frames);
        self.slow.go_alone();
        if !self.report.ended_open
            && let Err(failure) = self.compare_end()
        {
            self.report.failure = Some(failure);
        }
        while let Some(action) = self.fast.poll_action() {
            if let Action::Release { token, .. } = action {
                self.frames.take(token);
            }
        }
        self.fast.close(&mut self.frames);
        if self.frames.used() != 0 && self.report.failure.is_none() {
            self.report.failure = Some(format!("{} slots leaked", self.frames.used()));
        }
        self.report
    }

    fn compare_end(&mut self) -> Result<(), String> {
        let slow = self.slow.outcome();
        let mut released = Vec::new();
        while let Some(action) = self.fast.poll_action() {
            if let Action::Release { token, right, .. } = action {
                released.push((self.frames.take(token), right));
            }
        }
        let fast: Vec<_> = released
            .iter()
            .map(|(bytes, right)| (&bytes[..], *right))
            .collect();
        let slow = slow.released.iter();
        let slow: Vec<_> = slow
            .map(|(id, right)| (&self.encoded[id][..], *right))
            .collect();
        if fast == slow {
            Ok(())
        } else {
            Err(format!("going alone: fast {fast:?}\nslow {slow:?}"))
        }
    }
}
