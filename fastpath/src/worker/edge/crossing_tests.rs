//! A worker that is one of several, when it is about to sleep.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::super::port::GuestPort;
use super::*;
use crate::frame::FramePool;
use crate::link::LinkKeys;
use crate::link::port::{DatagramPort, PortAddress, Slot};
use crate::nic::Sink;
use crate::ring::Area;
use crate::shard::{ShardGroup, seats};

/// A transport that nothing comes by and that has no room.
#[derive(Debug)]
struct Nothing;

impl DatagramPort for Nothing {
    fn address(&self) -> PortAddress {
        PortAddress::Xdp([2; 6])
    }
    fn mtu(&self) -> usize {
        1500
    }
    fn set_peer(&mut self, _peer: PortAddress) {}
    fn has_room(&self) -> bool {
        false
    }
    fn send(&mut self, _head: &[u8], _payload: &[u8]) -> bool {
        false
    }
    fn flush(&mut self) {}
    fn receive(&mut self) -> Option<Slot> {
        None
    }
    fn bytes(&self, _slot: &Slot) -> &[u8] {
        &[]
    }
    fn release(&mut self, _slot: Slot) {}
    fn poll_fds(&self, _fds: &mut Vec<libc::pollfd>) {}
    fn errors(&self) -> u64 {
        0
    }
}

fn edge(seat: Seat) -> Edge {
    let stats = Arc::default();
    let area = Arc::new(Area::reserve(16 * 4096).unwrap());
    let frames = FramePool::in_area(area, 16, 4096, Arc::clone(&stats)).unwrap();
    let port = GuestPort::new(None, Arc::clone(&stats));
    let mut edge = Edge::new(frames, Box::new(Sink::new(1500)), port, None, stats);
    edge.sit_down(seat);
    edge
}

#[test]
fn who_reads_the_link_does_not_sleep_over_a_datagram_that_crossed() {
    let wake = |_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let mut seats = seats(&ShardGroup::new((0..2).map(wake)), 4096).into_iter();
    let mut other = seats.next().unwrap();
    let mut edge = edge(seats.next().unwrap());
    let may_sleep = |edge: &mut Edge| {
        let may = edge.may_sleep(true, true, true);
        edge.get_up();
        may
    };
    assert!(may_sleep(&mut edge));
    // Of a session that is over: nobody takes it.
    assert!(other.send(1, Kind::Link, 0, &[1; 60]));
    assert!(may_sleep(&mut edge));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let keys = LinkKeys::new(77, 2);
    let link = PacketLink::with_ports(stream, vec![Box::new(Nothing)], keys.of(1), 1_000_000);
    let mut link = link.unwrap().among(keys, 1);
    edge.cross_link(&mut link);
    assert_eq!(link.stats().crossing_drops, 1);
    assert!(edge.has_crossed());
    assert!(may_sleep(&mut edge));

    edge.cross_link(&mut link);
    assert!(other.send(1, Kind::Link, 0, &[1; 60]));
    assert!(!may_sleep(&mut edge));
    edge.cross_link(&mut link);
    assert_eq!(link.stats().crossing_drops, 2);
}
