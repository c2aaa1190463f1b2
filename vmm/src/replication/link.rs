//! The link between the two hosts: the TCP channels of one session.
//!
//! Each channel starts with a preamble `"COLOLINK" version:u16 channel:u8 more:u8 session:u64` (little-endian), which
//! the joining side sends. Channel 0, *control*, carries [`colo_control::Msg`]; 1, *packets*, mirrored input and SVM
//! output of the first shard; 2, *pages*, checkpoints; from 3 on the packets of further shards, `more` in number.
//! Separate channels, so that bulk pages never stand before a heartbeat or a packet.
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
const WAITING_MAX: usize = 32;
/// Shards of a VM at most.
pub const SHARDS_MAX: usize = 8;
/// Channels besides the packets of further shards.
const CHANNELS: usize = 3;

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

/// The connected channels.
#[derive(Debug)]
pub struct Channels {
    /// The session that the joining side chose.
    pub session: u64,
    /// Control messages.
    pub control: TcpStream,
    /// Packets, of each shard.
    pub packets: Vec<TcpStream>,
    /// Checkpoints.
    pub pages: TcpStream,
}

/// Joins: connects all channels to a primary; `shards` is 1 to [`SHARDS_MAX`].
pub fn connect(address: SocketAddr, session: u64, shards: usize) -> Result<Channels, LinkError> {
    let more = shards.clamp(1, SHARDS_MAX) - 1;
    let open = |channel: usize| {
        let mut stream = TcpStream::connect_timeout(&address, PREAMBLE_TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.write_all(&preamble(channel as u8, more as u8, session))?;
        Ok(stream)
    };
    let open_all = || (0..CHANNELS + more).map(open).collect();
    let streams: io::Result<Vec<_>> = open_all();
    let channels = streams.and_then(|streams| {
        let session_of = Channels::of(session, streams);
        session_of.ok_or_else(|| io::ErrorKind::NotConnected.into())
    });
    channels.map_err(|source| LinkError::Connect { address, source })
}

impl Channels {
    fn of(session: u64, streams: impl IntoIterator<Item = TcpStream>) -> Option<Self> {
        let mut streams = streams.into_iter();
        let control = streams.next()?;
        let first = streams.next()?;
        let pages = streams.next()?;
        Some(Self {
            session,
            control,
            packets: std::iter::once(first).chain(streams).collect(),
            pages,
        })
    }
}

/// The primary's side: accepts channels and puts sessions together.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    waiting: Vec<Waiting>,
    sessions: HashMap<u64, Session>,
    /// Connections dropped because they were no colo link.
    pub refused: u64,
}

/// A session that is being put together.
#[derive(Debug)]
struct Session {
    since: Instant,
    channels: Vec<Option<TcpStream>>,
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
            .retain(|_, session| session.since.elapsed() < PREAMBLE_TIMEOUT);
        for mut waiting in std::mem::take(&mut self.waiting) {
            match waiting.read_preamble() {
                Ok(None) if waiting.since.elapsed() < PREAMBLE_TIMEOUT => {
                    self.waiting.push(waiting)
                }
                Ok(Some(preamble)) => {
                    let entry = self.sessions.entry(preamble.session);
                    let session = entry.or_insert_with(|| Session {
                        since: Instant::now(),
                        channels: (0..CHANNELS + preamble.more).map(|_| None).collect(),
                    });
                    match session.channels.get_mut(preamble.channel) {
                        Some(channel) => *channel = Some(waiting.stream),
                        None => self.refused += 1,
                    }
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
        let is_complete = |session: &Session| session.channels.iter().all(Option::is_some);
        let mut sessions = self.sessions.iter();
        let session = *sessions.find(|(_, session)| is_complete(session))?.0;
        let streams = self.sessions.remove(&session)?.channels;
        Channels::of(session, streams.into_iter().flatten())
    }
}

/// What a channel says of itself.
struct Preamble {
    channel: usize,
    more: usize,
    session: u64,
}

impl Waiting {
    /// The preamble once it is whole.
    fn read_preamble(&mut self) -> io::Result<Option<Preamble>> {
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
        let (channel, more) = (usize::from(self.got[10]), usize::from(self.got[11]));
        if version != LINK_VERSION || more >= SHARDS_MAX || channel >= CHANNELS + more {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut session = [0; 8];
        session.copy_from_slice(&self.got[12..20]);
        Ok(Some(Preamble {
            channel,
            more,
            session: u64::from_le_bytes(session),
        }))
    }
}

fn preamble(channel: u8, more: u8, session: u64) -> [u8; PREAMBLE_LEN] {
    let mut out = [0; PREAMBLE_LEN];
    out[..8].copy_from_slice(MAGIC);
    out[8..10].copy_from_slice(&LINK_VERSION.to_le_bytes());
    out[10] = channel;
    out[11] = more;
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
        for (session, shards) in [(11u64, 1), (22, 3)] {
            let mut channels = connect(address, session, shards).unwrap();
            for (shard, packets) in channels.packets.iter_mut().enumerate() {
                let name = session + shard as u64;
                packets.write_all(&name.to_le_bytes()).unwrap();
            }
            ours.push(channels);
        }
        for _ in 0..2 {
            let mut theirs = poll_until(|| listener.poll());
            let shards = if theirs.session == 11 { 1 } else { 3 };
            assert_eq!(theirs.packets.len(), shards);
            for (shard, packets) in theirs.packets.iter_mut().enumerate() {
                packets.set_nonblocking(false).unwrap();
                let mut bytes = [0; 8];
                packets.read_exact(&mut bytes).unwrap();
                assert_eq!(u64::from_le_bytes(bytes), theirs.session + shard as u64);
            }
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
        let _ours = connect(address, 5, 1).unwrap();
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
