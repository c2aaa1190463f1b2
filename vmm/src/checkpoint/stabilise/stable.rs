//! One capture, read page by page.
//!
//! Invariants: pages come once each, in rising order; dropped, it leaves no page protected or due.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::early::Place;
use super::shared::{DUE, FREE, SAVED, Shared};
use super::{Mechanism, StabiliseError};
use crate::checkpoint::channel::Keeper;
use crate::checkpoint::codec::PageDigest;
use crate::checkpoint::pages::{PAGE_BYTES, PageBitmap};

/// Pages read before they are released with one call.
const RELEASE_PAGES: usize = 64;
/// So often the reader looks for faults itself: it runs already, the thread that waits for them has to wake up.
const SERVE_EVERY: u64 = 4;

/// What a capture took from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StableCost {
    /// How it was kept.
    pub mechanism: Mechanism,
    /// Its pages.
    pub pages: u64,
    /// In [`Stabiliser::take`](super::Stabiliser::take), while the guest stood still.
    pub pause_us: u64,
    /// Writes of the guest that had to wait until a page was saved.
    pub faults: u64,
    /// How long they waited together, from when a thread has taken up the fault, plus a calibrated constant. How long it
    /// waited to be taken up is missing: on a busy host that is most of it, so nothing is decided by this. `lost_us` of
    /// `colo bench stabilise` is what the guest itself lost.
    pub stall_us: u64,
    /// Pages that the host saved before it wrote.
    pub host_saves: u64,
    /// From the end of the pause until the last page was released.
    pub read_us: u64,
}

impl StableCost {
    /// Pause and stalls (rule 17).
    pub fn stolen_us(&self) -> u64 {
        self.pause_us + self.stall_us
    }
}

/// Where copied pages lie.
#[derive(Debug)]
pub(super) struct Copies {
    /// Of those copied before the pause, rising, and how far the reader is.
    places: Vec<Place>,
    at: usize,
    /// By slot, of those as they were copied then; none if nobody asked for them.
    digests: Vec<PageDigest>,
    /// Of the others, in order, those that the reader has not come to.
    others: Range<u32>,
}

impl Copies {
    /// Pages in slots from `first` on, in order.
    pub(super) fn in_order(first: u32, count: u32) -> Self {
        Self {
            places: Vec::new(),
            at: 0,
            digests: Vec::new(),
            others: first..first + count,
        }
    }

    /// And others that were copied before, with their digests by slot if these are known.
    pub(super) fn beside(self, places: Vec<Place>, digests: Vec<PageDigest>) -> Self {
        Self {
            places,
            digests,
            ..self
        }
    }

    /// Where a page lies that the reader comes to, and its digest if that is known.
    fn find(&mut self, page: usize) -> (u32, Option<PageDigest>) {
        let (word, bit) = (page / 64, page as u32 % 64);
        while self
            .places
            .get(self.at)
            .is_some_and(|place| place.at < word)
        {
            self.at += 1;
        }
        let place = self.places.get(self.at).filter(|place| place.at == word);
        match place.and_then(|place| Some((place.slot_of(bit)?, place.is_early(bit)))) {
            Some((slot, true)) => (slot, self.digests.get(slot as usize).copied()),
            Some((slot, false)) => (slot, None),
            None => {
                self.others.start += 1;
                (self.others.start - 1, None)
            }
        }
    }
}

#[derive(Debug)]
enum Kind {
    /// The pages lie in slots.
    Copied(Copies),
    Protected {
        ranges: Vec<Range<usize>>,
        /// The first range that is not released as a whole, and how far it is.
        range: usize,
        released: usize,
    },
}

/// A page of a capture.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// Which.
    pub number: u64,
    /// What it holds in the capture.
    pub page: &'a [u8; PAGE_BYTES],
    /// Its slot of [`Stable::keeper`], where it stays until the capture is dropped. None if the next page takes its place.
    pub slot: Option<u32>,
    /// Its digest, if it was computed when the page was copied.
    pub digest: Option<PageDigest>,
}

/// A capture that is kept.
#[derive(Debug)]
pub struct Stable {
    shared: Arc<Shared>,
    mechanism: Mechanism,
    kind: Kind,
    /// What is left of each word of the set that is not 0, with its place: as large as the set, not as RAM.
    set: Box<[(usize, u64)]>,
    at: usize,
    pages: u64,
    read: u64,
    bounce: Box<[u8; PAGE_BYTES]>,
    pause: Duration,
    since: Instant,
    /// The counters when it was taken: faults, stalls, saves.
    before: [u64; 3],
    closed: Option<StableCost>,
}

impl Stable {
    pub(super) fn copied(
        shared: Arc<Shared>,
        set: &PageBitmap,
        copies: Copies,
        pause: Duration,
    ) -> Self {
        Self::new(shared, set, Mechanism::Copy, Kind::Copied(copies), pause)
    }

    pub(super) fn protected(
        shared: Arc<Shared>,
        set: &PageBitmap,
        (mechanism, ranges): (Mechanism, Vec<Range<usize>>),
        pause: Duration,
    ) -> Self {
        let kind = Kind::Protected {
            released: ranges.first().map_or(0, |range| range.start),
            ranges,
            range: 0,
        };
        Self::new(shared, set, mechanism, kind, pause)
    }

    fn new(
        shared: Arc<Shared>,
        set: &PageBitmap,
        mechanism: Mechanism,
        kind: Kind,
        pause: Duration,
    ) -> Self {
        let before = counts(&shared);
        Self {
            shared,
            mechanism,
            kind,
            set: set.set_words().collect(),
            at: 0,
            pages: set.count() as u64,
            read: 0,
            bounce: Box::new([0; PAGE_BYTES]),
            pause,
            since: Instant::now(),
            before,
            closed: None,
        }
    }

    /// How it is kept.
    pub fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    /// Pages in the set.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The next page of the set, with its contents in the capture; `None` after the last. After an error the capture is of no
    /// use: drop it.
    pub fn next_page(&mut self) -> Result<Option<(u64, &[u8; PAGE_BYTES])>, StabiliseError> {
        let kept = self.next_kept()?;
        Ok(kept.map(|kept| (kept.number, kept.page)))
    }

    /// The same, with the place where the page stays.
    pub fn next_kept(&mut self) -> Result<Option<Kept<'_>>, StabiliseError> {
        let Some(page) = self.next_number() else {
            self.close();
            return Ok(None);
        };
        self.read += 1;
        if let Kind::Copied(copies) = &mut self.kind {
            let (slot, digest) = copies.find(page);
            return Ok(Some(Kept {
                number: page as u64,
                page: self.shared.arena.page(slot),
                slot: Some(slot),
                digest,
            }));
        }
        let slot = self.settle(page)?;
        self.release_before(page + 1);
        if self.read.is_multiple_of(SERVE_EVERY) {
            self.shared.try_serve();
        }
        let page = Kept {
            number: page as u64,
            page: match slot {
                Some(slot) => self.shared.arena.page(slot),
                None => &self.bounce,
            },
            slot,
            digest: None,
        };
        Ok(Some(page))
    }

    /// Whose slots those of [`Kept`] are.
    pub fn keeper(&self) -> Arc<dyn Keeper> {
        self.shared.arena.clone()
    }

    /// Whether each page lies in a slot already.
    pub fn is_copied(&self) -> bool {
        matches!(self.kind, Kind::Copied(_))
    }

    /// Slots of pages to come that have no digest yet, in their order, if pages were copied: all, or those that were first
    /// written while the others were copied. Those written again then are left out.
    pub fn undigested(&self) -> Option<Range<u32>> {
        let Kind::Copied(copies) = &self.kind else {
            return None;
        };
        match (copies.places.get(copies.at), copies.places.last()) {
            (Some(next), Some(last)) if copies.digests.is_empty() => {
                Some(next.slot..last.slot + last.pages.count_ones())
            }
            _ => Some(copies.others.clone()),
        }
    }

    fn next_number(&mut self) -> Option<usize> {
        while let Some((place, word)) = self.set.get_mut(self.at) {
            if *word != 0 {
                let bit = word.trailing_zeros() as usize;
                *word &= *word - 1;
                return Some(*place * 64 + bit);
            }
            self.at += 1;
        }
        None
    }

    /// Frees a page; its contents are in the slot given, or in the bounce page.
    fn settle(&mut self, page: usize) -> Result<Option<u32>, StabiliseError> {
        let state = &self.shared.states[page];
        if state.load(Ordering::Acquire) == DUE {
            self.shared.copy(page, self.bounce.as_mut_slice());
            // A writer that comes now finds the page free; one that came before has saved it.
            let free = state.compare_exchange(DUE, FREE, Ordering::AcqRel, Ordering::Acquire);
            if free.is_ok() {
                return Ok(None);
            }
        }
        match state.swap(FREE, Ordering::AcqRel) {
            state if state >= SAVED => Ok(Some(state - SAVED)),
            _ => Err(StabiliseError::Lost {
                page: page as u64,
                limit_mib: self.shared.limit_mib(),
            }),
        }
    }

    /// Releases protected pages below `end` when there are enough of them, or a range is through.
    fn release_before(&mut self, end: usize) {
        let Kind::Protected {
            ranges,
            range,
            released,
            ..
        } = &mut self.kind
        else {
            return;
        };
        while let Some(current) = ranges.get(*range) {
            let upto = end.min(current.end);
            let through = end >= current.end;
            if upto <= *released || !(through || upto - *released >= RELEASE_PAGES) {
                return;
            }
            self.shared.release(*released, upto - *released);
            if !through {
                *released = upto;
                return;
            }
            *range += 1;
            *released = ranges.get(*range).map_or(0, |next| next.start);
        }
    }

    /// Releases everything; what was not read is not wanted any more.
    fn close(&mut self) -> StableCost {
        if let Some(cost) = self.closed {
            return cost;
        }
        if let Kind::Protected { .. } = &self.kind {
            // Nobody is in the middle of a fault, and later ones only release.
            let shared = self.shared.clone();
            let _serving = shared.hold_faults();
            shared.ram.arm_guard(false);
            while let Some(page) = self.next_number() {
                shared.states[page].store(FREE, Ordering::Release);
            }
            self.release_before(usize::MAX);
        }
        let [faults, stall_ns, host_saves] = self.since_taken();
        let cost = StableCost {
            mechanism: self.mechanism,
            pages: self.pages,
            pause_us: self.pause.as_micros() as u64,
            faults,
            stall_us: stall_ns / 1000,
            host_saves,
            read_us: self.since.elapsed().as_micros() as u64,
        };
        self.closed = Some(cost);
        cost
    }

    fn since_taken(&self) -> [u64; 3] {
        let now = counts(&self.shared);
        std::array::from_fn(|n| now[n] - self.before[n])
    }

    /// Ends the capture, read to its end or not, and tells what it cost.
    pub fn finish(mut self) -> StableCost {
        self.close()
    }

    /// The same, while it is kept: what its memory is prepared for the next one with comes when it is dropped.
    pub fn end(&mut self) -> StableCost {
        self.close()
    }
}

impl Drop for Stable {
    fn drop(&mut self) {
        self.close();
        let shared = &self.shared;
        // Ready for the next one if it is as large, while the guest runs.
        let wanted = shared.arena.used();
        shared.arena.warm_up(wanted.saturating_add(wanted / 4));
        shared.busy.store(false, Ordering::Release);
    }
}

fn counts(shared: &Shared) -> [u64; 3] {
    let counts = &shared.counts;
    [&counts.faults, &counts.stall_ns, &counts.host_saves].map(|c| c.load(Ordering::Relaxed))
}
