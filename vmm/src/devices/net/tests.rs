//! The network device as its driver sees it: registers, queues in RAM, a wire.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use colo_compare::Token;
use colo_fastpath::frame::FramePool;
use colo_fastpath::net_offer::NetOffer;
use colo_fastpath::nic::{Filter, Nic, Sent, SocketNic};
use colo_fastpath::ring::driver_mock::DriverMock;
use colo_fastpath::ring::{Call, GuestRam, Pages, QueueState, Segment};
use colo_fastpath::worker::{
    Edge, PollMode, PortWiring, Role, Solo, WorkerConfig, WorkerHandle, spawn,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::virtio_mmio::{DeviceState, VirtioMmio};

const BUFFER: u64 = 0x40000;

struct Bench {
    ram: Arc<GuestRam>,
    device: VirtioMmio,
    line: EventFd,
    wire: UnixDatagram,
    worker: WorkerHandle,
    /// Whether the NIC has a link; it looks when the worker is woken.
    link: Arc<AtomicBool>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

fn bench() -> Bench {
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let call = Arc::new(Call::new(line.try_clone().unwrap()));
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let (nic, wire) = SocketNic::pair(1500).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let wiring = PortWiring {
        ram: ram.clone(),
        call: call.clone(),
        kick: kick.try_clone().unwrap(),
    };
    let config = WorkerConfig {
        name: "net".into(),
        poll: PollMode::Interrupt,
        cpu: None,
        frame_slots: 64,
        tx: Default::default(),
        stages: false,
    };
    let link = Arc::new(AtomicBool::new(true));
    let nic = Plugged {
        nic,
        link: link.clone(),
    };
    let worker = spawn(config, Box::new(nic), wiring).unwrap();
    let offer = NetOffer::new([2, 0, 0, 0, 0, 1], 1500);
    let net = Net::new(offer, ram.clone(), call.clone(), vec![worker.clone()]);
    let device = VirtioMmio::new(Box::new(net), call, vec![kick]);
    let guest_rx = DriverMock::new(ram.clone(), 0x10000, 64, true);
    let guest_tx = DriverMock::new(ram.clone(), 0x20000, 64, true);
    Bench {
        ram,
        device,
        line,
        wire,
        worker,
        link,
        guest_rx,
        guest_tx,
    }
}

/// A NIC whose cable can be pulled.
struct Plugged {
    nic: SocketNic,
    link: Arc<AtomicBool>,
}

impl Nic for Plugged {
    fn name(&self) -> &str {
        self.nic.name()
    }
    fn describe(&self) -> String {
        self.nic.describe()
    }
    fn receive(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<Token>,
        max: usize,
    ) -> io::Result<()> {
        self.nic.receive(frames, out, max)
    }
    fn send(&mut self, frames: &mut FramePool, token: Token) -> Sent {
        self.nic.send(frames, token)
    }
    fn poll_fds(&self, wants_frames: bool, wants_room: bool, fds: &mut Vec<libc::pollfd>) {
        self.nic.poll_fds(wants_frames, wants_room, fds);
    }
    fn mtu(&self) -> u16 {
        self.nic.mtu()
    }
    fn set_filter(&mut self, filter: Filter) -> io::Result<()> {
        self.nic.set_filter(filter)
    }
    fn has_link(&self) -> bool {
        self.link.load(Ordering::Relaxed)
    }
}

/// A role that keeps what the NIC says from the guest.
struct Replica;

impl Role for Replica {
    fn name(&self) -> &'static str {
        "replica"
    }
    fn step(&mut self, _edge: &mut Edge, _now_us: u64) -> bool {
        false
    }
    fn shows_link(&self) -> bool {
        false
    }
}

impl Bench {
    /// Plugs the cable in or out, and waits until the worker has seen it.
    fn plug(&self, link: bool) {
        self.link.store(link, Ordering::Relaxed);
        // It looks before each sleep; the first may have begun before the change.
        let before = self.worker.stats().sleeps;
        while self.worker.stats().sleeps < before + 2 {
            self.worker.execute(|_, _| ()).unwrap();
        }
    }

    fn link_status(&self) -> u8 {
        let mut status = [0; 2];
        self.device.read(0x106, &mut status);
        status[0]
    }

    fn register(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        let mut data = [0; 4];
        self.device.read(0x70, &mut data);
        u32::from_le_bytes(data)
    }

    fn start(&mut self) {
        self.ram.write(0x10000, &[0; 0x20000]).unwrap();
        self.guest_rx = DriverMock::new(self.ram.clone(), 0x10000, 64, true);
        self.guest_tx = DriverMock::new(self.ram.clone(), 0x20000, 64, true);
        self.write(0x70, 3);
        for (select, bits) in [(1, 1), (0, 1 << 29 | 1 << 28 | 1 << 5)] {
            self.write(0x24, select);
            self.write(0x20, bits);
        }
        self.write(0x70, 11);
        let queues = [self.guest_rx.queue_state(), self.guest_tx.queue_state()];
        for (number, queue) in queues.into_iter().enumerate() {
            self.set_up(number as u32, queue);
        }
        self.write(0x70, 15);
        assert_eq!(self.status(), 15);
    }

    fn set_up(&mut self, number: u32, queue: QueueState) {
        self.write(0x30, number);
        self.write(0x38, queue.size.into());
        for (low, gpa) in [
            (0x80, queue.descriptors),
            (0x90, queue.avail),
            (0xa0, queue.used),
        ] {
            self.write(low, gpa as u32);
            self.write(low + 4, 0);
        }
        self.write(0x44, 1);
    }

    fn send(&mut self, frame: &[u8]) {
        self.ram.write(BUFFER, &[0; 12]).unwrap();
        self.ram.write(BUFFER + 12, frame).unwrap();
        let buffer = Segment {
            gpa: BUFFER,
            len: 12 + frame.len() as u32,
        };
        self.guest_tx.offer(&[buffer], &[]).unwrap().unwrap();
        self.write(0x50, 1);
    }
}

#[test]
fn no_segmentation_and_no_order_of_buffers_is_offered() {
    let mut bench = bench();
    // VERSION_1, EVENT_IDX, INDIRECT_DESC; STATUS, MRG_RXBUF, MAC, MTU, CSUM.
    let bits = [32, 29, 28, 16, 15, 5, 3, 0];
    let list = bits.iter().map(|bit| 1_u64 << bit).sum::<u64>();
    let halves = [0, 1, 2].map(|select| {
        bench.write(0x14, select);
        bench.register(0x10)
    });
    assert_eq!(halves, [list as u32, (list >> 32) as u32, 0]);
}

#[test]
fn the_configuration_has_address_link_and_mtu() {
    let bench = bench();
    let mut config = [0; 12];
    bench.device.read(0x100, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5]);
}

#[test]
fn a_driver_sends_and_receives() {
    let mut bench = bench();
    bench.start();
    // The line shall tell of the received frame only.
    bench.guest_tx.set_used_event(1000).unwrap();
    bench.send(&[7; 60]);
    let mut frame = [0; 2048];
    assert_eq!(bench.wire.recv(&mut frame).unwrap(), 60);

    bench.guest_rx.set_used_event(0).unwrap();
    bench
        .guest_rx
        .offer(
            &[],
            &[Segment {
                gpa: BUFFER,
                len: 2000,
            }],
        )
        .unwrap();
    bench.write(0x50, 0);
    bench.wire.send(&[9; 80]).unwrap();
    while bench.line.read().is_err() {
        std::thread::yield_now();
    }
    assert_eq!(bench.guest_rx.take_used().unwrap().unwrap().written, 92);
}

#[test]
fn a_hostile_ring_costs_a_reset_and_nothing_else() {
    let mut bench = bench();
    for round in 0..5 {
        bench.start();
        match round {
            0 => bench.guest_tx.set_avail_idx(5000).unwrap(),
            1 => bench.guest_rx.set_avail_idx(300).unwrap(),
            2 => bench.guest_tx.offer_head(99).unwrap(),
            3 => {
                let outside = Segment {
                    gpa: 1 << 40,
                    len: 60,
                };
                bench.guest_tx.offer(&[outside], &[]).unwrap();
            }
            _ => {
                let buffer = Segment {
                    gpa: BUFFER,
                    len: 60,
                };
                bench.guest_tx.write_descriptor(3, buffer, 1, 3).unwrap();
                bench.guest_tx.offer_head(3).unwrap();
            }
        }
        bench.write(0x50, 1);
        while bench.worker.stats().ring_errors != round + 1 {
            std::thread::yield_now();
        }
        while bench.status() != 15 | 64 {
            std::thread::yield_now();
        }
        bench.write(0x70, 0);
        assert_eq!(bench.status(), 0);
    }
    bench.start();
    bench.send(&[1; 60]);
    assert_eq!(bench.wire.recv(&mut [0; 2048]).unwrap(), 60);
}

#[test]
fn a_broken_device_is_still_broken_elsewhere() {
    let mut first = bench();
    first.start();
    first.guest_tx.set_avail_idx(5000).unwrap();
    first.write(0x50, 1);
    while first.status() != 15 | 64 {
        std::thread::yield_now();
    }
    let queues = first.worker.quiesce().unwrap();
    assert!(queues.is_none());
    let record = first.device.save(&[]).to_bytes();
    let mut second = bench();
    second
        .device
        .restore(&DeviceState::from_bytes(&record).unwrap())
        .unwrap();
    assert_eq!(second.status(), 15 | 64);
    assert!(
        !second
            .worker
            .execute(|edge, _| edge.guest_is_active())
            .unwrap()
    );
    second.write(0x70, 0);
    second.start();
    second.send(&[1; 60]);
    assert_eq!(second.wire.recv(&mut [0; 2048]).unwrap(), 60);
}

#[test]
fn the_guest_is_told_of_its_link() {
    let mut bench = bench();
    bench.start();
    let generation = bench.register(0xfc);
    assert_eq!((bench.link_status(), bench.register(0x60)), (1, 0));
    bench.plug(false);
    assert_eq!(bench.link_status(), 0);
    assert_eq!(bench.register(0xfc), generation.wrapping_add(1));
    assert_eq!(bench.register(0x60), 2, "configuration change");
    assert!(bench.line.read().is_ok(), "the guest is interrupted");
    bench.write(0x64, 2);
    assert_eq!(bench.register(0x60), 0);
    bench.plug(false);
    assert_eq!(bench.register(0x60), 0, "told once");
    assert!(bench.line.read().is_err());
    bench.plug(true);
    assert_eq!((bench.link_status(), bench.register(0x60)), (1, 2));
    assert_eq!(bench.worker.stats().link_changes, 2);
    // Without an interrupt the guest goes on, and so do its frames.
    bench.send(&[1; 60]);
    assert_eq!(bench.wire.recv(&mut [0; 2048]).unwrap(), 60);
}

#[test]
fn a_replica_shows_the_link_of_the_primary_until_it_takes_over() {
    let mut first = bench();
    first.start();
    first.plug(false);
    let queues = first.worker.quiesce().unwrap();
    let record = first.device.save(&queues.unwrap().map(Some)).to_bytes();
    let mut second = bench();
    second.worker.set_role(Box::new(Replica)).unwrap();
    let state = DeviceState::from_bytes(&record).unwrap();
    second.device.restore(&state).unwrap();
    for link in [true, false, true] {
        second.plug(link);
        assert_eq!(second.link_status(), 0, "the primary has no link");
    }
    assert_eq!(second.register(0xfc), first.register(0xfc));
    second.write(0x64, 2);
    second.worker.set_role(Box::<Solo>::default()).unwrap();
    second.plug(true);
    assert_eq!((second.link_status(), second.register(0x60)), (1, 2));
    assert_eq!(second.register(0xfc), first.register(0xfc) + 1);
}
