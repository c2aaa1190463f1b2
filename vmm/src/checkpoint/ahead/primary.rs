//! Which pages the primary sends ahead, and which of them a capture can rely on (sans-IO).
//!
//! A *round* is the time between two looks at the dirty log. What was owed before a round and not written in it is due, if
//! it is worth sending ([`History`]); what was sent and is written again counts as never sent.
//!
//! Invariants: no page is relied on that the log has named since it was read; what the secondary holds for us never exceeds
//! the limit, counted here as it is there; after a capture nothing is sent until its checkpoint has an end, and then
//! everything begins anew.
//!
//! The guest pays for a look: each page that it writes in every round faults once more. Rounds become longer so that this
//! stays below a hundredth of its time, and longer still while nothing is found; a guest that is left alone is looked at
//! about once a second.
//!
//! Does not read a clock, the log or the guest's memory.

use std::time::{Duration, Instant};

use super::history::History;
use super::wire::{HEAD_BYTES, put_head};
use super::{AheadCounters, AheadSettings, CHUNK_PAGES};
use crate::checkpoint::codec::digest::DIGEST_BYTES;
use crate::checkpoint::codec::record::{CHUNK_HEAD_BYTES, EncodeError, RECORD_MAX_BYTES};
use crate::checkpoint::codec::zero::is_zero;
use crate::checkpoint::codec::{Encoder, Page, PageDigest, PageKey, Payload};
use crate::checkpoint::pages::{PAGE_BYTES, PageBitmap};

/// What the guest pays for a page that is protected again, generously: a fault of some microseconds.
const FAULT: Duration = Duration::from_micros(4);
/// Faults may take one part in so many of the guest's time.
const FAULTS_ONE_IN: u32 = 100;
/// Most bytes of a chunk before its first record.
const HEADS_BYTES_MAX: usize = HEAD_BYTES + 4 * CHUNK_PAGES + CHUNK_HEAD_BYTES;
/// The longest time between two looks, in intervals.
const INTERVALS_MAX: u32 = 10;

/// Why a chunk was not made.
#[derive(Debug, thiserror::Error)]
pub enum FillError<E> {
    /// A page could not be read.
    #[error("{0}")]
    Read(E),
    /// A page does not go into its chunk.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// A chunk that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// Its pages.
    pub pages: u32,
    /// Its bytes.
    pub length: usize,
}

/// What is known of pages ahead, for one secondary.
#[derive(Debug)]
pub struct Ahead {
    settings: AheadSettings,
    limit_pages: usize,
    /// Rises with each end of a checkpoint.
    fill: u64,
    /// The last checkpoint has an end, and there was one.
    is_resting: bool,
    /// Sent in this fill, and not written since as far as the log was read.
    sent: PageBitmap,
    /// All that the secondary's area holds of this fill.
    held: PageBitmap,
    held_pages: usize,
    /// To be sent.
    due: PageBitmap,
    /// Words of `due` below are empty.
    due_from: usize,
    /// Where the search for pages to forget goes on.
    forget_from: usize,
    /// Of pages sent.
    digests: Vec<[u8; DIGEST_BYTES]>,
    history: History,
    /// What a round finds in the log; afterwards what a capture has to keep.
    scratch: PageBitmap,
    round_at: Option<Instant>,
    chunk_at: Option<Instant>,
    interval: Duration,
    counters: AheadCounters,
}

impl Ahead {
    /// For a guest of so many pages and a secondary that holds so many MiB for us; `None` if nothing is to be sent.
    pub fn new(pages: usize, limit_mib: usize, settings: AheadSettings) -> Option<Self> {
        let limit_pages = ((limit_mib << 20) / PAGE_BYTES).min(pages);
        // Numbers travel in 32 bits.
        let fits = u32::try_from(pages).is_ok();
        (limit_pages > 0 && fits).then(|| Self {
            settings,
            limit_pages,
            fill: 0,
            is_resting: false,
            sent: PageBitmap::new(pages),
            held: PageBitmap::new(pages),
            held_pages: 0,
            due: PageBitmap::new(pages),
            due_from: 0,
            forget_from: 0,
            digests: vec![[0; DIGEST_BYTES]; pages],
            history: History::new(pages),
            scratch: PageBitmap::new(pages),
            round_at: None,
            chunk_at: None,
            interval: settings.interval,
            counters: AheadCounters::default(),
        })
    }

    /// A checkpoint has ended: committed or not, the secondary holds nothing for us.
    pub fn rest(&mut self, now: Instant) {
        self.fill += 1;
        self.is_resting = true;
        if self.held_pages > 0 {
            self.sent.clear();
            self.held.clear();
            self.held_pages = 0;
        }
        self.drop_due();
        self.history.rest();
        self.interval = self.settings.interval;
        self.round_at = Some(now + self.interval);
    }

    /// No checkpoint is in flight, and there was one.
    pub fn is_resting(&self) -> bool {
        self.is_resting
    }

    /// Until when there is nothing to do; `None`: until the end of a checkpoint.
    pub fn next_at(&self) -> Option<Instant> {
        let chunk_at = self.chunk_at.filter(|_| self.has_due());
        self.round_at
            .filter(|_| self.is_resting)
            .map(|at| chunk_at.map_or(at, |chunk_at| at.min(chunk_at)))
    }

    /// Time to look at the log.
    pub fn is_round_due(&self, now: Instant) -> bool {
        self.is_resting && self.round_at.is_some_and(|at| at <= now)
    }

    /// Looks at the log. `take` adds to a bitmap what was written since it was called last; all of it comes into `owed`, which
    /// has what the secondary was not given since the last commit.
    pub fn round<E>(
        &mut self,
        owed: &mut PageBitmap,
        now: Instant,
        take: impl FnOnce(&mut PageBitmap) -> Result<(), E>,
    ) -> Result<(), E> {
        self.scratch.clear();
        let taken = take(&mut self.scratch);
        self.history.round(&self.scratch);
        self.forget_written();
        let (mut due_pages, mut hot_pages) = (0, 0);
        self.due.clear();
        for (at, owed) in owed.set_words() {
            let written = self.scratch.word(at);
            let left_alone = owed & !written & !self.sent.word(at);
            let (due, held_back) = self.history.admit(at, left_alone);
            self.due.add(at, due);
            self.counters.held_back_pages += u64::from(held_back);
            due_pages += due.count_ones();
            hot_pages += (written & owed).count_ones();
        }
        let fresh_pages = owed.merge(&self.scratch);
        self.due_from = 0;
        self.chunk_at = self.chunk_at.max(Some(now));
        self.counters.rounds += 1;
        let is_quiet = due_pages == 0 && fresh_pages == 0;
        let interval = self.settings.interval;
        self.interval = match is_quiet {
            true => (2 * self.interval).min(INTERVALS_MAX * interval),
            false => interval,
        };
        let tolerable = FAULT * hot_pages * FAULTS_ONE_IN;
        self.round_at = Some(now + self.interval.max(tolerable));
        taken
    }

    /// Makes the next chunk of pages ahead; one without pages if none is due. `read` copies a page of the guest.
    pub fn fill_chunk<E>(
        &mut self,
        buffer: &mut [u8],
        key: &PageKey,
        mut read: impl FnMut(u64, &mut Page) -> Result<(), E>,
    ) -> Result<Filled, FillError<E>> {
        let (mut numbers, mut forget) = ([0; CHUNK_PAGES], [0; CHUNK_PAGES]);
        // What the smallest channel takes, too.
        let room = buffer.len().saturating_sub(HEADS_BYTES_MAX) / RECORD_MAX_BYTES;
        let places = &mut numbers[..room.min(CHUNK_PAGES)];
        let (count, forgotten) = self.choose(places, &mut forget);
        let none = Filled {
            pages: 0,
            length: 0,
        };
        let Some(head) = put_head(buffer, self.fill, &forget[..forgotten]) else {
            return Ok(none);
        };
        let mut chunk = Encoder::new(&mut buffer[head..], true)?;
        let mut page: Page = [0; PAGE_BYTES];
        let mut bytes = 0;
        for &number in &numbers[..count] {
            read(number, &mut page).map_err(FillError::Read)?;
            let (payload, digest) = match is_zero(&page) {
                true => (Payload::Zero, key.of_zeros()),
                false => (Payload::Raw(&page), key.of(&page)),
            };
            bytes += payload.data().len() as u64;
            chunk.push(number, &payload, digest)?;
            self.digests[number as usize] = digest.to_bytes();
        }
        let pages = chunk.count();
        self.counters.sent_pages += u64::from(pages);
        self.counters.sent_bytes += bytes;
        let length = head + chunk.finish();
        Ok(Filled { pages, length })
    }

    /// Pages that go into the next chunk, and those that the area gives up for them.
    fn choose(&mut self, numbers: &mut [u64], forget: &mut [u32; CHUNK_PAGES]) -> (usize, usize) {
        let (mut count, mut forgotten) = (0, 0);
        let mut is_full = false;
        while count < numbers.len()
            && let Some(number) = self.next_due()
        {
            let (word, bit) = (number / 64, 1 << (number % 64));
            if self.held.word(word) & bit == 0 {
                if self.held_pages == self.limit_pages {
                    let stale = (!is_full).then(|| self.next_stale()).flatten();
                    let Some(stale) = stale else {
                        // Those behind it may have a place already.
                        is_full = true;
                        self.counters.refused_pages += 1;
                        continue;
                    };
                    forget[forgotten] = stale as u32;
                    forgotten += 1;
                    self.held_pages -= 1;
                }
                self.held.add(word, bit);
                self.held_pages += 1;
            }
            // From here on it is no page that the area holds for nothing.
            self.sent.add(word, bit);
            numbers[count] = number as u64;
            count += 1;
        }
        (count, forgotten)
    }

    fn next_due(&mut self) -> Option<usize> {
        while self.has_due() {
            let word = self.due.word(self.due_from);
            if word != 0 {
                let bit = word.trailing_zeros() as usize;
                self.due.remove(self.due_from, 1 << bit);
                return Some(self.due_from * 64 + bit);
            }
            self.due_from += 1;
        }
        None
    }

    /// A page that the area holds for nothing: it was written since. Not one that is due, which would come back.
    fn next_stale(&mut self) -> Option<usize> {
        let words = self.held.words().len();
        for _ in 0..words {
            let at = self.forget_from % words;
            let stale = self.held.word(at) & !self.sent.word(at) & !self.due.word(at);
            if stale != 0 {
                let bit = stale.trailing_zeros() as usize;
                self.held.remove(at, 1 << bit);
                return Some(at * 64 + bit);
            }
            self.forget_from = at + 1;
        }
        None
    }

    fn has_due(&self) -> bool {
        self.due_from < self.due.words().len()
    }

    fn drop_due(&mut self) {
        if self.has_due() {
            self.due.clear();
        }
        self.due_from = self.due.words().len();
    }

    /// A chunk of so many bytes went to a link of which so much is ours.
    pub fn chunk_sent(&mut self, bytes: usize, bytes_per_s: u64, now: Instant) {
        let nanoseconds = bytes as u64 * 1_000_000_000 / bytes_per_s.max(1);
        self.chunk_at = Some(now + Duration::from_nanos(nanoseconds));
    }

    /// The link takes nothing at present.
    pub fn put_off(&mut self, now: Instant) {
        self.chunk_at = Some(now + self.settings.interval);
    }

    /// What of the link is ours, if it was seen to carry so much.
    pub fn bytes_per_s(&self, link_bytes_per_s: u64) -> u64 {
        match self.settings.mib_per_s {
            0 => link_bytes_per_s / 4,
            mib => u64::from(mib) << 20,
        }
    }

    /// A capture is made, and the log says for the last time what was written since it was read. Nothing is sent until
    /// [`Self::rest`].
    pub fn captured(&mut self, written: &PageBitmap) {
        self.is_resting = false;
        self.drop_due();
        self.scratch.copy_from(written);
        self.history.written(written);
        self.forget_written();
    }

    /// The checkpoint has decided about a page, whether it had gone ahead or not; `is_cheap`: what goes of it is nothing, or
    /// little beside a page.
    pub fn learn(&mut self, number: u64, is_cheap: bool) {
        self.history.learn(number, is_cheap);
    }

    /// What `scratch` has was written: of no use where it was sent.
    fn forget_written(&mut self) {
        if self.held_pages == 0 {
            return;
        }
        for (at, written) in self.scratch.set_words() {
            let wasted = self.sent.word(at) & written;
            self.sent.remove(at, written);
            if wasted != 0 {
                self.counters.wasted_pages += u64::from(wasted.count_ones());
                self.history.wasted(at, wasted);
            }
        }
    }

    /// Pages that a capture relies on: the secondary holds them as they are.
    pub fn sent(&self) -> &PageBitmap {
        &self.sent
    }

    /// Those with their digests, and where to note what the SVM has of them.
    pub fn relied_on(&mut self) -> (impl Iterator<Item = (u64, PageDigest)>, &mut History) {
        let digests = &self.digests;
        let digest = |number: u64| PageDigest::from_bytes(digests[number as usize]);
        let pages = self.sent.iter().map(move |number| (number, digest(number)));
        (pages, &mut self.history)
    }

    /// What of `union` a capture has to keep: all but [`Self::sent`].
    pub fn to_keep<'a>(&'a mut self, union: &'a PageBitmap) -> &'a PageBitmap {
        if self.held_pages == 0 {
            return union;
        }
        self.scratch.clear();
        for (at, pages) in union.set_words() {
            self.scratch.add(at, pages & !self.sent.word(at));
        }
        &self.scratch
    }

    #[cfg(test)]
    pub(super) fn limit_to(&mut self, pages: usize) {
        self.limit_pages = pages;
    }

    /// What was counted since this was asked last.
    pub fn take_counters(&mut self) -> AheadCounters {
        std::mem::take(&mut self.counters)
    }

    /// The same, if it is more than that the log was looked at.
    pub fn take_news(&mut self) -> Option<AheadCounters> {
        let AheadCounters {
            sent_pages,
            wasted_pages,
            refused_pages,
            held_back_pages,
            ..
        } = self.counters;
        let counted = sent_pages + wasted_pages + refused_pages + held_back_pages;
        (counted > 0).then(|| self.take_counters())
    }
}

#[cfg(test)]
#[path = "primary_tests.rs"]
mod tests;
