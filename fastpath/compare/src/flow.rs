//! What names a flow: protocol, VLAN and the two ends, normalised to guest side and peer side.
//!
//! Invariant: both directions of one connection have the same key, whoever sent the frame.

use core::fmt;
use core::hash::{Hash, Hasher};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Which way a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The guest sent it.
    FromGuest,
    /// It is for the guest.
    ToGuest,
}

/// What is carried, as far as it matters for telling flows apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// UDP over IPv4 or IPv6.
    Udp,
    /// ICMP (RFC 792).
    Icmp,
    /// ICMPv6 (RFC 4443), neighbour discovery included.
    Icmpv6,
    /// ARP for IPv4 over Ethernet.
    Arp,
    /// A fragment of an IPv4 or IPv6 packet, whatever it carries.
    Fragment,
    /// Another IP protocol.
    Ip(u8),
    /// Another EtherType.
    Ether(u16),
    /// A frame whose headers do not add up.
    Unparseable,
}

impl Protocol {
    /// Kind and value in one number; `from_code` is the way back.
    const fn code(self) -> u32 {
        match self {
            Self::Tcp => 1 << 16,
            Self::Udp => 2 << 16,
            Self::Icmp => 3 << 16,
            Self::Icmpv6 => 4 << 16,
            Self::Arp => 5 << 16,
            Self::Fragment => 6 << 16,
            Self::Ip(number) => 7 << 16 | number as u32,
            Self::Ether(ethertype) => 8 << 16 | ethertype as u32,
            Self::Unparseable => 9 << 16,
        }
    }

    const fn from_code(code: u32) -> Self {
        match code >> 16 & 15 {
            1 => Self::Tcp,
            2 => Self::Udp,
            3 => Self::Icmp,
            4 => Self::Icmpv6,
            5 => Self::Arp,
            6 => Self::Fragment,
            7 => Self::Ip(code as u8),
            8 => Self::Ether(code as u16),
            _ => Self::Unparseable,
        }
    }
}

/// In the word of the protocol: the addresses are of IPv6.
const V6: u64 = 1 << 63;
/// How an IPv4 address lies in the room of an IPv6 one (RFC 4291 section 2.5.5.2).
const MAPPED: u64 = 0xffff << 32;

/// The name of a flow: protocol, outer and inner VLAN tag control information, the guest's address
/// and port, and the peer's. Six words, so that hashing and comparing take no branches.
#[derive(Clone, Copy, Eq, PartialOrd, Ord)]
pub struct FlowKey {
    /// Guest address, peer address, ports and VLAN tags, protocol.
    words: [u64; 6],
}

impl PartialEq for FlowKey {
    /// Word by word: a call of memcmp takes longer.
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let differing = |n: usize| self.words[n] ^ other.words[n];
        let high = differing(0) | differing(1) | differing(2);
        high | differing(3) | differing(4) | differing(5) == 0
    }
}

impl Hash for FlowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.words.hash(state);
    }
}

impl FlowKey {
    /// A flow between a guest and a peer; both addresses are of the same family.
    pub fn new(protocol: Protocol, vlan: [u16; 2], guest: IpAddr, peer: IpAddr) -> Self {
        let mut key = Self::bare(protocol, vlan);
        key.set_addresses(guest, peer);
        key
    }

    /// The key of frames that have no addresses.
    pub(crate) const fn bare(protocol: Protocol, vlan: [u16; 2]) -> Self {
        let tags = (vlan[0] as u64) << 16 | vlan[1] as u64;
        Self {
            words: [0, MAPPED, 0, MAPPED, tags, protocol.code() as u64],
        }
    }

    /// The same with these ports: the guest's (for ICMP other than echo, the message type) and the
    /// peer's (for ICMP echo, the identifier).
    pub const fn with_ports(mut self, guest: u16, peer: u16) -> Self {
        self.words[4] = self.words[4] & 0xffff_ffff | (guest as u64) << 48 | (peer as u64) << 32;
        self
    }

    pub(crate) const fn with_protocol(mut self, protocol: Protocol) -> Self {
        self.words[5] = self.words[5] & V6 | protocol.code() as u64;
        self
    }

    fn set_addresses(&mut self, guest: IpAddr, peer: IpAddr) {
        let words = |address: IpAddr| match address {
            IpAddr::V4(ip) => [0, MAPPED | u64::from(ip.to_bits())],
            IpAddr::V6(ip) => [(ip.to_bits() >> 64) as u64, ip.to_bits() as u64],
        };
        let ([g0, g1], [p0, p1]) = (words(guest), words(peer));
        self.words[..4].copy_from_slice(&[g0, g1, p0, p1]);
        self.words[5] &= !V6;
        self.words[5] |= if guest.is_ipv6() { V6 } else { 0 };
    }

    pub(crate) const fn set_ipv4(&mut self, guest: u32, peer: u32) {
        self.words[1] = MAPPED | guest as u64;
        self.words[3] = MAPPED | peer as u64;
    }

    pub(crate) const fn set_ipv6(&mut self, guest: [u64; 2], peer: [u64; 2]) {
        [self.words[0], self.words[1]] = guest;
        [self.words[2], self.words[3]] = peer;
        self.words[5] |= V6;
    }

    pub(crate) const fn words(&self) -> &[u64; 6] {
        &self.words
    }

    /// The guest's and the peer's address of an untagged IPv4 packet.
    pub(crate) const fn ipv4_ends(&self) -> Option<(u32, u32)> {
        let is_untagged_v4 = self.words[5] & V6 == 0 && self.words[4] as u32 == 0;
        if is_untagged_v4 {
            Some((self.words[1] as u32, self.words[3] as u32))
        } else {
            None
        }
    }

    /// What is carried.
    pub const fn protocol(&self) -> Protocol {
        Protocol::from_code(self.words[5] as u32)
    }

    /// Outer and inner VLAN tag control information, 0 where there is no tag.
    pub const fn vlan(&self) -> [u16; 2] {
        [(self.words[4] >> 16) as u16, self.words[4] as u16]
    }

    fn address(&self, at: usize) -> IpAddr {
        let (high, low) = (self.words[at], self.words[at + 1]);
        if self.words[5] & V6 == 0 {
            IpAddr::V4(Ipv4Addr::from_bits(low as u32))
        } else {
            IpAddr::V6(Ipv6Addr::from_bits(
                u128::from(high) << 64 | u128::from(low),
            ))
        }
    }

    /// The guest's address.
    pub fn guest(&self) -> IpAddr {
        self.address(0)
    }

    /// The other end's address.
    pub fn peer(&self) -> IpAddr {
        self.address(2)
    }

    /// The guest's port; for ICMP other than echo, the message type.
    pub const fn guest_port(&self) -> u16 {
        (self.words[4] >> 48) as u16
    }

    /// The other end's port; for ICMP echo, the identifier.
    pub const fn peer_port(&self) -> u16 {
        (self.words[4] >> 32) as u16
    }

    /// Whether the two addresses mean something.
    pub fn has_addresses(&self) -> bool {
        !matches!(self.protocol(), Protocol::Ether(_) | Protocol::Unparseable)
    }

    /// Same protocol, guest address and peer end as `other`, but another guest port: what two
    /// guests make of one outbound connection when they pick their ports themselves.
    pub(crate) fn differs_in_guest_port_only(&self, other: &Self) -> bool {
        self.guest_port() != other.guest_port()
            && self.with_ports(0, self.peer_port()) == other.with_ports(0, other.peer_port())
    }
}

impl fmt::Debug for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FlowKey({self})")
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ", self.protocol())?;
        if self.vlan()[0] != 0 {
            write!(f, "vlan {} ", self.vlan()[0] & 0x0fff)?;
        }
        write!(
            f,
            "{}:{} <-> {}:{}",
            self.guest(),
            self.guest_port(),
            self.peer(),
            self.peer_port()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_gives_back_what_it_was_made_of() {
        let protocols = [
            Protocol::Tcp,
            Protocol::Udp,
            Protocol::Icmp,
            Protocol::Icmpv6,
            Protocol::Arp,
            Protocol::Fragment,
            Protocol::Ip(132),
            Protocol::Ether(0x88cc),
            Protocol::Unparseable,
        ];
        for protocol in protocols {
            for (guest, peer) in [
                ("10.0.0.1", "255.255.255.255"),
                ("fd00::1", "::ffff:1.2.3.4"),
            ] {
                let (guest, peer) = (guest.parse().unwrap(), peer.parse().unwrap());
                let key = FlowKey::new(protocol, [7, 0xffff], guest, peer).with_ports(80, 40_000);
                assert_eq!((key.protocol(), key.vlan()), (protocol, [7, 0xffff]));
                assert_eq!((key.guest(), key.peer()), (guest, peer));
                assert_eq!((key.guest_port(), key.peer_port()), (80, 40_000));
                let other = key.with_ports(81, 40_000);
                assert!(
                    key.differs_in_guest_port_only(&other) && !key.differs_in_guest_port_only(&key)
                );
                assert!(!key.differs_in_guest_port_only(&other.with_protocol(Protocol::Ip(1))));
            }
        }
    }

    #[test]
    fn families_do_not_mix() {
        let v4 = FlowKey::new(
            Protocol::Tcp,
            [0; 2],
            "1.2.3.4".parse().unwrap(),
            "1.2.3.5".parse().unwrap(),
        );
        let mapped = FlowKey::new(
            Protocol::Tcp,
            [0; 2],
            "::ffff:1.2.3.4".parse().unwrap(),
            "::ffff:1.2.3.5".parse().unwrap(),
        );
        assert_ne!(v4, mapped);
    }
}
