//! Keeps captured pages as they were while the guest runs on.
//!
//! [`Stabiliser::take`] is called while vCPUs and host writers stand still. Afterwards they go on, and [`Stable::next_page`]
//! gives each page of the set as it was, in rising order.
//!
//! - *Copy*: all pages go into an arena before the guest goes on; most of them before it stood still (`early`), in which case
//!   the pause copies what was written since.
//! - *Protect*: the pages are write-protected in the guest's mapping ([`GuestView`]) with userfaultfd. A vCPU that writes to one
//!   waits until a thread has saved it. The host has a mapping of its own, which is never protected: its writes ask the
//!   [`WriteGuard`] of RAM, which saves the page on the spot, without a fault, a lock or a
//!   system call (rule 15).
//! - *Mixed*: pages that the set before had too, which the guest will likely write again at once, are copied, the others
//!   protected.
//!
//! KVM's own write protection, which dirty logging uses, cannot serve here: KVM answers such a fault itself, by marking the
//! page and letting the guest write; nobody is asked before, so the old contents are gone.
//!
//! Invariants: what is read is what the page held in [`Stabiliser::take`], or there is an error and no page (rule 14: the set
//! belongs to the next checkpoint); a [`Stable`] that is dropped, at any place, leaves no page protected; the arena does not
//! grow beyond its limit.
//!
//! Does not see writes of the kernel through pinned pages (rule 15), and does not pause anything.

mod arena;
mod calibrate;
mod copying;
mod early;
mod runs;
mod serve;
mod shared;
mod stable;
mod uffd;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use colo_fastpath::ring::{GuestRam, WriteGuard};
use serde::{Deserialize, Serialize};

use crate::machine::GuestView;
use arena::Arena;
use copying::{Room, copy_all};
use early::Early;
use serve::FaultThread;
use shared::{DUE, FREE, HOST_SLOTS, Shared};

use stable::Copies;
pub use stable::{Kept, Stable, StableCost};
pub use uffd::UffdError;

use super::codec::PageKey;
use super::pages::{PAGE_BYTES, PageBitmap};

/// Arena that is ready before the first capture, in pages.
const WARM_PAGES: u32 = 4096;

/// What is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StabilisePolicy {
    /// Whatever was measured to take less time from the guest: all pages are copied if there is room for them, before the
    /// pause where that pays; a larger set is kept as with [`StabilisePolicy::Mixed`].
    ///
    /// `colo bench stabilise` says so (`lost_us`, the guest's own count): from 100 pages to 100 000, copies before the pause
    /// take no more from it than protection does, whether the guest writes to the pages or not; and where it writes to so
    /// many again that they are left for the pause, protecting them costs it more than that.
    #[default]
    Auto,
    /// All pages are copied; protected if there is no room for them.
    Copy,
    /// All pages are protected, if they can be.
    Protect,
    /// What is written again and again is copied, the rest protected.
    Mixed,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mechanism {
    /// Copied.
    Copy,
    /// Protected.
    Protect,
    /// Both.
    Mixed,
}

/// A capture cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StabiliseError {
    /// The one before is still alive.
    #[error("the capture before is still being read")]
    Busy,
    /// More pages than the arena may have, and they cannot be protected.
    #[error("checkpoint.arena_mib = {limit_mib}: {pages} dirty pages do not fit; raise it")]
    NoRoom {
        /// In the set.
        pages: usize,
        /// Of the arena.
        limit_mib: usize,
    },
    /// A page was overwritten when the arena was full.
    #[error(
        "page {page} was written by the host when checkpoint.arena_mib = {limit_mib} was used up; raise it"
    )]
    Lost {
        /// Which.
        page: u64,
        /// Of the arena.
        limit_mib: usize,
    },
    /// No memory or thread.
    #[error("no memory or thread to keep captured pages: {0}")]
    Host(#[from] io::Error),
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StabiliseSnapshot {
    /// Captures that were copied.
    pub copies: u64,
    /// Of these, most of whose pages were copied before the pause.
    pub early: u64,
    /// Captures of which nothing was, because the guest would have written too many pages again.
    pub early_left: u64,
    /// Pages that were copied before the pause and written again before it.
    pub early_again_pages: u64,
    /// Large sets that one thread copied, because the host had no other to give.
    pub copied_alone: u64,
    /// Captures that were protected.
    pub protects: u64,
    /// Captures that were both.
    pub mixed: u64,
    /// Captures that should have been protected and were copied.
    pub fallbacks: u64,
    /// Faults of the guest at protected pages.
    pub faults: u64,
    /// Time that these took.
    pub stall_us: u64,
    /// Pages saved by host writers.
    pub host_saves: u64,
    /// Faults that waited for the reader because the arena was full.
    pub arena_waits: u64,
    /// Pages lost because the arena was full; their checkpoints failed.
    pub lost: u64,
    /// Size of the arena that is in memory.
    pub arena_pages: u64,
}

/// Takes captures of one machine's memory.
#[derive(Debug)]
pub struct Stabiliser {
    // Ends before the descriptor closes.
    thread: Option<FaultThread>,
    shared: Arc<Shared>,
    // After the descriptor: it is what is registered there.
    _view: Option<Arc<GuestView>>,
    unavailable: Option<String>,
    /// The set before.
    before: PageBitmap,
    /// The hot pages of the set at hand, and the others.
    hot: PageBitmap,
    cold: PageBitmap,
    early: Early,
    /// Of the digests that pages get as they are copied before a pause.
    key: Option<PageKey>,
    copies: u64,
    protects: u64,
    mixed: u64,
    fallbacks: u64,
}

impl Stabiliser {
    /// For a machine that sees its RAM through `view`; without one, pages are only ever copied. At most `arena_pages` are in
    /// the arena; all of RAM if pages cannot be protected, since nothing else is left then.
    ///
    /// Takes some milliseconds, in which it measures what a fault costs here.
    pub fn new(
        ram: Arc<GuestRam>,
        view: Option<Arc<GuestView>>,
        arena_pages: u32,
    ) -> Result<Self, StabiliseError> {
        let (uffd, unavailable) = match &view {
            None => (None, Some("the guest has no mapping of its own".to_owned())),
            Some(view) => match uffd::Uffd::new(view.address(), ram.bytes()) {
                Ok(uffd) => (Some(uffd), None),
                Err(e) => (None, Some(e.to_string())),
            },
        };
        if let Some(why) = &unavailable {
            tracing::warn!("captured pages are always copied: {why}");
        }
        let pages = ram.page_count();
        let limit = match uffd {
            Some(_) => arena_pages.max(2 * HOST_SLOTS),
            None => u32::try_from(pages).unwrap_or(u32::MAX),
        };
        let arena = Arena::new(limit)?;
        arena.warm_up(WARM_PAGES);
        let wake_ns = calibrate::wake_ns()?;
        let shared = Arc::new(Shared::new(ram.clone(), uffd, arena, wake_ns));
        let thread = match shared.uffd {
            Some(_) => Some(FaultThread::spawn(shared.clone())?),
            None => None,
        };
        let guard: Arc<dyn WriteGuard> = shared.clone();
        ram.set_guard(Arc::downgrade(&guard));
        Ok(Self {
            thread,
            shared,
            _view: view,
            unavailable,
            before: PageBitmap::new(pages),
            hot: PageBitmap::new(pages),
            cold: PageBitmap::new(pages),
            early: Early::default(),
            key: None,
            copies: 0,
            protects: 0,
            mixed: 0,
            fallbacks: 0,
        })
    }

    /// From now on pages that are copied before a pause are digested with this key as they are copied, while they lie in the
    /// processor's cache: [`Kept::digest`].
    pub fn digest_with(&mut self, key: PageKey) {
        self.key = Some(key);
    }

    /// Why pages cannot be protected, if they cannot.
    pub fn unavailable(&self) -> Option<&str> {
        self.unavailable.as_deref()
    }

    /// Keeps the pages of `union`. The guest and all host writers stand still until this returns.
    pub fn take(
        &mut self,
        union: &PageBitmap,
        policy: StabilisePolicy,
    ) -> Result<Stable, StabiliseError> {
        let begun = Instant::now();
        // Its slots are given out anew.
        self.early.forget();
        if self.shared.busy.swap(true, Ordering::AcqRel) {
            return Err(StabiliseError::Busy);
        }
        let outcome = self.take_free(union, policy, begun);
        match &outcome {
            Ok(_) => self.remember(union, policy),
            Err(_) => self.shared.busy.store(false, Ordering::Release),
        }
        outcome
    }

    /// For the hot pages of the next set.
    fn remember(&mut self, union: &PageBitmap, policy: StabilisePolicy) {
        // Who copies everything asks for nothing that the set before can tell.
        if policy != StabilisePolicy::Copy {
            self.before.copy_from(union);
        }
    }

    fn take_free(
        &mut self,
        union: &PageBitmap,
        policy: StabilisePolicy,
        begun: Instant,
    ) -> Result<Stable, StabiliseError> {
        // No thread answers a fault of the capture before any more.
        let shared = self.shared.clone();
        let _serving = shared.hold_faults();
        shared.arena.reset();
        shared.forget_waits();
        let pages = union.count();
        let mechanism = self.choose(pages, policy)?;
        if mechanism != Mechanism::Copy {
            match self.protect(union, mechanism, begun) {
                Ok(stable) => return Ok(stable),
                Err(e) => {
                    tracing::warn!("a capture is copied: pages cannot be protected: {e}");
                    self.fallbacks += 1;
                    shared.arena.reset();
                }
            }
        }
        let Some(mut slots) = shared.arena.take(pages as u32, 0) else {
            let limit_mib = self.shared.limit_mib();
            return Err(StabiliseError::NoRoom { pages, limit_mib });
        };
        let room = Room::of(shared.arena.bytes_mut(&mut slots));
        copy_all(&shared, union, room);
        self.copies += 1;
        let pause = begun.elapsed();
        let copies = Copies::in_order(slots.first(), pages as u32);
        Ok(Stable::copied(shared.clone(), union, copies, pause))
    }

    fn choose(
        &mut self,
        pages: usize,
        policy: StabilisePolicy,
    ) -> Result<Mechanism, StabiliseError> {
        let fits = pages <= self.shared.arena.limit() as usize;
        let (wanted, otherwise) = match policy {
            StabilisePolicy::Auto => (Mechanism::Copy, Mechanism::Mixed),
            StabilisePolicy::Copy => (Mechanism::Copy, Mechanism::Protect),
            StabilisePolicy::Protect => (Mechanism::Protect, Mechanism::Protect),
            StabilisePolicy::Mixed => (Mechanism::Mixed, Mechanism::Mixed),
        };
        match (wanted, self.shared.uffd.is_some()) {
            (Mechanism::Copy, _) if fits => Ok(Mechanism::Copy),
            (Mechanism::Copy, true) => Ok(otherwise),
            (Mechanism::Copy, false) => {
                let limit_mib = self.shared.limit_mib();
                Err(StabiliseError::NoRoom { pages, limit_mib })
            }
            (Mechanism::Protect | Mechanism::Mixed, false) => {
                self.fallbacks += 1;
                Ok(Mechanism::Copy)
            }
            (wanted, true) => Ok(wanted),
        }
    }

    fn find_hot(&mut self, union: &PageBitmap) {
        self.hot.clear();
        self.cold.clear();
        for (at, word) in union.set_words() {
            let before = self.before.word(at);
            self.hot.add(at, word & before);
            self.cold.add(at, word & !before);
        }
    }

    /// Protects the set, or all of it but the hot pages, which it copies.
    fn protect(
        &mut self,
        union: &PageBitmap,
        mechanism: Mechanism,
        begun: Instant,
    ) -> io::Result<Stable> {
        let shared = self.shared.clone();
        let Some(uffd) = &shared.uffd else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        if mechanism == Mechanism::Mixed {
            self.find_hot(union);
        }
        let (set, mechanism) = match mechanism {
            Mechanism::Mixed if self.copy_hot(&shared) => (&self.cold, Mechanism::Mixed),
            _ => (union, Mechanism::Protect),
        };
        for page in set.iter() {
            shared.states[page as usize].store(DUE, Ordering::Relaxed);
        }
        let mut ranges = Vec::new();
        let mut outcome = Ok(());
        runs::each_run(set, &self.before, |run| {
            if outcome.is_ok() {
                outcome = uffd.protect(run.start, run.len());
                ranges.push(run);
            }
        });
        if let Err(e) = outcome {
            for page in union.iter() {
                shared.states[page as usize].store(FREE, Ordering::Relaxed);
            }
            for run in ranges {
                uffd.release(run.start, run.len())?;
            }
            return Err(e);
        }
        shared.ram.arm_guard(true);
        match mechanism {
            Mechanism::Mixed => self.mixed += 1,
            _ => self.protects += 1,
        }
        let pause = begun.elapsed();
        let kept = (mechanism, ranges);
        Ok(Stable::protected(shared.clone(), union, kept, pause))
    }

    /// Copies the hot pages; `false` if they do not fit.
    fn copy_hot(&self, shared: &Shared) -> bool {
        let count = self.hot.count() as u32;
        let Some(mut slots) = shared.arena.take(count, 2 * HOST_SLOTS) else {
            return false;
        };
        let first = slots.first();
        let room = Room::of(shared.arena.bytes_mut(&mut slots));
        copy_all(shared, &self.hot, room);
        for (n, page) in self.hot.iter().enumerate() {
            let saved = shared::SAVED + first + n as u32;
            shared.states[page as usize].store(saved, Ordering::Release);
        }
        true
    }

    /// The counters of this moment.
    pub fn snapshot(&self) -> StabiliseSnapshot {
        let counts = &self.shared.counts;
        let of = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        StabiliseSnapshot {
            copies: self.copies,
            early: self.early.captures,
            early_left: self.early.left,
            early_again_pages: self.early.again_pages,
            copied_alone: of(&counts.alone),
            protects: self.protects,
            mixed: self.mixed,
            fallbacks: self.fallbacks,
            faults: of(&counts.faults),
            stall_us: of(&counts.stall_ns) / 1000,
            host_saves: of(&counts.host_saves),
            arena_waits: of(&counts.arena_waits),
            lost: of(&counts.lost),
            arena_pages: self.shared.arena.warm().into(),
        }
    }
}

impl Drop for Stabiliser {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.stop();
        }
    }
}

#[cfg(test)]
mod tests;
