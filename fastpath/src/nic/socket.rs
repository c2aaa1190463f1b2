//! A NIC over a datagram socket pair, for tests and benches.
//!
//! Does not filter.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use colo_compare::{Frames, Token};

use super::{Filter, Nic, Sent, poll_for, read_frames};
use crate::frame::FramePool;

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

    fn describe(&self) -> String {
        "socket".to_owned()
    }

    fn receive(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<Token>,
        max: usize,
    ) -> io::Result<()> {
        read_frames(frames, out, max, |buf| self.socket.recv(buf))
    }

    fn send(&mut self, frames: &mut FramePool, token: Token) -> Sent {
        let sent = self.socket.send(frames.in_one_piece(&token));
        match sent {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Sent::Full(token),
            _ => frames.release(token),
        }
        sent.map_or_else(Sent::Refused, |_| Sent::Done)
    }

    fn poll_fds(&self, wants_frames: bool, wants_room: bool, fds: &mut Vec<libc::pollfd>) {
        fds.extend(poll_for(self.socket.as_raw_fd(), wants_frames, wants_room));
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn set_filter(&mut self, _filter: Filter) -> io::Result<()> {
        Ok(())
    }
}
