//! What the tests of NICs share: network namespaces, cables, and what hangs at the far end of one.
//!
//! Invariants: interfaces are made in the namespace of the calling thread, which ends with its test.
//!
//! Does not know any NIC.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::Command;

use colo_bpf::Mac;

use crate::ring::xsk::Interface;

/// Longest wait for anything.
pub(super) const PATIENCE_MS: libc::c_int = 30_000;

/// Runs in a thread whose network namespace dies with it.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        // SAFETY: unshare changes only the calling thread, which nothing else shares.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(unshared, 0, "needs root");
        test();
    })
    .join()
    .unwrap();
}

fn run(program: &str, arguments: &str) {
    let arguments = arguments.split(' ');
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
}

pub(super) fn ip(arguments: &str) {
    run("ip", arguments);
}

pub(super) fn tc(arguments: &str) {
    run("tc", arguments);
}

/// Whether a look at this descriptor finds something at once.
pub(super) fn is_readable(fd: RawFd) -> bool {
    let mut fd = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd on this stack, no wait.
    unsafe { libc::poll(&raw mut fd, 1, 0) == 1 }
}

/// Brings an interface up about which the host says nothing by itself.
pub(super) fn bring_up(name: &str) {
    ip(&format!("link set {name} addrgenmode none"));
    ip(&format!("link set {name} up"));
}

/// The veth pair `a0` and `a1`.
pub(super) fn make_veth(queues: u32, mtu: u32) {
    let side = format!("mtu {mtu} numrxqueues {queues} numtxqueues {queues}");
    ip(&format!("link add a0 {side} type veth peer name a1 {side}"));
    for name in ["a0", "a1"] {
        bring_up(name);
    }
}

/// `ethtool -L NAME rx QUEUES tx QUEUES`
pub(super) fn set_queues(name: &str, queues: u32) {
    let set = try_queues(name, queues);
    assert!(set.is_ok(), "{name}, {queues} queues: {set:?}");
}

/// The same; the kernel may refuse it.
pub(super) fn try_queues(name: &str, queues: u32) -> io::Result<()> {
    const ETHTOOL_SCHANNELS: u32 = 0x3d;
    let mut channels = [ETHTOOL_SCHANNELS, 0, 0, 0, 0, queues, queues, 0, 0];
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = channels.as_mut_ptr().cast();
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    // SAFETY: both structures live on this stack through the call.
    let answer = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::SIOCETHTOOL as libc::c_ulong,
            &raw mut request,
        )
    };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A frame with bytes that no other length or seed gives.
pub(super) fn frame(from: Mac, to: Mac, len: usize, seed: usize) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend([0x90, 0x00]);
    frame.extend((frame.len()..len).map(|n| (n * 31 + n / 256 + seed * 7) as u8));
    frame[14..18].copy_from_slice(&(seed as u32).to_be_bytes());
    frame
}

/// The same frame with a VLAN tag.
pub(super) fn tagged(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0x20, 5], &frame[12..]].concat()
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> OwnedFd {
    // SAFETY: plain system call that gives a new descriptor or -1.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: `fd` was just made by the kernel and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn set_option<T>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) {
    // SAFETY: the kernel reads a value that is borrowed for the call.
    let answer = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
}

/// Another station: it says and hears whole frames, the tags that the kernel takes out included.
pub(super) struct Station {
    fd: OwnedFd,
}

impl Station {
    pub(super) fn on(interface: &str) -> Self {
        // Nothing comes before it is bound.
        let fd = socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1_i32);
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1_i32);
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(64_i32 << 20));
        // SAFETY: sockaddr_ll is plain data for which all zeroes is valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as libc::sa_family_t;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = Interface::find(interface).unwrap().index() as libc::c_int;
        // SAFETY: the kernel reads one sockaddr_ll that lives on this stack.
        let answer = unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        assert_eq!(answer, 0, "{}", io::Error::last_os_error());
        Self { fd }
    }

    /// Says one frame; an interface that is down is no error.
    pub(super) fn send(&self, frame: &[u8]) {
        // SAFETY: the kernel reads the frame, which lives through the call.
        let sent =
            unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        let error = io::Error::last_os_error();
        let is_down = matches!(error.raw_os_error(), Some(libc::ENETDOWN | libc::ENOBUFS));
        assert!(sent == frame.len() as isize || is_down, "{sent}: {error}");
    }

    /// The next frame that has come already.
    pub(super) fn take(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0_u8; 65536];
        let mut part = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let mut control = [0_u64; 16];
        // SAFETY: msghdr is plain data for which all zeroes is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the message and all that it points to live through the call.
        let len =
            unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        if len < 0 {
            return None;
        }
        bytes.truncate(len as usize);
        // SAFETY: the kernel has filled the control bytes, which are aligned for a header.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message).as_ref() };
        if let Some(header) = header
            .filter(|it| (it.cmsg_level, it.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA))
        {
            // SAFETY: this type and level say that it is a tpacket_auxdata.
            let known: libc::tpacket_auxdata = unsafe {
                libc::CMSG_DATA(header)
                    .cast::<libc::tpacket_auxdata>()
                    .read_unaligned()
            };
            if known.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                let [high, low] = known.tp_vlan_tci.to_be_bytes();
                bytes.splice(12..12, [0x81, 0, high, low]);
            }
        }
        Some(bytes)
    }

    /// The next frame.
    pub(super) fn receive(&self) -> Vec<u8> {
        loop {
            if let Some(frame) = self.take() {
                return frame;
            }
            let mut fd = libc::pollfd {
                fd: self.fd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd on this stack.
            let ready = unsafe { libc::poll(&raw mut fd, 1, PATIENCE_MS) };
            assert_eq!(ready, 1, "nothing was heard");
        }
    }
}
