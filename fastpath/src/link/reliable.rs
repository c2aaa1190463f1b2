//! Messages over datagrams that may be lost, repeated, reordered and damaged: all of them, once, in order.
//!
//! Invariants: a message of the peer is handed on once and in order, or not at all; what was pushed is kept until the peer
//! has it; memory is bounded and taken in `new`.
//!
//! Sans-IO: time and datagrams in, datagrams and units out. No clock, no socket.

mod receiver;
mod rtt;
mod sender;
#[cfg(test)]
mod tests;

pub(super) use receiver::WINDOW as RECEIVE_WINDOW;
pub(super) use receiver::{Held, Receiver, Refused};
pub(super) use sender::{RING_BYTES, Sender, UNITS_MAX};

use super::datagram::{DropCause, HEADER_BYTES, Header, Kind};
use super::port::Slot;
use receiver::FURTHER_BYTES;

/// Datagrams that were not used, by cause.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) truncated: u64,
    pub(super) foreign: u64,
    pub(super) damaged: u64,
    pub(super) duplicate: u64,
    pub(super) beyond: u64,
}

/// A datagram to send.
#[derive(Debug)]
pub(super) struct Outgoing<'a> {
    pub(super) head: [u8; HEADER_BYTES],
    pub(super) payload: &'a [u8],
}

/// What a datagram was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing to use.
    Dropped,
    /// Data or an acknowledgement.
    Peer,
    /// The peer asks whether the path works.
    Probe(u64),
    /// It works.
    ProbeAnswer(u64),
}

/// Both directions at one end.
#[derive(Debug)]
pub(super) struct Reliable {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    /// What the peer must write into its datagrams.
    our_key: u64,
    peer_key: u64,
    further: [u8; FURTHER_BYTES],
    pub(super) dropped: Dropped,
}

impl Reliable {
    /// An end with a random key.
    pub(super) fn new(our_key: u64) -> Self {
        Self {
            sender: Sender::new(),
            receiver: Receiver::new(),
            our_key,
            peer_key: 0,
            further: [0; FURTHER_BYTES],
            dropped: Dropped::default(),
        }
    }

    pub(super) fn our_key(&self) -> u64 {
        self.our_key
    }

    /// Sets the key that the peer chose.
    pub(super) fn set_peer_key(&mut self, key: u64) {
        self.peer_key = key;
    }

    /// A datagram of `bytes` lies in `slot` of transport `port`. A slot that is not kept comes back.
    pub(super) fn handle(
        &mut self,
        now_us: u64,
        port: usize,
        slot: Slot,
        bytes: &[u8],
    ) -> (Heard, Option<Slot>) {
        let (header, payload) = match Header::open(bytes, self.our_key) {
            Ok(opened) => opened,
            Err(why) => {
                *match why {
                    DropCause::Truncated => &mut self.dropped.truncated,
                    DropCause::Foreign => &mut self.dropped.foreign,
                    DropCause::Damaged => &mut self.dropped.damaged,
                } += 1;
                return (Heard::Dropped, Some(slot));
            }
        };
        match header.kind {
            Kind::Probe => return (Heard::Probe(header.number), Some(slot)),
            Kind::ProbeAnswer => return (Heard::ProbeAnswer(header.number), Some(slot)),
            Kind::Data | Kind::Ack => {}
        }
        let further = match header.kind {
            Kind::Ack => payload,
            _ => &[],
        };
        let (next, window) = (header.next, header.window);
        let believed = self
            .sender
            .acknowledge(now_us, next, header.received, further, window);
        if !believed {
            self.dropped.foreign += 1;
            return (Heard::Dropped, Some(slot));
        }
        self.sender.heard();
        if header.ask {
            self.receiver.asked();
        }
        if header.kind == Kind::Ack {
            return (Heard::Peer, Some(slot));
        }
        let unit = Held {
            port,
            slot,
            start: HEADER_BYTES,
            end: HEADER_BYTES + payload.len(),
            more: header.more,
        };
        let refused = match self.receiver.accept(now_us, header.number, unit) {
            Ok(()) => return (Heard::Peer, None),
            Err(refused) => refused,
        };
        let unit = match refused {
            Refused::Duplicate(unit) => {
                self.dropped.duplicate += 1;
                unit
            }
            Refused::Beyond(unit) => {
                self.dropped.beyond += 1;
                unit
            }
        };
        (Heard::Peer, Some(unit.slot))
    }

    /// The next datagram to send: a unit, else an acknowledgement that is due.
    pub(super) fn poll(&mut self, now_us: u64) -> Option<Outgoing<'_>> {
        if let Some(unit) = self.sender.poll(now_us) {
            let header = self.header(Kind::Data, unit.number, unit.more, false);
            self.receiver.told();
            let payload = self.sender.bytes(unit.bytes);
            let head = header.seal(payload);
            return Some(Outgoing { head, payload });
        }
        let ask = self.sender.poll_ask();
        if !ask && !self.receiver.wants_ack(now_us) {
            return None;
        }
        let header = self.header(Kind::Ack, 0, false, ask);
        let len = self.receiver.further(&mut self.further);
        self.receiver.told();
        let payload = &self.further[..len];
        let head = header.seal(payload);
        Some(Outgoing { head, payload })
    }

    /// A question or an answer about the path.
    pub(super) fn probe(&self, kind: Kind, number: u64, padding: &[u8]) -> [u8; HEADER_BYTES] {
        self.header(kind, number, false, false).seal(padding)
    }

    /// When something is due.
    pub(super) fn deadline_us(&self) -> Option<u64> {
        let deadlines = [self.sender.deadline_us(), self.receiver.deadline_us()];
        deadlines.into_iter().flatten().min()
    }

    /// Time has passed.
    pub(super) fn handle_timeout(&mut self, now_us: u64) {
        self.sender.handle_timeout(now_us);
    }

    fn header(&self, kind: Kind, number: u64, more: bool, ask: bool) -> Header {
        Header {
            kind,
            to: self.peer_key,
            number,
            next: self.receiver.missing(),
            received: self.receiver.received(),
            window: self.receiver.window(),
            more,
            ask,
        }
    }
}
