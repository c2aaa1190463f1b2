//! The worker between a mock driver and a socket for a wire.

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use colo_compare::{Frames, Token};

use super::*;
use crate::nic::{Filter, Sent, SocketNic};
use crate::ring::driver_mock::DriverMock;
use crate::ring::{Call, GuestRam, Pages, Segment};
use crate::stages::{STAGES, Stage};

const BUFFERS: u64 = 0x20000;

struct Bench {
    ram: Arc<GuestRam>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
    call: Arc<Call>,
    line: EventFd,
    kick: EventFd,
    wire: UnixDatagram,
    worker: WorkerHandle,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

fn bench(poll: PollMode) -> Bench {
    bench_of(poll, true)
}

fn bench_of(poll: PollMode, event_idx: bool) -> Bench {
    let (nic, wire) = SocketNic::pair(1500).unwrap();
    bench_between(poll, event_idx, Box::new(nic), wire)
}

fn bench_with(poll: PollMode, nic: Box<dyn Nic>, wire: UnixDatagram) -> Bench {
    bench_between(poll, true, nic, wire)
}

fn bench_between(poll: PollMode, event_idx: bool, nic: Box<dyn Nic>, wire: UnixDatagram) -> Bench {
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let guest_rx = DriverMock::new(ram.clone(), 0x4000, 16, event_idx);
    let guest_tx = DriverMock::new(ram.clone(), 0x8000, 16, event_idx);
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let call = Arc::new(Call::new(line.try_clone().unwrap()));
    wire.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let wiring = PortWiring {
        ram: ram.clone(),
        call: call.clone(),
        kick: kick.try_clone().unwrap(),
    };
    let config = WorkerConfig {
        name: "bench".into(),
        poll,
        cpu: None,
        frame_slots: 32,
        tx: Default::default(),
        stages: true,
    };
    let worker = spawn(config, nic, wiring).unwrap();
    worker
        .activate([guest_rx.queue_state(), guest_tx.queue_state()])
        .unwrap();
    Bench {
        ram,
        guest_rx,
        guest_tx,
        call,
        line,
        kick,
        wire,
        worker,
    }
}

impl Bench {
    fn send(&mut self, header: [u8; 12], frame: &[u8]) {
        self.ram.write(BUFFERS, &header).unwrap();
        self.ram.write(BUFFERS + 12, frame).unwrap();
        let buffer = Segment {
            gpa: BUFFERS,
            len: 12 + frame.len() as u32,
        };
        self.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
        self.kick.write(1).unwrap();
        while self.guest_tx.take_used().unwrap().is_none() {
            std::thread::yield_now();
        }
    }

    fn offer_room(&mut self, parts: &[(u64, u32)]) {
        let segments: Vec<_> = parts
            .iter()
            .map(|&(gpa, len)| Segment { gpa, len })
            .collect();
        self.guest_rx.offer(&[], &segments).unwrap().unwrap();
        self.kick.write(1).unwrap();
    }

    fn receive(&mut self) -> u32 {
        loop {
            if let Some(used) = self.guest_rx.take_used().unwrap() {
                return used.written;
            }
            std::thread::yield_now();
        }
    }

    fn wait_for(&self, what: impl Fn(&crate::stats::WorkerSnapshot) -> bool) {
        while !what(&self.worker.stats()) {
            std::thread::yield_now();
        }
    }
}

/// Sends nothing until it may.
#[derive(Default)]
struct SlowNic {
    may_send: Arc<AtomicBool>,
    kept: Vec<Token>,
}

impl Nic for SlowNic {
    fn name(&self) -> &str {
        "slow"
    }

    fn describe(&self) -> String {
        "slow".to_owned()
    }

    fn receive(
        &mut self,
        _: &mut FramePool,
        _: &mut VecDeque<Token>,
        _: usize,
    ) -> std::io::Result<()> {
        Ok(())
    }

    fn send(&mut self, _: &mut FramePool, token: Token) -> Sent {
        self.kept.push(token);
        Sent::Done
    }

    fn flush(&mut self, frames: &mut FramePool) -> std::io::Result<()> {
        if self.may_send.load(Ordering::SeqCst) {
            self.kept.drain(..).for_each(|token| frames.release(token));
        }
        Ok(())
    }

    fn poll_fds(&self, _: bool, _: bool, _: &mut Vec<libc::pollfd>) {}

    fn mtu(&self) -> u16 {
        1500
    }

    fn set_filter(&mut self, _: Filter) -> std::io::Result<()> {
        Ok(())
    }
}

/// What the worker has counted when it is quiesced with a long frame at a NIC that then sends or does not.
fn quiesced_with_a_nic_that(sends: bool) -> crate::stats::WorkerSnapshot {
    let (nic, wire) = (SlowNic::default(), UnixDatagram::unbound().unwrap());
    let may_send = nic.may_send.clone();
    let mut bench = bench_with(PollMode::Interrupt, Box::new(nic), wire);
    let buffer = Segment {
        gpa: BUFFERS,
        len: 12 + 1400,
    };
    bench.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
    bench.kick.write(1).unwrap();
    bench.wait_for(|stats| stats.nic_tx_frames == 1);
    let used = bench.guest_tx.take_used().unwrap();
    assert!(used.is_none(), "the NIC reads it");
    may_send.store(sends, Ordering::SeqCst);
    let [_, guest_tx] = bench.worker.quiesce().unwrap().unwrap();
    assert_eq!(guest_tx.next_avail, guest_tx.next_used, "rule 12");
    assert!(bench.guest_tx.take_used().unwrap().is_some());
    bench.worker.stats()
}

#[test]
fn rule_12_what_the_nic_reads_in_the_guest_is_waited_for() {
    let stats = quiesced_with_a_nic_that(true);
    let (copied, exposed) = (stats.copied_undecided_bytes, stats.nic_tx_exposed);
    assert_eq!((copied, exposed), (0, 0));
}

#[test]
fn rule_12_a_nic_that_stands_still_is_not_waited_for_long_and_counted() {
    let stats = quiesced_with_a_nic_that(false);
    assert_eq!(stats.nic_tx_exposed, 1);
    assert!(stats.copied_undecided_bytes > 0);
}

#[test]
fn half_of_the_descriptors_stay_free_however_many_a_frame_takes() {
    let (nic, wire) = (SlowNic::default(), UnixDatagram::unbound().unwrap());
    let may_send = nic.may_send.clone();
    let mut bench = bench_with(PollMode::Interrupt, Box::new(nic), wire);
    // Five chains take 15 of the 16 descriptors.
    for frame in 0..5 {
        let piece = |n: u64, len| Segment {
            gpa: BUFFERS + 4096 * frame + 1024 * n,
            len,
        };
        let chain = [piece(0, 512), piece(1, 500), piece(2, 400)];
        bench.guest_tx.offer(&chain, &[]).unwrap().unwrap();
    }
    bench.kick.write(1).unwrap();
    bench.wait_for(|stats| stats.nic_tx_frames == 5);
    assert_eq!(bench.worker.stats().copied_pressure_bytes, 2 * 1400);
    may_send.store(true, Ordering::SeqCst);
    bench.worker.quiesce().unwrap().unwrap();
    for _ in 0..5 {
        assert!(bench.guest_tx.take_used().unwrap().is_some());
    }
    assert_eq!(bench.worker.stats().nic_tx_exposed, 0);
}

#[test]
fn frames_pass_both_ways_in_every_mode() {
    for poll in [PollMode::Adaptive, PollMode::Busy, PollMode::Interrupt] {
        let mut bench = bench(poll);
        for round in 0..200_u16 {
            let frame = [round as u8; 60];
            bench.send([0; 12], &frame);
            let mut buf = [0; 2048];
            assert_eq!(bench.wire.recv(&mut buf).unwrap(), 60);
            assert_eq!(buf[..60], frame);

            bench.offer_room(&[(0x30000, 5), (0x31000, 20), (0x32000, 2000)]);
            bench.wire.send(&frame).unwrap();
            assert_eq!(bench.receive(), 72);
            let mut parts = [0; 72];
            bench.ram.read(0x30000, &mut parts[..5]).unwrap();
            bench.ram.read(0x31000, &mut parts[5..25]).unwrap();
            bench.ram.read(0x32000, &mut parts[25..]).unwrap();
            assert_eq!(parts[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(parts[12..], frame);
        }
    }
}

#[test]
fn stages_are_timed() {
    let mut bench = bench(PollMode::Adaptive);
    bench.send([0; 12], &[1; 60]);
    bench.wire.recv(&mut [0; 2048]).unwrap();
    bench.offer_room(&[(0x30000, 2000)]);
    bench.wire.send(&[2; 60]).unwrap();
    bench.receive();
    let stages = bench
        .worker
        .execute(|edge, _| edge.stages().unwrap().clone())
        .unwrap();
    let counts = STAGES.map(|stage| stages.histogram(stage).len());
    assert_eq!(counts, [1, 0, 0, 1]);
    assert!(stages.histogram(Stage::CompareToNic).max() < 20_000_000_000);
}

#[test]
fn frames_wait_at_the_nic_while_the_guest_has_no_room() {
    let mut bench = bench(PollMode::Adaptive);
    for n in 0..5 {
        bench.wire.send(&[n; 60]).unwrap();
    }
    bench.wait_for(|s| s.sleeps > 0);
    assert_eq!(bench.worker.stats().nic_rx_frames, 0);
    for n in 0..5 {
        bench.offer_room(&[(0x30000, 2000)]);
        assert_eq!(bench.receive(), 72);
        let mut first = [0];
        bench.ram.read(0x30000 + 12, &mut first).unwrap();
        assert_eq!(first, [n]);
    }
}

#[test]
fn bad_output_is_counted_and_does_not_stall() {
    let mut bench = bench(PollMode::Adaptive);
    bench.send([0; 12], &[1; 13]);
    bench.send([0; 12], &[2; 1600]);
    bench.send([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[3; 60]);
    bench.send([0; 12], &[4; 60]);
    let mut buf = [0; 2048];
    assert_eq!(bench.wire.recv(&mut buf).unwrap(), 60);
    assert_eq!(buf[0], 4);
    assert_eq!(bench.worker.stats().guest_tx_bad, 3);
}

#[test]
fn a_small_receive_buffer_costs_its_frame_only() {
    let mut bench = bench(PollMode::Adaptive);
    bench.offer_room(&[(0x30000, 100)]);
    bench.wire.send(&[1; 200]).unwrap();
    bench.wire.send(&[2; 60]).unwrap();
    assert_eq!(bench.receive(), 72);
    assert_eq!(bench.worker.stats().guest_rx_too_small, 1);
    bench.wire.send(&[3; 1523]).unwrap();
    bench.offer_room(&[(0x30000, 2000)]);
    bench.wait_for(|s| s.nic_rx_oversize == 1);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_works_again_after_it() {
    let mut bench = bench(PollMode::Adaptive);
    bench.guest_tx.set_avail_idx(1000).unwrap();
    bench.kick.write(1).unwrap();
    bench.wait_for(|s| s.ring_errors == 1);
    while bench.line.read().is_err() {
        std::thread::yield_now();
    }
    assert!(bench.call.needs_reset());
    assert_eq!(bench.worker.quiesce().unwrap(), None);
    bench.worker.resume().unwrap();
    bench.worker.deactivate().unwrap();

    bench.call.reset();
    bench.ram.write(0x4000, &[0; 0x8000]).unwrap();
    bench.guest_rx = DriverMock::new(bench.ram.clone(), 0x4000, 16, true);
    bench.guest_tx = DriverMock::new(bench.ram.clone(), 0x8000, 16, true);
    let state = [bench.guest_rx.queue_state(), bench.guest_tx.queue_state()];
    bench.worker.activate(state).unwrap();
    bench.send([0; 12], &[9; 60]);
    assert_eq!(bench.wire.recv(&mut [0; 2048]).unwrap(), 60);
}

/// Takes frames in place and keeps them until it is told otherwise.
#[derive(Default)]
struct Keeper {
    kept: Vec<colo_compare::Token>,
}

impl Role for Keeper {
    fn name(&self) -> &'static str {
        "keeper"
    }
    fn step(&mut self, edge: &mut Edge, _now_us: u64) -> bool {
        let before = self.kept.len();
        self.kept.extend(edge.guest_take_in_place());
        self.kept.len() > before
    }
    fn leave(&mut self, edge: &mut Edge) {
        for token in self.kept.drain(..) {
            let sent = edge.nic_send(token);
            assert!(sent.is_ok(), "the socket is full");
        }
    }
}

impl Bench {
    fn keep(&mut self, frame: &[u8]) {
        self.ram.write(BUFFERS + 12, frame).unwrap();
        let head = Segment {
            gpa: BUFFERS,
            len: 12,
        };
        let body = Segment {
            gpa: BUFFERS + 12,
            len: frame.len() as u32,
        };
        let taken = self.worker.stats().guest_tx_frames;
        self.guest_tx.offer(&[head, body], &[]).unwrap().unwrap();
        self.kick.write(1).unwrap();
        self.wait_for(|s| s.guest_tx_frames > taken);
    }
}

#[test]
fn a_kept_buffer_is_the_guests_again_once_it_is_sent() {
    let mut bench = bench(PollMode::Adaptive);
    bench.worker.set_role(Box::new(Keeper::default())).unwrap();
    let frame: Vec<u8> = (0..1400).map(|n| n as u8).collect();
    bench.keep(&frame);
    bench.worker.execute(|_, _| ()).unwrap();
    assert!(bench.guest_tx.take_used().unwrap().is_none());
    bench.worker.set_role(Box::new(Solo::default())).unwrap();
    let mut buf = [0; 2048];
    assert_eq!(bench.wire.recv(&mut buf).unwrap(), 1400);
    assert_eq!(buf[..1400], frame);
    while bench.guest_tx.take_used().unwrap().is_none() {
        std::thread::yield_now();
    }
    // The socket takes frames in one piece only.
    let stats = bench.worker.stats();
    let copied = 1400 - colo_compare::HEADER_MAX as u64;
    assert_eq!(stats.copied_gathered_bytes, copied);
    assert_eq!(stats.tx_in_place_bytes, 0);
}

#[test]
fn a_capture_finds_no_buffer_in_use_and_its_frames_are_copies() {
    let mut bench = bench(PollMode::Adaptive);
    bench.worker.set_role(Box::new(Keeper::default())).unwrap();
    let frame = [0x5a; 1400];
    bench.keep(&frame);
    let [_, guest_tx] = bench.worker.quiesce().unwrap().unwrap();
    assert_eq!((guest_tx.next_avail, guest_tx.next_used), (1, 1));
    assert!(bench.guest_tx.take_used().unwrap().is_some());
    let copied = bench.worker.stats().copied_undecided_bytes;
    assert_eq!(copied, 1400 - colo_compare::HEADER_MAX as u64);
    bench.ram.write(BUFFERS + 12, &[0; 1400]).unwrap();
    bench.worker.resume().unwrap();
    bench.worker.set_role(Box::new(Solo::default())).unwrap();
    let mut buf = [0; 2048];
    assert_eq!(bench.wire.recv(&mut buf).unwrap(), 1400);
    assert_eq!(buf[..1400], frame);
}

#[test]
fn kept_frames_outlive_a_reset_of_the_device() {
    let mut bench = bench(PollMode::Adaptive);
    bench.worker.set_role(Box::new(Keeper::default())).unwrap();
    bench.keep(&[0x5a; 1400]);
    bench.worker.deactivate().unwrap();
    bench.ram.write(0x4000, &[0; 0x8000]).unwrap();
    bench.guest_rx = DriverMock::new(bench.ram.clone(), 0x4000, 16, true);
    bench.guest_tx = DriverMock::new(bench.ram.clone(), 0x8000, 16, true);
    let state = [bench.guest_rx.queue_state(), bench.guest_tx.queue_state()];
    bench.worker.activate(state).unwrap();
    bench.worker.set_role(Box::new(Solo::default())).unwrap();
    let mut buf = [0; 2048];
    assert_eq!(bench.wire.recv(&mut buf).unwrap(), 1400);
    let [_, guest_tx] = bench.worker.quiesce().unwrap().unwrap();
    assert_eq!(guest_tx.next_used, 0, "a buffer of an earlier life");
}

#[test]
fn a_quiesced_worker_stands_still_with_nothing_in_flight() {
    let mut bench = bench(PollMode::Adaptive);
    bench.offer_room(&[(0x30000, 2000)]);
    bench.send([0; 12], &[1; 60]);
    let [guest_rx, guest_tx] = bench.worker.quiesce().unwrap().unwrap();
    assert_eq!((guest_rx.next_avail, guest_rx.next_used), (0, 0));
    assert_eq!((guest_tx.next_avail, guest_tx.next_used), (1, 1));
    bench.wire.send(&[7; 60]).unwrap();
    assert_eq!(
        bench
            .worker
            .execute(|edge, _| edge.stats().nic_rx_frames.get())
            .unwrap(),
        0
    );
    bench.worker.restore(Some([guest_rx, guest_tx])).unwrap();
    bench.worker.resume().unwrap();
    assert_eq!(bench.receive(), 72);
}

#[test]
fn roles_can_be_exchanged_and_reached() {
    #[derive(Default)]
    struct Sink {
        dropped: u64,
    }
    impl Role for Sink {
        fn name(&self) -> &'static str {
            "sink"
        }
        fn step(&mut self, edge: &mut Edge, _now_us: u64) -> bool {
            let Some(token) = edge.guest_take() else {
                return false;
            };
            edge.release(token);
            self.dropped += 1;
            true
        }
        fn deadline_us(&self) -> Option<u64> {
            Some(now_us() + 100)
        }
    }
    let mut bench = bench(PollMode::Adaptive);
    bench.worker.set_role(Box::new(Sink::default())).unwrap();
    bench
        .worker
        .execute(|_, role| assert_eq!(role.name(), "sink"))
        .unwrap();
    bench.send([0; 12], &[1; 60]);
    let dropped = |role: &mut dyn Role| {
        let role: &mut dyn std::any::Any = role;
        role.downcast_mut::<Sink>().unwrap().dropped
    };
    assert_eq!(
        bench.worker.execute(move |_, role| dropped(role)).unwrap(),
        1
    );
}

/// Leaves the guest alone.
struct Still;

impl Role for Still {
    fn name(&self) -> &'static str {
        "still"
    }
    fn step(&mut self, _edge: &mut Edge, _now_us: u64) -> bool {
        false
    }
    fn serves_guest(&self) -> bool {
        false
    }
}

#[test]
fn rule_11_the_memory_of_a_guest_that_is_not_served_stands_still() {
    for event_idx in [true, false] {
        let mut bench = bench_of(PollMode::Interrupt, event_idx);
        bench.worker.set_role(Box::new(Still)).unwrap();
        bench.worker.deactivate().unwrap();
        // Whatever is asked for, and how, it says something else.
        let queues = [bench.guest_rx.queue_state(), bench.guest_tx.queue_state()];
        for queue in &queues {
            let avail_event = queue.used + 4 + 8 * u64::from(queue.size);
            bench.ram.write(queue.used, &[0x10, 0]).unwrap();
            bench.ram.write(avail_event, &[77, 0]).unwrap();
        }
        let rings = |bench: &Bench| {
            let mut bytes = vec![0; 0x8000];
            bench.ram.read(0x4000, &mut bytes).unwrap();
            bytes
        };
        let before = rings(&bench);
        // It has no room, which a guest that is served is asked for.
        bench.worker.activate(queues).unwrap();
        for _ in 0..2 {
            let sleeps = bench.worker.stats().sleeps;
            bench.worker.execute(|_, _| ()).unwrap();
            bench.wait_for(|s| s.sleeps > sleeps);
        }
        bench.worker.execute(|_, _| ()).unwrap();
        assert!(rings(&bench) == before, "event_idx: {event_idx}");
        // It is asked again as soon as it is served.
        bench.worker.set_role(Box::new(Solo::default())).unwrap();
        bench.wire.send(&[7; 60]).unwrap();
        while rings(&bench) == before {
            std::thread::yield_now();
        }
        bench.offer_room(&[(0x30000, 2000)]);
        assert_eq!(bench.receive(), 72);
    }
}

#[test]
fn a_stopped_worker_says_so() {
    let bench = bench(PollMode::Interrupt);
    bench.worker.stop();
    assert!(bench.worker.quiesce().is_err());
    assert!(bench.worker.resume().is_err());
}

#[test]
fn a_worker_stays_on_the_cpu_that_it_is_given() {
    let cpus = core_affinity::get_core_ids().unwrap();
    let cpu = cpus.last().unwrap().id;
    let config = WorkerConfig {
        name: "pinned".into(),
        poll: PollMode::Interrupt,
        cpu: Some(cpu),
        frame_slots: 32,
        tx: Default::default(),
        stages: false,
    };
    let worker = spawn_unattached(config, Box::new(crate::nic::Sink::new(1500))).unwrap();
    let allowed = worker.execute(|_, _| {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("Cpus_allowed_list"));
        line.map(|l| l.split_whitespace().nth(1).unwrap().to_owned())
    });
    worker.stop();
    assert_eq!(allowed.unwrap(), Some(cpu.to_string()));
}
