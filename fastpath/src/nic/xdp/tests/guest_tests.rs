//! Frames of a guest's driver through a worker and its NIC: which leave from the guest's memory, and which are copied and why.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::nic::testing::Station;
use crate::ring::Call;
use crate::ring::driver_mock::DriverMock;
use crate::vhost_user::GuestRings;
use crate::worker::{
    NET_HEADER_BYTES, NicReport, PollMode, PortWiring, WorkerConfig, WorkerHandle, spawn,
    spawn_unattached,
};

/// No frame of this length is common; there is no other way to more descriptors than a frame may have.
const MTU: u16 = 40_000;
const FRAME_BYTES: usize = 39_000;
/// What of a frame of a guest is taken into host memory in any case.
const HEAD_BYTES: usize = colo_compare::HEADER_MAX;
/// Where the guest writes what it sends: each part of the payload begins shortly before the end of a page.
const HEAD_AT: u64 = 0x10_0000;
const PAYLOAD_AT: u64 = 0x20_0000 - 10;
const PAYLOAD_STEP: u64 = 0x1_0000;

/// A guest that sends, and the station that hears it.
struct Guest {
    worker: WorkerHandle,
    ram: Arc<GuestRam>,
    driver: DriverMock,
    station: Station,
}

impl Guest {
    /// `beside`: its RAM lies in the memory that the worker shares with the NIC; else it brings its own, as one of vhost-user's.
    fn new(abilities: XdpAbilities, beside: bool) -> Self {
        make_veth(1, u32::from(MTU));
        let station = Station::on("a1");
        let nic = XdpNic::open(XdpNicConfig {
            mtu: MTU,
            abilities,
            // The driver itself takes no program for frames of this length.
            mode: XdpNicMode::Generic,
            ..config("a0", NEAR)
        });
        let ram = Arc::new(GuestRam::new(4 << 20, Pages::Small).unwrap());
        let receiver = DriverMock::new(ram.clone(), 0x4000, 16, true);
        let driver = DriverMock::new(ram.clone(), 0x8000, 16, true);
        let config = WorkerConfig {
            name: "guest".into(),
            poll: PollMode::Busy,
            cpu: None,
            frame_slots: 64,
            tx: Default::default(),
            stages: false,
        };
        let (nic, queues) = (
            Box::new(nic.unwrap()),
            [receiver.queue_state(), driver.queue_state()],
        );
        let worker = if beside {
            let wiring = PortWiring {
                ram: ram.clone(),
                call: Arc::new(Call::new(EventFd::new(EFD_NONBLOCK).unwrap())),
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            };
            let worker = spawn(config, nic, wiring).unwrap();
            worker.activate(queues).unwrap();
            worker
        } else {
            let worker = spawn_unattached(config, nic).unwrap();
            let rings = GuestRings {
                ram: ram.clone(),
                queues,
                kicks: [None, None],
                calls: [None, None],
                errors: [None, None],
            };
            worker.attach_guest(rings).unwrap();
            worker
        };
        let guest = Self {
            worker,
            ram,
            driver,
            station,
        };
        // The carrier of a veth pair comes a moment after it is up.
        guest.until(|guest| !guest.report().carrier.ends_with("no link"));
        guest
    }

    fn until(&self, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "{:?}",
                self.report()
            );
            std::thread::yield_now();
        }
    }

    fn report(&self) -> NicReport {
        self.worker.execute(|edge, _| edge.nic_report()).unwrap()
    }

    /// Frames copied into one piece, by cause: too many pieces, any of several, outside the shared memory.
    fn gathered(&self) -> [u64; 3] {
        let report = self.report();
        ["many_pieces", "one_piece", "outside"]
            .map(|cause| report.counters[&*format!("tx_gathered_{cause}_frames")])
    }

    /// Sends a frame whose payload lies in so many buffers, and waits until it has been heard and the buffers came back.
    fn send(&mut self, buffers: usize) {
        let whole = frame(FAR, FRAME_BYTES, buffers);
        let bytes = [&[0; NET_HEADER_BYTES], &whole[..]].concat();
        let (head, rest) = bytes.split_at(NET_HEADER_BYTES + HEAD_BYTES);
        let rest = rest.chunks(rest.len().div_ceil(buffers));
        let places = (0..).map(|n| PAYLOAD_AT + n * PAYLOAD_STEP);
        let all = [(HEAD_AT, head)].into_iter().chain(places.zip(rest));
        let segments: Vec<_> = all
            .map(|(gpa, bytes)| {
                self.ram.write(gpa, bytes).unwrap();
                let len = bytes.len() as u32;
                Segment { gpa, len }
            })
            .collect();
        self.driver.offer(&segments, &[]).unwrap().unwrap();
        assert_eq!(self.station.receive(), whole);
        let begun = Instant::now();
        while self.driver.take_used().unwrap().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

#[test]
fn a_payload_in_more_descriptors_than_a_frame_may_have_is_copied_and_counted() {
    const PAYLOAD_BYTES: u64 = (FRAME_BYTES - HEAD_BYTES) as u64;
    in_namespace(|| {
        // As with a NIC that reads by itself: each page is a piece of its own.
        let abilities = XdpAbilities {
            crosses_pages: false,
            ..XdpAbilities::default()
        };
        let mut guest = Guest::new(abilities, true);
        let copied = |guest: &Guest| {
            let stats = guest.worker.stats();
            [
                stats.copied_gathered_bytes,
                stats.copied_scattered_bytes,
                stats.tx_in_place_bytes,
            ]
        };
        // Two buffers are few enough pieces: all of it leaves from where it lies.
        guest.send(2);
        assert_eq!(guest.gathered(), [0; 3]);
        assert_eq!(copied(&guest), [0, 0, PAYLOAD_BYTES]);
        // Four are not.
        for count in 1..3 {
            guest.send(4);
            assert_eq!(guest.gathered(), [count, 0, 0]);
            assert_eq!(copied(&guest), [count * PAYLOAD_BYTES, 0, PAYLOAD_BYTES]);
        }
        // And more than four are not even tried.
        guest.send(5);
        assert_eq!(guest.gathered(), [2, 0, 0]);
        assert_eq!(
            copied(&guest),
            [2 * PAYLOAD_BYTES, FRAME_BYTES as u64, PAYLOAD_BYTES]
        );
    });
}

#[test]
fn what_lies_in_the_memory_of_a_guest_that_brings_its_own_is_copied_and_counted() {
    const PAYLOAD_BYTES: u64 = (FRAME_BYTES - HEAD_BYTES) as u64;
    in_namespace(|| {
        let mut guest = Guest::new(XdpAbilities::default(), false);
        for count in 1..4 {
            guest.send(2);
            assert_eq!(guest.gathered(), [0, 0, count]);
            let stats = guest.worker.stats();
            assert_eq!(stats.copied_gathered_bytes, count * PAYLOAD_BYTES);
            assert_eq!(stats.tx_in_place_bytes, 0);
        }
    });
}
