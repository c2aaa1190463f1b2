//! What a peer said last of what it has received, so that its segments say it when they are delivered again (rule 5).
//!
//! Invariant: a segment that was renewed has right checksums where it had them before.
//!
//! A sender puts its present ACK, window and timestamps into whatever it sends again. Guests rely on it: smoltcp drops a
//! segment, payload and all, whose ACK is older than one that it had before, and Linux one whose timestamp is (PAWS) or
//! whose ACK is older by more than a window (RFC 5961 section 5.2).

use crate::seq;
use crate::wire::Tcp;
use crate::wire::tcp::{ACK, RST, SYN};
use crate::xlate::Offsets;

/// The fields of a segment that tell what its sender has received, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LastHeard {
    ack: u32,
    window: u16,
    /// TSval and TSecr.
    timestamps: Option<(u32, u32)>,
}

impl LastHeard {
    /// What this segment tells. A SYN tells nothing that other segments could repeat: its window is not scaled (RFC 7323
    /// section 2.2).
    pub(super) fn of(header: &[u8], tcp: &Tcp) -> Option<Self> {
        (tcp.has(ACK) && tcp.flags & (SYN | RST) == 0).then(|| Self {
            ack: tcp.ack,
            window: tcp.window(header),
            timestamps: tcp.timestamps(header),
        })
    }

    /// Whether its sender had received less then.
    pub(super) fn is_before(&self, other: &Self) -> bool {
        seq::lt(self.ack, other.ack)
    }

    /// Translates it for the guest, as the segment itself is.
    pub(super) fn inbound(&mut self, offsets: Offsets) {
        self.ack = self.ack.wrapping_sub(offsets.seq);
        self.timestamps = self
            .timestamps
            .map(|(tsval, tsecr)| (tsval, tsecr.wrapping_sub(offsets.ts)));
    }

    /// Makes an earlier segment say it. What that one reported as received out of order may have become old news, so it
    /// reports nothing of that kind any more.
    pub(super) fn renew(&self, header: &mut [u8], tcp: &mut Tcp) {
        if !tcp.has(ACK) || tcp.flags & (SYN | RST) != 0 {
            return;
        }
        tcp.set_ack(header, self.ack);
        tcp.set_window(header, self.window);
        if let Some((tsval, tsecr)) = self.timestamps {
            tcp.set_tsval(header, tsval);
            tcp.set_tsecr(header, tsecr);
        }
        tcp.blank_sack(header);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Direction;
    use crate::testing::{Segment, Side, checksums_are_right};
    use crate::wire;
    use alloc::vec::Vec;

    fn parse(bytes: &[u8]) -> Tcp {
        let packet = wire::parse(bytes, bytes.len(), Direction::ToGuest);
        packet.tcp.expect("TCP")
    }

    fn from_peer(side: Side, ack: u32) -> Segment {
        Segment::new(side).to_guest().seq(10).ack(ack)
    }

    /// With a window that differs from that of [`Segment`].
    fn with_window(segment: &Segment, window: u16) -> Vec<u8> {
        let mut bytes = segment.bytes();
        parse(&bytes).set_window(&mut bytes, window);
        bytes
    }

    #[test]
    fn rule_5_a_renewed_segment_says_what_the_peer_said_last_and_carries_what_it_carried() {
        for side in [Side::V4, Side::V6] {
            let last = with_window(&from_peer(side, 900).timestamps(77, 50), 17);
            let heard = LastHeard::of(&last, &parse(&last)).expect("it tells something");
            // An odd number of no-operations: no option is aligned.
            for padding in [&[1, 1][..], &[1, 1, 1]] {
                let old = from_peer(side, 100).payload(b"payload").option(padding);
                let old = old.timestamps(70, 40).sack(&[(300, 400), (500, 600)]);
                let mut bytes = old.bytes();
                let mut tcp = parse(&bytes);
                heard.renew(&mut bytes, &mut tcp);
                assert!(checksums_are_right(&bytes));
                let again = parse(&bytes);
                assert_eq!(again, tcp);
                assert_eq!((again.seq, again.ack, again.window(&bytes)), (10, 900, 17));
                assert_eq!(again.timestamps(&bytes), Some((77, 50)));
                assert_eq!(again.sack_blocks(&bytes).count(), 0);
                let at = usize::from(again.payload_at);
                assert_eq!(&bytes[at..at + 7], b"payload");
            }
        }
    }

    #[test]
    fn a_syn_says_nothing_to_repeat_and_repeats_nothing() {
        let syn = from_peer(Side::V4, 900).flags(SYN | ACK).bytes();
        assert_eq!(LastHeard::of(&syn, &parse(&syn)), None);
        let last = from_peer(Side::V4, 950).bytes();
        let heard = LastHeard::of(&last, &parse(&last)).expect("it tells something");
        let mut again = syn.clone();
        heard.renew(&mut again, &mut parse(&syn));
        assert_eq!(again, syn);
    }

    #[test]
    fn rule_3_what_was_heard_is_translated_as_the_segment_is() {
        let offsets = Offsets { seq: 1000, ts: 5 };
        let mut bytes = from_peer(Side::V4, 5000).timestamps(7, 90).bytes();
        let mut heard = LastHeard::of(&bytes, &parse(&bytes)).expect("it tells something");
        heard.inbound(offsets);
        let mut tcp = parse(&bytes);
        offsets.inbound(&mut bytes, &mut tcp);
        assert_eq!(LastHeard::of(&bytes, &tcp), Some(heard));
        assert_eq!((heard.ack, heard.timestamps), (4000, Some((7, 85))));
    }
}
