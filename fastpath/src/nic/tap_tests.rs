//! The TAP device in a network namespace of its own.

use std::net::UdpSocket;

use super::*;
use crate::nic::conformance::{Cable, conformance};
use crate::nic::testing::{PATIENCE_MS, bring_up, in_namespace, ip, tc};

/// `_IOW('T', 212, int)`
const TUNSETSNDBUF: libc::c_ulong = 0x4004_54d4;

/// `_IOW('T', 203, int)`
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;

/// A bridge between the device `ct0` and the veth device `v1`, at which the other station is.
#[derive(Clone, Copy)]
struct Bridged;

impl Cable for Bridged {
    type End = Tap;

    fn lay(&self, mtu: u32) {
        ip("link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0");
        ip(&format!(
            "link add v0 mtu {mtu} type veth peer name v1 mtu {mtu}"
        ));
        ip("link set v0 master br0");
        self.replace();
        for name in ["br0", "v0", "v1"] {
            bring_up(name);
        }
    }

    fn interfaces(&self) -> [&'static str; 2] {
        ["ct0", "v1"]
    }

    fn open(&self, mtu: u16, filter: Filter) -> Tap {
        Tap::open("ct0", mtu, filter).unwrap()
    }

    fn kept_away(&self, _nic: &Tap) -> u64 {
        // What a device drops on the way to its reader it counts as not sent.
        let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = devices
            .lines()
            .find_map(|line| line.trim().strip_prefix("ct0:"));
        let numbers = line.unwrap().split_whitespace().skip(11);
        numbers.map(|n| n.parse().unwrap()).next().unwrap()
    }

    fn stop(&self, nic: &Tap) {
        // As with a sender that is not to have more under way than so much.
        let bytes: libc::c_int = 64 << 10;
        // SAFETY: the kernel reads one integer on this stack.
        let answer = unsafe { libc::ioctl(nic.file.as_raw_fd(), TUNSETSNDBUF, &raw const bytes) };
        assert_eq!(answer, 0);
        tc("qdisc add dev v0 root tbf rate 80kbit burst 2kb limit 10mb");
    }

    fn go_on(&self) {
        tc("qdisc change dev v0 root tbf rate 1gbit burst 1mb limit 10mb");
    }

    fn remove(&self) {
        ip("link del ct0");
    }

    fn replace(&self) {
        ip("tuntap add dev ct0 mode tap");
        ip("link set ct0 addrgenmode none");
        ip("link set ct0 master br0");
    }
}

conformance!(Bridged);

/// The next frame that is there already.
fn receive(tap: &mut Tap) -> Option<Vec<u8>> {
    let mut frames = FramePool::new(1, 2048);
    let mut out = VecDeque::new();
    tap.receive(&mut frames, &mut out, 1).unwrap();
    Some(frames.bytes(&out.pop_front()?).to_vec())
}

/// Waits until a frame to `destination` arrives.
fn receive_to(tap: &mut Tap, destination: [u8; 6]) -> Vec<u8> {
    loop {
        let mut fds = Vec::new();
        tap.poll_fds(true, false, &mut fds);
        // SAFETY: one pollfd in a live vector.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 1, 10_000) };
        assert_eq!(ready, 1, "no frame came");
        if let Some(frame) = receive(tap)
            && frame[..6] == destination
        {
            return frame;
        }
    }
}

fn send_to(address: &str) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_broadcast(true).unwrap();
    socket.send_to(b"hello", address).unwrap();
}

/// Rule 24: a device that is up when it is attached to may have taken frames before the filter is there.
#[test]
fn what_came_before_the_filter_is_not_read() {
    in_namespace(|| {
        let mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
        ip("tuntap add dev ct0 mode tap");
        bring_up("ct0");
        let filter = Arc::new(Lock::new(Filter::Guest(mac)));
        let mut tap = Tap::attach("ct0", 1500, 1, &filter).unwrap();
        ip("addr add 10.99.0.1/24 dev ct0");
        ip("neigh add 10.99.0.2 lladdr 52:54:00:c0:10:01 dev ct0");
        send_to("10.99.0.2:9");
        tap.bring_up().unwrap();
        assert_eq!(receive(&mut tap), None);
        send_to("10.99.0.2:10");
        assert_eq!(receive_to(&mut tap, mac)[36..38], [0, 10]);
    });
}

/// The next frame to `destination` that any queue has.
fn receive_by_any(taps: &mut [Tap], destination: [u8; 6]) -> (usize, Vec<u8>) {
    loop {
        let mut fds = Vec::new();
        for tap in &*taps {
            tap.poll_fds(true, false, &mut fds);
        }
        // SAFETY: the pollfds live in a vector through the call.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 10_000) };
        assert!(ready > 0, "no frame came");
        for (queue, tap) in taps.iter_mut().enumerate() {
            if let Some(frame) = receive(tap)
                && frame[..6] == destination
            {
                return (queue, frame);
            }
        }
    }
}

/// Works as all workers together do until all say so.
fn until(taps: &mut [Tap], is_so: impl Fn(&Tap) -> bool) {
    let mut frames = FramePool::new(1, 2048);
    let begun = std::time::Instant::now();
    loop {
        for tap in &mut *taps {
            // Also what a worker does that has no time to sleep.
            tap.link.batches_left.set(0);
            tap.flush(&mut frames).unwrap();
        }
        if taps.iter().all(&is_so) {
            return;
        }
        assert!(begun.elapsed().as_millis() < PATIENCE_MS as u128, "never");
        std::thread::yield_now();
    }
}

/// Whoever makes a device has it for a moment, and no news tells when no longer.
#[test]
fn a_device_that_another_has_is_tried_again_until_it_is_free() {
    in_namespace(|| {
        let mut tap = Tap::open("ct0", 1500, Filter::Open).unwrap();
        ip("link del ct0");
        until(std::slice::from_mut(&mut tap), |tap| tap.index.is_none());
        let other = Tap::attach("ct0", 1500, 1, &Arc::new(Lock::new(Filter::Open))).unwrap();
        until(std::slice::from_mut(&mut tap), |tap| {
            tap.stats.return_failures.get() > 3
        });
        // It stays when nobody has it.
        // SAFETY: the call takes an integer.
        let kept = unsafe { libc::ioctl(other.file.as_raw_fd(), TUNSETPERSIST, 1) };
        assert_eq!(kept, 0);
        drop(other);
        tap.link.news.drain();
        let mut fds = Vec::new();
        tap.poll_fds(true, false, &mut fds);
        // SAFETY: the pollfds live through the call.
        let woken = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, PATIENCE_MS) };
        assert!(woken > 0, "it is not tried again");
        until(std::slice::from_mut(&mut tap), |tap| tap.has_link());
        assert_eq!(tap.stats.nic_returns.get(), 1);
    });
}

#[test]
fn each_shard_has_a_queue_of_one_device() {
    in_namespace(|| {
        let mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
        let mut taps = Tap::open_queues("ct3", 1400, Filter::DropAll, 3).unwrap();
        ip("addr add 10.99.0.1/24 dev ct3");
        ip("neigh add 10.99.0.2 lladdr 52:54:00:c0:10:01 dev ct3");
        send_to("10.99.0.2:9");
        // Whoever sets the filter sets it for all, also for the next device.
        taps[0].set_filter(Filter::Guest(mac)).unwrap();
        let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        socket.send_to(b"first", "10.99.0.2:7").unwrap();
        let (_, frame) = receive_by_any(&mut taps, mac);
        assert!(
            frame.ends_with(b"first"),
            "what came before was to be dropped"
        );
        // An answer teaches the device the queue of its flow.
        for queue in [1, 2, 0] {
            let mut answer = colo_compare::testing::ip_frame(
                colo_compare::testing::Side::V4,
                false,
                17,
                64,
                0,
                &[&7_u16.to_be_bytes()[..], &port.to_be_bytes(), &[0, 8, 0, 0]].concat(),
            );
            answer[26..34].copy_from_slice(&[10, 99, 0, 2, 10, 99, 0, 1]);
            let mut frames = FramePool::new(1, 2048);
            let token = frames.from_bytes(&answer).unwrap();
            assert!(matches!(taps[queue].send(&mut frames, token), Sent::Done));
            socket.send_to(b"next", "10.99.0.2:7").unwrap();
            let (by, frame) = receive_by_any(&mut taps, mac);
            assert!(frame.ends_with(b"next"));
            assert_eq!(by, queue);
        }
        // One that is made again has all of them again.
        ip("link del ct3");
        until(&mut taps, |tap| tap.stats().nic_losses.get() == 1);
        ip("tuntap add dev ct3 mode tap multi_queue");
        until(&mut taps, |tap| tap.has_link());
        ip("addr add 10.99.0.1/24 dev ct3");
        ip("neigh add 10.99.0.2 lladdr 52:54:00:c0:10:01 dev ct3");
        send_to("10.99.0.2:9");
        assert!(receive_by_any(&mut taps, mac).1.ends_with(b"hello"));
        assert!(taps.iter().all(|tap| tap.stats().nic_returns.get() == 1));
        drop(taps);
        // One that was made with one queue has no more.
        ip("tuntap add dev ct4 mode tap");
        let single = Tap::open_queues("ct4", 1500, Filter::Open, 2).unwrap_err();
        assert!(single.to_string().contains("multi_queue"), "{single}");
        assert_eq!(
            Tap::open_queues("ct4", 1500, Filter::Open, 1)
                .unwrap()
                .len(),
            1
        );
    });
}

#[test]
fn errors_name_the_interface() {
    in_namespace(|| {
        let _first = Tap::open("ct1", 1500, Filter::Open).unwrap();
        let busy = Tap::open("ct1", 1500, Filter::Open).unwrap_err();
        assert!(
            matches!(&busy, TapError::Busy(name) if name == "ct1"),
            "{busy}"
        );
        let wrong = Tap::open("lo", 1500, Filter::Open).unwrap_err();
        assert!(
            matches!(&wrong, TapError::NotATap(name) if name == "lo"),
            "{wrong}"
        );
        for name in ["", "a/b", "sixteen-letters!", "a b"] {
            assert!(matches!(
                Tap::open(name, 1500, Filter::Open),
                Err(TapError::BadName(_))
            ));
        }
        let mtu = Tap::open("ct2", 20, Filter::Open).unwrap_err();
        assert!(mtu.to_string().contains("MTU"), "{mtu}");
    });
}
