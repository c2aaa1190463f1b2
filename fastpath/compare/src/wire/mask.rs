//! Which header bytes may rightly differ between two equal outputs.
//!
//! Ignored: IPv4 identification and header checksum, IPv6 flow label and fragment identification,
//! transport checksums, the ECN mark "congestion experienced", of TCP segments the ECN codepoint. Everything else counts.

use super::{Layout, Network};

/// ECN codepoint "congestion experienced" and the one it may replace (RFC 3168).
const ECN_CE: u8 = 3;
const ECN_ECT0: u8 = 2;

/// Blanks what does not count. `bytes` is the start of the frame, possibly cut short.
pub(crate) fn mask_ignored(bytes: &mut [u8], packet: &Layout) {
    let l3 = usize::from(packet.l3);
    match packet.network {
        Network::V4 => {
            mask_ecn(bytes, l3 + 1, 0);
            blank(bytes, l3 + 4, 2);
            blank(bytes, l3 + 10, 2);
        }
        Network::V6 => {
            mask_ecn(bytes, l3 + 1, 4);
            if let Some(byte) = bytes.get_mut(l3 + 1) {
                *byte &= 0xf0;
            }
            blank(bytes, l3 + 2, 2);
            if packet.fragment_header != 0 {
                blank(bytes, usize::from(packet.fragment_header) + 4, 4);
            }
        }
        Network::Arp | Network::Other => return,
    }
    let l4 = usize::from(packet.l4);
    if packet.sum_at != 0 {
        blank(bytes, l4 + usize::from(packet.sum_at), 2);
    }
}

fn mask_ecn(bytes: &mut [u8], at: usize, shift: u8) {
    if let Some(byte) = bytes.get_mut(at)
        && *byte >> shift & 3 == ECN_CE
    {
        *byte = *byte & !(3 << shift) | ECN_ECT0 << shift;
    }
}

fn blank(bytes: &mut [u8], at: usize, len: usize) {
    let end = (at + len).min(bytes.len());
    if at < end {
        bytes[at..end].fill(0);
    }
}

/// The same question for untagged IPv4 without options, in four words.
#[inline(always)]
fn plain_headers_agree(a: &[u8], b: &[u8]) -> bool {
    let (Some(a), Some(b)) = (a.first_chunk::<24>(), b.first_chunk::<24>()) else {
        return false;
    };
    let word = |bytes: &[u8; 24], at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_be_bytes(word)
    };
    let differing = |at: usize| word(a, at) ^ word(b, at);
    // Addresses, EtherType; DSCP and "do not fragment"; TTL and protocol.
    let counted = 0x00fc_0000_0000_ffff;
    differing(0) | differing(8) & !0xff | differing(14) & counted | differing(16) & 0xffff == 0
}

/// Compares what counts of the network headers of two TCP segments, or of two fragments, that need
/// not have the same length: addresses and ports are equal already, lengths differ with segmentation,
/// places and identifications with fragmentation. The ECN codepoint of segments does not count, because
/// retransmissions have none (RFC 3168, 6.1.5); a fragment has that of its datagram.
#[inline(always)]
pub(crate) fn header_difference(
    a: &[u8],
    a_packet: &Layout,
    b: &[u8],
    b_packet: &Layout,
) -> Option<u32> {
    if a_packet.is_plain() && b_packet.is_plain() && plain_headers_agree(a, b) {
        return None;
    }
    header_difference_of_any(a, a_packet, b, b_packet)
}

fn header_difference_of_any(
    a: &[u8],
    a_packet: &Layout,
    b: &[u8],
    b_packet: &Layout,
) -> Option<u32> {
    let (l3, l4) = (usize::from(a_packet.l3), usize::from(a_packet.l4));
    if (l3, l4) != (usize::from(b_packet.l3), usize::from(b_packet.l4)) {
        return Some(l3 as u32);
    }
    let differs = |at: usize, mask: u8| (a[at] ^ b[at]) & mask != 0;
    let flags = if a_packet.fragment.is_some() {
        0xc0
    } else {
        0xff
    };
    let fixed = match a_packet.network {
        // Ethernet addresses, DSCP, "do not fragment", TTL.
        Network::V4 => [(l3 + 1, 0xfc), (l3 + 6, flags), (l3 + 8, 0xff)],
        // Traffic class without ECN, hop limit.
        _ => [(l3, 0x0f), (l3 + 1, 0xc0), (l3 + 7, 0xff)],
    };
    let codepoint = |bytes: &[u8]| {
        let shift = if a_packet.network == Network::V4 {
            0
        } else {
            4
        };
        let mut byte = [bytes[l3 + 1]];
        mask_ecn(&mut byte, 0, shift);
        byte[0] >> shift & 3
    };
    let is_marked = a_packet.fragment.is_some() && codepoint(a) != codepoint(b);
    let options_at = if a_packet.network == Network::V4 {
        l3 + 20
    } else {
        l3 + 40
    };
    let options_end = match a_packet.fragment_header {
        0 => l4,
        at => usize::from(at),
    };
    let place = (0..12)
        .find(|at| differs(*at, 0xff))
        .or_else(|| {
            fixed
                .into_iter()
                .find(|(at, mask)| differs(*at, *mask))
                .map(|(at, _)| at)
        })
        .or(is_marked.then_some(l3 + 1))
        .or_else(|| (options_at..options_end).find(|at| differs(*at, 0xff)));
    place.map(|at| at as u32)
}
