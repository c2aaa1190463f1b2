//! The packet channel over AF_XDP, between two network namespaces.

use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;

use colo_bpf::{LINK_ETHERTYPE, Mac};

use super::*;

const MACS: [Mac; 2] = [[2, 0xc0, 0, 0, 0, 1], [2, 0xc0, 0, 0, 0, 2]];

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// Moves the calling thread to a network namespace of its own, which lives as long as sockets in it.
fn unshare() {
    // SAFETY: unshare changes only the calling thread, which nothing else shares.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(unshared, 0, "needs root");
}

fn link(stream: TcpStream, packets: Packets, key: u64) -> PacketLink {
    let ports = open_ports(&stream, packets, None, |_| None).list;
    assert_eq!(
        ports.len(),
        usize::from(packets != Packets::Tcp),
        "AF_XDP on a veth device"
    );
    PacketLink::with_ports(stream, ports, key, PATIENCE_US).unwrap()
}

/// Two ends in two namespaces, and a way to send frames from the first to the second's interface.
fn ends(mtu: u32, queues: u32) -> (Ends, Stranger) {
    let (links, stranger) = links(mtu, queues, Packets::Xdp);
    (Ends::of(links), stranger)
}

fn links(mtu: u32, queues: u32, packets: Packets) -> ([PacketLink; 2], Stranger) {
    links_opened(mtu, queues, move |stream, end| {
        link(stream, packets, [11, 22][end])
    })
}

/// Two ends as `open` makes them.
pub(super) fn links_opened(
    mtu: u32,
    queues: u32,
    open: impl Fn(TcpStream, usize) -> PacketLink + Send + Sync + 'static,
) -> ([PacketLink; 2], Stranger) {
    let open = Arc::new(open);
    let open_far = open.clone();
    let (here_tid, there_tid) = channel();
    let (ready, is_ready) = channel();
    let far = thread::spawn(move || {
        unshare();
        // SAFETY: no preconditions.
        here_tid.send(unsafe { libc::gettid() }).unwrap();
        is_ready.recv().unwrap();
        let listener = TcpListener::bind("10.9.0.2:0").unwrap();
        let address = listener.local_addr().unwrap();
        (
            address,
            thread::spawn(move || open_far(listener.accept().unwrap().0, 1)),
        )
    });
    let near = thread::spawn(move || {
        unshare();
        let tid = there_tid.recv().unwrap();
        let side = format!("mtu {mtu} numrxqueues {queues} numtxqueues {queues}");
        ip(&format!(
            "link add a0 {side} type veth peer name a1 {side} netns {tid}"
        ));
        for (n, mac) in MACS.iter().enumerate() {
            let mac = mac.map(|b| format!("{b:02x}")).join(":");
            let inside = ["", "nsenter"][n];
            let run = |arguments: &str| match inside {
                "" => ip(arguments),
                _ => {
                    let status = Command::new("nsenter")
                        .arg(format!("--net=/proc/{tid}/ns/net"))
                        .arg("ip")
                        .args(arguments.split(' '))
                        .status()
                        .unwrap();
                    assert!(status.success(), "{arguments}");
                }
            };
            run(&format!("link set a{n} address {mac}"));
            run(&format!("addr add 10.9.0.{}/24 dev a{n}", n + 1));
            run(&format!("link set a{n} up"));
        }
        ready.send(()).unwrap();
        let (address, far) = far.join().unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let near = open(stream, 0);
        ([near, far.join().unwrap()], Stranger::on("a0"))
    });
    near.join().unwrap()
}

/// A packet socket on the link.
pub(super) struct Stranger {
    fd: std::os::fd::OwnedFd,
    /// The namespace of the first end.
    namespace: std::fs::File,
}

impl Stranger {
    fn on(interface: &str) -> Self {
        use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
        // SAFETY: plain system call that gives a new descriptor or -1.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        assert!(fd >= 0);
        // SAFETY: `fd` was just made and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: all zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        // SAFETY: `name` is a C string that lives through the call.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        // SAFETY: reads one sockaddr_ll on this stack.
        let bound = unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(bound, 0);
        let namespace = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        Self { fd, namespace }
    }

    /// `ip` where it is.
    fn ip(&self, arguments: &str) {
        use std::os::fd::AsRawFd;
        let (process, fd) = (std::process::id(), self.namespace.as_raw_fd());
        let status = Command::new("nsenter")
            .arg(format!("--net=/proc/{process}/fd/{fd}"))
            .arg("ip")
            .args(arguments.split(' '))
            .status();
        assert!(status.unwrap().success(), "{arguments}");
    }

    pub(super) fn send(&self, payload: &[u8]) {
        use std::os::fd::AsRawFd;
        let kind = LINK_ETHERTYPE.to_be_bytes();
        let frame = [&MACS[1][..], &[2, 0, 0, 0, 0, 9], &kind, payload].concat();
        // SAFETY: reads the frame, which lives through the call.
        let sent =
            unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize);
    }
}

#[test]
fn what_is_said_moves_over_to_af_xdp_and_stays_in_order() {
    for (mtu, queues) in [(1500, 1), (3000, 2)] {
        let (mut ends, _) = ends(mtu, queues);
        ends.talk(500);
        ends.until_both_use("xdp");
        ends.talk(1_000);
        for link in &ends.links {
            let stats = link.stats();
            assert!(stats.datagrams_sent > 1_000, "{stats:?}");
            assert_eq!((stats.fallbacks, stats.foreign, stats.damaged), (0, 0, 0));
            // A whole frame of the guest's fits only into the larger MTU; of 32 messages 5 are one, 1 is longer.
            let many = stats.split > ends.serial / 32 * 3;
            assert_eq!(many, mtu == 1500, "{stats:?}");
        }
    }
}

#[test]
fn foreign_frames_are_counted_and_harmless() {
    let (mut ends, stranger) = ends(1500, 1);
    ends.until_both_use("xdp");
    let payloads = [&[][..], &[0xc0], &[0xc0; 60], &[0; 1400]];
    for payload in payloads {
        stranger.send(payload);
    }
    ends.until(|ends| {
        let stats = ends.links[1].stats();
        // One of them is an Ethernet header alone.
        stats.foreign + stats.truncated + stats.send_errors == payloads.len() as u64
    });
    ends.talk(200);
    assert_eq!(ends.carriers(), ["xdp", "xdp"]);
}

#[test]
fn a_path_that_breaks_is_left_for_tcp() {
    let (mut ends, _) = ends(1500, 1);
    ends.until_both_use("xdp");
    ends.talk(50);
    // The far host's own stack gets the frames, and drops them.
    let Some(datagrams) = &mut ends.links[1].datagrams else {
        panic!("no datagrams");
    };
    datagrams.stop_receiving(0);
    ends.talk(200);
    ends.until_both_use("tcp");
    assert!(ends.links.iter().all(|link| link.stats().fallbacks == 1));
    ends.talk(50);
}

#[test]
fn an_interface_that_goes_down_keeps_what_is_to_leave_and_goes_on() {
    let (mut ends, stranger) = ends(1500, 1);
    ends.until_both_use("xdp");
    ends.talk(50);
    for round in 1..3 {
        stranger.ip("link set a0 down");
        let in_vain = |ends: &Ends| ends.links[0].stats().wake_ups_in_vain;
        let before = in_vain(&ends);
        ends.say(0, 20);
        ends.until(|ends| in_vain(ends) > before);
        stranger.ip("link set a0 up");
        ends.until_heard();
        ends.until_both_use("xdp");
        ends.talk(50 * round);
    }
}

#[test]
fn frames_thrown_away_without_a_carrier_are_counted_and_sent_again() {
    let (mut ends, stranger) = ends(1500, 1);
    ends.until_both_use("xdp");
    ends.talk(50);
    let errors = |ends: &Ends| ends.links[1].stats().send_errors;
    let before = errors(&ends);
    // The other end of the cable: the second host's own interface is up and has no carrier.
    stranger.ip("link set a0 down");
    ends.say(1, 20);
    ends.until(|ends| errors(ends) > before);
    stranger.ip("link set a0 up");
    ends.until_heard();
    ends.until_both_use("xdp");
    ends.talk(50);
    assert!(ends.links[1].stats().retransmitted > 0);
}
