//! The bodies of the fuzz targets: each takes any bytes and panics when a promise is broken.
//!
//! Invariants: the same bytes give the same run; a body ends in time that is linear in its input.
//! `tests/fuzz` feeds them to libFuzzer, `tests/fuzz/replay.rs` replays the committed corpus
//! through them with a stable compiler.
//!
//! Does not look for speed, nor for memory beyond what Rust itself checks.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

mod blank;
mod bytes;
mod capture;
mod checker;
mod checksums;
mod comparator;
mod guest;
mod pairs;
mod parser;
mod secondary;
mod translations;

pub use capture::{capture, replay};
pub use comparator::comparator;
pub use pairs::{pairs, taken_by_twos};
pub use parser::parser;
pub use secondary::secondary;
pub use translations::translations;

static SHOWN: AtomicBool = AtomicBool::new(false);

/// From now on the bodies print what they do, to understand one input.
pub fn show() {
    SHOWN.store(true, Ordering::Relaxed);
}

fn trace(what: fmt::Arguments<'_>) {
    if SHOWN.load(Ordering::Relaxed) {
        println!("{what}");
    }
}
