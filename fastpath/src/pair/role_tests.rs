//! The two roles of a pair, each alone between a mock driver, a socket for a wire and a peer that is this test.
//!
//! The workers are halted: the test makes each step, at a time that it names.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use colo_compare::testing::{GUEST_MAC, Side, udp};
use colo_compare::{Limits, Policy, PrimaryPath};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::clock::now_us;
use crate::link::{PacketLink, PacketMsg};
use crate::mailbox::{Mailbox, Post};
use crate::nic::SocketNic;
use crate::ring::driver_mock::DriverMock;
use crate::ring::{Call, GuestRam, Pages, Segment};
use crate::worker::{
    Command, Edge, PollMode, PortWiring, Role, Solo, WorkerConfig, WorkerHandle, spawn,
};

const ENTRIES: u16 = 128;
const RECEIVED: u64 = 0x2_0000;
const SENT: u64 = 0x8_0000;
const BUFFER_BYTES: u64 = 2048;
const NET_HEADER: usize = 12;
const DELAY_US: u64 = 200;
const MANY: u64 = 32;
const SLOTS: u32 = 2048;

struct Host {
    worker: WorkerHandle,
    wire: UnixDatagram,
    ram: Arc<GuestRam>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
    outputs: u64,
    peer: PacketLink,
    events: Mailbox<PairEvent>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

fn limits() -> Limits {
    Limits {
        compare_deadline_us: u64::MAX / 4,
        ack_deadline_us: u64::MAX / 4,
        max_flows: 64,
        ..Limits::default()
    }
}

fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a, listener.accept().unwrap().0)
}

impl Host {
    fn new(role: impl FnOnce(PacketLink, Post<PairEvent>) -> Box<dyn Role>) -> Self {
        let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
        let mut guest_rx = DriverMock::new(ram.clone(), 0x4000, ENTRIES, true);
        let guest_tx = DriverMock::new(ram.clone(), 0x8000, ENTRIES, true);
        for n in 0..2 * MANY {
            let (gpa, len) = (RECEIVED + n * BUFFER_BYTES, BUFFER_BYTES as u32);
            guest_rx
                .offer(&[], &[Segment { gpa, len }])
                .unwrap()
                .unwrap();
        }
        let (nic, wire) = SocketNic::pair(1500).unwrap();
        wire.set_nonblocking(true).unwrap();
        let wiring = PortWiring {
            ram: ram.clone(),
            call: Arc::new(Call::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let config = WorkerConfig {
            name: "role".into(),
            poll: PollMode::Interrupt,
            cpu: None,
            frame_slots: SLOTS,
            tx: Default::default(),
            stages: false,
        };
        let worker = spawn(config, Box::new(nic), wiring).unwrap();
        let (halted, is_halted) = channel();
        worker.send(Command::Halt(halted)).unwrap();
        is_halted.recv().unwrap();
        worker
            .activate([guest_rx.queue_state(), guest_tx.queue_state()])
            .unwrap();
        let (ours, theirs) = connected();
        let (post, events) = Mailbox::new().unwrap();
        let role = role(PacketLink::new(ours).unwrap(), post);
        worker.set_role(role).unwrap();
        Self {
            worker,
            wire,
            ram,
            guest_rx,
            guest_tx,
            outputs: 0,
            peer: PacketLink::new(theirs).unwrap(),
            events,
        }
    }

    fn step(&self, now_us: u64) -> bool {
        let step = move |edge: &mut Edge, role: &mut dyn Role| role.step(edge, now_us);
        self.worker.execute(step).unwrap()
    }

    fn step_until(&mut self, now_us: u64, done: impl Fn(&mut Self) -> bool) {
        while !done(self) {
            self.step(now_us);
        }
    }

    /// The same while a millisecond passes with each step, at most ten seconds.
    fn step_until_later(&mut self, now_us: &mut u64, done: impl Fn(&mut Self) -> bool) {
        let until_us = *now_us + 10_000_000;
        while !done(self) {
            assert!(*now_us < until_us, "ten seconds have passed");
            *now_us += 1_000;
            self.step(*now_us);
        }
    }

    fn deadline_us(&self) -> Option<u64> {
        self.worker.execute(|_, role| role.deadline_us()).unwrap()
    }

    /// The guest sends a frame.
    fn send(&mut self, frame: &[u8]) {
        let gpa = SENT + self.outputs % u64::from(ENTRIES) * BUFFER_BYTES;
        self.outputs += 1;
        self.ram.write(gpa, &[0; NET_HEADER]).unwrap();
        self.ram.write(gpa + NET_HEADER as u64, frame).unwrap();
        let len = (NET_HEADER + frame.len()) as u32;
        let buffer = Segment { gpa, len };
        self.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
    }

    fn has_received(&mut self) -> bool {
        self.guest_rx.take_used().unwrap().is_some()
    }

    /// The peer says something.
    fn hear(&mut self, msg: &PacketMsg<'_>) {
        self.peer.push(msg);
        self.peer.flush().unwrap();
    }

    /// The next `count` messages that the peer hears, in short.
    fn said(&mut self, count: usize) -> Vec<String> {
        let mut said = Vec::new();
        while said.len() < count {
            self.peer.fill().unwrap();
            while let Some(msg) = self.peer.next_msg().unwrap() {
                said.push(match msg {
                    PacketMsg::Input { seq, .. } => format!("input {seq}"),
                    PacketMsg::Output { seq, .. } => format!("output {seq}"),
                    PacketMsg::InputAck { up_to } => format!("ack {up_to}"),
                    PacketMsg::Released { seqs } => format!("{} released", seqs.len() / 8),
                    other => format!("{other:?}"),
                });
            }
        }
        said
    }
}

fn input(n: u64) -> Vec<u8> {
    udp(Side::V4, true, 53, 40_000, &n.to_be_bytes())
}

fn output(n: u64) -> Vec<u8> {
    udp(Side::V4, false, 53, 40_000, &n.to_be_bytes())
}

// ---- the secondary ----

/// In epoch 2, with an SVM that runs.
fn secondary() -> Host {
    let mut host = Host::new(|link, post| {
        let (limits, mac) = (limits(), GUEST_MAC);
        Box::new(SecondaryRole::new(
            &SecondaryRoleConfig { limits, mac },
            link,
            post,
        ))
    });
    let mut translations = Vec::new();
    PrimaryPath::new(limits()).export_client_xlate(&mut translations);
    SecondaryRole::on_worker(&host.worker, move |role, edge| {
        role.commit(edge, 1, &[], &translations, false).unwrap();
        role.start();
    })
    .unwrap();
    host.step(now_us());
    assert_eq!(host.said(1), ["CaughtUp { epoch: 2 }"]);
    host
}

impl Host {
    fn mirror(&mut self, seqs: std::ops::RangeInclusive<u64>) {
        for seq in seqs {
            let (epoch, frame) = (2, &input(seq)[..]);
            self.peer.push(&PacketMsg::Input { epoch, seq, frame });
        }
        self.peer.flush().unwrap();
    }

    fn secondary_sent_bytes(&self) -> u64 {
        SecondaryRole::on_worker(&self.worker, |role, _| role.report().link.sent_bytes).unwrap()
    }

    fn mirrored(&self) -> u64 {
        SecondaryRole::on_worker(&self.worker, |role, _| role.report().stats.mirrored).unwrap()
    }
}

#[test]
fn rule_5_input_is_acknowledged_with_the_output_that_it_causes() {
    let mut host = secondary();
    let (now_us, before) = (now_us(), host.secondary_sent_bytes());
    host.mirror(1..=1);
    host.step_until(now_us, Host::has_received);
    assert_eq!(
        host.secondary_sent_bytes(),
        before,
        "it waits for the output"
    );
    assert_eq!(host.deadline_us(), Some(now_us + DELAY_US));
    host.send(&output(1));
    assert!(host.step(now_us));
    // One step sends once.
    assert_eq!(host.said(2), ["ack 1", "output 1"]);
    assert_eq!(host.deadline_us(), None, "nothing is owed");
}

#[test]
fn rule_5_input_without_output_is_acknowledged_after_a_while() {
    let mut host = secondary();
    let (now_us, before) = (now_us(), host.secondary_sent_bytes());
    host.mirror(1..=1);
    host.step_until(now_us, Host::has_received);
    // More of it does not make it later.
    host.mirror(2..=2);
    host.step_until(now_us + DELAY_US - 1, Host::has_received);
    assert_eq!(host.secondary_sent_bytes(), before);
    host.step(now_us + DELAY_US);
    assert_eq!(host.said(1), ["ack 2"]);
}

#[test]
fn rule_5_much_input_is_acknowledged_at_once() {
    let mut host = secondary();
    let (now_us, before) = (now_us(), host.secondary_sent_bytes());
    host.mirror(1..=MANY - 1);
    host.step_until(now_us, |host| host.mirrored() == MANY - 1);
    assert_eq!(host.secondary_sent_bytes(), before);
    host.mirror(MANY..=MANY);
    host.step_until(now_us, |host| host.mirrored() == MANY);
    assert_eq!(host.said(1), [format!("ack {MANY}")]);
}

#[test]
fn rule_11_the_memory_of_a_stopped_guest_is_written_to_before_the_stop_is_told() {
    let mut host = secondary();
    host.send(&output(1));
    let (ram, used) = (host.ram.clone(), host.guest_tx.queue_state().used);
    let told = SecondaryRole::on_worker(&host.worker, move |role, edge| {
        role.stop(edge);
        let mut index = [0; 2];
        ram.read(used + 2, &mut index).unwrap();
        u16::from_le_bytes(index)
    });
    assert_eq!(told, Some(1), "the used index");
}

impl Host {
    fn stored(&self) -> u64 {
        SecondaryRole::on_worker(&self.worker, |role, _| role.report().stats.sent).unwrap()
    }

    fn free_slots(&self) -> usize {
        self.worker
            .execute(|edge, _| edge.frames.free_slots())
            .unwrap()
    }

    /// The SVM sends until the worker takes no more. Gives how many frames it took.
    fn fill_pool(&mut self, now_us: u64) -> u64 {
        let mut sent = 0;
        loop {
            let before = self.stored();
            for _ in 0..MANY {
                sent += 1;
                self.send(&output(sent));
            }
            while self.step(now_us) {}
            while self.guest_tx.take_used().unwrap().is_some() {}
            // The peer's socket is not what is to be full.
            self.peer.fill().unwrap();
            while self.peer.next_msg().unwrap().is_some() {}
            if self.stored() - before < MANY {
                return self.stored();
            }
        }
    }
}

#[test]
fn rule_13_pending_output_finds_room_whatever_the_old_epoch_has_stored() {
    let mut host = secondary();
    let stored = host.fill_pool(now_us());
    let free = host.free_slots();
    assert!(free <= RESERVED_SLOTS, "{free}");
    let pending: Vec<_> = (0..=free as u64).map(output).collect();
    let mut translations = Vec::new();
    PrimaryPath::new(limits()).export_client_xlate(&mut translations);
    SecondaryRole::on_worker(&host.worker, move |role, edge| {
        role.stop(edge);
        role.check(edge, &pending, &translations).unwrap();
        let shown = role.commit(edge, 2, &pending, &translations, true);
        let shown = shown.unwrap().unwrap();
        assert_eq!(shown.pending, pending);
        assert_eq!(shown.translations, translations);
    })
    .unwrap();
    assert_eq!(host.free_slots() as u64, stored - 1);
}

#[test]
fn rule_13_more_pending_output_than_is_kept_here_is_refused_before_the_commit() {
    let host = secondary();
    let refused = |pending: Vec<Vec<u8>>| {
        let check = move |role: &mut SecondaryRole, edge: &mut Edge| {
            let mut translations = Vec::new();
            PrimaryPath::new(limits()).export_client_xlate(&mut translations);
            role.check(edge, &pending, &translations)
        };
        SecondaryRole::on_worker(&host.worker, check).unwrap()
    };
    let most = limits().max_held_frames;
    assert_eq!(refused(vec![output(1); most]), Ok(()));
    let many = refused(vec![output(1); most + 1]).unwrap_err();
    assert!(many.contains("host.frame_slots"), "{many}");
    let max = |_: &mut SecondaryRole, edge: &mut Edge| edge.frames.frame_bytes_max();
    let max = SecondaryRole::on_worker(&host.worker, max).unwrap();
    assert_eq!(refused(vec![vec![0; max]]), Ok(()));
    let long = refused(vec![vec![0; max + 1]]).unwrap_err();
    assert!(long.contains("net.mtu"), "{long}");
}

#[test]
fn rule_9_reports_are_read_though_the_pool_is_full() {
    let mut host = secondary();
    let now_us = now_us();
    let stored = host.fill_pool(now_us);
    assert!(host.free_slots() <= RESERVED_SLOTS);
    let seqs: Vec<u8> = (1..=stored).flat_map(u64::to_le_bytes).collect();
    host.hear(&PacketMsg::Released { seqs: &seqs });
    host.step_until(now_us, |host| host.free_slots() as u64 > stored);
}

#[test]
fn rule_5_all_that_a_dead_primary_has_said_is_heard_before_the_takeover() {
    // More than one look at the link takes.
    const COUNT: u64 = 600;
    let mut host = secondary();
    host.send(&output(1));
    host.step(now_us());
    assert_eq!(host.said(1), ["output 1"]);
    let free = host.free_slots() as u64;
    host.mirror(1..=COUNT);
    host.hear(&PacketMsg::Released {
        seqs: &1u64.to_le_bytes(),
    });
    assert!(!host.peer.has_unsent());
    host.peer.shutdown(Shutdown::Both).unwrap();
    let mirrored = SecondaryRole::on_worker(&host.worker, |role, edge| {
        role.hear_rest(edge);
        role.report().stats.mirrored
    });
    assert_eq!(mirrored, Some(COUNT));
    assert_eq!(
        host.free_slots() as u64,
        free + 1 - COUNT,
        "the report, too"
    );
    let event = host.events.try_next();
    assert!(
        matches!(event, Some(PairEvent::LinkDown { .. })),
        "{event:?}"
    );
    assert!(host.events.try_next().is_none());
    // Then there is nothing to be heard.
    let hear = |role: &mut SecondaryRole, edge: &mut Edge| role.hear_rest(edge);
    SecondaryRole::on_worker(&host.worker, hear).unwrap();
    assert!(host.events.try_next().is_none());
}

/// One shard hears it by taking over, not before.
#[test]
fn rule_5_what_a_dead_primary_has_said_last_is_the_guests_after_the_takeover() {
    const COUNT: u64 = 3;
    let mut host = secondary();
    host.mirror(1..=COUNT);
    assert!(!host.peer.has_unsent());
    host.peer.shutdown(Shutdown::Both).unwrap();
    let (post, _events) = Mailbox::new().unwrap();
    let config = primary_config(&Lease::default());
    let role = SecondaryRole::on_worker(&host.worker, move |role, edge| {
        role.take_over(edge, &config, post)
    });
    host.worker.set_role(role.flatten().unwrap()).unwrap();
    let now_us = now_us();
    while host.step(now_us) {}
    // The guest is shown them behind a step, before the next one.
    host.step(now_us);
    let received = std::iter::from_fn(|| host.has_received().then_some(()));
    assert_eq!(received.count() as u64, COUNT);
}

// ---- the primary ----

fn primary_config(lease: &Lease) -> PrimaryRoleConfig {
    PrimaryRoleConfig {
        limits: limits(),
        policy: Policy::default(),
        gap_limit_us: u64::MAX / 8,
        frame_slots: SLOTS,
        gaps: Default::default(),
        lease: lease.clone(),
        answers: Default::default(),
        digest_key: None,
    }
}

#[test]
fn rule_5_a_guest_without_room_for_what_a_takeover_owes_it_keeps_no_worker_awake() {
    // More than the guest has buffers for.
    const COUNT: u64 = 2 * MANY + 10;
    let mut host = secondary();
    let now_us = now_us();
    host.mirror(1..=COUNT);
    host.step_until(now_us, |host| host.mirrored() == COUNT);
    let (post, _events) = Mailbox::new().unwrap();
    let config = primary_config(&Lease::default());
    let role = SecondaryRole::on_worker(&host.worker, move |role, edge| {
        role.take_over(edge, &config, post)
    });
    host.worker.set_role(role.flatten().unwrap()).unwrap();
    while host.step(now_us) {}
    // Not before the takeover is announced again.
    assert!(host.deadline_us().is_some_and(|at| at > now_us));
    let mut received = 0;
    while host.has_received() {
        received += 1;
    }
    assert_eq!(received, 2 * MANY);
    for n in 0..10 {
        let (gpa, len) = (RECEIVED + n * BUFFER_BYTES, BUFFER_BYTES as u32);
        let offered = host.guest_rx.offer(&[], &[Segment { gpa, len }]);
        offered.unwrap().unwrap();
    }
    for _ in 0..10 {
        host.step_until(now_us, Host::has_received);
    }
}

/// In epoch 2 of a pair, without a lease.
fn primary() -> (Host, Lease) {
    let lease = Lease::default();
    let config = primary_config(&lease);
    let mut link = None;
    let mut host = Host::new(|to_peer, post| {
        link = Some(to_peer);
        Box::new(PrimaryRole::new(&config, GUEST_MAC, post))
    });
    let link = link.unwrap();
    PrimaryRole::on_worker(&host.worker, move |role, edge| {
        role.attach(edge, link);
        let cut = role.cut(edge, true).unwrap();
        role.commit(edge, cut.epoch);
        assert_eq!(role.epoch(), 2);
    })
    .unwrap();
    assert_eq!(host.said(1), ["PendingReleased { epoch: 1 }"]);
    (host, lease)
}

#[test]
fn rule_17_a_commit_tells_how_long_what_it_releases_was_held() {
    const HELD_US: u64 = 5_000;
    let (mut host, _lease) = primary();
    host.send(&output(1));
    host.step(now_us() - HELD_US);
    let commit = |host: &Host| {
        PrimaryRole::on_worker(&host.worker, |role, edge| {
            let cut = role.cut(edge, false).unwrap();
            (cut.pending.len(), role.commit(edge, cut.epoch))
        })
        .unwrap()
    };
    let (pending, held_us) = commit(&host);
    assert_eq!(pending, 1);
    assert!(held_us >= HELD_US, "{held_us}");
    // Nothing left by this one.
    assert_eq!(commit(&host), (0, 0));
}

impl Host {
    /// Both guests send the same, and it leaves at that time.
    fn release(&mut self, now_us: u64, seq: u64) {
        let frame = output(seq);
        self.send(&frame);
        let epoch = 2;
        self.hear(&PacketMsg::Output {
            epoch,
            seq,
            frame: &frame,
        });
        self.step_until(now_us, |host| {
            let mut bytes = [0; 2048];
            match host.wire.recv(&mut bytes) {
                Ok(len) => bytes[..len] == frame,
                Err(e) => {
                    assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                    false
                }
            }
        });
    }

    fn primary_sent_bytes(&self) -> u64 {
        PrimaryRole::on_worker(&self.worker, |role, _| role.report().link.sent_bytes).unwrap()
    }
}

#[test]
fn rule_9_what_was_released_is_reported_with_the_next_input() {
    let (mut host, _) = primary();
    let (now_us, before) = (now_us(), host.primary_sent_bytes());
    host.release(now_us, 1);
    assert_eq!(host.primary_sent_bytes(), before, "it waits for input");
    assert_eq!(host.deadline_us(), Some(now_us + DELAY_US));
    host.wire.send(&input(1)).unwrap();
    assert!(host.step(now_us));
    // One step sends once.
    assert_eq!(host.said(2), ["input 1", "1 released"]);
    assert_eq!(host.deadline_us(), None, "nothing is owed");
}

#[test]
fn rule_9_without_input_it_is_reported_after_a_while() {
    let (mut host, _) = primary();
    let (now_us, before) = (now_us(), host.primary_sent_bytes());
    host.release(now_us, 1);
    host.release(now_us + DELAY_US - 1, 2);
    assert_eq!(host.primary_sent_bytes(), before);
    host.step(now_us + DELAY_US);
    assert_eq!(host.said(1), ["2 released"]);
}

#[test]
fn rule_9_many_are_reported_at_once() {
    let (mut host, _) = primary();
    let (now_us, before) = (now_us(), host.primary_sent_bytes());
    for seq in 1..MANY {
        host.release(now_us, seq);
    }
    assert_eq!(host.primary_sent_bytes(), before);
    host.release(now_us, MANY);
    assert_eq!(host.said(1), [format!("{MANY} released")]);
}

#[test]
fn rule_9_what_has_left_is_reported_while_more_waits_for_the_nic() {
    let (mut host, _) = primary();
    let now_us = now_us();
    let frame = |seq: u64| {
        let mut payload = vec![0; 1400];
        payload[..8].copy_from_slice(&seq.to_be_bytes());
        udp(Side::V4, false, 53, 40_000, &payload)
    };
    // More than the wire takes while nobody reads it.
    let count = u64::from(ENTRIES) - 1;
    for seq in 1..=count {
        let frame = &frame(seq)[..];
        host.send(frame);
        let epoch = 2;
        host.hear(&PacketMsg::Output { epoch, seq, frame });
    }
    host.step_until(now_us, |host| host.compared() == count);
    host.step(now_us + DELAY_US);
    let first = host.released_reports(|reports| reports > 0);
    assert!(first < count, "the wire took all of it");
    let mut bytes = [0; 2048];
    for seq in 1..=count {
        while host.wire.recv(&mut bytes).is_err() {
            host.step(now_us);
        }
        assert_eq!(bytes[42..50], seq.to_be_bytes());
    }
    host.step(now_us + DELAY_US);
    let rest = host.released_reports(|reports| first + reports == count);
    assert_eq!(first + rest, count);
}

impl Host {
    fn compared(&self) -> u64 {
        let compared = |role: &mut PrimaryRole, _: &mut Edge| role.report().stats.released_by_match;
        PrimaryRole::on_worker(&self.worker, compared).unwrap()
    }

    /// How many frames the peer hears to have left, until that is enough.
    fn released_reports(&mut self, enough: impl Fn(u64) -> bool) -> u64 {
        let mut reports = 0;
        while !enough(reports) {
            for said in self.said(1) {
                let number = said.strip_suffix(" released").unwrap();
                reports += number.parse::<u64>().unwrap();
            }
        }
        reports
    }

    fn heeded_us(&self) -> u64 {
        PrimaryRole::on_worker(&self.worker, |role, _| role.lease_until_us()).unwrap()
    }

    /// Keeps the worker from doing anything until the sender is used or gone.
    fn block(&self, done: &Arc<AtomicBool>) -> std::sync::mpsc::Sender<()> {
        let (go_on, blocked) = channel::<()>();
        let done = done.clone();
        let task = move |_: &mut Edge, _: &mut dyn Role| {
            let _ = blocked.recv();
            done.store(true, Ordering::SeqCst);
        };
        drop(self.worker.begin(task).unwrap());
        go_on
    }
}

#[test]
fn rule_18_a_longer_lease_is_not_waited_for_and_wakes_nobody_who_has_one() {
    let (host, lease) = primary();
    let workers = [host.worker.clone()];
    let until_us = now_us() + 3_600_000_000;
    let done = Arc::new(AtomicBool::new(false));
    let go_on = host.block(&done);
    PrimaryRole::extend_lease(&workers, &lease, until_us).unwrap();
    assert!(
        !done.load(Ordering::SeqCst),
        "the worker was not waited for"
    );
    go_on.send(()).unwrap();
    // Who had none is told: it may hold something.
    assert_eq!(host.heeded_us(), until_us);

    let commands = host.worker.stats().commands;
    PrimaryRole::extend_lease(&workers, &lease, until_us + 1).unwrap();
    assert_eq!(host.heeded_us(), until_us, "one command: this question");
    assert_eq!(host.worker.stats().commands, commands + 1);
    // The next batch is judged by what was said last.
    host.step(now_us());
    assert_eq!(host.heeded_us(), until_us + 1);
}

#[test]
fn rule_18_the_end_of_a_lease_is_waited_for() {
    let (host, lease) = primary();
    let workers = [host.worker.clone()];
    PrimaryRole::extend_lease(&workers, &lease, u64::MAX).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let go_on = host.block(&done);
    std::thread::scope(|scope| {
        let ending = scope.spawn(|| {
            PrimaryRole::end_lease(&workers, &lease).unwrap();
            done.load(Ordering::SeqCst)
        });
        while lease.until_us() != 0 {
            std::thread::yield_now();
        }
        go_on.send(()).unwrap();
        assert!(ending.join().unwrap(), "the worker may still be releasing");
    });
    assert_eq!(host.heeded_us(), 0);
}

#[test]
fn rule_10_while_a_divergence_is_pending_nothing_undecided_lies_in_the_guest() {
    let (mut host, _) = primary();
    let now_us = now_us();
    let frame = |port: u16, byte: u8| udp(Side::V4, false, port, 40_000, &[byte; 1000]);
    let completed = |host: &mut Host| {
        // The worker gives buffers back behind a step, before the next one.
        host.step(now_us);
        let mut completed = 0;
        while host.guest_tx.take_used().unwrap().is_some() {
            completed += 1;
        }
        completed
    };
    let undecided_bytes = |host: &Host| host.worker.stats().copied_undecided_bytes;
    host.hear(&PacketMsg::CaughtUp { epoch: 2 });
    host.send(&frame(53, 1));
    host.send(&frame(54, 1));
    while host.step(now_us) {}
    assert_eq!((completed(&mut host), undecided_bytes(&host)), (0, 0));
    host.hear(&PacketMsg::Output {
        epoch: 2,
        seq: 1,
        frame: &frame(54, 2),
    });
    // Longer than it may be a matter of order.
    let mut later_us = now_us;
    host.step_until_later(&mut later_us, |host| undecided_bytes(host) > 0);
    assert_eq!(completed(&mut host), 2);
    // What comes now is copied as it comes.
    host.send(&frame(55, 1));
    while host.step(later_us) {}
    assert_eq!(completed(&mut host), 1);
}

#[test]
fn rule_4_what_the_guest_has_no_buffer_for_is_not_mirrored() {
    const SMALL_BYTES: u32 = 100;
    let (mut host, _) = primary();
    // The guest's first buffer is a small one, which nobody has looked at yet.
    let small = Segment {
        gpa: RECEIVED,
        len: SMALL_BYTES,
    };
    let writable = 2;
    host.guest_rx
        .write_descriptor(0, small, writable, 0)
        .unwrap();
    let now_us = now_us();
    let long = udp(Side::V4, true, 53, 40_000, &[1; 200 - 42]);
    assert_eq!(long.len(), 200);
    host.wire.send(&long).unwrap();
    host.step_until(now_us, |host| host.worker.stats().guest_rx_too_small > 0);
    while host.step(now_us) {}
    assert!(!host.has_received());
    // What fits is the first input that the peer hears of.
    host.wire.send(&input(7)).unwrap();
    host.step_until(now_us, Host::has_received);
    while host.step(now_us) {}
    assert_eq!(host.heard_inputs(1), [(1, input(7))]);
    assert_eq!(host.worker.stats().guest_rx_too_small, 1);
}

#[test]
fn rule_4_a_joining_secondary_hears_no_input_from_before_its_first_cut() {
    let (mut host, _) = primary();
    let now_us = now_us();
    // The one before is lost, and this host may not speak alone.
    let (ours, theirs) = connected();
    host.peer = PacketLink::new(theirs).unwrap();
    let link = PacketLink::new(ours).unwrap();
    PrimaryRole::on_worker(&host.worker, move |role, edge| role.attach(edge, link)).unwrap();
    host.wire.send(&input(1)).unwrap();
    host.step_until(now_us, Host::has_received);
    while host.step(now_us) {}
    let cut = |role: &mut PrimaryRole, edge: &mut Edge| role.cut(edge, true).is_some();
    assert_eq!(PrimaryRole::on_worker(&host.worker, cut), Some(true));
    host.wire.send(&input(2)).unwrap();
    host.step_until(now_us, Host::has_received);
    while host.step(now_us) {}
    assert_eq!(host.heard_inputs(1), [(1, input(2))]);
}

impl Host {
    /// The next `count` messages that the peer hears, which are input.
    fn heard_inputs(&mut self, count: usize) -> Vec<(u64, Vec<u8>)> {
        let mut heard = Vec::new();
        while heard.len() < count {
            self.peer.fill().unwrap();
            while let Some(msg) = self.peer.next_msg().unwrap() {
                match msg {
                    PacketMsg::Input { seq, frame, .. } => heard.push((seq, frame.to_vec())),
                    other => panic!("{other:?}"),
                }
            }
        }
        heard
    }
}

/// A host that keeps its worker for another session has all of its slots then.
#[test]
fn a_role_that_leaves_gives_back_all_that_it_holds() {
    let leaves = |host: &Host| {
        assert!(host.free_slots() < SLOTS as usize - 10);
        host.worker.set_role(Box::new(Solo::default())).unwrap();
        assert_eq!(host.free_slots(), SLOTS as usize);
    };
    let now_us = now_us();
    let mut host = secondary();
    host.mirror(1..=20);
    (1..=20).for_each(|n| host.send(&output(n)));
    host.step_until(now_us, |host| host.mirrored() == 20 && host.stored() == 20);
    leaves(&host);
    // It has no lease, so nothing leaves.
    let (mut host, _lease) = primary();
    (1..=20).for_each(|n| host.send(&output(n)));
    while host.step(now_us) {}
    leaves(&host);
}
