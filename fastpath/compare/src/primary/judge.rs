//! Judging held frames: what leaves now, what waits for what, and until when.

use super::{MAX_OPENERS, PrimaryPath};
use crate::action::{Action, Right};
use crate::cause::{Cause, Divergence};
use crate::datagram::{Rules, surplus_is_harmless};
use crate::flow::{Direction, FlowKey, Protocol};
use crate::frames::Frames;
use crate::limits::Limits;
use crate::list::NIL;
use crate::policy::{Opener, PolicyAction};
use crate::stream::Content;
use crate::table::{CLEARED, Flow, FlowId, Held, Wait, seen};
use crate::wire::tcp::{ACK, SYN};
use crate::wire::{Layout, Packet};

impl PrimaryPath {
    /// Lets everything leave that may, in one flow.
    pub(super) fn pump<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, id: FlowId) {
        if !self.muted && !self.frozen {
            while self.release_next(now_us, frames, id) {}
        }
        self.rearm(now_us, id);
    }

    /// Judges the flow's next frame; gives whether it has left.
    #[inline]
    fn release_next<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        id: FlowId,
    ) -> bool {
        let Some(flow) = self.flows.get_mut(id) else {
            return false;
        };
        let at = flow.held.head;
        let Some(head) = self.held.get_mut(at) else {
            return false;
        };
        if flow.wait == Wait::Commit {
            return false;
        }
        let stamp = head.stamp;
        let policy = self.policy.action_of(flow.policy);
        let content = match (policy, head.packet.tcp) {
            _ if self.limits.canary_equal => Content::Matched,
            (PolicyAction::Release, _) => Content::Free,
            (PolicyAction::Hold, _) => Content::Wait,
            _ if may_acknowledge_elsewhere(&self.limits, &head.packet) => Content::Wait,
            (_, Some(tcp)) => {
                let ignored = policy.ignored();
                flow.judge_segment(head, &tcp, ignored, &mut self.ledger, frames)
            }
            (_, None) => {
                let rules = rules(&self.limits, policy);
                flow.judge_datagram(at, &mut self.held, rules, &mut self.ledger, frames)
            }
        };
        let wait = match content {
            Content::Matched if stamp <= self.input_ack => {
                self.ledger.stats.compared += 1;
                self.release_head(now_us, frames, id, Right::Match);
                return true;
            }
            Content::Free if stamp <= self.input_ack && self.lease_is_fresh(now_us) => {
                let right = match policy {
                    PolicyAction::Release => Right::Policy,
                    _ => Right::Free,
                };
                self.release_head(now_us, frames, id, right);
                return true;
            }
            Content::Differs(divergence) => {
                self.ledger.stats.compared += 1;
                self.diverge(id, divergence);
                return false;
            }
            Content::Wait if policy == PolicyAction::Hold => Wait::Policy,
            Content::Wait => Wait::Peer,
            Content::Fetch(at) => {
                self.ledger.fetch(at);
                Wait::Peer
            }
            Content::Matched | Content::Free if stamp > self.input_ack => Wait::InputAck,
            Content::Matched | Content::Free => Wait::Lease,
        };
        self.wait_for(id, wait);
        false
    }

    fn wait_for(&mut self, id: FlowId, wait: Wait) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.wait = wait;
        let is_waiting = matches!(wait, Wait::InputAck | Wait::Lease);
        if flow.is_waiting() != is_waiting {
            self.flows.set_waiting(id, is_waiting);
        }
    }

    /// The secondary has said something that many flows may wait for.
    pub(super) fn pump_waiting<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        let mut next = self.flows.first_waiting();
        while let Some(id) = next {
            next = self.flows.next_waiting(id);
            self.pump(now_us, frames, id);
        }
    }

    /// Looks at every flow that holds something.
    pub(super) fn pump_all<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        for at in 0..self.held.nodes() {
            let flow = self.held.get(at).map_or(NIL, |held| held.flow);
            if self.flows.get(flow).is_some_and(|f| f.held.head == at) {
                self.pump(now_us, frames, flow);
            }
        }
    }

    /// Deadlines have begun to run.
    pub(super) fn rearm_all(&mut self, now_us: u64) {
        for at in 0..self.held.nodes() {
            let flow = self.held.get(at).map_or(NIL, |held| held.flow);
            self.rearm(now_us, flow);
        }
        for at in 0..self.ledger.svm.nodes() {
            let flow = self.ledger.svm.get(at).map_or(NIL, |frame| frame.flow);
            self.rearm(now_us, flow);
        }
    }

    /// Arms the flow's timer, if time can bring something about there.
    #[inline]
    pub(super) fn rearm(&mut self, now_us: u64, id: FlowId) {
        let Some(flow) = self.flows.get(id).filter(|flow| flow.has_deadlines()) else {
            return;
        };
        let deadlines = [self.deadline(flow), self.surplus_deadline(flow)];
        let times = deadlines.into_iter().flatten().map(|(at_us, _)| at_us);
        if let Some(due_us) = times.min() {
            self.flows.arm(id, now_us, due_us);
        }
    }

    fn release_head<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        id: FlowId,
        right: Right,
    ) {
        let Some((key, flow)) = self.flows.named_mut(id) else {
            return;
        };
        let at = flow.held.head;
        let Some(head) = self.held.get_mut(at) else {
            return;
        };
        if right == Right::Match {
            flow.keep_bytes(head, &mut self.ledger, frames);
        }
        let (token, incarnation, at_us) = (head.token.take(), head.incarnation, head.at_us);
        let (tcp, fragment) = (head.packet.tcp, head.packet.fragment);
        if self.client.len() > 0 {
            let mut packet = Packet {
                key: *key,
                layout: head.packet,
            };
            let header = frames.header_mut(&token);
            let stripped = self.client.outbound(now_us, header, &mut packet);
            self.ledger.stats.stripped += u64::from(stripped);
            head.packet = packet.layout;
        }
        let is_data = head.packet.tcp.is_none_or(|tcp| tcp.payload_len > 0);
        self.held.discard(&mut flow.held, at);
        flow.wait = Wait::Peer;
        self.ledger.stats.count_release(right, is_data);
        self.ledger.act(Action::Release {
            token,
            right,
            held_us: now_us.saturating_sub(at_us),
        });
        // The report to the secondary must follow the release: released, not merely judged.
        match (tcp, fragment) {
            (Some(tcp), _) => {
                let history = self.limits.history_bytes();
                flow.segment_left(incarnation, &tcp, history, &mut self.ledger, frames);
            }
            (None, Some(fragment)) if flow.mark == NIL => {
                flow.fragment_left(fragment.id, &self.held, &mut self.ledger, frames);
            }
            (None, _) => flow.datagram_left(&mut self.ledger, frames),
        }
        if flow.is_waiting() {
            self.flows.set_waiting(id, false);
        }
    }

    /// The gate that every frame passes: translates it to client space, or keeps it while mute.
    pub(super) fn leave<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        mut frame: Held,
    ) {
        if self.muted {
            frame.flow = CLEARED;
            self.held.push_back(&mut self.cleared, frame);
            return;
        }
        let Held {
            token,
            packet: mut layout,
            at_us,
            right,
            ..
        } = frame;
        if self.client.len() > 0 {
            let mut packet = self.parse(frames, &token, Direction::FromGuest);
            let header = frames.header_mut(&token);
            let stripped = self.client.outbound(now_us, header, &mut packet);
            self.ledger.stats.stripped += u64::from(stripped);
            layout = packet.layout;
        }
        let is_data = layout.tcp.is_none_or(|tcp| tcp.payload_len > 0);
        self.ledger.stats.count_release(right, is_data);
        self.ledger.act(Action::Release {
            token,
            right,
            held_us: now_us.saturating_sub(at_us),
        });
    }

    /// The flow's output waits for a commit from now on.
    pub(super) fn diverge(&mut self, id: FlowId, divergence: Divergence) {
        let key = self.flows.key(id);
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        if flow.wait != Wait::Commit {
            flow.wait = Wait::Commit;
            if flow.is_waiting() {
                self.flows.set_waiting(id, false);
            }
            self.ledger.stats.divergences[divergence.cause.index()] += 1;
            self.request(Divergence {
                flow: divergence.flow.or(Some(key)),
                ..divergence
            });
        }
    }

    pub(super) fn hold_until_commit<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        key: FlowKey,
    ) {
        let divergence = Divergence::plain(Cause::Translation, Some(key));
        let hash = self.flows.hash(&key);
        let place = (hash, self.flows.id_of_hashed(hash, &key));
        match self.place_hashed(now_us, frames, place, (&key, Some(0)), Opener::Peer) {
            Some(id) => self.diverge(id, divergence),
            None => {
                // When there is a place again, its output must not take it before the commit.
                self.table_full = true;
                self.request(divergence);
            }
        }
    }

    /// Asks for a checkpoint, once per epoch; while one is in flight, what it does not cover is
    /// judged after its commit (rule 14).
    pub(super) fn request(&mut self, divergence: Divergence) {
        let wanted = self.paired && self.cut.is_none() && self.requested != Some(self.epoch);
        if wanted {
            self.requested = Some(self.epoch);
            self.ledger.stats.requests[divergence.cause.index()] += 1;
            self.ledger.act(Action::Checkpoint(divergence));
        }
    }

    /// Rule 2: a flow that the guest opened and that has output on one side only, while the other
    /// side opened one to the same peer from another port.
    pub(super) fn check_openers(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id) else {
            return;
        };
        if flow.last_input_seq != 0 || !flow.is_one_sided() {
            return;
        }
        let key = self.flows.key(id);
        let outbound = match key.protocol() {
            Protocol::Tcp => self.held.get(flow.held.head).is_none_or(|head| {
                let tcp = head.packet.tcp;
                tcp.is_some_and(|tcp| tcp.flags & (SYN | ACK) == SYN)
            }),
            Protocol::Udp => true,
            _ => false,
        };
        if !outbound {
            return;
        }
        let pvm_sent = flow.has_seen(seen::PVM);
        let other = self.openers.iter().find_map(|other| {
            let other_id = self.flows.id_of(other)?;
            let flow = self.flows.get(other_id)?;
            let is_other_side = flow.is_one_sided() && flow.has_seen(seen::PVM) != pvm_sent;
            (is_other_side && key.differs_in_guest_port_only(other)).then_some(other_id)
        });
        if let Some(other) = other {
            let divergence = Divergence::plain(Cause::OutboundTuple, Some(key));
            // The PVM's flow is the one whose output must wait.
            let held = if pvm_sent { id } else { other };
            self.diverge(held, divergence);
        } else if self.openers.len() < MAX_OPENERS && !self.openers.contains(&key) {
            self.openers.push(key);
        }
    }

    fn time_runs(&self) -> bool {
        self.paired && self.cut.is_none() && !self.frozen && !self.muted
    }

    /// When [`PrimaryPath::handle_timeout`] or [`PrimaryPath::poll_deliver`] may have something to do; never later than
    /// they have.
    pub fn next_deadline(&self) -> Option<u64> {
        let all = [self.inherited.next_due_us(), self.next_timeout()];
        all.into_iter().flatten().min()
    }

    /// The same of [`PrimaryPath::handle_timeout`] alone: for a shell that has no room for what there is to deliver.
    pub fn next_timeout(&self) -> Option<u64> {
        let of_flows = self.flows.next_due_us().filter(|_| self.time_runs());
        let all = [self.announce_again.due_us(), of_flows];
        all.into_iter().flatten().min()
    }

    /// Time has passed: frames that waited too long count as divergences.
    pub fn handle_timeout<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        if self.announce_again.is_due(now_us) {
            self.announce();
        }
        if !self.time_runs() {
            return;
        }
        self.flows.expire(now_us);
        while let Some(id) = self.flows.pop_expired() {
            self.time_out(now_us, frames, id);
        }
    }

    fn time_out<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, id: FlowId) {
        let Some(flow) = self.flows.get(id) else {
            return;
        };
        let key = self.flows.key(id);
        let due = |deadline: Option<(u64, Cause)>| {
            deadline
                .filter(|(at_us, _)| *at_us <= now_us)
                .map(|(_, cause)| cause)
        };
        let surplus = due(self.surplus_deadline(flow));
        if let Some(cause) = due(self.deadline(flow)) {
            let divergence = self.late_divergence(flow, &key, cause, frames);
            self.diverge(id, divergence);
        } else if let Some(cause) = surplus {
            if surplus_is_harmless(&key)
                && let Some(flow) = self.flows.get_mut(id)
            {
                flow.drop_surplus(&mut self.ledger, frames);
                self.pump(now_us, frames, id);
            } else {
                self.diverge(id, Divergence::plain(cause, Some(key)));
            }
        } else {
            self.rearm(now_us, id);
        }
    }

    /// Until when the flow's next frame may wait, and what it is then. Comparison deadlines start
    /// when the SVM has consumed its backlog (rule 9).
    fn deadline(&self, flow: &Flow) -> Option<(u64, Cause)> {
        let head = self.held.get(flow.held.head)?;
        let limits = &self.limits;
        match (flow.wait, self.caught_up_us) {
            (Wait::Commit, _) => None,
            // A link slower than the heartbeats allow for never gives a fresh lease; that must not hold an
            // acknowledgement for ever: after a long while a checkpoint lets it leave.
            (Wait::Lease, _) => {
                let from_us = head.at_us.max(self.epoch_start_us);
                Some((from_us + limits.lag_deadline_us, Cause::AckDeadline))
            }
            (Wait::InputAck, _) => {
                let from_us = head.at_us.max(self.epoch_start_us);
                Some((from_us + limits.ack_deadline_us, Cause::AckDeadline))
            }
            (Wait::Policy, _) => {
                let from_us = head.at_us.max(self.epoch_start_us);
                Some((from_us + limits.compare_deadline_us, Cause::Policy))
            }
            (Wait::Peer, None) => Some(self.peer_deadline(head.at_us)),
            (Wait::Peer, Some(caught_up_us)) => {
                let from_us = head.at_us.max(caught_up_us);
                let late = self.peer_deadline(head.at_us);
                // Both have sent something, and it differs.
                let other_us = match flow.is_tcp() {
                    true => None,
                    false => flow.comparable_since_us(&self.ledger.svm),
                };
                let settled = other_us
                    .map(|other_us| (from_us.max(other_us) + limits.settle_us, Cause::Payload));
                settled
                    .into_iter()
                    .chain([late])
                    .min_by_key(|(at_us, _)| *at_us)
            }
        }
    }

    /// Until when a frame may wait for the SVM's output.
    #[inline]
    pub(super) fn peer_deadline(&self, at_us: u64) -> (u64, Cause) {
        let limits = &self.limits;
        match self.caught_up_us {
            Some(caught_up_us) => {
                let from_us = at_us.max(caught_up_us);
                (from_us + limits.compare_deadline_us, Cause::Deadline)
            }
            None => {
                let from_us = at_us.max(self.epoch_start_us);
                (from_us + limits.lag_deadline_us, Cause::Lag)
            }
        }
    }

    /// Until when SVM output may have no counterpart.
    fn surplus_deadline(&self, flow: &Flow) -> Option<(u64, Cause)> {
        if flow.wait == Wait::Commit {
            return None;
        }
        let svm = &self.ledger.svm;
        let (since_us, wait_us, cause) = match flow.is_tcp() {
            // A SYN or a reset: one VM has a connection that the other has not.
            true => (
                flow.control_since_us(svm)?,
                self.limits.compare_deadline_us,
                Cause::Flags,
            ),
            false => (
                flow.surplus_since_us(svm)?,
                self.limits.extra_deadline_us,
                Cause::Extra,
            ),
        };
        Some((since_us.max(self.caught_up_us?) + wait_us, cause))
    }

    fn late_divergence<F: Frames + ?Sized>(
        &self,
        flow: &Flow,
        key: &FlowKey,
        cause: Cause,
        frames: &F,
    ) -> Divergence {
        let is_tcp = key.protocol() == Protocol::Tcp;
        match (self.held.get(flow.held.head), cause) {
            (Some(head), Cause::Payload) if !is_tcp => {
                let rules = rules(&self.limits, self.policy.action_of(flow.policy));
                flow.difference_from_first(head, rules, &self.ledger.svm, frames)
            }
            (_, Cause::Deadline) if key.protocol() == Protocol::Unparseable => {
                Divergence::plain(Cause::Unparseable, Some(*key))
            }
            (Some(head), _) => {
                // What nobody has sent yet is shown from its payload on.
                let tcp = head.packet.tcp.map(|tcp| tcp.payload_at);
                let at = usize::from(tcp.unwrap_or(head.packet.l4));
                let primary = (&head.token, head.packet.end, at);
                let plain = Divergence::plain(cause, Some(*key));
                plain.showing(frames, if is_tcp { 0 } else { at }, Some(primary), None)
            }
            (None, _) => Divergence::plain(cause, Some(*key)),
        }
    }
}

fn rules(limits: &Limits, policy: PolicyAction) -> Rules {
    Rules {
        window: limits.reorder_window.max(1),
        ignored: policy.ignored(),
    }
}

/// Whether it may acknowledge input of another shard, of which this one knows nothing (rule 5).
pub(super) fn may_acknowledge_elsewhere(limits: &Limits, packet: &Layout) -> bool {
    limits.crossing_frames > 0 && packet.is_fragment_of_tcp()
}
