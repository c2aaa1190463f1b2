//! Ctrl-C and SIGTERM as a question the demo asks, so that its values are dropped as always.
//!
//! Invariant: the handler only stores a flag.

use std::sync::atomic::{AtomicBool, Ordering};

static CAUGHT: AtomicBool = AtomicBool::new(false);

extern "C" fn remember(_signal: libc::c_int) {
    CAUGHT.store(true, Ordering::Relaxed);
}

/// Installs the handler for both signals.
pub(super) fn catch() {
    let handler = remember as extern "C" fn(libc::c_int) as libc::sighandler_t;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { libc::signal(signal, handler) };
    }
}

/// `Err` once a signal came.
pub(super) fn check() -> Result<(), ()> {
    if CAUGHT.load(Ordering::Relaxed) {
        Err(())
    } else {
        Ok(())
    }
}
