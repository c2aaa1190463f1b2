//! A guest with one pair of queues, served by two workers whose NICs make frames from nothing.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use colo_compare::Token;
use colo_compare::testing::{Segment as Tcp, Side};
use colo_fastpath::frame::FramePool;
use colo_fastpath::nic::{Filter, Nic, Sent, Sink};
use colo_fastpath::ring::driver_mock::DriverMock;
use colo_fastpath::ring::{Call, GuestRam, Pages, QueueState, Segment};
use colo_fastpath::worker::{PollMode, PortWiring, WorkerConfig, WorkerHandle, spawn_shards};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SHARDS: usize = 2;
const ENTRIES: u16 = 256;
const BUFFER_BYTES: u64 = 2048;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;
/// Buffers of each queue in use at a time.
const WINDOW: u64 = 64;
const FLOWS: u16 = 64;

/// Sends to nowhere, and receives as many frames as it is told to.
struct Source {
    sink: Sink,
    frames: Vec<Vec<u8>>,
    left: Arc<AtomicU64>,
}

impl Nic for Source {
    fn name(&self) -> &str {
        "source"
    }

    fn describe(&self) -> String {
        "source".to_owned()
    }

    fn receive(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<Token>,
        max: usize,
    ) -> io::Result<()> {
        let left = self.left.load(Ordering::Relaxed);
        for n in 0..left.min(max as u64) {
            let at = (left - n) as usize % self.frames.len();
            let Some(token) = frames.from_bytes(&self.frames[at]) else {
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

fn frames(to_guest: bool) -> Vec<Vec<u8>> {
    let flows = 0..FLOWS;
    flows
        .map(|flow| {
            let payload = vec![7; if flow % 2 == 0 { 64 } else { 1200 }];
            let segment = Tcp::new(Side::V4)
                .ports(80, 40_000 + flow)
                .payload(&payload);
            if to_guest {
                segment.to_guest().bytes()
            } else {
                segment.bytes()
            }
        })
        .collect()
}

/// The guest and its workers.
pub struct MockShards {
    pub workers: Vec<WorkerHandle>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
    output: Vec<Vec<u8>>,
    ram: Arc<GuestRam>,
    left: Vec<Arc<AtomicU64>>,
    offered: u64,
}

impl MockShards {
    pub fn new() -> Self {
        let ram = Arc::new(GuestRam::new(4 << 20, Pages::Small).unwrap());
        let call = Arc::new(Call::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let left: Vec<Arc<AtomicU64>> = (0..SHARDS).map(|_| Arc::default()).collect();
        let source = |left: &Arc<AtomicU64>| -> Box<dyn Nic> {
            Box::new(Source {
                sink: Sink::new(1500),
                frames: frames(true),
                left: left.clone(),
            })
        };
        let config = |n| WorkerConfig {
            name: format!("mock-{n}"),
            poll: PollMode::Busy,
            cpu: None,
            frame_slots: 1024,
            tx: Default::default(),
            stages: false,
        };
        let wiring = |_| PortWiring {
            ram: ram.clone(),
            call: call.clone(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let workers = spawn_shards(
            (0..SHARDS).map(config).collect(),
            left.iter().map(source).collect(),
            (0..SHARDS).map(wiring).collect(),
        );
        let workers = workers.unwrap();
        let guest_rx = DriverMock::new(ram.clone(), 0x4000, ENTRIES, true);
        let guest_tx = DriverMock::new(ram.clone(), 0x8000, ENTRIES, true);
        let queues: [QueueState; 2] = [guest_rx.queue_state(), guest_tx.queue_state()];
        workers[0].activate(queues).unwrap();
        Self {
            workers,
            guest_rx,
            guest_tx,
            output: frames(false),
            ram,
            left,
            offered: 0,
        }
    }

    /// The guest sends `count` frames and gets as many, half by each NIC.
    pub fn exchange(&mut self, count: u64) {
        for left in &self.left {
            left.store(count / SHARDS as u64, Ordering::Relaxed);
        }
        let (mut sent, mut used, mut received) = (0, 0, 0);
        while used < count || received < count {
            while self.offered < WINDOW {
                // Nobody reads what comes: one place will do for all.
                let len = BUFFER_BYTES as u32;
                let buffer = Segment {
                    gpa: RX_BUFFERS,
                    len,
                };
                self.guest_rx.offer(&[], &[buffer]).unwrap().unwrap();
                self.offered += 1;
            }
            while self.guest_rx.take_used().unwrap().is_some() {
                self.offered -= 1;
                received += 1;
            }
            while self.guest_tx.take_used().unwrap().is_some() {
                used += 1;
            }
            if sent < count && sent - used < WINDOW {
                self.send(sent);
                sent += 1;
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn send(&mut self, n: u64) {
        let frame = &self.output[n as usize % self.output.len()];
        // Frames of a flow are alike, so a place that is used again too early has the same bytes.
        let gpa = TX_BUFFERS + n % u64::from(FLOWS) * BUFFER_BYTES;
        self.ram.write(gpa, &[0; 12]).unwrap();
        self.ram.write(gpa + 12, frame).unwrap();
        let len = 12 + frame.len() as u32;
        let buffer = Segment { gpa, len };
        self.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
    }
}

impl Drop for MockShards {
    fn drop(&mut self) {
        self.workers.iter().for_each(WorkerHandle::stop);
    }
}
