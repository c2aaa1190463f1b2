//! NICs over AF_XDP on both ends of a veth pair, each test in a network namespace of its own.

use std::time::{Duration, Instant};

use super::*;
use crate::frame::Buffer;
use crate::nic::conformance::{self, Cable, conformance};
use crate::nic::testing::{bring_up, in_namespace, ip, make_veth, set_queues};
use crate::ring::{GuestRam, Pages, Segment};
use crate::stats::WorkerStats;

mod down_tests;
mod gather_tests;
mod guest_tests;
mod link_tests;
mod membership_tests;
mod queue_tests;
mod shared_tests;

const NEAR: Mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
const FAR: Mac = [0x52, 0x54, 0, 0xc0, 0x10, 2];
const HOST: Mac = [0x52, 0x54, 0, 0xc0, 0x20, 1];
const SLOTS: u32 = 256;

/// With the veth pair `a0` and `a1`.
fn with_veth(queues: u32, mtu: u32, test: impl FnOnce() + Send + 'static) {
    in_namespace(move || {
        make_veth(queues, mtu);
        test();
    });
}

/// A veth pair, at the far end of which the other station is.
#[derive(Clone, Copy)]
struct Veth(XdpNicMode);

impl Cable for Veth {
    type End = XdpNic;

    fn lay(&self, mtu: u32) {
        make_veth(1, mtu);
    }

    fn interfaces(&self) -> [&'static str; 2] {
        ["a1", "a0"]
    }

    fn open(&self, mtu: u16, filter: Filter) -> XdpNic {
        XdpNic::open(XdpNicConfig {
            mode: self.0,
            mtu,
            filter,
            ..config("a1", conformance::GUEST)
        })
        .unwrap()
    }

    fn kept_away(&self, nic: &XdpNic) -> u64 {
        let program = nic.common.control().program.counters();
        program.unwrap().guest_dropped_frames
    }

    fn stop(&self, _nic: &XdpNic) {
        // The ring is as long as it is, until it is flushed.
    }

    fn go_on(&self) {}

    fn remove(&self) {
        ip("link del a1");
    }

    fn replace(&self) {
        make_veth(1, 1500);
    }
}

mod driver {
    use super::*;

    conformance!(Veth(XdpNicMode::Driver));
}

mod generic {
    use super::*;

    conformance!(Veth(XdpNicMode::Generic));
}

/// A NIC with its frames and the RAM of its guest.
struct End {
    nic: XdpNic,
    frames: FramePool,
    ram: Arc<GuestRam>,
    stats: Arc<WorkerStats>,
}

impl End {
    fn new(config: XdpNicConfig) -> Self {
        let mut end = Self::of(XdpNic::open(config).unwrap());
        // The carrier of a veth pair comes a moment after it is up.
        end.until(|end| end.nic.has_link.then_some(()));
        end
    }

    fn of(mut nic: XdpNic) -> Self {
        let ram = Arc::new(GuestRam::new(4 << 20, Pages::Small).unwrap());
        let stats = Arc::<WorkerStats>::default();
        let area = ram.area().clone();
        let mut frames = FramePool::in_area(area, SLOTS, nic.slot_bytes(), stats.clone()).unwrap();
        frames.set_guest(ram.clone());
        nic.start(&mut frames).unwrap();
        Self {
            nic,
            frames,
            ram,
            stats,
        }
    }

    fn flush(&mut self) {
        self.nic.flush(&mut self.frames).unwrap();
    }

    /// Works as a worker does until there is an answer.
    fn until<T>(&mut self, mut answer: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(30) {
            self.flush();
            if let Some(answer) = answer(self) {
                return answer;
            }
            let mut fds = Vec::new();
            self.nic.poll_fds(true, false, &mut fds);
            // SAFETY: the pollfds live through the call.
            unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 10) };
        }
        panic!("nothing comes: {:?}", self.nic.counters());
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let mut out = VecDeque::new();
        self.nic.receive(&mut self.frames, &mut out, 1).unwrap();
        let token = out.pop_front()?;
        let bytes = self.frames.bytes(&token).to_vec();
        self.frames.release(token);
        Some(bytes)
    }

    fn receive(&mut self) -> Vec<u8> {
        self.until(Self::take)
    }

    fn send(&mut self, bytes: &[u8]) {
        let token = self.frames.from_bytes(bytes).unwrap();
        let sent = self.nic.send(&mut self.frames, token);
        assert!(matches!(sent, Sent::Done), "{sent:?}");
        self.flush();
    }

    /// A frame whose first bytes lie in a slot, the rest in two places of the guest.
    fn keep(&mut self, buffer: Buffer, whole: &[u8], gpa: u64) -> Token {
        let (head, rest) = whole.split_at(128);
        let (first, second) = rest.split_at(700);
        let rest = [(gpa, first), (0x80001, second)].map(|(gpa, bytes)| {
            self.ram.write(gpa, bytes).unwrap();
            let len = bytes.len() as u32;
            Segment { gpa, len }
        });
        let token = self.frames.keep_in_place(buffer, &rest, |slot| {
            slot[..128].copy_from_slice(head);
            Some(128)
        });
        token.unwrap()
    }

    fn counter(&self, name: &str) -> u64 {
        let all = self.nic.counters();
        all.into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// Frames that were copied into one piece, for whatever cause.
    fn gathered(&self) -> u64 {
        ["one_piece", "many_pieces", "outside"]
            .map(|cause| self.counter(&format!("tx_gathered_{cause}_frames")))
            .iter()
            .sum()
    }

    /// No frame is on its way.
    fn is_idle(&self) -> Option<()> {
        let in_flight = |queue: &Queue| queue.in_flight() > 0;
        (!self.nic.queues.iter().any(in_flight)).then_some(())
    }

    fn end(mut self) {
        self.nic.recall(&mut self.frames);
        assert_eq!(self.frames.free_slots(), SLOTS as usize);
    }
}

fn config(interface: &str, mac: Mac) -> XdpNicConfig {
    XdpNicConfig {
        groups: Groups::Guest,
        ..XdpNicConfig::new(interface, mac, 1500, Filter::Guest(mac))
    }
}

fn pair(mode: XdpNicMode) -> (End, End) {
    let [near, far] = [config("a0", NEAR), config("a1", FAR)].map(|mut config| {
        config.mode = mode;
        End::new(config)
    });
    (near, far)
}

/// Sends by a queue of `near`, which comes by the same queue of the other end.
fn send_by(near: &mut End, queue: usize, bytes: &[u8]) {
    near.nic.queues.swap(0, queue);
    near.send(bytes);
    near.until(|end| end.is_idle());
    near.nic.queues.swap(0, queue);
}

fn frame(to: Mac, len: usize, seed: usize) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([0x52, 0x54, 0, 0xc0, 0x30, 1, 0x08, 0x00]);
    frame.extend((frame.len()..len).map(|n| (n * 31 + seed * 7) as u8));
    frame
}

#[test]
fn the_best_mode_is_chosen_and_all_is_accounted_for() {
    for (mode, chosen, said) in [
        (XdpNicMode::Auto, XdpNicMode::Driver, "driver"),
        (XdpNicMode::Driver, XdpNicMode::Driver, "driver"),
        (XdpNicMode::Generic, XdpNicMode::Generic, "generic"),
    ] {
        with_veth(1, 1500, move || {
            let (mut near, mut far) = pair(mode);
            assert_eq!(near.nic.mode(), chosen);
            let said = format!("af_xdp, {said}, copy, 1 queue");
            assert_eq!(near.nic.describe(), said);
            for n in 0..100 {
                near.send(&frame(FAR, 100, n));
                assert_eq!(far.receive(), frame(FAR, 100, n));
            }
            near.until(|end| end.is_idle());
            // The NIC is shared: this one goes to the host, whatever the guest may hear.
            far.nic.set_filter(Filter::DropAll).unwrap();
            near.send(&frame(HOST, 60, 3));
            far.until(|end| (end.counter("xdp_host_frames") == 1).then_some(()));
            near.until(|end| end.is_idle());
            for counter in ["strange_completions", "xsk_tx_invalid"] {
                assert_eq!(near.counter(counter), 0, "{counter}");
            }
            // One by one, so that a probe is among them.
            assert_eq!(far.counter("xdp_guest_frames"), 101);
            assert_eq!(far.counter("xdp_guest_unbound_frames"), 0);
            near.end();
            far.end();
        });
    }
}

/// A veth takes no program while its peer sends by more queues than it receives by.
#[test]
fn a_driver_that_takes_no_program_leaves_the_generic_way() {
    in_namespace(|| {
        ip(
            "link add a0 numtxqueues 2 numrxqueues 2 type veth peer name a1 numtxqueues 1 numrxqueues 1",
        );
        for name in ["a0", "a1"] {
            bring_up(name);
        }
        let refused = XdpNicConfig {
            mode: XdpNicMode::Driver,
            ..config("a1", FAR)
        };
        let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
        let mut nic = XdpNic::open(refused).unwrap();
        let (area, slot_bytes) = (ram.area().clone(), nic.slot_bytes());
        let mut frames = FramePool::in_area(area, SLOTS, slot_bytes, Arc::default()).unwrap();
        let why = nic.start(&mut frames).unwrap_err().to_string();
        assert!(why.contains("a1"), "{why}");

        let (mut near, mut far) = pair(XdpNicMode::Auto);
        assert_eq!(near.nic.mode(), XdpNicMode::Driver);
        assert_eq!(far.nic.mode(), XdpNicMode::Generic);
        assert_eq!(far.nic.describe(), "af_xdp, generic, copy, 1 queue");
        for n in 0..10 {
            near.send(&frame(FAR, 100, n));
            assert_eq!(far.receive(), frame(FAR, 100, n));
            far.send(&frame(NEAR, 1400, n));
            assert_eq!(near.receive(), frame(NEAR, 1400, n));
        }
        near.until(|end| end.is_idle());
        far.until(|end| end.is_idle());
        near.end();
        far.end();
    });
}

/// The kernel writes into slots of the host's pool only, however often each was used.
#[test]
fn rule_15_what_is_received_lies_in_the_hosts_pool() {
    for mode in [XdpNicMode::Driver, XdpNicMode::Generic] {
        with_veth(1, 1500, move || {
            let (mut near, mut far) = pair(mode);
            let (at, bytes) = far.frames.slots_place();
            let first = far.frames.area().base().addr() + at;
            for n in 0..3 * SLOTS as usize {
                let whole = frame(FAR, 1400, n);
                near.send(&whole);
                let mut out = VecDeque::new();
                let token = far.until(|end| {
                    let (nic, frames) = (&mut end.nic, &mut end.frames);
                    nic.receive(frames, &mut out, 1).unwrap();
                    out.pop_front()
                });
                for piece in far.frames.pieces(&token).as_slice() {
                    let from = piece.address.addr();
                    assert!(from >= first && from + piece.len <= first + bytes);
                }
                assert_eq!(far.frames.bytes(&token), whole);
                far.frames.release(token);
            }
            let mut ram = vec![1; far.ram.bytes() as usize];
            far.ram.read(0, &mut ram).unwrap();
            assert!(ram.iter().all(|byte| *byte == 0), "the guest's RAM");
            near.until(|end| end.is_idle());
            near.end();
            far.end();
        });
    }
}

#[test]
fn what_lies_in_the_guest_leaves_from_there() {
    with_veth(1, 1500, || {
        let (mut near, mut far) = pair(XdpNicMode::Auto);
        for (n, gpa) in [0x1003, 0x2fff, (4 << 20) - 700, 0x1003]
            .into_iter()
            .enumerate()
        {
            let whole = frame(FAR, 1400, n);
            let buffer = Buffer {
                life: 0,
                head: n as u16,
                descriptors: 1,
            };
            let token = near.keep(buffer, &whole, gpa);
            assert!(near.frames.in_place_bytes(&token) > 0);
            let sent = near.nic.send(&mut near.frames, token);
            assert!(matches!(sent, Sent::Done), "{sent:?}");
            near.until(|end| end.is_idle());
            let mut returned = Vec::new();
            near.frames.take_returned(&mut returned);
            assert_eq!(returned, [buffer]);
            assert_eq!(far.receive(), whole);
        }
        assert_eq!(near.gathered(), 0);
        assert_eq!(near.counter("xsk_tx_invalid"), 0);
        near.end();
        far.end();
    });
}

/// A frame that lies in the guest as a whole is one descriptor. Its buffer is the guest's again when the kernel
/// has given that back, not when it was queued, also when the same bytes are sent twice.
#[test]
fn what_lies_in_the_guest_as_a_whole_leaves_as_one_piece() {
    with_veth(1, 1500, || {
        let (mut near, mut far) = pair(XdpNicMode::Auto);
        let places = [0x5001, 0x2fff, (4 << 20) - 1400, 0x1003, 0x1003, 0x9000];
        let mut sent = Vec::new();
        for (n, &gpa) in places.iter().enumerate() {
            let whole = frame(FAR, 1400, n.min(3));
            near.ram.write(gpa, &whole).unwrap();
            let head = n as u16;
            let place = Segment { gpa, len: 1400 };
            let token = near.frames.keep_whole(
                Buffer {
                    head,
                    ..Buffer::default()
                },
                place,
            );
            let queued = near.nic.send(&mut near.frames, token.unwrap());
            assert!(matches!(queued, Sent::Done), "{queued:?}");
            sent.push(whole);
            if n == 2 {
                // Among them is one that begins in a slot.
                let token = near.frames.from_bytes(&frame(FAR, 60, 9)).unwrap();
                let queued = near.nic.send(&mut near.frames, token);
                assert!(matches!(queued, Sent::Done), "{queued:?}");
                sent.push(frame(FAR, 60, 9));
            }
        }
        // All of it is in the ring, a descriptor each, and the kernel has not been told.
        assert_eq!(near.nic.queues[0].socket.tx_unsubmitted(), 7);
        let mut returned = Vec::new();
        near.frames.take_returned(&mut returned);
        assert_eq!((near.frames.in_place(), returned.len()), (6, 0));
        near.until(|end| end.is_idle());
        near.frames.take_returned(&mut returned);
        returned.sort_by_key(|buffer| buffer.head);
        let heads: Vec<_> = returned.iter().map(|buffer| buffer.head).collect();
        assert_eq!((near.frames.in_place(), heads), (0, (0..6).collect()));
        for whole in sent {
            assert_eq!(far.receive(), whole);
        }
        assert_eq!(near.gathered(), 0);
        assert_eq!(near.counter("xsk_tx_invalid"), 0);
        assert_eq!(near.counter("strange_completions"), 0);
        near.end();
        far.end();
    });
}

/// A NIC that goes with such frames in its ring gives all of them back.
#[test]
fn what_lies_in_the_guest_comes_back_from_a_nic_that_goes() {
    with_veth(1, 1500, || {
        let (mut near, far) = pair(XdpNicMode::Auto);
        let place = Segment {
            gpa: 0x1000,
            len: 1400,
        };
        for head in 0..3 {
            let token = near.frames.keep_whole(
                Buffer {
                    head,
                    ..Buffer::default()
                },
                place,
            );
            let queued = near.nic.send(&mut near.frames, token.unwrap());
            assert!(matches!(queued, Sent::Done), "{queued:?}");
        }
        near.nic.recall(&mut near.frames);
        let mut returned = Vec::new();
        near.frames.take_returned(&mut returned);
        assert_eq!((near.frames.in_place(), returned.len()), (0, 3));
        near.end();
        far.end();
    });
}

#[test]
fn frames_longer_than_a_slot_are_dropped_and_counted() {
    with_veth(1, 9000, || {
        let mut near = End::new(XdpNicConfig {
            mtu: 9000,
            ..config("a0", NEAR)
        });
        let mut far = End::new(config("a1", FAR));
        near.send(&frame(FAR, 9014, 1));
        near.send(&frame(FAR, 100, 2));
        assert_eq!(far.receive(), frame(FAR, 100, 2));
        assert_eq!(far.counter("spoilt_frames"), 1);
        near.until(|end| end.is_idle());
        near.end();
        far.end();
    });
}

#[test]
fn broadcast_can_reach_both_the_guest_and_the_host() {
    for mode in [XdpNicMode::Driver, XdpNicMode::Generic] {
        with_veth(1, 1500, move || {
            let mut near = End::new(config("a0", NEAR));
            let mut far = End::new(XdpNicConfig {
                mode,
                groups: Groups::Copied,
                filter: Filter::DropAll,
                ..config("a1", FAR)
            });
            let group = [0x01, 0, 0x5e, 0, 0, 1];
            // Before its promotion the guest hears nothing, the host everything.
            near.send(&frame(group, 60, 1));
            far.until(|end| (end.counter("xdp_host_group_frames") == 1).then_some(()));
            far.until(|end| end.is_idle());
            assert_eq!(far.take(), None);
            near.send(&frame(group, 60, 2));
            far.until(|end| (end.counter("xdp_host_group_frames") == 2).then_some(()));

            // Not what came before, either.
            far.nic.set_filter(Filter::Guest(FAR)).unwrap();
            for n in 0..600 {
                let len = [60, 1514, 1518][n % 3];
                let to = [[0xff; 6], group, [0x33, 0x33, 0, 0, 0, 1]][n % 3];
                near.send(&frame(to, len, n));
                assert_eq!(far.receive(), frame(to, len, n), "{n}");
            }
            assert_eq!(far.counter("xdp_host_group_frames"), 602);
            assert_eq!(far.counter("group_copies_too_long"), 0);
            // What the host itself says is not heard by its guest.
            far.send(&frame([0xff; 6], 60, 7));
            ip("neigh add 10.99.0.7 lladdr ff:ff:ff:ff:ff:ff dev a1");
            ip("addr add 10.99.0.1/24 dev a1");
            let socket = std::net::UdpSocket::bind("10.99.0.1:0").unwrap();
            socket.send_to(b"hello", "10.99.0.7:9").unwrap();
            let heard = near.until(|end| end.take().filter(|frame| frame.ends_with(b"hello")));
            assert_eq!(heard[..6], [0xff; 6]);
            assert_eq!(far.take(), None);
            // Tags that the kernel takes out are put in again.
            let mut tagged = frame([0xff; 6], 12, 0);
            tagged.truncate(12);
            tagged.extend([0x81, 0, 0x20, 5]);
            tagged.extend(&frame([0xff; 6], 100, 3)[12..]);
            near.send(&tagged);
            assert_eq!(far.receive(), tagged);
            near.until(|end| end.is_idle());
            far.until(|end| end.is_idle());
            near.end();
            far.end();
        });
    }
}

#[test]
fn the_hosts_addresses_stay_with_the_host() {
    with_veth(1, 1500, || {
        let mut near = End::new(config("a0", NEAR));
        ip("addr add 10.99.0.1/24 dev a1");
        let mut far = End::new(config("a1", FAR));
        let mut arp = frame([0xff; 6], 14, 0);
        arp[12..14].copy_from_slice(&[8, 6]);
        arp.extend([0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9, 10, 99, 0, 9]);
        arp.extend([0, 0, 0, 0, 0, 0, 10, 99, 0, 1]);
        arp.resize(60, 0);
        near.send(&arp);
        far.until(|end| (end.counter("xdp_host_neighbour_frames") == 1).then_some(()));
        // One more address, and later one less, are seen by themselves.
        ip("addr add 10.99.0.2/24 dev a1");
        let second = IpAddr::from([10, 99, 0, 2]);
        far.until(|end| end.nic.host_addresses.contains(&second).then_some(()));
        arp[14 + 27] = 2;
        near.send(&arp);
        far.until(|end| (end.counter("xdp_host_neighbour_frames") == 2).then_some(()));
        ip("addr del 10.99.0.2/24 dev a1");
        far.until(|end| (!end.nic.host_addresses.contains(&second)).then_some(()));
        near.send(&arp);
        let asked = far.until(|end| end.take().filter(|frame| frame[12..14] == [8, 6]));
        assert_eq!(asked, arp);
    });
}

#[test]
fn what_cannot_be_used_is_named() {
    with_veth(2, 1500, || {
        let open = |interface: &str, mtu| {
            XdpNic::open(XdpNicConfig {
                mtu,
                ..config(interface, NEAR)
            })
        };
        let missing = open("nowhere", 1500).unwrap_err();
        assert!(missing.to_string().contains("\"nowhere\""), "{missing}");
        let wrong = open("lo", 1500).unwrap_err();
        assert!(wrong.to_string().contains("Ethernet"), "{wrong}");
        let long = open("a0", 9000).unwrap_err();
        assert!(matches!(long, XdpNicError::Mtu { mtu: 1500, .. }), "{long}");

        let mut frames = FramePool::new(SLOTS, 2048);
        let mut nic = XdpNic::open(XdpNicConfig {
            mode: XdpNicMode::ZeroCopy,
            ..config("a0", NEAR)
        })
        .unwrap();
        let refused = nic.start(&mut frames).unwrap_err().to_string();
        assert!(refused.contains("zero-copy"), "{refused}");
        assert_eq!(frames.free_slots(), SLOTS as usize);

        let mut first = open("a0", 1500).unwrap();
        first.start(&mut frames).unwrap();
        let mut other_frames = FramePool::new(SLOTS, 2048);
        let mut second = open("a0", 1500).unwrap();
        let refused = second.start(&mut other_frames).unwrap_err().to_string();
        assert!(refused.contains("another XDP program"), "{refused}");
        drop(first);

        let mut few = FramePool::new(2, 2048);
        let mut nic = open("a0", 1500).unwrap();
        let refused = nic.start(&mut few).unwrap_err().to_string();
        assert!(refused.contains("too few"), "{refused}");
        let mut small = FramePool::new(SLOTS, 1024);
        let refused = open("a0", 1500).unwrap().start(&mut small).unwrap_err();
        assert!(refused.to_string().contains("2048"), "{refused}");
    });
}
