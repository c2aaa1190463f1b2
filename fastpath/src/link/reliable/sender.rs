//! What was said and is not acknowledged yet: units in a ring of bytes, and when to send which.
//!
//! Invariants: a unit stays, with its number and its bytes, until it is acknowledged or taken back; at most
//! [`RING_BYTES`] and [`UNITS_MAX`] are kept; nothing is sent that the peer has no room for. No memory is taken after `new`.
//!
//! Messages that follow each other share a unit as long as it is not sent and has room; one that is longer than a datagram
//! becomes several units.

use std::collections::VecDeque;
use std::ops::Range;

use super::rtt::Rtt;

/// Bytes kept at most.
pub(in crate::link) const RING_BYTES: usize = 4 << 20;
/// Units kept at most.
pub(in crate::link) const UNITS_MAX: usize = 8192;
/// With less contiguous room than this, no more work is taken in.
const ROOM_BYTES: usize = 256 << 10;
const ROOM_UNITS: usize = 512;
/// So many later units acknowledged: this one is lost (RFC 5681 and RFC 9002 take 3, too).
const OVERTAKEN: u64 = 3;
/// Units in flight: at the start, after a silence, and at most.
const WINDOW_START: usize = 64;
const WINDOW_MIN: usize = 16;
const WINDOW_MAX: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Fresh,
    InFlight,
    Lost,
    Acknowledged,
}

#[derive(Debug)]
struct Unit {
    at: usize,
    len: usize,
    /// The message goes on in the next unit.
    more: bool,
    /// Holds whole messages, and may take more of them.
    whole: bool,
    state: State,
    sent_us: u64,
    /// Order of transmissions.
    stamp: u64,
    sends: u32,
}

/// A unit to send.
#[derive(Debug)]
pub(in crate::link) struct Sending {
    pub(in crate::link) number: u64,
    pub(in crate::link) more: bool,
    pub(in crate::link) bytes: Range<usize>,
}

/// Counters of a sender.
#[derive(Debug, Default, Clone, Copy)]
pub(in crate::link) struct SenderStats {
    pub(in crate::link) sent: u64,
    pub(in crate::link) retransmitted: u64,
    pub(in crate::link) timeouts: u64,
    pub(in crate::link) split: u64,
}

#[derive(Debug)]
pub(in crate::link) struct Sender {
    ring: Box<[u8]>,
    /// Where the next unit goes, if it fits there.
    end: usize,
    units: VecDeque<Unit>,
    /// Number of the oldest unit.
    first: u64,
    /// How many of the units were sent at least once.
    begun: usize,
    payload_max: usize,
    /// Units below this number find room at the peer.
    limit: u64,
    in_flight: usize,
    lost: usize,
    /// No unit below is lost.
    lost_from: u64,
    window: usize,
    threshold: usize,
    credit: usize,
    stamp: u64,
    newest_acknowledged: u64,
    /// Losses of what was sent before this do not narrow the window again.
    recovered: u64,
    rtt: Rtt,
    timer_us: Option<u64>,
    /// Timeouts since the peer was heard.
    rounds: u32,
    /// Timeouts since the peer had room.
    blocked: u32,
    ask: bool,
    pub(in crate::link) stats: SenderStats,
}

impl Sender {
    pub(in crate::link) fn new() -> Self {
        Self {
            ring: vec![0; RING_BYTES].into_boxed_slice(),
            end: 0,
            units: VecDeque::with_capacity(UNITS_MAX),
            first: 1,
            begun: 0,
            payload_max: 1024,
            limit: 1,
            in_flight: 0,
            lost: 0,
            lost_from: 1,
            window: WINDOW_START,
            threshold: WINDOW_MAX,
            credit: 0,
            stamp: 0,
            newest_acknowledged: 0,
            recovered: 0,
            rtt: Rtt::default(),
            timer_us: None,
            rounds: 0,
            blocked: 0,
            ask: false,
            stats: SenderStats::default(),
        }
    }

    /// Begins, when no unit is kept: the longest payload of a datagram, and how many units find room at the peer.
    pub(in crate::link) fn begin(&mut self, payload_max: usize, window: u16) {
        debug_assert!(self.units.is_empty());
        self.payload_max = payload_max;
        self.limit = self.first + u64::from(window);
    }

    /// The number that the next new unit gets.
    pub(in crate::link) fn next_number(&self) -> u64 {
        self.first + self.units.len() as u64
    }

    /// True while more work may be taken in.
    pub(in crate::link) fn has_room(&self) -> bool {
        self.units.len() + ROOM_UNITS <= UNITS_MAX && self.place(ROOM_BYTES).is_some()
    }

    /// True while something is not acknowledged.
    pub(in crate::link) fn is_busy(&self) -> bool {
        !self.units.is_empty()
    }

    /// True while something could be sent if the transport took it.
    pub(in crate::link) fn can_send(&self) -> bool {
        let fresh = self.begun < self.units.len() && self.first + (self.begun as u64) < self.limit;
        self.in_flight < self.window && (self.lost > 0 || fresh)
    }

    pub(in crate::link) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.ring[range]
    }

    pub(in crate::link) fn smoothed_us(&self) -> u64 {
        self.rtt.smoothed_us()
    }

    /// Takes a message. `false`: it does not fit now.
    pub(in crate::link) fn push(&mut self, head: &[u8], body: &[u8]) -> bool {
        let len = head.len() + body.len();
        let parts = len.div_ceil(self.payload_max);
        let Some(at) = self
            .place(len)
            .filter(|_| self.units.len() + parts <= UNITS_MAX)
        else {
            return false;
        };
        self.ring[at..at + head.len()].copy_from_slice(head);
        self.ring[at + head.len()..at + len].copy_from_slice(body);
        self.end = at + len;
        if let Some(last) = self.units.back_mut()
            && last.state == State::Fresh
            && last.whole
            && last.at + last.len == at
            && last.len + len <= self.payload_max
        {
            last.len += len;
            return true;
        }
        self.stats.split += u64::from(parts > 1);
        for part in 0..parts {
            let from = part * self.payload_max;
            let more = part + 1 < parts;
            self.units.push_back(Unit {
                at: at + from,
                len: if more { self.payload_max } else { len - from },
                more,
                whole: parts == 1,
                state: State::Fresh,
                sent_us: 0,
                stamp: 0,
                sends: 0,
            });
        }
        true
    }

    /// The next unit to send now.
    pub(in crate::link) fn poll(&mut self, now_us: u64) -> Option<Sending> {
        if !self.can_send() {
            if self.is_busy() && self.timer_us.is_none() {
                self.arm(now_us);
            }
            return None;
        }
        let index = if self.lost > 0 {
            self.take_lost()?
        } else {
            self.begun += 1;
            self.begun - 1
        };
        self.stamp += 1;
        self.in_flight += 1;
        let unit = &mut self.units[index];
        unit.state = State::InFlight;
        unit.stamp = self.stamp;
        unit.sent_us = now_us;
        unit.sends += 1;
        self.stats.sent += 1;
        self.stats.retransmitted += u64::from(unit.sends > 1);
        let sending = Sending {
            number: self.first + index as u64,
            more: unit.more,
            bytes: unit.at..unit.at + unit.len,
        };
        if self.timer_us.is_none() {
            self.arm(now_us);
        }
        Some(sending)
    }

    /// Once after each timeout for which there was nothing to send: the peer is to say where it stands.
    pub(in crate::link) fn poll_ask(&mut self) -> bool {
        std::mem::take(&mut self.ask)
    }

    /// A datagram of the peer was heard.
    pub(in crate::link) fn heard(&mut self) {
        self.rounds = 0;
    }

    /// Everything below `next` has come, and what `received` (and then `further`) has as bits from `next + 1` on.
    /// `false`: that was never sent.
    pub(in crate::link) fn acknowledge(
        &mut self,
        now_us: u64,
        next: u64,
        received: u64,
        further: &[u8],
        window: u16,
    ) -> bool {
        if next > self.first + self.begun as u64 {
            return false;
        }
        let limit = next + u64::from(window);
        if limit > self.limit {
            self.limit = limit;
            self.blocked = 0;
        }
        let mut sample = None;
        let mut settled = 0;
        while self.first < next {
            settled += self.settle(0, &mut sample);
            self.units.pop_front();
            self.first += 1;
            self.begun -= 1;
        }
        if self.units.is_empty() {
            self.end = 0;
        }
        let words = received.to_le_bytes();
        for (byte, &mask) in words.iter().chain(further).enumerate() {
            for bit in (0..8).filter(|bit| mask >> bit & 1 != 0) {
                let number = next + 1 + (byte * 8 + bit) as u64;
                let index = number.wrapping_sub(self.first);
                if number >= self.first && index < self.begun as u64 {
                    settled += self.settle(index as usize, &mut sample);
                }
            }
        }
        if let Some(sent_us) = sample {
            self.rtt.sample(now_us.saturating_sub(sent_us));
        }
        if settled > 0 {
            self.widen(settled);
            self.timer_us = None;
            if self.is_busy() {
                self.arm(now_us);
            }
        }
        self.find_lost(received != 0);
        true
    }

    /// When [`Self::handle_timeout`] is to be called.
    pub(in crate::link) fn deadline_us(&self) -> Option<u64> {
        self.timer_us
    }

    /// The time may have come to send again.
    pub(in crate::link) fn handle_timeout(&mut self, now_us: u64) {
        if self.timer_us.is_none_or(|at| at > now_us) {
            return;
        }
        if !self.is_busy() {
            self.timer_us = None;
            return;
        }
        self.rounds += 1;
        self.stats.timeouts += 1;
        if self.in_flight + self.lost == 0 {
            self.ask = true;
            self.blocked += 1;
        }
        // The first time one is enough: its acknowledgement tells about the others.
        let count = if self.rounds > 1 { self.begun } else { 1 };
        if self.rounds == 2 {
            self.threshold = (self.window / 2).max(WINDOW_MIN);
            self.window = WINDOW_MIN;
            self.recovered = self.stamp;
        }
        let in_flight = |unit: &&mut Unit| unit.state == State::InFlight;
        for unit in self
            .units
            .range_mut(..self.begun)
            .filter(in_flight)
            .take(count)
        {
            unit.state = State::Lost;
            self.in_flight -= 1;
            self.lost += 1;
        }
        self.lost_from = self.first;
        self.arm(now_us);
    }

    /// Timeouts since the peer was heard.
    pub(in crate::link) fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Gives all units that are not acknowledged to `each`, as number, `more` and bytes, and forgets them.
    pub(in crate::link) fn take_back(&mut self, mut each: impl FnMut(u64, bool, &[u8])) {
        for (unit, number) in self.units.drain(..).zip(self.first..) {
            each(number, unit.more, &self.ring[unit.at..unit.at + unit.len]);
            self.first = number + 1;
        }
        self.end = 0;
        self.begun = 0;
        self.in_flight = 0;
        self.lost = 0;
        self.timer_us = None;
        self.rounds = 0;
        self.blocked = 0;
        self.ask = false;
        self.window = WINDOW_START;
    }

    /// For tests: it must not grow.
    #[cfg(test)]
    pub(in crate::link) fn unit_capacity(&self) -> usize {
        self.units.capacity()
    }

    /// Where `len` contiguous bytes are free.
    fn place(&self, len: usize) -> Option<usize> {
        let Some(oldest) = self.units.front() else {
            return (len <= self.ring.len()).then_some(0);
        };
        if self.end <= oldest.at {
            return (self.end + len < oldest.at).then_some(self.end);
        }
        if self.end + len <= self.ring.len() {
            return Some(self.end);
        }
        (len < oldest.at).then_some(0)
    }

    fn take_lost(&mut self) -> Option<usize> {
        let from = self.lost_from.saturating_sub(self.first) as usize;
        let mut sent = self.units.range(from.min(self.begun)..self.begun);
        let index = from + sent.position(|unit| unit.state == State::Lost)?;
        self.lost -= 1;
        self.lost_from = self.first + index as u64 + 1;
        Some(index)
    }

    /// A unit has come: 1 if that is news.
    fn settle(&mut self, index: usize, sample: &mut Option<u64>) -> usize {
        let unit = &mut self.units[index];
        match unit.state {
            State::InFlight => self.in_flight -= 1,
            State::Lost => self.lost -= 1,
            State::Acknowledged | State::Fresh => return 0,
        }
        unit.state = State::Acknowledged;
        self.newest_acknowledged = self.newest_acknowledged.max(unit.stamp);
        // What was sent twice says nothing about time (Karn).
        if unit.sends == 1 {
            *sample = (*sample).max(Some(unit.sent_us));
        }
        1
    }

    fn widen(&mut self, settled: usize) {
        if self.window < self.threshold {
            self.window += settled;
        } else {
            // One unit for each window that has come.
            self.credit += settled;
            if self.credit >= self.window {
                self.credit -= self.window;
                self.window += 1;
            }
        }
        self.window = self.window.min(WINDOW_MAX);
    }

    /// Units that later ones have overtaken are lost.
    fn find_lost(&mut self, gaps: bool) {
        let newest = self.newest_acknowledged;
        let overtaken =
            |unit: &Unit| unit.state == State::InFlight && unit.stamp + OVERTAKEN <= newest;
        let oldest = self.units.front().is_some_and(overtaken);
        if !gaps && !oldest {
            return;
        }
        for (unit, number) in self.units.range_mut(..self.begun).zip(self.first..) {
            if !overtaken(unit) {
                continue;
            }
            unit.state = State::Lost;
            self.in_flight -= 1;
            self.lost += 1;
            self.lost_from = self.lost_from.min(number);
            if unit.stamp > self.recovered {
                self.recovered = self.stamp;
                self.threshold = (self.window / 2).max(WINDOW_MIN);
                self.window = self.threshold;
            }
        }
    }

    fn arm(&mut self, now_us: u64) {
        let rounds = self.rounds.max(self.blocked);
        self.timer_us = Some(now_us + self.rtt.timeout_us(rounds));
    }
}
