//! Copies of pages made before a pause, while the guest still runs, so that the pause is left with those written since.
//!
//! The dirty log is collected before the pages are copied, and once more in the pause. A page that the second collection
//! does not have was not written after the first, so it is as it was copied; one that it has is copied again.
//!
//! Invariants: a copy made early serves the next capture and no other; a page of the set has one slot, which is written
//! again in the pause if the page was; nothing is made early of a capture whose pages are protected.
//!
//! Does not collect the log, and sees no writes itself.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::arena::Slots;
use super::stable::{Copies, Stable};
use super::{PAGE_BYTES, PageBitmap, StabiliseError, StabilisePolicy, Stabiliser};
use super::{Room, copy_all, runs};
use crate::checkpoint::codec::PageDigest;

/// Copying early has to save so many copies for each page that is written again: there the guest meets another fault of the
/// dirty log, which takes it ten times as long as a copy and more.
const SAVED_PER_FAULT: u64 = 16;

/// Pages of one word of a set, and the slot of the first; the others follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Of the word.
    pub(super) at: usize,
    pub(super) pages: u64,
    pub(super) slot: u32,
    /// Those that were written again since, and copied anew.
    pub(super) again: u64,
}

impl Place {
    /// The slot of a page of this word, by its bit, if it is one of them.
    pub(super) fn slot_of(&self, bit: u32) -> Option<u32> {
        let below = self.pages & ((1 << bit) - 1);
        (self.pages & 1 << bit != 0).then(|| self.slot + below.count_ones())
    }

    /// Whether a page of it is as it was copied before the pause.
    pub(super) fn is_early(&self, bit: u32) -> bool {
        self.again & 1 << bit == 0
    }
}

/// What was copied for the next capture.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// Rising.
    places: Vec<Place>,
    slots: Option<Slots>,
    /// By slot, as they were when they were copied; none without a key.
    digests: Vec<PageDigest>,
    /// Pages that would be written again before the next pause.
    expected_again: u64,
    /// Pages of the capture before.
    last_pages: u64,
    pub(super) captures: u64,
    pub(super) left: u64,
    /// Pages copied early and written again before the pause, so far.
    pub(super) again_pages: u64,
}

/// What of a set is still to be copied in the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rest {
    again: u64,
    fresh: u64,
}

impl Early {
    /// Whether it is likely to give the guest more than it takes, for a set of at least so many pages.
    fn pays(&mut self, known_pages: u64) -> bool {
        let pages = known_pages.max(self.last_pages);
        let pays = pages >= self.expected_again * SAVED_PER_FAULT;
        if !pays {
            self.left += 1;
            // Guests change: it is tried again, the later the worse it was.
            self.expected_again -= self.expected_again.div_ceil(SAVED_PER_FAULT);
        }
        pays
    }

    pub(super) fn forget(&mut self) {
        self.places.clear();
        self.slots = None;
    }

    fn note(&mut self, set: &PageBitmap) {
        let mut slot = 0;
        self.places.extend(set.set_words().map(|(at, pages)| {
            let again = 0;
            let place = Place {
                at,
                pages,
                slot,
                again,
            };
            slot += pages.count_ones();
            place
        }));
    }

    /// Gives each word of the union with what was copied of it, and what of that was written since.
    fn each_word(
        places: &[Place],
        union: &PageBitmap,
        written: &PageBitmap,
        mut each: impl FnMut(usize, Option<&Place>, u64, u64),
    ) {
        let mut places = places.iter().peekable();
        for (at, word) in union.set_words() {
            while places.next_if(|place| place.at < at).is_some() {}
            let place = places.next_if(|place| place.at == at);
            let copied = place.map_or(0, |place| place.pages);
            let written = word_of(written, at);
            each(at, place, word & copied & written, word & !copied);
        }
    }

    fn rest(&self, union: &PageBitmap, written: &PageBitmap) -> Rest {
        let mut rest = Rest::default();
        Self::each_word(&self.places, union, written, |_, _, again, fresh| {
            rest.again += u64::from(again.count_ones());
            rest.fresh += u64::from(fresh.count_ones());
        });
        rest
    }
}

impl Stabiliser {
    /// Whether pages of the next capture, which has `known_pages` at least, are to be copied before its pause. Asked once for
    /// each capture: a no wears off.
    pub fn wants_early(&mut self, policy: StabilisePolicy, known_pages: u64) -> bool {
        copies_early(policy) && self.early.pays(known_pages)
    }

    /// Pages that were copied early and written again before the pause, since the start. Each met one more fault of the dirty
    /// log, and was copied for nothing.
    pub fn early_again_pages(&self) -> u64 {
        self.early.again_pages
    }

    /// Copies pages while the guest runs, after the dirty log was collected: what is written from then on is what
    /// [`Self::take_since`] has to be told. Gives how many, which is none if they do not fit, or a writer of the host has not let
    /// go of the capture before.
    pub fn copy_early(&mut self, set: &PageBitmap) -> u64 {
        self.early.forget();
        let shared = self.shared.clone();
        let pages = set.count() as u64;
        if shared.busy.load(Ordering::Acquire) || pages > u64::from(shared.arena.limit()) {
            return 0;
        }
        // Nobody stands still here: a writer may not have come to the end of what it had to save for the capture before.
        if !shared.nobody_saves() {
            return 0;
        }
        {
            // As in `take`: no thread answers a fault of the capture before any more.
            let _serving = shared.hold_faults();
            shared.arena.reset();
            shared.forget_waits();
        }
        let Some(mut slots) = shared.arena.take(pages as u32, 0) else {
            return 0;
        };
        let mut room = Room::of(shared.arena.bytes_mut(&mut slots));
        self.early.digests.clear();
        if let Some(key) = &self.key {
            let digests = &mut self.early.digests;
            digests.resize(pages as usize, PageDigest::default());
            room = room.with_digests(key, digests);
        }
        copy_all(&shared, set, room);
        self.early.note(set);
        self.early.slots = Some(slots);
        pages
    }

    /// As [`Self::take`], with the help of what [`Self::copy_early`] has copied, if anything: `written` are the pages that
    /// guest and host have written since the log was collected for it.
    pub fn take_since(
        &mut self,
        union: &PageBitmap,
        written: &PageBitmap,
        policy: StabilisePolicy,
    ) -> Result<Stable, StabiliseError> {
        let stable = copies_early(policy).then(|| self.complete(union, written));
        match stable.flatten() {
            Some(stable) => {
                self.remember(union, policy);
                Ok(stable)
            }
            None => self.take(union, policy),
        }
    }

    /// Copies what is missing or has changed; none if that is no less than all, or does not fit.
    fn complete(&mut self, union: &PageBitmap, written: &PageBitmap) -> Option<Stable> {
        let begun = Instant::now();
        let shared = self.shared.clone();
        let early = &mut self.early;
        let mut copied = early.slots.take()?;
        let rest = early.rest(union, written);
        let pages = union.count() as u64;
        early.expected_again = rest.again;
        early.last_pages = pages;
        early.again_pages += rest.again;
        if (rest.again + rest.fresh) * 2 > pages {
            return None;
        }
        let mut more = shared.arena.take(rest.fresh as u32, 0)?;
        let (first, fresh_first) = (copied.first(), more.first());
        let copied = shared.arena.bytes_mut(&mut copied);
        let mut fresh_room = shared.arena.bytes_mut(&mut more);
        Early::each_word(&early.places, union, written, |at, place, again, fresh| {
            runs::each_exact([(at, again)], |run| {
                let slot = place.and_then(|place| place.slot_of(run.start as u32 % 64));
                let from = slot.map_or(0, |slot| (slot - first) as usize * PAGE_BYTES);
                let out = &mut copied[from..from + run.len() * PAGE_BYTES];
                shared.copy(run.start, out);
            });
            runs::each_exact([(at, fresh)], |run| {
                let room = std::mem::take(&mut fresh_room);
                let (out, left) = room.split_at_mut(run.len() * PAGE_BYTES);
                shared.copy(run.start, out);
                fresh_room = left;
            });
        });
        for place in &mut early.places {
            place.again = place.pages & word_of(written, place.at);
        }
        early.captures += 1;
        let places = std::mem::take(&mut early.places);
        let digests = std::mem::take(&mut early.digests);
        let copies = Copies::in_order(fresh_first, rest.fresh as u32).beside(places, digests);
        self.copies += 1;
        shared.busy.store(true, Ordering::Release);
        Some(Stable::copied(shared, union, copies, begun.elapsed()))
    }
}

/// A word of what was written; what the set does not reach counts as written.
fn word_of(written: &PageBitmap, at: usize) -> u64 {
    written.words().get(at).copied().unwrap_or(u64::MAX)
}

fn copies_early(policy: StabilisePolicy) -> bool {
    matches!(policy, StabilisePolicy::Auto | StabilisePolicy::Copy)
}
