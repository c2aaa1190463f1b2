//! What of a frame counts when two guests' output is compared, byte by byte and slowly.
//!
//! Invariant: written from the list in the documentation of what may rightly differ; shares no
//! code with the comparator but the header offsets of the parsed view.

use colo_compare::Protocol;
use colo_compare::wire::tcp::{FIN, URG};
use colo_compare::wire::{Network, Packet};

/// The frame without padding, and with everything zero that may rightly differ.
pub fn blank(frame: &[u8], packet: &Packet) -> Vec<u8> {
    let mut bytes = frame[..usize::from(packet.end)].to_vec();
    let l4 = usize::from(packet.l4);
    blank_network(&mut bytes, packet);
    if !matches!(packet.network, Network::V4 | Network::V6) {
        return bytes;
    }
    let checksum_at = match packet.key.protocol() {
        Protocol::Udp => l4 + 6,
        Protocol::Icmp | Protocol::Icmpv6 => l4 + 2,
        _ => bytes.len(),
    };
    zero(&mut bytes, checksum_at, 2);
    bytes
}

fn blank_network(bytes: &mut [u8], packet: &Packet) {
    let l3 = usize::from(packet.l3);
    match packet.network {
        Network::V4 => {
            bytes[l3 + 1] = without_mark(bytes[l3 + 1], 0);
            zero(bytes, l3 + 4, 2);
            zero(bytes, l3 + 10, 2);
        }
        Network::V6 => {
            bytes[l3 + 1] = without_mark(bytes[l3 + 1], 4) & 0xf0;
            zero(bytes, l3 + 2, 2);
            if packet.fragment_header != 0 {
                zero(bytes, usize::from(packet.fragment_header) + 4, 4);
            }
        }
        Network::Arp | Network::Other => {}
    }
}

/// The ECN mark "congestion experienced" (3) stands for ECT(0) (2), which it may have replaced.
fn without_mark(byte: u8, shift: u8) -> u8 {
    if byte >> shift & 3 == 3 {
        byte & !(1 << shift)
    } else {
        byte
    }
}

fn zero(bytes: &mut [u8], at: usize, n: usize) {
    bytes.iter_mut().skip(at).take(n).for_each(|byte| *byte = 0);
}

/// What counts of the headers before the transport's, for packets that need not have the same
/// length; and where urgent data ends.
pub fn header_signature(frame: &[u8], packet: &Packet) -> (Vec<u8>, Option<u32>) {
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let mut bytes = frame[..l4].to_vec();
    blank_network(&mut bytes, packet);
    // ECN differs with segments that are sent again, the length with segmentation; fragments have the ECN of their datagram.
    let ecn: u8 = if packet.tcp.is_some() { 3 } else { 0 };
    match packet.network {
        Network::V4 => {
            bytes[l3 + 1] &= !ecn;
            zero(&mut bytes, l3 + 2, 2);
            if packet.key.protocol() == Protocol::Fragment {
                zero(&mut bytes, l3 + 6, 2);
            }
        }
        Network::V6 => {
            bytes[l3 + 1] &= !(ecn << 4);
            zero(&mut bytes, l3 + 4, 2);
            if packet.fragment_header != 0 {
                // Place and flag, and the reserved byte before them, which receivers ignore.
                zero(&mut bytes, usize::from(packet.fragment_header) + 1, 3);
            }
        }
        Network::Arp | Network::Other => {}
    }
    let urgent = packet.tcp.filter(|tcp| tcp.has(URG));
    let urgent = urgent.map(|tcp| tcp.seq.wrapping_add(u32::from(tcp.urgent)));
    (bytes, urgent)
}

/// What stands in the place of a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unit {
    /// Payload.
    Byte(u8),
    /// The end of the stream, or of the datagram.
    End,
}

/// Every payload byte with its place: in sequence space for TCP, from the start of the datagram for
/// a fragment.
pub fn stream_bytes(frame: &[u8], packet: &Packet) -> Vec<(u32, Unit)> {
    let (l3, end) = (usize::from(packet.l3), usize::from(packet.end));
    let word = |at: usize| u32::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let (mut place, from, ends) = match (packet.tcp, packet.network) {
        (Some(tcp), _) => (tcp.payload_seq(), usize::from(tcp.payload_at), tcp.has(FIN)),
        (None, Network::V4) => {
            let flags = word(l3 + 6);
            (
                (flags & 0x1fff) * 8,
                usize::from(packet.l4),
                flags & 0x2000 == 0,
            )
        }
        (None, _) => {
            let flags = word(usize::from(packet.fragment_header) + 2);
            (flags & 0xfff8, usize::from(packet.l4), flags & 1 == 0)
        }
    };
    let mut units = Vec::new();
    for byte in &frame[from..end] {
        units.push((place, Unit::Byte(*byte)));
        place = place.wrapping_add(1);
    }
    if ends {
        units.push((place, Unit::End));
    }
    units
}
