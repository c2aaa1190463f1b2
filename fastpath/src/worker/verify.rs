//! Whether the TCP or UDP checksum of a frame for the guest holds (`VIRTIO_NET_F_GUEST_CSUM`, virtio 1.3 section
//! 5.1.6.4.1).
//!
//! Invariants: `true` is said only of a whole packet whose checksum has been computed here, over every byte of it; what
//! both guests of a pair receive alike is judged alike.
//!
//! Does not judge fragments, packets with extension headers, or datagrams without a checksum: the guest does.

use colo_compare::wire::checksum::OnesSum;

const ETHERNET_BYTES: usize = 14;
const TAG_BYTES: usize = 4;
const IPV6_BYTES: usize = 40;
const VLAN: u16 = 0x8100;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Whether the frame is a TCP or UDP packet whose checksum holds.
pub(super) fn checksum_holds(frame: &[u8]) -> bool {
    packet_of(frame).is_some_and(|(kind, packet)| {
        match kind {
            IPV4 => ipv4(packet),
            IPV6 => ipv6(packet),
            _ => None,
        }
        .is_some_and(|segment| segment.holds())
    })
}

/// An L4 segment and what of the IP header its checksum covers.
struct Segment<'a> {
    addresses: &'a [u8],
    protocol: u8,
    bytes: &'a [u8],
}

impl Segment<'_> {
    fn holds(&self) -> bool {
        let checksum_at = match self.protocol {
            TCP => 16,
            UDP => 6,
            _ => return false,
        };
        let none = self.protocol == UDP && self.bytes.get(6..8) == Some(&[0, 0]);
        if none || self.bytes.len() < checksum_at + 2 {
            return false;
        }
        // RFC 9293 section 3.1, RFC 768, RFC 8200 section 8.1: the same words for both versions of IP.
        let mut sum = OnesSum::default();
        sum.add(self.addresses);
        sum.add(&(self.bytes.len() as u32).to_be_bytes());
        sum.add(&[0, self.protocol]);
        sum.add(self.bytes);
        // What a checksum that holds makes of it.
        sum.word() == 0xffff
    }
}

/// Type and contents of an Ethernet frame with one VLAN tag at most.
fn packet_of(frame: &[u8]) -> Option<(u16, &[u8])> {
    let kind_at = |at: usize| {
        let bytes = frame.get(at - 2..at)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    };
    let at = match kind_at(ETHERNET_BYTES)? {
        VLAN => ETHERNET_BYTES + TAG_BYTES,
        _ => ETHERNET_BYTES,
    };
    Some((kind_at(at)?, frame.get(at..)?))
}

fn ipv4(packet: &[u8]) -> Option<Segment<'_>> {
    let header_len = usize::from(packet.first()? & 0xf) * 4;
    let header = packet.get(..header_len).filter(|h| h.len() >= 20)?;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    // Neither an offset nor more to come.
    let is_whole = u16::from_be_bytes([header[6], header[7]]) & 0x3fff == 0;
    if header[0] >> 4 != 4 || !is_whole {
        return None;
    }
    Some(Segment {
        addresses: &header[12..20],
        protocol: header[9],
        bytes: packet.get(header_len..total)?,
    })
}

fn ipv6(packet: &[u8]) -> Option<Segment<'_>> {
    let header = packet.get(..IPV6_BYTES).filter(|h| h[0] >> 4 == 6)?;
    let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
    Some(Segment {
        addresses: &header[8..40],
        protocol: header[6],
        bytes: packet.get(IPV6_BYTES..IPV6_BYTES + payload)?,
    })
}

#[cfg(test)]
mod tests {
    use colo_compare::testing::{Segment as Tcp, Side, udp};

    use super::*;

    fn tagged(frame: &[u8]) -> Vec<u8> {
        [&frame[..12], &[0x81, 0, 0, 7], &frame[12..]].concat()
    }

    fn samples() -> Vec<Vec<u8>> {
        let payload: Vec<u8> = (0..999).map(|n| (n * 31 + 7) as u8).collect();
        [Side::V4, Side::V6]
            .into_iter()
            .flat_map(|side| {
                let data = Tcp::new(side).to_guest().payload(&payload);
                let timed = Tcp::new(side).to_guest().timestamps(1, 2);
                [
                    data.bytes(),
                    timed.bytes(),
                    udp(side, true, 53, 40_000, &payload),
                    udp(side, true, 53, 40_000, b"x"),
                ]
            })
            .collect()
    }

    #[test]
    fn whole_packets_hold_and_every_flipped_bit_of_a_segment_is_seen() {
        for frame in samples() {
            assert!(checksum_holds(&frame));
            let padded = [&frame[..], &[1; 20]].concat();
            assert!(checksum_holds(&padded), "padding is not covered");
            assert!(checksum_holds(&tagged(&frame)));
            let segment_at = if frame[12..14] == [8, 0] { 34 } else { 54 };
            for at in segment_at..frame.len() {
                let mut bad = frame.clone();
                bad[at] ^= 0x10;
                assert!(!checksum_holds(&bad), "byte {at}");
                assert!(!checksum_holds(&tagged(&bad)), "byte {at}");
            }
            for len in 0..frame.len() {
                assert!(!checksum_holds(&frame[..len]), "cut to {len}");
            }
        }
    }

    #[test]
    fn what_is_not_computed_is_not_vouched_for() {
        let frame = udp(Side::V4, true, 53, 40_000, b"payload");
        let mut fragment = frame.clone();
        fragment[20] = 0x20;
        let mut later = frame.clone();
        later[21] = 1;
        let mut without = frame.clone();
        without[40..42].fill(0);
        let mut icmp = frame.clone();
        icmp[23] = 1;
        for frame in [fragment, later, without, icmp, vec![0xff; 60], Vec::new()] {
            assert!(!checksum_holds(&frame));
        }
        let mut icmp = udp(Side::V6, true, 53, 40_000, b"payload");
        icmp[20] = 58;
        assert!(!checksum_holds(&icmp));
    }
}
