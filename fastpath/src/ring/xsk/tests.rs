//! AF_XDP sockets on veth pairs, each test in a network namespace of its own.

use std::os::fd::{AsFd, FromRawFd, RawFd};
use std::process::Command;
use std::sync::Arc;

use colo_bpf::{Attach, AttachMode, Groups, GuestFrames, Mac, XdpProgram};

use colo_lab::seccomp::refuse_call;

use super::*;
use crate::ring::Area;

mod full_tests;
mod shared_tests;

const GUEST: Mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
const AREA_BYTES: usize = 4 << 20;
/// Where chunks to receive into start: at no border of anything.
const CHUNKS_AT: u64 = (1 << 20) + 123;

/// Runs in a thread whose network namespace dies with it, with the veth pair `a0` and `a1`, each
/// with `queues` queues.
fn with_veth(queues: u32, mtu: u32, test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        // SAFETY: unshare changes only the calling thread, which nothing else shares.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(unshared, 0, "needs root");
        let side = format!("numrxqueues {queues} numtxqueues {queues}");
        ip(&format!(
            "link add a0 mtu {mtu} {side} type veth peer name a1 mtu {mtu} {side}"
        ));
        ip("link set a0 up");
        ip("link set a1 up");
        test();
    })
    .join()
    .unwrap();
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// A memory file, mapped and registered.
struct Memory {
    area: Arc<Area>,
    umem: Umem,
}

impl Memory {
    fn new(settings: UmemSettings) -> Self {
        // SAFETY: the name is a constant C string; the call gives a new descriptor or -1.
        let fd = unsafe { libc::memfd_create(c"xsk-test".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: `fd` was just made and nobody else owns it.
        let file = unsafe { std::fs::File::from_raw_fd(fd) };
        file.set_len(AREA_BYTES as u64).unwrap();
        let area = Arc::new(Area::reserve(AREA_BYTES).unwrap());
        area.map_file(&file, 0, AREA_BYTES).unwrap();
        let umem = register(&area, settings).unwrap();
        Self { area, umem }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= AREA_BYTES);
        // SAFETY: inside the area, as just checked, which nothing else accesses now.
        unsafe {
            let to = self.area.base().add(offset as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    fn read(&self, offset: u64, len: u32) -> Vec<u8> {
        assert!(offset as usize + len as usize <= AREA_BYTES);
        let mut bytes = vec![0; len as usize];
        // SAFETY: as for `write`.
        unsafe {
            let from = self.area.base().add(offset as usize);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
        }
        bytes
    }
}

fn register(area: &Arc<Area>, settings: UmemSettings) -> Result<Umem, XskError> {
    let base = std::ptr::NonNull::new(area.base()).unwrap();
    let owner = Box::new(area.clone());
    // SAFETY: the area is mapped as long as `owner` lives, and the tests make no references to it.
    unsafe { Umem::register(base, area.mapped_bytes() as u64, settings, owner) }
}

fn small_rings() -> BindOptions {
    BindOptions {
        fill_entries: 64,
        completion_entries: 64,
        rx_entries: 64,
        tx_entries: 64,
        ..BindOptions::default()
    }
}

/// Binds as soon as the kernel has let go of the queue's last socket.
fn bind(umem: &Umem, interface: &str, queue: u32, options: &BindOptions) -> XskSocket {
    let interface = Interface::find(interface).unwrap();
    for _ in 0..10_000 {
        match XskSocket::bind(umem, &interface, queue, options) {
            Err(XskError::Busy { .. }) => std::thread::yield_now(),
            done => return done.unwrap(),
        }
    }
    panic!("the queue stays busy");
}

/// A program on `interface` that hands the guest's frames to these sockets.
fn program_for(interface: &str, mode: AttachMode, sockets: &[&XskSocket]) -> XdpProgram {
    let mut program = XdpProgram::load().unwrap();
    program.add_guest_mac(GUEST).unwrap();
    program.set_groups(Groups::Host).unwrap();
    program.set_guest_frames(GuestFrames::Accept).unwrap();
    for socket in sockets {
        program
            .set_guest_socket(socket.queue(), socket.as_fd())
            .unwrap();
    }
    program.attach(interface, Attach::Only(mode)).unwrap();
    program
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = GUEST.to_vec();
    frame.extend([0x52, 0x54, 0, 0xc0, 0x20, 1, 0x08, 0x00]);
    frame.extend((frame.len()..len).map(|n| (n as u8).wrapping_mul(31) ^ seed));
    frame
}

fn wait_readable(fd: RawFd) {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd on this stack.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 10_000) };
    assert_eq!(ready, 1, "no frame came");
}

fn fill_chunks(socket: &mut XskSocket, count: u64) {
    for n in 0..count {
        assert!(socket.fill(CHUNKS_AT + n * 4096).unwrap());
    }
    socket.submit_fill();
}

/// The next whole frame, and into how many pieces it came.
fn receive(memory: &Memory, socket: &mut XskSocket) -> (Vec<u8>, usize) {
    let (mut frame, mut pieces) = (Vec::new(), 0);
    loop {
        let Some(rx) = socket.receive() else {
            wait_readable(socket.poll_fd());
            continue;
        };
        let Rx::Piece(piece) = rx else {
            panic!("{rx:?}");
        };
        assert_eq!((piece.chunk - CHUNKS_AT) % 4096, 0, "{piece:?}");
        assert!(piece.len <= memory.umem.received_bytes_max(), "{piece:?}");
        frame.extend(memory.read(piece.offset, piece.len));
        pieces += 1;
        assert!(socket.fill(piece.chunk).unwrap());
        if !piece.more {
            socket.release_rx();
            socket.submit_fill();
            return (frame, pieces);
        }
    }
}

fn send(socket: &mut XskSocket, pieces: &[(u64, u32)]) {
    assert!(socket.tx_free(pieces.len() as u32) >= pieces.len() as u32);
    for (n, &(offset, len)) in pieces.iter().enumerate() {
        let more = n + 1 < pieces.len();
        assert!(socket.send(Descriptor { offset, len, more }).unwrap());
    }
    socket.submit_tx();
    assert_eq!(socket.kick_tx().unwrap(), Kick::Done);
}

/// Waits until what was sent is ours again.
fn complete(socket: &mut XskSocket, count: usize) -> Vec<u64> {
    let mut done = Vec::new();
    for _ in 0..1_000_000 {
        while let Some(offset) = socket.complete() {
            done.push(offset);
        }
        socket.release_completions();
        if done.len() == count {
            return done;
        }
        std::thread::yield_now();
    }
    panic!("{done:?} of {count} completed");
}

#[test]
fn frames_travel_from_any_offset_in_driver_and_generic_mode() {
    for mode in [AttachMode::Driver, AttachMode::Generic] {
        with_veth(1, 1500, move || {
            let memory = Memory::new(UmemSettings::default());
            let mut near = bind(&memory.umem, "a0", 0, &small_rings());
            let mut far = bind(&memory.umem, "a1", 0, &small_rings());
            assert!(!near.is_zero_copy());
            fill_chunks(&mut far, 8);
            let program = program_for("a1", mode, &[&far]);
            let table = [
                (0, 60),
                (1, 61),
                (4095, 1514),
                (4096 + 3000, 1514), // Across a page.
                ((1 << 20) - 77, 77),
                (AREA_BYTES as u64 - 200, 200),
            ];
            for (round, (offset, len)) in table.into_iter().enumerate() {
                let sent = frame(len, round as u8);
                memory.write(offset, &sent);
                send(&mut near, &[(offset, len as u32)]);
                assert_eq!(receive(&memory, &mut far), (sent, 1), "at {offset}");
                // Linux 6.18 uses bit 0 of a frame's first offset for itself.
                assert_eq!(complete(&mut near, 1)[0] & !1, offset & !1);
            }
            let counters = program.counters().unwrap();
            assert_eq!(counters.guest_frames, table.len() as u64);
            assert_eq!(far.statistics().unwrap(), XskStatistics::default());
        });
    }
}

#[test]
fn aligned_chunks_with_headroom_work_too() {
    with_veth(1, 1500, || {
        let memory = Memory::new(UmemSettings {
            chunk_bytes: 2048,
            unaligned: false,
            headroom_bytes: 64,
        });
        let mut near = bind(&memory.umem, "a0", 0, &small_rings());
        let mut far = bind(&memory.umem, "a1", 0, &small_rings());
        assert!(far.fill(0x10800).unwrap());
        assert!(far.fill(0x10801).is_err());
        far.submit_fill();
        let _program = program_for("a1", AttachMode::Driver, &[&far]);
        let sent = frame(1514, 9);
        memory.write(0x800, &sent);
        send(&mut near, &[(0x800, 1514)]);
        wait_readable(far.poll_fd());
        let Some(Rx::Piece(piece)) = far.receive() else {
            panic!("a piece inside the area");
        };
        assert_eq!((piece.chunk, piece.more), (0x10800, false));
        assert!(piece.offset >= 0x10800 + 64);
        assert_eq!(memory.read(piece.offset, piece.len), sent);
    });
}

#[test]
fn unaligned_chunks_with_headroom_are_found() {
    with_veth(1, 1500, || {
        let memory = Memory::new(UmemSettings {
            headroom_bytes: 128,
            ..UmemSettings::default()
        });
        let mut near = bind(&memory.umem, "a0", 0, &small_rings());
        let mut far = bind(&memory.umem, "a1", 0, &small_rings());
        fill_chunks(&mut far, 2);
        let _program = program_for("a1", AttachMode::Driver, &[&far]);
        let sent = frame(1000, 5);
        memory.write(77, &sent);
        send(&mut near, &[(77, 1000)]);
        assert_eq!(receive(&memory, &mut far), (sent, 1));
    });
}

#[test]
fn a_frame_is_gathered_from_pieces_and_a_jumbo_frame_arrives_in_pieces() {
    for mode in [AttachMode::Driver, AttachMode::Generic] {
        with_veth(1, 9000, move || {
            let memory = Memory::new(UmemSettings::default());
            let mut near = bind(&memory.umem, "a0", 0, &small_rings());
            let mut far = bind(&memory.umem, "a1", 0, &small_rings());
            fill_chunks(&mut far, 16);
            let _program = program_for("a1", mode, &[&far]);

            let small = frame(1400, 1);
            memory.write(500, &small[..54]);
            memory.write(70_001, &small[54..]);
            send(&mut near, &[(500, 54), (70_001, 1346)]);
            assert_eq!(receive(&memory, &mut far).0, small);
            assert_eq!(complete(&mut near, 2), [500, 70_001], "in order");

            let jumbo = frame(9014, 2);
            let places = [(10, 54), (20_000, 4096), (30_001, 4096), (90_002, 768)];
            let mut from = 0;
            for (offset, len) in places {
                memory.write(offset, &jumbo[from..from + len as usize]);
                from += len as usize;
            }
            for _ in 0..20 {
                send(&mut near, &places);
                let (received, pieces) = receive(&memory, &mut far);
                assert_eq!(received, jumbo);
                assert!(pieces >= 3, "{pieces} pieces");
                let offsets = places.map(|(offset, _)| offset);
                assert_eq!(complete(&mut near, 4), offsets, "in order");
            }
            assert_eq!(near.statistics().unwrap().tx_invalid, 0);
        });
    }
}

#[test]
fn each_queue_gets_what_came_by_it_from_one_registration() {
    with_veth(3, 1500, || {
        let memory = Memory::new(UmemSettings::default());
        let interface = Interface::find("a1").unwrap();
        assert_eq!(interface.rx_queues().unwrap(), 3);
        let mut near: Vec<_> = (0..3)
            .map(|queue| bind(&memory.umem, "a0", queue, &small_rings()))
            .collect();
        let mut far: Vec<_> = (0..3)
            .map(|queue| bind(&memory.umem, "a1", queue, &small_rings()))
            .collect();
        for (n, socket) in (0..).zip(&mut far) {
            assert!(socket.fill(CHUNKS_AT + n * 4096).unwrap());
            socket.submit_fill();
        }
        let _program = program_for("a1", AttachMode::Driver, &far.iter().collect::<Vec<_>>());
        for queue in [2, 0, 1] {
            let sent = frame(100, queue as u8);
            memory.write(1000 * queue as u64, &sent);
            send(&mut near[queue], &[(1000 * queue as u64, 100)]);
            assert_eq!(receive(&memory, &mut far[queue]).0, sent);
        }
        let none = XskSocket::bind(&memory.umem, &interface, 3, &small_rings()).unwrap_err();
        assert!(
            matches!(&none, XskError::NoQueue { interface, queue: 3, queues: 3 }
                if interface == "a1"),
            "{none}"
        );
    });
}

#[test]
fn two_sockets_of_one_queue_share_its_fill_ring() {
    with_veth(1, 1500, || {
        let memory = Memory::new(UmemSettings::default());
        let mut near = bind(&memory.umem, "a0", 0, &small_rings());
        let mut first = bind(&memory.umem, "a1", 0, &small_rings());
        let mut second = XskReceiver::beside(&first, 64).unwrap();
        fill_chunks(&mut first, 4);
        let mut program = program_for("a1", AttachMode::Driver, &[&first]);
        program
            .set_link_channel(colo_bpf::LinkChannel {
                ethertype: Some(colo_bpf::LINK_ETHERTYPE),
                udp_port: None,
            })
            .unwrap();
        program.set_link_socket(0, second.as_fd()).unwrap();
        let to_guest = frame(60, 1);
        let mut to_link = frame(60, 2);
        to_link[5] = 9;
        to_link[12..14].copy_from_slice(&colo_bpf::LINK_ETHERTYPE.to_be_bytes());
        memory.write(0, &to_guest);
        memory.write(100, &to_link);
        send(&mut near, &[(100, 60)]);
        send(&mut near, &[(0, 60)]);
        wait_readable(second.poll_fd());
        let Some(Rx::Piece(piece)) = second.receive() else {
            panic!("the link's frame");
        };
        assert_eq!(memory.read(piece.offset, piece.len), to_link);
        assert_eq!(receive(&memory, &mut first).0, to_guest);
        assert_eq!(memory.umem.usage().registrations, 1);

        // Another one with rings of its own is refused, as those of other programs are.
        let busy = XskSocket::bind(&memory.umem, first.interface(), 0, &small_rings());
        let busy = busy.unwrap_err();
        assert!(
            matches!(&busy, XskError::Busy { interface, queue: 0 } if interface == "a1"),
            "{busy}"
        );
    });
}

#[test]
fn a_queue_in_use_is_refused_by_name_until_it_is_free() {
    with_veth(1, 1500, || {
        let (memory, other) = (
            Memory::new(UmemSettings::default()),
            Memory::new(UmemSettings::default()),
        );
        let first = bind(&memory.umem, "a0", 0, &small_rings());
        let busy = XskSocket::bind(&other.umem, first.interface(), 0, &small_rings()).unwrap_err();
        assert!(
            matches!(&busy, XskError::Busy { interface, queue: 0 } if interface == "a0"),
            "{busy}"
        );
        drop(first);
        // After a refusal the area is registered anew.
        bind(&other.umem, "a0", 0, &small_rings());
        bind(&memory.umem, "a0", 0, &small_rings());
    });
}

#[test]
fn the_kernel_says_when_it_wants_to_be_woken() {
    with_veth(1, 1500, || {
        let memory = Memory::new(UmemSettings::default());
        for need_wakeup in [true, false] {
            let options = BindOptions {
                need_wakeup,
                ..small_rings()
            };
            let socket = bind(&memory.umem, "a0", 0, &options);
            // In copy mode nobody looks at the tx ring unless told to, whatever was asked for.
            assert!(socket.tx_needs_wakeup());
            assert!(!socket.fill_needs_wakeup());
            assert_eq!(socket.wake_rx().unwrap(), Kick::Done);
        }
    });
}

#[test]
fn an_interface_that_goes_down_and_up_keeps_its_sockets() {
    with_veth(1, 1500, || {
        let memory = Memory::new(UmemSettings::default());
        let mut near = bind(&memory.umem, "a0", 0, &small_rings());
        let mut far = bind(&memory.umem, "a1", 0, &small_rings());
        fill_chunks(&mut far, 4);
        let _program = program_for("a1", AttachMode::Driver, &[&far]);
        let sent = frame(300, 3);
        memory.write(0, &sent);
        assert!(near.interface().has_link().unwrap());
        for _ in 0..3 {
            ip("link set a0 down");
            assert!(!near.interface().has_link().unwrap());
            let piece = Descriptor {
                offset: 0,
                len: 300,
                more: false,
            };
            assert!(near.send(piece).unwrap());
            near.submit_tx();
            assert_eq!(near.kick_tx().unwrap(), Kick::Down);
            assert_eq!(near.tx_pending(), 1);
            ip("link set a0 up");
            assert_eq!(near.kick_tx().unwrap(), Kick::Done);
            assert_eq!(near.tx_pending(), 0);
            assert_eq!(receive(&memory, &mut far).0, sent);
            assert_eq!(complete(&mut near, 1), [0]);
        }
        ip("link del a0");
        assert!(matches!(
            near.interface().has_link(),
            Err(InterfaceError::Missing(_))
        ));
        assert_eq!(near.kick_tx().unwrap(), Kick::Down);
        let gone = XskSocket::bind(&memory.umem, near.interface(), 0, &small_rings());
        assert!(gone.is_err());
    });
}

#[test]
fn what_the_kernel_drops_is_counted() {
    with_veth(1, 1500, || {
        let memory = Memory::new(UmemSettings::default());
        let mut near = bind(&memory.umem, "a0", 0, &small_rings());
        let options = BindOptions {
            rx_entries: 2,
            ..small_rings()
        };
        let mut far = bind(&memory.umem, "a1", 0, &options);
        let _program = program_for("a1", AttachMode::Driver, &[&far]);
        memory.write(0, &frame(60, 0));
        send(&mut near, &[(0, 60)]);
        complete(&mut near, 1);
        let empty = far.statistics().unwrap();
        assert!(empty.fill_ring_empty + empty.rx_dropped > 0, "{empty:?}");

        fill_chunks(&mut far, 8);
        for _ in 0..4 {
            send(&mut near, &[(0, 60)]);
            complete(&mut near, 1);
        }
        let full = far.statistics().unwrap();
        assert_eq!(full.rx_ring_full, 2, "{full:?}");
        assert!(far.receive().is_some() && far.receive().is_some());
        assert_eq!(far.receive(), None);
    });
}

#[test]
fn places_outside_the_area_never_reach_the_kernel() {
    with_veth(1, 1500, || {
        let memory = Memory::new(UmemSettings::default());
        let mut socket = bind(&memory.umem, "a0", 0, &small_rings());
        let end = AREA_BYTES as u64;
        for offset in [end, end - 4095, u64::MAX, 1 << 48] {
            assert!(socket.fill(offset).is_err(), "{offset:#x}");
        }
        assert!(socket.fill(end - 4096).unwrap());
        for (offset, len) in [
            (0, 0),
            (0, 4097),
            (end - 59, 60),
            (end, 1),
            (u64::MAX, 60),
            (1 << 48, 60),
        ] {
            let piece = Descriptor {
                offset,
                len,
                more: false,
            };
            assert!(socket.send(piece).is_err(), "{piece:?}");
        }
        assert_eq!(socket.tx_unsubmitted(), 0);
        for n in 0..65 {
            let piece = Descriptor {
                offset: n,
                len: 60,
                more: false,
            };
            assert_eq!(socket.send(piece).unwrap(), n < 64);
        }
        assert_eq!(socket.tx_unsubmitted(), 64);
    });
}

#[test]
fn what_cannot_be_bound_is_named() {
    with_veth(1, 1500, || {
        let missing = Interface::find("nowhere").unwrap_err();
        assert!(missing.to_string().contains("\"nowhere\""), "{missing}");
        assert!(Interface::find("a\0b").is_err());
        let memory = Memory::new(UmemSettings::default());
        let interface = Interface::find("a0").unwrap();
        assert_eq!(interface.mtu().unwrap(), 1500);
        assert_ne!(interface.mac().unwrap(), [0; 6]);
        assert!(interface.strips_tags().is_ok());
        assert!(interface.addresses().is_ok());

        let zero_copy = BindOptions {
            copy_mode: CopyMode::ZeroCopy,
            ..small_rings()
        };
        let refused = XskSocket::bind(&memory.umem, &interface, 0, &zero_copy).unwrap_err();
        assert!(
            matches!(&refused, XskError::NoZeroCopy { interface, .. } if interface == "a0"),
            "{refused}"
        );
        for entries in [0, 3, 1 << 16] {
            let options = BindOptions {
                tx_entries: entries,
                ..small_rings()
            };
            let refused = XskSocket::bind(&memory.umem, &interface, 0, &options).unwrap_err();
            assert!(
                matches!(refused, XskError::BadRing { ring: "tx", .. }),
                "{refused}"
            );
        }
        // After the refusal, the same registration serves in copy mode.
        let mut near = bind(&memory.umem, "a0", 0, &small_rings());
        let mut far = bind(&memory.umem, "a1", 0, &small_rings());
        assert_eq!(memory.umem.usage().registrations, 1);
        assert_eq!(sys::seam::registrations(), 1);
        fill_chunks(&mut far, 2);
        let _program = program_for("a1", AttachMode::Driver, &[&far]);
        memory.write(0, &frame(80, 4));
        send(&mut near, &[(0, 80)]);
        assert_eq!(receive(&memory, &mut far).0, frame(80, 4));
        assert_eq!(complete(&mut near, 1), [0]);
    });
}

#[test]
fn memory_that_does_not_suit_is_refused() {
    let area = Arc::new(Area::reserve(AREA_BYTES).unwrap());
    let settings = UmemSettings::default();
    let nothing = register(&area, settings).unwrap_err();
    assert!(matches!(nothing, XskError::BadArea { .. }), "{nothing}");
    area.map_anonymous(AREA_BYTES).unwrap();
    for bad in [
        UmemSettings {
            chunk_bytes: 1024,
            ..settings
        },
        UmemSettings {
            chunk_bytes: 3000,
            ..settings
        },
        UmemSettings {
            headroom_bytes: 4096 - 256,
            ..settings
        },
    ] {
        let refused = register(&area, bad).unwrap_err();
        assert!(matches!(refused, XskError::BadArea { .. }), "{refused}");
    }
    // Twice as long as what is mapped.
    let holes = Arc::new(Area::reserve(2 * AREA_BYTES).unwrap());
    holes.map_anonymous(AREA_BYTES).unwrap();
    let base = std::ptr::NonNull::new(holes.base()).unwrap();
    let owner = Box::new(holes.clone());
    // SAFETY: the kernel checks that the area is mapped, which is what is tested.
    let refused = unsafe { Umem::register(base, 2 * AREA_BYTES as u64, settings, owner) };
    assert!(refused.is_err());
}

/// Keeps CAP_NET_RAW only; `struct __user_cap_data_struct`, version 3.
fn keep_raw_sockets_only() {
    const CAP_NET_RAW: u32 = 1 << 13;
    let header = [0x2008_0522_u32, 0];
    let sets = [CAP_NET_RAW, CAP_NET_RAW, 0, 0, 0, 0];
    // SAFETY: both arrays have the sizes of version 3, and the kernel only reads them; the call
    // changes only this thread, which ends with the test.
    let answer = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(answer, 0);
}

#[test]
fn too_little_locked_memory_is_named() {
    std::thread::spawn(|| {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: writes one rlimit on this stack.
        let answer = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
        assert_eq!(answer, 0);
        limit.rlim_cur = limit.rlim_max.min(64 << 10);
        // SAFETY: reads one rlimit; the other tests have CAP_IPC_LOCK, which goes over the limit.
        let answer = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
        assert_eq!(answer, 0);
        keep_raw_sockets_only();
        let area = Arc::new(Area::reserve(AREA_BYTES).unwrap());
        area.map_anonymous(AREA_BYTES).unwrap();
        let refused = register(&area, UmemSettings::default()).unwrap_err();
        assert!(
            matches!(refused, XskError::LockedMemory { .. }),
            "{refused}"
        );
        assert!(refused.to_string().contains("4 MiB"), "{refused}");
        assert!(
            refused.to_string().contains("once for all queues"),
            "{refused}"
        );
        assert!(refused.to_string().contains("RLIMIT_MEMLOCK"), "{refused}");
    })
    .join()
    .unwrap();
}

#[test]
fn a_kernel_without_af_xdp_is_named_and_what_to_use_instead() {
    std::thread::spawn(|| {
        let area = Arc::new(Area::reserve(AREA_BYTES).unwrap());
        area.map_anonymous(AREA_BYTES).unwrap();
        refuse_call(libc::SYS_socket, 0, libc::AF_XDP as u32, libc::EAFNOSUPPORT).unwrap();
        let refused = register(&area, UmemSettings::default()).unwrap_err();
        assert!(matches!(refused, XskError::NoAfXdp), "{refused}");
        assert!(refused.to_string().contains("a TAP device (net.tap)"));
        assert!(refused.to_string().contains("replication.packets"));
    })
    .join()
    .unwrap();
}

#[test]
fn without_permission_it_says_so() {
    std::thread::spawn(|| {
        let header = [0x2008_0522_u32, 0];
        let none = [0_u32; 6];
        // SAFETY: as in `keep_raw_sockets_only`.
        let answer = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
        assert_eq!(answer, 0);
        let area = Arc::new(Area::reserve(AREA_BYTES).unwrap());
        area.map_anonymous(AREA_BYTES).unwrap();
        let refused = register(&area, UmemSettings::default()).unwrap_err();
        assert!(matches!(refused, XskError::NotPermitted(_)), "{refused}");
        assert!(refused.to_string().contains("CAP_NET_RAW"), "{refused}");
    })
    .join()
    .unwrap();
}
