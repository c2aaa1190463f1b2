//! Which pages guest and host have written: KVM's dirty bitmap or its dirty ring, behind one type.
//!
//! - *Bitmap* (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`): reading the log changes nothing; pages are protected again by
//!   `KVM_CLEAR_DIRTY_LOG`, range by range, so that the lock that guest faults need is never held for long. With
//!   `KVM_DIRTY_LOG_INITIALLY_SET` the start protects nothing at one go either. Kernels without manual protection do
//!   both with one call.
//! - *Ring* (`KVM_CAP_DIRTY_LOG_RING_ACQ_REL`): one ring of page numbers for each vCPU. Collecting costs what was written,
//!   whatever the size of RAM; a full ring stops its vCPU, whose thread then collects.
//!
//! Invariants: a page that [`DirtyTracker::take`] gives is protected again when it returns, so a copy made afterwards has
//! all that was written before, and what is written later comes with the next call; a full ring loses nothing; off, KVM
//! logs nothing and host writes cost one load (invariant 8).
//!
//! Huge pages: both start with write-protected large mappings, which KVM replaces by small ones where the guest writes.
//! With `kvm.eager_page_split` (on by default, two-dimensional paging only) the range that is cleared is split at that
//! moment instead; pages of the host stay huge in any case.
//!
//! Does not see what the kernel writes through pinned pages (rule 15).

mod bitmap;
mod choice;
mod ring;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use colo_fastpath::ring::GuestRam;
use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::Serialize;

use super::pages::{PAGE_BYTES, PageBitmap};
use crate::machine::KvmError;
use bitmap::Bitmap;
use choice::{Answers, Plan};
use ring::Rings;

pub use choice::DirtyChoice;

/// Entries of a vCPU's ring unless the configuration says otherwise: KVM's maximum.
pub const RING_ENTRIES: u32 = 65_536;
/// Bytes of one ring entry, a `kvm_dirty_gfn`.
const ENTRY_BYTES: u32 = 16;

/// Which mechanism it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DirtyMechanism {
    /// Reading clears: kernels before 5.0.
    PlainBitmap,
    /// Cleared in ranges.
    Bitmap,
    /// A ring for each vCPU.
    Ring,
}

/// What is wanted of a tracker.
#[derive(Clone, Copy, Debug)]
pub struct DirtySettings {
    /// Which mechanism.
    pub choice: DirtyChoice,
    /// Entries of each ring: a power of two, at most [`RING_ENTRIES`].
    pub ring_entries: u32,
}

impl Default for DirtySettings {
    fn default() -> Self {
        Self {
            choice: DirtyChoice::Auto,
            ring_entries: RING_ENTRIES,
        }
    }
}

/// The tracker's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DirtySnapshot {
    /// What is in use.
    pub mechanism: DirtyMechanism,
    /// Times that a vCPU stopped because its ring was full.
    pub ring_full: u64,
    /// Times that the log was read.
    pub taken: u64,
    /// Pages that guests had written, each counted once per reading.
    pub guest_pages: u64,
}

#[derive(Debug)]
enum Log {
    /// One for each slot.
    Bitmaps(Vec<Bitmap>),
    Ring(Rings),
}

#[derive(Debug)]
struct State {
    on: bool,
    log: Log,
}

/// The dirty log of one machine.
#[derive(Debug)]
pub struct DirtyTracker {
    // Taken by whoever wants the log and by a vCPU whose ring is full: both collect from the same rings. Never on the
    // packet path.
    state: Mutex<State>,
    mechanism: DirtyMechanism,
    ring_full: AtomicU64,
    taken: AtomicU64,
    guest_pages: AtomicU64,
    fd: Arc<VmFd>,
    ram: Arc<GuestRam>,
}

impl DirtyTracker {
    /// For a machine without vCPUs whose RAM is a slot for each of its ranges, counted from 0; off at first.
    ///
    /// `Auto` is the ring from 4 GiB of RAM on. In the pause there is little in the log, most pages having been copied before:
    /// a ring is read in 2 us then, while KVM copies a bitmap as a whole, in 8 us at 1 GiB, 11 at 4 and 19 at 12. Below
    /// that a bitmap reads large sets faster (10 000 pages: 0.3 ms, the ring 0.4), takes no memory for each vCPU and never
    /// stops one. What the guest's faults take is the same (`colo bench tracking`).
    pub fn new(
        fd: Arc<VmFd>,
        ram: Arc<GuestRam>,
        settings: DirtySettings,
    ) -> Result<Self, KvmError> {
        let slots = slots_of(&ram);
        let answers = Answers::of(|capability| fd.check_extension_raw(u64::from(capability)));
        let plan = choice::plan(settings.choice, ram.bytes(), &answers);
        let manual = match enabled(&fd, plan, settings.ring_entries) {
            // Nobody has asked for it by name.
            Err(e) if settings.choice == DirtyChoice::Auto && matches!(plan, Plan::Ring { .. }) => {
                tracing::warn!("{e}: the bitmap it is, and the longer pause that goes with it");
                enabled(&fd, choice::bitmap(&answers), 0)?
            }
            enabled => enabled?,
        };
        let (mechanism, log) = match manual {
            None => {
                let rings = Rings::new(settings.ring_entries, slots, ram.page_count());
                (DirtyMechanism::Ring, Log::Ring(rings))
            }
            Some(manual) => {
                let bitmaps = slots.into_iter().map(|slot| Bitmap::new(slot, manual));
                let mechanism = match manual {
                    0 => DirtyMechanism::PlainBitmap,
                    _ => DirtyMechanism::Bitmap,
                };
                (mechanism, Log::Bitmaps(bitmaps.collect()))
            }
        };
        Ok(Self {
            state: Mutex::new(State { on: false, log }),
            mechanism,
            ring_full: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            guest_pages: AtomicU64::new(0),
            fd,
            ram,
        })
    }

    /// Maps the ring of a new vCPU.
    pub(crate) fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        match &mut self.lock().log {
            Log::Bitmaps(_) => Ok(()),
            Log::Ring(rings) => rings.map(vcpu),
        }
    }

    /// Starts from an empty log, or stops. `set_slot_logging` tells KVM to log or not.
    pub(crate) fn switch(
        &self,
        on: bool,
        set_slot_logging: impl FnOnce(bool) -> Result<(), KvmError>,
    ) -> Result<(), KvmError> {
        let mut state = self.lock();
        state.on = false;
        set_slot_logging(on)?;
        match &mut state.log {
            Log::Bitmaps(bitmaps) if on => {
                bitmaps.iter_mut().try_for_each(|log| log.start(&self.fd))?;
            }
            Log::Bitmaps(_) => {}
            // Entries from before: off or on, nobody wants them.
            Log::Ring(rings) => rings.forget(&self.fd)?,
        }
        self.ram.set_tracking(on);
        state.on = on;
        Ok(())
    }

    /// Adds to `set` what guest and host wrote since the last call, and starts anew. Only while it is on.
    pub fn take(&self, set: &mut PageBitmap) -> Result<(), KvmError> {
        let mut state = self.lock();
        if !state.on {
            let off = kvm_ioctls::Error::new(libc::ENOENT);
            return Err(KvmError::refused(
                "read the dirty log (logging must be switched on first)",
            )(off));
        }
        let pages = match &mut state.log {
            Log::Bitmaps(logs) => {
                let mut pages = 0;
                for log in logs {
                    pages += log.take(&self.fd, set)?;
                }
                pages
            }
            Log::Ring(rings) => rings.take(&self.fd, set)?,
        };
        self.ram.take_host_dirty(|at, pages| _ = set.add(at, pages));
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.guest_pages.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }

    /// Called by the thread of a vCPU that KVM has stopped because its ring is full: empties all rings into the set that
    /// the next [`DirtyTracker::take`] gives. Afterwards the vCPU can run.
    pub(crate) fn ring_full(&self) -> Result<(), KvmError> {
        self.ring_full.fetch_add(1, Ordering::Relaxed);
        match &mut self.lock().log {
            Log::Bitmaps(_) => Ok(()),
            Log::Ring(rings) => rings.collect(&self.fd),
        }
    }

    /// Whether writes are logged.
    pub fn is_on(&self) -> bool {
        self.lock().on
    }

    /// The same for a vCPU's thread: without the lock, so that it may be a moment behind.
    pub(crate) fn seems_on(&self) -> bool {
        self.ram.is_tracking()
    }

    /// The counters of this moment.
    pub fn snapshot(&self) -> DirtySnapshot {
        DirtySnapshot {
            mechanism: self.mechanism,
            ring_full: self.ring_full.load(Ordering::Relaxed),
            taken: self.taken.load(Ordering::Relaxed),
            guest_pages: self.guest_pages.load(Ordering::Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves rings and bitmaps usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A range of guest RAM in KVM.
#[derive(Clone, Copy, Debug)]
struct Slot {
    number: u32,
    /// Its first page of all of the guest's; a multiple of 64.
    first_page: usize,
    pages: usize,
}

fn slots_of(ram: &GuestRam) -> Vec<Slot> {
    let mut first_page = 0;
    let slot = |(number, range): (u32, Range<u64>)| {
        let pages = ((range.end - range.start) / PAGE_BYTES as u64) as usize;
        let slot = Slot {
            number,
            first_page,
            pages,
        };
        first_page += pages;
        slot
    };
    (0..).zip(ram.ranges()).map(slot).collect()
}

/// Enables what is planned. Gives the bitmap's flags of manual protection, if it is the bitmap.
fn enabled(fd: &VmFd, plan: Plan, ring_entries: u32) -> Result<Option<u32>, KvmError> {
    match plan {
        Plan::Ring { capability } => {
            let bytes = u64::from(ring_entries) * u64::from(ENTRY_BYTES);
            enable(fd, capability, bytes).map_err(KvmError::refused(
                "make dirty rings (checkpoint.dirty_ring_entries: a power of two from 1024 to 65536)",
            ))?;
            Ok(None)
        }
        Plan::Bitmap { manual: 0 } => Ok(Some(0)),
        Plan::Bitmap { manual } => {
            enable(fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, u64::from(manual))
                .map_err(KvmError::refused("clear its dirty log in ranges"))?;
            Ok(Some(manual))
        }
    }
}

fn enable(fd: &VmFd, capability: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    let mut request = kvm_enable_cap {
        cap: capability,
        ..kvm_enable_cap::default()
    };
    request.args[0] = argument;
    fd.enable_cap(&request)
}

#[cfg(test)]
mod huge_tests;
#[cfg(test)]
mod tests;
