//! NICs over AF_XDP on both ends of a veth pair, each test in a network namespace of its own.

use std::os::fd::FromRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::frame::Buffer;
use crate::ring::{GuestRam, Pages, Segment};
use crate::stats::WorkerStats;

mod link_tests;

const NEAR: Mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
const FAR: Mac = [0x52, 0x54, 0, 0xc0, 0x10, 2];
const HOST: Mac = [0x52, 0x54, 0, 0xc0, 0x20, 1];
const SLOTS: u32 = 256;

/// Runs in a thread whose network namespace dies with it, with the veth pair `a0` and `a1`.
fn with_veth(queues: u32, mtu: u32, test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        // SAFETY: unshare changes only the calling thread, which nothing else shares.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(unshared, 0, "needs root");
        make_veth(queues, mtu);
        test();
    })
    .join()
    .unwrap();
}

fn make_veth(queues: u32, mtu: u32) {
    let side = format!("mtu {mtu} numrxqueues {queues} numtxqueues {queues}");
    ip(&format!("link add a0 {side} type veth peer name a1 {side}"));
    for name in ["a0", "a1"] {
        // The host says nothing by itself.
        ip(&format!("link set {name} addrgenmode none"));
        ip(&format!("link set {name} up"));
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// A NIC with its frames and the RAM of its guest.
struct End {
    nic: XdpNic,
    frames: FramePool,
    ram: Arc<GuestRam>,
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
        let mut frames = FramePool::in_area(area, SLOTS, nic.slot_bytes(), stats).unwrap();
        frames.set_guest(ram.clone());
        nic.start(&mut frames).unwrap();
        Self { nic, frames, ram }
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

    fn counter(&self, name: &str) -> u64 {
        let all = self.nic.counters();
        all.into_iter().find(|(n, _)| *n == name).unwrap().1
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

fn frame(to: Mac, len: usize, seed: usize) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([0x52, 0x54, 0, 0xc0, 0x30, 1, 0x08, 0x00]);
    frame.extend((frame.len()..len).map(|n| (n * 31 + seed * 7) as u8));
    frame
}

#[test]
fn frames_travel_both_ways_in_every_mode() {
    for (mode, chosen, said) in [
        (
            XdpNicMode::Auto,
            XdpNicMode::Driver,
            "af_xdp, driver, copy, 1 queue",
        ),
        (
            XdpNicMode::Driver,
            XdpNicMode::Driver,
            "af_xdp, driver, copy, 1 queue",
        ),
        (
            XdpNicMode::Generic,
            XdpNicMode::Generic,
            "af_xdp, generic, copy, 1 queue",
        ),
    ] {
        with_veth(1, 1500, move || {
            let (mut near, mut far) = pair(mode);
            assert_eq!(near.nic.mode(), chosen);
            assert_eq!(near.nic.describe(), said);
            for (n, len) in [60, 61, 590, 1514, 1518].into_iter().enumerate() {
                near.send(&frame(FAR, len, n));
                assert_eq!(far.receive(), frame(FAR, len, n));
                far.send(&frame(NEAR, len, n + 9));
                assert_eq!(near.receive(), frame(NEAR, len, n + 9));
            }
            near.until(|end| end.is_idle());
            far.until(|end| end.is_idle());
            assert_eq!(near.counter("strange_completions"), 0);
            assert_eq!(near.counter("tx_gathered_frames"), 0);
            assert_eq!(near.counter("xdp_guest_unbound_frames"), 0);
            near.end();
            far.end();
        });
    }
}

#[test]
fn many_frames_in_batches_lose_and_leak_nothing() {
    with_veth(1, 1500, || {
        let (mut near, mut far) = pair(XdpNicMode::Auto);
        let mut received = 0;
        for n in 0..4000 {
            let token = near.frames.from_bytes(&frame(FAR, 100, n)).unwrap();
            assert!(matches!(near.nic.send(&mut near.frames, token), Sent::Done));
            if n % 50 == 49 {
                near.flush();
                while received <= n {
                    assert_eq!(far.receive(), frame(FAR, 100, received));
                    received += 1;
                }
                near.until(|end| end.is_idle());
            }
        }
        assert_eq!(near.counter("strange_completions"), 0);
        near.end();
        far.end();
    });
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
            let (head, rest) = whole.split_at(128);
            let (first, second) = rest.split_at(700);
            near.ram.write(gpa, first).unwrap();
            near.ram.write(0x80001, second).unwrap();
            let rest = [
                Segment {
                    gpa,
                    len: first.len() as u32,
                },
                Segment {
                    gpa: 0x80001,
                    len: second.len() as u32,
                },
            ];
            let buffer = Buffer {
                life: 0,
                head: n as u16,
            };
            let token = near
                .frames
                .keep_in_place(buffer, &rest, |slot| {
                    slot[..128].copy_from_slice(head);
                    Some(128)
                })
                .unwrap();
            assert!(near.frames.in_place_bytes(&token) > 0);
            let sent = near.nic.send(&mut near.frames, token);
            assert!(matches!(sent, Sent::Done), "{sent:?}");
            near.until(|end| end.is_idle());
            let mut returned = Vec::new();
            near.frames.take_returned(&mut returned);
            assert_eq!(returned, [buffer]);
            assert_eq!(far.receive(), whole);
        }
        assert_eq!(near.counter("tx_gathered_frames"), 0);
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
            let token = near.frames.keep_whole(Buffer { life: 0, head }, place);
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
        assert_eq!(near.counter("tx_gathered_frames"), 0);
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
            let token = near.frames.keep_whole(Buffer { life: 0, head }, place);
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
fn jumbo_frames_are_put_together() {
    for mode in [XdpNicMode::Driver, XdpNicMode::Generic] {
        with_veth(1, 9000, move || {
            let [mut near, mut far] = [("a0", NEAR), ("a1", FAR)].map(|(name, mac)| {
                End::new(XdpNicConfig {
                    mode,
                    mtu: 9000,
                    ..config(name, mac)
                })
            });
            for (n, len) in [9014, 60, 4000, 9018, 3841].into_iter().enumerate() {
                near.send(&frame(FAR, len, n));
                assert_eq!(far.receive(), frame(FAR, len, n));
            }
            assert!(far.counter("rx_gathered_pieces") > 0);
            near.until(|end| end.is_idle());
            near.end();
            far.end();
        });
    }
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
fn a_secondary_hears_nothing_for_the_guest_before_its_promotion() {
    with_veth(1, 1500, || {
        let mut near = End::new(config("a0", NEAR));
        let mut far = End::new(XdpNicConfig {
            filter: Filter::DropAll,
            ..config("a1", FAR)
        });
        near.send(&frame(FAR, 60, 1));
        near.send(&frame([0xff; 6], 60, 2));
        near.send(&frame(HOST, 60, 3));
        // The NIC is shared: this one went to the host.
        far.until(|end| (end.counter("xdp_host_frames") > 0).then_some(()));
        assert!(far.counter("xdp_guest_dropped_frames") >= 2);
        assert_eq!(far.take(), None);

        far.nic.set_filter(Filter::Guest(FAR)).unwrap();
        near.send(&frame(FAR, 60, 4));
        let promoted = far.until(|end| end.take().filter(|frame| frame[..6] == FAR));
        assert_eq!(promoted, frame(FAR, 60, 4));
        far.nic.set_filter(Filter::DropAll).unwrap();
        near.send(&frame(FAR, 60, 5));
        near.send(&frame(HOST, 60, 6));
        far.until(|end| (end.counter("xdp_host_frames") > 1).then_some(()));
        far.until(|end| {
            end.take()
                .is_none_or(|frame| frame[..6] != FAR)
                .then_some(())
        });

        far.nic.set_filter(Filter::Open).unwrap();
        near.send(&frame(HOST, 60, 7));
        let open = far.until(|end| end.take().filter(|frame| frame[..6] == HOST));
        assert_eq!(open, frame(HOST, 60, 7));
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
fn a_link_that_goes_and_comes_back_is_used_again() {
    with_veth(1, 1500, || {
        let (mut near, mut far) = pair(XdpNicMode::Auto);
        for round in 0..3 {
            ip("link set a1 down");
            near.until(|end| (!end.nic.has_link).then_some(()));
            assert!(near.nic.describe().ends_with("no link"));
            let token = near.frames.from_bytes(&frame(FAR, 60, 0)).unwrap();
            let lost = near.nic.send(&mut near.frames, token);
            assert!(matches!(lost, Sent::Refused(_)), "{lost:?}");
            ip("link set a1 up");
            near.until(|end| end.nic.has_link.then_some(()));
            far.until(|end| end.nic.has_link.then_some(()));
            near.send(&frame(FAR, 60, round));
            let back = far.until(|end| end.take().filter(|frame| frame[..6] == FAR));
            assert_eq!(back, frame(FAR, 60, round));
        }
        assert_eq!(near.counter("link_losses"), 3);
        assert_eq!(near.counter("tx_without_link"), 3);
        assert_eq!(near.counter("nic_losses"), 0);
        near.until(|end| end.is_idle());
        near.end();
        far.end();
    });
}

#[test]
fn a_nic_that_is_made_again_is_used_again() {
    with_veth(1, 1500, || {
        let (mut near, mut far) = pair(XdpNicMode::Auto);
        for round in 1..3 {
            near.send(&frame(FAR, 60, 0));
            ip("link del a0");
            near.until(|end| end.nic.retry_at_us.map(drop));
            far.until(|end| end.nic.retry_at_us.map(drop));
            assert!(near.nic.describe().ends_with("lost"));
            let token = near.frames.from_bytes(&frame(FAR, 60, 0)).unwrap();
            let lost = near.nic.send(&mut near.frames, token);
            assert!(matches!(lost, Sent::Refused(_)), "{lost:?}");
            // A filter that is set meanwhile holds afterwards.
            far.nic.set_filter(Filter::DropAll).unwrap();
            far.nic.set_filter(Filter::Guest(FAR)).unwrap();
            // The first time with more queues than before, then with fewer.
            make_veth(5 - 2 * round as u32, 1500);
            for end in [&mut near, &mut far] {
                end.until(|end| (end.nic.retry_at_us.is_none() && end.nic.has_link).then_some(()));
                assert_eq!(end.counter("nic_returns"), round);
            }
            near.send(&frame(FAR, 60, 7));
            let back = far.until(|end| end.take().filter(|frame| frame[..6] == FAR));
            assert_eq!(back, frame(FAR, 60, 7));
        }
        near.until(|end| end.is_idle());
        near.end();
        far.end();
    });
}

/// `ethtool -L NAME rx QUEUES tx QUEUES`
fn set_queues(name: &str, queues: u32) {
    const ETHTOOL_SCHANNELS: u32 = 0x3d;
    let mut channels = [ETHTOOL_SCHANNELS, 0, 0, 0, 0, queues, queues, 0, 0];
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = channels.as_mut_ptr().cast();
    // SAFETY: plain system call that gives a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: `fd` was just made by the kernel and nobody else owns it.
    let fd = unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) };
    let fd = std::os::fd::AsRawFd::as_raw_fd(&fd);
    // SAFETY: both structures live on this stack through the call.
    let answer = unsafe { libc::ioctl(fd, libc::SIOCETHTOOL as libc::c_ulong, &raw mut request) };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
}

#[test]
fn queues_that_are_added_are_bound() {
    with_veth(3, 1500, || {
        set_queues("a0", 3);
        set_queues("a1", 1);
        let mut near = End::new(config("a0", NEAR));
        let mut far = End::new(config("a1", FAR));
        assert!(near.nic.describe().contains("3 queues"));
        assert!(far.nic.describe().contains("1 queue"));
        set_queues("a1", 3);
        far.until(|end| (end.nic.queues.len() == 3).then_some(()));
        assert_eq!(far.counter("queues_added"), 2);
        // A frame leaves by the queue of its number, and comes by that.
        for queue in [2, 1, 0] {
            near.nic.queues.swap(0, queue);
            near.send(&frame(FAR, 60, queue));
            near.until(|end| end.is_idle());
            near.nic.queues.swap(0, queue);
            assert_eq!(far.receive(), frame(FAR, 60, queue));
        }
        assert_eq!(far.counter("xdp_guest_unbound_frames"), 0);
        near.end();
        far.end();
    });
}

/// Sends by a queue of `near`, which comes by the same queue of the other end.
fn send_by(near: &mut End, queue: usize, bytes: &[u8]) {
    near.nic.queues.swap(0, queue);
    near.send(bytes);
    near.until(|end| end.is_idle());
    near.nic.queues.swap(0, queue);
}

/// Works as all workers together do until all say so.
fn until_all(ends: &mut [End], mut is_so: impl FnMut(&End) -> bool) {
    let begun = Instant::now();
    loop {
        ends.iter_mut().for_each(End::flush);
        if ends.iter().all(&mut is_so) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "never");
        let mut fds = Vec::new();
        for end in &*ends {
            end.nic.poll_fds(false, false, &mut fds);
        }
        // SAFETY: the pollfds live through the call.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 10) };
    }
}

#[test]
fn each_shard_has_its_queues_behind_one_program() {
    with_veth(5, 1500, || {
        let mut near = End::new(config("a0", NEAR));
        let closed = XdpNicConfig {
            filter: Filter::DropAll,
            ..config("a1", FAR)
        };
        let mut far: Vec<End> = XdpNic::open_shards(closed, 2)
            .unwrap()
            .into_iter()
            .map(End::of)
            .collect();
        until_all(&mut far, |end| end.nic.has_link);
        let queues = |far: &[End]| [far[0].nic.queues.len(), far[1].nic.queues.len()];
        assert_eq!(queues(&far), [3, 2]);
        for queue in 0..5 {
            send_by(&mut near, queue, &frame(FAR, 60, queue));
        }
        far[0].until(|end| (end.counter("xdp_guest_dropped_frames") >= 5).then_some(()));
        assert!(far.iter_mut().all(|end| end.take().is_none()));

        // Whichever end opens the filter opens it for all.
        far[1].nic.set_filter(Filter::Guest(FAR)).unwrap();
        let check = |near: &mut End, far: &mut [End], queues: usize| {
            for queue in 0..queues {
                let sent = frame(FAR, 200, queue);
                send_by(near, queue, &sent);
                assert_eq!(far[queue % 2].receive(), sent);
                assert_eq!(far[1 - queue % 2].take(), None);
            }
            for end in far {
                end.send(&frame(NEAR, 100, 9));
                assert_eq!(near.receive(), frame(NEAR, 100, 9));
                end.until(|end| end.is_idle());
            }
        };
        check(&mut near, &mut far, 5);

        // Its loss and return is that of all ends.
        ip("link del a1");
        until_all(&mut far, |end| end.nic.queues.is_empty());
        near.until(|end| end.nic.retry_at_us.map(drop));
        assert!(far[0].nic.describe().ends_with("lost"));
        make_veth(3, 1500);
        until_all(&mut far, |end| {
            end.nic.attachment.is_some() && end.nic.has_link
        });
        near.until(|end| (end.nic.retry_at_us.is_none() && end.nic.has_link).then_some(()));
        assert_eq!(queues(&far), [2, 1]);
        check(&mut near, &mut far, 3);

        // With fewer queues than shards it stays lost until there are enough.
        ip("link del a1");
        until_all(&mut far, |end| end.nic.queues.is_empty());
        make_veth(1, 1500);
        let failures = far[0].counter("return_failures");
        until_all(&mut far[..1], |end| {
            end.counter("return_failures") > failures + 2
        });
        assert_eq!(queues(&far), [0, 0]);
        ip("link del a1");
        make_veth(2, 1500);
        until_all(&mut far, |end| {
            end.nic.attachment.is_some() && end.nic.has_link
        });
        near.until(|end| (end.nic.queues.len() == 2 && end.nic.has_link).then_some(()));
        check(&mut near, &mut far, 2);
        near.end();
        far.into_iter().for_each(End::end);
    });
}

#[test]
fn queues_that_are_added_go_to_their_shards() {
    with_veth(4, 1500, || {
        set_queues("a0", 4);
        set_queues("a1", 2);
        let mut near = End::new(config("a0", NEAR));
        let ends = XdpNic::open_shards(config("a1", FAR), 2).unwrap();
        let mut far: Vec<End> = ends.into_iter().map(End::of).collect();
        until_all(&mut far, |end| {
            end.nic.has_link && end.nic.queues.len() == 1
        });
        set_queues("a1", 4);
        until_all(&mut far, |end| end.nic.queues.len() == 2);
        for queue in 0..4 {
            let sent = frame(FAR, 60, queue);
            send_by(&mut near, queue, &sent);
            // A veth with fewer queues than its peer is no native one, and then all comes by the first.
            let take = |far: &mut [End]| {
                far.iter_mut().find_map(|end| {
                    end.flush();
                    end.take()
                })
            };
            assert_eq!(near.until(|_| take(&mut far)), sent);
        }
        assert_eq!(far[0].counter("xdp_guest_unbound_frames"), 0);
        near.end();
        far.into_iter().for_each(End::end);
    });
}

#[test]
fn fewer_queues_than_shards_are_refused_by_name() {
    with_veth(2, 1500, || {
        let refused = XdpNic::open_shards(config("a0", NEAR), 3).unwrap_err();
        let text = refused.to_string();
        for part in [
            "\"a0\" has 2 receive queues",
            "host.shards = 3",
            "ethtool -L a0",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(XdpNic::open_shards(config("a0", NEAR), 2).unwrap().len(), 2);
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
