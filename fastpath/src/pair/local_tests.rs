//! Two mock drivers and a socket for a wire.

use std::os::unix::net::UnixDatagram;
use std::sync::Barrier;
use std::time::Duration;

use colo_compare::testing::{Segment as Tcp, Side, udp};

use super::*;
use crate::frame::TxMode;
use crate::nic::SocketNic;
use crate::ring::driver_mock::DriverMock;
use crate::ring::{GuestRam, Pages, Segment};
use crate::worker::{PollMode, WorkerConfig, spawn_unattached};

const BUFFERS: u64 = 0x20000;
const BUFFER_BYTES: u64 = 2048;
/// Of each queue, and buffers of each guest.
const ENTRIES: u16 = 16;

/// A guest that only sends.
struct Sender {
    ram: Arc<GuestRam>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
    sent: u64,
}

impl Sender {
    fn new() -> Self {
        let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
        Self {
            guest_rx: DriverMock::new(ram.clone(), 0x4000, ENTRIES, true),
            guest_tx: DriverMock::new(ram.clone(), 0x8000, ENTRIES, true),
            ram,
            sent: 0,
        }
    }

    fn rings(&self) -> GuestRings {
        GuestRings {
            ram: self.ram.clone(),
            queues: [self.guest_rx.queue_state(), self.guest_tx.queue_state()],
            kicks: [None, None],
            calls: [None, None],
            errors: [None, None],
        }
    }

    fn send(&mut self, frame: &[u8]) {
        let gpa = BUFFERS + self.sent % u64::from(ENTRIES) * BUFFER_BYTES;
        self.ram.write(gpa, &[0; 12]).unwrap();
        self.ram.write(gpa + 12, frame).unwrap();
        let len = 12 + frame.len() as u32;
        self.guest_tx
            .offer(&[Segment { gpa, len }], &[])
            .unwrap()
            .unwrap();
        self.sent += 1;
    }

    fn wait_used(&mut self) {
        while self.guest_tx.take_used().unwrap().is_none() {
            std::thread::yield_now();
        }
    }
}

struct Bench {
    worker: WorkerHandle,
    wire: UnixDatagram,
    pvm: Sender,
    svm: Sender,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

impl Bench {
    fn report(&self) -> LocalReport {
        LocalPairRole::report(&self.worker).unwrap()
    }

    /// Both guests send while the worker stands still, so that it finds all at once.
    fn send_at_once(&mut self, pvm: &[Vec<u8>], svm: &[Vec<u8>]) {
        let gates = Arc::new([Barrier::new(2), Barrier::new(2)]);
        let (worker, inside) = (self.worker.clone(), gates.clone());
        let still = std::thread::spawn(move || {
            worker.execute(move |_, _| {
                inside[0].wait();
                inside[1].wait();
            })
        });
        gates[0].wait();
        pvm.iter().for_each(|frame| self.pvm.send(frame));
        svm.iter().for_each(|frame| self.svm.send(frame));
        gates[1].wait();
        still.join().unwrap().unwrap();
    }

    fn expect(&self, frames: &[Vec<u8>]) {
        let mut out = [0; 2048];
        for (n, frame) in frames.iter().enumerate() {
            let got = self.wire.recv(&mut out).unwrap();
            assert!(out[..got] == frame[..], "frame {n}");
        }
    }

    fn wait_used(&mut self, frames: usize) {
        for _ in 0..frames {
            self.pvm.wait_used();
            self.svm.wait_used();
        }
    }

    /// A pair of its own: the comparator knows the flow afterwards.
    fn send_first(&mut self, frame: Vec<u8>) {
        let first = [frame];
        self.send_at_once(&first, &first);
        self.expect(&first);
        self.wait_used(1);
    }
}

fn bench() -> Bench {
    bench_with(TxMode::Twin)
}

fn bench_with(tx: TxMode) -> Bench {
    let (nic, wire) = SocketNic::pair(1500).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let config = WorkerConfig {
        name: "local".into(),
        poll: PollMode::Busy,
        cpu: None,
        frame_slots: 1024,
        tx,
        stages: false,
    };
    let worker = spawn_unattached(config, Box::new(nic)).unwrap();
    let limits = Limits {
        compare_deadline_us: u64::MAX / 4,
        ..Limits::default()
    };
    LocalPairRole::new(limits).start(&worker).unwrap();
    let (pvm, svm) = (Sender::new(), Sender::new());
    worker.clone().attach(pvm.rings()).unwrap();
    SvmSide(worker.clone()).attach(svm.rings()).unwrap();
    Bench {
        worker,
        wire,
        pvm,
        svm,
    }
}

fn datagram(payload: &[u8]) -> Vec<u8> {
    udp(Side::V4, false, 53, 40_000, payload)
}

#[test]
fn what_both_guests_send_leaves_and_what_one_sends_waits() {
    let mut bench = bench();
    let mut out = [0; 2048];
    for len in [10, 600, 1400] {
        let frame = datagram(&vec![7; len]);
        bench.pvm.send(&frame);
        if len == 10 {
            bench.pvm.wait_used();
        }
        bench.svm.send(&frame);
        let got = bench.wire.recv(&mut out).unwrap();
        assert_eq!(out[..got], frame);
        if len != 10 {
            // What stayed in place is the guest's again when it has left.
            bench.pvm.wait_used();
        }
        bench.svm.wait_used();
    }
    let report = LocalPairRole::report(&bench.worker).unwrap();
    assert_eq!((report.matched, report.checkpoints), (3, 0));

    bench.pvm.send(&datagram(b"alone"));
    bench.pvm.wait_used();
    bench.wire.set_nonblocking(true).unwrap();
    while LocalPairRole::report(&bench.worker).unwrap().pvm_frames < 4 {
        std::thread::yield_now();
    }
    assert!(bench.wire.recv(&mut out).is_err());
}

#[test]
fn what_differs_leaves_by_a_checkpoint() {
    let mut bench = bench();
    let mut out = [0; 2048];
    bench.pvm.send(&datagram(b"one"));
    bench.svm.send(&datagram(b"two"));
    let got = bench.wire.recv(&mut out).unwrap();
    assert_eq!(out[..got], datagram(b"one"));
    let report = LocalPairRole::report(&bench.worker).unwrap();
    assert_eq!((report.matched, report.otherwise), (0, 1));
    assert!(report.checkpoints > 0);
    // And the next pair is one again.
    bench.pvm.send(&datagram(b"three"));
    bench.svm.send(&datagram(b"three"));
    let got = bench.wire.recv(&mut out).unwrap();
    assert_eq!(out[..got], datagram(b"three"));
}

#[test]
fn either_guest_may_leave_and_come_back() {
    let mut bench = bench();
    let mut out = [0; 2048];
    for _ in 0..3 {
        let frame = datagram(&[3; 900]);
        bench.pvm.send(&frame);
        bench.svm.send(&frame);
        let got = bench.wire.recv(&mut out).unwrap();
        assert_eq!(out[..got], frame);
        assert!(bench.worker.clone().detach().unwrap().is_some());
        assert!(SvmSide(bench.worker.clone()).detach().unwrap().is_some());
        (bench.pvm, bench.svm) = (Sender::new(), Sender::new());
        bench.worker.clone().attach(bench.pvm.rings()).unwrap();
        let mut side = SvmSide(bench.worker.clone());
        side.attach(bench.svm.rings()).unwrap();
    }
}

fn numbered(frames: std::ops::Range<usize>, payload: usize) -> Vec<Vec<u8>> {
    frames.map(|n| datagram(&vec![n as u8; payload])).collect()
}

#[test]
fn what_both_have_sent_leaves_by_twos() {
    for tx in [TxMode::Twin, TxMode::Exact, TxMode::InPlace] {
        let mut bench = bench_with(tx);
        for (round, payload) in [22, 85, 86, 87, 469, 1400].into_iter().enumerate() {
            let before = bench.report();
            bench.send_first(datagram(&[99; 30]));
            let frames = numbered(0..15, payload);
            bench.send_at_once(&frames, &frames);
            bench.expect(&frames);
            bench.wait_used(15);
            // The first frame of the flow makes it known.
            let by_twos = 15 + u64::from(round > 0);
            let expected = LocalReport {
                matched: before.matched + 16,
                by_twos: before.by_twos + by_twos,
                pvm_frames: before.pvm_frames + 16,
                svm_frames: before.svm_frames + 16,
                ..before
            };
            assert_eq!(bench.report(), expected, "{tx:?} {payload}");
        }
    }
}

#[test]
fn two_that_differ_anywhere_do_not_leave_as_a_pair() {
    let places = [42, 43, 63, 127, 128, 129, 255, 256, 800, 1441];
    let modes = [TxMode::Twin, TxMode::InPlace];
    for (at, tx) in places.iter().flat_map(|at| modes.map(|tx| (*at, tx))) {
        let mut bench = bench_with(tx);
        bench.send_first(datagram(&[99; 30]));
        let ours = numbered(0..8, 1400);
        let mut theirs = ours.clone();
        theirs[4][at] ^= 1;
        bench.send_at_once(&ours, &theirs);
        bench.expect(&ours);
        bench.wait_used(8);
        let report = bench.report();
        assert_eq!(report.by_twos, 4, "byte {at}: those before it");
        assert!(
            report.checkpoints > 0 && report.otherwise > 0,
            "byte {at}: {report:?}"
        );
    }
}

/// In place, only headers are copied for the comparison; this NIC then gathers the rest, under the checksum of
/// what was compared.
#[test]
fn what_leaves_in_place_by_twos_is_compared_without_a_copy() {
    let mut bench = bench_with(TxMode::InPlace);
    bench.send_first(datagram(&[99; 30]));
    let before = bench.worker.stats();
    let mut frames = numbered(0..15, 1400);
    // The field counts for nothing: the checksum is made of what was compared.
    let right = frames.clone();
    frames.iter_mut().for_each(|frame| frame[40] ^= 0x55);
    bench.send_at_once(&frames, &frames);
    bench.expect(&right);
    bench.wait_used(15);
    let after = bench.worker.stats();
    assert_eq!(bench.report().by_twos, 15);
    assert_eq!(after.copied_role_bytes, before.copied_role_bytes);
    let rest = 1442 - colo_compare::HEADER_MAX as u64;
    let gathered = after.copied_gathered_bytes - before.copied_gathered_bytes;
    assert_eq!(gathered, 15 * rest);
}

#[test]
fn who_is_ahead_is_met_in_order_and_then_they_leave_by_twos_again() {
    for svm_is_ahead in [false, true] {
        let mut bench = bench();
        bench.send_first(datagram(&[99; 30]));
        let frames = numbered(0..10, 900);
        let none = Vec::new();
        let ahead = [&none, &frames];
        let pvm = ahead[usize::from(!svm_is_ahead)];
        bench.send_at_once(pvm, ahead[usize::from(svm_is_ahead)]);
        // Patience ends, and they are taken.
        let taken = |report: LocalReport| [report.pvm_frames, report.svm_frames];
        while taken(bench.report())[usize::from(svm_is_ahead)] < 11 {
            std::thread::yield_now();
        }
        bench.send_at_once(ahead[usize::from(svm_is_ahead)], pvm);
        bench.expect(&frames);
        bench.wait_used(10);
        assert_eq!(bench.report().by_twos, 0);
        let more = numbered(10..20, 900);
        bench.send_at_once(&more, &more);
        bench.expect(&more);
        bench.wait_used(10);
        let report = bench.report();
        assert_eq!((report.by_twos, report.checkpoints), (10, 0), "{report:?}");
    }
}

/// Invariant 7: the buffers are the guests' again before the frames have left.
#[test]
fn what_a_guest_writes_afterwards_never_leaves_and_both_wait_while_the_nic_is_full() {
    let mut bench = bench();
    bench.send_first(datagram(&[99; 30]));
    let blocked = |bench: &Bench| bench.worker.stats().nic_tx_blocked;
    // A queue that was used up shows its buffers before the frames are sent; one less, and they are seen when it is known
    // whether the NIC had room.
    let batch = usize::from(ENTRIES) - 1;
    let mut frames = Vec::new();
    while blocked(&bench) == 0 {
        let more = numbered(frames.len()..frames.len() + batch, 1400);
        bench.send_at_once(&more, &more);
        bench.wait_used(batch);
        frames.extend(more);
    }
    let before = bench.report();
    assert_eq!(before.by_twos, frames.len() as u64);
    // These lie where those lay that have not left yet.
    let more = numbered(frames.len()..frames.len() + batch, 1400);
    bench.send_at_once(&more, &more);
    let begun = blocked(&bench);
    // Every step tries once.
    while blocked(&bench) < begun + 3 {
        std::thread::yield_now();
    }
    assert_eq!(bench.report(), before, "nothing is taken meanwhile");
    bench.expect(&frames);
    bench.expect(&more);
    bench.wait_used(batch);
    let report = bench.report();
    let all = (frames.len() + more.len()) as u64;
    assert_eq!((report.by_twos, report.checkpoints), (all, 0));
}

#[test]
fn a_segment_that_left_by_twos_is_what_its_retransmission_is_compared_with() {
    let mut bench = bench();
    let segment = |n: u32| {
        let segment = Tcp::new(Side::V4).seq(1000 + n * 100).ack(500);
        segment.payload(&[n as u8; 100]).bytes()
    };
    bench.send_first(segment(0));
    let frames: Vec<_> = (1..9).map(segment).collect();
    bench.send_at_once(&frames, &frames);
    bench.expect(&frames);
    bench.wait_used(8);
    assert_eq!(bench.report().by_twos, 8);
    bench.pvm.send(&segment(5));
    bench.expect(&[segment(5)]);
    let mut other = segment(6);
    other[70] ^= 1;
    bench.pvm.send(&other);
    bench.expect(&[other]);
    let report = bench.report();
    assert!(report.checkpoints > 0, "{report:?}");
}
