//! A guest without a partner that is a driver in this process, behind a worker whose stages are timed.

use std::sync::Arc;

use colo_fastpath::nic::Nic;
use colo_fastpath::ring::driver_mock::DriverMock;
use colo_fastpath::ring::{Call, GuestRam, Pages, Segment};
use colo_fastpath::worker::{PollMode, PortWiring, WorkerConfig, WorkerHandle, spawn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ENTRIES: u16 = 256;
/// Buffers that the guest offers at a time.
const OFFERED: u64 = 128;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_BYTES: u64 = 2048;

pub struct MockSolo {
    pub worker: WorkerHandle,
    guest_rx: DriverMock,
    offered: u64,
    /// Frames that the guest got.
    pub received: u64,
}

impl MockSolo {
    pub fn new(nic: Box<dyn Nic>) -> Self {
        let ram = Arc::new(GuestRam::new(4 << 20, Pages::Small).unwrap());
        let guest_rx = DriverMock::new(ram.clone(), 0x4000, ENTRIES, true);
        let guest_tx = DriverMock::new(ram.clone(), 0x8000, ENTRIES, true);
        let wiring = PortWiring {
            ram,
            call: Arc::new(Call::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let config = WorkerConfig {
            name: "mock-solo".into(),
            poll: PollMode::Busy,
            cpu: None,
            frame_slots: 2048,
            tx: Default::default(),
            stages: true,
        };
        let worker = spawn(config, nic, wiring).unwrap();
        let queues = [guest_rx.queue_state(), guest_tx.queue_state()];
        worker.activate(queues).unwrap();
        let mut guest = Self {
            worker,
            guest_rx,
            offered: 0,
            received: 0,
        };
        guest.look();
        guest
    }

    /// The guest takes what it got and gives buffers for more.
    pub fn look(&mut self) {
        while self.guest_rx.take_used().unwrap().is_some() {
            self.received += 1;
        }
        while self.offered < self.received + OFFERED {
            let gpa = BUFFERS + self.offered % OFFERED * BUFFER_BYTES;
            let len = BUFFER_BYTES as u32;
            let buffer = Segment { gpa, len };
            self.guest_rx.offer(&[], &[buffer]).unwrap().unwrap();
            self.offered += 1;
        }
    }
}

impl Drop for MockSolo {
    fn drop(&mut self) {
        self.worker.stop();
    }
}
