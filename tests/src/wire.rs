//! Frames as they are, on an interface of a network namespace: what somebody on the wire sees and says.
//!
//! Does not give frames that this host itself sends by the interface.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest frame that is taken whole.
const FRAME_BYTES: usize = 9216;

/// A packet socket on one interface.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    /// On an interface of this thread's network namespace.
    pub fn open(interface: &str) -> io::Result<Self> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: plain system call.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = CString::new(interface)?;
        // SAFETY: sockaddr_ll is plain data for which all zeroes is valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        // SAFETY: a C string that lives through the call.
        address.sll_ifindex = match unsafe { libc::if_nametoindex(name.as_ptr()) } {
            0 => return Err(io::Error::last_os_error()),
            index => index as i32,
        };
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address lives through the call and is as long as said.
        if unsafe { libc::bind(fd, (&raw const address).cast(), length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { socket })
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let (fd, at) = (self.socket.as_raw_fd(), frame.as_ptr().cast());
        // SAFETY: the frame lives through the call.
        match unsafe { libc::send(fd, at, frame.len(), 0) } {
            ..0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// The next frame that comes by the interface within `patience`.
    pub fn receive(&self, patience: Duration) -> io::Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fd = libc::pollfd {
                fd: self.socket.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd on this stack.
            if unsafe { libc::poll(&raw mut fd, 1, left.as_millis() as i32) } <= 0 {
                return Ok(None);
            }
            let mut frame = vec![0; FRAME_BYTES];
            // SAFETY: sockaddr_ll is plain data for which all zeroes is valid.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            let (at, from_at) = (frame.as_mut_ptr().cast(), (&raw mut from).cast());
            // SAFETY: buffer and address live through the call and are as long as said.
            let got =
                unsafe { libc::recvfrom(fd.fd, at, frame.len(), 0, from_at, &raw mut length) };
            let Ok(got) = usize::try_from(got) else {
                return Err(io::Error::last_os_error());
            };
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                frame.truncate(got);
                return Ok(Some(frame));
            }
        }
    }
}
