//! What has come and was not handed on yet: units in the order of their numbers, and what to acknowledge.
//!
//! Invariants: a unit is handed on once, in order; what was acknowledged is kept until then; at most [`WINDOW`] units are
//! kept, in the slots where they were received.

use crate::link::port::Slot;

/// Units kept at most.
pub(in crate::link) const WINDOW: usize = 512;
/// So many units are acknowledged together at once,
const ACK_EVERY: u32 = 32;
/// fewer after this time.
const ACK_DELAY_US: u64 = 200;
/// Bytes of [`Receiver::further`].
pub(in crate::link) const FURTHER_BYTES: usize = WINDOW / 8;

/// A received unit in its slot.
#[derive(Debug)]
pub(in crate::link) struct Held {
    /// Which transport the slot belongs to.
    pub(in crate::link) port: usize,
    pub(in crate::link) slot: Slot,
    /// Where the payload lies in the datagram.
    pub(in crate::link) start: usize,
    pub(in crate::link) end: usize,
    pub(in crate::link) more: bool,
}

/// A unit that is not kept.
#[derive(Debug)]
pub(in crate::link) enum Refused {
    /// It has come before.
    Duplicate(Held),
    /// It is too far ahead.
    Beyond(Held),
}

#[derive(Debug)]
pub(in crate::link) struct Receiver {
    /// By number, modulo its length.
    held: Box<[Option<Held>]>,
    /// Number of the next unit to hand on.
    next: u64,
    /// Lowest number that has not come.
    missing: u64,
    /// One above the highest number that has come.
    seen: u64,
    unacknowledged: u32,
    ack_now: bool,
    ack_us: Option<u64>,
    told_limit: u64,
}

impl Receiver {
    pub(in crate::link) fn new() -> Self {
        Self {
            held: (0..WINDOW).map(|_| None).collect(),
            next: 1,
            missing: 1,
            seen: 1,
            unacknowledged: 0,
            ack_now: false,
            ack_us: None,
            told_limit: 1,
        }
    }

    /// Keeps a unit.
    pub(in crate::link) fn accept(
        &mut self,
        now_us: u64,
        number: u64,
        unit: Held,
    ) -> Result<(), Refused> {
        self.unacknowledged += 1;
        self.ack_us.get_or_insert(now_us + ACK_DELAY_US);
        // The sender is to know soon what is missing, and what it need not send again.
        self.ack_now |= number != self.missing || self.unacknowledged >= ACK_EVERY;
        if number >= self.next + WINDOW as u64 {
            return Err(Refused::Beyond(unit));
        }
        let place = &mut self.held[number as usize % WINDOW];
        if number < self.missing || place.is_some() {
            return Err(Refused::Duplicate(unit));
        }
        *place = Some(unit);
        self.seen = self.seen.max(number + 1);
        self.advance();
        Ok(())
    }

    /// The next unit in order, if it has come.
    pub(in crate::link) fn take(&mut self) -> Option<Held> {
        if self.next == self.missing {
            return None;
        }
        let unit = self.held[self.next as usize % WINDOW].take();
        self.next += 1;
        // The sender may be waiting for room.
        self.ack_now |= self.limit() >= self.told_limit + WINDOW as u64 / 2;
        unit
    }

    /// Whether a unit can be taken.
    pub(in crate::link) fn is_ready(&self) -> bool {
        self.next < self.missing
    }

    /// Unit `number` came another way, after everything that was ready was taken. `Ok(false)`: it has been taken
    /// before. `Err`: there is a hole before it.
    pub(in crate::link) fn supply(&mut self, number: u64) -> Result<bool, ()> {
        if number < self.next {
            return Ok(false);
        }
        if number != self.missing || self.next != self.missing {
            return Err(());
        }
        self.next += 1;
        self.missing += 1;
        self.seen = self.seen.max(self.missing);
        self.advance();
        Ok(true)
    }

    /// Number of the next unit to hand on.
    pub(in crate::link) fn next(&self) -> u64 {
        self.next
    }

    /// Lowest number that has not come.
    pub(in crate::link) fn missing(&self) -> u64 {
        self.missing
    }

    /// Units from [`Self::missing`] on that find room.
    pub(in crate::link) fn window(&self) -> u16 {
        (self.limit() - self.missing) as u16
    }

    /// Bit n: unit `missing + 1 + n` has come.
    pub(in crate::link) fn received(&self) -> u64 {
        if self.seen <= self.missing + 1 {
            return 0;
        }
        (0..64).fold(0, |bits, n| {
            bits | u64::from(self.has(self.missing + 1 + n)) << n
        })
    }

    /// What [`Self::received`] has no room for, as bits in bytes; gives how many bytes.
    pub(in crate::link) fn further(&self, out: &mut [u8; FURTHER_BYTES]) -> usize {
        let from = self.missing + 65;
        let bits = self.seen.saturating_sub(from) as usize;
        let bytes = bits.div_ceil(8).min(FURTHER_BYTES);
        for (byte, number) in out[..bytes].iter_mut().zip((from..).step_by(8)) {
            *byte = (0..8).fold(0, |b, n| b | u8::from(self.has(number + n)) << n);
        }
        bytes
    }

    /// Whether an acknowledgement is to be sent, though nothing else is.
    pub(in crate::link) fn wants_ack(&self, now_us: u64) -> bool {
        self.ack_now || self.ack_us.is_some_and(|at| at <= now_us)
    }

    /// The peer asks where this end stands.
    pub(in crate::link) fn asked(&mut self) {
        self.ack_now = true;
    }

    /// A datagram with the acknowledgement is on its way.
    pub(in crate::link) fn told(&mut self) {
        self.unacknowledged = 0;
        self.ack_now = false;
        self.ack_us = None;
        self.told_limit = self.limit();
    }

    /// When an acknowledgement is due.
    pub(in crate::link) fn deadline_us(&self) -> Option<u64> {
        if self.ack_now { Some(0) } else { self.ack_us }
    }

    fn limit(&self) -> u64 {
        self.next + WINDOW as u64
    }

    fn has(&self, number: u64) -> bool {
        number < self.seen && self.held[number as usize % WINDOW].is_some()
    }

    fn advance(&mut self) {
        while self.missing < self.seen && self.held[self.missing as usize % WINDOW].is_some() {
            self.missing += 1;
        }
    }
}
