//! The server: takes frames one by one, lets the connection they belong to act, and sends what
//! results.
//!
//! Invariants: a frame is handed to the stack, and the services act on it, before the next frame is
//! looked at; no frame is taken while there is no room to answer it; the number of connections is
//! limited, the longest silent ones give way.
//!
//! Does not reassemble IPv4 fragments, and does not fragment.

use crate::conn::{Conn, ECHO_PORT, is_served};
use crate::demux::{FlowKey, Route, route};
use crate::hash::BuildHash;
use crate::neighbors::{Neighbors, solicitation_to_group};
use crate::world::{Platform, World};
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use indexmap::IndexMap;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, RxToken};
use smoltcp::socket::tcp::State;
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address, Ipv6Address};

/// Frames handled before output is sent.
const BATCH: usize = 32;
/// Room for answers that must be there before a frame is taken: one of the stack, one of a service.
const ROOM: usize = 2;
/// A connection in a state other than established, or with unacknowledged output, is given up after
/// this silence.
const GIVE_UP_US: i64 = 120_000_000;
/// When places are scarce, closing and half-open connections give way after this silence ...
const SCARCE_CLOSING_US: i64 = 3_000_000;
/// ... and established ones after this.
const SCARCE_IDLE_US: i64 = 60_000_000;
/// Wait after the stack claimed to have work and did none.
const RETRY_US: i64 = 1_000;

/// Where frames come from and go to.
pub trait FrameDevice: Device {
    /// The next received frame. [`Device::receive`] gives the same one.
    fn front(&mut self) -> Option<&[u8]>;
    /// Throws the next received frame away.
    fn discard(&mut self);
    /// Frames that can be sent now.
    fn room(&mut self) -> usize;
    /// Tells the other side about frames sent and buffers given back.
    fn flush(&mut self);
}

/// The guest's network addresses.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// MAC address.
    pub mac: [u8; 6],
    /// IPv4 and IPv6 addresses with their networks, at most four.
    pub networks: Vec<IpCidr>,
    /// IPv4 router.
    pub gateway_ipv4: Option<Ipv4Address>,
    /// IPv6 router.
    pub gateway_ipv6: Option<Ipv6Address>,
}

/// How much memory things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Receive buffer of a connection in bytes.
    pub receive_bytes: usize,
    /// Transmit buffer of a connection in bytes.
    pub transmit_bytes: usize,
    /// Keys and values in bytes.
    pub store_bytes: usize,
    /// Unfinished requests and unsent replies of all connections in bytes.
    pub buffer_bytes: usize,
    /// Pages that clients have written, in bytes.
    pub arena_bytes: usize,
}

impl Limits {
    /// What fits a heap of so many bytes.
    pub const fn for_heap(heap_bytes: usize) -> Self {
        let (receive_bytes, transmit_bytes) = if heap_bytes >= 100 << 20 {
            (32 * 1024, 64 * 1024)
        } else {
            (16 * 1024, 32 * 1024)
        };
        let affordable = heap_bytes / 3 / (receive_bytes + transmit_bytes);
        let connections = if affordable < 400 { affordable } else { 400 };
        let (store_bytes, buffer_bytes) = (heap_bytes / 4, heap_bytes / 6);
        let used = connections * (receive_bytes + transmit_bytes) + store_bytes + buffer_bytes;
        Self {
            connections,
            receive_bytes,
            transmit_bytes,
            store_bytes,
            buffer_bytes,
            // An eighth stays free.
            arena_bytes: heap_bytes - heap_bytes / 8 - used,
        }
    }
}

/// What a server waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing: it can act now.
    Nothing,
    /// The next received frame.
    Frames,
    /// Room for frames to send; received frames wait too.
    Room,
}

/// The whole server.
pub struct Server {
    stack: Interface,
    world: World,
    limits: Limits,
    neighbors: Neighbors,
    conns: Vec<Conn>,
    free: Vec<usize>,
    flows: IndexMap<FlowKey, usize, BuildHash>,
    dirty: Vec<usize>,
    /// No connection wakes up earlier than this.
    next_wake_us: i64,
    udp: SocketSet<'static>,
    udp_echo: SocketHandle,
    udp_is_dirty: bool,
    /// Room for the longest datagram.
    datagram: Vec<u8>,
    /// For frames that belong to no socket.
    nobody: SocketSet<'static>,
    dice: tcp::Socket<'static>,
}

impl Server {
    /// A server that listens on all its ports.
    pub fn new(
        device: &mut impl FrameDevice,
        addresses: &Addresses,
        limits: Limits,
        platform: Box<dyn Platform>,
        now_us: i64,
    ) -> Self {
        let mac = EthernetAddress(addresses.mac);
        let world = World::new(
            platform,
            limits.store_bytes,
            limits.buffer_bytes,
            limits.arena_bytes,
        );
        let mut config = Config::new(mac.into());
        config.random_seed = world.random();
        let mut stack = Interface::new(config, device, Instant::from_micros(now_us));
        stack.update_ip_addrs(|own| {
            // The stack has room for four; the caller gives no more.
            own.extend(addresses.networks.iter().copied().take(own.capacity()));
        });
        let mut gateways: Vec<IpAddress> = vec![];
        if let Some(gateway) = addresses.gateway_ipv4 {
            gateways.push(gateway.into());
            let _ = stack.routes_mut().add_default_ipv4_route(gateway);
        }
        if let Some(gateway) = addresses.gateway_ipv6 {
            gateways.push(gateway.into());
            let _ = stack.routes_mut().add_default_ipv6_route(gateway);
        }
        let mut udp = SocketSet::new(vec![]);
        let udp_echo = udp.add(echo_socket());
        let frame_max = device.capabilities().max_transmission_unit;
        Self {
            stack,
            world,
            limits,
            neighbors: Neighbors::new(mac, addresses.networks.clone(), gateways),
            conns: Vec::with_capacity(limits.connections),
            free: Vec::with_capacity(limits.connections),
            flows: IndexMap::default(),
            dirty: Vec::with_capacity(limits.connections),
            next_wake_us: i64::MAX,
            udp,
            udp_echo,
            udp_is_dirty: false,
            datagram: vec![0; frame_max],
            nobody: SocketSet::new(vec![]),
            dice: tcp::Socket::new(
                tcp::SocketBuffer::new(vec![0; 1]),
                tcp::SocketBuffer::new(vec![0; 1]),
            ),
        }
    }

    /// Handles one batch of frames and what is due by time; false when there was nothing to do.
    pub fn turn(&mut self, device: &mut impl FrameDevice, now_us: i64) -> bool {
        let mut frames = 0;
        while frames < BATCH && device.room() >= ROOM && self.ingress(device, now_us) {
            frames += 1;
        }
        let woken = self.wake(now_us);
        let sent = self.egress(device, now_us);
        if frames > 0 || sent {
            device.flush();
        }
        frames > 0 || woken || sent
    }

    /// What [`Server::turn`] needs to get on, timers apart.
    pub fn need(&self, device: &mut impl FrameDevice) -> Need {
        let has_output = !self.dirty.is_empty() || self.udp_is_dirty;
        match device.room() {
            room if room < ROOM => Need::Room,
            _ if has_output => Need::Nothing,
            _ => Need::Frames,
        }
    }

    /// When [`Server::turn`] must be called even if no frame comes; `i64::MAX` for never.
    pub fn wake_us(&self) -> i64 {
        self.next_wake_us
    }

    /// What the device says of its link.
    pub fn set_link(&mut self, is_up: bool) {
        self.world.set_link(is_up);
    }

    /// Open connections.
    pub fn connections(&self) -> usize {
        self.flows.len()
    }

    /// Takes one frame; false when there is none.
    fn ingress(&mut self, device: &mut impl FrameDevice, now_us: i64) -> bool {
        let Some(frame) = device.front() else {
            return false;
        };
        let route = route(frame);
        if route != Route::Neighbor
            && let Some(announcement) = self.neighbors.announcement(frame, now_us)
        {
            self.inject(device, &announcement, now_us);
        }
        match route {
            Route::Tcp { key, opens } => self.tcp_ingress(device, key, opens, now_us),
            Route::Udp { port: ECHO_PORT } => self.udp_ingress(device, now_us),
            Route::UnicastSolicitation => self.solicitation(device, now_us),
            Route::Drop => device.discard(),
            Route::Udp { .. } | Route::Other => self.stack_ingress(device, now_us),
            Route::Neighbor => {
                self.stack_ingress(device, now_us);
                self.retry_all();
            }
        }
        true
    }

    /// A frame that only the stack itself may answer.
    fn stack_ingress(&mut self, device: &mut impl FrameDevice, now_us: i64) {
        let now = Instant::from_micros(now_us);
        self.stack
            .poll_ingress_single(now, device, &mut self.nobody);
    }

    fn inject(&mut self, device: &mut impl FrameDevice, frame: &[u8], now_us: i64) {
        let mut device = Injection { device, frame };
        let now = Instant::from_micros(now_us);
        self.stack
            .poll_ingress_single(now, &mut device, &mut self.nobody);
    }

    fn solicitation(&mut self, device: &mut impl FrameDevice, now_us: i64) {
        let to_group = device.front().and_then(solicitation_to_group);
        device.discard();
        if let Some(frame) = to_group {
            self.inject(device, &frame, now_us);
        }
    }

    fn udp_ingress(&mut self, device: &mut impl FrameDevice, now_us: i64) {
        let now = Instant::from_micros(now_us);
        self.stack.poll_ingress_single(now, device, &mut self.udp);
        let socket = self.udp.get_mut::<udp::Socket<'_>>(self.udp_echo);
        while let Ok((len, from)) = socket.recv_slice(&mut self.datagram) {
            // A full queue means that the neighbour does not answer: datagrams may be lost then.
            let _ = socket.send_slice(&self.datagram[..len], from);
        }
        self.udp_egress(device, now_us);
    }

    fn udp_egress(&mut self, device: &mut impl FrameDevice, now_us: i64) {
        let now = Instant::from_micros(now_us);
        while self.stack.poll_egress(now, device, &mut self.udp) != PollResult::None {}
        let socket = self.udp.get_mut::<udp::Socket<'_>>(self.udp_echo);
        self.udp_is_dirty = socket.send_queue() > 0 && device.room() == 0;
    }

    fn tcp_ingress(
        &mut self,
        device: &mut impl FrameDevice,
        key: FlowKey,
        opens: bool,
        now_us: i64,
    ) {
        let mut found = self.flows.get(&key).copied();
        if let Some(index) = found
            && opens
            && self.conns[index].state() == State::TimeWait
        {
            // The client uses its port again.
            self.release(index);
            found = None;
        }
        match found {
            Some(index) => self.conn_ingress(device, index, now_us),
            None if opens && is_served(key.local_port) => self.open(device, key, now_us),
            None => self.stack_ingress(device, now_us),
        }
    }

    fn conn_ingress(&mut self, device: &mut impl FrameDevice, index: usize, now_us: i64) {
        let conn = &mut self.conns[index];
        conn.heard_us = now_us;
        let now = Instant::from_micros(now_us);
        self.stack.poll_ingress_single(now, device, &mut conn.set);
        conn.pump(&mut self.world);
        self.mark(index);
    }

    fn open(&mut self, device: &mut impl FrameDevice, key: FlowKey, now_us: i64) {
        let Some(index) = self.place(now_us) else {
            // The client asks again.
            return device.discard();
        };
        self.roll_dice(key);
        let conn = &mut self.conns[index];
        conn.listen(key.local_port);
        conn.heard_us = now_us;
        let now = Instant::from_micros(now_us);
        self.stack.poll_ingress_single(now, device, &mut conn.set);
        if conn.state() == State::Listen {
            // Not a good segment, or not for us.
            conn.clear(&mut self.world);
            self.free.push(index);
            return;
        }
        conn.key = Some(key);
        self.flows.insert(key, index);
        self.mark(index);
    }

    /// Makes the initial sequence number depend on the present time stamp counter: two guests that
    /// were made equal by a checkpoint choose different ones again. The stack's generator cannot be
    /// seeded again, only advanced.
    fn roll_dice(&mut self, key: FlowKey) {
        for _ in 0..self.world.random() % 64 {
            self.dice.abort();
            let _ = self
                .dice
                .connect(self.stack.context(), (key.remote, 1), (key.local, 1));
        }
        self.dice.abort();
    }

    /// A free place for a connection.
    fn place(&mut self, now_us: i64) -> Option<usize> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        if self.conns.len() < self.limits.connections {
            self.conns.push(Conn::new(
                self.limits.receive_bytes,
                self.limits.transmit_bytes,
            ));
            return Some(self.conns.len() - 1);
        }
        let victim = self.victim(now_us)?;
        self.release(victim);
        self.free.pop()
    }

    /// The connection that gives way: in TIME-WAIT, else silent for long.
    fn victim(&self, now_us: i64) -> Option<usize> {
        let class = |conn: &Conn| {
            let silent_us = now_us - conn.heard_us;
            match conn.state() {
                State::TimeWait | State::Closed => Some(0),
                State::Established if silent_us > SCARCE_IDLE_US => Some(2),
                State::Established => None,
                _ if silent_us > SCARCE_CLOSING_US => Some(1),
                _ => None,
            }
        };
        let ranked = self.conns.iter().enumerate().filter_map(|(index, conn)| {
            conn.key?;
            Some((class(conn)?, conn.heard_us, index))
        });
        ranked.min().map(|(_, _, index)| index)
    }

    fn release(&mut self, index: usize) {
        let conn = &mut self.conns[index];
        if let Some(key) = conn.key {
            self.flows.swap_remove(&key);
        }
        conn.clear(&mut self.world);
        self.free.push(index);
    }

    fn mark(&mut self, index: usize) {
        let conn = &mut self.conns[index];
        if !conn.is_dirty {
            conn.is_dirty = true;
            self.dirty.push(index);
        }
    }

    /// After news about neighbours: everyone with something to send tries again.
    fn retry_all(&mut self) {
        for index in 0..self.conns.len() {
            if self.conns[index].key.is_some() {
                self.mark(index);
            }
        }
        self.udp_is_dirty = true;
    }

    /// Marks the connections whose time has come.
    fn wake(&mut self, now_us: i64) -> bool {
        if now_us < self.next_wake_us {
            return false;
        }
        self.next_wake_us = i64::MAX;
        for index in 0..self.conns.len() {
            let conn = &mut self.conns[index];
            if conn.key.is_none() {
                continue;
            }
            if conn.wake_us > now_us {
                self.next_wake_us = self.next_wake_us.min(conn.wake_us);
                continue;
            }
            if now_us - conn.heard_us >= GIVE_UP_US && may_give_up(conn) {
                conn.socket().abort();
            }
            self.mark(index);
        }
        true
    }

    /// Sends what the dirty connections have, as far as there is room.
    fn egress(&mut self, device: &mut impl FrameDevice, now_us: i64) -> bool {
        let mut sent = false;
        if self.udp_is_dirty && device.room() > 0 {
            self.udp_egress(device, now_us);
            sent = true;
        }
        let now = Instant::from_micros(now_us);
        let mut served = 0;
        while served < self.dirty.len() && device.room() > 0 {
            let index = self.dirty[served];
            let conn = &mut self.conns[index];
            let mut acted = false;
            while self.stack.poll_egress(now, device, &mut conn.set) != PollResult::None {
                acted = true;
            }
            sent |= acted;
            if device.room() == 0 {
                // Perhaps there is more: the connection stays dirty.
                break;
            }
            served += 1;
            conn.is_dirty = false;
            self.rest(index, now_us, acted);
        }
        self.dirty.drain(..served);
        sent
    }

    /// A connection has sent all it can: frees its place, or finds out when it must act again.
    fn rest(&mut self, index: usize, now_us: i64, acted: bool) {
        let conn = &mut self.conns[index];
        if conn.key.is_none() {
            return;
        }
        if conn.is_over() {
            return self.release(index);
        }
        let now = Instant::from_micros(now_us);
        let stack_us = self
            .stack
            .poll_at(now, &conn.set)
            .map_or(i64::MAX, |at| at.total_micros());
        let earliest_us = if acted { now_us } else { now_us + RETRY_US };
        conn.wake_us = stack_us.max(earliest_us);
        if may_give_up(conn) {
            let give_up_us = (conn.heard_us + GIVE_UP_US).max(earliest_us);
            conn.wake_us = conn.wake_us.min(give_up_us);
        }
        self.next_wake_us = self.next_wake_us.min(conn.wake_us);
    }
}

/// True for a connection that must not stay for ever when its client is silent.
fn may_give_up(conn: &Conn) -> bool {
    conn.state() != State::Established || conn.unacknowledged() > 0
}

fn echo_socket() -> udp::Socket<'static> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 65_536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    let bound = socket.bind(ECHO_PORT);
    debug_assert!(bound.is_ok(), "a new socket binds");
    socket
}

/// A device whose next received frame is another one.
struct Injection<'a, D> {
    device: &'a mut D,
    frame: &'a [u8],
}

/// The other frame.
struct InjectedFrame<'a>(&'a [u8]);

impl RxToken for InjectedFrame<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl<D: Device> Device for Injection<'_, D> {
    type RxToken<'b>
        = InjectedFrame<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = D::TxToken<'b>
    where
        Self: 'b;

    fn receive(&mut self, now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let transmit = self.device.transmit(now)?;
        Some((InjectedFrame(self.frame), transmit))
    }

    fn transmit(&mut self, now: Instant) -> Option<Self::TxToken<'_>> {
        self.device.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
