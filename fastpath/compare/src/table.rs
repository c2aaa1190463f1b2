//! The comparator's flows: what the PVM holds in each, and a bounded table of them.
//!
//! Invariants: a flow with held frames or unmatched SVM output is never evicted; within a flow
//! frames leave in production order. Forgetting an idle flow only makes the comparison stricter.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use crate::datagram::Datagrams;
use crate::flow::{FlowKey, Protocol};
use crate::frames::{Frames, Token};
use crate::ledger::Ledger;
use crate::tcp::Stream;
use crate::wire::Packet;

/// A PVM frame that has not left.
#[derive(Debug)]
pub(crate) struct Held {
    /// Place in the production order of the whole VM.
    pub(crate) id: u64,
    pub(crate) token: Token,
    pub(crate) packet: Packet,
    /// The input that must be acknowledged before it leaves (rule 5).
    pub(crate) stamp: u64,
    pub(crate) at_us: u64,
    /// TCP: which connection between these ports.
    pub(crate) incarnation: u32,
    /// TCP: below it the bytes have been found equal.
    pub(crate) matched_to: Option<u32>,
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
    /// The next commit: the flow has diverged.
    Commit,
}

#[derive(Debug)]
pub(crate) enum Body {
    Tcp(Stream),
    Datagram(Datagrams),
}

impl Body {
    pub(crate) fn has_unmatched_svm(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.has_unmatched_svm(),
            Self::Datagram(datagrams) => datagrams.has_unmatched_svm(),
        }
    }

    pub(crate) fn surplus_since_us(&self) -> Option<u64> {
        match self {
            Self::Tcp(stream) => stream.surplus_since_us(),
            Self::Datagram(datagrams) => datagrams.surplus_since_us(),
        }
    }

    pub(crate) fn rebase<F: Frames + ?Sized>(&mut self, ledger: &mut Ledger, frames: &mut F) {
        match self {
            Self::Tcp(stream) => stream.rebase(ledger, frames),
            Self::Datagram(datagrams) => datagrams.rebase(ledger, frames),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) key: FlowKey,
    pub(crate) held: VecDeque<Held>,
    pub(crate) wait: Wait,
    pub(crate) last_input_seq: u64,
    pub(crate) body: Body,
    /// Which sides have sent something in this epoch.
    pub(crate) pvm_sent: bool,
    pub(crate) svm_sent: bool,
    used: bool,
}

impl Flow {
    fn new(key: FlowKey) -> Self {
        let body = match key.protocol() {
            Protocol::Tcp => Body::Tcp(Stream::default()),
            _ => Body::Datagram(Datagrams::default()),
        };
        Self {
            key,
            held: VecDeque::new(),
            wait: Wait::Peer,
            last_input_seq: 0,
            body,
            pvm_sent: false,
            svm_sent: false,
            used: true,
        }
    }

    /// Whether time can bring something about here.
    pub(crate) fn is_active(&self) -> bool {
        !self.held.is_empty() || self.body.surplus_since_us().is_some()
    }
}

/// The place of a flow in the table.
pub(crate) type FlowId = u32;

#[derive(Debug, Default)]
pub(crate) struct Table {
    index: BTreeMap<FlowKey, FlowId>,
    slots: Vec<Option<Flow>>,
    free: Vec<FlowId>,
    hand: usize,
    limit: usize,
}

impl Table {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    pub(crate) fn find(&self, key: &FlowKey) -> Option<&Flow> {
        self.slots[*self.index.get(key)? as usize].as_ref()
    }

    pub(crate) fn id_of(&self, key: &FlowKey) -> Option<FlowId> {
        self.index.get(key).copied()
    }

    pub(crate) fn get(&self, id: FlowId) -> Option<&Flow> {
        self.slots.get(id as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        self.slots.get_mut(id as usize)?.as_mut()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Flow> {
        self.slots.iter_mut().flatten()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.slots.iter().flatten()
    }

    /// The flow's place, made when it is new; `None` when the table is full of flows that cannot
    /// be forgotten.
    pub(crate) fn place(
        &mut self,
        key: FlowKey,
        ledger: &mut Ledger,
        frames: &mut (impl Frames + ?Sized),
    ) -> Option<FlowId> {
        if let Some(id) = self.index.get(&key) {
            if let Some(flow) = self.slots[*id as usize].as_mut() {
                flow.used = true;
            }
            return Some(*id);
        }
        if self.index.len() >= self.limit {
            self.evict(ledger, frames)?;
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as FlowId
        });
        self.slots[id as usize] = Some(Flow::new(key));
        self.index.insert(key, id);
        Some(id)
    }

    /// Second-chance eviction of one idle flow.
    fn evict(&mut self, ledger: &mut Ledger, frames: &mut (impl Frames + ?Sized)) -> Option<()> {
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let Some(flow) = self.slots[self.hand].as_mut() else {
                continue;
            };
            let idle = flow.held.is_empty() && !flow.body.has_unmatched_svm();
            if idle && !core::mem::take(&mut flow.used) {
                flow.body.rebase(ledger, frames);
                self.index.remove(&flow.key);
                self.slots[self.hand] = None;
                self.free.push(self.hand as FlowId);
                ledger.stats.flows_evicted += 1;
                return Some(());
            }
        }
        None
    }
}
