//! The packet channel of the link: mirrored input, SVM output and their acknowledgements over one TCP stream.
//!
//! A message is `len:u32 kind:u8 0 0 0 epoch:u64 seq:u64 body`, little-endian; `len` counts the body. Order is the
//! stream's. Buffers are bounded: the writer asks [`PacketLink::has_room`] before it takes more work in.
//!
//! Does not interpret frames.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;

mod msg;

use msg::{BODY_MAX, HEAD_BYTES, Head};
pub use msg::{Malformed, PacketMsg};

/// Unsent bytes above which no more work is taken in.
const OUT_HIGH: usize = 4 << 20;
const IN_CAPACITY: usize = 256 << 10;

/// Why the packet channel is unusable.
#[derive(Debug, thiserror::Error)]
pub enum PacketLinkError {
    /// The peer closed it.
    #[error("packet channel: closed by the peer")]
    Closed,
    /// The socket failed.
    #[error("packet channel: {0}")]
    Io(#[from] io::Error),
    /// The bytes are no message.
    #[error("packet channel: {0}")]
    Malformed(#[from] Malformed),
}

/// One end of the packet channel.
#[derive(Debug)]
pub struct PacketLink {
    stream: TcpStream,
    out: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes written to the socket.
    pub sent_bytes: u64,
    /// Bytes read from the socket.
    pub received_bytes: u64,
}

impl PacketLink {
    /// Over a connected stream, which becomes non-blocking.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            out: Vec::with_capacity(OUT_HIGH + BODY_MAX),
            sent: 0,
            input: vec![0; IN_CAPACITY],
            start: 0,
            end: 0,
            sent_bytes: 0,
            received_bytes: 0,
        })
    }

    /// What to wait for.
    pub fn pollfd(&self) -> libc::pollfd {
        let out = if self.has_unsent() { libc::POLLOUT } else { 0 };
        libc::pollfd {
            fd: self.stream.as_raw_fd(),
            events: libc::POLLIN | out,
            revents: 0,
        }
    }

    /// Ends the connection.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream.shutdown(how)
    }

    /// True while more may be pushed.
    pub fn has_room(&self) -> bool {
        self.out.len() - self.sent < OUT_HIGH
    }

    /// True while bytes wait for the socket.
    pub fn has_unsent(&self) -> bool {
        self.sent < self.out.len()
    }

    /// Appends a message to what is to be sent; [`Self::flush`] sends it.
    pub fn push(&mut self, msg: &PacketMsg<'_>) {
        let encoded = msg.encode();
        self.out.extend_from_slice(encoded.head());
        self.out.extend_from_slice(encoded.body);
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> Result<(), PacketLinkError> {
        while self.sent < self.out.len() {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(0) => return Err(PacketLinkError::Closed),
                Ok(n) => {
                    self.sent += n;
                    self.sent_bytes += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        } else if self.sent > OUT_HIGH / 2 {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }

    /// Reads what the socket has, as far as the buffer holds it. True if there was anything.
    pub fn fill(&mut self) -> Result<bool, PacketLinkError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.end < HEAD_BYTES + BODY_MAX {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.input.len() {
            return Ok(false);
        }
        match self.stream.read(&mut self.input[self.end..]) {
            Ok(0) => Err(PacketLinkError::Closed),
            Ok(n) => {
                self.end += n;
                self.received_bytes += n as u64;
                Ok(true)
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// The next whole message that was read.
    pub fn next_msg(&mut self) -> Result<Option<PacketMsg<'_>>, PacketLinkError> {
        loop {
            let have = &self.input[self.start..self.end];
            let Some(head) = Head::read(have)?.filter(|h| have.len() >= HEAD_BYTES + h.len) else {
                return Ok(None);
            };
            let at = self.start + HEAD_BYTES;
            self.start = at + head.len;
            // Twice: a loop cannot return what it borrowed when it may also skip it.
            let known = PacketMsg::decode(head, &self.input[at..at + head.len])?.is_some();
            if known {
                return Ok(PacketMsg::decode(head, &self.input[at..at + head.len])?);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (PacketLink, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (b, _) = listener.accept().unwrap();
        (PacketLink::new(a).unwrap(), b)
    }

    fn received(link: &mut PacketLink, n: usize) -> Vec<String> {
        let mut out = Vec::new();
        while out.len() < n {
            link.fill().unwrap();
            while let Some(msg) = link.next_msg().unwrap() {
                out.push(format!("{msg:?}"));
            }
        }
        out
    }

    #[test]
    fn messages_arrive_whole_and_in_order_however_the_stream_is_cut() {
        let (mut a, b) = pair();
        let mut b = PacketLink::new(b).unwrap();
        let frame = vec![7u8; 1514];
        let mut expected = Vec::new();
        for seq in 0..2000 {
            let msg = match seq % 4 {
                0 => PacketMsg::Input {
                    epoch: 1,
                    seq,
                    frame: &frame[..14 + seq as usize % 1500],
                },
                1 => PacketMsg::Output {
                    epoch: 2,
                    seq,
                    frame: &frame,
                },
                2 => PacketMsg::InputAck { up_to: seq },
                _ => PacketMsg::Released { seqs: &frame[..16] },
            };
            expected.push(format!("{msg:?}"));
            a.push(&msg);
        }
        let mut got = Vec::new();
        while got.len() < expected.len() {
            a.flush().unwrap();
            let n = got.len();
            b.fill().unwrap();
            while let Some(msg) = b.next_msg().unwrap() {
                got.push(format!("{msg:?}"));
            }
            assert!(got.len() > n || a.has_unsent() || !got.is_empty());
        }
        assert_eq!(got, expected);
    }

    #[test]
    fn garbage_is_an_error_and_later_kinds_are_skipped() {
        let (mut link, mut peer) = pair();
        let mut later = [0u8; HEAD_BYTES + 5];
        later[0] = 5;
        later[4] = 200;
        peer.write_all(&later).unwrap();
        let mut ack = [0u8; HEAD_BYTES];
        ack[4] = 2;
        ack[16] = 9;
        peer.write_all(&ack).unwrap();
        assert_eq!(
            received(&mut link, 1),
            [format!("{:?}", PacketMsg::InputAck { up_to: 9 })]
        );
        peer.write_all(b"GET /index.html HTTP/1.1\r\n").unwrap();
        let e = loop {
            link.fill().unwrap();
            match link.next_msg() {
                Ok(None) => {}
                Ok(Some(msg)) => panic!("garbage was taken for {msg:?}"),
                Err(e) => break e,
            }
        };
        assert!(matches!(e, PacketLinkError::Malformed(_)), "{e}");
    }

    #[test]
    fn a_closed_peer_is_noticed() {
        let (mut link, peer) = pair();
        drop(peer);
        let e = loop {
            if let Err(e) = link.fill() {
                break e;
            }
        };
        assert!(matches!(e, PacketLinkError::Closed), "{e}");
    }
}
