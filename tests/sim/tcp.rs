//! A small TCP end, used by the model guest and by the clients: handshake, window, retransmission, reassembly,
//! delayed ACK, timestamps with PAWS, SACK (sent, and checked by the other side), FIN.
//!
//! Invariants: bytes go to the application in order and once; what it does depends on nothing but its state, the
//! segments, the time and the random numbers it is given. State can be cloned at any instant (a checkpoint).
//!
//! Does not implement flow control or congestion control: the amount in flight is bounded by a constant.

use std::collections::{BTreeMap, VecDeque};

use colo_compare::testing::{Segment, Side};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN, Tcp as Header};
use colo_compare::{Direction, Protocol, wire};

use crate::prng::Prng;

/// Most bytes in flight.
const FLIGHT: u32 = 8 * 1024;
const MSS: u16 = 1000;
const RTO_US: u64 = 200_000;
const RTO_MAX_US: u64 = 1_600_000;
const DELAYED_ACK_US: u64 = 40_000;
/// So many ticks a TSecr may be ahead of what was sent: the SVM's lag and the slack of a takeover.
const TS_LAG: u32 = 30_000;

/// A segment taken apart.
#[derive(Debug, Clone)]
pub struct Seg {
    pub side: Side,
    pub guest_port: u16,
    pub peer_port: u16,
    pub header: Header,
    pub timestamps: Option<(u32, u32)>,
    pub sack: Vec<(u32, u32)>,
    pub payload: Vec<u8>,
}

impl Seg {
    /// Reads a TCP frame; `None` for everything else.
    pub fn read(frame: &[u8], direction: Direction) -> Option<Self> {
        let packet = wire::parse(frame, frame.len(), direction);
        if packet.key.protocol() != Protocol::Tcp {
            return None;
        }
        let header = packet.tcp?;
        let at = usize::from(header.payload_at);
        Some(Self {
            side: if packet.network == wire::Network::V6 {
                Side::V6
            } else {
                Side::V4
            },
            guest_port: packet.key.guest_port(),
            peer_port: packet.key.peer_port(),
            header,
            timestamps: header.timestamps(frame),
            sack: header.sack_blocks(frame).collect(),
            payload: frame[at..at + usize::from(header.payload_len)].to_vec(),
        })
    }

    /// Leaves only the first `n` bytes of payload, and nothing behind them.
    pub fn cut(&mut self, n: usize) {
        self.payload.truncate(n);
        self.header.payload_len = self.payload.len() as u16;
        self.header.flags &= !FIN;
    }
}

/// How far the connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    SynSent,
    SynReceived,
    Open,
    Reset,
}

/// One end of a connection. Positions count from the SYN (0); data starts at 1; a FIN follows the data.
#[derive(Debug, Clone, Hash)]
pub struct End {
    guest: bool,
    /// It sends the SYN.
    opens: bool,
    v6: bool,
    pub guest_port: u16,
    pub peer_port: u16,
    pub state: State,
    iss: u32,
    una: u64,
    nxt: u64,
    max: u64,
    /// Unacknowledged and unsent bytes; the first is at position `base`.
    out: VecDeque<u8>,
    base: u64,
    fin_queued: bool,
    irs: u32,
    /// Position of the next byte wanted from the peer.
    wanted: u64,
    ooo: BTreeMap<u64, Vec<u8>>,
    fin_at: Option<u64>,
    /// In-order bytes for the application.
    pub inbox: Vec<u8>,
    /// The peer has closed and everything before that was received.
    pub peer_closed: bool,
    rto_us: u64,
    rto_at: Option<u64>,
    ack_at: Option<u64>,
    ack_now: bool,
    unacked_segments: u32,
    dup_acks: u32,
    ts_offset: u32,
    ts_recent: u32,
    use_ts: bool,
    /// It drops a segment, payload and all, whose ACK is older than one that it had before, as smoltcp 0.14 does.
    drops_old_acks: bool,
    /// A reset with this sequence number is due.
    reset_at: Option<u32>,
    /// Highest TSval we sent.
    ts_sent: Option<u32>,
    /// Something impossible was seen.
    pub complaint: Option<String>,
}

fn le(a: u32, b: u32) -> bool {
    (b.wrapping_sub(a) as i32) >= 0
}

impl End {
    fn new(guest: bool, side: Side, ports: (u16, u16), chance: &mut Prng) -> Self {
        Self {
            guest,
            opens: false,
            v6: side == Side::V6,
            guest_port: ports.0,
            peer_port: ports.1,
            state: State::SynSent,
            iss: chance.next() as u32,
            una: 0,
            nxt: 0,
            max: 0,
            out: VecDeque::new(),
            base: 1,
            fin_queued: false,
            irs: 0,
            wanted: 1,
            ooo: BTreeMap::new(),
            fin_at: None,
            inbox: Vec::new(),
            peer_closed: false,
            rto_us: RTO_US,
            rto_at: None,
            ack_at: None,
            ack_now: false,
            unacked_segments: 0,
            dup_acks: 0,
            ts_offset: chance.next() as u32,
            ts_recent: 0,
            use_ts: false,
            drops_old_acks: guest && chance.chance(500),
            reset_at: None,
            ts_sent: None,
            complaint: None,
        }
    }

    /// The end that opens; the SYN leaves with the next [`Self::poll`].
    pub fn connect(
        guest: bool,
        side: Side,
        ports: (u16, u16),
        use_ts: bool,
        chance: &mut Prng,
    ) -> Self {
        Self {
            use_ts,
            opens: true,
            ..Self::new(guest, side, ports, chance)
        }
    }

    /// The answer to a SYN.
    pub fn accept(guest: bool, syn: &Seg, chance: &mut Prng) -> Self {
        let mut end = Self::new(guest, syn.side, (syn.guest_port, syn.peer_port), chance);
        end.state = State::SynReceived;
        end.irs = syn.header.seq;
        end.use_ts = syn.timestamps.is_some();
        end.ts_recent = syn.timestamps.map_or(0, |(tsval, _)| tsval);
        end
    }

    /// Queues bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.out.extend(bytes);
    }

    /// Tells the peer at once what was received so far.
    pub fn tell(&mut self) {
        self.ack_now = true;
    }

    /// No more bytes after those queued.
    pub fn close(&mut self) {
        self.fin_queued = true;
    }

    /// Ends it with a reset.
    pub fn abort(&mut self) {
        self.state = State::Reset;
        self.reset_at = Some(self.seq(self.max));
        (self.rto_at, self.ack_at, self.ack_now) = (None, None, false);
    }

    /// Closed by us.
    pub fn is_closing(&self) -> bool {
        self.fin_queued
    }

    fn fin_position(&self) -> u64 {
        self.base + self.out.len() as u64
    }

    /// Both ends have closed and know it.
    pub fn is_finished(&self) -> bool {
        self.peer_closed && self.fin_queued && self.una > self.fin_position()
    }

    fn seq(&self, position: u64) -> u32 {
        self.iss.wrapping_add(position as u32)
    }

    /// Takes a segment of this connection.
    pub fn handle(&mut self, now: u64, seg: &Seg) {
        let h = &seg.header;
        if self.state == State::Reset {
            return;
        }
        if h.has(RST) {
            let ours = match self.state {
                State::SynSent => h.has(ACK) && h.ack == self.seq(1),
                _ => h.seq == self.irs.wrapping_add(self.wanted as u32),
            };
            if ours {
                self.state = State::Reset;
                (self.rto_at, self.ack_at, self.ack_now) = (None, None, false);
            }
            return;
        }
        if h.has(SYN) {
            self.handle_syn(now, seg);
            return;
        }
        if self.state == State::SynSent {
            // Of a connection that we do not know any more.
            self.reset_at = (h.has(ACK) && h.ack != self.seq(1)).then_some(h.ack);
            return;
        }
        if !self.is_in_window(h.seq) {
            self.ack_now = true;
            return;
        }
        if self.use_ts {
            let Some((tsval, _)) = seg.timestamps else {
                return;
            };
            if !le(self.ts_recent, tsval) {
                self.ack_now |= h.takes_space(); // PAWS (RFC 7323 section 5)
                return;
            }
        }
        if !self.handle_ack(now, seg) {
            return;
        }
        self.handle_data(now, seg);
    }

    /// Near what is wanted, or repeated; other numbers are of another connection.
    fn is_in_window(&self, seq: u32) -> bool {
        let ahead = i64::from(seq.wrapping_sub(self.irs.wrapping_add(self.wanted as u32)) as i32);
        (-(self.wanted as i64)..=i64::from(FLIGHT) * 4).contains(&ahead)
    }

    fn handle_syn(&mut self, now: u64, seg: &Seg) {
        let h = &seg.header;
        match self.state {
            State::SynSent if h.has(ACK) && h.ack == self.seq(1) => {
                self.state = State::Open;
                self.irs = h.seq;
                self.use_ts &= seg.timestamps.is_some();
                self.ts_recent = seg.timestamps.map_or(0, |(tsval, _)| tsval);
                self.acknowledged(now, 1);
                self.ack_now = true;
            }
            State::SynReceived if h.seq == self.irs => self.nxt = 0,
            _ => self.ack_now = true,
        }
    }

    /// False when the segment must be dropped.
    fn handle_ack(&mut self, now: u64, seg: &Seg) -> bool {
        let h = &seg.header;
        if !h.has(ACK) {
            return false;
        }
        let ahead = h.ack.wrapping_sub(self.seq(self.una)) as i32;
        let position = self.una.wrapping_add_signed(i64::from(ahead));
        if ahead > 0 && position > self.max {
            self.ack_now = true; // RFC 9293 section 3.10.7.4: of something not yet sent
            return false;
        }
        if self.state == State::SynReceived && ahead <= 0 {
            // Of an earlier connection, by way of repeated packets: before its handshake is over nothing of it counts.
            return false;
        }
        if ahead < 0 && self.drops_old_acks {
            return false;
        }
        self.check_sack(seg);
        if let Some((_, tsecr)) = seg.timestamps
            && ahead >= 0
            && let Some(sent) = self.ts_sent
            && !le(tsecr, sent.wrapping_add(TS_LAG))
        {
            self.complaint = Some(format!(
                "port {}: TSecr {tsecr:#x} was never sent, {sent:#x} was",
                self.peer_port
            ));
        }
        if ahead > 0 {
            if self.state == State::SynReceived {
                self.state = State::Open;
            }
            self.acknowledged(now, position);
        } else if ahead == 0 && h.is_pure_ack() && self.una < self.max {
            self.dup_acks += 1;
            if self.dup_acks == 3 {
                self.nxt = self.una;
            }
        }
        true
    }

    fn check_sack(&mut self, seg: &Seg) {
        for &(left, right) in &seg.sack {
            let from_una = |n: u32| n.wrapping_sub(self.seq(self.una)) as i32;
            // An SVM may lag: the client answers what the PVM sent.
            let limit = (self.max - self.una) as i32 + 4 * FLIGHT as i32;
            let known = -(self.una as i32)..=limit;
            if !known.contains(&from_una(left)) || from_una(right) > limit {
                self.complaint = Some(format!("SACK {left:#x}..{right:#x} of what was never sent"));
            }
        }
    }

    fn acknowledged(&mut self, now: u64, position: u64) {
        self.una = position;
        self.nxt = self.nxt.max(position);
        self.max = self.max.max(position);
        let data = position.min(self.fin_position()).saturating_sub(self.base);
        self.out.drain(..data as usize);
        self.base += data;
        self.dup_acks = 0;
        self.rto_us = RTO_US;
        self.rto_at = (self.una < self.max).then_some(now + self.rto_us);
    }

    fn handle_data(&mut self, now: u64, seg: &Seg) {
        let h = &seg.header;
        let expected = self.irs.wrapping_add(self.wanted as u32);
        let ahead = i64::from(h.seq.wrapping_sub(expected) as i32);
        let position = self.wanted.wrapping_add_signed(ahead);
        if ahead > i64::from(FLIGHT) * 4 {
            self.ack_now = true;
            return;
        }
        if let Some((tsval, _)) = seg.timestamps
            && ahead <= 0
        {
            self.ts_recent = tsval;
        }
        if !h.takes_space() {
            self.ack_now |= ahead < 0; // a probe
            return;
        }
        if h.has(FIN) {
            self.fin_at = Some(position + u64::from(h.payload_len));
        }
        if ahead != 0 {
            self.ack_now = true;
        }
        if !seg.payload.is_empty() {
            let longest = self.ooo.entry(position).or_default();
            if longest.len() < seg.payload.len() {
                longest.clone_from(&seg.payload);
            }
        }
        self.assemble();
        self.unacked_segments += 1;
        if self.unacked_segments >= 2 || self.peer_closed {
            self.ack_now = true;
        }
        self.ack_at.get_or_insert(now + DELAYED_ACK_US);
    }

    fn assemble(&mut self) {
        while let Some((&at, _)) = self.ooo.first_key_value() {
            if at > self.wanted {
                break;
            }
            let bytes = self.ooo.remove(&at).unwrap_or_default();
            let known = (self.wanted - at) as usize;
            if known < bytes.len() {
                self.inbox.extend_from_slice(&bytes[known..]);
                self.wanted += (bytes.len() - known) as u64;
            }
        }
        if self.fin_at == Some(self.wanted) {
            self.wanted += 1;
            self.peer_closed = true;
        }
    }

    /// When [`Self::poll`] has something to do by itself.
    pub fn deadline(&self) -> Option<u64> {
        let syn_us = (self.nxt == 0 && self.state != State::Reset).then_some(0);
        [self.rto_at, self.ack_at, syn_us]
            .into_iter()
            .flatten()
            .min()
    }

    /// Emits what is due. `now` is the clock of timers and timestamps alike.
    pub fn poll(&mut self, now: u64, chance: &mut Prng, out: &mut Vec<Vec<u8>>) {
        if let Some(at) = self.reset_at.take() {
            let segment = self.segment().flags(RST).seq(at);
            out.push(segment.bytes());
        }
        if self.state == State::Reset {
            return;
        }
        if self.rto_at.is_some_and(|at| at <= now) {
            self.nxt = self.una;
            self.rto_us = (self.rto_us * 2).min(RTO_MAX_US);
            self.rto_at = None;
        }
        while self.emit_next(now, chance, out) {}
        if self.ack_now || self.ack_at.is_some_and(|at| at <= now) {
            if self.state != State::SynSent {
                self.emit(now, self.max, ACK, &[], out);
            }
            self.acked();
        }
    }

    fn acked(&mut self) {
        (self.ack_now, self.ack_at, self.unacked_segments) = (false, None, 0);
    }

    fn emit_next(&mut self, now: u64, chance: &mut Prng, out: &mut Vec<Vec<u8>>) -> bool {
        if self.nxt == 0 {
            let flags = if self.opens { SYN } else { SYN | ACK };
            self.emit(now, 0, flags, &[], out);
            self.sent_up_to(now, 1);
            return true;
        }
        if self.una == 0 {
            return false; // the handshake first
        }
        let (end, fin) = (self.fin_position(), self.fin_queued);
        if self.nxt > end || (self.nxt == end && !fin) || self.nxt - self.una >= u64::from(FLIGHT) {
            return false;
        }
        let from = (self.nxt - self.base) as usize;
        let most = (self.out.len() - from).min(usize::from(MSS));
        let cut = chance.chance(150) && most > 1;
        let len = if cut {
            1 + chance.below(most as u64) as usize
        } else {
            most
        };
        let payload: Vec<u8> = self.out.range(from..from + len).copied().collect();
        let next = self.nxt + len as u64;
        let last = fin && next == end && !(len > 0 && chance.chance(300));
        let flags = if last { ACK | FIN } else { ACK };
        self.emit(now, self.nxt, flags, &payload, out);
        self.sent_up_to(now, next + u64::from(last));
        self.acked();
        true
    }

    fn sent_up_to(&mut self, now: u64, position: u64) {
        self.nxt = position;
        self.max = self.max.max(position);
        self.rto_at.get_or_insert(now + self.rto_us);
    }

    fn emit(&mut self, now: u64, at: u64, flags: u8, payload: &[u8], out: &mut Vec<Vec<u8>>) {
        let mut segment = self
            .segment()
            .seq(self.seq(at))
            .flags(flags)
            .payload(payload)
            .id(now as u16);
        if flags != SYN {
            segment = segment.ack(self.irs.wrapping_add(self.wanted as u32));
        }
        if flags & SYN != 0 {
            segment = segment
                .option(&[2, 4, (MSS >> 8) as u8, MSS as u8])
                .option(&[4, 2]);
        }
        if self.use_ts {
            let tsval = self.ts_offset.wrapping_add((now / 1000) as u32);
            self.ts_sent = Some(tsval);
            let tsecr = if flags == SYN { 0 } else { self.ts_recent };
            segment = segment.timestamps(tsval, tsecr);
        }
        if flags & SYN == 0 && !self.ooo.is_empty() {
            segment = segment.sack(&self.sack_blocks());
        }
        out.push(segment.bytes());
    }

    fn segment(&self) -> Segment {
        let side = if self.v6 { Side::V6 } else { Side::V4 };
        let segment = Segment::new(side).ports(self.guest_port, self.peer_port);
        if self.guest {
            segment
        } else {
            segment.to_guest()
        }
    }

    fn sack_blocks(&self) -> Vec<(u32, u32)> {
        let mut blocks: Vec<(u64, u64)> = Vec::new();
        for (&at, bytes) in &self.ooo {
            let end = at + bytes.len() as u64;
            match blocks.last_mut() {
                Some(last) if at <= last.1 => last.1 = last.1.max(end),
                _ => blocks.push((at, end)),
            }
        }
        let wire = |n: u64| self.irs.wrapping_add(n as u32);
        blocks
            .iter()
            .take(3)
            .map(|&(a, b)| (wire(a), wire(b)))
            .collect()
    }
}

/// The answer to a segment of no connection.
pub fn reset(seg: &Seg) -> Option<Vec<u8>> {
    let h = &seg.header;
    if h.has(RST) {
        return None;
    }
    let segment = Segment::new(seg.side).ports(seg.guest_port, seg.peer_port);
    let segment = if h.has(ACK) {
        segment.flags(RST).seq(h.ack)
    } else {
        segment.flags(RST).seq(0).ack(h.end())
    };
    Some(segment.bytes())
}
