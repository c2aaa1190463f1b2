//! The TCP segment that an ICMP error quotes (RFC 792, RFC 4443): what the receiver of the error
//! sent, as far as the reporting host repeats it.
//!
//! Invariants: all offsets lie within the header bytes that were checked at construction; a
//! rewrite leaves both checksums right that were right before: that of the error, and that of the
//! quoted segment where it is quoted.
//!
//! Does not touch the quoted timestamps: no stack reads them.

use super::checksum::{be16, be32, replace_u32};
use super::{Network, Packet, ipv4_at, ipv6_at, skip_extensions};
use crate::flow::{FlowKey, Protocol};

/// Destination unreachable, time exceeded, parameter problem (RFC 792).
const ICMP_ERRORS: [u8; 3] = [3, 11, 12];
/// Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443 section 3).
const ICMPV6_ERRORS: [u8; 4] = [1, 2, 3, 4];
const TCP: u8 = 6;

/// A checked quotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quoted {
    /// The connection, whose guest is the receiver of the error.
    pub(crate) key: FlowKey,
    icmp_at: u16,
    tcp_at: u16,
    /// The quoted segment's checksum is there.
    has_checksum: bool,
}

impl Quoted {
    /// Looks for the quotation in an error for the guest.
    pub(crate) fn parse(header: &[u8], packet: &Packet) -> Option<Self> {
        let icmp_at = usize::from(packet.l4);
        // The view of an ICMP packet has checked that its type is there.
        let is_error = match packet.key.protocol() {
            Protocol::Icmp => ICMP_ERRORS.contains(&header[icmp_at]),
            Protocol::Icmpv6 => ICMPV6_ERRORS.contains(&header[icmp_at]),
            _ => false,
        };
        let end = usize::from(packet.end).min(header.len());
        if !is_error {
            return None;
        }
        let quoted = &header[..end];
        let mut key = FlowKey::bare(Protocol::Tcp, packet.key.vlan());
        let tcp_at = match packet.network {
            Network::V4 => read_ipv4(quoted, icmp_at + 8, &mut key)?,
            _ => read_ipv6(quoted, icmp_at + 8, &mut key)?,
        };
        if tcp_at + 8 > end {
            return None;
        }
        let key = key.with_ports(be16(header, tcp_at), be16(header, tcp_at + 2));
        Some(Self {
            key,
            icmp_at: icmp_at as u16,
            tcp_at: tcp_at as u16,
            has_checksum: tcp_at + 20 <= end,
        })
    }

    /// The quoted sequence number.
    pub(crate) fn seq(&self, header: &[u8]) -> u32 {
        be32(header, usize::from(self.tcp_at) + 4)
    }

    /// Rewrites the quoted sequence number.
    pub(crate) fn set_seq(&self, header: &mut [u8], seq: u32) {
        let (icmp_at, tcp_at) = (usize::from(self.icmp_at), usize::from(self.tcp_at));
        let replace = |header: &mut [u8], at: usize, new: u32| {
            replace_u32(header, at, new, icmp_at, icmp_at + 2);
        };
        if self.has_checksum {
            let mut segment = [0; 6];
            segment[..4].copy_from_slice(&header[tcp_at + 4..tcp_at + 8]);
            segment[4..].copy_from_slice(&header[tcp_at + 16..tcp_at + 18]);
            replace_u32(&mut segment, 0, seq, 0, 4);
            let urgent = be16(header, tcp_at + 18);
            let checksum = u32::from(be16(&segment, 4));
            replace(header, tcp_at + 16, checksum << 16 | u32::from(urgent));
        }
        replace(header, tcp_at + 4, seq);
    }
}

/// Puts the quoted addresses into the key and gives where the segment starts.
fn read_ipv4(header: &[u8], at: usize, key: &mut FlowKey) -> Option<usize> {
    if at + 20 > header.len() || header[at] >> 4 != 4 {
        return None;
    }
    let header_len = usize::from(header[at] & 15) * 4;
    let offset = be16(header, at + 6) & 0x1fff;
    if header_len < 20 || offset != 0 || header[at + 9] != TCP {
        return None;
    }
    key.set_ipv4(ipv4_at(header, at + 12), ipv4_at(header, at + 16));
    Some(at + header_len)
}

fn read_ipv6(header: &[u8], at: usize, key: &mut FlowKey) -> Option<usize> {
    if at + 40 > header.len() || header[at] >> 4 != 6 {
        return None;
    }
    let (next, tcp_at, fragment_at) =
        skip_extensions(header, header[at + 6], at + 40, header.len())?;
    let is_first = fragment_at == 0 || be16(header, fragment_at + 2) & 0xfff8 == 0;
    if next != TCP || !is_first {
        return None;
    }
    key.set_ipv6(ipv6_at(header, at + 8), ipv6_at(header, at + 24));
    Some(tcp_at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Direction;
    use crate::testing::{Segment, Side, checksums_are_right, ip_frame};
    use crate::wire::checksum::ones_sum;
    use crate::wire::parse;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn segment(side: Side, seq: u32) -> Vec<u8> {
        let segment = Segment::new(side).seq(seq).ack(77).timestamps(5, 6);
        segment.payload(b"too long for the path").bytes()
    }

    /// An error of that type about the first `quoted` bytes of a frame's packet.
    fn error(side: Side, kind: u8, sent: &[u8], quoted: usize) -> Vec<u8> {
        let mut message = Vec::from([kind, 0, 0, 0, 0, 0, 5, 0]);
        message.extend_from_slice(&sent[14..14 + quoted]);
        let protocol = if side == Side::V4 { 1 } else { 58 };
        ip_frame(side, true, protocol, 64, 0, &message)
    }

    fn read(bytes: &[u8]) -> Option<Quoted> {
        Quoted::parse(bytes, &parse(bytes, bytes.len(), Direction::ToGuest))
    }

    #[test]
    fn the_quoted_connection_is_found_and_rewritten() {
        for (side, kind, ip) in [(Side::V4, 3, 20), (Side::V6, 2, 40)] {
            let sent = segment(side, 5000);
            let all = sent.len() - 14;
            for quoted in [ip + 8, ip + 17, ip + 20, all] {
                let mut bytes = error(side, kind, &sent, quoted);
                let found = read(&bytes).expect("quotes TCP");
                assert_eq!(
                    found.key,
                    parse(&sent, sent.len(), Direction::FromGuest).key
                );
                assert_eq!(found.seq(&bytes), 5000);
                found.set_seq(&mut bytes, u32::MAX - 3);
                assert!(checksums_are_right(&bytes), "{side:?} {quoted}");
                let right = if quoted == ip + 17 { ip + 8 } else { quoted };
                let mut expected = segment(side, u32::MAX - 3);
                if right < quoted {
                    // Half a checksum says nothing, so it stays.
                    expected[14 + right..14 + quoted]
                        .copy_from_slice(&sent[14 + right..14 + quoted]);
                }
                assert_eq!(bytes[bytes.len() - quoted..], expected[14..14 + quoted]);
            }
        }
    }

    #[test]
    fn what_quotes_no_tcp_header_is_left_alone() {
        let sent = segment(Side::V4, 1);
        for kind in 0..=255 {
            let found = read(&error(Side::V4, kind, &sent, 28)).is_some();
            assert_eq!(found, [3, 11, 12].contains(&kind), "type {kind}");
            let sent = segment(Side::V6, 1);
            let found = read(&error(Side::V6, kind, &sent, 48)).is_some();
            assert_eq!(found, [1, 2, 3, 4].contains(&kind), "type {kind}");
        }
        assert_eq!(
            read(&error(Side::V4, 3, &sent, 27)),
            None,
            "cut before the number"
        );
        let changed = |at: usize, byte: u8| {
            let mut sent = sent.clone();
            sent[14 + at] = byte;
            read(&error(Side::V4, 3, &sent, 28))
        };
        assert_eq!(changed(9, 17), None, "UDP");
        assert_eq!(changed(7, 1), None, "not the first fragment");
        assert_eq!(changed(0, 0x44), None, "a header too short");
        assert_eq!(changed(0, 0x4f), None, "options that are not there");
        assert!(changed(6, 0x20).is_some(), "the first fragment");
        assert_eq!(read(&sent), None, "not an error");
    }

    #[test]
    fn extension_headers_of_the_quoted_packet_are_followed() {
        let sent = segment(Side::V6, 9);
        let with_fragment_header = |offset: u16| {
            let mut packet = sent.clone();
            packet[14 + 6] = 44;
            let offset = (offset << 3 | 1).to_be_bytes();
            let fragment = [6, 0, offset[0], offset[1], 0, 0, 0, 7];
            packet.splice(54..54, fragment);
            error(Side::V6, 1, &packet, 56)
        };
        assert_eq!(
            read(&with_fragment_header(0)).map(|q| q.tcp_at),
            Some(54 + 8 + 48)
        );
        assert_eq!(read(&with_fragment_header(1)), None);
    }

    proptest! {
        #[test]
        fn any_quotation_is_taken_without_a_panic(
            mut quoted in proptest::collection::vec(any::<u8>(), 0..120),
            v6: bool,
            kind in 0u8..13,
            next in prop_oneof![Just(6u8), Just(44), Just(0), Just(51), any::<u8>()],
        ) {
            let side = if v6 { Side::V6 } else { Side::V4 };
            if let [first, ..] = &mut quoted[..] {
                *first = if v6 { 0x60 } else { 0x45 };
            }
            if let Some(byte) = quoted.get_mut(if v6 { 6 } else { 9 }) {
                *byte = next;
            }
            let mut message = Vec::from([kind, 0, 0, 0, 0, 0, 0, 0]);
            message.extend_from_slice(&quoted);
            let protocol = if v6 { 58 } else { 1 };
            let mut bytes = ip_frame(side, true, protocol, 64, 0, &message);
            let l4 = if v6 { 54 } else { 34 };
            // All zero sums have two names.
            prop_assume!(ones_sum(&bytes[l4 + 4..]) != 0);
            if let Some(found) = read(&bytes) {
                found.set_seq(&mut bytes, 0x1234_5678);
                prop_assert!(checksums_are_right(&bytes));
            }
        }
    }
}
