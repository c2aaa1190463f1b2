//! Checksums of parsed packets, summed over whole words: slow, and on its own.
//!
//! Invariant: shares no arithmetic with the code under test.

use colo_compare::wire::{Network, Packet};

/// Ones' complement sum modulo 0xffff of big-endian words, the last one padded with zero.
fn words(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|word| u64::from(word[0]) << 8 | word.get(1).map_or(0, |low| u64::from(*low)))
        .sum()
}

/// What the TCP checksum of the packet in `frame` leaves over: 0 when it is right.
pub fn tcp_residue(frame: &[u8], packet: &Packet) -> u64 {
    let (l3, l4, end) = bounds(packet);
    let addresses = match packet.network {
        Network::V4 => l3 + 12..l3 + 20,
        _ => l3 + 8..l3 + 40,
    };
    let length = (end - l4) as u64;
    (words(&frame[addresses]) + length + 6 + words(&frame[l4..end])) % 0xffff
}

/// What the IPv4 header checksum leaves over: 0 when it is right, or when there is none.
pub fn network_residue(frame: &[u8], packet: &Packet) -> u64 {
    let (l3, l4, _) = bounds(packet);
    match packet.network {
        Network::V4 => words(&frame[l3..l4]) % 0xffff,
        _ => 0,
    }
}

fn bounds(packet: &Packet) -> (usize, usize, usize) {
    (
        usize::from(packet.l3),
        usize::from(packet.l4),
        usize::from(packet.end),
    )
}
