//! Channels of two shards whose datagrams come by the first one's queue, or by the wrong ones.

use std::sync::Mutex;

use colo_bpf::Mac;
use colo_compare::Frames;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::pool_tests::{Pool, SLOTS};
use super::xdp_tests::links_opened;
use super::*;
use crate::link::datagram::{HEADER_BYTES, Header, Kind as Datagram};
use crate::nic::Sink;
use crate::shard::{Seat, ShardGroup, seats};

const SHARDS: usize = 2;
const RANDOM: [u64; 2] = [0x1234_5678_9abc_def3, 0xfedc_ba98_7654_3211];
/// What may be under way from one shard to another.
const LANE: usize = 256;

type Wire = Arc<Mutex<VecDeque<Vec<u8>>>>;

/// A transport whose NIC gives all that a host is sent to its first shard.
#[derive(Debug)]
struct OneQueue {
    mac: Mac,
    inbox: Option<Wire>,
    outbox: Wire,
    slots: Vec<Vec<u8>>,
    free: Vec<u32>,
}

impl OneQueue {
    fn new(host: usize, shard: usize, wires: &[Wire; 2]) -> Self {
        Self {
            mac: [2, 0, 0, 0, 0, host as u8],
            inbox: (shard == 0).then(|| wires[host].clone()),
            outbox: wires[1 - host].clone(),
            slots: vec![Vec::new(); 1024],
            free: (0..1024).collect(),
        }
    }

    fn keep(&mut self, datagram: Vec<u8>) -> Option<Slot> {
        let slot = self.free.pop()?;
        self.slots[slot as usize] = datagram;
        Some(Slot(slot))
    }
}

impl DatagramPort for OneQueue {
    fn address(&self) -> PortAddress {
        PortAddress::Xdp(self.mac)
    }
    fn mtu(&self) -> usize {
        1500
    }
    fn set_peer(&mut self, _peer: PortAddress) {}
    fn has_room(&self) -> bool {
        true
    }
    fn send(&mut self, head: &[u8], payload: &[u8]) -> bool {
        let datagram = [head, payload].concat();
        self.outbox.lock().unwrap().push_back(datagram);
        true
    }
    fn flush(&mut self) {}
    fn receive(&mut self) -> Option<Slot> {
        let datagram = self.inbox.as_ref()?.lock().unwrap().pop_front()?;
        self.keep(datagram)
    }
    fn bytes(&self, slot: &Slot) -> &[u8] {
        &self.slots[slot.0 as usize]
    }
    fn release(&mut self, slot: Slot) {
        self.free.push(slot.0);
    }
    fn copy_in(&mut self, datagram: &[u8], _frames: &mut FramePool) -> Option<Slot> {
        self.keep(datagram.to_vec())
    }
    fn poll_fds(&self, _fds: &mut Vec<libc::pollfd>) {}
    fn errors(&self) -> u64 {
        0
    }
}

struct Host {
    links: Vec<PacketLink>,
    seats: Vec<Seat>,
    pools: Vec<Pool>,
}

/// Two hosts with two shards each.
struct Hosts {
    hosts: [Host; 2],
    /// Said by each shard of each host and not heard yet.
    unheard: [[VecDeque<(u64, usize)>; SHARDS]; 2],
    serial: u64,
    since: Instant,
    /// A shard of the second host that does nothing.
    asleep: Option<usize>,
}

fn seats_of_a_host() -> Vec<Seat> {
    let wake = |_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    seats(&ShardGroup::new((0..SHARDS).map(wake)), 4096)
}

impl Hosts {
    fn new(wires: &[Wire; 2]) -> Self {
        Self::with(|host, shard| Box::new(OneQueue::new(host, shard, wires)))
    }

    fn with(port: impl FnMut(usize, usize) -> Box<dyn DatagramPort>) -> Self {
        Self::with_pools([0, 1].map(|_| [0, 1].map(|_| Pool::new(SLOTS))), port)
    }

    fn with_pools(
        pools: [[Pool; SHARDS]; 2],
        mut port: impl FnMut(usize, usize) -> Box<dyn DatagramPort>,
    ) -> Self {
        let mut links = [Vec::new(), Vec::new()];
        for shard in 0..SHARDS {
            let (near, far) = connected();
            for (host, stream) in [near, far].into_iter().enumerate() {
                let keys = LinkKeys::new(RANDOM[host], SHARDS);
                let ports = vec![port(host, shard)];
                let key = keys.of(shard);
                let link = PacketLink::with_ports(stream, ports, key, PATIENCE_US).unwrap();
                links[host].push(link.among(keys, shard));
            }
        }
        let [near, far] = links;
        let [near_pools, far_pools] = pools;
        let host = |links, pools: [Pool; SHARDS]| Host {
            links,
            seats: seats_of_a_host(),
            pools: pools.into(),
        };
        let mut hosts = Self {
            hosts: [host(near, near_pools), host(far, far_pools)],
            unheard: Default::default(),
            serial: 0,
            since: Instant::now(),
            asleep: None,
        };
        hosts.until_all_use_xdp();
        hosts
    }

    fn say(&mut self, host: usize, shard: usize, count: usize) {
        for _ in 0..count {
            self.serial += 1;
            let (epoch, seq) = (1, self.serial);
            let frame = vec![seq as u8; 60 + seq as usize % 1200];
            self.unheard[host][shard].push_back((seq, frame.len()));
            let frame = &frame[..];
            self.hosts[host].links[shard].push(&match host {
                0 => PacketMsg::Input { epoch, seq, frame },
                _ => PacketMsg::Output { epoch, seq, frame },
            });
        }
    }

    /// A worker's batch.
    fn step_shard(&mut self, host: usize, shard: usize) {
        self.try_step(host, shard).unwrap();
    }

    fn try_step(&mut self, host: usize, shard: usize) -> Result<(), PacketLinkError> {
        let at = &mut self.hosts[host];
        let (link, seat) = (&mut at.links[shard], &mut at.seats[shard]);
        let frames = &mut at.pools[shard].frames;
        seat.look();
        link.take_in(&mut Sink::new(1500), frames);
        link.cross(seat, frames);
        link.fill()?;
        while let Some(incoming) = link.next(frames).unwrap() {
            let (Incoming::Input { seq, token, .. } | Incoming::Output { seq, token, .. }) =
                incoming
            else {
                panic!("nobody said {incoming:?}");
            };
            let bytes = frames.bytes(&token);
            assert!(bytes.iter().all(|byte| *byte == seq as u8));
            let said = self.unheard[1 - host][shard].pop_front();
            assert_eq!(Some((seq, bytes.len())), said);
            frames.release(token);
        }
        link.flush().unwrap();
        seat.ring();
        Ok(())
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            for host in [0, 1] {
                for shard in 0..SHARDS {
                    if host == 0 || self.asleep != Some(shard) {
                        self.step_shard(host, shard);
                    }
                }
            }
            assert!(self.since.elapsed() < PATIENCE, "{:?}", self.all_stats());
        }
    }

    fn until_heard(&mut self) {
        self.until(|hosts| hosts.unheard.iter().flatten().all(VecDeque::is_empty));
    }

    fn until_all_use_xdp(&mut self) {
        self.until(|hosts| hosts.all_stats().iter().all(|s| s.carrier == "xdp"));
    }

    fn talk(&mut self, rounds: usize) {
        for round in 0..rounds {
            for (host, shard) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                self.say(host, shard, 1 + round % 7);
            }
            self.until_heard();
        }
    }

    fn stats(&self, host: usize, shard: usize) -> LinkStats {
        self.hosts[host].links[shard].stats()
    }

    fn all_stats(&self) -> Vec<LinkStats> {
        let links = self.hosts.iter().flat_map(|host| &host.links);
        links.map(PacketLink::stats).collect()
    }
}

fn wires() -> [Wire; 2] {
    Default::default()
}

#[test]
fn datagrams_reach_the_shard_that_they_belong_to_whichever_queue_they_come_by() {
    let mut hosts = Hosts::new(&wires());
    hosts.talk(300);
    for host in [0, 1] {
        let [first, second] = [0, 1].map(|shard| hosts.stats(host, shard));
        assert!(first.crossed_out > 300, "{first:?}");
        assert_eq!(second.crossed_in, first.crossed_out);
        assert_eq!((first.crossed_in, second.crossed_out), (0, 0));
        for stats in [first, second] {
            assert!(stats.datagrams_received > 300, "{stats:?}");
            let wrong = [stats.foreign, stats.damaged, stats.fallbacks];
            assert_eq!((wrong, stats.crossing_drops), ([0; 3], 0), "{stats:?}");
        }
    }
}

#[test]
fn foreign_shards_and_damage_are_counted_and_dropped_where_they_belong() {
    let wires = wires();
    let mut hosts = Hosts::new(&wires);
    hosts.talk(10);
    let before = [0, 1].map(|shard| hosts.stats(1, shard));
    let header = |to| Header {
        kind: Datagram::Data,
        to,
        number: 1 << 40,
        next: 1,
        received: 0,
        window: 1,
        more: false,
        ask: false,
    };
    let payload = [7; 100];
    let datagram = |to| [&header(to).seal(&payload)[..], &payload].concat();
    let keys = LinkKeys::new(RANDOM[1], SHARDS);
    let [own, others] = [0, 1].map(|shard| datagram(keys.of(shard)));
    let mut sent = Vec::new();
    // Shards that there are not, another session's, too short: not even handed on.
    sent.extend((SHARDS..8).map(|shard| datagram(keys.of(shard))));
    sent.push(datagram(keys.of(0).wrapping_sub(1)));
    sent.push(datagram(LinkKeys::new(RANDOM[0], SHARDS).of(1)));
    sent.push(others[..HEADER_BYTES - 1].to_vec());
    // The other shard's with a bit of the payload changed; this one's with the bit that says the shard.
    let flipped = |datagram: &[u8], at: usize| {
        let mut damaged = datagram.to_vec();
        damaged[at] ^= 1;
        damaged
    };
    sent.push(flipped(&others, 120));
    sent.push(flipped(&own, 8));
    let count = sent.len();
    wires[1].lock().unwrap().extend(sent);
    hosts.until(|hosts| hosts.stats(1, 1).damaged == 2);
    hosts.talk(10);
    let [first, second] = [0, 1].map(|shard| hosts.stats(1, shard));
    let crossed = second.crossed_in - before[1].crossed_in;
    assert_eq!(first.crossed_out - before[0].crossed_out, crossed);
    assert_eq!(first.foreign, count as u64 - 3, "{first:?}");
    assert_eq!((first.truncated, first.damaged), (1, 0), "{first:?}");
    assert_eq!((second.foreign, second.truncated), (0, 0), "{second:?}");
    assert!(hosts.all_stats().iter().all(|s| s.fallbacks == 0));
}

#[test]
fn a_shard_that_does_not_read_stops_no_other_and_loses_nothing() {
    let wires = wires();
    let mut hosts = Hosts::new(&wires);
    hosts.talk(10);
    hosts.asleep = Some(1);
    let key = LinkKeys::new(RANDOM[1], SHARDS).of(1);
    let probe = [&key.to_le_bytes()[..], &[0; 24]].concat();
    let strange = [&[0xc0, 0x10, 1, 9, 0, 0, 0, 0][..], &probe, &[0; 16]].concat();
    wires[1].lock().unwrap().extend(vec![strange; LANE + 44]);
    hosts.until(|hosts| hosts.stats(1, 0).crossing_drops == 44);
    hosts.say(0, 1, 50);
    for _ in 0..100 {
        hosts.say(0, 0, 3);
        hosts.say(1, 0, 3);
        hosts.until(|hosts| hosts.unheard.iter().all(|said| said[0].is_empty()));
    }
    assert_eq!(hosts.unheard[0][1].len(), 50);
    let dropped = hosts.stats(1, 0).crossing_drops;
    assert!(dropped > 44, "what was said found no room: {dropped}");
    hosts.asleep = None;
    hosts.until_heard();
    hosts.talk(10);
    let (first, second) = (hosts.stats(1, 0), hosts.stats(1, 1));
    assert_eq!(second.foreign, LANE as u64, "{second:?}");
    assert_eq!(first.crossed_out, second.crossed_in);
}

#[test]
fn a_shard_whose_datagrams_nobody_hands_on_goes_back_to_tcp_and_returns() {
    let mut hosts = Hosts::new(&wires());
    hosts.talk(50);
    hosts.asleep = Some(0);
    hosts.say(0, 1, 200);
    hosts.until(|hosts| hosts.unheard[0][1].is_empty());
    assert_eq!(hosts.stats(0, 1).carrier, "tcp");
    assert_eq!(hosts.stats(0, 1).fallbacks, 1);
    hosts.say(0, 1, 200);
    hosts.until(|hosts| hosts.unheard[0][1].is_empty());
    // Then the old ones come, too.
    hosts.asleep = None;
    hosts.until(|hosts| hosts.stats(1, 1).duplicates > 0);
    hosts.until_all_use_xdp();
    hosts.talk(50);
}

#[test]
fn what_has_come_to_another_shard_before_the_end_of_the_connection_is_heard() {
    let mut hosts = Hosts::new(&wires());
    hosts.talk(50);
    hosts.say(0, 1, 20);
    let link = &mut hosts.hosts[0].links[1];
    link.flush().unwrap();
    assert!(!link.has_unsent());
    link.shutdown(Shutdown::Both).unwrap();
    // It sees the end before the other has looked.
    for _ in 0..3 {
        hosts.step_shard(1, 1);
    }
    assert_eq!(hosts.unheard[0][1].len(), 20);
    hosts.step_shard(1, 0);
    let ended = loop {
        if let Err(e) = hosts.try_step(1, 1) {
            break e;
        }
    };
    assert!(matches!(ended, PacketLinkError::Closed), "{ended}");
    assert!(hosts.unheard[0][1].is_empty());
}

/// Each host's sockets. Frames come by the queue that they left by, or by the first, as the kernel has it; for one shard of
/// each host at least that is another's.
fn crossed_sockets(in_pool: bool) -> (Hosts, u64) {
    let pools = [0, 1].map(|_| [0, 1].map(|_| Pool::new(SLOTS)));
    let memory = pools
        .each_ref()
        .map(|pools| pools.each_ref().map(|pool| PoolMemory::of(&pool.frames)));
    let opened: Arc<Mutex<[Vec<XdpPort>; 2]>> = Arc::default();
    let theirs = opened.clone();
    let open = move |stream: TcpStream, host: usize| {
        let memory = memory[host]
            .each_ref()
            .map(|memory| in_pool.then_some(memory));
        let ports = XdpPort::for_shards(&format!("a{host}"), &memory).unwrap();
        theirs.lock().unwrap()[host] = ports;
        PacketLink::new(stream).unwrap()
    };
    let (_, stranger) = links_opened(1700, 2, open);
    let mut ports = std::mem::take(&mut *opened.lock().unwrap());
    let refusals = ports
        .iter()
        .flatten()
        .map(|port| port.pool_refusals())
        .sum();
    // The first host's shards have each other's queues.
    ports[0].reverse();
    let mut pools = pools;
    pools[0].reverse();
    let mut ports = ports.map(Vec::into_iter);
    let mut hosts = Hosts::with_pools(pools, |host, _| Box::new(ports[host].next().unwrap()));
    hosts.talk(300);
    stranger.send(&[0; 100]);
    let foreign = |stats: Vec<LinkStats>| stats.iter().map(|s| s.foreign).sum::<u64>();
    hosts.until(|hosts| foreign(hosts.all_stats()) == 1);
    (hosts, refusals)
}

#[test]
fn sockets_of_two_shards_share_an_interface_and_frames_cross() {
    for in_pool in [false, true] {
        let (mut hosts, refusals) = crossed_sockets(in_pool);
        assert_eq!(refusals, 0);
        // What is said last, acknowledgements among it, may be on its way.
        let sum = |hosts: &Hosts, host, of: fn(&LinkStats) -> u64| -> u64 {
            [0, 1]
                .map(|shard| of(&hosts.stats(host, shard)))
                .iter()
                .sum()
        };
        hosts.until(|hosts| {
            (0..2).all(|host| {
                sum(hosts, host, |s| s.crossed_in) == sum(hosts, host, |s| s.crossed_out)
            })
        });
        for host in [0, 1] {
            let [first, second] = [0, 1].map(|shard| hosts.stats(host, shard));
            let crossed_out = first.crossed_out + second.crossed_out;
            assert!(crossed_out > 300, "{first:?} {second:?}");
        }
        for stats in hosts.all_stats() {
            let wrong = [stats.damaged, stats.fallbacks, stats.crossing_drops];
            assert_eq!(wrong, [0; 3], "{stats:?}");
            assert_eq!(stats.frames_in_place > 0, in_pool, "{stats:?}");
        }
        for host in hosts.hosts {
            for (link, mut pool) in host.links.into_iter().zip(host.pools) {
                link.leave(&mut pool.frames);
                assert_eq!(pool.frames.free_slots(), SLOTS as usize);
            }
        }
    }
}

#[test]
fn fewer_queues_than_shards_are_refused_by_name() {
    let open = |stream: TcpStream, host: usize| {
        let name = format!("a{host}");
        let e = XdpPort::for_shards(&name, &[None, None]).unwrap_err();
        let advice = format!("ethtool -L {name} combined 2");
        assert!(e.to_string().contains(&advice), "{e}");
        // Neither shard has it then, and each says so.
        let end = || LinkEnd {
            stream: &stream,
            pool: None,
        };
        let all = open_all_ports(&[end(), end()], Packets::Auto, |_, _| None);
        assert!(
            all.iter()
                .all(|ports| ports.list.is_empty() && ports.refused == 1)
        );
        // Nothing is left bound.
        assert_eq!(XdpPort::for_shards(&name, &[None]).unwrap().len(), 1);
        PacketLink::new(stream).unwrap()
    };
    links_opened(1500, 1, open);
}
