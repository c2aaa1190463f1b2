//! The laboratory itself, on real namespaces: what arrives at a TAP, the cuts, captures and clean-up.
//!
//! Needs root and `/dev/net/tun`; without them each test prints `SKIPPED` and ends.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use colo_lab::netns::NETNS_DIR;
use colo_lab::topology::{
    CLIENT_V4, Capture, Direction, GUEST_MAC, GUEST_V4, Host, TAP, Topology, pcap_frames, sweep,
};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const MTU: usize = 1500;
const ETHERNET: usize = 14;

/// `None`, with a word to the test runner, where namespaces cannot be made.
fn topology() -> Option<Topology> {
    // SAFETY: no preconditions.
    if unsafe { libc::geteuid() } != 0 || !Path::new("/dev/net/tun").exists() {
        println!("SKIPPED: needs root and /dev/net/tun");
        return None;
    }
    Some(Topology::new().unwrap())
}

/// Attaches to the TAP of the namespace that the calling thread is in.
fn open_tap() -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let mut request = [0u8; 40];
    request[..TAP.len()].copy_from_slice(TAP.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the request is a `struct ifreq` of 40 bytes, alive during the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    file
}

fn ones_sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The ones' complement sum of a TCP segment with its pseudo header: 0xffff when its checksum is right.
fn tcp_sum(packet: &[u8]) -> u16 {
    let segment = &packet[20..];
    let length = (segment.len() as u16).to_be_bytes();
    ones_sum(&[&packet[12..20], &[0, 6], &length, segment])
}

/// Answers a SYN with a SYN-ACK that offers a large window.
fn syn_ack(frame: &[u8]) -> Vec<u8> {
    let mut reply = frame[..54].to_vec();
    reply[..6].copy_from_slice(&frame[6..12]);
    reply[6..12].copy_from_slice(&frame[..6]);
    reply[16..18].copy_from_slice(&44u16.to_be_bytes());
    reply[26..30].copy_from_slice(&frame[30..34]);
    reply[30..34].copy_from_slice(&frame[26..30]);
    reply[24..26].fill(0);
    let header = !ones_sum(&[&reply[14..34]]);
    reply[24..26].copy_from_slice(&header.to_be_bytes());
    reply[34..36].copy_from_slice(&frame[36..38]);
    reply[36..38].copy_from_slice(&frame[34..36]);
    let sequence = u32::from_be_bytes(frame[38..42].try_into().unwrap());
    reply[38..42].copy_from_slice(&7u32.to_be_bytes());
    reply[42..46].copy_from_slice(&(sequence + 1).to_be_bytes());
    reply[46..54].copy_from_slice(&[0x60, 0x12, 0xff, 0xff, 0, 0, 0, 0]);
    reply.extend([2, 4, 5, 180]);
    let checksum = !tcp_sum(&reply[14..]);
    reply[50..52].copy_from_slice(&checksum.to_be_bytes());
    reply
}

#[test]
fn frames_at_the_tap_are_whole_and_not_above_the_mtu() {
    let Some(topology) = topology() else { return };
    let neighbour = format!("neigh replace {GUEST_V4} lladdr {GUEST_MAC} dev eth0 nud permanent\n");
    topology.client.batch(&neighbour).unwrap();
    let mut tap = topology.host(Host::A).run(open_tap).unwrap();
    let client = topology.client.spawn("client", || {
        let target = SocketAddr::from((GUEST_V4, 80));
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(10)).unwrap();
        // More than one segment at once, so that the kernel would like to offload the cutting.
        stream.write_all(&[b'x'; 30_000]).unwrap();
    });
    let mut frame = [0; 70_000];
    let mut payload = 0;
    while payload < 10_000 {
        let length = tap.read(&mut frame).unwrap();
        assert!(length <= MTU + ETHERNET, "a frame of {length} bytes");
        let frame = &frame[..length];
        if frame[12..14] != [8, 0] || frame[23] != 6 {
            continue;
        }
        let end = ETHERNET + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        assert_eq!(ones_sum(&[&frame[14..34]]), 0xffff, "header checksum");
        assert_eq!(tcp_sum(&frame[14..end]), 0xffff, "segment checksum");
        payload += end - 34 - usize::from(frame[46] >> 4) * 4;
        if frame[47] & 2 != 0 {
            tap.write_all(&syn_ack(frame)).unwrap();
        }
    }
    client.unwrap().join().unwrap().unwrap();
}

/// Sends datagrams over the replication link until one arrives, or `tries` are used up.
fn link_carries(topology: &Topology, tries: u32) -> bool {
    let bind = |host: Host| {
        let address = (host.link_address(), 0);
        topology
            .host(host)
            .run(|| UdpSocket::bind(address).unwrap())
            .unwrap()
    };
    let (from, to) = (bind(Host::A), bind(Host::B));
    to.set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    (0..tries).any(|_| {
        from.send_to(b"x", to.local_addr().unwrap()).unwrap();
        to.recv(&mut [0; 8]).is_ok()
    })
}

#[test]
fn a_cut_link_swallows_and_heals() {
    let Some(topology) = topology() else { return };
    assert!(link_carries(&topology, 20));
    topology.cut_link().unwrap();
    assert!(!link_carries(&topology, 3));
    topology.heal_link().unwrap();
    assert!(link_carries(&topology, 20));
}

#[test]
fn a_capture_shows_the_client_and_nothing_else() {
    let Some(topology) = topology() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("b.pcap");
    let port = Host::B.port();
    let capture = Capture::start(&topology.switch, port, Direction::Out, &file).unwrap();
    let socket = topology
        .client
        .run(|| UdpSocket::bind((CLIENT_V4, 0)).unwrap())
        .unwrap();
    // Nobody answers, so these ARP requests are flooded to both hosts.
    for _ in 0..3 {
        socket.send_to(b"x", (GUEST_V4, 9)).unwrap();
    }
    let mut frames = Vec::new();
    let mut capture = Some(capture);
    // The frames have passed the port when an ARP request has come through the TAP.
    let mut tap = topology.host(Host::B).run(open_tap).unwrap();
    socket.send_to(b"x", (GUEST_V4, 9)).unwrap();
    let mut frame = [0; 2000];
    while frames.is_empty() {
        let length = tap.read(&mut frame).unwrap();
        if length >= ETHERNET && frame[12..14] == [8, 6] {
            frames = pcap_frames(&capture.take().unwrap().finish().unwrap());
        }
    }
    assert!(
        frames
            .iter()
            .all(|frame| matches!(frame.bytes[12..14], [8, 6] | [0x86, 0xdd]))
    );
    assert!(
        frames.iter().any(|frame| frame.bytes[12..14] == [8, 6]),
        "{frames:?}"
    );
}

#[test]
fn nothing_is_left_behind_and_the_leftovers_of_the_dead_are_swept() {
    let Some(topology) = topology() else { return };
    let names = [topology.client.name(), topology.switch.name()].map(str::to_owned);
    let there = |name: &str| Path::new(NETNS_DIR).join(name).exists();
    assert!(names.iter().all(|name| there(name)));
    drop(topology);
    assert!(!names.iter().any(|name| there(name)));

    let mut child = Command::new("true").stdin(Stdio::null()).spawn().unwrap();
    let name = format!("colo-{}-dead-a", child.id());
    child.wait().unwrap();
    assert!(
        Command::new("ip")
            .args(["netns", "add", &name])
            .status()
            .unwrap()
            .success()
    );
    sweep().unwrap();
    assert!(!there(&name));
}
