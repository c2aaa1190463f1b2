//! The primary's end of the page channel: live pages, then checkpoints of which only travels what the SVM lacks.
//!
//! Invariants: nothing is concluded from digests of another stop of the SVM than the one this checkpoint follows; a page
//! is dropped or sent as a delta only on what is known of the SVM's page (`codec`); what a checkpoint teaches about pages
//! counts from its commit on (rule 14).
//!
//! Where the peer knows it (`OutboundSettings::lends`) and the capture is a copy, pages that travel whole leave from where
//! they were captured: nothing copies or sums them a second time, their digests are their check (rule 13).
//!
//! Does not decide when there is a checkpoint, and does not touch the guest: pages come from a capture that is kept.

mod ahead;
mod list;

use std::net::TcpStream;
use std::time::{Duration, Instant};

use colo_fastpath::ring::{GuestRam, MemoryError};

use super::ahead::AheadCounters;
use super::ahead::primary::Ahead;
use super::channel::{ChannelError, Counters, Event, Kind, PageChannel, Settings, Step};
use super::codec::cache::CacheCounters;
use super::codec::digest::KEY_BYTES;
use super::codec::digest_list::DigestListError;
use super::codec::record::{EncodeError, RECORD_MAX_BYTES};
use super::codec::zero::is_zero;
use super::codec::{
    Choice, Chooser, Encoder, Known, Link, Page, PageCache, PageCounters, PageDigest, PageKey,
    Payload, SvmPage,
};
use super::digester::Digester;
use super::pages::{PAGE_BYTES, PageBitmap};
use super::stabilise::{Kept, StabiliseError, StabiliseSnapshot, Stable};
use super::states::{PART_HEAD_BYTES, State};
use super::stop::StopNumber;

use list::DigestList;

pub use ahead::{AheadError, AheadStep};

/// What the link is taken to carry until it was measured.
const LINK_BYTES_PER_S: u64 = 1 << 30;
/// A transfer below this says nothing of the link.
const MEASURED_BYTES_MIN: u64 = 4 << 20;
/// How long one wait lasts before orders are looked at again.
const LOOK: Duration = Duration::from_millis(50);

/// How checkpoints are sent.
#[derive(Debug, Clone, Copy)]
pub struct OutboundSettings {
    /// Of the channel.
    pub channel: Settings,
    /// Size of the cache of committed pages; 0: none.
    pub cache_mib: usize,
    /// One in so many equal pages is sent to prove it; 0: none.
    pub verify_one_in: u32,
    /// The peer takes pages apart from their records.
    pub lends: bool,
}

/// What a checkpoint was on the link.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    /// From the first chunk until all was handed to the kernel.
    pub transfer_us: u64,
    /// Part of it: the begin and the states, put before the first pages; large ones are handed to the kernel.
    pub begin_us: u64,
    /// Part of it: handing the pages, with what is before them, and the end to the kernel. What is left of all is choosing how
    /// pages travel.
    pub hand_over_us: u64,
    /// Part of it: waiting for the SVM's digests.
    pub digest_wait_us: u64,
    /// Bytes of this checkpoint, heads of chunks included.
    pub sent_bytes: u64,
    /// Bytes of digests received for it.
    pub digest_bytes: u64,
    /// What the channel has counted so far.
    pub channel: Counters,
    /// And the cache of committed pages.
    pub cache: CacheCounters,
    /// And what kept the captured pages; unknown here.
    pub stabilise: StabiliseSnapshot,
    /// What became of its pages.
    pub pages: PageCounters,
    /// Of these, digested before the sender came to them: as they were copied, or on another core.
    pub digested_pages: u64,
    /// And of those that had been sent ahead.
    pub names: Names,
    /// What else was counted of pages ahead since the log was read last.
    pub ahead: AheadCounters,
}

/// What became of pages that a checkpoint found sent ahead.
#[derive(Debug, Clone, Copy, Default)]
pub struct Names {
    /// Named, and not sent again.
    pub used_pages: u64,
    /// Dropped: the SVM has the same.
    pub equal_pages: u64,
}

/// Why a checkpoint was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The channel is of no use any more.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The capture was not kept; this checkpoint is given up.
    #[error(transparent)]
    Stabilise(#[from] StabiliseError),
    /// The secondary's digests make no sense; this checkpoint is given up.
    #[error(transparent)]
    Digests(#[from] DigestListError),
    /// A page does not go into its chunk, though numbers rise and there is room; this checkpoint is given up.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The secondary's digests were damaged on the way; this checkpoint is given up.
    #[error("the secondary's page digests: {0}")]
    DamagedDigests(String),
    /// It was called off.
    #[error("called off")]
    CalledOff,
    /// A guest's page could not be read.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

impl SendError {
    /// Whether the channel can go on with another checkpoint.
    pub fn spares_channel(&self) -> bool {
        !matches!(self, Self::Channel(_) | Self::Memory(_))
    }

    /// Whether other sockets would do, while the pair lives on.
    pub fn is_broken_stream(&self) -> bool {
        matches!(self, Self::Channel(e) if e.is_broken_stream())
    }
}

/// What the SVM had written when it stopped.
#[derive(Debug)]
pub struct SvmStop {
    /// Which stop it was; none for an SVM that has never run.
    pub number: Option<StopNumber>,
    /// The pages written since the last commit.
    pub dirty: PageBitmap,
}

/// The sending end, for one secondary.
#[derive(Debug)]
pub struct Outbound {
    channel: PageChannel,
    /// The SVM's list may have gone over the streams before these.
    is_reopened: bool,
    chunk_bytes: usize,
    /// How long the secondary may say nothing.
    timeout: Duration,
    lends: bool,
    /// Of the chunk being filled: where its whole pages lie.
    lent: Vec<u32>,
    key: [u8; KEY_BYTES],
    chooser: Chooser,
    cache: PageCache,
    digester: Digester,
    /// Pages that had their digest when they were captured, so far.
    digested_as_copied: u64,
    list: DigestList,
    link: Link,
    /// What the link was seen to carry, if it was.
    measured: Option<u64>,
    /// Pages that travel before a checkpoint, if any do.
    ahead: Option<Ahead>,
    names: Names,
    /// Time that pages of the open checkpoint took to be handed to the kernel.
    handed_over: Duration,
    began: Instant,
}

impl Outbound {
    /// Over connected sockets, for a guest of so many pages.
    pub fn new(
        streams: Vec<TcpStream>,
        pages: usize,
        key: [u8; KEY_BYTES],
        settings: &OutboundSettings,
    ) -> Result<Self, ChannelError> {
        let mut channel = settings.channel;
        // Half a chunk takes any page: the other half may be of states.
        channel.chunk_bytes = channel.chunk_bytes.max(4 * RECORD_MAX_BYTES);
        Ok(Self {
            channel: PageChannel::new(streams, channel)?,
            is_reopened: false,
            chunk_bytes: channel.chunk_bytes,
            timeout: channel.timeout,
            lends: settings.lends,
            lent: Vec::with_capacity(channel.chunk_bytes / PAGE_BYTES),
            key,
            chooser: Chooser::new(PageKey::new(key), settings.verify_one_in),
            cache: PageCache::new(settings.cache_mib, pages),
            digester: Digester::new(key),
            digested_as_copied: 0,
            list: DigestList::new(pages),
            link: Link {
                bytes_per_s: LINK_BYTES_PER_S,
                is_bottleneck: false,
            },
            measured: None,
            ahead: None,
            names: Names::default(),
            handed_over: Duration::ZERO,
            began: Instant::now(),
        })
    }

    /// Goes on over other sockets, with nothing under way. What was sent ahead over the old ones is of no use; what becomes of
    /// a checkpoint that had gone whole is not known yet (rule 13).
    pub fn reopen(&mut self, streams: Vec<TcpStream>) -> Result<(), ChannelError> {
        self.channel.reopen(streams)?;
        self.is_reopened = true;
        if let Some(ahead) = self.ahead.as_mut().filter(|ahead| ahead.is_resting()) {
            ahead.rest(Instant::now());
        }
        Ok(())
    }

    /// The session's key of page digests.
    pub fn key(&self) -> &PageKey {
        self.chooser.key()
    }

    /// Of all messages from now on.
    pub fn set_generation(&mut self, generation: u64) {
        self.channel.set_generation(generation);
    }

    /// Sends pages of a guest that runs; gives how many. `is_off` is asked between chunks.
    pub fn sync(
        &mut self,
        ram: &GuestRam,
        numbers: impl Iterator<Item = u64>,
        mut is_off: impl FnMut() -> bool,
    ) -> Result<u64, SendError> {
        let mut page: Page = [0; PAGE_BYTES];
        let mut numbers = numbers.peekable();
        let mut sent = 0;
        while numbers.peek().is_some() {
            if is_off() {
                return Err(SendError::CalledOff);
            }
            self.await_buffer(&mut is_off)?;
            let buffer = self.channel.next_buffer()?;
            let mut chunk = Encoder::new(buffer, false)?;
            while chunk.room() >= RECORD_MAX_BYTES
                && let Some(number) = numbers.next()
            {
                ram.copy_page_out(number as usize, &mut page)?;
                let payload = match is_zero(&page) {
                    true => Payload::Zero,
                    false => Payload::Raw(&page),
                };
                chunk.push(number, &payload, PageDigest::default())?;
                sent += 1;
            }
            let (items, length) = (chunk.count(), chunk.finish());
            self.channel.submit_loose(Kind::Sync, 0, items, length)?;
        }
        // A few chunks at most.
        self.channel.flush()?;
        Ok(sent)
    }

    /// Sends a checkpoint. `midway` is called when its states are on their way, which they then are alone; `is_off` is asked
    /// between chunks.
    pub fn send(
        &mut self,
        epoch: u64,
        states: &[State],
        stable: &mut Stable,
        stop: &SvmStop,
        midway: Option<impl FnOnce()>,
        mut is_off: impl FnMut() -> bool,
    ) -> Result<Sent, SendError> {
        let begun = Instant::now();
        let before = (
            self.channel.counters().sent_bytes,
            self.chooser.counters(),
            self.digester.found() + self.digested_as_copied,
        );
        self.list.begin(epoch, stop.number, &stop.dirty)?;
        self.link.is_bottleneck = false;
        self.chooser.begin(stop.dirty.set_words().next().is_none());
        self.names = Names::default();
        self.handed_over = Duration::ZERO;
        let mut states_sent = Duration::ZERO;
        // First of all: another core digests while this one sends the states.
        if let Some(slots) = stable.undigested() {
            self.digester.begin(&stable.keeper(), slots);
        }
        let begun_channel = self.channel.lay_begin(epoch, &self.key);
        let outcome = begun_channel
            .map_err(SendError::from)
            .and_then(|()| self.send_states(states, &mut is_off))
            .inspect(|()| states_sent = begun.elapsed())
            .and_then(|()| match midway {
                Some(midway) => Ok(self.channel.send_laid().map(|()| midway())?),
                None => Ok(()),
            })
            .and_then(|()| self.send_pages(stable, &mut is_off))
            .and_then(|waited| Ok(waited + self.send_names(&mut is_off)?))
            .and_then(|waited| Ok(waited + self.await_end_of_list(&mut is_off)?));
        self.digester.end();
        let digest_wait = match outcome {
            Ok(wait) => wait,
            Err(e) => {
                self.cache.abort();
                if e.spares_channel() {
                    self.give_up()?;
                }
                return Err(e);
            }
        };
        self.is_reopened = false;
        let finishing = Instant::now();
        self.channel.finish()?;
        self.handed_over += finishing.elapsed();
        let transfer = begun.elapsed();
        // Rule 15: the capture may go when this returns.
        self.channel.settle()?;
        let channel = self.channel.counters();
        let sent_bytes = channel.sent_bytes - before.0;
        self.measure_link(sent_bytes, transfer);
        Ok(Sent {
            transfer_us: transfer.as_micros() as u64,
            begin_us: states_sent.as_micros() as u64,
            hand_over_us: self.handed_over.as_micros() as u64,
            digest_wait_us: digest_wait.as_micros() as u64,
            sent_bytes,
            digest_bytes: self.list.bytes(),
            channel,
            cache: self.cache.counters(),
            stabilise: StabiliseSnapshot::default(),
            pages: self.chooser.counters().since(&before.1),
            digested_pages: self.digester.found() + self.digested_as_copied - before.2,
            names: self.names,
            ahead: self
                .ahead
                .as_mut()
                .map(Ahead::take_counters)
                .unwrap_or_default(),
        })
    }

    /// Ends a checkpoint that failed, whatever else is wrong with it: the channel is fit for the next one, and the kernel
    /// reads nothing of the capture any more (rule 15).
    fn give_up(&mut self) -> Result<(), SendError> {
        self.channel.abort()?;
        // Half a list would count as a peer that stands still later. One that went over streams which broke does not come.
        let mut last = (self.channel.counters().received_bytes, Instant::now());
        while !self.list.is_over() && (self.list.has_begun() || !self.is_reopened) {
            match self.look(&mut || false) {
                Err(e) if !e.spares_channel() => return Err(e),
                // It spoils nothing more.
                Ok(()) | Err(_) => {}
            }
            let received = self.channel.counters().received_bytes;
            let waited = last.1.elapsed();
            if received != last.0 {
                last = (received, Instant::now());
            } else if waited > self.timeout {
                let after_ms = waited.as_millis() as u64;
                let (stream, step) = (0, Step::ReceiveCheckpoint);
                return Err(ChannelError::TimedOut {
                    stream,
                    step,
                    after_ms,
                }
                .into());
            }
        }
        self.channel.flush()?;
        self.channel.settle()?;
        Ok(())
    }

    /// The checkpoint sent last is committed.
    pub fn committed(&mut self) {
        self.cache.commit();
        self.rest();
    }

    /// It is not.
    pub fn aborted(&mut self) {
        self.cache.abort();
        self.rest();
    }

    fn rest(&mut self) {
        if let Some(ahead) = &mut self.ahead {
            ahead.rest(Instant::now());
        }
    }

    /// States that fit leave with the first pages.
    fn send_states(
        &mut self,
        states: &[State],
        is_off: &mut impl FnMut() -> bool,
    ) -> Result<(), SendError> {
        for state in states {
            for (head, body) in state.parts(self.chunk_bytes / 2) {
                self.await_buffer(is_off)?;
                let buffer = self.channel.next_buffer()?;
                buffer[..PART_HEAD_BYTES].copy_from_slice(&head);
                let length = PART_HEAD_BYTES + body.len();
                buffer[PART_HEAD_BYTES..length].copy_from_slice(body);
                self.channel.lay(Kind::State, 1, length)?;
            }
        }
        Ok(())
    }

    /// Gives how long it waited for digests.
    fn send_pages(
        &mut self,
        stable: &mut Stable,
        is_off: &mut impl FnMut() -> bool,
    ) -> Result<Duration, SendError> {
        let mut waited = Duration::ZERO;
        let lends = self.lends && stable.is_copied();
        // A set that does not fit pushes out what it puts in.
        let fits_cache = stable.pages() <= self.cache.capacity() as u64;
        let keeper = stable.keeper();
        let mut next = stable.next_kept()?;
        while let Some(first) = next {
            waited += self.await_digest(first.number, is_off)?;
            self.await_buffer(is_off)?;
            let buffer = self.channel.next_buffer()?;
            let mut chunk = match lends {
                true => Encoder::apart(buffer),
                false => Encoder::new(buffer, true),
            }?;
            self.lent.clear();
            while let Some(kept) = next {
                let Kept {
                    number, page, slot, ..
                } = kept;
                let svm = self.list.at(number);
                if svm == SvmPage::Pending || chunk.room() < RECORD_MAX_BYTES {
                    break;
                }
                let base = self.cache.get(number);
                let began = self.began;
                let now_ns = || began.elapsed().as_nanos() as u64;
                let known = Known { svm, base };
                self.digested_as_copied += u64::from(kept.digest.is_some());
                let digester = &mut self.digester;
                let digested = || slot.and_then(|slot| digester.digest(slot));
                let choice = match kept.digest.or_else(digested) {
                    Some(digest) => {
                        let page = (page, digest);
                        self.chooser
                            .choose_digested(page, &known, self.link, now_ns)
                    }
                    None => self.chooser.choose(page, &known, self.link, now_ns),
                };
                if let Some(ahead) = &mut self.ahead {
                    ahead.learn(number, choice.is_cheap());
                }
                let digest = match choice {
                    Choice::Equal { digest } => digest,
                    Choice::Send { payload, digest } => {
                        chunk.push(number, &payload, digest)?;
                        if lends && payload.kind().is_whole() {
                            self.lent.extend(slot);
                        }
                        digest
                    }
                };
                match fits_cache && self.chooser.wants_bases() {
                    true => drop(self.cache.insert(number, page, digest)),
                    false => self.cache.supersede(number),
                }
                next = stable.next_kept()?;
            }
            let (items, length) = (chunk.count(), chunk.finish());
            let submitting = Instant::now();
            match self.lent.is_empty() {
                _ if items == 0 => {}
                true => self.channel.submit(Kind::Pages, items, length)?,
                false => {
                    let slots = (&self.lent[..], PAGE_BYTES);
                    match next {
                        None => self.channel.lay_lent(items, length, &keeper, slots)?,
                        Some(_) => self.channel.submit_lent(items, length, &keeper, slots)?,
                    }
                }
            }
            self.handed_over += submitting.elapsed();
        }
        Ok(waited)
    }

    /// Waits until the SVM's digest of a page has come, if one will.
    fn await_digest(
        &mut self,
        number: u64,
        is_off: &mut impl FnMut() -> bool,
    ) -> Result<Duration, SendError> {
        let begun = Instant::now();
        while self.list.at(number) == SvmPage::Pending {
            self.look(is_off)?;
        }
        Ok(begun.elapsed())
    }

    /// Reads what is left of the list: the secondary sends nothing more then, and nobody waits for it later.
    fn await_end_of_list(
        &mut self,
        is_off: &mut impl FnMut() -> bool,
    ) -> Result<Duration, SendError> {
        let begun = Instant::now();
        // What has come costs nobody a wait; what has not must not keep the last pages here.
        let mut patience = Duration::ZERO;
        while !self.list.is_over() {
            if !self.look_for(patience, is_off)? {
                self.channel.send_laid()?;
                patience = LOOK;
            }
        }
        Ok(begun.elapsed())
    }

    /// Waits until a chunk can be filled. The secondary's digests are read meanwhile: it may be waiting for that.
    fn await_buffer(&mut self, is_off: &mut impl FnMut() -> bool) -> Result<(), SendError> {
        while self.channel.try_next_buffer()?.is_none() {
            self.link.is_bottleneck = true;
            self.look(is_off)?;
        }
        Ok(())
    }

    fn look(&mut self, is_off: &mut impl FnMut() -> bool) -> Result<(), SendError> {
        self.look_for(LOOK, is_off).map(drop)
    }

    /// Gives whether something came within that time.
    fn look_for(
        &mut self,
        patience: Duration,
        is_off: &mut impl FnMut() -> bool,
    ) -> Result<bool, SendError> {
        if is_off() {
            return Err(SendError::CalledOff);
        }
        let list = &mut self.list;
        match self.channel.poll(patience)? {
            Event::Chunk(chunk) => list.take(&chunk)?,
            Event::Complete { .. } => list.complete()?,
            Event::Damaged { epoch, reason } => list.spoil(epoch, reason)?,
            Event::Aborted { epoch } => {
                list.spoil(epoch, "given up by the secondary".to_owned())?
            }
            Event::Closed => {
                let (stream, step) = (0, Step::SendChunk);
                return Err(ChannelError::Cut { stream, step }.into());
            }
            Event::Idle => return Ok(false),
            _ => {}
        }
        Ok(true)
    }

    fn measure_link(&mut self, bytes: u64, transfer: Duration) {
        if bytes >= MEASURED_BYTES_MIN && self.link.is_bottleneck {
            let seconds = transfer.as_secs_f64().max(1e-6);
            self.link.bytes_per_s = (bytes as f64 / seconds) as u64;
            self.measured = Some(self.link.bytes_per_s);
        }
    }
}

#[cfg(test)]
#[path = "outbound/reopen_tests.rs"]
mod reopen_tests;
#[cfg(test)]
#[path = "outbound/tests.rs"]
mod tests;
