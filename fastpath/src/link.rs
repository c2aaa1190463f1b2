//! The packet channel of the link: mirrored input, SVM output and their acknowledgements over one TCP stream.
//!
//! A message is `len:u32 kind:u8 0 0 0 epoch:u64 seq:u64 body`, little-endian; `len` counts the body. Order is the
//! stream's. Buffers are bounded: the writer asks [`PacketLink::has_room`] before it takes more work in.
//!
//! Does not interpret frames.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;

const HEAD: usize = 24;
/// Longest body in bytes: a jumbo frame, or a list of sequence numbers.
const BODY_MAX: usize = 64 << 10;
/// Unsent bytes above which no more work is taken in.
const OUT_HIGH: usize = 4 << 20;
const IN_CAPACITY: usize = 256 << 10;

/// A message of the packet channel.
#[derive(Debug, PartialEq, Eq)]
pub enum PacketMsg<'a> {
    /// Primary to secondary: a frame the PVM got (rule 4).
    Input {
        /// Epoch it was delivered in.
        epoch: u64,
        /// Its place in the order of delivery.
        seq: u64,
        /// From the Ethernet header on.
        frame: &'a [u8],
    },
    /// Secondary to primary: all input up to here is kept (rule 5).
    InputAck {
        /// The last sequence number covered.
        up_to: u64,
    },
    /// Secondary to primary: a frame the SVM sent, in the PVM's space.
    Output {
        /// The SVM's epoch.
        epoch: u64,
        /// Names it in `Released`.
        seq: u64,
        /// From the Ethernet header on.
        frame: &'a [u8],
    },
    /// Primary to secondary: these outputs have left (rule 9).
    Released {
        /// Sequence numbers of outputs, 8 bytes each, little-endian.
        seqs: &'a [u8],
    },
    /// Primary to secondary: the pending output of this checkpoint has left (rule 12).
    PendingReleased {
        /// The checkpoint's epoch.
        epoch: u64,
    },
    /// Secondary to primary: the SVM has consumed its backlog (rule 9).
    CaughtUp {
        /// The SVM's epoch.
        epoch: u64,
    },
    /// Secondary to primary: a limit here needs a checkpoint.
    CheckpointWanted,
}

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
    #[error(
        "packet channel: message kind {kind} with {len} bytes makes no sense; versions differ or data is damaged"
    )]
    Malformed {
        /// Kind field.
        kind: u8,
        /// Length field.
        len: usize,
    },
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
        let (kind, epoch, seq, body): (u8, u64, u64, &[u8]) = match *msg {
            PacketMsg::Input { epoch, seq, frame } => (1, epoch, seq, frame),
            PacketMsg::InputAck { up_to } => (2, 0, up_to, &[]),
            PacketMsg::Output { epoch, seq, frame } => (3, epoch, seq, frame),
            PacketMsg::Released { seqs } => (4, 0, 0, seqs),
            PacketMsg::PendingReleased { epoch } => (5, epoch, 0, &[]),
            PacketMsg::CaughtUp { epoch } => (6, epoch, 0, &[]),
            PacketMsg::CheckpointWanted => (7, 0, 0, &[]),
        };
        let mut head = [0u8; HEAD];
        head[..4].copy_from_slice(&(body.len() as u32).to_le_bytes());
        head[4] = kind;
        head[8..16].copy_from_slice(&epoch.to_le_bytes());
        head[16..24].copy_from_slice(&seq.to_le_bytes());
        self.out.extend_from_slice(&head);
        self.out.extend_from_slice(body);
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
        } else if self.input.len() - self.end < HEAD + BODY_MAX {
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
            let Some(head) = have.get(..HEAD) else {
                return Ok(None);
            };
            let len = u32_at(head, 0) as usize;
            let (kind, epoch, seq) = (head[4], u64_at(head, 8), u64_at(head, 16));
            if len > BODY_MAX {
                return Err(PacketLinkError::Malformed { kind, len });
            }
            if have.len() < HEAD + len {
                return Ok(None);
            }
            let at = self.start + HEAD;
            self.start = at + len;
            let body = &self.input[at..at + len];
            return Ok(Some(match kind {
                1 if len >= 14 => PacketMsg::Input {
                    epoch,
                    seq,
                    frame: body,
                },
                2 => PacketMsg::InputAck { up_to: seq },
                3 if len >= 14 => PacketMsg::Output {
                    epoch,
                    seq,
                    frame: body,
                },
                4 if len.is_multiple_of(8) => PacketMsg::Released { seqs: body },
                5 => PacketMsg::PendingReleased { epoch },
                6 => PacketMsg::CaughtUp { epoch },
                7 => PacketMsg::CheckpointWanted,
                // A kind of a later version (rule 22).
                8.. => continue,
                _ => return Err(PacketLinkError::Malformed { kind, len }),
            }));
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
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
        let mut later = [0u8; HEAD + 5];
        later[0] = 5;
        later[4] = 200;
        peer.write_all(&later).unwrap();
        let mut ack = [0u8; HEAD];
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
        assert!(matches!(e, PacketLinkError::Malformed { .. }), "{e}");
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
