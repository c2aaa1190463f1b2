//! The TCP connection of the packet channel, as messages in order.
//!
//! Invariants: a message is read whole or not at all; what came before the end of the connection can be read after it.
//!
//! Does not interpret messages.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::PacketLinkError;
use super::msg::{BODY_MAX, HEAD_BYTES, Head, Malformed};

/// Unsent bytes above which no more work is taken in.
pub(super) const OUT_HIGH: usize = 4 << 20;
const IN_CAPACITY: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct Stream {
    socket: TcpStream,
    out: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Why there will be nothing more to read.
    ended: Option<PacketLinkError>,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    /// System calls.
    pub(super) calls: u64,
}

impl Stream {
    /// Over a connected socket, which becomes non-blocking. `reserve`: bytes that may be pushed on top of what
    /// [`Self::has_room`] admits.
    pub(super) fn new(socket: TcpStream, reserve: usize) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Self {
            socket,
            // What was sent stays in it until it is a half of this.
            out: Vec::with_capacity(OUT_HIGH / 2 + OUT_HIGH + BODY_MAX + reserve),
            sent: 0,
            input: vec![0; IN_CAPACITY],
            start: 0,
            end: 0,
            ended: None,
            sent_bytes: 0,
            received_bytes: 0,
            calls: 0,
        })
    }

    pub(super) fn pollfd(&self) -> libc::pollfd {
        let out = if self.has_unsent() { libc::POLLOUT } else { 0 };
        libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: libc::POLLIN | out,
            revents: 0,
        }
    }

    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.socket.shutdown(how)
    }

    pub(super) fn has_room(&self) -> bool {
        self.out.len() - self.sent < OUT_HIGH
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.sent < self.out.len()
    }

    pub(super) fn push(&mut self, head: &[u8], body: &[u8]) {
        self.out.extend_from_slice(head);
        self.out.extend_from_slice(body);
    }

    /// Sends what the socket takes. An error is kept for [`Self::ended`]: what the peer said before can still be read.
    pub(super) fn flush(&mut self) {
        while self.has_unsent() {
            self.calls += 1;
            match self.socket.write(&self.out[self.sent..]) {
                Ok(0) => self.end_with(PacketLinkError::Closed),
                Ok(n) => {
                    self.sent += n;
                    self.sent_bytes += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => self.end_with(e.into()),
            }
        }
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        } else if self.sent > OUT_HIGH / 2 {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Reads what the socket has, as far as the buffer holds it. True if there was anything.
    pub(super) fn fill(&mut self) -> bool {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.end < HEAD_BYTES + BODY_MAX {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.input.len() {
            return false;
        }
        self.calls += 1;
        match self.socket.read(&mut self.input[self.end..]) {
            Ok(0) => self.ended = Some(PacketLinkError::Closed),
            Ok(n) => {
                self.end += n;
                self.received_bytes += n as u64;
                return true;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => self.ended = Some(e.into()),
        }
        false
    }

    /// Whether the connection is of no more use for sending.
    pub(super) fn is_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Why nothing more comes, once everything that came was taken.
    pub(super) fn take_end(&mut self) -> Option<PacketLinkError> {
        match self.peek() {
            Ok(None) => self.ended.take(),
            _ => None,
        }
    }

    /// The next message if it is there whole.
    pub(super) fn next(&mut self) -> Result<Option<(Head, Range<usize>)>, Malformed> {
        let Some(head) = self.peek()? else {
            return Ok(None);
        };
        let at = self.start + HEAD_BYTES;
        self.start = at + head.len;
        Ok(Some((head, at..at + head.len)))
    }

    /// What [`Self::next`] has named.
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.input[range]
    }

    fn peek(&self) -> Result<Option<Head>, Malformed> {
        let have = &self.input[self.start..self.end];
        Ok(Head::read(have)?.filter(|head| have.len() >= HEAD_BYTES + head.len))
    }

    fn end_with(&mut self, error: PacketLinkError) {
        self.ended.get_or_insert(error);
        // Nobody reads it.
        self.out.clear();
        self.sent = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn no_memory_is_taken_however_much_of_what_is_said_the_socket_has_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut stream = Stream::new(socket, 0).unwrap();
        let capacity = stream.out.capacity();
        for sent in [0, OUT_HIGH / 2] {
            // As after a flush.
            stream.sent = sent;
            while stream.has_room() {
                stream.push(&[7; HEAD_BYTES], &[7; BODY_MAX]);
            }
        }
        assert_eq!(stream.out.capacity(), capacity);
    }
}
