//! Frames of two guests that mostly do the same, and of their clients.
//!
//! Invariant: what is drawn from few bytes is drawn from few values, so that flows, places and
//! contents meet.

use std::fmt;

use colo_compare::testing::{Segment, Side, VecFrames, echo, fragment, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use colo_compare::wire::{self, Packet};
use colo_compare::{Direction, HEADER_MAX, Limits, PrimaryPath, SecondaryPath};

use super::bytes::Bytes;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame(Vec<u8>);

impl Frame {
    /// From the Ethernet header on.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The header view.
    pub fn parse(&self, direction: Direction) -> Packet {
        parse(&self.0, direction)
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let packet = self.parse(Direction::FromGuest);
        write!(f, "{}", packet.key)?;
        if let Some(tcp) = packet.tcp {
            write!(
                f,
                " flags {:#04x} seq {} ack {}",
                tcp.flags, tcp.seq, tcp.ack
            )?;
        }
        let from = packet.tcp.map_or(packet.l4, |tcp| tcp.payload_at);
        write!(f, " {:?}", &self.0[usize::from(from).min(self.0.len())..])
    }
}

/// The header view of a frame.
pub fn parse(frame: &[u8], direction: Direction) -> Packet {
    wire::parse(
        &frame[..frame.len().min(HEADER_MAX)],
        frame.len(),
        direction,
    )
}

/// Where streams begin: at the wrap, where the sign of differences changes, and elsewhere.
const ISNS: [u32; 4] = [u32::MAX - 20, 0x7fff_fff0, 0, 1_000_000];

fn side(choice: u8) -> Side {
    if choice & 1 == 0 { Side::V4 } else { Side::V6 }
}

fn isn(choice: u8) -> u32 {
    ISNS[usize::from(choice & 3)]
}

/// The byte at a place of every stream.
fn content(at: usize) -> u8 {
    (at / 3) as u8 & 3
}

/// A frame of the PVM or the SVM.
pub fn output(bytes: &mut Bytes<'_>) -> Frame {
    pair(bytes).1
}

/// The same frame of both guests; the second one differs if the input says so.
pub fn pair(bytes: &mut Bytes<'_>) -> (Frame, Frame) {
    let choice = bytes.u8();
    let own = match choice >> 5 {
        0..=4 => segment(choice, bytes),
        5 => {
            let payload = vec![choice & 3; bytes.below(40)];
            let peer_port = 5000 + u16::from(choice >> 2 & 1);
            // The guest opens a flow, perhaps from another port.
            let guest_port = 53 + u16::from(choice >> 3 & 1);
            udp(side(choice), false, guest_port, peer_port, &payload)
        }
        6 => echo(
            side(choice),
            false,
            u16::from(choice >> 1 & 1),
            &[choice >> 2 & 3; 12],
        ),
        _ => other(choice, bytes),
    };
    let mut differing = own.clone();
    let change = bytes.u8();
    if change >= 0xc0 && !own.is_empty() {
        let at = usize::from(bytes.u8()) % own.len();
        match change & 3 {
            0 | 1 => differing[at] ^= 1 << (change >> 2 & 7),
            2 => differing.push(0),
            _ => drop(differing.pop()),
        }
    }
    (Frame(own), Frame(differing))
}

fn segment(choice: u8, bytes: &mut Bytes<'_>) -> Vec<u8> {
    let (what, place) = (bytes.u8(), usize::from(bytes.u8() & 63));
    let peer_port = 40_000 + u16::from(choice >> 1 & 1);
    let guest_port = if choice & 0b1_1100 == 0b1_1100 {
        50_000
    } else {
        80
    };
    let isn = isn(choice >> 2);
    let segment = Segment::new(side(choice)).ports(guest_port, peer_port);
    let at = isn.wrapping_add(1 + place as u32);
    let payload: Vec<u8> = (place..place + usize::from(what & 15))
        .map(content)
        .collect();
    let segment = match what >> 4 {
        0 => {
            // Now and then with data, as TCP Fast Open allows.
            let n = usize::from(what & 15).saturating_sub(12);
            let data: Vec<u8> = (0..n).map(content).collect();
            let segment = segment.flags(SYN | ACK).seq(isn).payload(&data);
            segment.option(&[2, 4, 5, 0xb4])
        }
        1 => segment.flags(SYN).seq(isn),
        2 => segment.flags(RST | ACK).seq(at),
        3 => segment.flags(FIN | ACK).seq(at).payload(&payload),
        4 => segment.seq(at),
        5 => segment.seq(at).payload(&payload).ttl(63),
        _ => segment.seq(at).payload(&payload),
    };
    segment.ack(8 + u32::from(choice >> 4 & 1)).bytes()
}

fn other(choice: u8, bytes: &mut Bytes<'_>) -> Vec<u8> {
    match choice & 3 {
        0 => bytes.take(usize::from(choice >> 2 & 7) * 8).to_vec(),
        1 => ip_frame(side(choice >> 2), false, 47, 64, 0, &[choice >> 3; 10]),
        2 => cut_datagram(choice, bytes),
        _ => {
            let mut arp = vec![0xff; 6];
            arp.extend_from_slice(&[
                2,
                0,
                0,
                0,
                0,
                1,
                8,
                6,
                0,
                1,
                8,
                0,
                6,
                4,
                0,
                1 + (choice >> 2 & 1),
            ]);
            arp.resize(42, choice >> 3 & 1);
            arp
        }
    }
}

/// A fragment of one of two UDP datagrams of 48 bytes, cut where the input says.
fn cut_datagram(choice: u8, bytes: &mut Bytes<'_>) -> Vec<u8> {
    let id = u16::from(choice >> 4 & 1);
    let side = side(choice >> 2);
    let whole = udp(side, false, 53, 5000, &[id as u8; 40]);
    let l4 = if side == Side::V4 { 34 } else { 54 };
    let cut = bytes.u8();
    let from = usize::from(cut & 7) * 8 % 48;
    let to = (from + 8 * (1 + usize::from(cut >> 3 & 7))).min(48);
    fragment(side, id, &whole[l4..], from, to)
}

/// A frame of a client.
pub fn input(bytes: &mut Bytes<'_>) -> Frame {
    let (choice, place) = (bytes.u8(), bytes.u8());
    let peer_port = 40_000 + u16::from(choice >> 1 & 1);
    let segment = Segment::new(side(choice))
        .to_guest()
        .ports(80, peer_port)
        .seq(8);
    let ack = isn(choice >> 2).wrapping_add(1 + u32::from(place & 63));
    Frame(match choice >> 5 {
        0 => segment.flags(SYN).seq(7).bytes(),
        1 => segment.flags(RST).seq(8).bytes(),
        2 => udp(side(choice), true, 53, 5000, b"query"),
        3 => echo(side(choice), true, u16::from(choice >> 1 & 1), &[1; 12]),
        4 => segment.ack(ack).payload(b"request").bytes(),
        _ => segment.ack(ack).bytes(),
    })
}

/// The path of a host that takes over while one connection is open and another one half open.
pub fn former_secondary(limits: Limits, frames: &mut VecFrames) -> PrimaryPath {
    let mut path = SecondaryPath::new(limits);
    let mut record = Vec::new();
    PrimaryPath::new(limits).export_client_xlate(&mut record);
    let joined = path.commit(0, frames, 1, Vec::new(), &record);
    assert_eq!(joined, Ok(()));
    let mut input_seq = 0;
    for (side, peer_port, is_open) in [(Side::V4, 40_000, true), (Side::V6, 40_001, false)] {
        let segment = || Segment::new(side).ports(80, peer_port);
        let mut input = |path: &mut SecondaryPath, frames: &mut VecFrames, frame: &[u8]| {
            input_seq += 1;
            let token = frames.insert(frame).expect("a slot");
            let taken = path.handle_mirror(0, frames, 2, input_seq, token);
            assert_eq!(taken, Ok(()));
            let delivered = path.poll_deliver(0, frames).expect("it runs");
            frames.take(delivered);
        };
        let syn = segment().to_guest().flags(SYN).seq(7);
        input(&mut path, frames, &syn.bytes());
        let answer = segment().flags(SYN | ACK).seq(isn(0)).ack(8);
        let token = frames.insert(&answer.bytes()).expect("a slot");
        path.handle_guest_tx(0, frames, token);
        if is_open {
            // The client has seen another number.
            let ack = segment().to_guest().seq(8).ack(isn(0).wrapping_add(5001));
            input(&mut path, frames, &ack.bytes());
        }
    }
    path.take_over(0, frames)
}
