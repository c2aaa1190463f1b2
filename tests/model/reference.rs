//! The reference comparator: decides what the protocol's rules say, from plain lists, slowly.
//!
//! Invariants: written from the protocol and from the documentation of `colo-compare`; no sequence
//! arithmetic (places in streams are 64-bit numbers), no tables, no timers: after each event
//! everything is looked at again.
//!
//! Does not parse frames, and has no limits but those that ask for a checkpoint.

use colo_compare::{Limits, PolicyAction, Right};

use crate::datagrams::Datagrams;
use crate::decision::{Class, Flaw, Outcome, Said, Verdict};
use crate::message::{Carried, FlowPlan, Message};
use crate::stream::Stream;

/// A PVM frame that has not left.
#[derive(Debug, Clone)]
pub struct Held {
    pub id: u64,
    pub epoch: u64,
    pub message: Message,
    pub at_us: u64,
    /// Input that must be acknowledged first.
    stamp: u64,
    /// It may leave by this right, but not while mute.
    cleared: Option<Right>,
}

/// The contents of a flow.
#[derive(Debug)]
pub(crate) enum Contents {
    Stream(Stream),
    Datagrams(Datagrams),
}

#[derive(Debug)]
pub(crate) struct Flow {
    plan: FlowPlan,
    pub(crate) contents: Contents,
    last_input: u64,
    pub(crate) has_diverged: bool,
    pvm_sent: bool,
    svm_sent: bool,
    /// The rules leave open what happens until the next commit.
    is_open: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Reference {
    pub(crate) limits: Limits,
    pub(crate) flaw: Flaw,
    pub(crate) flows: Vec<Flow>,
    pub(crate) held: Vec<Held>,
    next_id: u64,
    pub now_us: u64,
    pub epoch: u64,
    comparing: u64,
    pub(crate) cut: Option<u64>,
    pub(crate) frozen: bool,
    pub(crate) muted: bool,
    lease_until_us: Option<u64>,
    pub(crate) epoch_start_us: u64,
    pub(crate) caught_up_us: Option<u64>,
    early_caught_up: Option<u64>,
    input_seq: u64,
    input_ack: u64,
    requested: Option<u64>,
    pending_cleared: Option<u64>,
    early: Vec<(u64, Said)>,
    pub(crate) outcome: Outcome,
}

impl Reference {
    /// A pair whose first checkpoint, of epoch 1, is committed at time 0.
    pub fn new(limits: Limits, plans: &[FlowPlan], flaw: Flaw) -> Self {
        let flow = |plan: &FlowPlan| Flow {
            plan: *plan,
            contents: match plan.carried {
                Carried::Tcp => Contents::Stream(Stream::new(*plan, flaw)),
                _ => Contents::Datagrams(Datagrams::new(*plan, limits.reorder_window, flaw)),
            },
            last_input: 0,
            has_diverged: false,
            pvm_sent: false,
            svm_sent: false,
            is_open: false,
        };
        Self {
            limits,
            flaw,
            flows: plans.iter().map(flow).collect(),
            held: Vec::new(),
            next_id: 0,
            now_us: 0,
            epoch: 2,
            comparing: 2,
            cut: None,
            frozen: false,
            muted: false,
            lease_until_us: None,
            epoch_start_us: 0,
            caught_up_us: None,
            early_caught_up: None,
            input_seq: 0,
            input_ack: 0,
            requested: None,
            pending_cleared: None,
            early: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    /// What has been decided since the last call.
    pub fn outcome(&mut self) -> Outcome {
        self.settle();
        std::mem::take(&mut self.outcome)
    }

    pub fn held(&self) -> usize {
        self.held.len()
    }

    pub fn is_open(&self, flow: usize) -> bool {
        self.flows[flow].is_open
    }

    pub fn unacked_inputs(&self) -> u64 {
        self.input_seq - self.input_ack
    }

    pub fn input_seq(&self) -> u64 {
        self.input_seq
    }

    /// Numbers of the frames that a checkpoint of what is cut now carries.
    pub fn pending(&self) -> Vec<u64> {
        let covered = self.cut.unwrap_or(self.epoch);
        let held = self.held.iter().filter(|held| held.epoch <= covered);
        held.map(|held| held.id).collect()
    }

    pub fn pvm(&mut self, message: Message) -> u64 {
        self.next_id += 1;
        let flow = &mut self.flows[message.flow];
        // Rule 4: its own flow's input; a flow that has had none waits for all.
        let of_flow = flow.plan.carried == Carried::Tcp && flow.last_input > 0;
        let stamp = if of_flow {
            flow.last_input
        } else {
            self.input_seq
        };
        self.held.push(Held {
            id: self.next_id,
            epoch: self.epoch,
            message,
            at_us: self.now_us,
            stamp,
            cleared: None,
        });
        if self.epoch == self.comparing && !self.frozen {
            self.produced(self.held.len() - 1);
        }
        self.settle();
        if self.held.len() >= self.limits.max_held_frames {
            self.request(Class::HoldFull);
        }
        self.next_id
    }

    /// A PVM frame of the epoch that is compared.
    fn produced(&mut self, at: usize) {
        let message = &self.held[at].message;
        let flow = &mut self.flows[message.flow];
        if let Contents::Stream(stream) = &mut flow.contents {
            stream.produced(message);
        }
        flow.pvm_sent = true;
        let flow = message.flow;
        self.settle();
        self.check_tuple(flow);
    }

    pub fn svm(&mut self, epoch: u64, svm_seq: u64, message: Message) {
        let said = Said {
            svm_seq,
            message,
            at_us: self.now_us,
        };
        if epoch < self.comparing || (self.frozen && epoch == self.comparing) {
            return;
        }
        if epoch > self.comparing {
            self.early.push((epoch, said));
        } else {
            self.compare(said);
        }
    }

    fn compare(&mut self, said: Said) {
        let at = said.message.flow;
        let policy = self.policy(at);
        let flow = &mut self.flows[at];
        flow.svm_sent = true;
        let notes = &mut self.outcome.notes;
        match policy {
            PolicyAction::Hold => return,
            PolicyAction::Release => {
                notes.reports.push(said.svm_seq);
                return;
            }
            PolicyAction::Compare | PolicyAction::IgnoreBytes { .. } => {}
        }
        let differs = match &mut flow.contents {
            Contents::Datagrams(datagrams) => {
                datagrams.said(said);
                None
            }
            Contents::Stream(stream) => {
                let contradicts = stream.said(said, notes);
                flow.is_open |= stream.is_open;
                contradicts
            }
        };
        if let Some(class) = differs {
            self.diverge(at, class);
        }
        self.settle();
        self.check_tuple(at);
    }

    pub(crate) fn policy(&self, flow: usize) -> PolicyAction {
        match self.flaw {
            Flaw::NoPolicy => PolicyAction::Compare,
            _ => self.flows[flow].plan.policy,
        }
    }

    pub fn input(&mut self, flow: usize, connection: u32, ack: Option<i64>) {
        self.input_seq += 1;
        let flow = &mut self.flows[flow];
        flow.last_input = self.input_seq;
        if let (Contents::Stream(stream), Some(ack)) = (&mut flow.contents, ack) {
            stream.acknowledged(connection, ack);
        }
    }

    pub fn input_ack(&mut self, up_to: u64) {
        if up_to <= self.input_seq {
            self.input_ack = self.input_ack.max(up_to);
        }
    }

    pub fn lease(&mut self, until_us: u64) {
        self.lease_until_us = Some(until_us);
    }

    pub fn caught_up(&mut self, epoch: u64) {
        if epoch == self.comparing {
            self.caught_up_us.get_or_insert(self.now_us);
        } else if epoch == self.epoch {
            self.early_caught_up = Some(epoch);
        }
    }

    pub fn cut(&mut self) -> Option<u64> {
        if self.cut.is_some() {
            return None;
        }
        self.cut = Some(self.epoch);
        self.epoch += 1;
        self.cut
    }

    pub fn commit(&mut self) {
        let Some(epoch) = self.cut.take() else { return };
        self.note_covered(epoch);
        for held in self.held.iter_mut().filter(|held| held.epoch <= epoch) {
            held.cleared = held.cleared.or(Some(Right::Checkpoint));
        }
        self.leave_cleared();
        self.pending_cleared = Some(epoch);
        self.leave_pending();
        self.forget_svm();
        for flow in &mut self.flows {
            flow.has_diverged = false;
            (flow.pvm_sent, flow.svm_sent) = (false, false);
            flow.is_open = false;
        }
        self.frozen = false;
        self.comparing = self.epoch;
        self.epoch_start_us = self.now_us;
        let early = self.early_caught_up.take() == Some(self.comparing);
        self.caught_up_us = early.then_some(self.now_us);
        self.replay_production();
        for (epoch, said) in std::mem::take(&mut self.early) {
            if epoch == self.comparing {
                self.compare(said);
            }
        }
        if self.held.len() >= self.limits.max_held_frames {
            self.request(Class::HoldFull);
        }
    }

    /// What was not put in a flow yet raises its base, too.
    fn note_covered(&mut self, epoch: u64) {
        for held in self.held.iter().filter(|held| held.epoch <= epoch) {
            let flow = &mut self.flows[held.message.flow];
            if let Contents::Stream(stream) = &mut flow.contents
                && (self.frozen || held.epoch > self.comparing)
            {
                stream.produced(&held.message);
            }
        }
    }

    /// What the SVM said counts no more; for what the PVM said a commit stands.
    fn forget_svm(&mut self) {
        for flow in &mut self.flows {
            match &mut flow.contents {
                Contents::Stream(stream) => stream.rebase(),
                Contents::Datagrams(datagrams) => datagrams.rebase(),
            }
        }
    }

    /// What the PVM sent since the cut begins to be compared, in its order: one after the other, as
    /// if it were sent now; the rest does not exist yet.
    fn replay_production(&mut self) {
        let is_waiting = |held: &Held| held.cleared.is_none();
        let later = self.held.iter().position(is_waiting);
        for held in self.held.split_off(later.unwrap_or(self.held.len())) {
            self.held.push(held);
            self.produced(self.held.len() - 1);
        }
    }

    pub fn abort(&mut self) {
        if self.cut.take().is_none() {
            return;
        }
        if self.flaw != Flaw::AbortIgnored {
            self.frozen = true;
            self.early.clear();
            self.forget_svm();
        }
        self.request(Class::Aborted);
    }

    pub fn mute(&mut self) {
        self.settle();
        self.muted = true;
    }

    pub fn unmute(&mut self) {
        self.muted = false;
        self.leave_cleared();
        self.leave_pending();
    }

    pub fn go_alone(&mut self) {
        self.muted = false;
        self.leave_cleared();
        for held in self.held.drain(..) {
            self.outcome.released.push((held.id, Right::Alone));
        }
    }

    fn leave_cleared(&mut self) {
        if self.muted {
            return;
        }
        for held in std::mem::take(&mut self.held) {
            match held.cleared {
                Some(right) => self.outcome.released.push((held.id, right)),
                None => self.held.push(held),
            }
        }
    }

    fn leave_pending(&mut self) {
        if !self.muted
            && let Some(epoch) = self.pending_cleared.take()
        {
            self.outcome.pending_released = Some(epoch);
        }
    }

    /// The next frame of a flow in the epoch that is compared.
    pub(crate) fn head(&self, flow: usize) -> Option<usize> {
        let is_next = |held: &Held| held.message.flow == flow && held.cleared.is_none();
        let head = self.held.iter().position(is_next)?;
        (self.held[head].epoch == self.comparing).then_some(head)
    }

    /// Lets everything leave that may.
    fn settle(&mut self) {
        if self.muted || self.frozen {
            return;
        }
        for flow in 0..self.flows.len() {
            while self.settle_one(flow) {}
        }
    }

    /// Whether the flow's next frame has left.
    fn settle_one(&mut self, flow: usize) -> bool {
        let Some(head) = self.head(flow) else {
            return false;
        };
        let Some(verdict) = self.judge(flow, head) else {
            return false;
        };
        let right = match (self.policy(flow), verdict) {
            (_, Verdict::Wait) => return false,
            (_, Verdict::Differs(class)) => {
                self.diverge(flow, class);
                return false;
            }
            (PolicyAction::Release, _) => Right::Policy,
            (_, Verdict::Matched) => Right::Match,
            (_, Verdict::Free) => Right::Free,
        };
        if self.waits_for_input_ack(head) || (right != Right::Match && self.waits_for_lease()) {
            return false;
        }
        let held = self.held.remove(head);
        self.outcome.released.push((held.id, right));
        let notes = &mut self.outcome.notes;
        match &mut self.flows[flow].contents {
            Contents::Stream(stream) => stream.left(&held.message, notes),
            Contents::Datagrams(datagrams) => datagrams.left(&held.message, notes),
        }
        true
    }

    pub(crate) fn waits_for_input_ack(&self, head: usize) -> bool {
        self.held[head].stamp > self.input_ack && self.flaw != Flaw::NoAckRule
    }

    fn waits_for_lease(&self) -> bool {
        let is_fresh = self.lease_until_us.is_some_and(|us| self.now_us <= us);
        !is_fresh && self.flaw != Flaw::NoLease
    }

    /// What the contents allow; `None` once the flow waits for a commit.
    pub(crate) fn judge(&mut self, flow: usize, head: usize) -> Option<Verdict> {
        let policy = self.policy(flow);
        let waiting = self.held.iter().filter(|held| {
            held.message.flow == flow && held.epoch == self.comparing && held.cleared.is_none()
        });
        let waiting = waiting.count();
        let state = &mut self.flows[flow];
        if state.has_diverged {
            return None;
        }
        let message = &self.held[head].message;
        Some(match (policy, &mut state.contents) {
            (PolicyAction::Release, _) => Verdict::Free,
            (PolicyAction::Hold, _) => Verdict::Wait,
            (_, Contents::Stream(stream)) => {
                let verdict = stream.judge(message, policy, &mut self.outcome.notes);
                state.is_open |= stream.is_open;
                verdict
            }
            (_, Contents::Datagrams(datagrams)) => datagrams.judge(message, waiting, policy),
        })
    }

    pub(crate) fn diverge(&mut self, flow: usize, class: Class) {
        if !std::mem::replace(&mut self.flows[flow].has_diverged, true) {
            self.outcome.divergences.push((flow, class));
            self.request(class);
        }
    }

    fn request(&mut self, class: Class) {
        let is_wanted = self.cut.is_none() && self.requested != Some(self.epoch);
        // The first of several reasons of one event counts, whichever that is.
        if is_wanted {
            self.outcome.requests.push(class);
        }
    }

    /// The event is over: a request that it made is the only one of its epoch.
    pub fn note_requested(&mut self) {
        self.requested = Some(self.epoch);
    }

    /// Rule 2: the guests opened one connection from different ports.
    fn check_tuple(&mut self, flow: usize) {
        let Some(twin) = self.flows[flow].plan.twin else {
            return;
        };
        let one_sided = |flow: &Flow| flow.pvm_sent != flow.svm_sent && flow.last_input == 0;
        let (a, b) = (&self.flows[flow], &self.flows[twin]);
        if one_sided(a) && one_sided(b) && a.pvm_sent != b.pvm_sent {
            let of_pvm = if a.pvm_sent { flow } else { twin };
            self.diverge(of_pvm, Class::OutboundTuple);
        }
    }
}
