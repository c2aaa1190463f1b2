//! The link between the two hosts: the TCP channels of one session.
//!
//! Each channel starts with a preamble `"COLOLINK" version:u16 channel:u8 more:u8 session:u64` (little-endian), which
//! the joining side sends. Channel 0, *control*, carries [`colo_control::Msg`]; 1, *packets*, mirrored input and SVM
//! output of the first shard; 2, *pages*, checkpoints; from 3 on the packets of further shards, then further streams of
//! the pages: as many as the lower and the upper four bits of `more` say. Separate channels, so that bulk pages never
//! stand before a heartbeat or a packet.
//!
//! Who joins and wants several streams of pages asks first, on a connection of its own with channel 255, and gets one
//! byte: how many the primary takes at most. A primary that does not know the question closes it, and there is one
//! stream (rule 22).
//!
//! Streams of pages that broke are opened anew (`again`) while the session goes on: channels 240 and up, of the same session,
//! all of them answered by one byte on the first. A primary that does not know them closes them, and the session ends.
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
/// How often an address that is not free is tried.
const LISTEN_RETRY: Duration = Duration::from_secs(1);
/// Half-open connections kept at a time.
const WAITING_MAX: usize = 32;
/// Sessions that are put together at a time: one joins, others may have failed half-way just before.
const SESSIONS_MAX: usize = 8;
/// Shards of a VM at most.
pub const SHARDS_MAX: usize = 8;
/// Streams of a session's pages at most.
pub const PAGE_STREAMS_MAX: usize = 8;
/// Channels besides the packets of further shards and further streams of pages.
const CHANNELS: usize = 3;
/// Streams of pages of a session that goes on, in the place of broken ones.
const AGAIN: u8 = 240;
/// Not a channel: how many streams of pages does the primary take?
const QUESTION: u8 = 255;

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
    /// Checkpoints, on one stream or more.
    pub pages: Vec<TcpStream>,
}

/// How many channels there are besides one of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct More {
    shards: usize,
    page_streams: usize,
}

impl More {
    fn to_byte(self) -> u8 {
        (self.shards | self.page_streams << 4) as u8
    }

    fn from_byte(byte: u8) -> Self {
        Self {
            shards: usize::from(byte & 0xf),
            page_streams: usize::from(byte >> 4),
        }
    }

    fn channels(self) -> usize {
        CHANNELS + self.shards + self.page_streams
    }
}

/// Joins: connects all channels to a primary; `shards` is 1 to [`SHARDS_MAX`]. There are at most `page_streams` (up to
/// [`PAGE_STREAMS_MAX`]) streams of pages, or as many as the primary takes.
pub fn connect(
    address: SocketAddr,
    session: u64,
    shards: usize,
    page_streams: usize,
) -> Result<Channels, LinkError> {
    let open = |channel: u8, more: u8| open(address, channel, more, session);
    let open_all = || {
        let page_streams = match page_streams.clamp(1, PAGE_STREAMS_MAX) {
            1 => 1,
            wanted => answer(open(QUESTION, 0)?)?.clamp(1, wanted),
        };
        let more = More {
            shards: shards.clamp(1, SHARDS_MAX) - 1,
            page_streams: page_streams - 1,
        };
        let streams = (0..more.channels()).map(|channel| open(channel as u8, more.to_byte()));
        let streams = streams.collect::<io::Result<Vec<_>>>()?;
        let session_of = Channels::of(session, more, streams);
        session_of.ok_or_else(|| io::ErrorKind::NotConnected.into())
    };
    open_all().map_err(|source| LinkError::Connect { address, source })
}

/// Opens streams of pages anew, as many as there were, for a session that goes on; waits for the primary's word.
pub fn connect_pages_again(
    address: SocketAddr,
    session: u64,
    count: usize,
) -> Result<Vec<TcpStream>, LinkError> {
    let more = More {
        shards: 0,
        page_streams: count.clamp(1, PAGE_STREAMS_MAX) - 1,
    };
    let open = |stream: usize| open(address, AGAIN + stream as u8, more.to_byte(), session);
    let open_all = || {
        let streams = (0..=more.page_streams).map(open);
        let mut streams = streams.collect::<io::Result<Vec<_>>>()?;
        if let Some(first) = streams.first_mut() {
            first.set_read_timeout(Some(PREAMBLE_TIMEOUT))?;
            first.read_exact(&mut [0])?;
            first.set_read_timeout(None)?;
        }
        Ok(streams)
    };
    open_all().map_err(|source| LinkError::Connect { address, source })
}

fn open(address: SocketAddr, channel: u8, more: u8, session: u64) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, PREAMBLE_TIMEOUT)?;
    stream.set_nodelay(true)?;
    stream.write_all(&preamble(channel, more, session))?;
    Ok(stream)
}

fn streams_byte(more: More) -> u8 {
    more.page_streams as u8 + 1
}

/// How many streams of pages a primary takes; one if it closes the question.
fn answer(mut question: TcpStream) -> io::Result<usize> {
    question.set_read_timeout(Some(PREAMBLE_TIMEOUT))?;
    let mut byte = [0];
    match question.read_exact(&mut byte) {
        Ok(()) => Ok(usize::from(byte[0])),
        Err(e) => match e.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Ok(1),
            _ => Err(e),
        },
    }
}

impl Channels {
    fn of(session: u64, more: More, streams: Vec<TcpStream>) -> Option<Self> {
        let mut streams = streams.into_iter();
        let control = streams.next()?;
        let mut packets = vec![streams.next()?];
        let mut pages = vec![streams.next()?];
        packets.extend(streams.by_ref().take(more.shards));
        pages.extend(streams);
        Some(Self {
            session,
            control,
            packets,
            pages,
        })
    }
}

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
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), 4).unwrap();
        let address = listener.socket.as_ref().unwrap().local_addr().unwrap();
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
    fn an_address_that_is_not_free_is_tried_until_it_is() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        assert!(Listener::bind(address, 4).is_err());
        let mut listener = Listener::bind_when_free(address, 4);
        assert!(listener.poll().is_none());
        assert!(listener.is_busy() && listener.fds().next().is_none());
        drop(taken);
        listener.tried = Instant::now().checked_sub(LISTEN_RETRY).unwrap();
        assert!(listener.poll().is_none());
        assert!(!listener.is_busy());
        TcpStream::connect(address).unwrap();
    }

    #[test]
    fn channels_of_two_sessions_are_not_mixed() {
        let (mut listener, address) = listener();
        let mut ours = Vec::new();
        for (session, shards) in [(11u64, 1), (22, 3)] {
            let mut channels = connect(address, session, shards, 1).unwrap();
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
        let _ours = connect(address, 5, 1, 1).unwrap();
        assert_eq!(poll_until(|| listener.poll()).session, 5);
    }

    /// Joins `listener` with three shards and so many streams at most; gives how many both sides have, in the same order.
    fn joined(mut listener: Listener, address: SocketAddr, page_streams: usize) -> usize {
        let joining = std::thread::spawn(move || {
            let mut channels = connect(address, 7, 3, page_streams).unwrap();
            for (n, stream) in channels.pages.iter_mut().enumerate() {
                stream.write_all(&[n as u8]).unwrap();
            }
            channels
        });
        let mut theirs = poll_until(|| listener.poll());
        let ours = joining.join().unwrap();
        assert_eq!((ours.packets.len(), theirs.packets.len()), (3, 3));
        assert_eq!(ours.pages.len(), theirs.pages.len());
        for (n, stream) in theirs.pages.iter_mut().enumerate() {
            stream.set_nonblocking(false).unwrap();
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            assert_eq!(usize::from(byte[0]), n);
        }
        assert_eq!(listener.refused, 0);
        theirs.pages.len()
    }

    #[test]
    fn pages_have_as_many_streams_as_both_hosts_take() {
        for (theirs, ours, both) in [(4, 4, 4), (4, 2, 2), (2, 8, 2), (1, 3, 1), (8, 1, 1)] {
            let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), theirs).unwrap();
            let address = listener.socket.as_ref().unwrap().local_addr().unwrap();
            let found = joined(listener, address, ours);
            assert_eq!(found, both, "{theirs} and {ours}");
        }
    }

    #[test]
    fn rule_22_a_primary_that_does_not_know_the_question_gets_what_it_knows() {
        let older = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = older.local_addr().unwrap();
        let joining = std::thread::spawn(move || connect(address, 7, 2, 4).unwrap());
        let preamble = || {
            let mut stream = older.accept().unwrap().0;
            let mut bytes = [0; PREAMBLE_LEN];
            stream.read_exact(&mut bytes).unwrap();
            (stream, bytes)
        };
        // It closes what is no channel of its.
        let (question, asked) = preamble();
        assert_eq!(asked[10], QUESTION);
        drop(question);
        for channel in 0..4 {
            let (_stream, bytes) = preamble();
            assert_eq!((bytes[10], bytes[11]), (channel, 1), "one more shard");
        }
        assert_eq!(joining.join().unwrap().pages.len(), 1);
    }

    #[test]
    fn more_streams_than_were_granted_are_refused() {
        let (mut listener, address) = listener();
        for more in [0x40, 0xf0, 0x08] {
            let refused = listener.refused;
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(&preamble(0, more, 9)).unwrap();
            poll_until(|| {
                assert!(listener.poll().is_none());
                (listener.refused == refused + 1).then_some(())
            });
        }
        let mut first = TcpStream::connect(address).unwrap();
        first.write_all(&preamble(0, 0x30, 9)).unwrap();
        poll_until(|| {
            assert!(listener.poll().is_none());
            (!listener.sessions.is_empty()).then_some(())
        });
        let mut other = TcpStream::connect(address).unwrap();
        other.write_all(&preamble(1, 0x20, 9)).unwrap();
        poll_until(|| {
            assert!(listener.poll().is_none());
            (listener.refused == 4).then_some(())
        });
    }

    #[test]
    fn sessions_that_are_never_whole_are_not_kept_without_bound() {
        let (mut listener, address) = listener();
        let mut begin = |session: u64, channel: usize| {
            let (shards, page_streams) = (0, 0);
            let more = More {
                shards,
                page_streams,
            };
            let preamble = Preamble {
                channel,
                more,
                session,
            };
            listener.put_together(preamble, TcpStream::connect(address).unwrap());
            (listener.sessions.len(), listener.refused)
        };
        for session in 0..SESSIONS_MAX as u64 {
            assert_eq!(begin(session, 0), (session as usize + 1, 0));
        }
        assert_eq!(begin(99, 0), (SESSIONS_MAX, 1));
        // Those that began before go on.
        assert_eq!(begin(0, 1), (SESSIONS_MAX, 1));
    }

    #[test]
    fn streams_of_pages_are_opened_anew_for_the_session_that_asks() {
        let (mut listener, address) = listener();
        let joining = std::thread::spawn(move || connect_pages_again(address, 7, 3).unwrap());
        let mut theirs = poll_until(|| {
            // It joins nobody, and another session's are not ours.
            assert!(listener.poll().is_none() && listener.take_pages(8).is_none());
            listener.take_pages(7)
        });
        let mut ours = joining.join().unwrap();
        assert_eq!((ours.len(), theirs.len()), (3, 3));
        for (n, (ours, theirs)) in ours.iter_mut().zip(&mut theirs).enumerate() {
            ours.write_all(&[n as u8]).unwrap();
            theirs.set_nonblocking(false).unwrap();
            let mut byte = [9];
            theirs.read_exact(&mut byte).unwrap();
            assert_eq!(usize::from(byte[0]), n, "nothing is left of the answer");
        }
        assert!(listener.take_pages(7).is_none() && !listener.is_busy());
    }

    #[test]
    fn rule_22_a_primary_that_does_not_open_streams_anew_is_noticed() {
        let older = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = older.local_addr().unwrap();
        let asking = std::thread::spawn(move || connect_pages_again(address, 7, 2));
        for _ in 0..2 {
            drop(older.accept().unwrap());
        }
        assert!(asking.join().unwrap().is_err());
    }

    #[test]
    fn a_used_address_is_named() {
        let (_listener, address) = listener();
        let e = Listener::bind(address, 1).unwrap_err().to_string();
        assert!(
            e.contains("link_listen") && e.contains(&address.to_string()),
            "{e}"
        );
    }
}
