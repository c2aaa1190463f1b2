//! The receiving side: what a chunk is, says its header, which came with the chunk before; so the kernel puts its bytes
//! where they belong, and pages where they stay.
//!
//! Invariants: nothing is received beyond the header of the next chunk; a receive is under way only while a stream has no
//! whole chunk and its owner looks at none; no received byte is moved.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::counters::Counters;
use super::error::{ChannelError, Step};
use super::frame::{HEADER_BYTES, Header, HeaderError};
use super::landing::{Landing, Landings};
use super::memory::Buffer;
use super::operations::{Operations, Places};

/// A socket that has so much wakes us whatever is missing.
const LOW_WATER_MAX: usize = 256 << 10;
/// A link that brings so much does not stand still: what it brings within the timeout wakes us.
const SLOWEST_BYTES_PER_MS: usize = 50;

/// One stream's bytes. Its buffer holds a header, and behind it what has no other place.
#[derive(Debug)]
struct Window {
    /// None while a receive is under way.
    buffer: Option<Buffer>,
    /// Of the chunk that comes in or is there.
    header: Option<Header>,
    /// Bytes of its payload that are there.
    got: usize,
    /// Where its pages come, if they do not come into the buffer.
    landing: Option<Landing>,
    /// A place for its pages was asked for.
    is_placed: bool,
    /// Bytes of the next header that are there.
    next_got: usize,
    /// The owner looks at the chunk.
    is_given: bool,
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
    landings: Option<Landings>,
    low_water_max: usize,
    next: usize,
}

/// Bytes of a stream's buffer: a header and the largest payload.
pub(super) fn buffer_bytes(chunk_bytes: usize) -> usize {
    HEADER_BYTES + chunk_bytes
}

impl Incoming {
    /// A buffer for each stream; payloads have at most `chunk_bytes`. A peer may stand still for `timeout`.
    pub(super) fn new(buffers: Vec<Buffer>, chunk_bytes: usize, timeout: Duration) -> Self {
        let since = Instant::now();
        let window = |buffer| Window {
            buffer: Some(buffer),
            header: None,
            got: 0,
            landing: None,
            is_placed: false,
            next_got: 0,
            is_given: false,
            since,
            low_water: 1,
            closed: false,
        };
        let windows = buffers.into_iter().map(window).collect();
        let trickle = (timeout.as_millis() as usize).saturating_mul(SLOWEST_BYTES_PER_MS);
        Self {
            windows,
            chunk_bytes,
            landings: None,
            low_water_max: LOW_WATER_MAX.min(trickle),
            next: 0,
        }
    }

    /// Every byte wakes us, so that receives are as short as what the peer sends.
    #[cfg(test)]
    pub(super) fn wake_at_once(&mut self) {
        self.low_water_max = 1;
    }

    /// Where pages are to come from now on.
    pub(super) fn land_in(&mut self, landings: Landings) {
        self.landings = Some(landings);
    }

    /// The owner looks at no chunk any more.
    pub(super) fn release(&mut self) {
        for window in self.windows.iter_mut().filter(|window| window.is_given) {
            window.pass();
        }
    }

    /// The next whole chunk of any stream, taking turns; a stream whose chunk `must_wait` is passed over.
    pub(super) fn whole_chunk(
        &mut self,
        must_wait: impl Fn(usize, &Header) -> bool,
    ) -> Result<Option<(usize, Header)>, ChannelError> {
        let (count, next) = (self.windows.len(), self.next);
        for stream in (0..count).map(|i| (next + i) % count) {
            let header = self.header(stream)?;
            let window = &self.windows[stream];
            let whole = header.filter(|h| window.got == h.length as usize);
            let Some(header) = whole.filter(|header| !must_wait(stream, header)) else {
                continue;
            };
            self.next = (stream + 1) % count;
            return Ok(Some((stream, header)));
        }
        Ok(None)
    }

    /// The header of the chunk that comes in or is there, if that much has come and no receive is under way.
    fn header(&mut self, stream: usize) -> Result<Option<Header>, ChannelError> {
        let window = &mut self.windows[stream];
        let Some(buffer) = window.buffer.as_deref() else {
            return Ok(None);
        };
        if window.header.is_none() && window.next_got == HEADER_BYTES {
            let bytes = buffer.first_chunk::<HEADER_BYTES>();
            let header = bytes.map(|bytes| Header::from_bytes(bytes, stream, self.chunk_bytes));
            window.header = header
                .transpose()
                .map_err(|source: HeaderError| ChannelError::Header { stream, source })?;
            window.next_got = 0;
        }
        Ok(window.header)
    }

    /// The checksummed payload of the chunk that [`Self::whole_chunk`] has found.
    pub(super) fn payload(&self, stream: usize, header: &Header) -> &[u8] {
        self.windows[stream].bytes(0, header.summed_bytes())
    }

    /// What is behind it, if that did not land elsewhere.
    pub(super) fn passing(&self, stream: usize, header: &Header) -> &[u8] {
        self.windows[stream].bytes(header.summed_bytes(), header.length as usize)
    }

    /// The memory that the pages of the chunk landed in.
    pub(super) fn take_landing(&mut self, stream: usize) -> Option<Landing> {
        self.windows[stream].landing.take()
    }

    /// Leaves the chunk to the owner, until [`Self::release`].
    pub(super) fn give(&mut self, stream: usize) {
        self.windows[stream].is_given = true;
    }

    /// Passes over a chunk.
    pub(super) fn skip(&mut self, stream: usize) {
        self.windows[stream].pass();
    }

    /// Asks for more on each stream whose window holds no whole chunk.
    pub(super) fn start(
        &mut self,
        operations: &mut Operations,
        sockets: &[TcpStream],
        now: Instant,
    ) -> Result<(), ChannelError> {
        for (stream, socket) in sockets.iter().enumerate() {
            let header = self.header(stream)?;
            let window = &mut self.windows[stream];
            let left = header.map_or(0, |header| header.length as usize - window.got);
            if window.closed || window.is_given || (header.is_some() && left == 0) {
                continue;
            }
            if let Some(header) = &header {
                window.place(header, self.landings.as_ref());
            }
            let Some(buffer) = window.buffer.take() else {
                continue;
            };
            window.since = now;
            // Nothing of a chunk is there: anything may come.
            let awaited = if header.is_none() { 1 } else { left };
            window.wake_for(socket, awaited.min(self.low_water_max));
            let places = window.places(header.as_ref());
            let started = operations.receive(stream, buffer, places);
            started.map_err(|source| self.failed(stream, source))?;
        }
        Ok(())
    }

    /// A receive has ended, its memory is back.
    pub(super) fn received(
        &mut self,
        stream: usize,
        (buffer, landing): (Option<Buffer>, Option<Landing>),
        result: io::Result<usize>,
        counters: &mut Counters,
    ) -> Result<(), ChannelError> {
        let window = &mut self.windows[stream];
        window.buffer = buffer;
        window.landing = landing;
        match result {
            Ok(0) => window.closed = true,
            Ok(bytes) => {
                let left = window
                    .header
                    .map_or(0, |header| header.length as usize - window.got);
                let payload = bytes.min(left);
                window.got += payload;
                window.next_got = (window.next_got + bytes - payload).min(HEADER_BYTES);
                counters.received_bytes += bytes as u64;
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
            Err(source) => return Err(self.failed(stream, source)),
        }
        Ok(())
    }

    fn failed(&self, stream: usize, source: io::Error) -> ChannelError {
        let window = &self.windows[stream];
        let step = match window.has_part() {
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
        self.windows[stream].has_part()
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
pub fn set_low_water(socket: &TcpStream, bytes: usize) -> io::Result<()> {
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

    /// Looks for memory that the pages of a chunk can stay in. Without it they come into the buffer, and what they are for
    /// finds that there is none.
    fn place(&mut self, header: &Header, landings: Option<&Landings>) {
        if !std::mem::replace(&mut self.is_placed, true)
            && header.bulk > 0
            && header.may_have_bulk()
        {
            self.landing = landings.and_then(|landings| landings.take(header.bulk as usize).ok());
        }
    }

    /// Where what is still to come goes: the rest of the payload, and the header behind it.
    fn places(&mut self, header: Option<&Header>) -> Places {
        let (got, landing) = (self.got, self.landing.take());
        let length = header.map_or(0, |header| header.length as usize);
        let here = match &landing {
            Some(landing) => length - landing.len(),
            None => length,
        };
        Places {
            payload: HEADER_BYTES + got.min(here)..HEADER_BYTES + here,
            landed: got.saturating_sub(here),
            landing,
            header: self.next_got..HEADER_BYTES,
        }
    }

    /// The chunk is gone; the next one comes.
    fn pass(&mut self) {
        self.header = None;
        self.landing = None;
        self.got = 0;
        (self.is_placed, self.is_given) = (false, false);
    }

    fn has_part(&self) -> bool {
        self.header.is_some() || self.next_got > 0
    }

    /// A part of the payload that is in the buffer.
    fn bytes(&self, from: usize, to: usize) -> &[u8] {
        let buffer = self.buffer.as_deref().unwrap_or_default();
        buffer
            .get(HEADER_BYTES + from..HEADER_BYTES + to)
            .unwrap_or_default()
    }
}
