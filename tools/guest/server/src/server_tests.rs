//! The whole server against smoltcp clients, over wires in memory.

use super::*;
use crate::world::fake::Fake;
use smoltcp::phy::{Medium, TxToken};
use smoltcp::wire::{IpEndpoint, Ipv4Packet, TcpPacket, UdpPacket, UdpRepr};
use std::collections::{BTreeMap, VecDeque};

const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const SERVER: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);

/// One end of a wire.
#[derive(Default)]
struct Wire {
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
    /// Frames that may still be sent.
    room: usize,
    /// Beyond the usual MTU.
    more_bytes: usize,
}

struct Arrived(Vec<u8>);
struct Departing<'a>(&'a mut Wire);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Departing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.outgoing.push(frame);
        self.0.room -= 1;
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Departing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived, Departing<'_>)> {
        if self.room == 0 {
            return None;
        }
        let frame = self.incoming.pop_front()?;
        Some((Arrived(frame), Departing(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Departing<'_>> {
        (self.room > 0).then_some(Departing(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514 + self.more_bytes;
        capabilities
    }
}

impl FrameDevice for Wire {
    fn front(&mut self) -> Option<&[u8]> {
        self.incoming.front().map(Vec::as_slice)
    }

    fn discard(&mut self) {
        self.incoming.pop_front();
    }

    fn room(&mut self) -> usize {
        self.room
    }

    fn flush(&mut self) {}
}

fn limits(connections: usize) -> Limits {
    Limits {
        connections,
        receive_bytes: 16 * 1024,
        transmit_bytes: 32 * 1024,
        store_bytes: 1 << 20,
        buffer_bytes: 4 << 20,
        arena_bytes: 1 << 20,
    }
}

fn server(wire: &mut Wire, connections: usize) -> Server {
    let addresses = Addresses {
        mac: SERVER_MAC,
        networks: vec![
            "10.0.0.1/24".parse().unwrap(),
            IpCidr::new(crate::link_local(SERVER_MAC).into(), 64),
        ],
        ..Addresses::default()
    };
    Server::new(
        wire,
        &addresses,
        limits(connections),
        Box::new(Fake::default()),
        1,
    )
}

/// A host with TCP sockets.
struct Host {
    stack: Interface,
    wire: Wire,
    sockets: SocketSet<'static>,
}

impl Host {
    fn new() -> Self {
        let mut wire = Wire {
            room: usize::MAX,
            ..Wire::default()
        };
        let mut config = Config::new(EthernetAddress(CLIENT_MAC).into());
        config.random_seed = 99;
        let mut stack = Interface::new(config, &mut wire, Instant::from_micros(1));
        stack.update_ip_addrs(|own| own.push("10.0.0.2/24".parse().unwrap()).unwrap());
        Self {
            stack,
            wire,
            sockets: SocketSet::new(vec![]),
        }
    }

    fn connect(&mut self, from: u16, to: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 4096]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket
            .connect(self.stack.context(), (SERVER, to), from)
            .unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn poll(&mut self, now_us: i64) {
        self.stack.poll(
            Instant::from_micros(now_us),
            &mut self.wire,
            &mut self.sockets,
        );
    }
}

/// A host and a server, and all frames that went to the server.
struct Lab {
    host: Host,
    wire: Wire,
    server: Server,
    now_us: i64,
    sent: Vec<Vec<u8>>,
    answered: Vec<Vec<u8>>,
}

impl Lab {
    fn new(connections: usize) -> Self {
        let mut wire = Wire {
            room: usize::MAX,
            ..Wire::default()
        };
        let server = server(&mut wire, connections);
        let (sent, answered) = (vec![], vec![]);
        Self {
            host: Host::new(),
            wire,
            server,
            now_us: 1,
            sent,
            answered,
        }
    }

    /// Lets both sides talk until `rounds` have passed.
    fn run(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.now_us += 1000;
            self.host.poll(self.now_us);
            for frame in self.host.wire.outgoing.drain(..) {
                self.sent.push(frame.clone());
                self.wire.incoming.push_back(frame);
            }
            self.server.turn(&mut self.wire, self.now_us);
            for frame in self.wire.outgoing.drain(..) {
                self.answered.push(frame.clone());
                self.host.wire.incoming.push_back(frame);
            }
        }
    }
}

/// What each TCP connection of the server said, by the client's port.
fn streams(frames: &[Vec<u8>]) -> BTreeMap<u16, Vec<u8>> {
    let mut streams: BTreeMap<u16, (u32, Vec<u8>)> = BTreeMap::new();
    for segment in frames.iter().filter_map(|frame| segment(frame)) {
        let sequence = segment.seq_number().0 as u32;
        if segment.syn() {
            streams.insert(segment.dst_port(), (sequence.wrapping_add(1), vec![]));
            continue;
        }
        let Some((first, stream)) = streams.get_mut(&segment.dst_port()) else {
            continue;
        };
        let (at, payload) = (sequence.wrapping_sub(*first) as usize, segment.payload());
        assert!(at <= stream.len(), "the server left a gap");
        let known = (stream.len() - at).min(payload.len());
        assert_eq!(
            stream[at..at + known],
            payload[..known],
            "a retransmission differs"
        );
        stream.extend_from_slice(&payload[known..]);
    }
    streams
        .into_iter()
        .map(|(port, (_, stream))| (port, stream))
        .collect()
}

fn segment(frame: &[u8]) -> Option<TcpPacket<&[u8]>> {
    let is_tcp = frame[12..14] == [8, 0] && frame[23] == 6;
    is_tcp.then(|| TcpPacket::new_checked(&frame[34..]).unwrap())
}

/// The client's port, and the sequence number up to which it has heard the server.
fn acknowledged(frame: &[u8]) -> Option<(u16, u32)> {
    let segment = segment(frame).filter(|segment| segment.ack())?;
    Some((segment.src_port(), segment.ack_number().0 as u32))
}

/// The client's port, and the sequence number behind a segment of the server.
fn end_of(frame: &[u8]) -> Option<(u16, u32)> {
    let segment = segment(frame)?;
    let end = segment.seq_number() + segment.segment_len();
    Some((segment.dst_port(), end.0 as u32))
}

/// Four clients that share a counter and a list, ask for large pages and read slowly.
fn recorded_traffic() -> (Vec<Vec<u8>>, BTreeMap<u16, Vec<u8>>) {
    let mut lab = Lab::new(16);
    let ports = [6379, 6379, 80, 7];
    let clients: Vec<_> = (0..4)
        .map(|i| lab.host.connect(5000 + i, ports[i as usize]))
        .collect();
    lab.run(10);
    let mut dice = 1u64;
    for step in 0..3000 {
        for (i, client) in clients.iter().enumerate() {
            dice = crate::hash::scramble(dice);
            let request = match (i, dice % 3) {
                (0 | 1, 0) => "INCR n\r\nLPUSH l x\r\n".repeat(1 + dice as usize / 7 % 30),
                (0 | 1, 1) => "LRANGE l 0 -1\r\nAPPEND t y\r\n".into(),
                (2, 0) => "GET /bytes/70000 HTTP/1.1\r\n\r\nPOST /counter HTTP/1.1\r\n\r\n".into(),
                (3, 0) => "echo ".repeat(100),
                _ => String::new(),
            };
            let socket = lab.host.socket(*client);
            if step < 200 && socket.send_capacity() - socket.send_queue() >= request.len() {
                socket.send_slice(request.as_bytes()).unwrap();
            }
            if dice % 5 < 3 || step >= 200 {
                while socket.can_recv() {
                    socket.recv(|bytes| (bytes.len(), ())).unwrap();
                }
            }
        }
        lab.run(1);
    }
    assert!(
        lab.server
            .conns
            .iter()
            .all(|conn| conn.unacknowledged() == 0),
        "all is said"
    );
    let streams = streams(&lab.answered);
    (lab.sent, streams)
}

#[test]
fn what_is_said_depends_on_the_frames_and_not_on_when_they_are_handled() {
    let (sent, expected) = recorded_traffic();
    assert!(expected.values().all(|stream| stream.len() > 1000));
    for pattern in 0..6u64 {
        let mut wire = Wire {
            room: usize::MAX,
            ..Wire::default()
        };
        let mut server = server(&mut wire, 16);
        let mut answered = vec![];
        let mut spoken = BTreeMap::new();
        let (mut now_us, mut dice) = (1, pattern);
        let mut frames = sent.iter().peekable();
        let mut turns = 0;
        while frames.peek().is_some() || !wire.incoming.is_empty() {
            turns += 1;
            assert!(
                turns < 10 * sent.len(),
                "pattern {pattern}: the server says too little"
            );
            dice = crate::hash::scramble(dice);
            // A client does not acknowledge what it has not heard.
            let heard = |frame: &&Vec<u8>| {
                acknowledged(frame).is_none_or(|(port, up_to)| {
                    spoken
                        .get(&port)
                        .is_some_and(|end: &u32| up_to.wrapping_sub(*end) as i32 <= 0)
                })
            };
            for _ in 0..1 + dice as usize % 5 {
                wire.incoming.extend(frames.next_if(heard).cloned());
            }
            wire.room = if pattern % 2 == 0 {
                usize::MAX
            } else {
                3 + dice as usize / 11 % 9
            };
            now_us += 1 + (dice as i64 >> 20).rem_euclid(700);
            server.turn(&mut wire, now_us);
            for frame in wire.outgoing.drain(..) {
                if let Some((port, end)) = end_of(&frame) {
                    let known = spoken.entry(port).or_insert(end);
                    *known = if end.wrapping_sub(*known) as i32 > 0 {
                        end
                    } else {
                        *known
                    };
                }
                answered.push(frame);
            }
        }
        wire.room = usize::MAX;
        for _ in 0..100 {
            now_us += 100_000;
            server.turn(&mut wire, now_us);
            answered.append(&mut wire.outgoing);
        }
        let streams = streams(&answered);
        for (port, stream) in &expected {
            let same = streams[port]
                .iter()
                .zip(stream)
                .take_while(|(a, b)| a == b)
                .count();
            let lengths = (same, streams[port].len(), stream.len());
            assert!(
                streams[port] == *stream,
                "pattern {pattern}, port {port}: {lengths:?}"
            );
        }
    }
}

#[test]
fn nothing_is_taken_without_room_to_answer() {
    let mut lab = Lab::new(4);
    let client = lab.host.connect(5000, 6379);
    lab.run(5);
    lab.host.socket(client).send_slice(b"PING\r\n").unwrap();
    lab.wire.room = 1;
    lab.run(3);
    assert!(!lab.wire.incoming.is_empty(), "the request waits");
    assert_eq!(lab.server.need(&mut lab.wire), Need::Room);
    lab.wire.room = usize::MAX;
    lab.run(3);
    let mut reply = [0; 16];
    assert_eq!(lab.host.socket(client).recv_slice(&mut reply), Ok(7));
}

#[test]
fn a_page_survives_a_narrow_device() {
    let mut lab = Lab::new(4);
    let client = lab.host.connect(5000, 80);
    lab.run(5);
    lab.host
        .socket(client)
        .send_slice(b"GET /bytes/200000 HTTP/1.1\r\n\r\n")
        .unwrap();
    let mut received = vec![];
    for _ in 0..2000 {
        lab.wire.room = 2;
        lab.run(1);
        let mut part = [0; 4096];
        let n = lab.host.socket(client).recv_slice(&mut part).unwrap();
        received.extend_from_slice(&part[..n]);
    }
    let body = received.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    assert_eq!(received.len() - body, 200_000);
    let wrong = (0..200_000).find(|i| received[body + i] != crate::page_byte(*i));
    assert_eq!(wrong, None);
    lab.wire.room = ROOM;
    assert_eq!(lab.server.need(&mut lab.wire), Need::Frames);
}

#[test]
fn closed_connections_leave_their_places() {
    let mut lab = Lab::new(4);
    for round in 0..40u16 {
        let client = lab.host.connect(5000 + round, 80);
        lab.run(5);
        lab.host
            .socket(client)
            .send_slice(b"GET / HTTP/1.0\r\n\r\n")
            .unwrap();
        lab.run(5);
        assert!(lab.host.socket(client).can_recv(), "round {round}");
        lab.host.socket(client).close();
        lab.run(5);
    }
    assert!(lab.server.connections() <= 4);
    lab.now_us += 200_000_000;
    lab.run(5);
    assert_eq!(lab.server.connections(), 0);
    assert_eq!(lab.server.wake_us(), i64::MAX);
}

#[test]
fn a_client_may_use_its_port_again() {
    let mut lab = Lab::new(4);
    for round in 0..3 {
        let client = lab.host.connect(5000, 80);
        lab.run(5);
        lab.host
            .socket(client)
            .send_slice(b"GET / HTTP/1.0\r\n\r\n")
            .unwrap();
        lab.run(5);
        assert!(lab.host.socket(client).can_recv(), "round {round}");
        lab.host.socket(client).close();
        lab.run(5);
        lab.host.sockets.remove(client);
    }
}

#[test]
fn a_full_server_does_not_answer() {
    let mut lab = Lab::new(2);
    let clients: Vec<_> = (0..3).map(|i| lab.host.connect(5000 + i, 6379)).collect();
    lab.run(10);
    let states: Vec<_> = clients
        .iter()
        .map(|client| lab.host.socket(*client).state())
        .collect();
    assert_eq!(
        states,
        [State::Established, State::Established, State::SynSent]
    );
    lab.host.socket(clients[0]).close();
    lab.run(1000);
    assert_eq!(lab.host.socket(clients[2]).state(), State::Established);
}

fn udp_frame(port: u16, payload: &[u8]) -> Vec<u8> {
    let source = Ipv4Address::new(10, 0, 0, 2);
    let udp = UdpRepr {
        src_port: 4000,
        dst_port: port,
    };
    let ip = smoltcp::wire::Ipv4Repr {
        src_addr: source,
        dst_addr: SERVER,
        next_header: smoltcp::wire::IpProtocol::Udp,
        payload_len: 8 + payload.len(),
        hop_limit: 64,
    };
    let mut frame = vec![0; 14 + 20 + 8 + payload.len()];
    frame[..6].copy_from_slice(&SERVER_MAC);
    frame[6..12].copy_from_slice(&CLIENT_MAC);
    frame[12..14].copy_from_slice(&[8, 0]);
    let checksums = smoltcp::phy::ChecksumCapabilities::default();
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut frame[14..]), &checksums);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut frame[34..]),
        &source.into(),
        &SERVER.into(),
        payload.len(),
        |out| out.copy_from_slice(payload),
        &checksums,
    );
    frame
}

#[test]
fn datagrams_are_echoed_at_once_to_who_never_announced_itself() {
    let mut wire = Wire {
        room: usize::MAX,
        ..Wire::default()
    };
    let mut server = server(&mut wire, 2);
    for now_us in [1, 100_000_000, 1_000_000_000] {
        wire.incoming.push_back(udp_frame(7, b"hello"));
        assert!(server.turn(&mut wire, now_us));
        let [answer] = &wire.outgoing[..] else {
            panic!("{} frames: {:x?}", wire.outgoing.len(), wire.outgoing);
        };
        assert_eq!(answer[..6], CLIENT_MAC);
        assert!(answer.ends_with(b"hello"));
        wire.outgoing.clear();
    }
    wire.incoming.push_back(udp_frame(9, b"hello"));
    server.turn(&mut wire, 1_000_000_001);
    assert_eq!(
        wire.outgoing[0][23], 1,
        "an ICMP error for a port without service"
    );
}

#[test]
fn datagrams_are_echoed_whole_up_to_the_mtu() {
    let mut wire = Wire {
        room: usize::MAX,
        more_bytes: 9000 - 1500,
        ..Wire::default()
    };
    let mut server = server(&mut wire, 2);
    for bytes in [1472, 1473, 2048, 2049, 9000 - 28] {
        let said: Vec<u8> = (0..bytes).map(|at| (at * 7 + at / 251) as u8).collect();
        wire.incoming.push_back(udp_frame(7, &said));
        assert!(server.turn(&mut wire, 1));
        let answer = wire.outgoing.pop().unwrap();
        assert!(answer[42..] == said, "{bytes} bytes");
    }
}

#[test]
fn garbage_frames_never_panic() {
    let mut lab = Lab::new(4);
    let _ = lab.host.connect(5000, 80);
    lab.run(5);
    let mut dice = 5u64;
    let mut samples = lab.sent.clone();
    samples.push(udp_frame(7, b"hello"));
    for _ in 0..20_000 {
        dice = crate::hash::scramble(dice);
        let mut frame = samples[dice as usize % samples.len()].clone();
        for _ in 0..1 + dice % 3 {
            dice = crate::hash::scramble(dice);
            let at = dice as usize % frame.len();
            frame[at] = (dice >> 32) as u8;
        }
        frame.truncate((dice >> 40) as usize % (2 * frame.len()));
        lab.wire.incoming.push_back(frame);
        lab.now_us += 10;
        lab.server.turn(&mut lab.wire, lab.now_us);
        lab.wire.outgoing.clear();
    }
    let endpoint = IpEndpoint::new(SERVER.into(), 80);
    assert!(lab.server.connections() <= 4, "{endpoint}");
}
