//! The TAP device in a network namespace of its own.

use std::net::UdpSocket;

use super::*;

/// Runs in a thread whose network namespace dies with it.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        // SAFETY: unshare changes only the calling thread, which nothing else shares.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(unshared, 0, "needs root");
        test();
    })
    .join()
    .unwrap();
}

fn ip(arguments: &[&str]) {
    assert!(
        std::process::Command::new("ip")
            .args(arguments)
            .status()
            .unwrap()
            .success()
    );
}

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

#[test]
fn frames_come_through_the_filter_of_the_moment() {
    in_namespace(|| {
        let mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
        let other = [0x52, 0x54, 0, 0xc0, 0x10, 2];
        let mut tap = Tap::open("ct0", 1400, Filter::DropAll).unwrap();
        ip(&["addr", "add", "10.99.0.1/24", "dev", "ct0"]);
        ip(&[
            "neigh",
            "add",
            "10.99.0.2",
            "lladdr",
            "52:54:00:c0:10:01",
            "dev",
            "ct0",
        ]);
        ip(&[
            "neigh",
            "add",
            "10.99.0.3",
            "lladdr",
            "52:54:00:c0:10:02",
            "dev",
            "ct0",
        ]);
        send_to("10.99.0.2:9");
        tap.set_filter(Filter::Guest(mac)).unwrap();
        send_to("10.99.0.3:9");
        send_to("10.99.0.2:9");
        let frame = receive_to(&mut tap, mac);
        assert_eq!(&frame[frame.len() - 5..], b"hello");
        while let Some(frame) = receive(&mut tap) {
            assert!(frame[..6] != mac, "the first frame was to be dropped");
            assert!(frame[..6] != other, "a frame for someone else");
        }
        tap.set_filter(Filter::Open).unwrap();
        send_to("10.99.0.3:9");
        receive_to(&mut tap, other);
        let mut frames = FramePool::new(1, 2048);
        let token = frames.from_bytes(&frame).unwrap();
        assert!(matches!(tap.send(&mut frames, token), Sent::Done));
        assert_eq!(frames.free_slots(), 1);
        let mtu = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        assert!(mtu.contains("ct0"));
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

#[test]
fn each_shard_has_a_queue_of_one_device() {
    in_namespace(|| {
        let mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
        let mut taps = Tap::open_queues("ct3", 1400, Filter::DropAll, 3).unwrap();
        ip(&["addr", "add", "10.99.0.1/24", "dev", "ct3"]);
        let neighbour = ["neigh", "add", "10.99.0.2", "lladdr"];
        ip(&[&neighbour[..], &["52:54:00:c0:10:01", "dev", "ct3"]].concat());
        send_to("10.99.0.2:9");
        // Whoever sets the filter sets it for all.
        taps[2].set_filter(Filter::Guest(mac)).unwrap();
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
        drop(taps);
        // One that was made with one queue has no more.
        ip(&["tuntap", "add", "dev", "ct4", "mode", "tap"]);
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
