//! Which shard a frame belongs to.
//!
//! Invariants: the answer depends on the frame's headers and the number of shards alone, never on
//! the host, the build or the time: both hosts of a pair, and a later version beside an earlier one,
//! give the same. It is the same for both directions of a flow.
//!
//! TCP goes by both addresses and ports. Every other IP packet, a fragment of TCP included, goes by
//! the addresses and the protocol, so that fragments stay with their like. An ICMP error about a TCP
//! segment goes with the connection that it quotes, whose translation it needs (RFC 792, RFC 4443).
//! VLAN tags do not count. Everything else (ARP, other EtherTypes, what cannot be parsed) belongs to
//! shard 0.
//!
//! ```text
//! mix(x)         = x ^= x >> 30; x *= 0xbf58476d1ce4e5b9; x ^= x >> 27; x *= 0x94d049bb133111eb;
//!                  x ^ x >> 31
//! end(addr, port) = mix(mix(mix(high half of addr) ^ low half of addr) ^ port)
//! owner          = (mix(end(a) + end(b) + protocol) >> 32) * shards >> 32
//! ```
//!
//! in wrapping 64-bit arithmetic; IPv4 addresses are mapped into IPv6 (::ffff:a.b.c.d), ports are 0
//! where they do not count, the protocol is its IP number.
//!
//! Does not know what a shard does with its frames.

use std::net::IpAddr;

use colo_compare::wire::{Packet, parse, quoted_connection};
use colo_compare::{Direction, FlowKey, Protocol};

const TCP: u8 = 6;

/// The shard, below `shards`, that a frame of `len` bytes belongs to. `header` has as much of it as
/// [`colo_compare::Frames::header`] gives.
pub fn owner(header: &[u8], len: usize, shards: u32) -> u32 {
    // The direction only says which end is called the guest, and the ends are interchangeable here.
    let packet = parse(header, len, Direction::FromGuest);
    let Some(hash) = hash_of(header, &packet) else {
        return 0;
    };
    (((hash >> 32) * u64::from(shards)) >> 32) as u32
}

fn hash_of(header: &[u8], packet: &Packet) -> Option<u64> {
    let key = &packet.key;
    let protocol = match key.protocol() {
        Protocol::Tcp => return Some(connection(key)),
        Protocol::Icmp | Protocol::Icmpv6 => {
            if let Some(quoted) = quoted_connection(header, packet) {
                return Some(connection(&quoted));
            }
            if key.protocol() == Protocol::Icmp {
                1
            } else {
                58
            }
        }
        Protocol::Udp => 17,
        Protocol::Ip(protocol) => protocol,
        Protocol::Fragment => packet.fragment?.protocol,
        Protocol::Arp | Protocol::Ether(_) | Protocol::Unparseable => return None,
    };
    let ends = end(key.guest(), 0).wrapping_add(end(key.peer(), 0));
    Some(mix(ends.wrapping_add(u64::from(protocol))))
}

fn connection(key: &FlowKey) -> u64 {
    let guest = end(key.guest(), key.guest_port());
    let peer = end(key.peer(), key.peer_port());
    mix(guest.wrapping_add(peer).wrapping_add(u64::from(TCP)))
}

fn end(address: IpAddr, port: u16) -> u64 {
    let bits = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
    .to_bits();
    mix(mix(mix((bits >> 64) as u64) ^ bits as u64) ^ u64::from(port))
}

/// The finaliser of SplitMix64: every input bit reaches every output bit.
const fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
#[path = "owner_tests.rs"]
mod tests;
