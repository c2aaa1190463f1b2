//! The pair translation: the SVM's numbers relative to the PVM's, learnt from handshakes (rule 2).
//!
//! Invariants: it is dropped at each commit, because then both guests are the same; a connection
//! that is not here has the same numbers on both sides; only what can be learnt again at any time
//! makes room for others; nothing allocates after `new`.

use crate::flat::{FlatTable, Slot};
use crate::flow::FlowKey;
use crate::list::{Ends, NIL};
use crate::seq;
use crate::wire::tcp::{ACK, SYN, Tcp};
use crate::xlate::{ClientTable, Entry, Handshake, Offsets, latest_ts};

/// Which fields of a [`Pair`] mean something.
const HAS_SVM_ACK: u8 = 1;
const HAS_TSECR: u8 = 2;
const HAS_SVM_TS: u8 = 4;
const HAS_PEER_ISN: u8 = 8;

#[derive(Debug, Clone, Copy)]
enum Stage {
    /// Seen in this epoch, but not opened in it: both sides have the same numbers. The neighbours
    /// in the list of those that make room.
    Seen { prev: Slot, next: Slot },
    /// The SVM opened or accepted it after the last commit; the PVM's numbers are not known yet.
    Opening {
        svm_isn: u32,
        svm_ts: u32,
        peer_isn: u32,
    },
    /// The same, and they are known.
    Learnt { svm_isn: u32, offsets: Offsets },
}

/// What is known of one connection since the last commit.
#[derive(Debug, Clone, Copy)]
struct Pair {
    stage: Stage,
    /// What the SVM has acknowledged to the peer.
    svm_ack: u32,
    /// Highest TSecr from the client, in the PVM's space: what the PVM has sent at least.
    tsecr_high: u32,
    has: u8,
}

impl Pair {
    const SEEN: Self = Self {
        stage: Stage::Seen {
            prev: NIL,
            next: NIL,
        },
        svm_ack: 0,
        tsecr_high: 0,
        has: 0,
    };

    fn svm_isn(&self) -> Option<u32> {
        match self.stage {
            Stage::Seen { .. } => None,
            Stage::Opening { svm_isn, .. } | Stage::Learnt { svm_isn, .. } => Some(svm_isn),
        }
    }

    fn offsets(&self) -> Offsets {
        match self.stage {
            Stage::Learnt { offsets, .. } => offsets,
            _ => Offsets::default(),
        }
    }

    fn handshake(&self) -> Option<Handshake> {
        let Stage::Opening {
            svm_isn,
            svm_ts,
            peer_isn,
        } = self.stage
        else {
            return None;
        };
        Some(Handshake {
            guest_isn: svm_isn,
            guest_ts: self.when(HAS_SVM_TS, svm_ts),
            peer_isn: self.when(HAS_PEER_ISN, peer_isn),
        })
    }

    fn svm_ack(&self) -> Option<u32> {
        self.when(HAS_SVM_ACK, self.svm_ack)
    }

    fn tsecr_high(&self) -> Option<u32> {
        self.when(HAS_TSECR, self.tsecr_high)
    }

    fn when(&self, bit: u8, n: u32) -> Option<u32> {
        (self.has & bit != 0).then_some(n)
    }

    /// The client-facing entry of a connection that began in this epoch.
    fn entry(&self, ts_slack: u32) -> Entry {
        let entry = match self.handshake() {
            Some(handshake) => Entry::opening(handshake),
            None => {
                let ts = self.tsecr_high().map_or(0, |_| ts_slack);
                let offsets = self.offsets().then(Offsets { seq: 0, ts });
                Entry::new(offsets).with_guest_isn(self.svm_isn())
            }
        };
        entry.with_ts_high(self.tsecr_high())
    }
}

/// The connections of this epoch.
#[derive(Debug)]
pub(super) struct PairTable {
    pairs: FlatTable<Pair>,
    /// Those in [`Stage::Seen`], oldest first.
    seen: Ends,
}

impl PairTable {
    pub(super) fn new(limit: usize, seed: u64) -> Self {
        Self {
            pairs: FlatTable::new(limit, seed),
            seen: Ends::EMPTY,
        }
    }

    pub(super) fn clear(&mut self) {
        self.pairs.clear();
        self.seen = Ends::EMPTY;
    }

    /// The connection's place, made when there is none; `None` when only a commit can make room.
    pub(super) fn place(&mut self, key: FlowKey) -> Option<Slot> {
        let hash = self.pairs.hash(&key);
        if let Some(slot) = self.pairs.slot_of(hash, &key) {
            return Some(slot);
        }
        if self.pairs.is_full() {
            let oldest = self.seen.head;
            if oldest == NIL {
                return None;
            }
            self.unlink(oldest);
            self.pairs.remove(&self.pairs.key_at(oldest));
        }
        let slot = self.pairs.insert(hash, key, Pair::SEEN).ok()?;
        self.link(slot);
        Some(slot)
    }

    /// The place of a connection that is known.
    pub(super) fn find(&self, key: &FlowKey) -> Option<Slot> {
        self.pairs.slot_of(self.pairs.hash(key), key)
    }

    fn link(&mut self, slot: Slot) {
        let prev = core::mem::replace(&mut self.seen.tail, slot);
        if let Some(pair) = self.pairs.at_mut(slot) {
            pair.stage = Stage::Seen { prev, next: NIL };
        }
        match self.pairs.at_mut(prev).map(|pair| &mut pair.stage) {
            Some(Stage::Seen { next, .. }) => *next = slot,
            _ => self.seen.head = slot,
        }
    }

    /// Takes a connection out of the list, when it is in it.
    fn unlink(&mut self, slot: Slot) {
        let Some(Stage::Seen { prev, next }) = self.pairs.at(slot).map(|pair| pair.stage) else {
            return;
        };
        match self.pairs.at_mut(prev).map(|pair| &mut pair.stage) {
            Some(Stage::Seen { next: of_prev, .. }) => *of_prev = next,
            _ => self.seen.head = next,
        }
        match self.pairs.at_mut(next).map(|pair| &mut pair.stage) {
            Some(Stage::Seen { prev: of_next, .. }) => *of_next = prev,
            _ => self.seen.tail = prev,
        }
    }

    pub(super) fn offsets(&self, slot: Slot) -> Offsets {
        self.pairs
            .at(slot)
            .map_or_else(Offsets::default, Pair::offsets)
    }

    pub(super) fn offsets_of(&self, key: &FlowKey) -> Offsets {
        self.pairs
            .get(key)
            .map_or_else(Offsets::default, Pair::offsets)
    }

    /// Takes note of a segment for the SVM, still in the PVM's space. True when that completed the
    /// translation.
    pub(super) fn input(&mut self, slot: Slot, header: &[u8], tcp: &Tcp) -> bool {
        let Some(pair) = self.pairs.at_mut(slot) else {
            return false;
        };
        if tcp.has(SYN) {
            // What the SVM has acknowledged may be the previous connection's.
            pair.has &= !HAS_SVM_ACK;
        }
        if !tcp.has(ACK) {
            return false;
        }
        let handshake = pair.handshake();
        let learnt = handshake.and_then(|handshake| handshake.learn(header, tcp));
        if let (Some(Handshake { guest_isn, .. }), Some(offsets)) = (handshake, learnt) {
            pair.stage = Stage::Learnt {
                svm_isn: guest_isn,
                offsets,
            };
        }
        if let Some((_, tsecr)) = tcp.timestamps(header) {
            pair.tsecr_high = latest_ts(tsecr, pair.tsecr_high());
            pair.has |= HAS_TSECR;
        }
        learnt.is_some()
    }

    /// Takes note of the SVM's acknowledgement.
    pub(super) fn svm_ack(&mut self, slot: Slot, ack: u32) {
        if let Some(pair) = self.pairs.at_mut(slot) {
            pair.svm_ack = seq::max_known(ack, pair.svm_ack());
            pair.has |= HAS_SVM_ACK;
        }
    }

    /// Whether the SVM has acknowledged everything below `end` already.
    pub(super) fn is_acknowledged(&self, slot: Slot, end: u32) -> bool {
        let ack = self.pairs.at(slot).and_then(Pair::svm_ack);
        ack.is_some_and(|ack| seq::le(end, ack))
    }

    /// Takes note of the SVM's SYN or SYN-ACK. True when it begins a new connection.
    pub(super) fn svm_syn(&mut self, slot: Slot, header: &[u8], tcp: &Tcp) -> bool {
        let is_known = |pair: &Pair| pair.svm_isn() == Some(tcp.seq);
        if let Some(pair) = self.pairs.at_mut(slot) {
            // It acknowledges the peer's SYN and nothing before: what is noted may be of the connection before, and
            // have come after the SYN. A guest may begin all connections with the same number.
            pair.has &= !HAS_SVM_ACK;
        }
        if self.pairs.at(slot).is_none_or(is_known) {
            return false;
        }
        self.unlink(slot);
        let svm_ts = tcp.timestamps(header).map(|(tsval, _)| tsval);
        let mut has = svm_ts.map_or(0, |_| HAS_SVM_TS);
        // A SYN-ACK acknowledges exactly the peer's SYN.
        has |= if tcp.has(ACK) { HAS_PEER_ISN } else { 0 };
        if let Some(pair) = self.pairs.at_mut(slot) {
            *pair = Pair {
                stage: Stage::Opening {
                    svm_isn: tcp.seq,
                    svm_ts: svm_ts.unwrap_or(0),
                    peer_isn: tcp.ack.wrapping_sub(1),
                },
                has,
                ..Pair::SEEN
            };
        }
        true
    }

    /// Makes of the client-facing table that the PVM had the one of the VM that the SVM becomes:
    /// the pair translation first, then the PVM's (rules 1 and 3). Where that is more than there
    /// is room for, connections that are over or silent in this epoch make room.
    pub(super) fn compose(&self, client: &mut ClientTable, now_us: u64, ts_slack: u32) {
        let may_go = |key: &FlowKey, entry: &Entry| entry.is_over() || self.find(key).is_none();
        for (key, pair) in self.pairs.iter() {
            let svm_isn = pair.svm_isn();
            match client.get_mut(key) {
                // A repeated SYN-ACK of a connection from before the commit is not a new one.
                Some(old) if svm_isn.is_none() || old.guest_isn() == svm_isn => {
                    old.seen_by_peer(now_us, pair.tsecr_high());
                }
                _ if svm_isn.is_some() => {
                    let entry = pair.entry(ts_slack).used_at(now_us);
                    client.insert_evicting(*key, entry, may_go);
                }
                _ => {}
            }
        }
        // Where the numbers are the same, only the floor of the timestamps is to be remembered.
        for (key, pair) in self
            .pairs
            .iter()
            .filter(|(_, pair)| pair.svm_isn().is_none())
        {
            if client.get(key).is_none() && pair.tsecr_high().is_some() {
                let mut entry = Entry::default();
                entry.seen_by_peer(now_us, pair.tsecr_high());
                client.insert(*key, entry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Direction, Protocol};
    use crate::testing::{Segment, Side};
    use crate::wire;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn key(port: u16) -> FlowKey {
        FlowKey::bare(Protocol::Tcp, [0; 2]).with_ports(80, port)
    }

    fn open(pairs: &mut PairTable, port: u16, isn: u32) {
        let bytes = Segment::new(Side::V4).flags(SYN | ACK).seq(isn).bytes();
        let tcp = wire::parse(&bytes, bytes.len(), Direction::FromGuest)
            .tcp
            .unwrap();
        let slot = pairs.place(key(port)).unwrap();
        pairs.svm_syn(slot, &bytes, &tcp);
    }

    fn input(pairs: &mut PairTable, port: u16, ack: u32, tsecr: u32) -> bool {
        let segment = Segment::new(Side::V4).to_guest().ack(ack);
        let bytes = segment.timestamps(1, tsecr).bytes();
        let tcp = wire::parse(&bytes, bytes.len(), Direction::ToGuest)
            .tcp
            .unwrap();
        let slot = pairs.place(key(port)).unwrap();
        pairs.input(slot, &bytes, &tcp)
    }

    #[test]
    fn an_idle_connection_takes_80_bytes_and_its_part_of_the_index() {
        assert_eq!(size_of::<Pair>(), 28);
        assert_eq!(FlatTable::<Pair>::ENTRY_BYTES, 80);
    }

    #[test]
    fn rule_1_a_full_table_of_translations_lets_go_of_silent_connections() {
        let mut client = ClientTable::new(3, 0);
        let offsets = Offsets { seq: 5, ts: 0 };
        for port in [1, 2, 3] {
            client.insert(key(port), Entry::new(offsets).with_guest_isn(Some(7)));
        }
        let mut pairs = PairTable::new(8, 0);
        // The second one speaks; two new ones begin, and a third finds no place.
        input(&mut pairs, 2, 1, 90);
        (4..7).for_each(|port| open(&mut pairs, port, 100));
        pairs.compose(&mut client, 0, 0);
        let mut ports: Vec<_> = client.entries().map(|(key, _)| key.peer_port()).collect();
        ports.sort_unstable();
        assert_eq!((ports, client.evicted()), (Vec::from([2, 4, 5]), 3));
        let kept = client.get(&key(2)).unwrap();
        assert_eq!((kept.offsets(), kept.ts_high()), (offsets, Some(90)));
    }

    #[test]
    fn rule_3_the_floor_of_timestamps_takes_no_translations_place() {
        let mut client = ClientTable::new(2, 0);
        client.insert(key(1), Entry::new(Offsets { seq: 5, ts: 0 }));
        let mut pairs = PairTable::new(8, 0);
        for port in [2, 3] {
            input(&mut pairs, port, 1, 90);
        }
        pairs.compose(&mut client, 0, 0);
        assert!(client.get(&key(1)).is_some());
        assert_eq!((client.len(), client.evicted()), (2, 0));
    }

    #[test]
    fn rule_3_a_floor_of_timestamps_that_the_clock_has_gone_round_is_forgotten() {
        const DAYS_25: u32 = (1 << 31) + 5;
        let mut client = ClientTable::new(3, 0);
        let ts = 7u32.wrapping_neg();
        let old = Entry::new(Offsets { seq: 5, ts }).with_ts_high(Some(90));
        client.insert(key(1), old);
        let mut pairs = PairTable::new(8, 0);
        for tsecr in [97, 97 + DAYS_25, 99 + DAYS_25, 98 + DAYS_25] {
            input(&mut pairs, 1, 1, tsecr);
        }
        pairs.compose(&mut client, 0, 0);
        let ts_high = client.get(&key(1)).and_then(Entry::ts_high);
        assert_eq!(ts_high, Some(92 + DAYS_25));
    }

    #[test]
    fn rule_5_what_the_svm_acknowledged_says_nothing_about_the_next_connection() {
        let mut pairs = PairTable::new(8, 0);
        let slot = pairs.place(key(1)).unwrap();
        pairs.svm_ack(slot, 1000);
        assert!(pairs.is_acknowledged(slot, 900) && !pairs.is_acknowledged(slot, 1001));
        assert!(pairs.is_acknowledged(slot, 900u32.wrapping_neg()));
        let syn = Segment::new(Side::V4).to_guest().flags(SYN).seq(500);
        let bytes = syn.bytes();
        let packet = wire::parse(&bytes, bytes.len(), Direction::ToGuest);
        pairs.input(slot, &bytes, &packet.tcp.unwrap());
        assert!(!pairs.is_acknowledged(slot, 900));
    }

    proptest! {
        /// Against a list that is searched from end to end.
        #[test]
        fn what_can_be_learnt_again_makes_room_oldest_first(
            steps in proptest::collection::vec((0u8..8, 0u16..12), 1..200),
        ) {
            const LIMIT: usize = 6;
            let mut pairs = PairTable::new(LIMIT, 3);
            let mut seen = Vec::<u16>::new();
            let mut opened = Vec::<u16>::new();
            for (step, port) in steps {
                let is_new = !seen.contains(&port) && !opened.contains(&port);
                match step {
                    0..=5 => {
                        if is_new && seen.len() + opened.len() == LIMIT && !seen.is_empty() {
                            seen.remove(0);
                        }
                        let has_room = !is_new || seen.len() + opened.len() < LIMIT;
                        prop_assert_eq!(pairs.place(key(port)).is_some(), has_room);
                        if is_new && has_room {
                            seen.push(port);
                        }
                    }
                    6 if seen.contains(&port) => {
                        open(&mut pairs, port, 1);
                        seen.retain(|other| *other != port);
                        opened.push(port);
                    }
                    7 if port == 0 => {
                        pairs.clear();
                        seen.clear();
                        opened.clear();
                    }
                    _ => {}
                }
                for port in 0..12 {
                    let is_known = seen.contains(&port) || opened.contains(&port);
                    prop_assert_eq!(pairs.find(&key(port)).is_some(), is_known);
                }
            }
        }
    }
}
