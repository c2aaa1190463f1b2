//! The comparator's flows: a bounded table, what the PVM holds in each, and who waits for what.
//!
//! Invariants: a flow with held frames, unmatched SVM output or an undecided divergence is never
//! forgotten; within a flow frames leave in production order. Forgetting an idle flow only makes
//! the comparison stricter. A commit costs nothing per flow: it begins a new generation, and a flow
//! is brought up to date when it is next looked at.

use crate::action::Right;
use crate::flat::{FlatTable, Hash, Slot};
use crate::flow::{FlowKey, Protocol};
use crate::frames::{Frames, Token};
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::list::{Ends, NIL};
use crate::recent::{Recent, WireName};
use crate::stream::Stream;
use crate::wheel::{Timer, Timers, Wheel};
use crate::wire::{Layout, Packet};

/// Flows looked at for one that can be forgotten before the table counts as full.
const EVICTION_LOOKS: usize = 4096;
/// Flows looked at for expiry whenever a new one comes: all are looked at before the table is half
/// renewed, and packets of known flows pay nothing.
const EXPIRY_LOOKS: usize = 2;

/// The place of a flow in the table.
pub(crate) type FlowId = Slot;

/// Instead of a flow: the frame's epoch is not compared yet, or the table had no room.
pub(crate) const DEFERRED: FlowId = NIL;
/// Instead of a flow: the frame may leave when muteness ends.
pub(crate) const CLEARED: FlowId = NIL - 1;

/// A PVM frame that has not left.
#[derive(Debug)]
pub(crate) struct Held {
    /// Place in the production order of the whole VM.
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    pub(crate) token: Token,
    pub(crate) packet: Layout,
    /// The input that must be acknowledged before it leaves (rule 5).
    pub(crate) stamp: u64,
    pub(crate) at_us: u64,
    /// Its flow, [`DEFERRED`] or [`CLEARED`].
    pub(crate) flow: FlowId,
    /// TCP: which connection between these ports.
    pub(crate) incarnation: u32,
    /// TCP: its flow knows that the PVM has produced it.
    pub(crate) is_counted: bool,
    /// TCP: below it the bytes have been found equal.
    pub(crate) matched_to: Option<u32>,
    /// Why it may leave, when it only waits for the end of muteness.
    pub(crate) right: Right,
}

/// What is known of a PVM frame when it comes.
#[derive(Debug)]
pub(crate) struct Produced {
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    pub(crate) token: Token,
    pub(crate) stamp: u64,
    pub(crate) at_us: u64,
}

impl Produced {
    /// The frame before it has a flow.
    #[inline(always)]
    pub(crate) fn held(self, packet: &Packet) -> Held {
        Held {
            id: self.id,
            epoch: self.epoch,
            token: self.token,
            packet: packet.layout,
            stamp: self.stamp,
            at_us: self.at_us,
            flow: DEFERRED,
            incarnation: 0,
            is_counted: false,
            matched_to: None,
            right: Right::Alone,
        }
    }
}

impl Held {
    /// The frame before it had a flow.
    pub(crate) fn again(self) -> Produced {
        Produced {
            id: self.id,
            epoch: self.epoch,
            token: self.token,
            stamp: self.stamp,
            at_us: self.at_us,
        }
    }

    pub(crate) fn is_cleared(&self) -> bool {
        self.flow == CLEARED
    }
}

/// What the next frame of a flow waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Wait {
    /// Equal output of the SVM.
    #[default]
    Peer,
    /// The secondary's acknowledgement of input (rule 6).
    InputAck,
    /// A fresh heartbeat (rule 18).
    Lease,
    /// A checkpoint, because a policy says so.
    Policy,
    /// The next commit: the flow has diverged.
    Commit,
}

/// What happened in a flow, as bits.
pub(crate) mod seen {
    /// The PVM has sent something in this epoch.
    pub(crate) const PVM: u8 = 1;
    /// The SVM has sent something in this epoch.
    pub(crate) const SVM: u8 = 2;
    /// It was used since eviction last looked at it.
    pub(crate) const USE: u8 = 4;
    /// TCP: the guest has closed its side; TCP: the peer has.
    pub(crate) const GUEST_CLOSED: u8 = 8;
    pub(crate) const PEER_CLOSED: u8 = 16;
    /// It is a TCP flow.
    pub(crate) const TCP: u8 = 32;
    /// It is in the list of those that wait for the secondary's word.
    pub(crate) const WAITING: u8 = 64;
    /// Frames of both guests left by twos, and nothing else has looked at the flow since: it is at rest, and no
    /// output of the SVM is unmatched. TCP: all its numbers have come to the same place.
    pub(crate) const STEADY: u8 = 128;
}

/// Neighbours in the list of flows that wait for the secondary's word.
#[derive(Debug, Clone, Copy)]
struct Links {
    prev: u32,
    next: u32,
}

const UNLINKED: Links = Links {
    prev: NIL,
    next: NIL,
};

#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) last_input_seq: u64,
    generation: u32,
    /// What the PVM has produced and has not left, in that order.
    pub(crate) held: Ends,
    /// What the SVM has sent; for TCP sorted by place, history included.
    pub(crate) svm: Ends,
    /// TCP: SYNs and resets of the SVM that have not been matched.
    pub(crate) control: Ends,
    /// TCP: the first of `svm` that is not reported. Otherwise: the one that equals the next frame.
    pub(crate) mark: u32,
    pub(crate) stream: Stream,
    pub(crate) used_s: u32,
    timer: Timer,
    waiting: Links,
    pub(crate) wait: Wait,
    pub(crate) seen: u8,
    pub(crate) policy: u16,
}

impl Flow {
    fn new(generation: u32, protocol: Protocol, policy: u16) -> Self {
        let tcp = if protocol == Protocol::Tcp {
            seen::TCP
        } else {
            0
        };
        Self {
            last_input_seq: 0,
            generation,
            held: Ends::EMPTY,
            svm: Ends::EMPTY,
            control: Ends::EMPTY,
            mark: NIL,
            stream: Stream::default(),
            used_s: 0,
            timer: Timer::OFF,
            waiting: UNLINKED,
            wait: Wait::Peer,
            seen: seen::USE | tcp,
            policy,
        }
    }

    /// A frame has come; `what` says of whom.
    #[inline]
    pub(crate) fn use_now(&mut self, now_us: u64, what: u8) {
        self.seen |= seen::USE | what;
        self.used_s = (now_us / 1_000_000) as u32;
    }

    /// Both sides have sent another frame, by twos.
    #[inline(always)]
    pub(crate) fn use_again(&mut self, used_s: u32) {
        self.seen |= seen::USE;
        self.used_s = used_s;
    }

    pub(crate) fn has_seen(&self, what: u8) -> bool {
        self.seen & what == what
    }

    /// Whether exactly one side has sent something in this epoch.
    pub(crate) fn is_one_sided(&self) -> bool {
        self.has_seen(seen::PVM) != self.has_seen(seen::SVM)
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.has_seen(seen::TCP)
    }

    /// It is in the list of those that wait for the secondary's word.
    pub(crate) fn is_waiting(&self) -> bool {
        self.has_seen(seen::WAITING)
    }

    /// Both sides have sent something in this epoch, so neither has opened a connection of its own,
    /// and nothing of the PVM's is held.
    #[inline(always)]
    pub(crate) fn is_at_rest(&self) -> bool {
        let both = seen::PVM | seen::SVM;
        self.seen & (both | seen::WAITING) == both
            && self.held.is_empty()
            && self.wait == Wait::Peer
    }

    /// Whether time can bring something about.
    pub(crate) fn has_deadlines(&self) -> bool {
        let has_surplus = if self.is_tcp() {
            !self.control.is_empty()
        } else {
            !self.svm.is_empty()
        };
        !self.held.is_empty() || has_surplus
    }

    /// SVM output that has had no PVM counterpart.
    pub(crate) fn has_unmatched_svm(&self) -> bool {
        if self.is_tcp() {
            self.mark != NIL || !self.control.is_empty()
        } else {
            !self.svm.is_empty()
        }
    }

    /// A new epoch is compared: output of the old one is forgotten, a commit covers it (rule 8).
    fn renew(&mut self, generation: u32) {
        self.generation = generation;
        (self.held, self.svm, self.control) = (Ends::EMPTY, Ends::EMPTY, Ends::EMPTY);
        self.mark = NIL;
        self.timer = Timer::OFF;
        self.waiting = UNLINKED;
        self.wait = Wait::Peer;
        self.seen &= !(seen::PVM | seen::SVM | seen::WAITING | seen::STEADY);
        self.stream.rebase();
    }
}

/// The table, and the list of flows that wait for the secondary's word.
#[derive(Debug)]
pub(crate) struct Flows {
    table: FlatTable<Flow>,
    recent: Recent,
    wheel: Wheel,
    generation: u32,
    hand: usize,
    waiting: u32,
    idle_s: u32,
    time_wait_s: u32,
}

impl Flows {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            table: FlatTable::new(limits.max_flows, limits.hash_seed),
            recent: Recent::new(limits.hash_seed),
            wheel: Wheel::new(),
            generation: 0,
            hand: 0,
            waiting: NIL,
            idle_s: limits.flow_idle_s,
            time_wait_s: limits.time_wait_s,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    #[inline]
    pub(crate) fn hash(&self, key: &FlowKey) -> Hash {
        self.table.hash(key)
    }

    pub(crate) fn memory(&self) -> [(*const u8, usize); 2] {
        self.table.memory()
    }

    pub(crate) fn bucket_address(&self, hash: Hash) -> *const u8 {
        self.table.bucket_address(hash)
    }

    #[inline]
    pub(crate) fn entry_lines(&self, hash: Hash) -> impl Iterator<Item = *const u8> {
        self.table.entry_lines(hash)
    }

    pub(crate) fn key(&self, id: FlowId) -> FlowKey {
        self.table.key_at(id)
    }

    /// The flow, up to date; `None` when no such flow is known.
    #[inline]
    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        self.named_mut(id).map(|(_, flow)| flow)
    }

    /// The same with its name.
    #[inline]
    pub(crate) fn named_mut(&mut self, id: FlowId) -> Option<(&FlowKey, &mut Flow)> {
        let generation = self.generation;
        let (key, flow) = self.table.entry_mut(id)?;
        if flow.generation != generation {
            flow.renew(generation);
        }
        // Whoever asks may change it.
        flow.seen &= !seen::STEADY;
        Some((key, flow))
    }

    /// A flow that is found at the first look and to which something has happened since the last commit.
    #[inline(always)]
    pub(crate) fn present_mut(&mut self, key: &FlowKey) -> Option<(FlowId, &mut Flow)> {
        let (id, flow) = self.table.near_mut(self.table.hash(key), key)?;
        (flow.generation == self.generation).then_some((id, flow))
    }

    /// A steady flow, if it is among those that went by last.
    #[inline(always)]
    pub(crate) fn steady_mut(&mut self, name: &WireName) -> Option<(FlowId, &mut Flow)> {
        let id = self.recent.find(name)?;
        let flow = self.table.at_mut(id)?;
        let is_steady = flow.has_seen(seen::STEADY) && flow.generation == self.generation;
        is_steady.then_some((id, flow))
    }

    /// A steady flow has this name.
    #[inline]
    pub(crate) fn remember(&mut self, name: WireName, id: FlowId) {
        self.recent.remember(name, id);
    }

    /// A flow to which something has happened since the last commit, for what leaves it steady.
    #[inline(always)]
    pub(crate) fn history_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        let flow = self.table.at_mut(id)?;
        (flow.generation == self.generation).then_some(flow)
    }

    /// The flow, if something has happened to it since the last commit.
    #[inline]
    pub(crate) fn get(&self, id: FlowId) -> Option<&Flow> {
        let flow = self.table.at(id)?;
        (flow.generation == self.generation).then_some(flow)
    }

    pub(crate) fn id_of(&self, key: &FlowKey) -> Option<FlowId> {
        self.table.slot_of(self.table.hash(key), key)
    }

    /// A key's hash, and its flow where that is known.
    #[inline(always)]
    pub(crate) fn find(&self, key: &FlowKey) -> (Hash, Option<FlowId>) {
        let hash = self.table.hash(key);
        (hash, self.table.slot_of(hash, key))
    }

    #[inline]
    pub(crate) fn id_of_hashed(&self, hash: Hash, key: &FlowKey) -> Option<FlowId> {
        self.table.slot_of(hash, key)
    }

    #[inline]
    pub(crate) fn last_input_seq(&self, id: FlowId) -> Option<u64> {
        self.table.at(id).map(|flow| flow.last_input_seq)
    }

    /// A new flow; `None` when the table is full of flows that cannot be forgotten.
    pub(crate) fn insert<F: Frames + ?Sized>(
        &mut self,
        (hash, key): (Hash, FlowKey),
        policy: u16,
        now_us: u64,
        ledger: &mut Ledger,
        frames: &mut F,
    ) -> Option<FlowId> {
        let now_s = (now_us / 1_000_000) as u32;
        for _ in 0..EXPIRY_LOOKS {
            self.expire_next(now_s, ledger, frames);
        }
        if self.table.is_full() {
            self.evict(ledger, frames)?;
        }
        let flow = Flow::new(self.generation, key.protocol(), policy);
        self.table.insert(hash, key, flow).ok()
    }

    fn step_hand(&mut self) -> Option<FlowId> {
        self.hand = (self.hand + 1).checked_rem(self.table.slots())?;
        self.table.at(self.hand as FlowId)?;
        Some(self.hand as FlowId)
    }

    fn expire_next<F: Frames + ?Sized>(&mut self, now_s: u32, ledger: &mut Ledger, frames: &mut F) {
        let Some(id) = self.step_hand() else { return };
        let Some(flow) = self.table.at(id) else {
            return;
        };
        ledger.stats.flow_expiry_looks += 1;
        let has_closed = flow.has_seen(seen::GUEST_CLOSED | seen::PEER_CLOSED);
        let limit_s = if has_closed {
            self.time_wait_s
        } else {
            self.idle_s
        };
        if now_s.saturating_sub(flow.used_s) > limit_s && self.is_idle(id) {
            self.forget(id, ledger, frames);
            ledger.stats.flows_expired += 1;
        }
    }

    /// Second-chance eviction of one idle flow.
    fn evict<F: Frames + ?Sized>(&mut self, ledger: &mut Ledger, frames: &mut F) -> Option<()> {
        for _ in 0..EVICTION_LOOKS.min(2 * self.table.slots()) {
            let Some(id) = self.step_hand() else { continue };
            let Some(flow) = self.table.at_mut(id) else {
                continue;
            };
            let was_used = flow.has_seen(seen::USE);
            flow.seen &= !seen::USE;
            if !was_used && self.is_idle(id) {
                self.forget(id, ledger, frames);
                ledger.stats.flows_evicted += 1;
                return Some(());
            }
        }
        None
    }

    fn is_idle(&self, id: FlowId) -> bool {
        self.get(id).is_none_or(|flow| {
            flow.held.is_empty() && !flow.has_unmatched_svm() && flow.wait != Wait::Commit
        })
    }

    /// What is left of the SVM's output is history, which was reported.
    fn forget<F: Frames + ?Sized>(&mut self, id: FlowId, ledger: &mut Ledger, frames: &mut F) {
        let Some(mut ends) = self.get_mut(id).map(|flow| flow.svm) else {
            return;
        };
        while !ends.is_empty() {
            let first = ends.head;
            ledger.recycle_svm(&mut ends, first, frames);
        }
        self.wheel.disarm(&mut self.table, id);
        let key = self.key(id);
        self.recent.forget(&key);
        self.table.remove(&key);
    }

    /// The flow has to be looked at when it is `due_us`. Looking too early does no harm, so nothing
    /// is disarmed when a flow has no deadline any more: most flows have one again soon.
    #[inline]
    pub(crate) fn arm(&mut self, id: FlowId, now_us: u64, due_us: u64) {
        let Some(flow) = self.table.at(id) else {
            return;
        };
        if !self.wheel.covers(&flow.timer, due_us) {
            self.wheel.arm(&mut self.table, id, now_us, due_us);
        }
    }

    /// No flow is due before.
    pub(crate) fn next_due_us(&self) -> Option<u64> {
        self.wheel.next_due_us()
    }

    /// Finds the flows that may be due.
    pub(crate) fn expire(&mut self, now_us: u64) {
        self.wheel.expire(&mut self.table, now_us);
    }

    /// The next of them; it is no longer armed.
    pub(crate) fn pop_expired(&mut self) -> Option<FlowId> {
        self.wheel.pop_expired(&mut self.table)
    }

    /// A new epoch is compared; its caller has emptied all lists.
    pub(crate) fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.waiting = NIL;
        self.wheel.clear();
        if self.generation == 0 {
            // The numbers come again: what nobody has looked at since must not seem up to date.
            for id in 0..self.table.slots() as FlowId {
                if let Some(flow) = self.table.at_mut(id) {
                    flow.renew(0);
                }
            }
        }
    }

    /// Forgets all flows; its caller has emptied all lists.
    pub(crate) fn clear(&mut self) {
        self.table.clear();
        self.recent.clear();
        self.waiting = NIL;
        self.wheel.clear();
    }

    fn links(&mut self, id: u32) -> Option<&mut Links> {
        self.table.at_mut(id).map(|flow| &mut flow.waiting)
    }

    /// Puts a flow in the list of those that wait for the secondary's word, or takes it out.
    pub(crate) fn set_waiting(&mut self, id: FlowId, is_waiting: bool) {
        let head = self.waiting;
        let Some(flow) = self.table.at_mut(id) else {
            return;
        };
        if flow.is_waiting() == is_waiting {
            return;
        }
        flow.seen = (flow.seen ^ seen::WAITING) & !seen::STEADY;
        if is_waiting {
            flow.waiting = Links {
                prev: NIL,
                next: head,
            };
            self.waiting = id;
            if let Some(next) = self.links(head) {
                next.prev = id;
            }
            return;
        }
        let Links { prev, next } = core::mem::replace(&mut flow.waiting, UNLINKED);
        if let Some(next) = self.links(next) {
            next.prev = prev;
        }
        match self.links(prev) {
            Some(prev) => prev.next = next,
            None => self.waiting = next,
        }
    }

    pub(crate) fn first_waiting(&self) -> Option<FlowId> {
        (self.waiting != NIL).then_some(self.waiting)
    }

    pub(crate) fn next_waiting(&self, id: FlowId) -> Option<FlowId> {
        let next = self.table.at(id)?.waiting.next;
        (next != NIL).then_some(next)
    }
}

impl Timers for FlatTable<Flow> {
    fn timer(&mut self, id: u32) -> &mut Timer {
        match self.at_mut(id) {
            Some(flow) => &mut flow.timer,
            None => unreachable!("an armed flow is in the table"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::VecFrames;

    /// At 1000 commits a second, generations come again after 50 days.
    #[test]
    fn a_flow_that_nobody_looked_at_is_not_up_to_date_when_generations_come_again() {
        let limits = Limits::default();
        let (mut ledger, mut frames) = (Ledger::new(&limits), VecFrames::new(1));
        let mut flows = Flows::new(&limits);
        let key = FlowKey::bare(Protocol::Tcp, [0; 2]);
        let name = (flows.hash(&key), key);
        let id = flows.insert(name, 0, 0, &mut ledger, &mut frames).unwrap();
        flows.get_mut(id).unwrap().seen |= seen::PVM;
        flows.generation = u32::MAX;
        flows.next_generation();
        assert!(!flows.get(id).unwrap().has_seen(seen::PVM));
        flows.next_generation();
        assert!(flows.get(id).is_none());
    }

    #[test]
    fn an_idle_flow_takes_at_most_192_bytes() {
        // Two index buckets and a place in the list of free slots.
        let beside = 2 * 8 + 4;
        let entry = FlatTable::<Flow>::ENTRY_BYTES;
        assert!(entry + beside <= 192, "{entry} + {beside}");
    }
}
