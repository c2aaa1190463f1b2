//! The socket against front-ends that keep the protocol, break it, and die.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use proptest::prelude::*;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::net_offer::NetOffer;

const PATIENCE: Duration = Duration::from_secs(20);
const VERSION_1: u64 = 1 << 32;
const PROTOCOL: u64 = 1 << 30;
const EVENT_IDX: u64 = 1 << 29;
const REGION_BYTES: u64 = 0x10_0000;
/// Guest and front-end addresses of the two regions.
const REGIONS: [(u64, u64); 2] = [(0, 0x7f00_0000_0000), (1 << 32, 0x7f10_0000_0000)];
const OFFER: NetOffer = NetOffer::new([0x52, 0x54, 0, 1, 2, 3], 1500);

/// What the rings' server was told.
#[derive(Debug)]
enum Told {
    Attach(GuestRings),
    Detach,
}

/// Stands where a worker would: it answers `used` as the place that both rings have reached.
struct Recorder {
    told: Sender<Told>,
    queues: Option<PortState>,
    used: u16,
    broken: bool,
}

impl GuestSide for Recorder {
    fn attach(&mut self, rings: GuestRings) -> Result<(), WorkerGone> {
        self.queues = Some(rings.queues);
        self.told.send(Told::Attach(rings)).map_err(|_| WorkerGone)
    }

    fn detach(&mut self) -> Result<Option<PortState>, WorkerGone> {
        self.told.send(Told::Detach).map_err(|_| WorkerGone)?;
        let queues = self.queues.take().filter(|_| !self.broken);
        Ok(queues.map(|queues| {
            queues.map(|queue| crate::ring::QueueState {
                next_avail: self.used,
                next_used: self.used,
                ..queue
            })
        }))
    }
}

struct Bench {
    server: VhostUserServer,
    told: Receiver<Told>,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(broken: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (sender, told) = channel();
        let side = Recorder {
            told: sender,
            queues: None,
            used: 7,
            broken,
        };
        let server = VhostUserServer::bind(&folder.path().join("s"), side, OFFER).unwrap();
        Self {
            server,
            told,
            folder,
        }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("s")
    }

    fn next(&self) -> Told {
        self.told.recv_timeout(PATIENCE).unwrap()
    }

    fn next_attach(&self) -> GuestRings {
        match self.next() {
            Told::Attach(rings) => rings,
            Told::Detach => panic!("rings were detached"),
        }
    }

    fn expect_detach(&self) {
        assert!(matches!(self.next(), Told::Detach));
    }

    fn expect_nothing(&self) {
        assert!(self.told.try_recv().is_err());
    }
}

/// A front-end with its memory.
struct Guest {
    frontend: Frontend,
    files: Vec<File>,
    kick: EventFd,
    call: EventFd,
}

impl Guest {
    fn connect(path: &Path) -> Self {
        Self::over(Frontend::connect(path, 2).unwrap())
    }

    fn over(frontend: Frontend) -> Self {
        let files = REGIONS.iter().map(|_| memory_file(2 * REGION_BYTES));
        Self {
            frontend,
            files: files.collect(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// Up to the acknowledged features; every later request is acknowledged.
    fn negotiate(&mut self, features: u64) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(offered & features, features);
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features).unwrap();
    }

    fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let region = |(&(gpa, user), file): (&(u64, u64), &File)| VhostUserMemoryRegionInfo {
            guest_phys_addr: gpa,
            memory_size: REGION_BYTES,
            userspace_addr: user,
            mmap_offset: 0x1000,
            mmap_handle: file.as_raw_fd(),
        };
        REGIONS.iter().zip(&self.files).map(region).collect()
    }

    fn share_memory(&self) {
        self.frontend.set_mem_table(&self.regions()).unwrap();
    }

    fn set_ring(&self, index: usize, base: u16) {
        let user = REGIONS[index].1;
        let frontend = &self.frontend;
        frontend.set_vring_num(index, 128).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_addr(index, &addresses(user)).unwrap();
        frontend.set_vring_call(index, &self.call).unwrap();
        frontend.set_vring_kick(index, &self.kick).unwrap();
    }

    fn enable(&mut self, on: bool) {
        for index in 0..2 {
            self.frontend.set_vring_enable(index, on).unwrap();
        }
    }

    fn start(&mut self) {
        self.negotiate(VERSION_1 | PROTOCOL | EVENT_IDX);
        self.share_memory();
        self.set_ring(0, 0);
        self.set_ring(1, 0);
        self.enable(true);
    }
}

fn addresses(user: u64) -> VringConfigData {
    VringConfigData {
        queue_max_size: 128,
        queue_size: 128,
        flags: 0,
        desc_table_addr: user + 0x1000,
        avail_ring_addr: user + 0x2000,
        used_ring_addr: user + 0x3000,
        log_addr: None,
    }
}

fn memory_file(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// The server closes this connection: reads end.
fn expect_end(mut stream: &UnixStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn no_segmentation_and_no_order_of_buffers_is_offered() {
    // VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC; STATUS, MRG_RXBUF, MAC, MTU, CSUM.
    let bits = [32, 30, 29, 28, 16, 15, 5, 3, 0];
    let list = bits.iter().map(|bit| 1_u64 << bit).sum::<u64>();
    let bench = Bench::new(false);
    let guest = Guest::connect(&bench.path());
    guest.frontend.set_owner().unwrap();
    let offered = guest.frontend.get_features().unwrap();
    assert_eq!(offered, list, "{:#x}", offered ^ list);
}

#[test]
fn rings_go_into_service_when_all_is_there_and_come_back_with_their_place() {
    let bench = Bench::new(false);
    let mut guest = Guest::connect(&bench.path());
    guest.negotiate(VERSION_1 | PROTOCOL | EVENT_IDX);
    guest.share_memory();
    guest.set_ring(0, 0);
    guest.set_ring(1, 0);
    guest.frontend.set_vring_enable(0, true).unwrap();
    bench.expect_nothing();
    guest.frontend.set_vring_enable(1, true).unwrap();

    let rings = bench.next_attach();
    for (queue, (gpa, _)) in rings.queues.iter().zip(REGIONS) {
        assert_eq!(
            (queue.descriptors, queue.avail, queue.used),
            (gpa + 0x1000, gpa + 0x2000, gpa + 0x3000)
        );
        assert!(queue.event_idx && !queue.indirect && queue.ready);
        assert_eq!(queue.size, 128);
    }
    // The same memory, at the offset that the table says.
    rings.ram.write((1 << 32) + 5, b"shared").unwrap();
    let mut seen = [0; 6];
    let file = &guest.files[1];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut seen, 0x1005).unwrap();
    assert_eq!(&seen, b"shared");
    guest.kick.write(1).unwrap();
    assert_eq!(rings.kicks[1].as_ref().unwrap().read().unwrap(), 1);
    rings.calls[0].as_ref().unwrap().write(1).unwrap();
    assert_eq!(guest.call.read().unwrap(), 1);

    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 7);
    bench.expect_detach();
    assert_eq!(guest.frontend.get_vring_base(1).unwrap(), 7);
    bench.expect_nothing();
}

#[test]
fn the_place_of_a_ring_is_its_used_index() {
    let bench = Bench::new(true);
    let mut guest = Guest::connect(&bench.path());
    guest.negotiate(VERSION_1 | PROTOCOL);
    guest.share_memory();
    // The used index of the first ring, as an earlier back-end left it; 12 were taken.
    let used_idx = 0x1000 + 0x3000 + 2;
    std::os::unix::fs::FileExt::write_all_at(&guest.files[0], &[9, 0], used_idx).unwrap();
    guest.set_ring(0, 12);
    guest.set_ring(1, 0);
    guest.enable(true);
    let rings = bench.next_attach();
    assert_eq!(
        [rings.queues[0].next_avail, rings.queues[0].next_used],
        [9, 9]
    );
    // This worker found a broken ring and has no states to give.
    std::os::unix::fs::FileExt::write_all_at(&guest.files[0], &[11, 0], used_idx).unwrap();
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 11);
}

#[test]
fn new_memory_and_new_lines_are_taken_over_under_running_rings() {
    let bench = Bench::new(false);
    let mut guest = Guest::connect(&bench.path());
    guest.start();
    let first = bench.next_attach();
    guest.files[0] = memory_file(2 * REGION_BYTES);
    guest.share_memory();
    bench.expect_detach();
    let second = bench.next_attach();
    second.ram.write(0, b"new").unwrap();
    let mut old = [0; 3];
    first.ram.read(0, &mut old).unwrap();
    assert_eq!(old, [0; 3]);

    guest.frontend.set_vring_call(0, &guest.call).unwrap();
    bench.expect_detach();
    bench.next_attach();
    guest.enable(false);
    bench.expect_detach();
    bench.expect_nothing();
    guest.enable(true);
    bench.next_attach();
    let stats = bench.server.stats();
    assert_eq!((stats.starts, stats.stops), (4, 3));
}

#[test]
fn a_front_end_that_dies_leaves_the_socket_to_the_next() {
    let bench = Bench::new(false);
    for round in 1..=3 {
        let mut guest = Guest::connect(&bench.path());
        guest.start();
        bench.next_attach();
        let waiting = UnixStream::connect(bench.path()).unwrap();
        drop(guest);
        bench.expect_detach();
        drop(waiting);
        assert_eq!(bench.server.stats().starts, round);
    }
}

#[test]
fn the_configuration_space_is_that_of_the_device() {
    let bench = Bench::new(false);
    let mut guest = Guest::connect(&bench.path());
    guest.negotiate(VERSION_1 | PROTOCOL);
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = guest.frontend.get_config(0, 16, flags, &[0; 16]).unwrap();
    assert_eq!(config[..12], OFFER.config(true));
    assert_eq!(config[12..], [0; 4], "nothing lies behind the space");
    let (_, config) = guest.frontend.get_config(10, 2, flags, &[0; 2]).unwrap();
    assert_eq!(config, 1500_u16.to_le_bytes());
    let (_, config) = guest.frontend.get_config(256, 4, flags, &[0; 4]).unwrap();
    assert_eq!(config, [0; 4]);
}

#[test]
fn requests_that_cannot_be_served_cost_the_connection_only() {
    type Bad = fn(&mut Guest);
    let bad: [Bad; 8] = [
        |g| drop(g.frontend.set_features(VERSION_1 | PROTOCOL | 1 << 34)),
        |g| drop(g.frontend.set_vring_num(0, 257)),
        |g| drop(g.frontend.set_vring_num(0, 3)),
        |g| {
            let mut regions = g.regions();
            regions[1].guest_phys_addr = 0x1000;
            drop(g.frontend.set_mem_table(&regions));
        },
        |g| {
            let mut regions = g.regions();
            regions[1].mmap_offset = 3 * REGION_BYTES;
            drop(g.frontend.set_mem_table(&regions));
        },
        |g| {
            let mut regions = g.regions();
            regions[1].memory_size = 1 << 46;
            drop(g.frontend.set_mem_table(&regions));
        },
        |g| {
            g.share_memory();
            g.set_ring(0, 0);
            g.set_ring(1, 0);
            let outside = addresses(REGIONS[1].1 + REGION_BYTES - 0x2800);
            g.frontend.set_vring_addr(1, &outside).unwrap();
            g.frontend.set_vring_enable(0, true).unwrap();
            drop(g.frontend.set_vring_enable(1, true));
        },
        |g| {
            // Without VIRTIO_F_VERSION_1.
            g.frontend.set_features(PROTOCOL).unwrap();
            g.share_memory();
            g.set_ring(0, 0);
            g.set_ring(1, 0);
            g.frontend.set_vring_enable(0, true).unwrap();
            drop(g.frontend.set_vring_enable(1, true));
        },
    ];
    let bench = Bench::new(false);
    for (at, act) in bad.into_iter().enumerate() {
        let mut guest = Guest::connect(&bench.path());
        guest.negotiate(VERSION_1 | PROTOCOL);
        act(&mut guest);
        assert!(guest.frontend.get_features().is_err(), "case {at}");
        assert_eq!(bench.server.stats().refused, at as u64 + 1);
        bench.expect_nothing();
    }
    Guest::connect(&bench.path()).start();
    bench.next_attach();
}

#[test]
fn a_ring_that_is_none_is_refused() {
    let bench = Bench::new(false);
    // SET_VRING_NUM of ring 2; then SET_VRING_KICK of ring 0 without a descriptor is well-formed.
    let wire = UnixStream::connect(bench.path()).unwrap();
    request(&wire, 13, &0x100_u64.to_le_bytes());
    request(&wire, 8, &[2, 0, 0, 0, 128, 0, 0, 0]);
    expect_end(&wire);
    let stats = bench.server.stats();
    assert_eq!((stats.requests, stats.refused), (1, 1));
}

fn request(mut wire: &UnixStream, code: u32, body: &[u8]) {
    let mut bytes = Vec::new();
    for word in [code, 1, body.len() as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    wire.write_all(&bytes).unwrap();
}

#[test]
fn rings_may_be_enabled_before_features_are_acknowledged() {
    let bench = Bench::new(false);
    let wire = UnixStream::connect(bench.path()).unwrap();
    // SET_VRING_ENABLE of both, as QEMU 7.2 sends it, and never again.
    request(&wire, 18, &[0, 0, 0, 0, 1, 0, 0, 0]);
    request(&wire, 18, &[1, 0, 0, 0, 1, 0, 0, 0]);
    let mut guest = Guest::over(Frontend::from_stream(wire.try_clone().unwrap(), 2));
    guest.negotiate(VERSION_1 | PROTOCOL);
    guest.share_memory();
    guest.set_ring(0, 0);
    bench.expect_nothing();
    guest.set_ring(1, 0);
    bench.next_attach();
    assert_eq!(bench.server.stats().refused, 0);

    drop((wire, guest));
    bench.expect_detach();
    let wire = UnixStream::connect(bench.path()).unwrap();
    request(&wire, 18, &[2, 0, 0, 0, 1, 0, 0, 0]);
    expect_end(&wire);
    assert_eq!(bench.server.stats().refused, 1, "there is no ring 2");
}

#[test]
fn a_server_ends_while_a_front_end_is_in_the_middle_of_a_request() {
    let bench = Bench::new(false);
    let mut wire = UnixStream::connect(bench.path()).unwrap();
    wire.write_all(&[1, 0, 0, 0, 1, 0]).unwrap();
    let path = bench.path();
    drop(bench.server);
    expect_end(&wire);
    assert!(!path.exists());
}

#[test]
fn a_socket_in_use_and_a_file_are_left_alone() {
    let bench = Bench::new(false);
    let again = |path: &Path| {
        let (told, _) = channel();
        let side = Recorder {
            told,
            queues: None,
            used: 0,
            broken: false,
        };
        VhostUserServer::bind(path, side, OFFER).map(drop)
    };
    let path = bench.path();
    assert!(matches!(again(&path), Err(SocketError::InUse(_))));
    let file = bench.folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(matches!(again(&file), Err(SocketError::NotASocket(_))));
    assert!(matches!(
        again(Path::new("/nonexistent/s")),
        Err(SocketError::Io { .. })
    ));
    let stale = bench.folder.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    again(&stale).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes over the socket, the server ends the connection or waits for more, and serves
    /// the next front-end.
    #[test]
    fn any_bytes_leave_the_server_alive(
        requests in proptest::collection::vec(
            (0u32..48, proptest::collection::vec(any::<u8>(), 0..48), any::<bool>()), 1..12),
    ) {
        let bench = Bench::new(false);
        let wire = UnixStream::connect(bench.path()).unwrap();
        for (code, body, honest) in requests {
            let length = if honest { body.len() as u32 } else { 4096 };
            let mut bytes = Vec::new();
            for word in [code, 1, length] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            bytes.extend_from_slice(&body);
            if (&wire).write_all(&bytes).is_err() {
                break;
            }
        }
        wire.shutdown(std::net::Shutdown::Both).unwrap();
        drop(wire);
        Guest::connect(&bench.path()).start();
        bench.next_attach();
    }
}
