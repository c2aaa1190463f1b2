//! Two mock drivers and a socket for a wire.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use colo_compare::testing::{Side, udp};

use super::*;
use crate::nic::SocketNic;
use crate::ring::driver_mock::DriverMock;
use crate::ring::{GuestRam, Pages, Segment};
use crate::worker::{PollMode, WorkerConfig, spawn_unattached};

const BUFFERS: u64 = 0x20000;

/// A guest that only sends.
struct Sender {
    ram: Arc<GuestRam>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
}

impl Sender {
    fn new() -> Self {
        let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
        Self {
            guest_rx: DriverMock::new(ram.clone(), 0x4000, 16, true),
            guest_tx: DriverMock::new(ram.clone(), 0x8000, 16, true),
            ram,
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
        self.ram.write(BUFFERS, &[0; 12]).unwrap();
        self.ram.write(BUFFERS + 12, frame).unwrap();
        let len = 12 + frame.len() as u32;
        let buffer = Segment { gpa: BUFFERS, len };
        self.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
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

fn bench() -> Bench {
    let (nic, wire) = SocketNic::pair(1500).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let config = WorkerConfig {
        name: "local".into(),
        poll: PollMode::Busy,
        cpu: None,
        frame_slots: 1024,
        tx: Default::default(),
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
