//! Who is asked before the host writes to guest RAM (rule 15).
//!
//! Invariant: the guard is armed only while all host writers stand still, so that none of them is between its
//! question and its write.
//!
//! Does not know why a page must not change yet.

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::lock::Lock;

/// Keeps what pages hold before the host overwrites them.
pub trait WriteGuard: Debug + Send + Sync {
    /// The host is about to write to these pages; when this returns, it does. It must not wait for the caller's
    /// thread, nor write to guest RAM.
    fn before_write(&self, pages: RangeInclusive<usize>);
}

/// The guard of one RAM. Unarmed, it costs a writer one relaxed load.
#[derive(Debug, Default)]
pub(super) struct GuardSlot {
    armed: AtomicBool,
    guard: Lock<Option<Weak<dyn WriteGuard>>>,
}

impl GuardSlot {
    pub(super) fn set(&self, guard: Weak<dyn WriteGuard>) {
        *self.guard.lock() = Some(guard);
    }

    pub(super) fn arm(&self, on: bool) {
        self.armed.store(on, Ordering::SeqCst);
    }

    #[inline]
    pub(super) fn is_armed(&self) -> bool {
        self.armed.load(Ordering::Relaxed)
    }

    /// It is set only unarmed, and held by writers no longer than to copy a pointer.
    #[cold]
    pub(super) fn ask(&self, pages: RangeInclusive<usize>) {
        let guard = self.guard.lock().as_ref().and_then(Weak::upgrade);
        if let Some(guard) = guard {
            guard.before_write(pages);
        }
    }
}
