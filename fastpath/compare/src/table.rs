//! The comparator's flows: a bounded table, what the PVM holds in each, and who waits for what.
//!
//! Invariants: a flow with held frames, unmatched SVM output or an undecided divergence is never
//! forgotten; within a flow frames leave in production order. Forgetting an idle flow only makes
//! the comparison stricter. A commit costs nothing per flow: it begins a new generation, and a flow
//! is brought up to date when it is next looked at.

mod entry;
mod held;

use crate::flat::{FlatTable, Hash, Slot};
use crate::flow::FlowKey;
use crate::frames::Frames;
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::list::NIL;
use crate::recent::{Recent, WireName};
use crate::wheel::{Timer, Timers, Wheel};

use entry::{Links, UNLINKED};

pub(crate) use entry::{Flow, Wait, seen};
pub(crate) use held::{Held, Produced};

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
    use crate::flow::Protocol;
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
