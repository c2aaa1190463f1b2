//! The client-facing translations of a VM (rules 1 and 3).
//!
//! Invariants: an entry ends only with its connection, or when the table has no room; TSval that
//! goes to a client never goes below one that was sent before; nothing allocates after `new`, and
//! no call on the packet path looks at more than [`SWEEP_SLOTS`] other connections.

use super::{Handshake, Offsets};
use crate::flat::{FlatTable, Slot};
use crate::flow::FlowKey;
use crate::seq;
use crate::wire::tcp::{FIN, RST, SYN, Tcp};
use crate::wire::{Packet, Quoted, strip_payload};

/// How long a closed connection's translation is kept for late segments.
const LINGER_S: u32 = 120;
/// How long an unfinished handshake may take.
const HANDSHAKE_S: u32 = 180;
/// How far what was sent can be ahead of the guest's timestamp clock: its lag and the slack of
/// takeovers.
const TS_LEAD_MAX: u32 = 1 << 21;
/// How often expiry looks at the next entries, and at how many: 65,536 of them in two seconds.
const SWEEP_INTERVAL_US: u64 = 1000;
const SWEEP_SLOTS: usize = 32;

/// The later one of a timestamp and a mark. A mark that is far ahead does not count: a late segment of
/// the port pair's previous connection has left it, or the clock has gone on by half of its numbers
/// (25 days, in milliseconds) since.
pub(crate) fn latest_ts(ts: u32, mark: Option<u32>) -> u32 {
    let is_near = |mark: &u32| !seq::lt(ts, *mark) || mark.wrapping_sub(ts) <= TS_LEAD_MAX;
    seq::max_known(ts, mark.filter(is_near))
}

fn seconds(us: u64) -> u32 {
    (us / 1_000_000) as u32
}

/// Which fields of an [`Entry`] mean something; the others are 0.
const HAS_TS_HIGH: u8 = 1;
const HAS_GUEST_ISN: u8 = 2;
const IS_OPENING: u8 = 4;
const HAS_GUEST_TS: u8 = 8;
const HAS_PEER_ISN: u8 = 16;

/// One connection's client-facing translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Entry {
    offsets: Offsets,
    ts_high: u32,
    guest_isn: u32,
    guest_ts: u32,
    peer_isn: u32,
    used_s: u32,
    has: u8,
    guest_closed: bool,
    peer_closed: bool,
}

impl Entry {
    /// A connection whose offsets are known.
    pub(crate) fn new(offsets: Offsets) -> Self {
        Self {
            offsets,
            ..Self::default()
        }
    }

    /// A connection whose offsets are still to be learnt.
    pub(crate) fn opening(handshake: Handshake) -> Self {
        let mut entry = Self {
            has: IS_OPENING,
            ..Self::default()
        };
        let Handshake {
            guest_isn,
            guest_ts,
            peer_isn,
        } = handshake;
        entry.set(HAS_GUEST_ISN, Some(guest_isn));
        entry.set(HAS_GUEST_TS, guest_ts);
        entry.set(HAS_PEER_ISN, peer_isn);
        entry
    }

    fn set(&mut self, bit: u8, n: Option<u32>) {
        self.has = self.has & !bit | if n.is_some() { bit } else { 0 };
        let field = match bit {
            HAS_TS_HIGH => &mut self.ts_high,
            HAS_GUEST_ISN => &mut self.guest_isn,
            HAS_GUEST_TS => &mut self.guest_ts,
            _ => &mut self.peer_isn,
        };
        *field = n.unwrap_or(0);
    }

    const fn get(&self, bit: u8, n: u32) -> Option<u32> {
        if self.has & bit != 0 { Some(n) } else { None }
    }

    pub(crate) fn with_ts_high(mut self, ts_high: Option<u32>) -> Self {
        self.set(HAS_TS_HIGH, ts_high);
        self
    }

    pub(crate) fn with_guest_isn(mut self, guest_isn: Option<u32>) -> Self {
        self.set(HAS_GUEST_ISN, guest_isn);
        self
    }

    pub(crate) const fn with_closed(mut self, guest: bool, peer: bool) -> Self {
        (self.guest_closed, self.peer_closed) = (guest, peer);
        self
    }

    pub(crate) fn used_at(mut self, now_us: u64) -> Self {
        self.used_s = seconds(now_us);
        self
    }

    pub(crate) const fn offsets(&self) -> Offsets {
        self.offsets
    }

    /// Highest TSval sent, in client space.
    pub(crate) const fn ts_high(&self) -> Option<u32> {
        self.get(HAS_TS_HIGH, self.ts_high)
    }

    /// Initial sequence number of the guest, in its own space; another one is a new connection.
    pub(crate) const fn guest_isn(&self) -> Option<u32> {
        self.get(HAS_GUEST_ISN, self.guest_isn)
    }

    /// Present until the offsets are learnt.
    pub(crate) const fn handshake(&self) -> Option<Handshake> {
        if self.has & IS_OPENING == 0 {
            return None;
        }
        Some(Handshake {
            guest_isn: self.guest_isn,
            guest_ts: self.get(HAS_GUEST_TS, self.guest_ts),
            peer_isn: self.get(HAS_PEER_ISN, self.peer_isn),
        })
    }

    /// Whether guest and peer have closed.
    pub(crate) const fn closed(&self) -> (bool, bool) {
        (self.guest_closed, self.peer_closed)
    }

    pub(crate) const fn is_over(&self) -> bool {
        self.guest_closed && self.peer_closed
    }

    /// The peer has shown that it saw this TSval of the guest's, in the space that the offsets
    /// lead from.
    pub(crate) fn seen_by_peer(&mut self, now_us: u64, tsval: Option<u32>) {
        if let Some(tsval) = tsval {
            let floor = tsval.wrapping_add(self.offsets.ts);
            self.set(HAS_TS_HIGH, Some(latest_ts(floor, self.ts_high())));
        }
        self.used_s = seconds(now_us);
    }

    fn learn(&mut self, offsets: Offsets) {
        self.offsets = offsets;
        self.has &= !(IS_OPENING | HAS_GUEST_TS | HAS_PEER_ISN);
        (self.guest_ts, self.peer_isn) = (0, 0);
    }

    fn note_closing(&mut self, tcp: &Tcp) {
        if tcp.has(RST) {
            (self.guest_closed, self.peer_closed) = (true, true);
        } else if tcp.has(FIN) {
            self.guest_closed = true;
        } else if tcp.payload_len > 0 && self.is_over() {
            // A reset that the guest did not believe.
            (self.guest_closed, self.peer_closed) = (false, false);
        }
    }

    fn expired(&self, now_s: u32) -> bool {
        let idle_s = now_s.saturating_sub(self.used_s);
        (self.is_over() && idle_s > LINGER_S)
            || (self.has & IS_OPENING != 0 && idle_s > HANDSHAKE_S)
    }
}

/// The client-facing translations of a VM.
#[derive(Debug)]
pub(crate) struct ClientTable {
    entries: FlatTable<Entry>,
    limit: usize,
    evicted: u64,
    /// Where expiry and eviction go on.
    sweep_at: usize,
    evict_at: usize,
    next_sweep_us: u64,
}

impl ClientTable {
    /// Room for `limit` connections.
    pub(crate) fn new(limit: usize, seed: u64) -> Self {
        Self {
            entries: FlatTable::new(limit, seed),
            limit,
            evicted: 0,
            sweep_at: 0,
            evict_at: 0,
            next_sweep_us: 0,
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
        (self.sweep_at, self.evict_at) = (0, 0);
    }

    pub(crate) fn get(&self, key: &FlowKey) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(crate) fn get_mut(&mut self, key: &FlowKey) -> Option<&mut Entry> {
        self.entries.get_mut(key)
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (&FlowKey, &Entry)> {
        self.entries.iter()
    }

    /// Puts an entry in; false when the table is full.
    pub(crate) fn insert(&mut self, key: FlowKey, entry: Entry) -> bool {
        let place = self.entries.get_or_insert_with(key, || entry);
        place.is_some_and(|place| {
            *place = entry;
            true
        })
    }

    /// Puts an entry in, when the table is full in the place of one that `may_go` allows; each is
    /// asked about once. What finds no place is counted.
    pub(crate) fn insert_evicting(
        &mut self,
        key: FlowKey,
        entry: Entry,
        may_go: impl Fn(&FlowKey, &Entry) -> bool,
    ) {
        while !self.insert(key, entry) {
            self.evicted += 1;
            if !self.evict(&may_go) {
                break;
            }
        }
    }

    fn evict(&mut self, may_go: &impl Fn(&FlowKey, &Entry) -> bool) -> bool {
        while self.evict_at < self.entries.slots() {
            let slot = self.evict_at as Slot;
            self.evict_at += 1;
            let key = self.entries.key_at(slot);
            if self
                .entries
                .at(slot)
                .is_some_and(|entry| may_go(&key, entry))
            {
                self.entries.remove(&key);
                return true;
            }
        }
        false
    }

    /// Forgets connections that ended long ago, a few at a time.
    pub(crate) fn expire(&mut self, now_us: u64) {
        if now_us < self.next_sweep_us {
            return;
        }
        self.next_sweep_us = now_us + SWEEP_INTERVAL_US;
        for _ in 0..SWEEP_SLOTS.min(self.entries.slots()) {
            if self.sweep_at >= self.entries.slots() {
                self.sweep_at = 0;
            }
            let slot = self.sweep_at as Slot;
            let entry = self.entries.at(slot);
            if entry.is_some_and(|entry| entry.expired(seconds(now_us))) {
                self.entries.remove(&self.entries.key_at(slot));
            }
            self.sweep_at += 1;
        }
    }

    /// Translates a client's frame for the guest: a segment, or one of the guest's that an ICMP
    /// error quotes. True when it completed a handshake, so that the table changed.
    pub(crate) fn inbound(&mut self, now_us: u64, header: &mut [u8], packet: &mut Packet) -> bool {
        let Some(tcp) = packet.layout.tcp.as_mut() else {
            self.inbound_error(header, packet);
            return false;
        };
        let Some(entry) = self.entries.get_mut(&packet.key) else {
            return false;
        };
        entry.used_s = seconds(now_us);
        let learnt = entry
            .handshake()
            .and_then(|handshake| handshake.learn(header, tcp));
        if let Some(offsets) = learnt {
            entry.learn(offsets);
        }
        // A reset may be anybody's, whom the guest does not believe: alone it ends nothing.
        entry.peer_closed |= tcp.flags & (FIN | RST) != 0;
        entry.offsets.inbound(header, tcp);
        learnt.is_some()
    }

    fn inbound_error(&self, header: &mut [u8], packet: &Packet) {
        if let Some(quoted) = Quoted::parse(header, packet)
            && let Some(entry) = self.entries.get(&quoted.key)
        {
            entry.offsets.inbound_quoted(header, &quoted);
        }
    }

    /// Translates a guest's segment for the client. True when it could not be translated: the
    /// handshake is not learnt yet, so the segment lost its payload and now only makes the client
    /// answer with an ACK, from which to learn; the guest sends the payload again. For that it
    /// stands where the guest's SYN stood: if the numbers are the client's after all, it is old
    /// there, and old segments are answered, while a bare ACK that fits is not.
    pub(crate) fn outbound(&mut self, now_us: u64, header: &mut [u8], packet: &mut Packet) -> bool {
        let Some(tcp) = packet.layout.tcp.as_mut() else {
            return false;
        };
        let Some(entry) = self.entries.get_mut(&packet.key) else {
            return false;
        };
        if tcp.has(SYN) && entry.guest_isn() != Some(tcp.seq) {
            // A new connection between the same ports: the old one has ended.
            self.entries.remove(&packet.key);
            return false;
        }
        entry.used_s = seconds(now_us);
        let opening = entry.handshake();
        if let Some(Handshake { guest_isn, .. }) = opening
            && tcp.flags & (SYN | RST) == 0
        {
            let seq = match tcp.payload_len > 0 || tcp.has(FIN) {
                true => guest_isn,
                false => tcp.seq,
            };
            strip_payload(header, &mut packet.layout, seq);
            return true;
        }
        entry.note_closing(tcp);
        if opening.is_some() {
            // Its timestamps cannot be told from the client's space yet: they set no mark there.
            return false;
        }
        entry.offsets.outbound(header, tcp);
        let Some((tsval, _)) = tcp.timestamps(header) else {
            return false;
        };
        let sent = latest_ts(tsval, entry.ts_high());
        if sent != tsval {
            tcp.set_tsval(header, sent);
        }
        entry.set(HAS_TS_HIGH, Some(sent));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Direction;
    use crate::testing::{Segment, Side, checksums_are_right, ip_frame};
    use crate::wire::{self, tcp::ACK};
    use alloc::vec::Vec;

    fn parse(bytes: &[u8], direction: Direction) -> (Packet, Tcp) {
        let packet = wire::parse(bytes, bytes.len(), direction);
        (packet, packet.tcp.expect("TCP"))
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
                table.insert(packet.key, Entry::new(offsets).with_ts_high(Some(100)));
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
    fn rule_1_what_cannot_be_translated_yet_is_old_for_a_client_that_has_the_guests_own_numbers() {
        let mut table = ClientTable::new(10, 0);
        let sent = |table: &mut ClientTable, seq, payload: &[u8], flags| {
            let segment = Segment::new(Side::V4).seq(seq).ack(8).flags(flags);
            let mut bytes = segment.payload(payload).bytes();
            let (mut packet, _) = parse(&bytes, Direction::FromGuest);
            if table.len() == 0 {
                let handshake = Handshake {
                    guest_isn: 99,
                    guest_ts: None,
                    peer_isn: None,
                };
                table.insert(packet.key, Entry::opening(handshake));
            }
            assert!(table.outbound(0, &mut bytes, &mut packet));
            bytes.truncate(usize::from(packet.layout.end));
            assert!(checksums_are_right(&bytes));
            let (_, tcp) = parse(&bytes, Direction::FromGuest);
            assert!(tcp.is_pure_ack() && tcp.ack == 8);
            tcp.seq
        };
        // Its SYN was 99, so a client that has seen that one expects 100, and answers to what is before.
        assert_eq!(sent(&mut table, 100, b"ab", ACK), 99);
        assert_eq!(sent(&mut table, 102, b"cd", ACK), 99);
        assert_eq!(sent(&mut table, 104, b"", ACK | FIN), 99);
        // Nothing of it is lost, and it ends the client's handshake.
        assert_eq!(sent(&mut table, 100, b"", ACK), 100);
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
        table.insert(packet.key, Entry::opening(handshake));
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
        table.insert(packet.key, Entry::new(offsets).with_guest_isn(Some(42)));
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
        const LIMIT: usize = 3 * SWEEP_SLOTS;
        let mut table = ClientTable::new(LIMIT, 0);
        let handshake = Handshake {
            guest_isn: 1,
            guest_ts: None,
            peer_isn: None,
        };
        for port in 0..LIMIT as u16 {
            let entry = match port % 3 {
                0 => Entry::new(Offsets { seq: 1, ts: 0 }),
                1 => Entry::new(Offsets::default()).with_closed(true, true),
                _ => Entry::opening(handshake),
            };
            table.insert(key(port), entry.used_at(10));
        }
        assert!(!table.insert(key(9999), Entry::default()), "full");
        let at_us = |seconds: u32, tick: u64| u64::from(seconds) * 1_000_000 + tick * 1000;
        let sweep = |table: &mut ClientTable, seconds: u32| {
            for tick in 0..4 {
                let before = table.len();
                table.expire(at_us(seconds, tick));
                assert!(before - table.len() <= SWEEP_SLOTS, "a few at a time");
                table.expire(at_us(seconds, tick) + 1);
            }
        };
        sweep(&mut table, LINGER_S);
        assert_eq!(table.len(), LIMIT);
        sweep(&mut table, LINGER_S + 1);
        assert_eq!(table.len(), LIMIT / 3 * 2);
        sweep(&mut table, HANDSHAKE_S + 1);
        assert_eq!(table.len(), LIMIT / 3);
    }

    fn key(port: u16) -> FlowKey {
        FlowKey::bare(crate::flow::Protocol::Tcp, [0; 2]).with_ports(80, port)
    }

    #[test]
    fn a_full_table_lets_go_only_of_what_may_go() {
        let mut table = ClientTable::new(4, 0);
        (0..4).for_each(|port| assert!(table.insert(key(port), Entry::default())));
        let is_even = |key: &FlowKey, _: &Entry| key.peer_port().is_multiple_of(2);
        (4..7).for_each(|port| table.insert_evicting(key(port), Entry::default(), is_even));
        let mut ports: Vec<_> = table.entries().map(|(key, _)| key.peer_port()).collect();
        ports.sort_unstable();
        assert_eq!(ports, [1, 3, 4, 5]);
        assert_eq!(table.evicted(), 3, "two made room, one found none");
    }

    #[test]
    fn an_idle_connection_takes_80_bytes_and_its_part_of_the_index() {
        assert_eq!(size_of::<Entry>(), 32);
        assert_eq!(FlatTable::<Entry>::ENTRY_BYTES, 80);
    }

    #[test]
    fn errors_quote_the_numbers_that_the_guest_knows() {
        for (side, kind) in [(Side::V4, 3), (Side::V6, 2)] {
            let mut table = ClientTable::new(4, 0);
            let sent = Segment::new(side).seq(1007).payload(b"too long").bytes();
            let key = wire::parse(&sent, sent.len(), Direction::FromGuest).key;
            let error = |seq: u32| {
                let mut message = Vec::from([kind, 4, 0, 0, 0, 0, 5, 0]);
                message.extend_from_slice(&Segment::new(side).seq(seq).bytes()[14..]);
                ip_frame(
                    side,
                    true,
                    if side == Side::V4 { 1 } else { 58 },
                    64,
                    0,
                    &message,
                )
            };
            let translated = |table: &mut ClientTable| {
                let mut bytes = error(1007);
                let mut packet = wire::parse(&bytes, bytes.len(), Direction::ToGuest);
                assert!(!table.inbound(0, &mut bytes, &mut packet));
                bytes
            };
            assert_eq!(translated(&mut table), error(1007), "no entry, no change");
            table.insert(key, Entry::new(Offsets { seq: 1000, ts: 9 }));
            assert_eq!(translated(&mut table), error(7));
        }
    }
}
