//! The XDP program's verdicts, frame by frame, by the kernel's test runs: what a NIC that is
//! shared does with a frame, in every mode.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::net::IpAddr;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use colo_bpf::{
    AddressOwner, Groups, GuestFrames, LINK_ETHERTYPE, LinkChannel, Mac, XdpCounters, XdpError,
    XdpProgram,
};

const GUEST: Mac = [0x52, 0x54, 0x00, 0xc0, 0x10, 0x01];
const SECOND: Mac = [0x52, 0x54, 0x00, 0xc0, 0x10, 0x02];
const HOST: Mac = [0x52, 0x54, 0x00, 0xc0, 0x20, 0x01];
const BROADCAST: Mac = [0xff; 6];
const MULTICAST_4: Mac = [0x01, 0x00, 0x5e, 0, 0, 0xfb];
const MULTICAST_6: Mac = [0x33, 0x33, 0xff, 0, 0, 1];
const STP: Mac = [0x01, 0x80, 0xc2, 0, 0, 0];

const HOST_IP: [u8; 4] = [192, 0, 2, 1];
const GUEST_IP: [u8; 4] = [192, 0, 2, 2];
const OTHER_IP: [u8; 4] = [192, 0, 2, 3];
const LINK_PORT: u16 = 7001;

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;

/// What the program answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Drop = 1,
    Pass = 2,
    Redirect = 4,
}
use Action::{Drop, Pass, Redirect};

/// The counter that must have moved, and no other.
type Counter = fn(&mut XdpCounters) -> &mut u64;

const TO_HOST: (Action, Counter) = (Pass, |c| &mut c.host_frames);
const TO_HOST_NEIGHBOUR: (Action, Counter) = (Pass, |c| &mut c.host_neighbour_frames);
const TO_HOST_GROUP: (Action, Counter) = (Pass, |c| &mut c.host_group_frames);
const TO_GUEST: (Action, Counter) = (Redirect, |c| &mut c.guest_frames);
const TO_GUEST_GROUP: (Action, Counter) = (Redirect, |c| &mut c.guest_group_frames);
const MUTE: (Action, Counter) = (Drop, |c| &mut c.guest_dropped_frames);
const UNBOUND: (Action, Counter) = (Drop, |c| &mut c.guest_unbound_frames);
const TO_LINK: (Action, Counter) = (Redirect, |c| &mut c.link_frames);
const LINK_UNBOUND: (Action, Counter) = (Drop, |c| &mut c.link_unbound_frames);

fn xsk() -> OwnedFd {
    // SAFETY: plain system call that gives a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "no AF_XDP: {}", std::io::Error::last_os_error());
    // SAFETY: `fd` was just made by the kernel and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

struct Bench {
    program: XdpProgram,
    _guest: OwnedFd,
    _link: OwnedFd,
}

impl Bench {
    fn new(guest_frames: GuestFrames, groups: Groups) -> Self {
        let mut program = XdpProgram::load().unwrap();
        let (guest, link) = (xsk(), xsk());
        program.set_guest_socket(0, guest.as_fd()).unwrap();
        program.set_link_socket(0, link.as_fd()).unwrap();
        program.set_guest_frames(guest_frames).unwrap();
        program.set_groups(groups).unwrap();
        program.add_guest_mac(GUEST).unwrap();
        program.add_guest_mac(SECOND).unwrap();
        for (ip, owner) in [
            (HOST_IP, AddressOwner::Host),
            (GUEST_IP, AddressOwner::Guest),
        ] {
            program.set_address(ip.into(), owner).unwrap();
            program.set_address(ip6(ip).into(), owner).unwrap();
        }
        program
            .set_link_channel(LinkChannel {
                ethertype: Some(LINK_ETHERTYPE),
                udp_port: Some(LINK_PORT),
            })
            .unwrap();
        Self {
            program,
            _guest: guest,
            _link: link,
        }
    }

    /// Runs one frame and sees that it was counted once, where it belongs.
    #[track_caller]
    fn expect(&mut self, frame: &[u8], (action, counter): (Action, Counter)) {
        let mut expected = self.program.counters().unwrap();
        let answer = self.program.run_on(frame, None).unwrap();
        assert_eq!(answer, action as u32, "{frame:02x?}");
        *counter(&mut expected) += 1;
        assert_eq!(self.program.counters().unwrap(), expected, "{frame:02x?}");
    }
}

fn ip6(last: [u8; 4]) -> [u8; 16] {
    let mut address = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    address[12..].copy_from_slice(&last);
    address
}

/// An Ethernet frame behind these VLAN tags, padded to the shortest that a wire carries.
fn frame(destination: Mac, tags: &[u16], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = destination.to_vec();
    frame.extend(HOST);
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend(5_u16.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame.resize(frame.len().max(60), 0);
    frame
}

fn arp_for(target: [u8; 4]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(HOST);
    arp.extend(OTHER_IP);
    arp.extend([0; 6]);
    arp.extend(target);
    arp
}

fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 255];
    packet.extend(ip6(OTHER_IP));
    packet.extend(ip6(HOST_IP));
    packet.extend(payload);
    packet
}

fn solicitation_for(target: [u8; 4]) -> Vec<u8> {
    let mut icmp = vec![135, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend(ip6(target));
    ipv6(58, &icmp)
}

fn udp_to(port: u16) -> Vec<u8> {
    let mut udp = 999_u16.to_be_bytes().to_vec();
    udp.extend(port.to_be_bytes());
    udp.extend([0, 12, 0, 0, 1, 2, 3, 4]);
    udp
}

/// An IPv4 packet; `fragment` is the word of flags and offset.
fn ipv4(protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 20 + payload.len() as u8, 0, 1];
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(OTHER_IP);
    packet.extend(HOST_IP);
    packet.extend(payload);
    packet
}

#[test]
fn the_guest_gets_its_frames_and_the_host_the_rest() {
    let mut bench = Bench::new(GuestFrames::Accept, Groups::Guest);
    for tags in [&[][..], &[VLAN], &[QINQ, VLAN], &[VLAN, VLAN, VLAN]] {
        for (destination, expected) in [
            (GUEST, TO_GUEST),
            (SECOND, TO_GUEST),
            (HOST, TO_HOST),
            ([0x52, 0x54, 0x00, 0xc0, 0x10, 0x03], TO_HOST),
            ([0x52, 0x55, 0x00, 0xc0, 0x10, 0x01], TO_HOST),
            (BROADCAST, TO_GUEST_GROUP),
            (MULTICAST_4, TO_GUEST_GROUP),
            (MULTICAST_6, TO_GUEST_GROUP),
            (STP, TO_HOST),
            ([0xff, 0xff, 0xff, 0xff, 0xff, 0xfd], TO_HOST),
            ([0x33, 0x35, 0, 0, 0, 1], TO_HOST),
            ([0x01, 0x00, 0x5f, 0, 0, 1], TO_HOST),
        ] {
            bench.expect(&frame(destination, tags, IPV4, &[]), expected);
        }
    }
    bench.expect(
        &frame(GUEST, &[], LINK_ETHERTYPE, &[]),
        TO_GUEST, // The guest's address decides first.
    );
    bench.expect(
        &frame(GUEST, &[], IPV4, &ipv4(17, 0, &udp_to(LINK_PORT))),
        TO_GUEST,
    );
    bench.program.remove_guest_mac(SECOND).unwrap();
    bench.program.remove_guest_mac(SECOND).unwrap();
    bench.expect(&frame(SECOND, &[], IPV4, &[]), TO_HOST);
}

#[test]
fn who_asks_for_an_address_reaches_its_owner() {
    let table = [
        (Groups::Guest, HOST_IP, TO_HOST_NEIGHBOUR),
        (Groups::Guest, GUEST_IP, TO_GUEST_GROUP),
        (Groups::Guest, OTHER_IP, TO_GUEST_GROUP),
        (Groups::Host, HOST_IP, TO_HOST_NEIGHBOUR),
        (Groups::Host, GUEST_IP, TO_GUEST_GROUP),
        (Groups::Host, OTHER_IP, TO_HOST_GROUP),
        (Groups::Copied, HOST_IP, TO_HOST_GROUP),
        (Groups::Copied, GUEST_IP, TO_HOST_GROUP),
        (Groups::Copied, OTHER_IP, TO_HOST_GROUP),
    ];
    for (groups, target, expected) in table {
        let mut bench = Bench::new(GuestFrames::Accept, groups);
        for tags in [&[][..], &[VLAN], &[QINQ, VLAN]] {
            bench.expect(&frame(BROADCAST, tags, ARP, &arp_for(target)), expected);
            bench.expect(
                &frame(MULTICAST_6, tags, IPV6, &solicitation_for(target)),
                expected,
            );
        }
    }
}

#[test]
fn broadcast_that_asks_for_nobody_goes_by_the_setting() {
    for (groups, expected) in [
        (Groups::Guest, TO_GUEST_GROUP),
        (Groups::Host, TO_HOST_GROUP),
        (Groups::Copied, TO_HOST_GROUP),
    ] {
        let mut bench = Bench::new(GuestFrames::Accept, groups);
        bench.expect(&frame(BROADCAST, &[], IPV4, &[]), expected);
        // Not ARP for IPv4 over Ethernet, though the address would match.
        for (at, value) in [(2, 9), (4, 7), (5, 16)] {
            let mut strange = arp_for(HOST_IP);
            strange[at] = value;
            bench.expect(&frame(BROADCAST, &[], ARP, &strange), expected);
        }
        // Not a solicitation: an advertisement, and UDP.
        let mut advertisement = solicitation_for(HOST_IP);
        advertisement[40] = 136;
        bench.expect(&frame(MULTICAST_6, &[], IPV6, &advertisement), expected);
        let mut udp = solicitation_for(HOST_IP);
        udp[6] = 17;
        bench.expect(&frame(MULTICAST_6, &[], IPV6, &udp), expected);
        // Cut off in the middle of what would be read.
        let whole = frame(BROADCAST, &[], ARP, &arp_for(HOST_IP));
        bench.expect(&whole[..14 + 27], expected);
        let whole = frame(MULTICAST_6, &[], IPV6, &solicitation_for(HOST_IP));
        bench.expect(&whole[..14 + 63], expected);
        let whole = frame(BROADCAST, &[VLAN], ARP, &arp_for(HOST_IP));
        bench.expect(&whole[..17], expected);
    }
    let mut bench = Bench::new(GuestFrames::Accept, Groups::Guest);
    let asks = frame(BROADCAST, &[], ARP, &arp_for(HOST_IP));
    bench.expect(&asks, TO_HOST_NEIGHBOUR);
    bench.program.remove_address(HOST_IP.into()).unwrap();
    bench.program.remove_address(HOST_IP.into()).unwrap();
    bench.expect(&asks, TO_GUEST_GROUP);
}

#[test]
fn a_secondary_drops_the_guests_frames_and_nothing_else() {
    let mut bench = Bench::new(GuestFrames::Drop, Groups::Guest);
    let table = [
        (frame(GUEST, &[], IPV4, &[]), MUTE, TO_GUEST),
        (frame(GUEST, &[VLAN], IPV4, &[]), MUTE, TO_GUEST),
        (frame(GUEST, &[], LINK_ETHERTYPE, &[]), MUTE, TO_GUEST),
        (frame(BROADCAST, &[], IPV4, &[]), MUTE, TO_GUEST_GROUP),
        (
            frame(BROADCAST, &[], ARP, &arp_for(GUEST_IP)),
            MUTE,
            TO_GUEST_GROUP,
        ),
        (
            frame(BROADCAST, &[], ARP, &arp_for(HOST_IP)),
            TO_HOST_NEIGHBOUR,
            TO_HOST_NEIGHBOUR,
        ),
        (frame(HOST, &[], IPV4, &[]), TO_HOST, TO_HOST),
        (frame(STP, &[], 38, &[]), TO_HOST, TO_HOST),
        (frame(HOST, &[], LINK_ETHERTYPE, &[]), TO_LINK, TO_LINK),
    ];
    for (frame, before, _) in &table {
        bench.expect(frame, *before);
    }
    bench.program.set_guest_frames(GuestFrames::Accept).unwrap();
    assert_eq!(bench.program.guest_frames(), GuestFrames::Accept);
    for (frame, _, promoted) in &table {
        bench.expect(frame, *promoted);
    }
    bench.program.set_guest_frames(GuestFrames::Drop).unwrap();
    bench.expect(&table[0].0, MUTE);
}

#[test]
fn a_program_that_was_told_nothing_is_mute() {
    let mut bench = Bench {
        program: XdpProgram::load().unwrap(),
        _guest: xsk(),
        _link: xsk(),
    };
    bench.expect(&frame(BROADCAST, &[], IPV4, &[]), MUTE);
    bench.expect(&frame(GUEST, &[], IPV4, &[]), TO_HOST);
    bench.expect(&frame(HOST, &[], LINK_ETHERTYPE, &[]), TO_HOST);
    bench.expect(&frame(HOST, &[], IPV4, &ipv4(17, 0, &udp_to(0))), TO_HOST);
}

#[test]
fn a_nic_of_its_own_gives_the_guest_everything_but_the_link() {
    let mut bench = Bench::new(GuestFrames::Everything, Groups::Host);
    bench.expect(&frame(GUEST, &[], IPV4, &[]), TO_GUEST);
    bench.expect(&frame(HOST, &[VLAN], IPV4, &[]), TO_GUEST);
    bench.expect(
        &frame(BROADCAST, &[], ARP, &arp_for(HOST_IP)),
        TO_GUEST_GROUP,
    );
    bench.expect(&frame(STP, &[], 38, &[]), TO_GUEST_GROUP);
    bench.expect(&frame(HOST, &[], LINK_ETHERTYPE, &[]), TO_LINK);
}

#[test]
fn the_links_frames_are_known_by_type_or_port() {
    let mut bench = Bench::new(GuestFrames::Accept, Groups::Guest);
    let link = udp_to(LINK_PORT);
    for tags in [&[][..], &[VLAN], &[QINQ, VLAN]] {
        for (ethertype, payload, expected) in [
            (LINK_ETHERTYPE, vec![], TO_LINK),
            (LINK_ETHERTYPE + 1, vec![], TO_HOST),
            (IPV4, ipv4(17, 0, &link), TO_LINK),
            (IPV4, ipv4(17, 0x4000, &link), TO_LINK), // Do not fragment.
            (IPV4, ipv4(17, 0x2000, &link), TO_HOST), // The first fragment.
            (IPV4, ipv4(17, 0x0001, &link), TO_HOST), // A later one.
            (IPV4, ipv4(6, 0, &link), TO_HOST),
            (IPV4, ipv4(17, 0, &udp_to(LINK_PORT + 1)), TO_HOST),
            (IPV6, ipv6(17, &link), TO_LINK),
            (IPV6, ipv6(6, &link), TO_HOST),
            (IPV6, ipv6(17, &udp_to(LINK_PORT + 1)), TO_HOST),
        ] {
            bench.expect(&frame(HOST, tags, ethertype, &payload), expected);
        }
    }
    // Never broadcast, and not cut off before the port.
    bench.expect(&frame(BROADCAST, &[], LINK_ETHERTYPE, &[]), TO_GUEST_GROUP);
    let whole = frame(HOST, &[], IPV4, &ipv4(17, 0, &link));
    bench.expect(&whole[..14 + 23], TO_HOST);
    let whole = frame(HOST, &[], IPV6, &ipv6(17, &link));
    bench.expect(&whole[..14 + 43], TO_HOST);
    // Options move the port to where nobody looks.
    let mut options = frame(HOST, &[], IPV4, &ipv4(17, 0, &link));
    options[14] = 0x46;
    bench.expect(&options, TO_HOST);

    bench
        .program
        .set_link_channel(LinkChannel::default())
        .unwrap();
    bench.expect(&frame(HOST, &[], LINK_ETHERTYPE, &[]), TO_HOST);
    bench.expect(&frame(HOST, &[], IPV4, &ipv4(17, 0, &link)), TO_HOST);
}

#[test]
fn without_a_socket_on_the_queue_nothing_reaches_the_host() {
    let mut bench = Bench::new(GuestFrames::Accept, Groups::Guest);
    for _ in 0..2 {
        bench.program.remove_guest_socket(0).unwrap();
        bench.program.remove_link_socket(0).unwrap();
    }
    bench.expect(&frame(GUEST, &[], IPV4, &[]), UNBOUND);
    bench.expect(&frame(BROADCAST, &[], IPV4, &[]), UNBOUND);
    bench.expect(&frame(HOST, &[], LINK_ETHERTYPE, &[]), LINK_UNBOUND);
    bench.expect(&frame(HOST, &[], IPV4, &[]), TO_HOST);
    let other = xsk();
    bench.program.set_guest_socket(1, other.as_fd()).unwrap();
    bench.expect(&frame(GUEST, &[], IPV4, &[]), UNBOUND);
    bench.program.set_guest_socket(0, other.as_fd()).unwrap();
    bench.expect(&frame(GUEST, &[], IPV4, &[]), TO_GUEST);
    drop(other); // A socket that is closed leaves the map.
    bench.expect(&frame(GUEST, &[], IPV4, &[]), UNBOUND);
}

#[test]
fn short_frames_go_to_the_host_and_are_counted() {
    let mut bench = Bench::new(GuestFrames::Accept, Groups::Guest);
    let whole = frame(GUEST, &[], IPV4, &[]);
    bench.expect(&whole[..14], TO_GUEST);
    // A test run takes no frame below 14 bytes, but the first bytes can be metadata in front of the
    // frame. Newer kernels refuse that too: they never show a program such a frame.
    let mut shown = 0;
    for len in [4, 8, 12] {
        let mut input = vec![0; 16 - len];
        input.extend(&whole[..len]);
        let mut context = [0_u8; 24]; // struct xdp_md: data, data_end, data_meta, ...
        context[0..4].copy_from_slice(&(16 - len as u32).to_ne_bytes());
        context[4..8].copy_from_slice(&16_u32.to_ne_bytes());
        if let Ok(answer) = bench.program.run_on(&input, Some(&context)) {
            assert_eq!(answer, Pass as u32, "{len} bytes");
            shown += 1;
        }
    }
    let counters = bench.program.counters().unwrap();
    assert_eq!((counters.short_frames, counters.guest_frames), (shown, 1));
}

#[test]
fn jumbo_frames_in_several_buffers_are_judged_by_their_headers() {
    let mut bench = Bench::new(GuestFrames::Accept, Groups::Guest);
    bench.expect(&frame(GUEST, &[], IPV4, &[0x5a; 9000]), TO_GUEST);
    bench.expect(&frame(HOST, &[], IPV4, &[0x5a; 9000]), TO_HOST);
}

#[test]
fn tables_have_limits_that_are_named() {
    let mut program = XdpProgram::load().unwrap();
    for n in 0..64 {
        program.add_guest_mac([2, 0, 0, 0, 0, n]).unwrap();
    }
    let full = program.add_guest_mac([2, 0, 0, 0, 1, 0]).unwrap_err();
    assert!(matches!(full, XdpError::Full { limit: 64, .. }), "{full}");
    program.add_guest_mac([2, 0, 0, 0, 0, 63]).unwrap();
    program.remove_guest_mac([2, 0, 0, 0, 0, 63]).unwrap();
    program.add_guest_mac([2, 0, 0, 0, 1, 0]).unwrap();

    let address = |n: u32| IpAddr::from(n.to_be_bytes());
    for n in 0..1024 {
        program.set_address(address(n), AddressOwner::Host).unwrap();
    }
    let full = program
        .set_address(address(1024), AddressOwner::Host)
        .unwrap_err();
    assert!(matches!(full, XdpError::Full { limit: 1024, .. }), "{full}");

    let socket = xsk();
    program.set_guest_socket(1023, socket.as_fd()).unwrap();
    let full = program.set_guest_socket(1024, socket.as_fd()).unwrap_err();
    assert!(full.to_string().contains("queue 1024"), "{full}");
    let (pipe, _other) = std::io::pipe().unwrap();
    let wrong = program.set_link_socket(3, pipe.as_fd()).unwrap_err();
    assert!(matches!(wrong, XdpError::NotAnXsk { queue: 3 }), "{wrong}");
}
