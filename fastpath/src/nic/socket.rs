//! A NIC over a datagram socket pair, for tests and benches.
//!
//! Does not filter.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;

use super::{Filter, Nic, Sent};

/// One datagram is one frame.
#[derive(Debug)]
pub struct SocketNic {
    socket: UnixDatagram,
    mtu: u16,
}

impl SocketNic {
    /// A NIC and the wire it is plugged into.
    pub fn pair(mtu: u16) -> io::Result<(Self, UnixDatagram)> {
        let (socket, wire) = UnixDatagram::pair()?;
        socket.set_nonblocking(true)?;
        Ok((Self { socket, mtu }, wire))
    }
}

impl Nic for SocketNic {
    fn name(&self) -> &str {
        "socket"
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match self.socket.recv(buf) {
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<Sent> {
        match self.socket.send(frame) {
            Ok(_) => Ok(Sent::Done),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Sent::WouldBlock),
            Err(e) => Err(e),
        }
    }

    fn poll_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn set_filter(&mut self, _filter: Filter) -> io::Result<()> {
        Ok(())
    }
}
