//! Link-layer addresses, learnt from whoever talks to the guest.
//!
//! The stack asks by ARP or neighbour discovery when it does not know where to send, and drops some
//! answers meanwhile. Two guests in lockstep would ask at different moments. So every host that
//! sends a frame is told to the stack, as if it had announced itself, and the guest practically
//! never asks.
//!
//! Invariants: at most [`NEIGHBORS_MAX`] hosts are remembered.

use crate::demux::{IpView, ip_view};
use alloc::vec::Vec;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv6Packet, Icmpv6Repr, IpAddress, IpCidr, IpProtocol, Ipv4Address,
    Ipv6Address, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr,
};

const NEIGHBORS_MAX: usize = 64;
/// The stack forgets after 60 s.
const REFRESH_US: i64 = 20_000_000;
const ETHERNET_HEADER: usize = 14;
const IPV6_HEADER: usize = 40;

/// The link-local address that belongs to a MAC address (RFC 4291, appendix A).
pub fn link_local(mac: [u8; 6]) -> Ipv6Address {
    let [a, b, c, d, e, f] = mac;
    Ipv6Address::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

struct Known {
    address: IpAddress,
    mac: EthernetAddress,
    told_us: i64,
}

/// Who was told to the stack, and when.
pub(crate) struct Neighbors {
    mac: EthernetAddress,
    networks: Vec<IpCidr>,
    gateways: Vec<IpAddress>,
    known: Vec<Known>,
}

impl Neighbors {
    pub fn new(mac: EthernetAddress, networks: Vec<IpCidr>, gateways: Vec<IpAddress>) -> Self {
        Self {
            mac,
            networks,
            gateways,
            known: Vec::new(),
        }
    }

    /// An announcement to feed to the stack before `frame`, when its sender is not known yet.
    pub fn announcement(&mut self, frame: &[u8], now_us: i64) -> Option<Vec<u8>> {
        let view = ip_view(frame)?;
        let source = EthernetAddress::from_bytes(frame.get(6..12)?);
        if frame[..6] != self.mac.0 || !source.is_unicast() || source == self.mac {
            return None;
        }
        let address = self.next_hop(&view)?;
        if !self.is_news(address, source, now_us) {
            return None;
        }
        match address {
            IpAddress::Ipv4(address) => Some(self.arp_reply(address, source)),
            IpAddress::Ipv6(address) => Some(self.neighbor_advertisement(address, source)),
        }
    }

    /// Who on this network will get answers to the packet: its source, or the gateway it came
    /// through.
    fn next_hop(&self, view: &IpView<'_>) -> Option<IpAddress> {
        let source = view.source;
        if !source.is_unicast() || self.networks.iter().any(|own| own.address() == source) {
            return None;
        }
        if self
            .networks
            .iter()
            .any(|network| network.contains_addr(&source))
        {
            return Some(source);
        }
        self.gateways
            .iter()
            .copied()
            .find(|gateway| gateway.version() == source.version())
    }

    fn is_news(&mut self, address: IpAddress, mac: EthernetAddress, now_us: i64) -> bool {
        let fresh = Known {
            address,
            mac,
            told_us: now_us,
        };
        if let Some(known) = self.known.iter_mut().find(|known| known.address == address) {
            if known.mac == mac && now_us - known.told_us < REFRESH_US {
                return false;
            }
            *known = fresh;
            return true;
        }
        if self.known.len() == NEIGHBORS_MAX
            && let Some(oldest) = (0..NEIGHBORS_MAX).min_by_key(|i| self.known[*i].told_us)
        {
            self.known.swap_remove(oldest);
        }
        self.known.push(fresh);
        true
    }

    fn own_ipv4(&self, remote: Ipv4Address) -> Ipv4Address {
        let on_network = |network: &&IpCidr| network.contains_addr(&remote.into());
        match self.networks.iter().find(on_network).map(IpCidr::address) {
            Some(IpAddress::Ipv4(own)) => own,
            _ => Ipv4Address::UNSPECIFIED,
        }
    }

    fn arp_reply(&self, address: Ipv4Address, mac: EthernetAddress) -> Vec<u8> {
        let arp = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: mac,
            source_protocol_addr: address,
            target_hardware_addr: self.mac,
            target_protocol_addr: self.own_ipv4(address),
        };
        let mut frame = self.frame_from(mac, EthernetProtocol::Arp, arp.buffer_len());
        arp.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_HEADER..]));
        frame
    }

    fn neighbor_advertisement(&self, address: Ipv6Address, mac: EthernetAddress) -> Vec<u8> {
        let own = link_local(self.mac.0);
        let message = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
            flags: NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE,
            target_addr: address,
            lladdr: Some(mac.into()),
        });
        let ip = Ipv6Repr {
            src_addr: address,
            dst_addr: own,
            next_header: IpProtocol::Icmpv6,
            payload_len: message.buffer_len(),
            hop_limit: 255,
        };
        let len = IPV6_HEADER + message.buffer_len();
        let mut frame = self.frame_from(mac, EthernetProtocol::Ipv6, len);
        let packet = &mut frame[ETHERNET_HEADER..];
        ip.emit(&mut Ipv6Packet::new_unchecked(&mut *packet));
        let mut icmp = Icmpv6Packet::new_unchecked(&mut packet[IPV6_HEADER..]);
        message.emit(&address, &own, &mut icmp, &ChecksumCapabilities::default());
        frame
    }

    fn frame_from(&self, mac: EthernetAddress, kind: EthernetProtocol, len: usize) -> Vec<u8> {
        let mut frame = alloc::vec![0; ETHERNET_HEADER + len];
        let header = EthernetRepr {
            src_addr: mac,
            dst_addr: self.mac,
            ethertype: kind,
        };
        header.emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
        frame
    }
}

/// The stack answers neighbour solicitations only when they come to the group of the address; hosts
/// that check whether a neighbour is still there send them to the address itself. Gives the same
/// solicitation as if sent to the group.
pub(crate) fn solicitation_to_group(frame: &[u8]) -> Option<Vec<u8>> {
    let packet = Ipv6Packet::new_checked(frame.get(ETHERNET_HEADER..)?).ok()?;
    let (source, destination) = (packet.src_addr(), packet.dst_addr());
    let message = Icmpv6Packet::new_checked(packet.payload()).ok()?;
    if packet.hop_limit() != 255 || !message.verify_checksum(&source, &destination) {
        return None;
    }
    let group = solicited_node(message.target_addr());
    let mut frame = frame[..ETHERNET_HEADER + packet.total_len()].to_vec();
    let mut packet = Ipv6Packet::new_unchecked(&mut frame[ETHERNET_HEADER..]);
    packet.set_dst_addr(group);
    Icmpv6Packet::new_unchecked(packet.payload_mut()).fill_checksum(&source, &group);
    Some(frame)
}

/// RFC 4291, section 2.7.1.
fn solicited_node(address: Ipv6Address) -> Ipv6Address {
    let [.., a, b, c] = address.octets();
    Ipv6Address::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}
