//! Finds the connection that a frame belongs to, so that each frame costs the same however many
//! connections are open.
//!
//! Invariants: reads only within the frame; a frame that is cut short or odd in any way is
//! [`Route::Other`] or [`Route::Drop`], and the stack behind checks everything again.

use smoltcp::wire::{IpAddress, Ipv4Address, Ipv6Address};

const ETHERNET_HEADER: usize = 14;
const IPV6_HEADER: usize = 40;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const NEIGHBOR_SOLICITATION: u8 = 135;
const FLAG_SYN: u8 = 2;
const FLAG_RST: u8 = 4;
const FLAG_ACK: u8 = 16;

/// The two ends of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FlowKey {
    pub remote: IpAddress,
    pub local: IpAddress,
    pub remote_port: u16,
    pub local_port: u16,
}

/// Who gets a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// A TCP segment; `opens` when it is a SYN that asks for a connection.
    Tcp { key: FlowKey, opens: bool },
    /// A UDP datagram to this port.
    Udp { port: u16 },
    /// ARP, or a neighbour discovery message.
    Neighbor,
    /// A neighbour solicitation that was not sent to a group.
    UnicastSolicitation,
    /// Anything else that the stack may answer.
    Other,
    /// IPv4 fragments, which this guest does not reassemble.
    Drop,
}

/// The addresses and the place of the transport header in an IP frame.
pub(crate) struct IpView<'a> {
    pub source: IpAddress,
    pub destination: IpAddress,
    pub protocol: u8,
    pub payload: &'a [u8],
    pub is_fragment: bool,
}

/// Looks at the IP header of a frame; `None` when it has none.
pub(crate) fn ip_view(frame: &[u8]) -> Option<IpView<'_>> {
    let packet = frame.get(ETHERNET_HEADER..)?;
    match u16_at(frame, 12)? {
        0x0800 => ipv4_view(packet),
        0x86dd => ipv6_view(packet),
        _ => None,
    }
}

fn ipv4_view(packet: &[u8]) -> Option<IpView<'_>> {
    let header_len = usize::from(packet.first()? & 0xf) * 4;
    if packet[0] >> 4 != 4 || header_len < 20 {
        return None;
    }
    let address = |at: usize| -> Option<IpAddress> {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Address::from(octets).into())
    };
    Some(IpView {
        source: address(12)?,
        destination: address(16)?,
        protocol: *packet.get(9)?,
        payload: packet.get(header_len..)?,
        is_fragment: u16_at(packet, 6)? & 0x3fff != 0,
    })
}

fn ipv6_view(packet: &[u8]) -> Option<IpView<'_>> {
    let address = |at: usize| -> Option<IpAddress> {
        let octets: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(Ipv6Address::from(octets).into())
    };
    Some(IpView {
        source: address(8)?,
        destination: address(24)?,
        protocol: *packet.get(6)?,
        payload: packet.get(IPV6_HEADER..)?,
        is_fragment: false,
    })
}

/// Finds out who gets `frame`.
pub(crate) fn route(frame: &[u8]) -> Route {
    if u16_at(frame, 12) == Some(0x0806) {
        return Route::Neighbor;
    }
    let Some(view) = ip_view(frame) else {
        return Route::Other;
    };
    if view.is_fragment {
        return Route::Drop;
    }
    match (view.protocol, view.payload) {
        (TCP, [_, _, _, _, _, _, _, _, _, _, _, _, _, flags, ..]) => {
            let port = |at| u16::from_be_bytes([view.payload[at], view.payload[at + 1]]);
            let key = FlowKey {
                remote: view.source,
                local: view.destination,
                remote_port: port(0),
                local_port: port(2),
            };
            let opens = flags & (FLAG_SYN | FLAG_RST | FLAG_ACK) == FLAG_SYN;
            Route::Tcp { key, opens }
        }
        (UDP, [_, _, high, low, ..]) => Route::Udp {
            port: u16::from_be_bytes([*high, *low]),
        },
        (ICMPV6, [NEIGHBOR_SOLICITATION, ..]) if !view.destination.is_multicast() => {
            Route::UnicastSolicitation
        }
        (ICMPV6, [133..=137, ..]) => Route::Neighbor,
        _ => Route::Other,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn syn() -> Vec<u8> {
        let mut frame = vec![0; 54];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = TCP;
        frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        frame[34..38].copy_from_slice(&[0x12, 0x34, 0, 80]);
        frame[47] = FLAG_SYN;
        frame
    }

    #[test]
    fn a_syn_names_its_connection() {
        let key = FlowKey {
            remote: IpAddress::v4(10, 0, 0, 1),
            local: IpAddress::v4(10, 0, 0, 2),
            remote_port: 0x1234,
            local_port: 80,
        };
        assert_eq!(route(&syn()), Route::Tcp { key, opens: true });
        let mut fragment = syn();
        fragment[20] = 0x20;
        assert_eq!(route(&fragment), Route::Drop);
    }

    #[test]
    fn short_frames_go_nowhere_special() {
        let frame = syn();
        for len in 0..frame.len() {
            match route(&frame[..len]) {
                Route::Tcp { .. } => assert!(len >= 48, "{len}"),
                other => assert_eq!(other, Route::Other, "{len}"),
            }
        }
    }
}
