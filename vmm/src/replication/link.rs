//! The link between the two hosts: three TCP channels of one session.
//!
//! Each channel starts with a preamble `"COLOLINK" version:u16 channel:u8 0 session:u64` (little-endian), which the
//! joining side sends. *Control* carries [`colo_control::Msg`], *packets* mirrored input and SVM output, *pages*
//! checkpoints. Separate channels, so that bulk pages never stand before a heartbeat or a packet.
//!
//! Does not interpret what the channels carry.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"COLOLINK";
const PREAMBLE_LEN: usize = 8 + 2 + 1 + 1 + 8;
const LINK_VERSION: u16 = 1;
/// A peer that has not sent its preamble and all channels by then is dropped.
const PREAMBLE_TIMEOUT: Duration = Duration::from_secs(2);
/// Half-open connections kept at a time.
const WAITING_MAX: usize = 12;

/// Why a link could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The listening address can't be used.
    #[error(
        "replication.link_listen {address}: {source}; choose an address of this host and a free port"
    )]
    Listen {
        /// From the configuration.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// The peer can't be reached.
    #[error("replication.link_peer {address}: {source}; is the primary running?")]
    Connect {
        /// From the configuration.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
}

/// The three connected channels.
#[derive(Debug)]
pub struct Channels {
    /// The session that the joining side chose.
    pub session: u64,
    /// Control messages.
    pub control: TcpStream,
    /// Packets.
    pub packets: TcpStream,
    /// Checkpoints.
    pub pages: TcpStream,
}

/// Joins: connects all channels to a primary.
pub fn connect(address: SocketAddr, session: u64) -> Result<Channels, LinkError> {
    let open = |channel: u8| {
        let mut stream = TcpStream::connect_timeout(&address, PREAMBLE_TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.write_all(&preamble(channel, session))?;
        Ok(stream)
    };
    let named = |source| LinkError::Connect { address, source };
    Ok(Channels {
        session,
        control: open(0).map_err(named)?,
        packets: open(1).map_err(named)?,
        pages: open(2).map_err(named)?,
    })
}

/// The primary's side: accepts channels and puts sessions together.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    waiting: Vec<Waiting>,
    sessions: HashMap<u64, (Instant, [Option<TcpStream>; 3])>,
    /// Connections dropped because they were no colo link.
    pub refused: u64,
}

#[derive(Debug)]
struct Waiting {
    stream: TcpStream,
    since: Instant,
    got: Vec<u8>,
}

impl Listener {
    /// Listens, without blocking.
    pub fn bind(address: SocketAddr) -> Result<Self, LinkError> {
        let named = |source| LinkError::Listen { address, source };
        let socket = TcpListener::bind(address).map_err(named)?;
        socket.set_nonblocking(true).map_err(named)?;
        Ok(Self {
            socket,
            waiting: Vec::new(),
            sessions: HashMap::new(),
            refused: 0,
        })
    }

    /// Descriptors that become readable when [`Self::poll`] has work.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> + '_ {
        let waiting = self.waiting.iter().map(|w| w.stream.as_raw_fd());
        std::iter::once(self.socket.as_raw_fd()).chain(waiting)
    }

    /// True while a peer has connected some of its channels.
    pub fn is_busy(&self) -> bool {
        !self.waiting.is_empty() || !self.sessions.is_empty()
    }

    /// Accepts and reads what there is; a session that is complete.
    pub fn poll(&mut self) -> Option<Channels> {
        while let Ok((stream, _)) = self.socket.accept() {
            let usable = stream.set_nonblocking(true).is_ok() && stream.set_nodelay(true).is_ok();
            if usable && self.waiting.len() < WAITING_MAX {
                self.waiting.push(Waiting {
                    stream,
                    since: Instant::now(),
                    got: Vec::new(),
                });
            } else {
                self.refused += 1;
            }
        }
        self.sessions
            .retain(|_, (since, _)| since.elapsed() < PREAMBLE_TIMEOUT);
        for mut waiting in std::mem::take(&mut self.waiting) {
            match waiting.read_preamble() {
                Ok(None) if waiting.since.elapsed() < PREAMBLE_TIMEOUT => {
                    self.waiting.push(waiting)
                }
                Ok(Some((channel, session))) => {
                    let entry = self.sessions.entry(session);
                    let (_, slots) = entry.or_insert_with(|| (Instant::now(), [None, None, None]));
                    slots[channel] = Some(waiting.stream);
                }
                Ok(None) | Err(_) => {
                    self.refused += 1;
                    tracing::warn!(
                        "a connection to replication.link_listen was not a colo link; dropped"
                    );
                }
            }
        }
        self.take_complete()
    }

    fn take_complete(&mut self) -> Option<Channels> {
        let complete =
            |(_, slots): &(Instant, [Option<TcpStream>; 3])| slots.iter().all(Option::is_some);
        let session = *self.sessions.iter().find(|(_, entry)| complete(entry))?.0;
        let (_, slots) = self.sessions.remove(&session)?;
        let [Some(control), Some(packets), Some(pages)] = slots else {
            return None;
        };
        Some(Channels {
            session,
            control,
            packets,
            pages,
        })
    }
}

impl Waiting {
    /// Channel and session once the preamble is whole.
    fn read_preamble(&mut self) -> io::Result<Option<(usize, u64)>> {
        let mut buffer = [0u8; PREAMBLE_LEN];
        let missing = PREAMBLE_LEN - self.got.len();
        match self.stream.read(&mut buffer[..missing]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.got.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        }
        if !MAGIC.starts_with(&self.got[..self.got.len().min(MAGIC.len())]) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if self.got.len() < PREAMBLE_LEN {
            return Ok(None);
        }
        let version = u16::from_le_bytes([self.got[8], self.got[9]]);
        let channel = usize::from(self.got[10]);
        if version != LINK_VERSION || channel > 2 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut session = [0; 8];
        session.copy_from_slice(&self.got[12..20]);
        Ok(Some((channel, u64::from_le_bytes(session))))
    }
}

fn preamble(channel: u8, session: u64) -> [u8; PREAMBLE_LEN] {
    let mut out = [0; PREAMBLE_LEN];
    out[..8].copy_from_slice(MAGIC);
    out[8..10].copy_from_slice(&LINK_VERSION.to_le_bytes());
    out[10] = channel;
    out[12..].copy_from_slice(&session.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener() -> (Listener, SocketAddr) {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.socket.local_addr().unwrap();
        (listener, address)
    }

    fn poll_until<T>(mut f: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(t) = f() {
                return t;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "gave up waiting");
            std::thread::yield_now();
        }
    }

    #[test]
    fn channels_of_two_sessions_are_not_mixed() {
        let (mut listener, address) = listener();
        let mut ours = Vec::new();
        for session in [11, 22] {
            let mut channels = connect(address, session).unwrap();
            channels.packets.write_all(&session.to_le_bytes()).unwrap();
            ours.push(channels);
        }
        for _ in 0..2 {
            let mut theirs = poll_until(|| listener.poll());
            theirs.packets.set_nonblocking(false).unwrap();
            let mut bytes = [0; 8];
            theirs.packets.read_exact(&mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), theirs.session);
        }
    }

    #[test]
    fn garbage_is_counted_and_does_not_stop_others() {
        let (mut listener, address) = listener();
        let mut garbage = TcpStream::connect(address).unwrap();
        garbage.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        poll_until(|| {
            assert!(listener.poll().is_none());
            (listener.refused == 1).then_some(())
        });
        let _ours = connect(address, 5).unwrap();
        assert_eq!(poll_until(|| listener.poll()).session, 5);
    }

    #[test]
    fn a_used_address_is_named() {
        let (_listener, address) = listener();
        let e = Listener::bind(address).unwrap_err().to_string();
        assert!(
            e.contains("link_listen") && e.contains(&address.to_string()),
            "{e}"
        );
    }
}
