//! Views of frame headers, checked once at construction.
//!
//! Invariants: parsing never fails and never panics; what does not add up is
//! [`Protocol::Unparseable`]. All offsets lie within the frame, those of headers within the bytes
//! that [`crate::Frames::header`] gives. Padding after the network packet is not part of it.
//!
//! Does not verify checksums: a frame with a wrong one is the receiver's to discard.

pub mod checksum;
mod mask;
mod quoted;
mod strip;
pub mod tcp;
mod twins;

use core::ops::Deref;

use crate::flow::{Direction, FlowKey, Protocol};
use checksum::{be16, be32};
pub(crate) use mask::{header_difference, mask_ignored};
pub(crate) use quoted::Quoted;
pub(crate) use strip::strip_payload;
pub use tcp::Tcp;
pub(crate) use twins::{SvmSegment, Twins};

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;

/// The number of TCP in an IP header.
pub(crate) const TCP_PROTOCOL: u8 = 6;
/// The number of UDP.
pub(crate) const UDP_PROTOCOL: u8 = 17;
const UDP_SUM_AT: u8 = 6;
const ICMP_SUM_AT: u8 = 2;

/// Most IPv6 extension headers that are followed.
const MAX_EXTENSION_HEADERS: usize = 8;

/// Which network header a frame has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// IPv4, header at [`Layout::l3`].
    V4,
    /// IPv6, header at [`Layout::l3`].
    V6,
    /// ARP for IPv4 over Ethernet.
    Arp,
    /// Anything else; compared as raw bytes.
    Other,
}

/// A checked frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The flow.
    pub key: FlowKey,
    /// The rest.
    pub(crate) layout: Layout,
}

impl Deref for Packet {
    type Target = Layout;

    #[inline]
    fn deref(&self) -> &Layout {
        &self.layout
    }
}

/// What a frame carries and where, without the name of its flow. As many of these are copied as
/// there are frames: without gaps, in whole words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// The network header's kind.
    pub network: Network,
    /// Offset of the network header.
    pub l3: u16,
    /// Offset of the transport header (of the network header where there is none).
    pub l4: u16,
    /// Offset of an IPv6 fragment header, 0 without.
    pub fragment_header: u16,
    /// End of the packet: padding is excluded.
    pub end: u16,
    /// Where the checksum of a datagram is, counted from its header of 8 bytes; 0 for what is no
    /// datagram of UDP, ICMP or ICMPv6.
    pub(crate) sum_at: u8,
    /// Which part of an IP packet this is, when it is not all of it.
    pub fragment: Option<Fragment>,
    /// The segment, when this is an unfragmented TCP packet.
    pub tcp: Option<Tcp>,
}

/// The place of a fragment in its packet (RFC 791 section 3.1, RFC 8200 section 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// What all fragments of one packet have in common.
    pub id: u32,
    /// In units of 8 bytes.
    pub offset_8: u16,
    /// Others follow.
    pub more: bool,
    /// The IP protocol of what is carried.
    pub protocol: u8,
}

impl Fragment {
    /// Where its bytes belong in the packet's payload.
    pub const fn offset(&self) -> usize {
        self.offset_8 as usize * 8
    }
}

const _: () = assert!(size_of::<Layout>() == 40);

impl Layout {
    /// Untagged IPv4 without options or fragments: a segment, or without one a UDP datagram.
    #[inline(always)]
    const fn plain(end: u16, tcp: Option<Tcp>) -> Self {
        Self {
            network: Network::V4,
            l3: L3 as u16,
            l4: L4 as u16,
            fragment_header: 0,
            end,
            sum_at: if tcp.is_none() { UDP_SUM_AT } else { 0 },
            fragment: None,
            tcp,
        }
    }

    /// Where the payload begins.
    pub(crate) fn payload_at(&self) -> u16 {
        match &self.tcp {
            Some(tcp) => tcp.payload_at,
            None if self.sum_at == 0 => self.l4,
            None => self.l4 + 8,
        }
    }

    /// Plain TCP data or a whole UDP datagram, of which a digest can stand for the payload.
    pub(crate) fn is_digestible(&self) -> bool {
        match &self.tcp {
            Some(tcp) => tcp.is_plain_data,
            None => self.sum_at == UDP_SUM_AT,
        }
    }

    /// A part of a segment: its connection cannot be told.
    pub(crate) fn is_fragment_of_tcp(&self) -> bool {
        self.fragment
            .is_some_and(|fragment| fragment.protocol == TCP_PROTOCOL)
    }

    /// Untagged IPv4 without options, and not a fragment.
    pub(crate) fn is_plain(&self) -> bool {
        self.l3 == 14 && self.l4 == 34 && self.network == Network::V4 && self.fragment.is_none()
    }
}

/// The TCP connection whose segment an ICMP error quotes; `None` for other packets. Which end is
/// called the guest does not depend on the direction that `packet` was read for.
pub fn quoted_connection(header: &[u8], packet: &Packet) -> Option<FlowKey> {
    Quoted::parse(header, packet).map(|quoted| quoted.key)
}

struct Ethernet {
    vlan: [u16; 2],
    ethertype: u16,
    l3: usize,
}

/// Reads the headers of a frame of `len` bytes.
#[inline(always)]
pub fn parse(header: &[u8], len: usize, direction: Direction) -> Packet {
    match PlainHeaders::of(header, len) {
        Some(plain) => plain.packet(direction),
        None => parse_any(header, len, direction),
    }
}

/// The headers of what most frames are: untagged IPv4 without options or fragments, TCP or UDP.
/// The bounds are checked once.
struct PlainHeaders<'a> {
    fixed: &'a [u8; PLAIN_BYTES],
    end: usize,
    protocol: Protocol,
    tcp: Option<Tcp>,
}

const L3: usize = 14;
const L4: usize = L3 + 20;
/// A TCP header has no less; other frames that are shorter are parsed the long way.
const PLAIN_BYTES: usize = L4 + 20;

impl<'a> PlainHeaders<'a> {
    /// `None` says nothing about a frame.
    #[inline(always)]
    fn of(header: &'a [u8], len: usize) -> Option<Self> {
        let fixed: &[u8; PLAIN_BYTES] = header.first_chunk()?;
        let end = L3 + usize::from(be16(fixed, L3 + 2));
        let is_plain = be16(fixed, 12) == ETHERTYPE_IPV4
            && fixed[L3] == 0x45
            && be16(fixed, L3 + 6) & 0x3fff == 0;
        if !is_plain || end > len || len > usize::from(u16::MAX) {
            return None;
        }
        let (protocol, tcp) = match fixed[L3 + 9] {
            6 => {
                let transport: &[u8; 20] = fixed.last_chunk()?;
                let tcp = Tcp::parse_fixed(transport, header.len(), L4, end)?;
                (Protocol::Tcp, Some(tcp))
            }
            17 if end >= L4 + 8 => (Protocol::Udp, None),
            _ => return None,
        };
        Some(Self {
            fixed,
            end,
            protocol,
            tcp,
        })
    }

    #[inline(always)]
    fn packet(self, direction: Direction) -> Packet {
        let Self {
            fixed,
            end,
            protocol,
            tcp,
        } = self;
        let ends = (be32(fixed, L3 + 12), be32(fixed, L3 + 16));
        let (guest, peer) = by_side(direction, ends.0, ends.1);
        let ports = be32(fixed, L4);
        let (guest_port, peer_port) = by_side(direction, (ports >> 16) as u16, ports as u16);
        let mut key = FlowKey::bare(protocol, [0; 2]).with_ports(guest_port, peer_port);
        key.set_ipv4(guest, peer);
        let layout = Layout::plain(end as u16, tcp);
        Packet { key, layout }
    }
}

fn parse_any(header: &[u8], len: usize, direction: Direction) -> Packet {
    let Some(ethernet) = parse_ethernet(header) else {
        return raw(FlowKey::bare(Protocol::Unparseable, [0; 2]), 0, len);
    };
    let vlan = ethernet.vlan;
    if len > usize::from(u16::MAX) {
        return raw(FlowKey::bare(Protocol::Unparseable, vlan), 0, len);
    }
    let parsed = match ethernet.ethertype {
        ETHERTYPE_IPV4 => parse_ipv4(header, len, &ethernet, direction),
        ETHERTYPE_IPV6 => parse_ipv6(header, len, &ethernet, direction),
        ETHERTYPE_ARP => parse_arp(header, len, &ethernet, direction),
        other => {
            return raw(
                FlowKey::bare(Protocol::Ether(other), vlan),
                ethernet.l3,
                len,
            );
        }
    };
    parsed.unwrap_or_else(|| raw(FlowKey::bare(Protocol::Unparseable, vlan), ethernet.l3, len))
}

fn raw(key: FlowKey, l3: usize, len: usize) -> Packet {
    let l3 = l3 as u16;
    let end = len.min(usize::from(u16::MAX)) as u16;
    let layout = Layout {
        network: Network::Other,
        l3,
        l4: l3,
        fragment_header: 0,
        end,
        sum_at: 0,
        fragment: None,
        tcp: None,
    };
    Packet { key, layout }
}

fn parse_ethernet(header: &[u8]) -> Option<Ethernet> {
    if header.len() < 14 {
        return None;
    }
    let mut vlan = [0; 2];
    let mut at = 12;
    for tag in &mut vlan {
        if !matches!(be16(header, at), ETHERTYPE_VLAN | ETHERTYPE_QINQ) {
            break;
        }
        if header.len() < at + 6 {
            return None;
        }
        *tag = be16(header, at + 2);
        at += 4;
    }
    Some(Ethernet {
        vlan,
        ethertype: be16(header, at),
        l3: at + 2,
    })
}

fn parse_arp(header: &[u8], len: usize, e: &Ethernet, direction: Direction) -> Option<Packet> {
    let at = e.l3;
    let end = at + 28;
    // Ethernet and IPv4, lengths 6 and 4 (RFC 826).
    if header.len() < end || len < end || header[at..at + 6] != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let sender = ipv4_at(header, at + 14);
    let target = ipv4_at(header, at + 24);
    let (guest, peer) = by_side(direction, sender, target);
    let mut key = FlowKey::bare(Protocol::Arp, e.vlan);
    key.set_ipv4(guest, peer);
    let (l3, end) = (at as u16, end as u16);
    let layout = Layout {
        network: Network::Arp,
        l3,
        l4: l3,
        fragment_header: 0,
        end,
        sum_at: 0,
        fragment: None,
        tcp: None,
    };
    Some(Packet { key, layout })
}

fn parse_ipv4(header: &[u8], len: usize, e: &Ethernet, direction: Direction) -> Option<Packet> {
    let at = e.l3;
    if header.len() < at + 20 || header[at] >> 4 != 4 {
        return None;
    }
    let l4 = at + usize::from(header[at] & 15) * 4;
    let end = at + usize::from(be16(header, at + 2));
    if l4 < at + 20 || l4 > header.len() || end < l4 || end > len {
        return None;
    }
    let (source, destination) = (ipv4_at(header, at + 12), ipv4_at(header, at + 16));
    let (guest, peer) = by_side(direction, source, destination);
    let mut key = FlowKey::bare(Protocol::Fragment, e.vlan);
    key.set_ipv4(guest, peer);
    let place = be16(header, at + 6);
    let fragment = (place & 0x3fff != 0).then(|| Fragment {
        id: u32::from(be16(header, at + 4)),
        offset_8: place & 0x1fff,
        more: place & 0x2000 != 0,
        protocol: header[at + 9],
    });
    let protocol = fragment.is_none().then(|| header[at + 9]);
    let layout = Layout {
        network: Network::V4,
        l3: at as u16,
        l4: l4 as u16,
        fragment_header: 0,
        end: end as u16,
        sum_at: 0,
        fragment,
        tcp: None,
    };
    let packet = Packet { key, layout };
    parse_transport(header, packet, protocol, direction)
}

fn parse_ipv6(header: &[u8], len: usize, e: &Ethernet, direction: Direction) -> Option<Packet> {
    let at = e.l3;
    if header.len() < at + 40 || header[at] >> 4 != 6 {
        return None;
    }
    let end = at + 40 + usize::from(be16(header, at + 4));
    if end > len {
        return None;
    }
    let (source, destination) = (ipv6_at(header, at + 8), ipv6_at(header, at + 24));
    let (guest, peer) = by_side(direction, source, destination);
    let mut key = FlowKey::bare(Protocol::Fragment, e.vlan);
    key.set_ipv6(guest, peer);
    let (protocol, l4, fragment_at) = skip_extensions(header, header[at + 6], at + 40, end)?;
    let fragment = (fragment_at != 0).then(|| Fragment {
        id: be32(header, fragment_at + 4),
        offset_8: be16(header, fragment_at + 2) >> 3,
        more: header[fragment_at + 3] & 1 != 0,
        protocol,
    });
    let layout = Layout {
        network: Network::V6,
        l3: at as u16,
        l4: l4 as u16,
        fragment_header: fragment_at as u16,
        end: end as u16,
        sum_at: 0,
        fragment,
        tcp: None,
    };
    let packet = Packet { key, layout };
    let protocol = fragment.is_none().then_some(protocol);
    parse_transport(header, packet, protocol, direction)
}

/// Follows the extension headers (RFC 8200 section 4) to the transport header. Gives the protocol,
/// where it starts, and where a fragment header is (0: nowhere).
fn skip_extensions(
    header: &[u8],
    mut next: u8,
    mut at: usize,
    end: usize,
) -> Option<(u8, usize, usize)> {
    let bound = end.min(header.len());
    let mut fragment_at = 0;
    for _ in 0..MAX_EXTENSION_HEADERS {
        let in_header = at + 8 <= header.len() && at + 8 <= end;
        let len = match next {
            // Hop-by-hop, routing, destination options, mobility.
            0 | 43 | 60 | 135 if in_header => 8 + 8 * usize::from(header[at + 1]),
            // Authentication header (RFC 4302): 32-bit words.
            51 if in_header => 8 + 4 * usize::from(header[at + 1]),
            44 if in_header => {
                fragment_at = at;
                8
            }
            0 | 43 | 44 | 51 | 60 | 135 => return None,
            _ => return (at <= bound).then_some((next, at, fragment_at)),
        };
        next = header[at];
        at += len;
        // What follows a fragment header is data, unless it is the first fragment.
        if fragment_at != 0 {
            break;
        }
    }
    (at <= bound && fragment_at != 0).then_some((next, at, fragment_at))
}

fn parse_transport(
    header: &[u8],
    mut packet: Packet,
    protocol: Option<u8>,
    direction: Direction,
) -> Option<Packet> {
    let (at, end) = (usize::from(packet.l4), usize::from(packet.end));
    let with_ports = |key: FlowKey, protocol: Protocol, needed: usize| {
        (at + needed <= header.len() && at + needed <= end).then(|| {
            let (guest, peer) = by_side(direction, be16(header, at), be16(header, at + 2));
            key.with_protocol(protocol).with_ports(guest, peer)
        })
    };
    let key = packet.key;
    packet.key = match (protocol, packet.network) {
        (None, _) => key,
        (Some(6), _) => {
            packet.layout.tcp = Some(Tcp::parse(header, at, end)?);
            with_ports(key, Protocol::Tcp, 20)?
        }
        (Some(17), _) => with_ports(key, Protocol::Udp, 8)?,
        (Some(1), Network::V4) => icmp_key(header, at, end, key, Protocol::Icmp, [0, 8])?,
        (Some(58), Network::V6) => icmp_key(header, at, end, key, Protocol::Icmpv6, [128, 129])?,
        (Some(other), _) => key.with_protocol(Protocol::Ip(other)),
    };
    packet.layout.sum_at = match packet.key.protocol() {
        Protocol::Udp => UDP_SUM_AT,
        Protocol::Icmp | Protocol::Icmpv6 => ICMP_SUM_AT,
        _ => 0,
    };
    Some(packet)
}

fn icmp_key(
    header: &[u8],
    at: usize,
    end: usize,
    key: FlowKey,
    protocol: Protocol,
    echo: [u8; 2],
) -> Option<FlowKey> {
    if at + 8 > header.len() || at + 4 > end {
        return None;
    }
    let key = key.with_protocol(protocol);
    if echo.contains(&header[at]) && at + 8 <= end {
        Some(key.with_ports(0, be16(header, at + 4)))
    } else {
        Some(key.with_ports(u16::from(header[at]), 0))
    }
}

/// (source, destination) as (guest, peer).
fn by_side<T>(direction: Direction, source: T, destination: T) -> (T, T) {
    match direction {
        Direction::FromGuest => (source, destination),
        Direction::ToGuest => (destination, source),
    }
}

fn ipv4_at(header: &[u8], at: usize) -> u32 {
    be32(header, at)
}

fn ipv6_at(header: &[u8], at: usize) -> [u64; 2] {
    let half = |at: usize| u64::from(be32(header, at)) << 32 | u64::from(be32(header, at + 4));
    [half(at), half(at + 8)]
}
