//! The control channel as a socket: whole messages in and out, never blocking.
//!
//! Invariant: of what has come, one message and one turn's reads are kept at most, however fast the peer sends.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

use colo_control::{Msg, MsgError};

/// Unsent bytes above which the peer counts as stuck.
const OUT_MAX: usize = 256 << 20;
const READ_BYTES: usize = 64 << 10;
/// Reads of one turn; what is left makes the descriptor readable again.
const READS_MAX: usize = 16;

/// Why the control channel is unusable.
#[derive(Debug, thiserror::Error)]
pub enum ControlLinkError {
    /// The peer closed it.
    #[error("control channel: closed by the peer")]
    Closed,
    /// The socket failed.
    #[error("control channel: {0}")]
    Io(#[from] io::Error),
    /// The bytes are no message.
    #[error("control channel: {0}")]
    Malformed(#[from] MsgError),
    /// The peer does not read.
    #[error("control channel: the peer does not read")]
    Stuck,
}

/// One end of the control channel.
#[derive(Debug)]
pub struct ControlLink {
    stream: TcpStream,
    out: Vec<u8>,
    input: Vec<u8>,
    /// What one read fills; kept, because clearing it for each heartbeat would be most of the work.
    buffer: Box<[u8]>,
}

impl ControlLink {
    /// Over a connected stream, which becomes non-blocking.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            out: Vec::new(),
            input: Vec::new(),
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
        })
    }

    /// What to wait for.
    pub fn pollfd(&self) -> libc::pollfd {
        let out = if self.out.is_empty() {
            0
        } else {
            libc::POLLOUT
        };
        libc::pollfd {
            fd: self.fd(),
            events: libc::POLLIN | out,
            revents: 0,
        }
    }

    /// The socket.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Sends a message, or keeps what the socket does not take yet.
    pub fn send(&mut self, msg: &Msg) -> Result<(), ControlLinkError> {
        msg.encode(&mut self.out);
        self.flush()?;
        if self.out.len() > OUT_MAX {
            Err(ControlLinkError::Stuck)
        } else {
            Ok(())
        }
    }

    /// Sends what is left.
    pub fn flush(&mut self) -> Result<(), ControlLinkError> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(0) => return Err(ControlLinkError::Closed),
                Ok(n) => drop(self.out.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// The messages that have come. Those before an error are delivered first, the error next time.
    pub fn receive(&mut self) -> Result<Vec<Msg>, ControlLinkError> {
        let closed = self.read();
        let mut messages = Vec::new();
        let mut at = 0;
        loop {
            match Msg::decode(&self.input[at..]) {
                Ok(Some((msg, len))) => {
                    messages.extend(msg);
                    at += len;
                }
                Ok(None) => break,
                Err(e) if messages.is_empty() => return Err(e.into()),
                Err(_) => break,
            }
        }
        self.input.drain(..at);
        if messages.is_empty() {
            closed.map(|()| messages)
        } else {
            Ok(messages)
        }
    }

    /// Whether there are bytes that no message was made of: to be looked at again though nothing may come.
    pub fn has_rest(&self) -> bool {
        !self.input.is_empty()
    }

    fn read(&mut self) -> Result<(), ControlLinkError> {
        for _ in 0..READS_MAX {
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(ControlLinkError::Closed),
                Ok(n) if n < READ_BYTES => {
                    self.input.extend_from_slice(&self.buffer[..n]);
                    // Whatever has come since makes the descriptor readable again.
                    return Ok(());
                }
                Ok(n) => self.input.extend_from_slice(&self.buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (ControlLink, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (b, _) = listener.accept().unwrap();
        (ControlLink::new(a).unwrap(), b)
    }

    fn next(link: &mut ControlLink) -> Result<Vec<Msg>, ControlLinkError> {
        loop {
            match link.receive() {
                Ok(messages) if messages.is_empty() => std::thread::yield_now(),
                other => return other,
            }
        }
    }

    #[test]
    fn the_last_words_of_a_peer_are_heard_before_its_end() {
        let (mut link, mut peer) = pair();
        let mut bytes = Vec::new();
        Msg::Paired { generation: 2 }.encode(&mut bytes);
        peer.write_all(&bytes).unwrap();
        drop(peer);
        assert_eq!(next(&mut link).unwrap(), [Msg::Paired { generation: 2 }]);
        assert!(matches!(next(&mut link), Err(ControlLinkError::Closed)));
    }

    #[test]
    fn a_peer_that_never_stops_is_read_in_turns() {
        const MESSAGES: usize = 1 << 20;
        let (mut link, mut peer) = pair();
        let mut one = Vec::new();
        Msg::Paired { generation: 2 }.encode(&mut one);
        let many = one.repeat(MESSAGES);
        let sender = std::thread::spawn(move || peer.write_all(&many).map(|()| peer));
        let mut came = 0;
        while came < MESSAGES {
            let messages = next(&mut link).unwrap().len();
            let bytes = messages * one.len() + link.input.len();
            assert!(
                bytes <= READS_MAX * READ_BYTES + one.len(),
                "{bytes} bytes in one turn"
            );
            came += messages;
        }
        drop(sender.join().unwrap().unwrap());
        assert!(matches!(next(&mut link), Err(ControlLinkError::Closed)));
    }

    #[test]
    fn garbage_is_an_error_after_what_came_before_it() {
        let (mut link, mut peer) = pair();
        let mut bytes = Vec::new();
        Msg::Paired { generation: 2 }.encode(&mut bytes);
        bytes.extend_from_slice(&[0xff; 64]);
        peer.write_all(&bytes).unwrap();
        assert_eq!(next(&mut link).unwrap(), [Msg::Paired { generation: 2 }]);
        assert!(link.has_rest(), "which nothing may come after");
        assert!(matches!(
            next(&mut link),
            Err(ControlLinkError::Malformed(_))
        ));
    }
}
