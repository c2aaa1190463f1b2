//! The pair translation: the SVM's numbers relative to the PVM's, learnt from handshakes (rule 2).
//!
//! Invariants: it is dropped at each commit, because then both guests are the same; a connection
//! that is not here has the same numbers on both sides.

use alloc::collections::BTreeMap;

use crate::flow::FlowKey;
use crate::seq;
use crate::wire::tcp::{ACK, SYN, Tcp};
use crate::xlate::{ClientTable, Entry, Handshake, Offsets};

/// What is known of one connection since the last commit.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pair {
    pub(super) offsets: Offsets,
    /// Present until the offsets are learnt.
    handshake: Option<Handshake>,
    /// The SVM opened or accepted it after the last commit.
    fresh: bool,
    svm_isn: Option<u32>,
    peer_isn: Option<u32>,
    /// What the SVM has acknowledged to the peer.
    svm_ack: Option<u32>,
    /// Highest TSecr from the client, in the PVM's space: what the PVM has sent at least.
    tsecr_high: Option<u32>,
}

/// The connections of this epoch.
#[derive(Debug, Default)]
pub(super) struct PairTable {
    pairs: BTreeMap<FlowKey, Pair>,
}

impl PairTable {
    pub(super) fn clear(&mut self) {
        self.pairs.clear();
    }

    /// Whether `key` has a place, or gets one. What can be learnt again at any time makes room.
    pub(super) fn has_room(&mut self, key: &FlowKey, limit: usize) -> bool {
        if self.pairs.len() < limit || self.pairs.contains_key(key) {
            return true;
        }
        self.pairs.retain(|_, pair| pair.fresh);
        self.pairs.len() < limit
    }

    pub(super) fn offsets(&self, key: &FlowKey) -> Offsets {
        self.pairs
            .get(key)
            .map_or(Offsets::default(), |pair| pair.offsets)
    }

    /// Takes note of a segment for the SVM, still in the PVM's space. True when that completed the
    /// translation.
    pub(super) fn input(&mut self, key: FlowKey, header: &[u8], tcp: &Tcp) -> bool {
        let pair = self.pairs.entry(key).or_default();
        if !tcp.has(ACK) {
            if tcp.has(SYN) {
                pair.peer_isn = Some(tcp.seq);
            }
            return false;
        }
        let learnt = pair
            .handshake
            .and_then(|handshake| handshake.learn(header, tcp));
        if let Some(offsets) = learnt {
            pair.offsets = offsets;
            pair.handshake = None;
        }
        if let Some((_, tsecr)) = tcp.timestamps(header) {
            pair.tsecr_high = Some(seq::max_known(tsecr, pair.tsecr_high));
        }
        learnt.is_some()
    }

    /// Takes note of the SVM's acknowledgement.
    pub(super) fn svm_ack(&mut self, key: &FlowKey, ack: u32) {
        if let Some(pair) = self.pairs.get_mut(key) {
            pair.svm_ack = Some(seq::max_known(ack, pair.svm_ack));
        }
    }

    /// Whether the SVM has acknowledged everything below `end` already.
    pub(super) fn is_acknowledged(&self, key: &FlowKey, end: u32) -> bool {
        let ack = self.pairs.get(key).and_then(|pair| pair.svm_ack);
        ack.is_some_and(|ack| seq::le(end, ack))
    }

    /// Takes note of the SVM's SYN or SYN-ACK. True when it begins a new connection.
    pub(super) fn svm_syn(&mut self, key: FlowKey, header: &[u8], tcp: &Tcp) -> bool {
        let pair = self.pairs.entry(key).or_default();
        if pair.svm_isn == Some(tcp.seq) {
            return false;
        }
        let peer_isn = pair.peer_isn.filter(|_| tcp.has(ACK));
        let guest_ts = tcp.timestamps(header).map(|(tsval, _)| tsval);
        *pair = Pair {
            handshake: Some(Handshake {
                guest_isn: tcp.seq,
                guest_ts,
                peer_isn,
            }),
            fresh: true,
            svm_isn: Some(tcp.seq),
            peer_isn,
            ..Pair::default()
        };
        true
    }

    /// The client-facing table of the VM that the SVM becomes: the pair translation first, then
    /// the one that the PVM had (rules 1 and 3).
    pub(super) fn compose(
        self,
        mut client: ClientTable,
        now_us: u64,
        ts_slack: u32,
    ) -> ClientTable {
        for (key, pair) in self.pairs {
            let old = client.get(&key).copied();
            // A repeated SYN-ACK of a connection that is older than the commit is not a new one.
            let older =
                old.is_some_and(|old| old.guest_isn.is_some_and(|isn| pair.svm_isn == Some(isn)));
            let mut entry = if pair.fresh && !older {
                let has_ts = pair.tsecr_high.is_some();
                let slack = Offsets {
                    seq: 0,
                    ts: if has_ts { ts_slack } else { 0 },
                };
                Entry {
                    offsets: pair.offsets.then(slack),
                    guest_isn: pair.svm_isn,
                    handshake: pair.handshake,
                    ts_high: pair.tsecr_high,
                    ..Entry::default()
                }
            } else {
                let mut entry = old.unwrap_or_default();
                let floor = pair.tsecr_high.map(|ts| ts.wrapping_add(entry.offsets.ts));
                entry.ts_high = match (floor, entry.ts_high) {
                    (Some(floor), high) => Some(seq::max_known(floor, high)),
                    (None, high) => high,
                };
                entry
            };
            entry.used_us = now_us;
            if entry
                == (Entry {
                    used_us: now_us,
                    ..Entry::default()
                })
            {
                continue;
            }
            client.insert(key, entry);
        }
        client.shrink();
        client
    }
}
