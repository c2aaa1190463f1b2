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
