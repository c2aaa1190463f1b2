//! The primary's side of the link: it accepts channels and puts sessions together.
//!
//! Invariants: it never waits for who connects; half-open connections and sessions have a limit and an end; what is refused is
//! counted.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use super::{
    AGAIN, Channels, LINK_VERSION, LinkError, MAGIC, More, PAGE_STREAMS_MAX, PREAMBLE_LEN,
    PREAMBLE_TIMEOUT, QUESTION, SHARDS_MAX,
};

/// How often an address that is not free is tried.
const LISTEN_RETRY: Duration = Duration::from_secs(1);
/// Half-open connections kept at a time.
const WAITING_MAX: usize = 32;
/// Sessions that are put together at a time: one joins, others may have failed half-way just before.
const SESSIONS_MAX: usize = 8;

/// The primary's side: accepts channels and puts sessions together.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    /// `None` while somebody else has the address.
    socket: Option<TcpListener>,
    tried: Instant,
    waiting: Vec<Waiting>,
    /// Those that join, and those whose pages are opened anew.
    sessions: HashMap<(u64, bool), Session>,
    /// Streams of pages that a session has at most.
    page_streams: usize,
    /// Connections dropped because they were no colo link.
    pub refused: u64,
}

/// A session that is being put together.
#[derive(Debug)]
struct Session {
    since: Instant,
    more: More,
    channels: Vec<Option<TcpStream>>,
}

impl Session {
    fn is_complete(&self) -> bool {
        self.channels.iter().all(Option::is_some)
    }
}

#[derive(Debug)]
struct Waiting {
    stream: TcpStream,
    since: Instant,
    got: Vec<u8>,
}

impl Listener {
    /// Listens, without blocking, for sessions of at most so many streams of pages.
    pub fn bind(address: SocketAddr, page_streams: usize) -> Result<Self, LinkError> {
        let mut listener = Self::idle(address, page_streams);
        listener.listen()?;
        Ok(listener)
    }

    /// The same for who runs a VM already: when the address is not free it is told, and tried again until it is.
    pub fn bind_when_free(address: SocketAddr, page_streams: usize) -> Self {
        let mut listener = Self::idle(address, page_streams);
        if let Err(e) = listener.listen() {
            tracing::error!("{e}; no secondary can join until then");
        }
        listener
    }

    fn idle(address: SocketAddr, page_streams: usize) -> Self {
        Self {
            address,
            socket: None,
            tried: Instant::now(),
            waiting: Vec::new(),
            sessions: HashMap::new(),
            page_streams: page_streams.clamp(1, PAGE_STREAMS_MAX),
            refused: 0,
        }
    }

    fn listen(&mut self) -> Result<(), LinkError> {
        self.tried = Instant::now();
        let address = self.address;
        let named = |source| LinkError::Listen { address, source };
        let socket = TcpListener::bind(address).map_err(named)?;
        socket.set_nonblocking(true).map_err(named)?;
        self.socket = Some(socket);
        Ok(())
    }

    /// Descriptors that become readable when [`Self::poll`] has work.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> + '_ {
        let waiting = self.waiting.iter().map(|w| w.stream.as_raw_fd());
        let socket = self.socket.iter().map(AsRawFd::as_raw_fd);
        socket.chain(waiting)
    }

    /// True while a peer has connected some of its channels, or the address is not free.
    pub fn is_busy(&self) -> bool {
        self.socket.is_none() || !self.waiting.is_empty() || !self.sessions.is_empty()
    }

    /// Accepts and reads what there is; a session that is complete.
    pub fn poll(&mut self) -> Option<Channels> {
        if self.socket.is_none() && self.tried.elapsed() >= LISTEN_RETRY && self.listen().is_ok() {
            tracing::info!("replication.link_listen {} is free now", self.address);
        }
        while let Some(socket) = &self.socket
            && let Ok((stream, _)) = socket.accept()
        {
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
            match waiting.read_preamble(self.page_streams) {
                Ok(None) if waiting.since.elapsed() < PREAMBLE_TIMEOUT => {
                    self.waiting.push(waiting)
                }
                Ok(Some(preamble)) if preamble.channel == usize::from(QUESTION) => {
                    // Whoever asked and does not hear it asks again.
                    let _ = waiting.stream.write_all(&[self.page_streams as u8]);
                }
                Ok(Some(preamble)) => self.put_together(preamble, waiting.stream),
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

    fn put_together(&mut self, preamble: Preamble, stream: TcpStream) {
        let more = preamble.more;
        let again = preamble.again();
        let (channel, count) = match again {
            Some(channel) => (channel, more.page_streams + 1),
            None => (preamble.channel, more.channels()),
        };
        let key = (preamble.session, again.is_some());
        let is_new = !self.sessions.contains_key(&key);
        if is_new && self.sessions.len() >= SESSIONS_MAX {
            self.refused += 1;
            tracing::warn!(
                "{SESSIONS_MAX} sessions are being put together at replication.link_listen; another one is refused"
            );
            return;
        }
        let entry = self.sessions.entry(key);
        let session = entry.or_insert_with(|| Session {
            since: Instant::now(),
            more,
            channels: (0..count).map(|_| None).collect(),
        });
        match session.channels.get_mut(channel) {
            Some(channel) if session.more == more => *channel = Some(stream),
            _ => self.refused += 1,
        }
    }

    fn take_complete(&mut self) -> Option<Channels> {
        let mut sessions = self.sessions.iter();
        let joins = |key: &(u64, bool), session: &Session| !key.1 && session.is_complete();
        let key = *sessions.find(|(key, session)| joins(key, session))?.0;
        let session = self.sessions.remove(&key)?;
        let streams = session.channels.into_iter().flatten().collect();
        Channels::of(key.0, session.more, streams)
    }

    /// The streams of pages that were opened anew for this session, once all have come; the secondary is told.
    pub fn take_pages(&mut self, session: u64) -> Option<Vec<TcpStream>> {
        let key = (session, true);
        self.sessions.get(&key).filter(|s| s.is_complete())?;
        let session = self.sessions.remove(&key)?;
        let mut streams: Vec<_> = session.channels.into_iter().flatten().collect();
        // Who does not hear it gives the session up.
        let _ = streams
            .first_mut()?
            .write_all(&[streams_byte(session.more)]);
        Some(streams)
    }
}

/// What a channel says of itself.
struct Preamble {
    channel: usize,
    more: More,
    session: u64,
}

impl Preamble {
    /// Which stream of pages that are opened anew, if it is one.
    fn again(&self) -> Option<usize> {
        let stream = self.channel.checked_sub(usize::from(AGAIN))?;
        (stream <= self.more.page_streams).then_some(stream)
    }
}

impl Waiting {
    /// The preamble once it is whole; refuses more than `page_streams` streams of pages.
    fn read_preamble(&mut self, page_streams: usize) -> io::Result<Option<Preamble>> {
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
        let (channel, more) = (self.got[10], More::from_byte(self.got[11]));
        let in_range = more.shards < SHARDS_MAX && more.page_streams < page_streams;
        let mut session = [0; 8];
        session.copy_from_slice(&self.got[12..20]);
        let preamble = Preamble {
            channel: usize::from(channel),
            more,
            session: u64::from_le_bytes(session),
        };
        let is_known = channel == QUESTION
            || usize::from(channel) < more.channels()
            || preamble.again().is_some();
        if version != LINK_VERSION || !in_range || !is_known {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Some(preamble))
    }
}

fn streams_byte(more: More) -> u8 {
    more.page_streams as u8 + 1
}

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;
