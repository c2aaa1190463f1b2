//! The worker between a wire with frames of 9000 bytes and a guest whose buffers are short and few.

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::port::NET_HEADER_BYTES;
use super::{PollMode, PortWiring, WorkerConfig, WorkerHandle, spawn};
use crate::net_offer::NetOffer;
use crate::nic::SocketNic;
use crate::ring::driver_mock::DriverMock;
use crate::ring::{Call, GuestRam, Pages, QueueState, Segment};

const MTU: u16 = 9000;
const FRAME_MAX: usize = MTU as usize + 14;
const ENTRIES: u16 = 16;
/// Where the receive buffers are, which are no longer than their distance.
const BUFFERS: u64 = 0x2_0000;
const BUFFER_BYTES: u64 = 2048;

struct Bench {
    ram: Arc<GuestRam>,
    guest_rx: DriverMock,
    kick: EventFd,
    wire: UnixDatagram,
    worker: WorkerHandle,
    offered: u64,
    /// Where the buffers are that the device has.
    places: VecDeque<u64>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

fn frame(number: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at * 7 + at / 251) as u8 ^ number)
        .collect()
}

impl Bench {
    fn new(poll: PollMode) -> Self {
        let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
        let guest_rx = DriverMock::new(ram.clone(), 0x4000, ENTRIES, true);
        let guest_tx = DriverMock::new(ram.clone(), 0x8000, ENTRIES, true);
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let (nic, wire) = SocketNic::pair(MTU).unwrap();
        let wiring = PortWiring {
            ram: ram.clone(),
            call: Arc::new(Call::new(line)),
            kick: kick.try_clone().unwrap(),
        };
        let config = WorkerConfig {
            name: "jumbo".into(),
            poll,
            cpu: None,
            frame_slots: 32,
            tx: Default::default(),
            stages: false,
        };
        let worker = spawn(config, Box::new(nic), wiring).unwrap();
        let queues = [&guest_rx, &guest_tx].map(|driver| QueueState {
            device_features: NetOffer::MERGEABLE,
            ..driver.queue_state()
        });
        worker.activate(queues).unwrap();
        Self {
            ram,
            guest_rx,
            kick,
            wire,
            worker,
            offered: 0,
            places: VecDeque::new(),
        }
    }

    fn offer(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let gpa = BUFFERS + self.offered % u64::from(ENTRIES) * BUFFER_BYTES;
            let buffer = Segment { gpa, len };
            self.guest_rx.offer(&[], &[buffer]).unwrap().unwrap();
            self.places.push_back(gpa);
            self.offered += 1;
        }
        self.kick.write(1).unwrap();
    }

    /// The next buffer that comes back, as far as it was written.
    fn returned(&mut self) -> Option<Vec<u8>> {
        let used = self.guest_rx.take_used().unwrap()?;
        let mut bytes = vec![0; used.written as usize];
        let gpa = self.places.pop_front().unwrap();
        self.ram.read(gpa, &mut bytes).unwrap();
        Some(bytes)
    }

    /// The next frame, and how many buffers it took. They are there all at once.
    fn received(&mut self) -> (Vec<u8>, u16) {
        let mut frame = loop {
            match self.returned() {
                Some(first) => break first,
                None => std::thread::yield_now(),
            }
        };
        let count = u16::from_le_bytes([frame[10], frame[11]]);
        for _ in 1..count {
            frame.extend(self.returned().expect("a buffer of the same frame"));
        }
        (frame.split_off(NET_HEADER_BYTES), count)
    }
}

#[test]
fn long_frames_wait_until_a_guest_with_few_buffers_has_enough_and_none_is_lost() {
    for poll in [PollMode::Adaptive, PollMode::Interrupt] {
        let mut bench = Bench::new(poll);
        // One too few.
        bench.offer(4, 2048);
        for number in 0..40 {
            bench.wire.send(&frame(number, FRAME_MAX)).unwrap();
            bench.wire.send(&frame(number, 3000)).unwrap();
            bench.offer(1, 2048);
            assert_eq!(bench.received(), (frame(number, FRAME_MAX), 5));
            // Whatever is next, there is to be room for the longest.
            bench.offer(5, 2048);
            assert_eq!(bench.received(), (frame(number, 3000), 2));
            bench.offer(1, 2048);
        }
        let stats = bench.worker.stats();
        assert_eq!((stats.guest_rx_frames, stats.guest_rx_too_small), (80, 0));
        assert_eq!((stats.nic_rx_oversize, stats.ring_errors), (0, 0));
    }
}

#[test]
fn a_frame_may_take_each_buffer_of_a_ring_and_what_is_longer_is_counted() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let each = (NET_HEADER_BYTES + FRAME_MAX).div_ceil(ENTRIES.into());
    bench.offer(ENTRIES.into(), each as u32);
    bench.wire.send(&frame(1, FRAME_MAX)).unwrap();
    assert_eq!(bench.received(), (frame(1, FRAME_MAX), ENTRIES));
    // All that this guest can ever offer is too little: it loses the long frame and no other.
    bench.offer(ENTRIES.into(), 100);
    bench.wire.send(&frame(2, FRAME_MAX)).unwrap();
    bench.wire.send(&frame(3, 1000)).unwrap();
    assert_eq!(bench.received(), (frame(3, 1000), 11));
    let stats = bench.worker.stats();
    assert_eq!((stats.guest_rx_frames, stats.guest_rx_too_small), (2, 1));
    assert_eq!(stats.ring_errors, 0);
}
