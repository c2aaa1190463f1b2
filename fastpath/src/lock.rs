//! The one lock of this crate: each thread counts how often it takes one.
//!
//! Invariants: no other kind can be named here (`clippy.toml` of this crate and of `colo-compare`; what the crate `vhost` asks
//! for is the exception), so a thread that has counted none in between has taken none. A holder that panics leaves nothing
//! half done that would matter.
//!
//! Packets take no lock: `tests/loop_costs.rs` and `tests/role_costs.rs` count while they flow. What is left is for what
//! changes seldom: filters, interfaces, the end of a thread, and pages that are protected while a checkpoint is sent.

#![allow(clippy::disallowed_types, reason = "here they are counted")]

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};

thread_local! {
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

/// Locks that this thread has taken so far.
pub fn taken() -> u64 {
    TAKEN.get()
}

/// A value for one thread at a time.
#[derive(Debug, Default)]
pub struct Lock<T>(Mutex<T>);

impl<T> Lock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Waits for it.
    pub(crate) fn lock(&self) -> Locked<'_, T> {
        TAKEN.set(TAKEN.get() + 1);
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lock that is held.
pub(crate) type Locked<'a, T> = MutexGuard<'a, T>;

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn each_thread_counts_its_own() {
        let lock = Lock::new(5);
        let before = taken();
        *lock.lock() += 1;
        let other = thread::scope(|scope| {
            let count = || {
                let before = taken();
                *lock.lock() += 1;
                *lock.lock() += 1;
                taken() - before
            };
            scope.spawn(count).join().unwrap()
        });
        assert_eq!((taken() - before, other, *lock.lock()), (1, 2, 8));
    }
}
