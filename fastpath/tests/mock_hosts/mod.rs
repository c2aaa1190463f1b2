//! Two hosts of a pair in this process: a worker in the primary's role and one in the secondary's, each with a guest that is a
//! driver of this process, and between them the link, which crosses from one network namespace to another.

mod network;

use std::collections::VecDeque;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use colo_compare::testing::{GUEST_MAC, Side, udp};
use colo_compare::{Limits, Policy, Token};
use colo_fastpath::clock::now_us;
use colo_fastpath::frame::FramePool;
use colo_fastpath::link::{LinkStats, PacketLink, Packets, PeerHeard, PoolMemory, open_ports};
use colo_fastpath::mailbox::Mailbox;
use colo_fastpath::nic::{Filter, Nic, Sent, Sink, XdpNic, XdpNicConfig};
use colo_fastpath::pair::{
    Lease, OnWorkers, PairEvent, PrimaryRole, PrimaryRoleConfig, SecondaryRole, SecondaryRoleConfig,
};
use colo_fastpath::ring::driver_mock::DriverMock;
use colo_fastpath::ring::{Call, GuestRam, Pages, Segment};
use colo_fastpath::worker::{Command, PollMode, PortWiring, WorkerConfig, WorkerHandle, spawn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use network::{Namespace, Station};

const SLOTS: u32 = 8192;
const ENTRIES: u16 = 256;
const BUFFER_BYTES: u64 = 2048;
const NET_HEADER: usize = 12;
const RECEIVED: u64 = 0x10_0000;
const SENT: u64 = 0x20_0000;
/// Buffers of a queue in use at a time.
const WINDOW: u64 = 64;
/// Places of responses. Every other response stays in its place until it has left, and they leave in order: in use are no more
/// than the last two windows.
const PLACES: u64 = 4 * WINDOW;
/// Responses of a guest at a time, by turns: some travel alone, and a thread that seldom gets a processor gets on all the same.
const BURSTS: [u64; 3] = [1, 8, 32];
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than anything waits that one host owes the other: a lost datagram is sent again after a fifth of a second at most.
const OWED_US: u64 = 250_000;
const FAR_US: u64 = u64::MAX / 4;

/// What the two hosts have between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// The link alone, with the datagrams that this allows; what the clients want is made up.
    Link(Packets),
    /// One NIC each, over AF_XDP, for clients and link.
    OneNic,
}

impl Wiring {
    fn packets(self) -> Packets {
        match self {
            Self::Link(packets) => packets,
            Self::OneNic => Packets::Xdp,
        }
    }

    /// The NIC of a host in the namespace of the calling thread.
    fn nic(self, interface: &str, filter: Filter, left: &Arc<AtomicU64>) -> Box<dyn Nic> {
        match self {
            Self::Link(_) => Box::new(Client {
                sink: Sink::new(1500),
                request: request(),
                left: left.clone(),
            }),
            Self::OneNic => {
                let config = XdpNicConfig::new(interface, GUEST_MAC, 1500, filter);
                Box::new(XdpNic::open(config).unwrap())
            }
        }
    }
}

/// Gives as many requests as it is told to; what is sent goes nowhere.
struct Client {
    sink: Sink,
    request: Vec<u8>,
    left: Arc<AtomicU64>,
}

impl Nic for Client {
    fn name(&self) -> &str {
        "client"
    }

    fn describe(&self) -> String {
        "client".to_owned()
    }

    fn receive(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<Token>,
        max: usize,
    ) -> io::Result<()> {
        let left = self.left.load(Ordering::Relaxed);
        for _ in 0..left.min(max as u64) {
            let Some(token) = frames.from_bytes(&self.request) else {
                break;
            };
            self.left.fetch_sub(1, Ordering::Relaxed);
            out.push_back(token);
        }
        Ok(())
    }

    fn send(&mut self, frames: &mut FramePool, token: Token) -> Sent {
        self.sink.send(frames, token)
    }

    fn poll_fds(&self, _: bool, _: bool, _: &mut Vec<libc::pollfd>) {}

    fn mtu(&self) -> u16 {
        self.sink.mtu()
    }

    fn set_filter(&mut self, _: Filter) -> io::Result<()> {
        Ok(())
    }
}

fn request() -> Vec<u8> {
    udp(Side::V4, true, 53, 40_000, &[1; 100])
}

/// The response of number `n`.
fn response(n: u64, len: usize) -> Vec<u8> {
    let mut payload = vec![n as u8; len];
    payload[..8].copy_from_slice(&n.to_be_bytes());
    udp(Side::V4, false, 53, 40_000, &payload)
}

/// One host: its worker and its guest.
pub struct Host {
    pub worker: WorkerHandle,
    ram: Arc<GuestRam>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
    offered: u64,
    pub received: u64,
    pub sent: u64,
    pub used: u64,
}

impl Host {
    fn new(name: &str, nic: Box<dyn Nic>) -> Self {
        let ram = Arc::new(GuestRam::new(4 << 20, Pages::Small).unwrap());
        let guest_rx = DriverMock::new(ram.clone(), 0x4000, ENTRIES, true);
        let guest_tx = DriverMock::new(ram.clone(), 0x8000, ENTRIES, true);
        let wiring = PortWiring {
            ram: ram.clone(),
            call: Arc::new(Call::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let config = WorkerConfig {
            name: name.into(),
            poll: PollMode::Busy,
            cpu: None,
            frame_slots: SLOTS,
            tx: Default::default(),
            stages: false,
        };
        let worker = spawn(config, nic, wiring).unwrap();
        let queues = [guest_rx.queue_state(), guest_tx.queue_state()];
        worker.activate(queues).unwrap();
        Self {
            worker,
            ram,
            guest_rx,
            guest_tx,
            offered: 0,
            received: 0,
            sent: 0,
            used: 0,
        }
    }

    /// The guest takes what it got and gives buffers for more.
    pub fn look(&mut self) {
        while self.guest_rx.take_used().unwrap().is_some() {
            self.offered -= 1;
            self.received += 1;
        }
        while self.offered < WINDOW {
            // Nobody reads what comes: one place will do for all.
            let (gpa, len) = (RECEIVED, BUFFER_BYTES as u32);
            let buffer = Segment { gpa, len };
            self.guest_rx.offer(&[], &[buffer]).unwrap().unwrap();
            self.offered += 1;
        }
        while self.guest_tx.take_used().unwrap().is_some() {
            self.used += 1;
        }
    }

    /// The guest sends its next response.
    pub fn respond(&mut self, len: usize) {
        let frame = response(self.sent, len);
        let gpa = SENT + self.sent % PLACES * BUFFER_BYTES;
        self.ram.write(gpa, &[0; NET_HEADER]).unwrap();
        self.ram.write(gpa + NET_HEADER as u64, &frame).unwrap();
        let len = (NET_HEADER + frame.len()) as u32;
        let buffer = Segment { gpa, len };
        self.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
        self.sent += 1;
    }

    /// A step of a halted worker.
    pub fn step(&self) -> bool {
        let step = self.worker.execute(|edge, role| role.step(edge, now_us()));
        step.unwrap()
    }

    /// What is due later is a look at flows that nothing waits for: their deadlines are [`FAR_US`] away.
    fn owes_nothing(&self) -> bool {
        let due_us = self.worker.execute(|_, role| role.deadline_us());
        due_us.unwrap().is_none_or(|at| at > now_us() + OWED_US)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

/// Both, as a pair in its second epoch.
pub struct Hosts {
    pub primary: Host,
    pub secondary: Host,
    requests: Arc<AtomicU64>,
    /// The client on the cable of both NICs.
    client: Option<Station>,
    events: [Mailbox<PairEvent>; 2],
}

impl Hosts {
    pub fn new(wiring: Wiring, digests: bool) -> Self {
        let requests: Arc<AtomicU64> = Arc::default();
        let namespaces = Namespace::pair();
        let host = |n: usize, name: &'static str, filter: Filter, left: Arc<AtomicU64>| {
            let interface = namespaces[n].interface();
            namespaces[n].run(move || Host::new(name, wiring.nic(interface, filter, &left)))
        };
        let primary = host(0, "primary", Filter::Guest(GUEST_MAC), requests.clone());
        let secondary = host(1, "secondary", Filter::DropAll, Arc::default());
        let [near, far] = links(wiring.packets(), &namespaces, [&primary, &secondary]);
        let (limits, mac) = (limits(), GUEST_MAC);
        let (post, theirs) = Mailbox::new().unwrap();
        let config = SecondaryRoleConfig { limits, mac };
        let role = SecondaryRole::new(&config, far, post);
        secondary.worker.set_role(Box::new(role)).unwrap();
        let lease = Lease::default();
        let config = PrimaryRoleConfig {
            limits,
            policy: Policy::default(),
            gap_limit_us: FAR_US,
            frame_slots: SLOTS,
            gaps: Arc::default(),
            answers: Default::default(),
            lease: lease.clone(),
            digest_key: digests.then_some([7; 16]),
        };
        let (post, ours) = Mailbox::new().unwrap();
        let role = PrimaryRole::new(&config, mac, post);
        primary.worker.set_role(Box::new(role)).unwrap();
        let cut = PrimaryRole::on_worker(&primary.worker, move |role, edge| {
            role.attach(edge, near);
            let cut = role.cut(edge, true).unwrap();
            role.commit(edge, cut.epoch);
            cut
        })
        .unwrap();
        SecondaryRole::on_worker(&secondary.worker, move |role, edge| {
            role.commit(edge, cut.epoch, &[], &cut.translations, false)
                .unwrap();
            role.start();
        })
        .unwrap();
        let workers = std::slice::from_ref(&primary.worker);
        PrimaryRole::extend_lease(workers, &lease, FAR_US).unwrap();
        let mut hosts = Self {
            primary,
            secondary,
            requests,
            client: (wiring == Wiring::OneNic).then(|| namespaces[1].station()),
            events: [ours, theirs],
        };
        let name = match wiring.packets() {
            Packets::Udp => "udp",
            _ => "xdp",
        };
        hosts.until(|hosts| hosts.links().iter().all(|link| link.carrier == name));
        hosts
    }

    /// Both guests live until that is so.
    fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            self.primary.look();
            self.secondary.look();
            thread::yield_now();
            if let Some(event) = self.events.iter().find_map(Mailbox::try_next) {
                panic!("{event:?}");
            }
            assert!(begun.elapsed() < PATIENCE, "{:?}", self.links());
        }
    }

    /// `count` requests for both guests, and as many responses of both. Neither gets further ahead of the other than a window.
    pub fn exchange(&mut self, count: u64) {
        let mut asked = self.primary.received;
        let (received, sent) = (asked + count, self.primary.sent + count);
        let mut bursts = BURSTS.iter().cycle();
        self.until(|hosts| {
            // The next are on their way while those before are answered.
            let taken = hosts.primary.received.min(hosts.secondary.received);
            if asked < received && asked - taken <= WINDOW / 2 {
                let more = (received - asked).min(WINDOW / 2);
                asked += more;
                hosts.request(more);
            }
            let may_send = hosts.primary.used.min(hosts.secondary.used) + WINDOW;
            let burst = *bursts.next().unwrap();
            let mut done = true;
            for host in [&mut hosts.primary, &mut hosts.secondary] {
                for _ in 0..sent.min(may_send).saturating_sub(host.sent).min(burst) {
                    host.respond([64, 1200][host.sent as usize % 2]);
                }
                done &= host.received == received && host.used == sent;
            }
            done
        });
    }

    /// `count` more requests come to the client's NIC.
    pub fn request(&self, count: u64) {
        match &self.client {
            Some(client) => (0..count).for_each(|_| client.say(&request())),
            None => {
                self.requests.fetch_add(count, Ordering::Relaxed);
            }
        }
    }

    /// The workers do only what [`Host::step`] asks of them.
    pub fn halt(&self) {
        for host in [&self.primary, &self.secondary] {
            let (halted, is_halted) = channel();
            host.worker.send(Command::Halt(halted)).unwrap();
            is_halted.recv().unwrap();
        }
    }

    /// Halted workers step until neither owes the other anything.
    pub fn settle(&mut self) {
        self.until(|hosts| {
            let both = [&hosts.primary, &hosts.secondary];
            let busy = both.map(|host| host.step());
            busy == [false; 2] && both.iter().all(|host| host.owes_nothing())
        });
    }

    /// The primary's end of the link, and the secondary's.
    pub fn links(&self) -> [LinkStats; 2] {
        let near = PrimaryRole::on_worker(&self.primary.worker, |role, _| role.report().link);
        let far = SecondaryRole::on_worker(&self.secondary.worker, |role, _| role.report().link);
        [near.unwrap(), far.unwrap()]
    }
}

fn limits() -> Limits {
    Limits {
        compare_deadline_us: FAR_US,
        ack_deadline_us: FAR_US,
        extra_deadline_us: FAR_US,
        lag_deadline_us: FAR_US,
        max_flows: 64,
        ..Limits::default()
    }
}

/// Both ends of the packet channel.
fn links(
    packets: Packets,
    namespaces: &[Namespace; 2],
    [primary, secondary]: [&Host; 2],
) -> [PacketLink; 2] {
    let [near, far] = namespaces;
    let listener = far.run(|| TcpListener::bind("10.9.0.2:0").unwrap());
    let address = listener.local_addr().unwrap();
    let far_worker = secondary.worker.clone();
    let opened = far.begin(move || open(listener.accept().unwrap().0, packets, &far_worker, 2));
    let near_worker = primary.worker.clone();
    let near = near.run(move || {
        let stream = TcpStream::connect(address).unwrap();
        open(stream, packets, &near_worker, 1)
    });
    [near, opened.recv().unwrap()]
}

/// With the datagrams of the worker's NIC, if that is at this end of the connection, else with sockets beside it.
fn open(stream: TcpStream, packets: Packets, worker: &WorkerHandle, key: u64) -> PacketLink {
    let pool = worker.execute(|edge, _| PoolMemory::of(&edge.frames));
    let share = |name: String| {
        worker
            .execute(move |edge, _| edge.share_nic(&name))
            .unwrap()
    };
    let ports = open_ports(&stream, packets, Some(&pool.unwrap()), share);
    assert_eq!(ports.refused, 0);
    let patience_us = PATIENCE.as_micros() as u64;
    // The control channel is well, so nobody asks over the packet channel's connection.
    let control = PeerHeard::default();
    control.note(FAR_US);
    let link = PacketLink::with_ports(stream, ports.list, key, patience_us).unwrap();
    link.beside(control)
}
