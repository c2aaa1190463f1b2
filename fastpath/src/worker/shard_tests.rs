//! Several workers for one guest: mock drivers, sockets for wires, real threads.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use colo_compare::testing::{Segment as Tcp, Side};

use super::*;
use crate::nic::SocketNic;
use crate::ring::driver_mock::DriverMock;
use crate::ring::{Call, GuestRam, Pages, Segment};
use crate::shard::owner;

const ENTRIES: u16 = 64;
const PAIR_BYTES: u64 = 0x10_0000;
const BUFFER_BYTES: u64 = 2048;
const FLOWS: u16 = 32;
const HEADERS: usize = 54;

/// One queue pair of the guest, as its driver has it.
struct Pair {
    ram: Arc<GuestRam>,
    base: u64,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
    /// Buffers of the receive queue by head.
    offered: BTreeMap<u16, u64>,
    rooms: u64,
    /// Buffers of the transmit queue by head, and those not in use.
    offered_tx: BTreeMap<u16, u64>,
    free: Vec<u64>,
    kick: EventFd,
}

impl Pair {
    fn new(ram: &Arc<GuestRam>, n: u64, kick: EventFd) -> Self {
        let base = n * PAIR_BYTES;
        Self {
            guest_rx: DriverMock::new(ram.clone(), base + 0x4000, ENTRIES, true),
            guest_tx: DriverMock::new(ram.clone(), base + 0x8000, ENTRIES, true),
            ram: ram.clone(),
            base,
            offered: BTreeMap::new(),
            rooms: 0,
            offered_tx: BTreeMap::new(),
            free: (0..u64::from(ENTRIES))
                .map(|place| base + 0x8_0000 + place * BUFFER_BYTES)
                .collect(),
            kick,
        }
    }

    fn state(&self) -> PortState {
        [self.guest_rx.queue_state(), self.guest_tx.queue_state()]
    }

    fn offer_room(&mut self, buffers: u64) {
        for _ in 0..buffers {
            // They are used in order, so no two of those in use are the same.
            let place = self.rooms % u64::from(ENTRIES);
            let gpa = self.base + 0x2_0000 + place * BUFFER_BYTES;
            let buffer = Segment {
                gpa,
                len: BUFFER_BYTES as u32,
            };
            if let Some(head) = self.guest_rx.offer(&[], &[buffer]).unwrap() {
                self.offered.insert(head, gpa);
                self.rooms += 1;
            }
        }
        self.kick.write(1).unwrap();
    }

    /// Takes what came and offers its buffer again if `again`.
    fn receive(&mut self, again: bool) -> Option<Vec<u8>> {
        let used = self.guest_rx.take_used().unwrap()?;
        let gpa = self.offered.remove(&used.head).unwrap();
        let mut frame = vec![0; used.written as usize - 12];
        self.ram.read(gpa + 12, &mut frame).unwrap();
        if again {
            let buffer = Segment {
                gpa,
                len: BUFFER_BYTES as u32,
            };
            let head = self.guest_rx.offer(&[], &[buffer]).unwrap().unwrap();
            self.offered.insert(head, gpa);
            self.kick.write(1).unwrap();
        }
        Some(frame)
    }

    fn send(&mut self, frame: &[u8]) {
        let gpa = loop {
            while let Some(used) = self.guest_tx.take_used().unwrap() {
                self.free.extend(self.offered_tx.remove(&used.head));
            }
            if let Some(gpa) = self.free.pop() {
                break gpa;
            }
            std::thread::yield_now();
        };
        self.ram.write(gpa, &[0; 12]).unwrap();
        self.ram.write(gpa + 12, frame).unwrap();
        let buffer = Segment {
            gpa,
            len: 12 + frame.len() as u32,
        };
        let head = self.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
        self.offered_tx.insert(head, gpa);
        self.kick.write(1).unwrap();
    }
}

struct Bench {
    pairs: Vec<Pair>,
    wires: Vec<UnixDatagram>,
    workers: Vec<WorkerHandle>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.workers.iter().for_each(WorkerHandle::stop);
    }
}

fn bench(shards: usize, poll: PollMode) -> Bench {
    let ram = Arc::new(GuestRam::new(shards as u64 * PAIR_BYTES, Pages::Small).unwrap());
    let call = Arc::new(Call::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    let (mut pairs, mut wires) = (Vec::new(), Vec::new());
    let (mut configs, mut nics, mut wirings) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..shards {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        wirings.push(PortWiring {
            ram: ram.clone(),
            call: call.clone(),
            kick: kick.try_clone().unwrap(),
        });
        pairs.push(Pair::new(&ram, n as u64, kick));
        let (nic, wire) = SocketNic::pair(1500).unwrap();
        wire.set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        wires.push(wire);
        nics.push(Box::new(nic) as Box<dyn Nic>);
        configs.push(WorkerConfig {
            name: format!("shard-{n}"),
            poll,
            cpu: None,
            frame_slots: 64,
            tx: Default::default(),
            stages: true,
        });
    }
    let workers = spawn_shards(configs, nics, wirings).unwrap();
    for (worker, pair) in workers.iter().zip(&pairs) {
        worker.activate(pair.state()).unwrap();
    }
    Bench {
        pairs,
        wires,
        workers,
    }
}

impl Bench {
    /// Sends a frame for the guest. `false`: the socket is full.
    fn offer(&self, flow: u16, frame: Vec<u8>) -> bool {
        let wire = &self.wires[usize::from(flow) % self.wires.len()];
        wire.set_nonblocking(true).unwrap();
        let sent = wire.send(&frame).is_ok();
        wire.set_nonblocking(false).unwrap();
        sent
    }
}

/// Frame `n` of a flow; the payload says which it is.
fn frame(to_guest: bool, flow: u16, n: u32, payload_len: usize) -> Vec<u8> {
    let mut payload = vec![flow as u8; payload_len];
    payload[..4].copy_from_slice(&n.to_be_bytes());
    let segment = Tcp::new(Side::V4)
        .ports(80, 40_000 + flow)
        .payload(&payload);
    if to_guest {
        segment.to_guest().bytes()
    } else {
        segment.bytes()
    }
}

fn flow_and_number(frame: &[u8]) -> (u16, u32) {
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let flow = port(34).max(port(36)) - 40_000;
    let number = frame[HEADERS..HEADERS + 4].try_into().unwrap();
    (flow, u32::from_be_bytes(number))
}

/// Whether every flow's numbers are 0, 1, 2, ... and there are so many in all.
fn assert_in_order(frames: &[Vec<u8>], count: usize) {
    let mut next = BTreeMap::new();
    for frame in frames {
        let (flow, n) = flow_and_number(frame);
        let expected: &mut u32 = next.entry(flow).or_default();
        assert_eq!(n, *expected, "flow {flow}");
        *expected += 1;
    }
    assert_eq!(frames.len(), count);
}

fn crossed(bench: &Bench) -> (u64, u64) {
    let stats: Vec<_> = bench.workers.iter().map(WorkerHandle::stats).collect();
    let sum = |of: fn(&crate::stats::WorkerSnapshot) -> u64| stats.iter().map(of).sum();
    (sum(|s| s.crossed_out_frames), sum(|s| s.crossed_in_frames))
}

#[test]
fn output_leaves_by_its_owner_whatever_queue_it_came_by() {
    for poll in [PollMode::Adaptive, PollMode::Busy, PollMode::Interrupt] {
        let mut bench = bench(2, poll);
        set_active_pairs(&bench.workers, 2).unwrap();
        let (flows, rounds) = (FLOWS, 20);
        let mut got = [Vec::new(), Vec::new()];
        for n in 0..rounds {
            for flow in 0..flows {
                let len = [64, 1200][usize::from(flow % 2)];
                let frame = frame(false, flow, n, len);
                // One flow always by the same queue, as a guest does it.
                bench.pairs[usize::from(flow / 2 % 2)].send(&frame);
                let owner = owner(&frame, frame.len(), 2) as usize;
                let mut buf = [0; 2048];
                let len = bench.wires[owner].recv(&mut buf).unwrap();
                got[owner].push(buf[..len].to_vec());
                assert_eq!(got[owner].last().unwrap(), &frame);
            }
        }
        let all = [&got[0][..], &got[1][..]].concat();
        assert_in_order(&all, usize::from(flows) * rounds as usize);
        assert!(!got[0].is_empty() && !got[1].is_empty());
        let (out, into) = crossed(&bench);
        assert_eq!(out, into);
        assert!(out > 0);
        let copied: u64 = bench
            .workers
            .iter()
            .map(|worker| worker.stats().copied_crossing_bytes)
            .sum();
        assert!(
            copied > 0,
            "long frames lay in the guest until they crossed"
        );
    }
}

#[test]
fn a_guest_with_one_pair_is_served_by_all_shards() {
    for poll in [PollMode::Adaptive, PollMode::Busy, PollMode::Interrupt] {
        for shards in [2, 3] {
            let mut bench = bench(shards, poll);
            bench.pairs[0].offer_room(8);
            let mut got = Vec::new();
            let rounds = 40;
            for n in 0..rounds {
                for flow in 0..FLOWS {
                    while !bench.offer(flow, frame(true, flow, n, 100)) {
                        got.extend(bench.pairs[0].receive(true));
                    }
                }
            }
            let count = usize::from(FLOWS) * rounds as usize;
            while got.len() < count {
                got.extend(bench.pairs[0].receive(true));
                std::thread::yield_now();
            }
            assert_in_order(&got, count);
            // And what it answers leaves by the owners.
            for flow in 0..FLOWS {
                let frame = frame(false, flow, 0, 100);
                bench.pairs[0].send(&frame);
                let owner = owner(&frame, frame.len(), shards as u32) as usize;
                let mut buf = [0; 2048];
                let len = bench.wires[owner].recv(&mut buf).unwrap();
                assert_eq!(buf[..len], frame);
            }
            assert!(bench.pairs[1].guest_rx.take_used().unwrap().is_none());
        }
    }
}

#[test]
fn without_room_all_sleep_and_room_wakes_them() {
    let mut bench = bench(2, PollMode::Adaptive);
    let mut sent = 0;
    // As many as find a place on the way.
    while bench.offer(sent % FLOWS, frame(true, sent % FLOWS, 0, 100)) {
        sent += 1;
    }
    // Nobody may spin for room: each sleeps again, however often it is woken.
    for worker in &bench.workers {
        let before = worker.stats().sleeps;
        while worker.stats().sleeps <= before + 3 {
            worker.execute(|_, _| ()).unwrap();
        }
    }
    assert!(bench.pairs[0].receive(false).is_none());
    bench.pairs[0].offer_room(8);
    let mut got = 0;
    while got < usize::from(sent) {
        got += usize::from(bench.pairs[0].receive(true).is_some());
        std::thread::yield_now();
    }
}

#[test]
fn pairs_that_the_guest_begins_to_use_or_gives_up_are_heeded() {
    let mut bench = bench(2, PollMode::Adaptive);
    let mine = (0..FLOWS).find(|&flow| {
        let frame = frame(true, flow, 0, 100);
        owner(&frame, frame.len(), 2) == 1
    });
    let flow = mine.unwrap();
    bench.pairs[1].offer_room(8);
    let mut n = 0;
    for active in [1, 2, 1, 2] {
        set_active_pairs(&bench.workers, active).unwrap();
        assert_eq!(bench.workers[0].group().active_pairs(), active);
        let pair = active - 1;
        if pair == 0 && n == 0 {
            bench.pairs[0].offer_room(8);
        }
        for _ in 0..20 {
            bench.wires[0].send(&frame(true, flow, n, 100)).unwrap();
            let got = loop {
                if let Some(got) = bench.pairs[pair].receive(true) {
                    break got;
                }
                std::thread::yield_now();
            };
            assert_eq!(flow_and_number(&got), (flow, n));
            n += 1;
        }
        assert!(bench.pairs[1 - pair].receive(true).is_none());
    }
}

/// A role that is to a cut what a primary's is: it holds what the guest sends and notes what the guest
/// was given.
#[derive(Default)]
struct Ledger {
    held: Vec<Vec<u8>>,
    delivered: Vec<Vec<u8>>,
}

impl Ledger {
    fn note(&mut self, edge: &mut Edge, token: colo_compare::Token) {
        self.delivered.push(edge.frames.bytes(&token).to_vec());
        edge.release(token);
    }

    fn hold(&mut self, edge: &mut Edge, token: colo_compare::Token) {
        self.held.push(edge.frames.bytes(&token).to_vec());
        edge.release(token);
    }
}

impl Role for Ledger {
    fn name(&self) -> &'static str {
        "ledger"
    }

    fn step(&mut self, edge: &mut Edge, _now_us: u64) -> bool {
        let mut n = 0;
        while n < BATCH && edge.guest_has_room() {
            let Some(token) = edge.nic_receive() else {
                break;
            };
            match edge.guest_deliver(token) {
                Handed::Later => {}
                Handed::Now(Delivery::Done, token) => self.note(edge, token),
                Handed::Now(delivery, token) => {
                    edge.release(token);
                    panic!("{delivery:?} though there was room");
                }
            }
            n += 1;
        }
        while n < 2 * BATCH {
            let Some(token) = edge.guest_take_in_place() else {
                break;
            };
            self.hold(edge, token);
            n += 1;
        }
        n > 0
    }

    fn delivered(
        &mut self,
        edge: &mut Edge,
        _: u64,
        delivery: Delivery,
        token: colo_compare::Token,
    ) {
        assert_eq!(delivery, Delivery::Done);
        self.note(edge, token);
    }

    fn absorb(&mut self, edge: &mut Edge, _now_us: u64) {
        while let Some(token) = edge.guest_take_crossed() {
            self.hold(edge, token);
        }
    }
}

/// What the roles have noted so far, all shards together, and what is in their hands.
fn ledgers(workers: &[WorkerHandle]) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (mut held, mut delivered) = (Vec::new(), Vec::new());
    for worker in workers {
        let (h, d) = worker
            .execute(|_, role| {
                let role: &mut dyn std::any::Any = role;
                let ledger = role.downcast_mut::<Ledger>().unwrap();
                (ledger.held.clone(), ledger.delivered.clone())
            })
            .unwrap();
        held.extend(h);
        delivered.extend(d);
    }
    (held, delivered)
}

/// One cut after the other under load: at each, what the guest has sent (and has its buffer back for)
/// is with its owner, and what the roles take for delivered is in the guest, nothing else.
#[test]
fn a_cut_across_all_shards_loses_and_repeats_nothing() {
    for active in [1, 2] {
        let mut bench = bench(2, PollMode::Adaptive);
        for worker in &bench.workers {
            worker.set_role(Box::new(Ledger::default())).unwrap();
        }
        set_active_pairs(&bench.workers, active).unwrap();
        let (mut received, mut sent) = (Vec::new(), 0_usize);
        let (mut next_in, mut next_out) = ([0; FLOWS as usize], [0; FLOWS as usize]);
        for round in 0..200 {
            for pair in &mut bench.pairs[..active] {
                // Now and then there is no room, and the cut finds frames undelivered.
                pair.offer_room(round % 4);
            }
            for flow in 0..FLOWS {
                let at = usize::from(flow);
                // A full socket refuses: then nothing was sent.
                let offered = bench.offer(flow, frame(true, flow, next_in[at], 100));
                next_in[at] += u32::from(offered);
                let len = [64, 1200][at / 2 % 2];
                bench.pairs[at % active].send(&frame(false, flow, next_out[at], len));
                next_out[at] += 1;
                sent += 1;
            }
            // The guest stands still; its workers are in the middle of it.
            let states = quiesce_all(&bench.workers).unwrap();
            let taken: u64 = states
                .iter()
                .flatten()
                .map(|[_, guest_tx]| {
                    assert_eq!(guest_tx.next_avail, guest_tx.next_used);
                    u64::from(guest_tx.next_used)
                })
                .sum();
            let (held, delivered) = ledgers(&bench.workers);
            assert_eq!(held.len() as u64, taken, "taken and with nobody, or twice");
            for pair in &mut bench.pairs {
                while let Some(frame) = pair.receive(false) {
                    received.push(frame);
                }
            }
            assert_eq!(delivered.len(), received.len(), "round {round}");
            assert_in_order(&received, delivered.len());
            resume_all(&bench.workers).unwrap();
        }
        // In the end everything arrives.
        let total: u32 = next_in.iter().sum();
        while received.len() < total as usize {
            for pair in &mut bench.pairs[..active] {
                pair.offer_room(1);
                received.extend(pair.receive(false));
            }
            std::thread::yield_now();
        }
        assert_in_order(&received, total as usize);
        while ledgers(&bench.workers).0.len() < sent {
            std::thread::yield_now();
        }
        assert_in_order(&ledgers(&bench.workers).0, sent);
        let (out, _) = crossed(&bench);
        assert!(out > 0);
        if active == 1 {
            let returns = bench.workers.iter().map(|w| w.stats().crossing_returns);
            assert!(returns.sum::<u64>() > 0, "no cut found a frame undelivered");
        }
    }
}

#[test]
fn shards_that_do_not_fit_together_are_refused() {
    let refused = spawn_shards(Vec::new(), Vec::new(), Vec::new()).unwrap_err();
    assert!(refused.to_string().contains("from 1 to 8"), "{refused}");
}

#[test]
fn frames_gather_only_where_they_pass_one_worker() {
    for shards in [1, 2] {
        let bench = bench(shards, PollMode::Adaptive);
        for worker in &bench.workers {
            let may_gather = worker.execute(|edge, role| role.may_gather(edge));
            assert_eq!(may_gather.unwrap(), shards == 1);
        }
    }
}
