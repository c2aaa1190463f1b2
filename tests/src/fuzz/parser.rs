//! Target `parser`: header views of any frame, both directions.
//!
//! Input: one byte of choices (bits 0 and 1: how much padding is added), then the frame.
//! Checked: no panic; offsets lie within the frame in order; the views agree with the bytes;
//! padding is not part of a packet; both directions of a flow have the same key.

use colo_compare::wire::{self, Network, Packet, Tcp};
use colo_compare::{Direction, HEADER_MAX, Protocol};

use super::guest;

/// The body of the target.
pub fn parser(input: &[u8]) {
    let Some((choice, frame)) = input.split_first() else {
        return;
    };
    for direction in [Direction::FromGuest, Direction::ToGuest] {
        let packet = guest::parse(frame, direction);
        check_bounds(frame, &packet);
        if let Some(tcp) = &packet.tcp {
            check_tcp(frame, &packet, tcp);
        }
        check_padding(frame, &packet, direction, usize::from(choice & 3));
    }
    check_mirror(frame);
}

fn check_bounds(frame: &[u8], packet: &Packet) {
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let end = usize::from(packet.end);
    assert!(end <= frame.len(), "ends at {end} of {}", frame.len());
    let is_whole = packet.network != Network::Other;
    assert!(!is_whole || (l3 <= l4 && l4 <= end && l4 <= HEADER_MAX));
    let fragment_header = usize::from(packet.fragment_header);
    assert!(fragment_header == 0 || (l3 < fragment_header && fragment_header + 8 <= l4));
    let has_tcp = packet.key.protocol() == Protocol::Tcp;
    assert_eq!(
        packet.tcp.is_some(),
        has_tcp,
        "the key says what the view is"
    );
    assert!(!packet.key.to_string().is_empty());
}

fn check_tcp(frame: &[u8], packet: &Packet, tcp: &Tcp) {
    let header = &frame[..frame.len().min(HEADER_MAX)];
    let (at, payload_at) = (usize::from(tcp.at), usize::from(tcp.payload_at));
    assert_eq!(tcp.at, packet.l4);
    assert!(at + 20 <= payload_at && payload_at <= header.len());
    assert_eq!(
        payload_at + usize::from(tcp.payload_len),
        usize::from(packet.end)
    );
    let word =
        |at: usize| u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
    assert_eq!((tcp.seq, tcp.ack), (word(at + 4), word(at + 8)));
    let space = tcp.end().wrapping_sub(tcp.seq);
    let flags = u32::from(tcp.has(wire::tcp::SYN)) + u32::from(tcp.has(wire::tcp::FIN));
    assert_eq!(space, u32::from(tcp.payload_len) + flags);
    assert_eq!(tcp.takes_space(), space != 0);
    assert!(!tcp.is_pure_ack() || space == 0);
    assert_eq!(
        tcp.timestamps(header).is_some(),
        tcp.syn_options(header).timestamps
    );
    let options = &frame[at + 20..payload_at];
    let is_in_options = |n: u32| options.windows(4).any(|w| w == n.to_be_bytes());
    for (left, right) in tcp.sack_blocks(header) {
        assert!(is_in_options(left) && is_in_options(right));
    }
    if let Some((tsval, tsecr)) = tcp.timestamps(header) {
        assert!(is_in_options(tsval) && is_in_options(tsecr));
    }
}

/// What follows the network packet changes nothing (but a raw frame has no end of its own).
fn check_padding(frame: &[u8], packet: &Packet, direction: Direction, n: usize) {
    if packet.network == Network::Other || frame.len() + n > usize::from(u16::MAX) {
        return;
    }
    let mut padded = frame.to_vec();
    padded.resize(frame.len() + n, 0xa5);
    assert_eq!(guest::parse(&padded, direction), *packet);
}

/// The answer to a frame, as seen from the other side, belongs to the same flow.
fn check_mirror(frame: &[u8]) {
    let packet = guest::parse(frame, Direction::FromGuest);
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let mut answer = frame.to_vec();
    match packet.network {
        Network::V4 => swap(&mut answer, l3 + 12, 4),
        Network::V6 => swap(&mut answer, l3 + 8, 16),
        Network::Arp => {
            swap_apart(&mut answer, l3 + 14, l3 + 24, 4);
        }
        Network::Other => return,
    }
    if matches!(packet.key.protocol(), Protocol::Tcp | Protocol::Udp) {
        swap(&mut answer, l4, 2);
    }
    assert_eq!(guest::parse(&answer, Direction::ToGuest).key, packet.key);
}

fn swap(bytes: &mut [u8], at: usize, n: usize) {
    swap_apart(bytes, at, at + n, n);
}

fn swap_apart(bytes: &mut [u8], a: usize, b: usize, n: usize) {
    for i in 0..n {
        bytes.swap(a + i, b + i);
    }
}
