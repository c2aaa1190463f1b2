//! Frames in vectors and a segment builder, for tests and simulations of the cores.
//!
//! Invariant: a slot that is used after its release, released twice or leaked is noticed:
//! [`VecFrames`] panics or [`VecFrames::used`] tells.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::digest::DigestKey;
use crate::frames::{Frames, HEADER_MAX, Token};
use crate::primary::PrimaryPath;
use crate::wire::checksum::{OnesSum, ones_sum};
use crate::wire::tcp::ACK;
use crate::wire::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};

/// [`Frames`] over vectors.
#[derive(Debug, Default)]
pub struct VecFrames {
    slots: Vec<Option<Vec<u8>>>,
    free: Vec<u32>,
    capacity: usize,
}

impl VecFrames {
    /// Room for `capacity` frames.
    pub fn new(capacity: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            capacity,
        }
    }

    /// Stores a frame; `None` when no slot is free.
    pub fn insert(&mut self, bytes: &[u8]) -> Option<Token> {
        if self.used() >= self.capacity {
            return None;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        self.slots[slot as usize] = Some(bytes.to_vec());
        Some(Token::new(slot))
    }

    /// The frame's bytes.
    pub fn bytes(&self, token: &Token) -> &[u8] {
        self.slots[token.slot() as usize]
            .as_deref()
            .expect("the slot was released before")
    }

    /// Takes the frame out and gives the slot back.
    pub fn take(&mut self, token: Token) -> Vec<u8> {
        self.free.push(token.slot());
        self.slots[token.slot() as usize]
            .take()
            .expect("the slot was released before")
    }

    /// How many slots are in use.
    pub fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Frames for VecFrames {
    fn len(&self, token: &Token) -> usize {
        self.bytes(token).len()
    }

    fn header(&self, token: &Token) -> &[u8] {
        let bytes = self.bytes(token);
        &bytes[..bytes.len().min(HEADER_MAX)]
    }

    fn header_mut(&mut self, token: &Token) -> &mut [u8] {
        let slot = self.slots[token.slot() as usize].as_mut();
        let bytes = slot.expect("the slot was released before");
        let len = bytes.len().min(HEADER_MAX);
        &mut bytes[..len]
    }

    fn first_difference(
        &self,
        a: &Token,
        a_at: usize,
        b: &Token,
        b_at: usize,
        n: usize,
    ) -> Option<usize> {
        let (a, b) = (
            &self.bytes(a)[a_at..a_at + n],
            &self.bytes(b)[b_at..b_at + n],
        );
        crate::first_difference(a, b)
    }

    fn copy_out(&self, token: &Token, at: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.bytes(token)[at..at + out.len()]);
    }

    fn duplicate(&mut self, token: &Token) -> Option<Token> {
        let bytes = self.bytes(token).to_vec();
        self.insert(&bytes)
    }

    fn release(&mut self, token: Token) {
        self.take(token);
    }
}

/// Which network protocol a built packet has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The MAC address of the guest in built packets.
pub const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The MAC address of the peer in built packets.
pub const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Builds TCP segments; from the guest unless [`Segment::to_guest`].
#[derive(Debug, Clone)]
pub struct Segment {
    side: Side,
    to_guest: bool,
    guest_port: u16,
    peer_port: u16,
    seq: u32,
    ack: u32,
    flags: u8,
    options: Vec<u8>,
    payload: Vec<u8>,
    ttl: u8,
    id: u16,
}

impl Segment {
    /// An ACK from guest port 80 to peer port 40000.
    pub fn new(side: Side) -> Self {
        Self {
            side,
            to_guest: false,
            guest_port: 80,
            peer_port: 40_000,
            seq: 0,
            ack: 0,
            flags: ACK,
            options: Vec::new(),
            payload: Vec::new(),
            ttl: 64,
            id: 0,
        }
    }

    /// Sent by the peer.
    pub fn to_guest(mut self) -> Self {
        self.to_guest = true;
        self
    }

    /// The ports.
    pub fn ports(mut self, guest: u16, peer: u16) -> Self {
        (self.guest_port, self.peer_port) = (guest, peer);
        self
    }

    /// Sequence number.
    pub fn seq(mut self, seq: u32) -> Self {
        self.seq = seq;
        self
    }

    /// Acknowledgement number; adds the flag.
    pub fn ack(mut self, ack: u32) -> Self {
        self.ack = ack;
        self.flags |= ACK;
        self
    }

    /// The flags, instead of ACK.
    pub fn flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    /// Payload.
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// TTL or hop limit.
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// IPv4 identification (or IPv6 flow label).
    pub fn id(mut self, id: u16) -> Self {
        self.id = id;
        self
    }

    /// Raw option bytes.
    pub fn option(mut self, bytes: &[u8]) -> Self {
        self.options.extend_from_slice(bytes);
        self
    }

    /// The timestamps option.
    pub fn timestamps(self, tsval: u32, tsecr: u32) -> Self {
        self.option(&[8, 10])
            .option(&tsval.to_be_bytes())
            .option(&tsecr.to_be_bytes())
    }

    /// The SACK option.
    pub fn sack(mut self, blocks: &[(u32, u32)]) -> Self {
        self = self.option(&[5, 2 + 8 * blocks.len() as u8]);
        for (left, right) in blocks {
            self = self
                .option(&left.to_be_bytes())
                .option(&right.to_be_bytes());
        }
        self
    }

    /// The frame, with right checksums.
    pub fn bytes(&self) -> Vec<u8> {
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 1);
        let mut tcp = Vec::new();
        let (from, to) = ports(self.to_guest, self.guest_port, self.peer_port);
        tcp.extend_from_slice(&from.to_be_bytes());
        tcp.extend_from_slice(&to.to_be_bytes());
        tcp.extend_from_slice(&self.seq.to_be_bytes());
        tcp.extend_from_slice(&self.ack.to_be_bytes());
        tcp.push((((20 + options.len()) / 4) << 4) as u8);
        tcp.push(self.flags);
        tcp.extend_from_slice(&[0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend_from_slice(&options);
        tcp.extend_from_slice(&self.payload);
        ip_frame(self.side, self.to_guest, 6, self.ttl, self.id, &tcp)
    }
}

fn ports(to_guest: bool, guest: u16, peer: u16) -> (u16, u16) {
    if to_guest {
        (peer, guest)
    } else {
        (guest, peer)
    }
}

/// A UDP datagram.
pub fn udp(side: Side, to_guest: bool, guest_port: u16, peer_port: u16, payload: &[u8]) -> Vec<u8> {
    let (from, to) = ports(to_guest, guest_port, peer_port);
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&from.to_be_bytes());
    bytes.extend_from_slice(&to.to_be_bytes());
    bytes.extend_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(payload);
    ip_frame(side, to_guest, 17, 64, 0, &bytes)
}

/// An ICMP or ICMPv6 echo message.
pub fn echo(side: Side, to_guest: bool, id: u16, payload: &[u8]) -> Vec<u8> {
    let (kind, protocol) = match (side, to_guest) {
        (Side::V4, true) => (8, 1),
        (Side::V4, false) => (0, 1),
        (Side::V6, true) => (128, 58),
        (Side::V6, false) => (129, 58),
    };
    let mut bytes = Vec::from([kind, 0, 0, 0]);
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes.extend_from_slice(&[0, 1]);
    bytes.extend_from_slice(payload);
    ip_frame(side, to_guest, protocol, 64, 0, &bytes)
}

/// Bytes `from..end` of a UDP message of the guest's as a fragment; `from` is a multiple of 8, and the last fragment has
/// the message's end.
pub fn fragment(side: Side, id: u16, message: &[u8], from: usize, end: usize) -> Vec<u8> {
    let (place, more) = (from as u16, u16::from(end < message.len()));
    let bytes = &message[from..end];
    match side {
        Side::V4 => {
            // Not as UDP at first, which would get a checksum in each fragment.
            let mut frame = ip_frame(side, false, 0, 64, id, bytes);
            frame[20..22].copy_from_slice(&((more << 13) | (place / 8)).to_be_bytes());
            frame[23] = 17;
            frame[24..26].fill(0);
            let sum = !ones_sum(&frame[14..34]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
            frame
        }
        Side::V6 => {
            let mut body = Vec::from([17, 0]);
            body.extend_from_slice(&(place | more).to_be_bytes());
            body.extend_from_slice(&u32::from(id).to_be_bytes());
            body.extend_from_slice(bytes);
            ip_frame(side, false, 44, 64, 0, &body)
        }
    }
}

/// Wraps a transport message between the usual two ends and sets its checksum.
pub fn ip_frame(
    side: Side,
    to_guest: bool,
    protocol: u8,
    ttl: u8,
    id: u16,
    transport: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::new();
    let (from, to) = if to_guest {
        (PEER_MAC, GUEST_MAC)
    } else {
        (GUEST_MAC, PEER_MAC)
    };
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    let (guest, peer) = addresses(side);
    let (source, destination) = if to_guest {
        (peer, guest)
    } else {
        (guest, peer)
    };
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend_from_slice(&ETHERTYPE_IPV4.to_be_bytes());
            let mut ip = [0u8; 20];
            ip[0] = 0x45;
            ip[2..4].copy_from_slice(&(20 + transport.len() as u16).to_be_bytes());
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            ip[6] = 0x40;
            ip[8] = ttl;
            ip[9] = protocol;
            ip[12..16].copy_from_slice(&source.octets());
            ip[16..20].copy_from_slice(&destination.octets());
            let sum = !ones_sum(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend_from_slice(&ip);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            frame.extend_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
            frame.extend_from_slice(&[0x60, 0]);
            frame.extend_from_slice(&id.to_be_bytes());
            frame.extend_from_slice(&(transport.len() as u16).to_be_bytes());
            frame.extend_from_slice(&[protocol, ttl]);
            frame.extend_from_slice(&source.octets());
            frame.extend_from_slice(&destination.octets());
        }
        _ => unreachable!("both ends have the same family"),
    }
    let l4 = frame.len();
    frame.extend_from_slice(transport);
    if let Some(at) = checksum_at(protocol) {
        let sum = !transport_sum(&frame, l4, protocol);
        frame[l4 + at..l4 + at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

/// The guest's and the peer's address in built packets.
pub fn addresses(side: Side) -> (IpAddr, IpAddr) {
    match side {
        Side::V4 => (
            IpAddr::V4(Ipv4Addr::new(10, 77, 0, 10)),
            IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)),
        ),
        Side::V6 => (
            IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x10)),
            IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
        ),
    }
}

fn checksum_at(protocol: u8) -> Option<usize> {
    match protocol {
        6 => Some(16),
        17 => Some(6),
        1 | 58 => Some(2),
        _ => None,
    }
}

fn transport_sum(frame: &[u8], l4: usize, protocol: u8) -> u16 {
    let length = (frame.len() - l4) as u32;
    let addresses = if l4 == 54 {
        &frame[22..54]
    } else {
        &frame[26..34]
    };
    let mut sum = OnesSum::default();
    if protocol != 1 {
        sum.add(addresses);
        sum.add(&length.to_be_bytes());
        sum.add(&[0, protocol]);
    }
    sum.add(&frame[l4..]);
    sum.word()
}

/// The digests of tests.
pub fn digest_key() -> DigestKey {
    DigestKey::new(*b"a key for tests.").expect("not zero")
}

/// The headers of a frame, how many bytes are behind them, and their digest; `None` for a frame
/// that travels as it is.
pub fn digested<'a>(frame: &'a [u8], key: &DigestKey) -> Option<(&'a [u8], u16, u128)> {
    let packet = crate::wire::parse(frame, frame.len(), crate::Direction::FromGuest);
    let (at, end) = (usize::from(packet.payload_at()), usize::from(packet.end));
    let is_digested = packet.is_digestible() && at < end;
    is_digested.then(|| (&frame[..at], (end - at) as u16, key.of(&frame[at..end])))
}

/// The SVM's output on its way to a path: as bytes, or as digests whose bytes follow when the path
/// asks for them.
#[derive(Debug, Default)]
pub struct SvmSource {
    key: Option<DigestKey>,
    /// What was sent as a digest and is not released: its epoch, and the frame.
    sent: BTreeMap<u64, (u64, Vec<u8>)>,
    asked: VecDeque<u64>,
}

impl SvmSource {
    /// One that digests all that can be.
    pub fn digesting(path: &mut PrimaryPath) -> Self {
        path.set_digest_key(Some(digest_key()));
        Self {
            key: Some(digest_key()),
            ..Self::default()
        }
    }

    /// Sends one frame.
    pub fn send(
        &mut self,
        path: &mut PrimaryPath,
        frames: &mut VecFrames,
        now_us: u64,
        (epoch, svm_seq): (u64, u64),
        bytes: &[u8],
    ) {
        match self.key.as_ref().and_then(|key| digested(bytes, key)) {
            Some((headers, n, digest)) => {
                let token = frames.insert(headers).expect("a slot");
                self.sent.insert(svm_seq, (epoch, bytes.to_vec()));
                path.handle_svm_digest(now_us, frames, epoch, svm_seq, token, n, digest);
            }
            _ => {
                let token = frames.insert(bytes).expect("a slot");
                path.handle_svm_output(now_us, frames, epoch, svm_seq, token);
            }
        }
    }

    /// The path asks for bytes.
    pub fn fetch(&mut self, svm_seq: u64) {
        self.asked.push_back(svm_seq);
    }

    /// How many questions are open.
    pub fn asked(&self) -> usize {
        self.asked.len()
    }

    /// The path has released what this stood for.
    pub fn released(&mut self, svm_seq: u64) {
        self.sent.remove(&svm_seq);
    }

    /// Answers the oldest question. False when there is none.
    pub fn answer(&mut self, path: &mut PrimaryPath, frames: &mut VecFrames, now_us: u64) -> bool {
        let Some(svm_seq) = self.asked.pop_front() else {
            return false;
        };
        if let Some((epoch, bytes)) = self.sent.get(&svm_seq) {
            let token = frames.insert(bytes).expect("a slot");
            path.handle_svm_output(now_us, frames, *epoch, svm_seq, token);
        }
        true
    }
}

/// Whether the checksums of an untagged packet without IP options are right.
pub fn checksums_are_right(frame: &[u8]) -> bool {
    let end = crate::wire::parse(frame, frame.len(), crate::Direction::FromGuest).end;
    let frame = &frame[..usize::from(end)];
    let v6 = frame[12..14] == ETHERTYPE_IPV6.to_be_bytes();
    let (l4, protocol) = if v6 { (54, frame[20]) } else { (34, frame[23]) };
    (v6 || ones_sum(&frame[14..34]) == 0xffff) && transport_sum(frame, l4, protocol) == 0xffff
}
