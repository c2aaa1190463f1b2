//! The packet channel through the NICs of both guests, with its TCP connection on the same interfaces.

use std::sync::Mutex;

use colo_bpf::{Groups, Mac};
use colo_compare::Frames;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::pool_tests::Pool;
use super::xdp_tests::links_opened;
use super::*;
use crate::link::transport::crossing::Crossing;
use crate::nic::{Filter, LinkShare, Sent, XdpNicConfig};
use crate::shard::{Kind, ShardGroup, seats};

const GUESTS: [Mac; 2] = [
    [0x52, 0x54, 0, 0xc0, 0x10, 1],
    [0x52, 0x54, 0, 0xc0, 0x10, 2],
];

fn nic(end: usize, frames: &mut FramePool) -> XdpNic {
    let mac = GUESTS[end];
    let config = XdpNicConfig {
        groups: Groups::Host,
        ..XdpNicConfig::new(&format!("a{end}"), mac, 1500, Filter::Guest(mac))
    };
    let mut nic = XdpNic::open(config).unwrap();
    nic.start(frames).unwrap();
    nic
}

/// Two ends whose guests have a NIC each, and their pools.
fn ends(mtu: u32, queues: u32, network: &Arc<Network>) -> Ends {
    let pools = [Pool::new(pool_tests::SLOTS), Pool::new(pool_tests::SLOTS)];
    let parts = Arc::new(pools.map(|pool| Mutex::new((pool, None))));
    let (opened, network) = (parts.clone(), network.clone());
    let open = move |stream: TcpStream, end: usize| {
        let mut part = opened[end].lock().unwrap();
        let (pool, kept) = &mut *part;
        let nic = kept.insert(nic(end, &mut pool.frames));
        let memory = PoolMemory::of(&pool.frames);
        let share = |name: String| -> Option<io::Result<LinkShare>> {
            nic.share_link(&mut pool.frames, &name)
        };
        let mut ports = open_ports(&stream, Packets::Auto, Some(&memory), share).list;
        let port = BadPort {
            port: ports.pop().unwrap(),
            mtu_max: usize::MAX,
            network: network.clone(),
            dice: end as u64,
            lost_in_a_row: 0,
        };
        let key = [11, 22][end];
        PacketLink::with_ports(stream, vec![Box::new(port)], key, PATIENCE_US).unwrap()
    };
    let mut ends = Ends::of(links_opened(mtu, queues, open).0);
    let parts = Arc::into_inner(parts).unwrap();
    let [(near, near_nic), (far, far_nic)] = parts.map(|part| part.into_inner().unwrap());
    ends.pools = Some([near, far]);
    ends.nics = Some([near_nic.unwrap(), far_nic.unwrap()]);
    ends.until_both_use("xdp");
    ends
}

/// Both guests say something to each other.
fn guests_talk(ends: &mut Ends, seed: u8) {
    for end in [0, 1] {
        let mut said = [GUESTS[1 - end], GUESTS[end]].concat();
        said.extend([8, 0]);
        said.resize(700, seed);
        let (Some(pools), Some(nics)) = (&mut ends.pools, &mut ends.nics) else {
            panic!("no NICs");
        };
        let frames = &mut pools[end].frames;
        let token = frames.from_bytes(&said).unwrap();
        assert!(matches!(nics[end].send(frames, token), Sent::Done));
        let begun = Instant::now();
        let heard = loop {
            ends.step();
            let (Some(pools), Some(nics)) = (&mut ends.pools, &mut ends.nics) else {
                panic!("no NICs");
            };
            let (frames, mut out) = (&mut pools[1 - end].frames, VecDeque::new());
            nics[1 - end].receive(frames, &mut out, 1).unwrap();
            if let Some(token) = out.pop_front() {
                let heard = frames.bytes(&token).to_vec();
                frames.release(token);
                break heard;
            }
            assert!(begun.elapsed() < PATIENCE, "the guest hears nothing");
        };
        assert_eq!(heard, said);
    }
}

#[test]
fn one_nic_carries_the_guests_frames_the_links_and_tcp() {
    for (mtu, queues, loss) in [(1700, 1, 0), (3000, 2, 0), (1700, 1, 15)] {
        let network = Network::new(0);
        let mut ends = ends(mtu, queues, &network);
        for round in 0..20 {
            ends.talk(10);
            guests_talk(&mut ends, round);
        }
        network.set_loss(loss);
        ends.talk(300);
        pool_tests::assert_in_place(&mut ends);
        for link in &ends.links {
            let stats = link.stats();
            assert_eq!((stats.foreign, stats.damaged), (0, 0), "{stats:?}");
            assert!(loss == 0 || stats.retransmitted > 50, "{stats:?}");
        }
        // What waits for a lost one before it lies in lent slots, too.
        ends.say(0, 200);
        for _ in 0..20 {
            ends.flush(0);
            ends.fill(1);
        }
        ends.leave();
    }
}

#[test]
fn without_a_free_slot_the_channel_stays_where_it_is_and_nothing_is_lost() {
    let mut ends = ends(1700, 1, &Network::new(0));
    let mut taken = Vec::new();
    while let Some(token) = ends.pool(1).frames.from_bytes(&[7; 60]) {
        taken.push(token);
    }
    ends.say(0, 2_000);
    ends.until(|ends| ends.links[1].stats().slot_waits > 1_000);
    // What the NIC itself gives back in between lets a few be read.
    assert!(ends.unheard[0].len() > 1_900);
    for token in taken {
        ends.pool(1).frames.release(token);
    }
    ends.until_heard();
    let stats = ends.links[1].stats();
    assert!(stats.frames_in_place > 200, "{stats:?}");
    assert!(ends.links.iter().all(|link| link.stats().fallbacks == 0));
    ends.leave();
}

#[test]
fn what_crosses_is_copied_into_slots_of_the_pool_and_each_comes_back() {
    let mut ends = ends(1700, 1, &Network::new(0));
    ends.talk(50);
    // From now on the second end is a shard of several: its key is that of the seventh.
    let crossing = Crossing::new(LinkKeys::new(22, 8), 6);
    let wakes = (0..8).map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    let mut seats = seats(&ShardGroup::new(wakes), 4096);
    let (mut seat, mut other) = (seats.remove(6), seats.remove(0));
    let (Some(datagrams), Some(nics)) = (&mut ends.links[1].datagrams, &mut ends.nics) else {
        panic!("no NIC");
    };
    datagrams.crossing = Some(crossing);
    let (link, nic) = (&mut ends.links[1], &mut nics[1]);
    let frames = &mut ends.pools.as_mut().unwrap()[1].frames;
    let mut cross = |link: &mut PacketLink, frames: &mut FramePool| {
        assert!(other.send(6, Kind::Link, 0, &[9; 1500]));
        seat.look();
        link.take_in(nic, frames);
        link.cross(&mut seat, frames);
        link.fill().unwrap();
    };
    let rounds = 2 * u64::from(pool_tests::SLOTS);
    for _ in 0..rounds {
        cross(link, frames);
    }
    let stats = link.stats();
    assert_eq!((stats.crossed_in, stats.crossing_drops), (rounds, 0));
    assert_eq!(stats.foreign, rounds);
    if let Some(datagrams) = &mut link.datagrams {
        datagrams.crossing = None;
    }
    ends.talk(50);
    ends.leave();
}

#[test]
fn what_came_between_the_last_look_and_the_end_of_the_connection_is_heard() {
    let mut ends = ends(1700, 1, &Network::new(0));
    ends.talk(300);
    ends.take_in(1);
    let before = ends.links[1].stats().datagrams_received;
    // Nothing is fetched when the end is seen.
    ends.say(0, 20);
    ends.flush(0);
    let sent = ends.links[0].stats().datagrams_sent;
    ends.links[0].shutdown(Shutdown::Both).unwrap();
    let ended = loop {
        if let Err(e) = ends.links[1].fill() {
            break e;
        }
        ends.hear(1);
        ends.take_in(1);
    };
    assert!(matches!(ended, PacketLinkError::Closed), "{ended}");
    let heard = ends.links[1].stats().datagrams_received;
    assert!(heard > before);
    assert_eq!(heard, sent, "sent before the end");
    ends.leave();
}

#[test]
fn what_was_said_before_the_end_of_the_connection_is_heard() {
    let mut ends = ends(1700, 1, &Network::new(0));
    ends.talk(300);
    // More than one look takes, and less than the sender keeps in flight.
    while ends.unheard[0].len() < 3_000 && ends.links[0].has_room() {
        ends.say(0, 20);
        ends.flush(0);
    }
    ends.links[0].shutdown(Shutdown::Both).unwrap();
    let sent = ends.links[0].stats().datagrams_sent;
    let before = ends.links[1].stats().datagrams_received;
    let ended = loop {
        ends.take_in(1);
        if let Err(e) = ends.links[1].fill() {
            break e;
        }
        ends.hear(1);
    };
    assert!(matches!(ended, PacketLinkError::Closed), "{ended}");
    let heard = ends.links[1].stats().datagrams_received;
    assert!(heard > before);
    assert_eq!(heard, sent, "sent before the end");
    ends.leave();
}
