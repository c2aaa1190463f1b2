//! Two guests that are drivers in this process, compared on one worker.

#![allow(dead_code, reason = "each test uses its part")]

use std::sync::Arc;

use colo_compare::Limits;
use colo_fastpath::frame::TxMode;
use colo_fastpath::nic::Nic;
use colo_fastpath::pair::{LocalPairRole, LocalReport, SvmSide};
use colo_fastpath::ring::driver_mock::DriverMock;
use colo_fastpath::ring::{Call, GuestRam, Pages, Segment};
use colo_fastpath::vhost_user::{GuestRings, GuestSide};
use colo_fastpath::worker::{PollMode, PortWiring, WorkerConfig, WorkerHandle, spawn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const QUEUE_ENTRIES: u16 = 256;
const GUEST_RX: u64 = 0x4000;
const GUEST_TX: u64 = 0x8000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_BYTES: u64 = 2048;
/// Buffers of each guest that may be in use at a time.
pub const WINDOW: u64 = 64;
const NET_HEADER: usize = 12;

/// Ethernet, IPv4, UDP.
pub const HEADERS: usize = 42;
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0xc0, 0x10, 1];
pub const PEER_MAC: [u8; 6] = [0x52, 0x54, 0, 0xc0, 0x10, 2];

/// One of the guests.
pub struct Guest {
    pub ram: Arc<GuestRam>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
    sent: u64,
    used: u64,
}

impl Guest {
    fn new() -> Self {
        let ram = Arc::new(GuestRam::new(4 << 20, Pages::Small).unwrap());
        Self {
            guest_rx: DriverMock::new(ram.clone(), GUEST_RX, QUEUE_ENTRIES, true),
            guest_tx: DriverMock::new(ram.clone(), GUEST_TX, QUEUE_ENTRIES, true),
            ram,
            sent: 0,
            used: 0,
        }
    }

    /// Where the next frame's bytes will lie.
    pub fn next_frame_gpa(&self) -> u64 {
        BUFFERS + self.sent % WINDOW * BUFFER_BYTES + NET_HEADER as u64
    }

    /// Whether a buffer is free.
    pub fn has_room(&mut self) -> bool {
        while self.guest_tx.take_used().unwrap().is_some() {
            self.used += 1;
        }
        self.sent - self.used < WINDOW
    }

    /// Sends a frame.
    pub fn send(&mut self, frame: &[u8]) {
        while !self.has_room() {
            std::thread::yield_now();
        }
        let gpa = self.next_frame_gpa();
        self.ram
            .write(gpa - NET_HEADER as u64, &[0; NET_HEADER])
            .unwrap();
        self.ram.write(gpa, frame).unwrap();
        let buffer = Segment {
            gpa: gpa - NET_HEADER as u64,
            len: (NET_HEADER + frame.len()) as u32,
        };
        self.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
        self.sent += 1;
    }

    /// Waits until it has all its buffers back.
    pub fn wait_idle(&mut self) {
        while self.used < self.sent {
            self.has_room();
            std::thread::yield_now();
        }
    }

    fn queues(&self) -> [colo_fastpath::ring::QueueState; 2] {
        [self.guest_rx.queue_state(), self.guest_tx.queue_state()]
    }
}

/// Both, and who compares them.
pub struct MockPair {
    pub worker: WorkerHandle,
    pub pvm: Guest,
    pub svm: Guest,
}

impl MockPair {
    pub fn new(nic: Box<dyn Nic>, tx: TxMode) -> Self {
        let (pvm, svm) = (Guest::new(), Guest::new());
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let wiring = PortWiring {
            ram: pvm.ram.clone(),
            call: Arc::new(Call::new(line)),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let config = WorkerConfig {
            name: "mock-pair".into(),
            poll: PollMode::Busy,
            cpu: None,
            frame_slots: 2048,
            tx,
            stages: false,
        };
        let worker = spawn(config, nic, wiring).unwrap();
        let limits = Limits {
            max_flows: 1024,
            compare_deadline_us: 60_000_000,
            ..Limits::default()
        };
        LocalPairRole::new(limits).start(&worker).unwrap();
        worker.activate(pvm.queues()).unwrap();
        let rings = GuestRings {
            ram: svm.ram.clone(),
            queues: svm.queues(),
            kicks: [None, None],
            calls: [None, None],
            errors: [None, None],
        };
        SvmSide(worker.clone()).attach(rings).unwrap();
        Self { worker, pvm, svm }
    }

    pub fn report(&self) -> LocalReport {
        LocalPairRole::report(&self.worker).unwrap()
    }

    /// Both guests send the same.
    pub fn send(&mut self, frame: &[u8]) {
        self.pvm.send(frame);
        self.svm.send(frame);
    }

    /// Waits until so many frames were released.
    pub fn wait_released(&self, frames: u64) {
        loop {
            let report = self.report();
            if report.matched + report.otherwise >= frames {
                return;
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for MockPair {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

/// A UDP datagram of the guest, number `n` of its flow, with a right checksum.
pub fn datagram(n: u64, payload_len: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADERS + payload_len);
    frame.extend(PEER_MAC);
    frame.extend(GUEST_MAC);
    let total = (28 + payload_len) as u16;
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = !fold(sum(&frame[14..34]));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend([0x12, 0x34, 0, 7]);
    frame.extend((total - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(n.to_be_bytes());
    let fill = (8..payload_len).map(|at| (at as u64 * 131 + n * 7) as u8);
    frame.extend(fill);
    let sum = !fold(transport_sum(&frame));
    frame[40..42].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// Whether the UDP checksum of a frame holds.
pub fn verifies(frame: &[u8]) -> bool {
    fold(transport_sum(frame)) == 0xffff
}

fn transport_sum(frame: &[u8]) -> u64 {
    let l4 = &frame[34..];
    sum(&frame[26..34]) + 17 + l4.len() as u64 + sum(l4)
}

fn sum(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    bytes.chunks(2).map(word).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
