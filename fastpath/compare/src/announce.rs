//! The guest's addresses, learnt from what it sends, and the frames that announce them after a
//! takeover: gratuitous ARP, unsolicited neighbour advertisement, RARP for the switches.
//!
//! Invariant: the set is small and bounded; a guest that sends from many addresses only loses the
//! announcement of some.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::wire::checksum::{OnesSum, be16, be32};
use crate::wire::{ETHERTYPE_ARP, ETHERTYPE_IPV6, Network, Packet};

/// Most addresses that are remembered.
pub(crate) const MAX_ADDRESSES: usize = 16;
/// Longest announcement frame.
pub const ANNOUNCEMENT_MAX: usize = 86;

/// First wait before a takeover is announced again; it doubles.
const AGAIN_US: u64 = 50_000;
/// Last wait: in total about three seconds.
const AGAIN_MAX_US: u64 = 1_600_000;

const ETHERTYPE_RARP: u16 = 0x8035;
const BROADCAST: [u8; 6] = [0xff; 6];

/// When a takeover is announced again. Once is not enough: announcements get lost, and a last frame of the old
/// primary teaches the switches the old place again.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Again {
    due_us: Option<u64>,
    wait_us: u64,
}

impl Again {
    /// After a takeover at `now_us`.
    pub(crate) fn from(now_us: u64) -> Self {
        Self {
            due_us: Some(now_us + AGAIN_US),
            wait_us: AGAIN_US,
        }
    }

    pub(crate) fn due_us(&self) -> Option<u64> {
        self.due_us
    }

    /// Whether it is time; plans the next.
    pub(crate) fn is_due(&mut self, now_us: u64) -> bool {
        let is_due = self.due_us.is_some_and(|at_us| at_us <= now_us);
        if is_due {
            self.wait_us *= 2;
            self.due_us = (self.wait_us <= AGAIN_MAX_US).then_some(now_us + self.wait_us);
        }
        is_due
    }
}

/// The guest's MAC and IP addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Addresses {
    mac: Option<[u8; 6]>,
    ips: [Option<IpAddr>; MAX_ADDRESSES],
    /// What was learnt last, mostly what comes next: family and MAC address, the guest's address.
    latest: [u64; 3],
}

impl Addresses {
    /// The guest's MAC address, once it has sent something.
    pub(crate) fn mac(&self) -> Option<[u8; 6]> {
        self.mac
    }

    pub(crate) fn ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.ips.iter().flatten().copied()
    }

    /// Learns from a frame that the guest sent.
    #[inline(always)]
    pub(crate) fn learn(&mut self, header: &[u8], packet: &Packet) {
        if packet.network == Network::Other || packet.key.vlan() != [0; 2] {
            return;
        }
        let [high, low, ..] = *packet.key.words();
        let mac = u64::from(be16(header, 6)) << 32 | u64::from(be32(header, 8));
        let family = 1 + u64::from(packet.network == Network::V6);
        let latest = [family << 48 | mac, high, low];
        // Not as an array: what has just been put together is not there yet for a wide load.
        let known = self.latest[0] == latest[0] && self.latest[1] == high && self.latest[2] == low;
        if !known {
            self.latest = latest;
            self.learn_new(header, packet.key.guest());
        }
    }

    #[cold]
    fn learn_new(&mut self, header: &[u8], ip: IpAddr) {
        if header[6] & 1 == 0 {
            let mut mac = [0; 6];
            mac.copy_from_slice(&header[6..12]);
            self.mac = Some(mac);
        }
        self.add(ip);
    }

    pub(crate) fn set_mac(&mut self, mac: [u8; 6]) {
        self.mac = Some(mac);
        self.latest = [0; 3];
    }

    pub(crate) fn add(&mut self, ip: IpAddr) {
        if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
            return;
        }
        for known in &mut self.ips {
            match known {
                Some(known) if *known == ip => return,
                Some(_) => {}
                None => {
                    *known = Some(ip);
                    return;
                }
            }
        }
    }

    /// Writes announcement number `n`; `None` when there are no more.
    pub(crate) fn write(&self, n: usize, out: &mut [u8; ANNOUNCEMENT_MAX]) -> Option<usize> {
        let mac = self.mac?;
        if n == 0 {
            let unspecified = Ipv4Addr::UNSPECIFIED;
            return Some(write_arp(
                out,
                ETHERTYPE_RARP,
                3,
                mac,
                unspecified,
                unspecified,
                mac,
            ));
        }
        // Two forms per IPv4 address, because receivers differ in which one they heed.
        let (ip, form) = (self.ips.get((n - 1) / 2).copied().flatten()?, (n - 1) % 2);
        Some(match (ip, form) {
            (IpAddr::V4(ip), 0) => write_arp(out, ETHERTYPE_ARP, 1, mac, ip, ip, [0; 6]),
            (IpAddr::V4(ip), _) => write_arp(out, ETHERTYPE_ARP, 2, mac, ip, ip, BROADCAST),
            (IpAddr::V6(ip), _) => write_neighbour_advertisement(out, mac, ip),
        })
    }
}

/// RFC 826, RFC 903 and RFC 5227 layouts.
fn write_arp(
    out: &mut [u8; ANNOUNCEMENT_MAX],
    ethertype: u16,
    operation: u8,
    mac: [u8; 6],
    sender: Ipv4Addr,
    target: Ipv4Addr,
    target_mac: [u8; 6],
) -> usize {
    out.fill(0);
    out[..6].copy_from_slice(&BROADCAST);
    out[6..12].copy_from_slice(&mac);
    out[12..14].copy_from_slice(&ethertype.to_be_bytes());
    out[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    out[22..28].copy_from_slice(&mac);
    out[28..32].copy_from_slice(&sender.octets());
    out[32..38].copy_from_slice(&target_mac);
    out[38..42].copy_from_slice(&target.octets());
    60
}

/// RFC 4861 section 4.4, to all nodes, with the override flag.
fn write_neighbour_advertisement(
    out: &mut [u8; ANNOUNCEMENT_MAX],
    mac: [u8; 6],
    ip: Ipv6Addr,
) -> usize {
    const OVERRIDE: u8 = 0x20;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    out.fill(0);
    out[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
    out[6..12].copy_from_slice(&mac);
    out[12..14].copy_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
    out[14] = 0x60;
    out[19] = 32;
    out[20] = 58;
    out[21] = 255;
    out[22..38].copy_from_slice(&ip.octets());
    out[38..54].copy_from_slice(&all_nodes.octets());
    out[54] = 136;
    out[58] = OVERRIDE;
    out[62..78].copy_from_slice(&ip.octets());
    out[78] = 2;
    out[79] = 1;
    out[80..86].copy_from_slice(&mac);
    // Pseudo-header (RFC 8200 section 8.1): addresses, length, next header.
    let mut sum = OnesSum::default();
    sum.add(&out[22..54]);
    sum.add(&[0, 32, 0, 58]);
    sum.add(&out[54..86]);
    out[56..58].copy_from_slice(&(!sum.word()).to_be_bytes());
    86
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Direction, Protocol};
    use crate::testing::{Segment, Side, checksums_are_right};
    use crate::wire;

    #[test]
    fn the_guests_addresses_are_announced() {
        let mut addresses = Addresses::default();
        for side in [Side::V4, Side::V6, Side::V4] {
            let bytes = Segment::new(side).bytes();
            let packet = wire::parse(&bytes, bytes.len(), Direction::FromGuest);
            addresses.learn(&bytes, &packet);
        }
        assert_eq!(addresses.ips().count(), 2);
        let mut out = [0; ANNOUNCEMENT_MAX];
        let mut kinds = alloc::vec::Vec::new();
        let mut n = 0;
        while let Some(len) = addresses.write(n, &mut out) {
            n += 1;
            let packet = wire::parse(&out[..len], len, Direction::FromGuest);
            assert_eq!(out[6..12], addresses.mac().unwrap());
            assert!(packet.key.protocol() != Protocol::Icmpv6 || checksums_are_right(&out[..len]));
            kinds.push(packet.key.protocol());
        }
        let expected = [
            Protocol::Ether(ETHERTYPE_RARP),
            Protocol::Arp,
            Protocol::Arp,
            Protocol::Icmpv6,
            Protocol::Icmpv6,
        ];
        assert_eq!(kinds, expected);
    }
}
