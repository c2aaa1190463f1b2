//! The receiving side: a window of bytes for each stream, in which chunks are found where they were received.
//!
//! Invariants: a receive is under way only while a window holds no whole chunk and its owner looks at none; a window
//! takes no more than its buffer; bytes are moved only when a chunk does not fit behind the one before, which chunks of
//! full size never cause.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::counters::Counters;
use super::error::{ChannelError, Step};
use super::frame::{HEADER_BYTES, Header, HeaderError};
use super::memory::Buffer;
use super::operations::Operations;

/// A socket that has so much wakes us whatever is missing.
const LOW_WATER_MAX: usize = 256 << 10;
/// A link that brings so much does not stand still: what it brings within the timeout wakes us.
const SLOWEST_BYTES_PER_MS: usize = 50;

/// One stream's bytes.
#[derive(Debug)]
struct Window {
    /// None while a receive is under way.
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
    /// Bytes of the chunk that the owner looks at.
    given: usize,
    /// When the receive under way was asked for.
    since: Instant,
    /// The socket wakes us for so many bytes.
    low_water: usize,
    closed: bool,
}

/// What comes in.
#[derive(Debug)]
pub(super) struct Incoming {
    windows: Vec<Window>,
    chunk_bytes: usize,
    low_water_max: usize,
    next: usize,
}

impl Incoming {
    /// A buffer for each stream; payloads have at most `chunk_bytes`. A peer may stand still for `timeout`.
    pub(super) fn new(buffers: Vec<Buffer>, chunk_bytes: usize, timeout: Duration) -> Self {
        let since = Instant::now();
        let window = |buffer| Window {
            buffer: Some(buffer),
            start: 0,
            end: 0,
            given: 0,
            since,
            low_water: 1,
            closed: false,
        };
        let windows = buffers.into_iter().map(window).collect();
        let trickle = (timeout.as_millis() as usize).saturating_mul(SLOWEST_BYTES_PER_MS);
        Self {
            windows,
            chunk_bytes,
            low_water_max: LOW_WATER_MAX.min(trickle),
            next: 0,
        }
    }

    /// The owner looks at no chunk any more.
    pub(super) fn release(&mut self) {
        for window in &mut self.windows {
            window.start += std::mem::take(&mut window.given);
        }
    }

    /// The next whole chunk of any stream, taking turns; a stream whose chunk `must_wait` is passed over.
    pub(super) fn whole_chunk(
        &mut self,
        must_wait: impl Fn(usize, &Header) -> bool,
    ) -> Result<Option<(usize, Header)>, ChannelError> {
        let count = self.windows.len();
        for stream in (0..count).map(|i| (self.next + i) % count) {
            let header = self.header(stream)?;
            let window = &self.windows[stream];
            let whole = header.filter(|h| h.chunk_bytes() <= window.end - window.start);
            let Some(header) = whole.filter(|header| !must_wait(stream, header)) else {
                continue;
            };
            self.next = (stream + 1) % count;
            return Ok(Some((stream, header)));
        }
        Ok(None)
    }

    /// The header of the first chunk in a window, if it is there and no receive is under way.
    fn header(&self, stream: usize) -> Result<Option<Header>, ChannelError> {
        let window = &self.windows[stream];
        let bytes = window.bytes().first_chunk::<HEADER_BYTES>();
        let header = bytes.map(|bytes| Header::from_bytes(bytes, stream, self.chunk_bytes));
        header
            .transpose()
            .map_err(|source: HeaderError| ChannelError::Header { stream, source })
    }

    /// The payload of the chunk that [`Self::whole_chunk`] has found.
    pub(super) fn payload(&self, stream: usize, header: &Header) -> &[u8] {
        self.windows[stream]
            .bytes()
            .get(HEADER_BYTES..header.chunk_bytes())
            .unwrap_or_default()
    }

    /// Leaves the chunk to the owner, until [`Self::release`].
    pub(super) fn give(&mut self, stream: usize, header: &Header) {
        self.windows[stream].given = header.chunk_bytes();
    }

    /// Passes over a chunk.
    pub(super) fn skip(&mut self, stream: usize, header: &Header) {
        self.windows[stream].start += header.chunk_bytes();
    }

    /// Asks for more on each stream whose window holds no whole chunk.
    pub(super) fn start(
        &mut self,
        operations: &mut Operations,
        sockets: &[TcpStream],
        counters: &mut Counters,
        now: Instant,
    ) -> Result<(), ChannelError> {
        for (stream, socket) in sockets.iter().enumerate() {
            let need = match self.header(stream)? {
                Some(header) => header.chunk_bytes(),
                None => HEADER_BYTES + self.chunk_bytes,
            };
            let window = &mut self.windows[stream];
            let has = window.end - window.start;
            if window.closed || window.given > 0 || has >= need {
                continue;
            }
            let Some(mut buffer) = window.buffer.take() else {
                continue;
            };
            if has == 0 {
                (window.start, window.end) = (0, 0);
            } else if buffer.len() - window.start < need {
                buffer.copy_within(window.start..window.end, 0);
                (window.start, window.end) = (0, has);
                counters.moved_bytes += has as u64;
            }
            window.since = now;
            // Nothing of a header is there: anything may come.
            let awaited = if has < HEADER_BYTES { 1 } else { need - has };
            window.wake_for(socket, awaited.min(self.low_water_max));
            let started = operations.receive(stream, buffer, window.end);
            started.map_err(|source| self.failed(stream, source))?;
        }
        Ok(())
    }

    /// A receive has ended, its buffer is back.
    pub(super) fn received(
        &mut self,
        stream: usize,
        buffer: Option<Buffer>,
        result: io::Result<usize>,
        counters: &mut Counters,
    ) -> Result<(), ChannelError> {
        let window = &mut self.windows[stream];
        window.buffer = buffer;
        match result {
            Ok(0) => window.closed = true,
            Ok(bytes) => {
                window.end += bytes;
                counters.received_bytes += bytes as u64;
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
            Err(source) => return Err(self.failed(stream, source)),
        }
        Ok(())
    }

    fn failed(&self, stream: usize, source: io::Error) -> ChannelError {
        let window = &self.windows[stream];
        let step = match window.end > window.start {
            true => Step::ReceiveChunk,
            false => Step::ReceiveCheckpoint,
        };
        ChannelError::Socket {
            stream,
            step,
            source,
        }
    }

    /// A part of a chunk is there.
    pub(super) fn has_part(&self, stream: usize) -> bool {
        let window = &self.windows[stream];
        window.end > window.start
    }

    /// Since when a receive is under way.
    pub(super) fn waiting_since(&self, stream: usize) -> Option<Instant> {
        let window = &self.windows[stream];
        window.buffer.is_none().then_some(window.since)
    }

    /// The peer has closed it, and what came before is taken.
    pub(super) fn is_closed(&self, stream: usize) -> bool {
        self.windows[stream].closed
    }
}

/// `SO_RCVLOWAT`; the end of a stream and what does not fit its receive buffer wake us all the same.
fn set_low_water(socket: &TcpStream, bytes: usize) -> io::Result<()> {
    let value = bytes as libc::c_int;
    // SAFETY: the option is an int, which is read during the call only.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Window {
    /// Lets the socket wake us when all of `bytes` is there, or a good part: each wake-up costs the sender's host, too, where
    /// both share one (a quarter of its time on a virtual machine).
    fn wake_for(&mut self, socket: &TcpStream, bytes: usize) {
        let wanted = bytes.max(1);
        // Less is never wrong, only slower.
        if self.low_water <= wanted && wanted < 2 * self.low_water {
            return;
        }
        if set_low_water(socket, wanted).is_ok() {
            self.low_water = wanted;
        }
    }

    fn bytes(&self) -> &[u8] {
        let buffer = self.buffer.as_deref().unwrap_or_default();
        buffer.get(self.start..self.end).unwrap_or_default()
    }
}
