//! What the threads of a capture share: the state of each page, the arena, the descriptor, the counts.
//!
//! A page of the captured set goes from *due* to *saved* (its contents are in the arena) or straight to *free* (they
//! have been read). Whoever wants to write a due page saves it first; any number may copy it at once, since nobody writes
//! before one compare-and-swap has said whose copy counts. So nobody waits for anybody.
//!
//! Invariants: a page changes only when it is not due; a due page is protected against the guest, and against the host by
//! the guard; what a slot holds is complete before the state names it (release), and is read after (acquire).

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use colo_fastpath::ring::{GuestRam, WriteGuard};

use super::arena::{Arena, Slots};
use super::uffd::Uffd;
use crate::checkpoint::pages::PAGE_BYTES;

/// Nothing to keep.
pub(super) const FREE: u32 = 0;
/// Its contents are those of the capture and nowhere else.
pub(super) const DUE: u32 = 1;
/// It was overwritten without a copy: the arena was full.
pub(super) const LOST: u32 = 2;
/// Saved in slot `state - SAVED`.
pub(super) const SAVED: u32 = 3;

/// Slots that faults of the guest leave for the host's writers, which cannot wait.
pub(super) const HOST_SLOTS: u32 = 1024;

/// Counts of one capture, or of all.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) faults: AtomicU64,
    pub(super) stall_ns: AtomicU64,
    pub(super) host_saves: AtomicU64,
    pub(super) arena_waits: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) alone: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) ram: Arc<GuestRam>,
    pub(super) uffd: Option<Uffd>,
    pub(super) arena: Arc<Arena>,
    pub(super) states: Box<[AtomicU32]>,
    pub(super) counts: Counts,
    /// Beyond what the thread that answers a fault sees of it: waking up, twice.
    wake_ns: u64,
    /// A capture is alive.
    pub(super) busy: AtomicBool,
    /// Writers of the host that are saving pages.
    savers: AtomicU32,
    /// Held while faults are answered, and while pages are released in bulk.
    serving: Mutex<()>,
    /// Pages that vCPUs wait for because the arena was full, and since when. As many as there are vCPUs at most.
    waits: Mutex<Vec<(usize, Instant)>>,
}

/// A writer of the host that is saving pages.
struct Saving<'a>(&'a AtomicU32);

impl Drop for Saving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// What became of a page that is to be written.
enum Kept {
    /// It may be written.
    Yes,
    /// It may not: there is no slot.
    NoSlot,
}

impl Shared {
    pub(super) fn new(ram: Arc<GuestRam>, uffd: Option<Uffd>, arena: Arena, wake_ns: u64) -> Self {
        let pages = match uffd {
            Some(_) => ram.page_count(),
            None => 0,
        };
        Self {
            ram,
            uffd,
            arena: Arc::new(arena),
            states: (0..pages).map(|_| AtomicU32::new(FREE)).collect(),
            counts: Counts::default(),
            wake_ns,
            busy: AtomicBool::new(false),
            savers: AtomicU32::new(0),
            serving: Mutex::new(()),
            waits: Mutex::new(Vec::new()),
        }
    }

    /// Keeps faults from being answered.
    pub(super) fn hold_faults(&self) -> MutexGuard<'_, ()> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no writer of the host is saving a page, be it for a capture that is over: slots may be given out anew though
    /// these writers run.
    pub(super) fn nobody_saves(&self) -> bool {
        // With the same in `saving`: either we see a writer here, or it sees that no page is due any more.
        fence(Ordering::SeqCst);
        // Acquire: what it has written to its slot is there.
        self.savers.load(Ordering::Acquire) == 0
    }

    fn saving(&self) -> Saving<'_> {
        self.savers.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Saving(&self.savers)
    }

    /// Copies pages of the guest in a row.
    pub(super) fn copy(&self, page: usize, out: &mut [u8]) {
        // All of them are inside: they come from a set of its pages.
        let _ = self.ram.copy_pages_out(page, out);
    }

    /// Saves a page before it is written.
    fn save(&self, page: usize, keep: u32) -> Kept {
        let Some(state) = self.states.get(page) else {
            return Kept::Yes;
        };
        if state.load(Ordering::Acquire) != DUE {
            return Kept::Yes;
        }
        let Some(mut slot) = self.arena.take(1, keep) else {
            return Kept::NoSlot;
        };
        self.copy(page, self.arena.bytes_mut(&mut slot));
        self.publish(page, &slot);
        Kept::Yes
    }

    /// Lets a slot be the page's, unless another copy has been faster.
    pub(super) fn publish(&self, page: usize, slot: &Slots) {
        let saved = SAVED + slot.first();
        let _ = self.states[page].compare_exchange(DUE, saved, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Answers all threads that wait at protected pages; gives whether there were any.
    pub(super) fn serve(&self) -> bool {
        let _serving = self.hold_faults();
        self.serve_all()
    }

    /// As [`Shared::serve`], unless another thread does it already.
    pub(super) fn try_serve(&self) {
        if let Ok(_serving) = self.serving.try_lock() {
            self.serve_all();
        }
    }

    fn serve_all(&self) -> bool {
        let Some(uffd) = &self.uffd else { return false };
        let mut any = false;
        while let Some(page) = uffd.next_fault() {
            any = true;
            let begun = Instant::now();
            match self.save(page, HOST_SLOTS) {
                Kept::Yes => {
                    self.let_go(uffd, page);
                    self.count_stall(begun.elapsed());
                }
                // The reader wakes it when it has passed the page.
                Kept::NoSlot => {
                    self.counts.arena_waits.fetch_add(1, Ordering::Relaxed);
                    let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
                    waits.push((page, begun));
                }
            }
        }
        any
    }

    /// Releases pages that were read, and with them whoever waits for one.
    pub(super) fn release(&self, first: usize, count: usize) {
        let Some(uffd) = &self.uffd else { return };
        if let Err(e) = uffd.release(first, count) {
            tracing::error!("pages from {first} on cannot be released ({e}): all are");
            uffd.unregister();
        }
        if self.counts.arena_waits.load(Ordering::Relaxed) > 0 {
            self.count_waits(first..first + count);
        }
    }

    /// Nobody waits any more.
    pub(super) fn forget_waits(&self) {
        self.waits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Size of the arena at most.
    pub(super) fn limit_mib(&self) -> usize {
        (self.arena.limit() as usize * PAGE_BYTES) >> 20
    }

    /// Counts what vCPUs have waited for the reader.
    fn count_waits(&self, released: Range<usize>) {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.retain(|(page, since)| {
            let over = released.contains(page);
            if over {
                self.count_stall(since.elapsed());
            }
            !over
        });
    }

    fn count_stall(&self, seen: Duration) {
        let stall_ns = seen.as_nanos() as u64 + self.wake_ns;
        self.counts.faults.fetch_add(1, Ordering::Relaxed);
        self.counts.stall_ns.fetch_add(stall_ns, Ordering::Relaxed);
    }

    fn let_go(&self, uffd: &Uffd, page: usize) {
        if let Err(e) = uffd.release(page, 1) {
            tracing::error!("page {page} cannot be released alone ({e}): all are");
            uffd.unregister();
        }
    }
}

impl WriteGuard for Shared {
    fn before_write(&self, pages: RangeInclusive<usize>) {
        let _saving = self.saving();
        for page in pages {
            match self.states.get(page) {
                Some(state) if state.load(Ordering::Acquire) == DUE => {}
                _ => continue,
            }
            if let Kept::NoSlot = self.save(page, 0) {
                // Better no checkpoint than a wrong one, or a worker that waits.
                let lost = self.states[page].compare_exchange(
                    DUE,
                    LOST,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                if lost.is_ok() {
                    self.counts.lost.fetch_add(1, Ordering::Relaxed);
                }
            } else {
                self.counts.host_saves.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
