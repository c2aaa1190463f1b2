//! Translations of TCP numbers between a guest and whoever it talks to (rules 1 to 3).
//!
//! Invariants: no entry means identity; a client-facing entry ends only with its connection;
//! TSval that goes to a client never goes below one that was sent before.
//!
//! The client-facing table lives here; the pair table, which a commit drops, is in `pair`.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::flow::FlowKey;
use crate::seq;
use crate::wire::tcp::{ACK, FIN, RST, SYN, Tcp};
use crate::wire::{Packet, strip_payload};

/// How long a closed connection's translation is kept for late segments.
const LINGER_US: u64 = 120_000_000;
/// How long an unfinished handshake may take.
const HANDSHAKE_US: u64 = 180_000_000;
/// How far behind its initial number the peer can be before it was acknowledged for the first time by
/// what this host knows (rule 4 keeps the rest on both): more than an unscaled window.
const FIRST_WINDOW: u32 = 1 << 18;
/// How far what was sent can be ahead of the guest's timestamp clock: its lag and the slack of takeovers.
const TS_LEAD_MAX: u32 = 1 << 21;
/// How often expiry looks at the table.
const EXPIRY_INTERVAL_US: u64 = 5_000_000;

/// What is added to a guest's numbers on the way out, and taken off on the way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offsets {
    /// Added to sequence numbers.
    pub seq: u32,
    /// Added to TSval.
    pub ts: u32,
}

impl Offsets {
    /// This translation followed by another one.
    pub const fn then(self, outer: Self) -> Self {
        Self {
            seq: self.seq.wrapping_add(outer.seq),
            ts: self.ts.wrapping_add(outer.ts),
        }
    }

    /// Translates a segment that the guest sent.
    pub fn outbound(self, header: &mut [u8], tcp: &mut Tcp) {
        if self.seq != 0 {
            tcp.set_seq(header, tcp.seq.wrapping_add(self.seq));
        }
        if self.ts != 0
            && let Some((tsval, _)) = tcp.timestamps(header)
        {
            tcp.set_tsval(header, tsval.wrapping_add(self.ts));
        }
    }

    /// Translates a segment for the guest: ACK, SACK blocks and TSecr.
    pub fn inbound(self, header: &mut [u8], tcp: &mut Tcp) {
        if !tcp.has(ACK) {
            return;
        }
        if self.seq != 0 {
            tcp.set_ack(header, tcp.ack.wrapping_sub(self.seq));
            tcp.move_sack_back(header, self.seq);
        }
        if self.ts != 0
            && let Some((_, tsecr)) = tcp.timestamps(header)
        {
            tcp.set_tsecr(header, tsecr.wrapping_sub(self.ts));
        }
    }
}

/// A handshake whose other initial sequence number is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshake {
    /// The guest's initial sequence number.
    pub guest_isn: u32,
    /// TSval of the guest's SYN or SYN-ACK.
    pub guest_ts: Option<u32>,
    /// The peer's initial sequence number, where the peer opened the connection.
    pub peer_isn: Option<u32>,
}

impl Handshake {
    /// Learns the offsets from the peer's first acknowledgement: it acknowledges exactly the SYN
    /// that it saw, because nothing else of this connection was released before it (rule 2).
    pub fn learn(&self, header: &[u8], tcp: &Tcp) -> Option<Offsets> {
        if !tcp.has(ACK) {
            return None;
        }
        // A late segment of the port pair's previous connection.
        let is_of_this = |isn: u32| {
            let near = seq::lt(isn, tcp.seq) && tcp.seq.wrapping_sub(isn) <= FIRST_WINDOW;
            near && self.guest_ts.is_some() == tcp.timestamps(header).is_some()
        };
        if self.peer_isn.is_some_and(|isn| !is_of_this(isn)) {
            return None;
        }
        let seq = tcp.ack.wrapping_sub(self.guest_isn.wrapping_add(1));
        let ts = match (tcp.timestamps(header), self.guest_ts) {
            // The same initial number is the guest's own SYN, perhaps an earlier copy of it.
            (Some((_, tsecr)), Some(guest_ts)) if seq != 0 => tsecr.wrapping_sub(guest_ts),
            _ => 0,
        };
        Some(Offsets { seq, ts })
    }
}

/// Whether a mark in TSval space can be of the connection that sends `tsval` now: a late segment of the port
/// pair's previous connection may have left it.
fn is_near(mark: u32, tsval: u32) -> bool {
    !seq::lt(tsval, mark) || mark.wrapping_sub(tsval) <= TS_LEAD_MAX
}

/// Which ends have closed.
const GUEST_CLOSED: u8 = 1;
const PEER_CLOSED: u8 = 2;

/// One connection's client-facing translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Entry {
    pub(crate) offsets: Offsets,
    /// Highest TSval sent, in client space.
    pub(crate) ts_high: Option<u32>,
    /// Initial sequence number of the guest, in its own space; another one is a new connection.
    pub(crate) guest_isn: Option<u32>,
    /// Present until the offsets are learnt.
    pub(crate) handshake: Option<Handshake>,
    pub(crate) closed: u8,
    pub(crate) used_us: u64,
}

impl Entry {
    fn note_closing(&mut self, tcp: &Tcp) {
        if tcp.has(RST) {
            self.closed = GUEST_CLOSED | PEER_CLOSED;
        } else if tcp.has(FIN) {
            self.closed |= GUEST_CLOSED;
        } else if tcp.payload_len > 0 && self.closed == GUEST_CLOSED | PEER_CLOSED {
            // A reset that the guest did not believe.
            self.closed = 0;
        }
    }

    fn expired(&self, now_us: u64) -> bool {
        let idle = now_us.saturating_sub(self.used_us);
        (self.closed == GUEST_CLOSED | PEER_CLOSED && idle > LINGER_US)
            || (self.handshake.is_some() && idle > HANDSHAKE_US)
    }
}

/// The client-facing translations of a VM.
#[derive(Debug)]
pub(crate) struct ClientTable {
    entries: BTreeMap<FlowKey, Entry>,
    limit: usize,
    evicted: u64,
    next_expiry_us: u64,
}

impl ClientTable {
    /// Room for `limit` connections.
    pub(crate) fn new(limit: usize, _seed: u64) -> Self {
        Self {
            entries: BTreeMap::new(),
            limit,
            evicted: 0,
            next_expiry_us: 0,
        }
    }

    /// How many connections the limit has cost.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }

    pub(crate) fn get(&self, key: &FlowKey) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (&FlowKey, &Entry)> {
        self.entries.iter()
    }

    pub(crate) fn insert(&mut self, key: FlowKey, entry: Entry) {
        self.entries.insert(key, entry);
    }

    /// Keeps to the limit by forgetting what was used longest ago.
    pub(crate) fn shrink(&mut self) {
        let limit = self.limit;
        if self.entries.len() <= limit {
            return;
        }
        let mut by_age: Vec<_> = self.entries.iter().map(|(k, e)| (e.used_us, *k)).collect();
        by_age.sort_unstable();
        let surplus = self.entries.len() - limit;
        for (_, key) in &by_age[..surplus] {
            self.entries.remove(key);
        }
        self.evicted += surplus as u64;
    }

    /// Forgets connections that ended long ago.
    pub(crate) fn expire(&mut self, now_us: u64) {
        if now_us >= self.next_expiry_us {
            self.next_expiry_us = now_us + EXPIRY_INTERVAL_US;
            self.entries.retain(|_, entry| !entry.expired(now_us));
        }
    }

    /// Translates a client's segment for the guest. True when it completed a handshake, so that
    /// the table changed.
    pub(crate) fn inbound(&mut self, now_us: u64, header: &mut [u8], packet: &mut Packet) -> bool {
        let Some(tcp) = packet.tcp.as_mut() else {
            return false;
        };
        let Some(entry) = self.entries.get_mut(&packet.key) else {
            return false;
        };
        entry.used_us = now_us;
        let mut learnt = false;
        if let Some(handshake) = entry.handshake
            && let Some(offsets) = handshake.learn(header, tcp)
        {
            entry.offsets = offsets;
            entry.handshake = None;
            learnt = true;
        }
        if tcp.flags & (FIN | RST) != 0 {
            entry.closed |= PEER_CLOSED;
        }
        if tcp.has(RST) {
            entry.closed |= GUEST_CLOSED;
        }
        entry.offsets.inbound(header, tcp);
        learnt
    }

    /// Translates a guest's segment for the client. True when it could not be translated: the
    /// handshake is not learnt yet, so the segment lost its payload and now only makes the client
    /// answer with an ACK, from which to learn; the guest sends the payload again.
    pub(crate) fn outbound(&mut self, now_us: u64, header: &mut [u8], packet: &mut Packet) -> bool {
        let Some(tcp) = packet.tcp.as_mut() else {
            return false;
        };
        let Some(entry) = self.entries.get_mut(&packet.key) else {
            return false;
        };
        if tcp.has(SYN) && entry.guest_isn != Some(tcp.seq) {
            // A new connection between the same ports: the old one has ended.
            self.entries.remove(&packet.key);
            return false;
        }
        entry.used_us = now_us;
        if entry.handshake.is_some() && tcp.flags & (SYN | RST) == 0 {
            strip_payload(header, packet);
            return true;
        }
        entry.note_closing(tcp);
        if entry.handshake.is_some() {
            // Its timestamps cannot be told from the client's space yet: they set no mark there.
            return false;
        }
        entry.offsets.outbound(header, tcp);
        let Some((tsval, _)) = tcp.timestamps(header) else {
            return false;
        };
        let sent = seq::max_known(tsval, entry.ts_high.filter(|high| is_near(*high, tsval)));
        if sent != tsval {
            tcp.set_tsval(header, sent);
        }
        entry.ts_high = Some(sent);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Direction;
    use crate::testing::{Segment, Side, checksums_are_right};
    use crate::wire;

    fn parse(bytes: &[u8], direction: Direction) -> (Packet, Tcp) {
        let packet = wire::parse(bytes, bytes.len(), direction);
        (packet, packet.tcp.expect("TCP"))
    }

    #[test]
    fn rule_3_sack_and_tsecr_are_translated_with_ack() {
        for side in [Side::V4, Side::V6] {
            let mut bytes = Segment::new(side)
                .to_guest()
                .ack(5000)
                .timestamps(77, 900)
                .sack(&[(6000, 7000), (8000, 9000)])
                .bytes();
            let (_, mut tcp) = parse(&bytes, Direction::ToGuest);
            Offsets { seq: 1000, ts: 100 }.inbound(&mut bytes, &mut tcp);
            assert!(checksums_are_right(&bytes));
            let (_, tcp) = parse(&bytes, Direction::ToGuest);
            assert_eq!(tcp.ack, 4000);
            assert_eq!(tcp.timestamps(&bytes), Some((77, 800)));
            assert!(tcp.sack_blocks(&bytes).eq([(5000, 6000), (7000, 8000)]));
        }
    }

    #[test]
    fn rule_3_tsval_never_goes_back() {
        let mut table = ClientTable::new(10, 0);
        let sent = |table: &mut ClientTable, tsval| {
            let mut bytes = Segment::new(Side::V6).seq(10).timestamps(tsval, 1).bytes();
            let (mut packet, _) = parse(&bytes, Direction::FromGuest);
            if table.len() == 0 {
                let offsets = Offsets {
                    seq: 5,
                    ts: u32::MAX,
                };
                table.insert(
                    packet.key,
                    Entry {
                        offsets,
                        ts_high: Some(100),
                        ..Entry::default()
                    },
                );
            }
            table.outbound(0, &mut bytes, &mut packet);
            assert!(checksums_are_right(&bytes));
            let (_, tcp) = parse(&bytes, Direction::FromGuest);
            assert_eq!(tcp.seq, 15);
            tcp.timestamps(&bytes).map(|(tsval, _)| tsval)
        };
        assert_eq!(sent(&mut table, 50), Some(100));
        assert_eq!(sent(&mut table, 151), Some(150));
        assert_eq!(sent(&mut table, 120), Some(150));
        let far = 151u32.wrapping_sub(TS_LEAD_MAX).wrapping_sub(1);
        assert_eq!(
            sent(&mut table, far),
            Some(far.wrapping_sub(1)),
            "another connection's mark"
        );
    }

    #[test]
    fn rule_2_nothing_is_learnt_from_the_previous_connection_between_the_same_ports() {
        let mut handshake = Handshake {
            guest_isn: 42,
            guest_ts: Some(7),
            peer_isn: Some(1000),
        };
        let learn = |handshake: &Handshake, seq: u32, with_ts: bool| {
            let segment = Segment::new(Side::V4).to_guest().seq(seq).ack(543);
            let segment = if with_ts {
                segment.timestamps(1, 9)
            } else {
                segment
            };
            let bytes = segment.bytes();
            let (_, tcp) = parse(&bytes, Direction::ToGuest);
            handshake.learn(&bytes, &tcp)
        };
        assert_eq!(
            learn(&handshake, 1001, true),
            Some(Offsets { seq: 500, ts: 2 })
        );
        assert!(learn(&handshake, 1001 + 60_000, true).is_some());
        assert_eq!(learn(&handshake, 1001 + FIRST_WINDOW, true), None);
        assert_eq!(learn(&handshake, 1000, true), None);
        assert_eq!(learn(&handshake, 1001, false), None);
        handshake.guest_ts = None;
        assert_eq!(
            learn(&handshake, 1001, false),
            Some(Offsets { seq: 500, ts: 0 })
        );
    }

    #[test]
    fn rule_3_a_repeated_syn_before_learning_sets_no_mark_in_the_clients_space() {
        let mut table = ClientTable::new(10, 0);
        let mut syn = Segment::new(Side::V4)
            .flags(SYN | ACK)
            .seq(42)
            .timestamps(900_000, 7)
            .bytes();
        let (mut packet, _) = parse(&syn, Direction::FromGuest);
        let handshake = Handshake {
            guest_isn: 42,
            guest_ts: Some(899_000),
            peer_isn: None,
        };
        let entry = Entry {
            guest_isn: Some(42),
            handshake: Some(handshake),
            ..Entry::default()
        };
        table.insert(packet.key, entry);
        table.outbound(0, &mut syn, &mut packet);
        let mut ack = Segment::new(Side::V4)
            .to_guest()
            .ack(1043)
            .timestamps(7, 500)
            .bytes();
        let (mut back, _) = parse(&ack, Direction::ToGuest);
        assert!(table.inbound(0, &mut ack, &mut back));
        let mut data = Segment::new(Side::V4)
            .seq(43)
            .timestamps(899_400, 7)
            .bytes();
        let (mut packet, _) = parse(&data, Direction::FromGuest);
        table.outbound(0, &mut data, &mut packet);
        let (_, tcp) = parse(&data, Direction::FromGuest);
        assert_eq!((tcp.seq, tcp.timestamps(&data)), (1043, Some((900, 7))));
    }

    #[test]
    fn rule_1_an_entry_ends_with_its_connection() {
        let mut table = ClientTable::new(10, 0);
        let mut syn = Segment::new(Side::V4).flags(SYN | ACK).seq(42).bytes();
        let (mut packet, _) = parse(&syn, Direction::FromGuest);
        let offsets = Offsets { seq: 9, ts: 0 };
        table.insert(
            packet.key,
            Entry {
                offsets,
                guest_isn: Some(42),
                ..Entry::default()
            },
        );
        table.outbound(0, &mut syn, &mut packet);
        let (_, tcp) = parse(&syn, Direction::FromGuest);
        assert_eq!(
            tcp.seq, 51,
            "a repeated SYN-ACK of the same connection is translated"
        );
        let mut syn = Segment::new(Side::V4).flags(SYN | ACK).seq(43).bytes();
        let (mut packet, _) = parse(&syn, Direction::FromGuest);
        table.outbound(0, &mut syn, &mut packet);
        let (_, tcp) = parse(&syn, Direction::FromGuest);
        assert_eq!(
            tcp.seq, 43,
            "another initial sequence number is another connection"
        );
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn closed_connections_and_dead_handshakes_expire() {
        let mut table = ClientTable::new(10, 0);
        let bytes = Segment::new(Side::V4).bytes();
        let (packet, _) = parse(&bytes, Direction::FromGuest);
        let closed = GUEST_CLOSED | PEER_CLOSED;
        table.insert(
            packet.key,
            Entry {
                closed,
                used_us: 10,
                ..Entry::default()
            },
        );
        table.expire(LINGER_US);
        assert_eq!(table.len(), 1);
        table.expire(LINGER_US + EXPIRY_INTERVAL_US + 11);
        assert_eq!(table.len(), 0);
    }
}
