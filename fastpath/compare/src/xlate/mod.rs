//! Translations of TCP numbers between a guest and whoever it talks to (rules 1 to 3).
//!
//! Invariant: no entry means identity.
//!
//! The client-facing table is in `client`; the pair table, which a commit drops, is the
//! secondary's.

mod client;

use crate::seq;
use crate::wire::Quoted;
use crate::wire::tcp::{ACK, Tcp};
pub(crate) use client::{ClientTable, Entry, latest_ts};

/// How far behind its initial number the peer can be before it was acknowledged for the first time
/// by what this host knows (rule 4 keeps the rest on both): more than an unscaled window.
const FIRST_WINDOW: u32 = 1 << 18;

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

    /// Translates what an ICMP error for the guest quotes: a segment that the guest sent.
    pub(crate) fn inbound_quoted(self, header: &mut [u8], quoted: &Quoted) {
        if self.seq != 0 {
            quoted.set_seq(header, quoted.seq(header).wrapping_sub(self.seq));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Direction;
    use crate::testing::{Segment, Side, checksums_are_right};
    use crate::wire::{self, Packet};

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
}
