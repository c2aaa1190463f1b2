//! The packet channel over real sockets.

use super::*;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::port::{PortAddress, Slot};
use crate::nic::Sink;
use crate::nic::XdpNic;

mod crossing_tests;
mod guest_nic_tests;
mod path_tests;
mod pool_tests;
mod xdp_tests;

/// Of the link, for TCP.
const PATIENCE_US: u64 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(60);

fn pair() -> (PacketLink, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (b, _) = listener.accept().unwrap();
    (PacketLink::new(a).unwrap(), b)
}

fn received(link: &mut PacketLink, n: usize) -> Vec<String> {
    let mut out = Vec::new();
    while out.len() < n {
        link.fill().unwrap();
        while let Some(msg) = link.next_msg().unwrap() {
            out.push(format!("{msg:?}"));
        }
    }
    out
}

#[test]
fn messages_arrive_whole_and_in_order_however_the_stream_is_cut() {
    let (mut a, b) = pair();
    let mut b = PacketLink::new(b).unwrap();
    let frame = vec![7u8; 1514];
    let mut expected = Vec::new();
    for seq in 0..2000 {
        let msg = match seq % 4 {
            0 => PacketMsg::Input {
                epoch: 1,
                seq,
                frame: &frame[..14 + seq as usize % 1500],
            },
            1 => PacketMsg::Output {
                epoch: 2,
                seq,
                frame: &frame,
            },
            2 => PacketMsg::InputAck { up_to: seq },
            _ => PacketMsg::Released { seqs: &frame[..16] },
        };
        expected.push(format!("{msg:?}"));
        a.push(&msg);
    }
    let mut got = Vec::new();
    while got.len() < expected.len() {
        a.flush().unwrap();
        let n = got.len();
        b.fill().unwrap();
        while let Some(msg) = b.next_msg().unwrap() {
            got.push(format!("{msg:?}"));
        }
        assert!(got.len() > n || a.has_unsent() || !got.is_empty());
    }
    assert_eq!(got, expected);
}

#[test]
fn garbage_is_an_error_and_later_kinds_are_skipped() {
    let (mut link, mut peer) = pair();
    let mut later = [0u8; HEAD_BYTES + 5];
    later[0] = 5;
    later[4] = 200;
    peer.write_all(&later).unwrap();
    let mut ack = [0u8; HEAD_BYTES];
    ack[4] = 2;
    ack[16] = 9;
    peer.write_all(&ack).unwrap();
    assert_eq!(
        received(&mut link, 1),
        [format!("{:?}", PacketMsg::InputAck { up_to: 9 })]
    );
    peer.write_all(b"GET /index.html HTTP/1.1\r\n").unwrap();
    let e = loop {
        link.fill().unwrap();
        match link.next_msg() {
            Ok(None) => {}
            Ok(Some(msg)) => panic!("garbage was taken for {msg:?}"),
            Err(e) => break e,
        }
    };
    assert!(matches!(e, PacketLinkError::Malformed(_)), "{e}");
}

#[test]
fn a_closed_peer_is_noticed() {
    let (mut link, peer) = pair();
    drop(peer);
    let e = loop {
        if let Err(e) = link.fill() {
            break e;
        }
    };
    assert!(matches!(e, PacketLinkError::Closed), "{e}");
}

/// A UDP port in a bad network.
#[derive(Debug)]
struct BadPort {
    port: Box<dyn DatagramPort>,
    mtu_max: usize,
    network: Arc<Network>,
    dice: u64,
    lost_in_a_row: u32,
}

/// Where not all are lost, no more than so many in a row: that path is bad and not broken, however slow this machine is.
const LOST_IN_A_ROW: u32 = 2;

#[derive(Debug)]
struct Network {
    /// Lost, in percent.
    loss: AtomicU32,
    /// Longer datagrams are lost.
    longest: AtomicUsize,
}

impl Network {
    fn new(loss: u32) -> Arc<Self> {
        Arc::new(Self {
            loss: AtomicU32::new(loss),
            longest: AtomicUsize::new(usize::MAX),
        })
    }

    fn set_loss(&self, percent: u32) {
        self.loss.store(percent, Ordering::Relaxed);
    }
}

impl BadPort {
    fn loses(&mut self, len: usize) -> bool {
        self.dice = self
            .dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let loss = self.network.loss.load(Ordering::Relaxed);
        let may = loss == 100 || self.lost_in_a_row < LOST_IN_A_ROW;
        let lost = may && (self.dice >> 33) % 100 < u64::from(loss);
        self.lost_in_a_row = if lost { self.lost_in_a_row + 1 } else { 0 };
        lost || len > self.network.longest.load(Ordering::Relaxed)
    }
}

impl DatagramPort for BadPort {
    fn address(&self) -> PortAddress {
        self.port.address()
    }
    fn mtu(&self) -> usize {
        self.port.mtu().min(self.mtu_max)
    }
    fn set_peer(&mut self, peer: PortAddress) {
        self.port.set_peer(peer);
    }
    fn has_room(&self) -> bool {
        self.port.has_room()
    }
    fn send(&mut self, head: &[u8], payload: &[u8]) -> bool {
        self.loses(head.len() + payload.len()) || self.port.send(head, payload)
    }
    fn flush(&mut self) {
        self.port.flush();
    }
    fn look(&mut self) {
        self.port.look();
    }
    fn receive(&mut self) -> Option<Slot> {
        self.port.receive()
    }
    fn bytes(&self, slot: &Slot) -> &[u8] {
        self.port.bytes(slot)
    }
    fn release(&mut self, slot: Slot) {
        self.port.release(slot);
    }
    fn borrow_slots(&mut self, frames: &mut FramePool) {
        self.port.borrow_slots(frames);
    }
    fn take_in(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) {
        self.port.take_in(nic, frames);
    }
    fn shares_nic(&self) -> bool {
        self.port.shares_nic()
    }
    fn has_written(&self) -> bool {
        self.port.has_written()
    }
    fn hand_over(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) -> bool {
        self.port.hand_over(nic, frames)
    }
    fn adopt(
        &mut self,
        slot: Slot,
        start: usize,
        len: usize,
        frames: &mut FramePool,
    ) -> Result<Token, Slot> {
        self.port.adopt(slot, start, len, frames)
    }
    fn copy_in(&mut self, datagram: &[u8], frames: &mut FramePool) -> Option<Slot> {
        self.port.copy_in(datagram, frames)
    }
    fn leave(&mut self, frames: &mut FramePool) {
        self.port.leave(frames);
    }
    fn pool_refusals(&self) -> u64 {
        self.port.pool_refusals()
    }
    fn poll_fds(&self, fds: &mut Vec<libc::pollfd>) {
        self.port.poll_fds(fds);
    }
    fn errors(&self) -> u64 {
        self.port.errors()
    }
}

/// Two ends with a datagram transport, and what they have said and not heard yet.
struct Ends {
    links: [PacketLink; 2],
    /// Said by each.
    unheard: [VecDeque<(u64, usize, u8)>; 2],
    serial: u64,
    since: Instant,
    /// What the TCP connection goes through, if anything.
    relay: Option<[TcpStream; 2]>,
    relayed: [Vec<u8>; 2],
    /// Where frames are received, if they become tokens.
    pools: Option<[pool_tests::Pool; 2]>,
    /// The guests' NICs, if the links share them.
    nics: Option<[XdpNic; 2]>,
}

/// Two connected sockets.
fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a, listener.accept().unwrap().0)
}

impl Ends {
    fn new(network: &Arc<Network>) -> Self {
        let (a, b) = connected();
        Self::over([a, b], network)
    }

    /// TCP goes through a relay that can be taken away.
    fn through_relay(network: &Arc<Network>) -> Self {
        let ((a, near), (far, b)) = (connected(), connected());
        let relay = [near, far];
        relay.iter().for_each(|s| s.set_nonblocking(true).unwrap());
        let relay = Some(relay);
        Self {
            relay,
            ..Self::over([a, b], network)
        }
    }

    fn over(streams: [TcpStream; 2], network: &Arc<Network>) -> Self {
        let link = |stream: TcpStream, key: u64| {
            let port = BadPort {
                port: Box::new(UdpPort::beside(&stream).unwrap()),
                mtu_max: 1472,
                network: network.clone(),
                dice: key,
                lost_in_a_row: 0,
            };
            PacketLink::with_ports(stream, vec![Box::new(port)], key, PATIENCE_US).unwrap()
        };
        let [a, b] = streams;
        Self::of([link(a, 0x1234_5678_9abc), link(b, 0xfedc_ba98_7654)])
    }

    fn of(links: [PacketLink; 2]) -> Self {
        Self {
            links,
            unheard: [VecDeque::new(), VecDeque::new()],
            serial: 0,
            since: Instant::now(),
            relay: None,
            relayed: [Vec::new(), Vec::new()],
            pools: None,
            nics: None,
        }
    }

    /// Fetches what an end's NIC has, if frames come by one.
    fn take_in(&mut self, end: usize) {
        if let (Some(nics), Some(pools)) = (&mut self.nics, &mut self.pools) {
            self.links[end].take_in(&mut nics[end], &mut pools[end].frames);
        }
    }

    /// Says `count` messages of mixed kinds at an end.
    fn say(&mut self, end: usize, count: usize) {
        let mut body = vec![0; 40_000];
        for _ in 0..count {
            self.serial += 1;
            let seq = self.serial;
            let len = match seq % 16 {
                // Longer than a datagram, not longer than a slot.
                0 if self.pools.is_some() => 3_000 + seq as usize % 1_000,
                0 => 9_000 + seq as usize % 1_000,
                1..=4 => 1_514,
                _ => 14 + seq as usize % 200,
            };
            let fill = (seq * 31) as u8;
            body[..len].fill(fill);
            let frame = &body[..len];
            let epoch = 3;
            self.links[end].push(&match end {
                0 => PacketMsg::Input { epoch, seq, frame },
                _ => PacketMsg::Output { epoch, seq, frame },
            });
            self.unheard[end].push_back((seq, len, fill));
        }
    }

    fn flush(&mut self, end: usize) {
        self.links[end].flush().unwrap();
        if let (Some(nics), Some(pools)) = (&mut self.nics, &mut self.pools) {
            let (nic, frames) = (&mut nics[end], &mut pools[end].frames);
            self.links[end].hand_over(nic, frames);
            nic.flush(frames).unwrap();
            self.links[end].flush_stream();
        }
    }

    fn fill(&mut self, end: usize) {
        match (&mut self.nics, &mut self.pools) {
            (Some(nics), Some(pools)) => {
                self.links[end].take_in(&mut nics[end], &mut pools[end].frames);
            }
            (_, Some(pools)) => {
                self.links[end].take_in(&mut Sink::new(1500), &mut pools[end].frames);
            }
            (_, None) => {}
        }
        self.links[end].fill().unwrap();
    }

    /// Both ends send and read once, and what comes is what was said, in order.
    fn step(&mut self) {
        self.flush(0);
        self.flush(1);
        if let Some([near, far]) = &self.relay {
            let mut buffer = [0; 65536];
            let both = [(near, far), (far, near)];
            for ((mut from, mut to), waiting) in both.into_iter().zip(&mut self.relayed) {
                if let Ok(n) = from.read(&mut buffer) {
                    waiting.extend_from_slice(&buffer[..n]);
                }
                let n = to.write(waiting).unwrap_or(0);
                waiting.drain(..n);
            }
        }
        for end in [0, 1] {
            self.fill(end);
            self.hear(end);
        }
        assert!(
            self.since.elapsed() < PATIENCE,
            "{:?} {:?}",
            self.links[0].stats(),
            self.links[1].stats()
        );
    }

    fn hear(&mut self, end: usize) {
        if self.pools.is_some() {
            return self.hear_in_pool(end);
        }
        while let Some(msg) = self.links[end].next_msg().unwrap() {
            let (PacketMsg::Input { seq, frame, .. } | PacketMsg::Output { seq, frame, .. }) = msg
            else {
                panic!("nobody said {msg:?}");
            };
            let said = self.unheard[1 - end].pop_front();
            assert_eq!(Some((seq, frame.len(), frame[0])), said);
            assert!(frame.iter().all(|byte| *byte == frame[0]));
        }
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            self.step();
        }
    }

    fn until_heard(&mut self) {
        self.until(|ends| ends.unheard.iter().all(VecDeque::is_empty));
    }

    fn until_both_use(&mut self, carrier: &str) {
        self.until(|ends| ends.carriers().iter().all(|c| *c == carrier));
    }

    /// Both want to say something, and neither has sent a datagram for longer than the other's silence lasts.
    fn until_silent(&mut self) {
        let sent = |ends: &Self| ends.links.each_ref().map(|l| l.stats().datagrams_sent);
        let (mut before, mut since_us) = (sent(self), now_us());
        while now_us() < since_us + PATIENCE_US {
            if self.unheard[0].len() < 200 {
                self.say(0, 1);
                self.say(1, 1);
            }
            self.step();
            if sent(self) != before {
                (before, since_us) = (sent(self), now_us());
            }
        }
        assert!(self.unheard.iter().all(|unheard| !unheard.is_empty()));
    }

    fn carriers(&self) -> [&'static str; 2] {
        self.links.each_ref().map(|link| link.stats().carrier)
    }

    /// Says much, in turns, and hears all of it.
    fn talk(&mut self, rounds: usize) {
        for round in 0..rounds {
            for end in [0, 1] {
                if self.links[end].has_room() {
                    self.say(end, 1 + (round * 7 + end * 3) % 40);
                }
            }
            self.step();
        }
        self.until_heard();
    }
}

#[test]
fn what_is_said_moves_over_to_datagrams_and_stays_in_order() {
    let mut ends = Ends::new(&Network::new(0));
    // From the first moment on: before, during and after the move.
    ends.talk(2_000);
    ends.until_both_use("udp");
    ends.talk(200);
    for link in &ends.links {
        let stats = link.stats();
        assert!(stats.datagrams_sent > 100, "{stats:?}");
        assert_eq!((stats.fallbacks, stats.foreign, stats.damaged), (0, 0, 0));
    }
}

#[test]
fn lost_datagrams_are_sent_again() {
    let network = Network::new(0);
    let mut ends = Ends::new(&network);
    ends.until_both_use("udp");
    network.set_loss(15);
    ends.talk(1_000);
    let stats = ends.links[0].stats();
    assert!(stats.retransmitted > 50, "{stats:?}");
}

#[test]
fn a_peer_that_had_no_processor_and_whose_first_words_are_lost_is_not_taken_for_a_broken_path() {
    let network = Network::new(0);
    let mut ends = Ends::new(&network);
    ends.until_both_use("udp");
    ends.talk(50);
    // The other end does nothing while this one sends the same again and again.
    let timeouts = |ends: &Ends| ends.links[0].stats().timeouts;
    let before = timeouts(&ends);
    ends.say(0, 1);
    while timeouts(&ends) < before + 8 {
        ends.flush(0);
    }
    network.set_loss(100);
    for _ in 0..2 {
        // It answers over TCP.
        ends.fill(1);
        ends.hear(1);
        ends.flush(1);
        ends.fill(0);
        ends.hear(0);
    }
    ends.flush(0);
    network.set_loss(0);
    ends.until_heard();
    ends.talk(10);
    assert_eq!(ends.links[0].stats().fallbacks, 0);
}

#[test]
fn without_datagrams_all_goes_over_tcp_again_and_later_back() {
    let network = Network::new(0);
    let mut ends = Ends::new(&network);
    ends.until_both_use("udp");
    ends.talk(50);
    network.set_loss(100);
    ends.talk(200);
    ends.until_both_use("tcp");
    ends.talk(50);
    assert!(ends.links.iter().all(|link| link.stats().fallbacks == 1));
    network.set_loss(0);
    ends.until_both_use("udp");
    ends.talk(200);
    assert!(ends.links.iter().all(|link| link.stats().fallbacks == 1));
}

#[test]
fn a_path_that_loses_long_datagrams_is_not_used() {
    let network = Network::new(0);
    network.longest.store(1_000, Ordering::Relaxed);
    let mut ends = Ends::new(&network);
    ends.talk(500);
    let probed = |link: &PacketLink| link.stats().datagrams_sent >= 4;
    ends.until(|ends| ends.links.iter().all(probed));
    ends.talk(50);
    assert_eq!(ends.carriers(), ["tcp", "tcp"]);
}

#[test]
fn rule_22_a_peer_of_an_earlier_version_stays_on_tcp() {
    let (mut old, stream) = pair();
    let port = UdpPort::beside(&stream).unwrap();
    let mut new = PacketLink::with_ports(stream, vec![Box::new(port)], 5, PATIENCE_US).unwrap();
    for seq in 0..50 {
        old.push(&PacketMsg::InputAck { up_to: seq });
        new.push(&PacketMsg::Fetch { seq });
        old.flush().unwrap();
        new.flush().unwrap();
        let heard = received(&mut old, 1);
        assert_eq!(heard, [format!("{:?}", PacketMsg::Fetch { seq })]);
        let heard = received(&mut new, 1);
        assert_eq!(heard, [format!("{:?}", PacketMsg::InputAck { up_to: seq })]);
    }
    assert_eq!(new.stats().datagrams_sent, 0);
}

#[test]
fn what_was_said_before_the_end_is_heard_before_it() {
    let mut ends = Ends::new(&Network::new(0));
    ends.until_both_use("udp");
    // As much as one flush sends.
    ends.say(0, 30);
    ends.links[0].flush().unwrap();
    ends.links[0].shutdown(Shutdown::Both).unwrap();
    ends.links[1].read_all();
    let end = loop {
        // Its own words fail meanwhile.
        ends.links[1].push(&PacketMsg::CheckpointWanted);
        ends.links[1].flush().unwrap();
        match ends.links[1].fill() {
            Ok(_) => ends.hear(1),
            Err(e) => break e,
        }
    };
    assert!(
        matches!(end, PacketLinkError::Closed | PacketLinkError::Io(_)),
        "{end}"
    );
    assert!(
        ends.unheard[0].is_empty(),
        "{} are lost",
        ends.unheard[0].len()
    );
}

#[test]
fn foreign_datagrams_are_counted_and_harmless() {
    let mut ends = Ends::new(&Network::new(0));
    ends.until_both_use("udp");
    let Some(datagrams) = &ends.links[1].datagrams else {
        panic!("no datagrams");
    };
    let PortAddress::Udp(target) = datagrams.address(0) else {
        panic!("not UDP");
    };
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let others = [
        &[][..],
        &[0xc0],
        &[0xc0; 48],
        &[0; 1400],
        b"\xc0\x10\x01\x00 of another session ................",
    ];
    for datagram in others {
        stranger.send_to(datagram, target).unwrap();
    }
    ends.until(|ends| {
        let stats = ends.links[1].stats();
        stats.foreign + stats.truncated == others.len() as u64
    });
    ends.talk(100);
    assert_eq!(ends.carriers(), ["udp", "udp"]);
}

#[test]
fn rule_18_nothing_is_sent_as_datagrams_once_tcp_is_silent() {
    let network = Network::new(0);
    let mut ends = Ends::through_relay(&network);
    ends.until_both_use("udp");
    ends.talk(20);
    let relay = ends.relay.take();
    ends.until_silent();
    // With TCP back, what was kept back follows.
    ends.relay = relay;
    ends.until_heard();
    assert_eq!(ends.carriers(), ["udp", "udp"]);
}

#[test]
fn rule_18_who_hears_the_peer_on_the_control_channel_does_not_ask_it_and_stops_when_that_is_silent()
{
    let network = Network::new(0);
    let mut ends = Ends::through_relay(&network);
    let control = PeerHeard::default();
    ends.links = ends.links.map(|link| link.beside(control.clone()));
    ends.until_both_use("udp");
    ends.talk(20);
    // With nothing left to say nobody is woken any more.
    ends.until(|ends| ends.links.iter().all(|link| link.deadline_us().is_none()));

    let relay = ends.relay.take();
    let begun_us = now_us();
    while now_us() < begun_us + 2 * PATIENCE_US {
        control.note(now_us());
        ends.talk(1);
    }
    ends.until_silent();
    // Heard again there alone, what was kept back follows, and nothing is held against the datagrams.
    while ends.unheard.iter().any(|unheard| !unheard.is_empty()) {
        control.note(now_us());
        ends.step();
    }
    ends.relay = relay;
    ends.talk(20);
    assert_eq!(ends.carriers(), ["udp", "udp"]);
    assert!(ends.links.iter().all(|link| link.stats().fallbacks == 0));
}

#[test]
fn rule_18_what_may_not_be_said_keeps_nobody_awake() {
    let mut ends = Ends::through_relay(&Network::new(0));
    let heard = [0, 1].map(|_| PeerHeard::default());
    let mut of_end = heard.iter().cloned();
    ends.links = ends.links.map(|link| link.beside(of_end.next().unwrap()));
    ends.until_both_use("udp");
    ends.talk(20);
    // Closed, it would be heard of.
    let _relay = ends.relay.take();
    // One end alone hears the other on the control channel.
    let begun_us = now_us();
    while now_us() < begun_us + 2 * PATIENCE_US {
        heard[1].note(now_us());
        ends.step();
    }
    ends.say(1, 1);
    while !ends.unheard[1].is_empty() {
        heard[1].note(now_us());
        ends.flush(1);
        ends.fill(0);
        ends.hear(0);
    }
    let sent = ends.links[0].stats().datagrams_sent;
    let received_us = now_us();
    // An acknowledgement is due, and is not said.
    while now_us() < received_us + 1_000 {}
    let looked_us = now_us();
    ends.flush(0);
    assert_eq!(ends.links[0].stats().datagrams_sent, sent);
    let deadline_us = ends.links[0].deadline_us();
    assert!(
        deadline_us.is_some_and(|at| at > looked_us),
        "{deadline_us:?}"
    );
    heard[0].note(now_us());
    ends.flush(0);
    assert!(ends.links[0].stats().datagrams_sent > sent);
}

#[test]
fn datagrams_that_are_not_answered_are_given_up_beside_a_control_channel_too() {
    let network = Network::new(0);
    let mut ends = Ends::new(&network);
    let control = PeerHeard::default();
    ends.links = ends.links.map(|link| link.beside(control.clone()));
    ends.until_both_use("udp");
    network.set_loss(100);
    ends.say(0, 30);
    ends.say(1, 30);
    while ends.carriers() != ["tcp", "tcp"] {
        control.note(now_us());
        ends.step();
    }
    ends.until_heard();
}
