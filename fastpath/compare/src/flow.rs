//! What names a flow: protocol, VLAN and the two ends, normalised to guest side and peer side.
//!
//! Invariant: both directions of one connection have the same key, whoever sent the frame.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr};

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

/// The name of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// What is carried.
    pub protocol: Protocol,
    /// Outer and inner VLAN tag control information, 0 where there is no tag.
    pub vlan: [u16; 2],
    /// The guest's address.
    pub guest: IpAddr,
    /// The other end's address.
    pub peer: IpAddr,
    /// The guest's port; for ICMP other than echo, the message type.
    pub guest_port: u16,
    /// The other end's port; for ICMP echo, the identifier.
    pub peer_port: u16,
}

impl FlowKey {
    /// The key of frames that have no addresses.
    pub(crate) const fn bare(protocol: Protocol, vlan: [u16; 2]) -> Self {
        let none = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Self {
            protocol,
            vlan,
            guest: none,
            peer: none,
            guest_port: 0,
            peer_port: 0,
        }
    }

    /// Whether the two addresses mean something.
    pub fn has_addresses(&self) -> bool {
        !matches!(self.protocol, Protocol::Ether(_) | Protocol::Unparseable)
    }

    /// Same protocol, guest address and peer end as `other`, but another guest port: what two
    /// guests make of one outbound connection when they pick their ports themselves.
    pub(crate) fn differs_in_guest_port_only(&self, other: &Self) -> bool {
        self.guest_port != other.guest_port
            && Self {
                guest_port: 0,
                ..*self
            } == Self {
                guest_port: 0,
                ..*other
            }
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ", self.protocol)?;
        if self.vlan[0] != 0 {
            write!(f, "vlan {} ", self.vlan[0] & 0x0fff)?;
        }
        write!(
            f,
            "{}:{} <-> {}:{}",
            self.guest, self.guest_port, self.peer, self.peer_port
        )
    }
}
