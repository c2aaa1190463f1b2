//! What one end tells the other about its datagram transports, over the TCP connection.
//!
//! The body of an offer is `key:u64 window:u16 count:u8 0`, then for each transport `kind:u8 len:u8 mtu:u16` and `len` bytes of
//! address: a port of 2 bytes (UDP, kind 0), or a MAC of 6 (AF_XDP, kind 1). Unknown kinds are skipped (rule 22).
//!
//! Does not choose.

use std::net::SocketAddr;

use super::msg::{BODY_MAX, u64_at};
use super::port::{DatagramPort, PortAddress};
use super::udp::with_port;

const FIXED_BYTES: usize = 12;

/// A peer's transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offered {
    pub(super) address: PortAddress,
    pub(super) mtu: usize,
}

/// A peer's offer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// What our datagrams must carry.
    pub(super) key: u64,
    /// Units that it has room for.
    pub(super) window: u16,
    pub(super) transports: Vec<Offered>,
}

/// The body of our own offer.
pub(super) fn encode(key: u64, window: u16, ports: &[Box<dyn DatagramPort>]) -> Vec<u8> {
    let mut out = key.to_le_bytes().to_vec();
    out.extend_from_slice(&window.to_le_bytes());
    out.extend_from_slice(&[ports.len() as u8, 0]);
    for port in ports {
        let mtu = (port.mtu() as u16).to_le_bytes();
        match port.address() {
            PortAddress::Udp(address) => {
                out.extend_from_slice(&[0, 2]);
                out.extend_from_slice(&mtu);
                out.extend_from_slice(&address.port().to_le_bytes());
            }
            PortAddress::Xdp(mac) => {
                out.extend_from_slice(&[1, 6]);
                out.extend_from_slice(&mtu);
                out.extend_from_slice(&mac);
            }
        }
    }
    debug_assert!(out.len() <= BODY_MAX);
    out
}

/// A peer's offer; `host` is where its connection comes from.
pub(super) fn decode(body: &[u8], host: SocketAddr) -> Option<Offer> {
    let fixed = body.get(..FIXED_BYTES)?;
    let mut rest = &body[FIXED_BYTES..];
    let mut transports = Vec::new();
    for _ in 0..fixed[10] {
        let (entry, behind) = rest.split_at_checked(4)?;
        let mtu = usize::from(u16::from_le_bytes([entry[2], entry[3]]));
        let (address, behind) = behind.split_at_checked(usize::from(entry[1]))?;
        rest = behind;
        let address = match (entry[0], address) {
            (0, &[low, high]) => PortAddress::Udp(with_port(host, u16::from_le_bytes([low, high]))),
            (1, &[a, b, c, d, e, f]) => PortAddress::Xdp([a, b, c, d, e, f]),
            _ => continue,
        };
        transports.push(Offered { address, mtu });
    }
    Some(Offer {
        key: u64_at(fixed, 0),
        window: u16::from_le_bytes([fixed[8], fixed[9]]),
        transports,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_kinds_are_skipped_and_short_offers_refused() {
        let host: SocketAddr = "10.0.0.1:9".parse().unwrap();
        let mut body = 77u64.to_le_bytes().to_vec();
        body.extend_from_slice(&[0, 2, 3, 0]);
        body.extend_from_slice(&[9, 1, 0, 0, 5]);
        body.extend_from_slice(&[0, 2, 0xdc, 5, 0x34, 0x12]);
        body.extend_from_slice(&[1, 6, 0xdc, 5, 2, 0, 0, 0, 0, 1]);
        let offer = decode(&body, host).unwrap();
        assert_eq!((offer.key, offer.window), (77, 512));
        let addresses: Vec<_> = offer.transports.iter().map(|t| t.address).collect();
        assert_eq!(
            addresses,
            [
                PortAddress::Udp("10.0.0.1:4660".parse().unwrap()),
                PortAddress::Xdp([2, 0, 0, 0, 0, 1])
            ]
        );
        assert!(offer.transports.iter().all(|t| t.mtu == 1500));
        for len in 0..body.len() {
            assert_eq!(decode(&body[..len], host), None, "{len}");
        }
    }
}
