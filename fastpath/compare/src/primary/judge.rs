//! Judging held frames: what leaves now, what waits for what, and until when.

use super::{Cleared, PrimaryPath};
use crate::action::{Action, Right};
use crate::cause::{Cause, Divergence};
use crate::datagram::surplus_is_harmless;
use crate::flow::{FlowKey, Protocol};
use crate::frames::Frames;
use crate::table::{Body, Flow, FlowId, Held, Wait};
use crate::tcp::Content;
use crate::wire::tcp::{ACK, SYN};

/// Most flows that are watched for another port on the other side (rule 2).
const MAX_OPENERS: usize = 64;

impl PrimaryPath {
    /// Lets everything leave that may, in one flow.
    pub(super) fn pump<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, id: FlowId) {
        while !self.muted && !self.frozen {
            let Some((content, stamp)) = self.judge_head(id, frames) else {
                break;
            };
            let wait = match content {
                Content::Differs(divergence) => {
                    self.ledger.stats.compared += 1;
                    self.diverge(id, divergence);
                    break;
                }
                Content::Wait => Some(Wait::Peer),
                Content::Matched | Content::Free if stamp > self.input_ack => Some(Wait::InputAck),
                Content::Free if !self.lease_is_fresh(now_us) => Some(Wait::Lease),
                Content::Matched | Content::Free => None,
            };
            if let Some(wait) = wait {
                if let Some(flow) = self.table.get_mut(id) {
                    flow.wait = wait;
                }
                break;
            }
            let right = if content == Content::Matched {
                Right::Match
            } else {
                Right::Free
            };
            self.release_head(now_us, frames, id, right);
        }
        self.refresh_active(id);
    }

    pub(super) fn pump_active<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        let mut next = self.active.first().copied();
        while let Some(id) = next {
            self.pump(now_us, frames, id);
            next = self.active.range(id + 1..).next().copied();
        }
    }

    fn refresh_active(&mut self, id: FlowId) {
        if self.table.get(id).is_some_and(Flow::is_active) {
            self.active.insert(id);
        } else {
            self.active.remove(&id);
        }
    }

    /// What the flow's next frame's contents allow, and which input must be acknowledged first.
    fn judge_head<F: Frames + ?Sized>(
        &mut self,
        id: FlowId,
        frames: &mut F,
    ) -> Option<(Content, u64)> {
        let flow = self.table.get_mut(id)?;
        if flow.wait == Wait::Commit {
            return None;
        }
        let held = flow.held.len();
        let head = flow.held.front_mut()?;
        let content = match (&mut flow.body, head.packet.tcp) {
            _ if self.limits.canary_equal => Content::Matched,
            (Body::Tcp(stream), Some(tcp)) => stream.judge(head, &tcp, &mut self.ledger, frames),
            (Body::Datagram(datagrams), _) => {
                datagrams.judge(head, held, self.limits.reorder_window, frames)
            }
            (Body::Tcp(_), None) => Content::Wait,
        };
        Some((content, head.stamp))
    }

    fn release_head<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        id: FlowId,
        right: Right,
    ) {
        let Some(flow) = self.table.get_mut(id) else {
            return;
        };
        let Some(head) = flow.held.pop_front() else {
            return;
        };
        flow.wait = Wait::Peer;
        self.ledger.stats.compared += u64::from(right == Right::Match);
        let Held {
            id: place,
            packet,
            at_us,
            ..
        } = head;
        // The report to the secondary must follow the release: released, not merely judged.
        let before = self.ledger.actions.len();
        match (&mut flow.body, packet.tcp) {
            (Body::Tcp(stream), Some(tcp)) => {
                stream.left(&head, &tcp, &self.limits, &mut self.ledger, frames);
            }
            (Body::Datagram(datagrams), _) => {
                datagrams.left(&head, self.limits.reorder_window, &mut self.ledger, frames);
            }
            (Body::Tcp(_), None) => {}
        }
        let reports = self.ledger.actions.split_off(before);
        let token = head.token;
        self.leave(
            now_us,
            frames,
            Cleared::Frame {
                id: place,
                token,
                packet,
                at_us,
                right,
            },
        );
        self.ledger.actions.extend(reports);
    }

    /// The gate that every frame passes: translates it to client space, or keeps it while mute.
    pub(super) fn leave<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        cleared: Cleared,
    ) {
        if self.muted {
            self.cleared.push_back(cleared);
            return;
        }
        let action = match cleared {
            Cleared::Pending { epoch } => Action::PendingReleased { epoch },
            Cleared::Frame {
                token,
                mut packet,
                at_us,
                right,
                ..
            } => {
                let header = frames.header_mut(&token);
                let stripped = self.client.outbound(now_us, header, &mut packet);
                self.ledger.stats.stripped += u64::from(stripped);
                self.held_frames -= 1;
                self.count(right, packet.tcp.is_none_or(|tcp| tcp.payload_len > 0));
                Action::Release {
                    token,
                    right,
                    held_us: now_us.saturating_sub(at_us),
                }
            }
        };
        self.ledger.actions.push_back(action);
    }

    fn count(&mut self, right: Right, data: bool) {
        let stats = &mut self.ledger.stats;
        match right {
            Right::Match => {
                stats.released_by_match += 1;
                stats.released_data_by_match += u64::from(data);
            }
            Right::Checkpoint => {
                stats.released_by_checkpoint += 1;
                stats.released_data_by_checkpoint += u64::from(data);
            }
            Right::Free => stats.released_free += 1,
            Right::Alone => stats.released_alone += 1,
        }
    }

    /// The flow's output waits for a commit from now on.
    pub(super) fn diverge(&mut self, id: FlowId, divergence: Divergence) {
        let Some(flow) = self.table.get_mut(id) else {
            return;
        };
        if flow.wait != Wait::Commit {
            flow.wait = Wait::Commit;
            self.ledger.stats.divergences[divergence.cause.index()] += 1;
            self.request(divergence);
        }
        self.refresh_active(id);
    }

    pub(super) fn hold_until_commit<F: Frames + ?Sized>(&mut self, frames: &mut F, key: FlowKey) {
        let divergence = Divergence::plain(Cause::Translation, Some(key));
        match self.table.place(key, &mut self.ledger, frames) {
            Some(id) => self.diverge(id, divergence),
            None => self.request(divergence),
        }
    }

    /// Asks for a checkpoint, once per epoch; while one is in flight, what it does not cover is
    /// judged after its commit (rule 14).
    pub(super) fn request(&mut self, divergence: Divergence) {
        let wanted = self.paired && self.cut.is_none() && self.requested != Some(self.epoch);
        if wanted {
            self.requested = Some(self.epoch);
            self.ledger.stats.requests[divergence.cause.index()] += 1;
            self.ledger
                .actions
                .push_back(Action::Checkpoint(divergence));
        }
    }

    /// Rule 2: a flow that the guest opened and that has output on one side only, while the other
    /// side opened one to the same peer from another port.
    pub(super) fn check_openers(&mut self, id: FlowId) {
        let Some(flow) = self.table.get(id) else {
            return;
        };
        let (key, pvm_sent) = (flow.key, flow.pvm_sent);
        let outbound = match key.protocol() {
            Protocol::Tcp => flow.held.front().is_none_or(|head| {
                head.packet
                    .tcp
                    .is_some_and(|tcp| tcp.flags & (SYN | ACK) == SYN)
            }),
            Protocol::Udp => true,
            _ => false,
        };
        if !outbound || flow.last_input_seq != 0 || flow.pvm_sent == flow.svm_sent {
            return;
        }
        let other = self.openers.iter().find(|other| {
            let Some(flow) = self.table.find(other) else {
                return false;
            };
            let one_sided = flow.pvm_sent != flow.svm_sent && flow.pvm_sent != pvm_sent;
            one_sided && key.differs_in_guest_port_only(other)
        });
        if let Some(other) = other.copied() {
            let divergence = Divergence::plain(Cause::OutboundTuple, Some(key));
            // The PVM's flow is the one whose output must wait.
            let held = if pvm_sent {
                Some(id)
            } else {
                self.table.id_of(&other)
            };
            if let Some(held) = held {
                self.diverge(held, divergence);
            }
        } else if self.openers.len() < MAX_OPENERS && !self.openers.contains(&key) {
            self.openers.push(key);
        }
    }

    fn time_runs(&self) -> bool {
        self.paired && self.cut.is_none() && !self.frozen && !self.muted
    }

    /// When [`PrimaryPath::handle_timeout`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        let always = [self.inherited.next_due_us(), self.announce_again.due_us()];
        let always = always.into_iter().flatten();
        if !self.time_runs() {
            return always.min();
        }
        let flows = self.active.iter().filter_map(|id| self.table.get(*id));
        let of_flows = flows.flat_map(|flow| [self.deadline(flow), self.surplus_deadline(flow)]);
        of_flows
            .flatten()
            .map(|(at_us, _)| at_us)
            .chain(always)
            .min()
    }

    /// Time has passed: frames that waited too long count as divergences.
    pub fn handle_timeout<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F) {
        if self.announce_again.is_due(now_us) {
            self.announce();
        }
        if !self.time_runs() {
            return;
        }
        let mut next = self.active.first().copied();
        while let Some(id) = next {
            self.time_out(now_us, frames, id);
            next = self.active.range(id + 1..).next().copied();
        }
    }

    fn time_out<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, id: FlowId) {
        let Some(flow) = self.table.get(id) else {
            return;
        };
        let due = |deadline: Option<(u64, Cause)>| {
            deadline
                .filter(|(at_us, _)| *at_us <= now_us)
                .map(|(_, cause)| cause)
        };
        let surplus = due(self.surplus_deadline(flow));
        if let Some(cause) = due(self.deadline(flow)) {
            let divergence = late_divergence(flow, cause, frames);
            self.diverge(id, divergence);
        } else if let Some(cause) = surplus {
            let key = flow.key;
            if let Some(Body::Datagram(datagrams)) = self.table.get_mut(id).map(|f| &mut f.body)
                && surplus_is_harmless(&key)
            {
                datagrams.drop_surplus(&mut self.ledger, frames);
                self.pump(now_us, frames, id);
            } else {
                self.diverge(id, Divergence::plain(cause, Some(key)));
            }
        }
    }

    /// Until when the flow's next frame may wait, and what it is then. Comparison deadlines start
    /// when the SVM has consumed its backlog (rule 9).
    fn deadline(&self, flow: &Flow) -> Option<(u64, Cause)> {
        let head = flow.held.front()?;
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
            (Wait::Peer, None) => {
                let from_us = head.at_us.max(self.epoch_start_us);
                Some((from_us + limits.lag_deadline_us, Cause::Lag))
            }
            (Wait::Peer, Some(caught_up_us)) => {
                let from_us = head.at_us.max(caught_up_us);
                let late = (from_us + limits.compare_deadline_us, Cause::Deadline);
                // Both have sent something, and it differs.
                let other_us = match flow.body {
                    Body::Datagram(_) => flow.body.surplus_since_us(),
                    Body::Tcp(_) => None,
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

    fn surplus_deadline(&self, flow: &Flow) -> Option<(u64, Cause)> {
        if flow.wait == Wait::Commit {
            return None;
        }
        let since_us = flow.body.surplus_since_us()?.max(self.caught_up_us?);
        let cause = match flow.body {
            Body::Tcp(_) => Cause::Flags,
            Body::Datagram(_) => Cause::Extra,
        };
        Some((since_us + self.limits.extra_deadline_us, cause))
    }
}

fn late_divergence<F: Frames + ?Sized>(flow: &Flow, cause: Cause, frames: &F) -> Divergence {
    match (&flow.body, flow.held.front(), cause) {
        (Body::Datagram(datagrams), Some(head), Cause::Payload) => {
            datagrams.difference_from_first(head, frames)
        }
        (_, _, Cause::Deadline) if flow.key.protocol() == Protocol::Unparseable => {
            Divergence::plain(Cause::Unparseable, Some(flow.key))
        }
        _ => Divergence::plain(cause, Some(flow.key)),
    }
}
