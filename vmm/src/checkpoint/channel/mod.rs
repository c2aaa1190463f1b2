//! The page channel of a pair: chunks over several TCP streams, both ways, on one io_uring of one thread.
//!
//! A checkpoint is begun, filled with chunks that spread over the streams, and ended; the receiver gets each chunk where
//! the kernel has put it, and is told when the checkpoint is complete. `frame` is a chunk as bytes, `assembly` puts
//! checkpoints together, `laid` lets small ones leave together, `bulk` names memory that chunks leave from without being copied into buffers, `landing` is
//! memory that pages are received into and stay in, `send` and `receive` queue and find chunks, `operations` lends buffers
//! to the kernel, `pinned` knows which memory is registered for receives, `ring` is the restricted ring, `wake` its bell.
//!
//! Invariants: memory is taken at the start and never grows, but for landings, which have a limit (rule 13); nothing waits
//! longer for the peer than the timeout; a damaged chunk spoils its checkpoint, a damaged header ends the channel; chunks
//! of an older generation are refused (rule 18); nothing is complete before all of it has come (rule 13).
//!
//! Does not know what is in a chunk, and does not decide when there is a checkpoint.
//!
//! Whoever sends much must receive, too, or two such peers wait for each other until the timeout: see
//! [`PageChannel::try_next_buffer`].

mod again;
mod assembly;
mod bulk;
mod counters;
mod error;
mod event;
mod frame;
mod laid;
mod landing;
mod memory;
mod operations;
mod pinned;
mod receive;
mod ring;
mod send;
mod settings;
#[cfg(test)]
mod tests;
mod wake;

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use assembly::{Assembly, Verdict};
use frame::Header;
use memory::Buffer;
use operations::{Completion, Operations, What};
use receive::Incoming;
use send::Outgoing;

pub use bulk::Keeper;
pub use counters::Counters;
pub use error::{ChannelError, Step};
pub use event::{Chunk, Event, Whole};
pub use frame::{HEADER_BYTES, HeaderError, Kind, Totals};
pub use landing::{Landing, LandingError, Landings};
pub use receive::set_low_water;
pub use settings::{CHUNK_BYTES, STREAMS_MAX, Settings};
pub use wake::Waker;

const NO_BUFFER: ChannelError =
    ChannelError::Usage("there is no buffer with room for it; get one first");
/// What is read from an eventfd.
const WAKE_BYTES: usize = 8;

/// What the next whole chunk means; a place instead of a reference.
enum Found {
    Chunk(usize, Header, Kind),
    Event(Event<'static>),
}

/// One end of a page channel. It belongs to the thread that made it.
#[derive(Debug)]
pub struct PageChannel {
    // First: it waits for the kernel before memory and sockets go.
    operations: Operations,
    sockets: Vec<TcpStream>,
    outgoing: Outgoing,
    incoming: Incoming,
    assembly: Assembly,
    settings: Settings,
    counters: Counters,
    /// Of the sockets before these.
    counted: Counters,
    waker: Waker,
    woken: bool,
    /// The owner wants to know when a buffer is free.
    wants_buffer: bool,
    closed_since: Option<Instant>,
}

impl PageChannel {
    /// Over connected sockets, in the same order on both hosts.
    pub fn new(sockets: Vec<TcpStream>, settings: Settings) -> Result<Self, ChannelError> {
        settings::check(sockets.len(), &settings)?;
        for (stream, socket) in sockets.iter().enumerate() {
            // The ring waits by itself; it would not for a socket that says EAGAIN.
            let ready = socket
                .set_nonblocking(false)
                .and_then(|()| socket.set_nodelay(true));
            let step = Step::SendChunk;
            ready.map_err(|source| ChannelError::Socket {
                stream,
                step,
                source,
            })?;
        }
        let streams = sockets.len();
        let sent = frame::HEADER_BYTES + settings.chunk_bytes;
        let mut sizes = vec![sent; settings.send_buffers];
        let received = receive::buffer_bytes(settings.chunk_bytes);
        sizes.extend(vec![received; streams]);
        sizes.push(WAKE_BYTES);
        let carved = Buffer::carve(&sizes, settings.send_buffers);
        let (mut buffers, registered) = carved.map_err(|source| ChannelError::Memory {
            bytes: sizes.iter().sum(),
            source,
        })?;
        let failed = |what| move |source| ChannelError::Ring { what, source };
        let waker = Waker::new().map_err(failed("make an eventfd"))?;
        let mut receive_buffers = buffers.split_off(settings.send_buffers);
        let wake_buffer = receive_buffers.split_off(streams).remove(0);
        let files: Vec<_> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
        let registered = [registered, Buffer::span(&receive_buffers)];
        let operations =
            Operations::new(&files, sizes.len(), registered, waker.clone(), wake_buffer)?;
        let zero_copy = settings.zero_copy && operations.can_zero_copy();
        let counters = Counters {
            unregistered_buffers: u64::from(!operations.registered()),
            ..Counters::default()
        };
        Ok(Self {
            outgoing: Outgoing::new(streams, buffers, zero_copy, settings.generation),
            incoming: Incoming::new(receive_buffers, settings.chunk_bytes, settings.timeout),
            assembly: Assembly::new(streams, settings.generation),
            operations,
            sockets,
            settings,
            counters,
            counted: Counters::default(),
            waker,
            woken: false,
            wants_buffer: false,
            closed_since: None,
        })
    }

    /// For other threads: wakes this one, or ends the channel.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Pages that come behind their records are put where the kernel finds room in there, and belong to whoever gets the
    /// chunk ([`Whole::Landed`]).
    pub fn land_in(&mut self, landings: Landings) {
        self.incoming.land_in(landings);
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        self.counted.and(&Counters {
            enters: self.operations.enters(),
            fixed_bytes: self.operations.fixed_bytes(),
            unregistered_receives: self.operations.unregistered_receives(),
            receives_beyond_registered: self.operations.receives_beyond(),
            ..self.counters
        })
    }

    /// The generation of what is sent from now on; what is older is refused from now on (rule 18).
    pub fn set_generation(&mut self, generation: u64) {
        self.outgoing.generation = generation;
        self.assembly.raise_generation(generation);
    }

    /// A buffer for the payload of the next chunk; waits for the peer if all are under way. The same one again until
    /// it is submitted; what is in it at first is of no meaning.
    pub fn next_buffer(&mut self) -> Result<&mut [u8], ChannelError> {
        self.incoming.release();
        if self.outgoing.has_laid_bulk() {
            self.send_laid()?;
        }
        if !self.outgoing.has_free() {
            self.turn(Duration::ZERO)?;
        }
        if !self.outgoing.has_free() {
            self.counters.buffer_waits += 1;
        }
        while !self.outgoing.claim() {
            self.wait_for_peer()?;
        }
        Ok(self.outgoing.payload())
    }

    /// As [`Self::next_buffer`], but does not wait: `None` if all are under way; then [`Self::poll`] says when one is
    /// free. For whoever receives meanwhile.
    pub fn try_next_buffer(&mut self) -> Result<Option<&mut [u8]>, ChannelError> {
        self.incoming.release();
        if self.outgoing.has_laid_bulk() {
            self.send_laid()?;
        }
        if !self.outgoing.has_free() {
            self.turn(Duration::ZERO)?;
        }
        self.wants_buffer = !self.outgoing.claim();
        Ok((!self.wants_buffer).then(|| self.outgoing.payload()))
    }

    /// Begins a checkpoint; the receiver gets `payload` before anything else of it.
    pub fn begin(&mut self, epoch: u64, payload: &[u8]) -> Result<(), ChannelError> {
        self.lay_begin(epoch, payload)?;
        self.send_laid()
    }

    /// Sends the first `length` bytes of the buffer that was got last, as a chunk of the open checkpoint with so many
    /// pages, states or digests.
    pub fn submit(&mut self, kind: Kind, items: u32, length: usize) -> Result<(), ChannelError> {
        let epoch = self.open_for(kind)?;
        let stream = self.outgoing.shortest();
        self.send_chunk(stream, kind, (epoch, items, length))
    }

    /// The epoch of the open checkpoint, for a chunk of this kind.
    fn open_for(&self, kind: Kind) -> Result<u64, ChannelError> {
        let none = ChannelError::Usage("no checkpoint is open; begin one");
        let epoch = self.outgoing.open.ok_or(none)?;
        match kind.is_content() {
            true => Ok(epoch),
            false => Err(ChannelError::Usage(
                "a checkpoint has states, pages, names and digests",
            )),
        }
    }

    /// As [`Self::submit`] with pages, and behind them those that lie in `slots` of `keeper`, of so many bytes each. No
    /// checksum covers these: each needs a digest. They are read until [`Self::settle`] returns.
    pub fn submit_lent(
        &mut self,
        items: u32,
        length: usize,
        keeper: &Arc<dyn Keeper>,
        slots: (&[u32], usize),
    ) -> Result<(), ChannelError> {
        self.lend(length, keeper, slots)?;
        let submitted = self.submit(Kind::Pages, items, length);
        self.outgoing.bulk.clear();
        submitted
    }

    fn lend(
        &mut self,
        length: usize,
        keeper: &Arc<dyn Keeper>,
        (slots, slot_bytes): (&[u32], usize),
    ) -> Result<(), ChannelError> {
        if length + slots.len() * slot_bytes > self.settings.chunk_bytes {
            return Err(ChannelError::Usage("more than a chunk holds"));
        }
        let bulk = &mut self.outgoing.bulk;
        slots.iter().for_each(|&slot| bulk.push(slot, slot_bytes));
        bulk.keep(keeper.clone());
        Ok(())
    }

    /// Sends the first `length` bytes of the buffer that was got last, as pages outside a checkpoint: live ones of the
    /// initial synchronisation ([`Kind::Sync`]) or ones ahead of the checkpoint of `epoch` ([`Kind::Ahead`]). All of them
    /// go on the first stream, or older bytes of a page could arrive behind newer ones; a checkpoint that is begun later
    /// arrives later.
    pub fn submit_loose(
        &mut self,
        kind: Kind,
        epoch: u64,
        items: u32,
        length: usize,
    ) -> Result<(), ChannelError> {
        if !matches!(kind, Kind::Sync | Kind::Ahead) {
            return Err(ChannelError::Usage(
                "outside a checkpoint there are live pages and pages ahead",
            ));
        }
        self.send_chunk(0, kind, (epoch, items, length))
    }

    /// [`Self::end`] and [`Self::flush`]: all of the open checkpoint is handed to the kernel.
    pub fn finish(&mut self) -> Result<(), ChannelError> {
        self.end()?;
        self.flush()
    }

    /// Ends the open checkpoint; what is not sent yet goes on in the next calls.
    pub fn end(&mut self) -> Result<(), ChannelError> {
        let Some(epoch) = self.outgoing.open else {
            return Err(ChannelError::Usage("no checkpoint is open; begin one"));
        };
        for stream in 0..self.sockets.len() {
            let totals = self.outgoing.totals(stream).to_bytes();
            self.buffer_behind_laid()?[..totals.len()].copy_from_slice(&totals);
            self.send_chunk(stream, Kind::End, (epoch, 0, totals.len()))?;
        }
        self.outgoing.close();
        Ok(())
    }

    /// Gives the open checkpoint up, if there is one: the receiver forgets it.
    pub fn abort(&mut self) -> Result<(), ChannelError> {
        let Some(epoch) = self.outgoing.open else {
            return Ok(());
        };
        for stream in 0..self.sockets.len() {
            self.buffer_behind_laid()?;
            self.send_chunk(stream, Kind::Abort, (epoch, 0, 0))?;
        }
        self.outgoing.close();
        Ok(())
    }

    /// Waits until everything is handed to the kernel. To be called before the channel is dropped, or that is lost.
    pub fn flush(&mut self) -> Result<(), ChannelError> {
        self.incoming.release();
        self.send_laid()?;
        while !self.outgoing.is_drained() {
            self.wait_for_peer()?;
        }
        Ok(())
    }

    /// Waits until the kernel reads no lent memory any more: what was sent with SEND_ZC may change then (rule 15).
    pub fn settle(&mut self) -> Result<(), ChannelError> {
        let begun = Instant::now();
        while !self.operations.has_no_bulk() {
            let waited = begun.elapsed();
            let Some(left) = self.settings.timeout.checked_sub(waited) else {
                return Err(ChannelError::TimedOut {
                    stream: 0,
                    step: Step::SendChunk,
                    after_ms: waited.as_millis() as u64,
                });
            };
            if self.waker.is_shut_down() {
                return Err(ChannelError::ShutDown);
            }
            self.turn(left)?;
        }
        Ok(())
    }

    /// What comes next, within `timeout`; sends go on meanwhile. A chunk that was given before is gone.
    pub fn poll(&mut self, timeout: Duration) -> Result<Event<'_>, ChannelError> {
        self.incoming.release();
        let begun = Instant::now();
        let mut looked = false;
        let found = loop {
            if self.waker.is_shut_down() {
                return Err(ChannelError::ShutDown);
            }
            if let Some(found) = self.next_found()? {
                break found;
            }
            if let Some(event) = self.own_event() {
                return Ok(event);
            }
            if self.check_closed()? {
                return Ok(Event::Closed);
            }
            let left = timeout.saturating_sub(begun.elapsed());
            // Something may be there already; only what is not is waited for. Who looks in for a moment at a time judges, too.
            let patience = self.patience(looked)?;
            if left.is_zero() && looked {
                return Ok(Event::Idle);
            }
            looked = true;
            self.turn(left.min(patience))?;
        };
        Ok(match found {
            Found::Event(event) => event,
            Found::Chunk(stream, header, kind) => {
                let landing = self.incoming.take_landing(stream);
                let counter = match &landing {
                    Some(_) => &mut self.counters.landed_bytes,
                    None => &mut self.counters.unlanded_bytes,
                };
                *counter += u64::from(header.bulk);
                Event::Chunk(Chunk {
                    kind,
                    epoch: header.epoch,
                    generation: header.generation,
                    items: header.items,
                    payload: self.incoming.payload(stream, &header),
                    bulk: match landing {
                        Some(landing) => Whole::Landed(landing),
                        None => Whole::Passing(self.incoming.passing(stream, &header)),
                    },
                })
            }
        })
    }

    fn own_event(&mut self) -> Option<Event<'static>> {
        if std::mem::take(&mut self.woken) {
            return Some(Event::Woken);
        }
        if self.wants_buffer && self.outgoing.has_free() {
            self.wants_buffer = false;
            return Some(Event::Sendable);
        }
        None
    }

    /// What the next whole chunks mean, until one is for the owner.
    fn next_found(&mut self) -> Result<Option<Found>, ChannelError> {
        loop {
            let must_wait = |stream, header: &Header| self.assembly.must_wait(stream, header);
            let Some((stream, header)) = self.incoming.whole_chunk(must_wait)? else {
                return Ok(None);
            };
            if let Some(Verdict::Damaged { epoch, reason }) = self.assembly.superseded(&header) {
                self.counters.damaged_checkpoints += 1;
                return Ok(Some(Found::Event(Event::Damaged { epoch, reason })));
            }
            let payload = self.incoming.payload(stream, &header);
            let intact = header.may_have_bulk() && crc32fast::hash(payload) == header.payload_crc;
            let now = Instant::now();
            self.counters.received_chunks += 1;
            let verdict =
                self.assembly
                    .chunk(stream, &header, payload, intact, &mut self.counters, now)?;
            if let Verdict::Deliver(kind) = verdict {
                if kind == Kind::Begin {
                    self.operations.give_back();
                }
                self.incoming.give(stream);
                return Ok(Some(Found::Chunk(stream, header, kind)));
            }
            self.incoming.skip(stream);
            let event = match verdict {
                Verdict::Deliver(_) | Verdict::Absorb => continue,
                Verdict::Complete { epoch, totals } => Event::Complete { epoch, totals },
                Verdict::Aborted { epoch } => Event::Aborted { epoch },
                Verdict::Damaged { epoch, reason } => {
                    self.counters.damaged_checkpoints += 1;
                    Event::Damaged { epoch, reason }
                }
            };
            return Ok(Some(Found::Event(event)));
        }
    }

    fn send_chunk(
        &mut self,
        stream: usize,
        kind: Kind,
        (epoch, items, length): (u64, u32, usize),
    ) -> Result<(), ChannelError> {
        if length > self.settings.chunk_bytes {
            return Err(ChannelError::Usage("more than a chunk holds"));
        }
        let queued =
            self.outgoing
                .queue(&mut self.operations, stream, kind, (epoch, items, length));
        if !queued {
            return Err(NO_BUFFER);
        }
        self.turn(Duration::ZERO)
    }

    /// Waits for whatever comes, but not for ever.
    fn wait_for_peer(&mut self) -> Result<(), ChannelError> {
        if self.waker.is_shut_down() {
            return Err(ChannelError::ShutDown);
        }
        let patience = self.patience(true)?;
        self.turn(patience)
    }

    /// Starts what can be started, lets the kernel work, waits at most so long for something, takes what is done.
    fn turn(&mut self, timeout: Duration) -> Result<(), ChannelError> {
        let counters = &mut self.counters;
        self.incoming
            .start(&mut self.operations, &self.sockets, Instant::now())?;
        self.outgoing.start(&mut self.operations, counters)?;
        let failed = |source| ChannelError::Ring {
            what: "enter io_uring",
            source,
        };
        self.operations.enter(timeout).map_err(failed)?;
        while let Some(completion) = self.operations.completion() {
            self.complete(completion)?;
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion) -> Result<(), ChannelError> {
        let (operations, counters) = (&mut self.operations, &mut self.counters);
        match completion {
            Completion::Done {
                what: What::Send(stream),
                result,
                ..
            } => {
                self.outgoing.sent(operations, stream, result, counters)?;
                self.outgoing.start(operations, counters)
            }
            Completion::Done {
                what: What::Receive(stream),
                index,
                result,
            } => {
                let memory = (operations.take(index), operations.take_landing(index));
                self.incoming.received(stream, memory, result, counters)
            }
            Completion::Done {
                what: What::Wake, ..
            } => {
                self.woken = true;
                let Some(buffer) = operations.take_wake() else {
                    return Ok(());
                };
                let watching = operations.watch(self.sockets.len(), buffer);
                let what = "watch the eventfd";
                watching.map_err(|source| ChannelError::Ring { what, source })
            }
            Completion::Notified {
                stream,
                index,
                copied,
            } => {
                self.outgoing
                    .notified(operations, stream, (index, copied), counters);
                Ok(())
            }
        }
    }

    /// How long the peer may go on as it does. To be asked after a turn (`judge`): what is there counts as having come.
    fn patience(&self, judge: bool) -> Result<Duration, ChannelError> {
        let (now, timeout) = (Instant::now(), self.settings.timeout);
        let mut patience = timeout;
        for stream in 0..self.sockets.len() {
            let sending = self
                .outgoing
                .waiting_since(stream)
                .map(|since| (since, Step::SendChunk));
            let receiving = self.expecting(stream);
            for (since, step) in sending.into_iter().chain(receiving) {
                let waited = now.saturating_duration_since(since);
                let left = timeout.saturating_sub(waited);
                if left.is_zero() && judge {
                    let after_ms = waited.as_millis() as u64;
                    return Err(ChannelError::TimedOut {
                        stream,
                        step,
                        after_ms,
                    });
                }
                patience = patience.min(left);
            }
        }
        Ok(patience)
    }

    /// Since when which step of receiving is due on a stream.
    fn expecting(&self, stream: usize) -> Option<(Instant, Step)> {
        let since = self.incoming.waiting_since(stream)?;
        if self.incoming.has_part(stream) {
            return Some((since, Step::ReceiveChunk));
        }
        if let Some(opened) = self.assembly.expected_since(stream) {
            return Some((since.max(opened), Step::ReceiveCheckpoint));
        }
        self.closed_since
            .map(|closed| (since.max(closed), Step::Close))
    }

    /// True if all streams are closed; fails if one is closed where more is due.
    fn check_closed(&mut self) -> Result<bool, ChannelError> {
        let mut closed = 0;
        for stream in 0..self.sockets.len() {
            if !self.incoming.is_closed(stream) {
                continue;
            }
            closed += 1;
            if self.incoming.has_part(stream) {
                return Err(ChannelError::Cut {
                    stream,
                    step: Step::ReceiveChunk,
                });
            }
            if self.assembly.expected_since(stream).is_some() {
                return Err(ChannelError::Cut {
                    stream,
                    step: Step::ReceiveCheckpoint,
                });
            }
        }
        if closed > 0 && self.closed_since.is_none() {
            self.closed_since = Some(Instant::now());
        }
        Ok(closed == self.sockets.len())
    }
}
