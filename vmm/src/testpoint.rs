//! Named points at which a test can stop the whole process, to kill it exactly there.
//!
//! `COLO_TEST_STOP_AT=NAME` (or `NAME:N` for the Nth time) raises SIGSTOP at that point. Without the variable a point
//! costs one load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The points and the lists of them, made of one text: a point that the tests do not go through cannot be written.
macro_rules! points {
    ($($(#[$about:meta])* $list:ident { $($(#[$where:meta])* $point:ident = $name:literal,)* })*) => {
        /// Where a checkpoint can be interrupted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Point {
            $($($(#[$where])* $point,)*)*
        }

        impl Point {
            $($(#[$about])* pub const $list: &[Self] = &[$(Self::$point),*];)*

            /// The name in the variable.
            pub const fn name(self) -> &'static str {
                match self {
                    $($(Self::$point => $name,)*)*
                }
            }
        }
    };
}

points! {
    /// All points of a primary, in the order of a checkpoint.
    PRIMARY {
        /// Primary: the SVM has stopped, nothing is captured yet.
        SvmStopped = "svm-stopped",
        /// Primary: captured, the PVM stands still yet.
        Paused = "paused",
        /// Primary: captured, the guest runs on, nothing is sent.
        Captured = "captured",
        /// Primary: half of the stage is on the link.
        MidTransfer = "mid-transfer",
        /// Primary: the whole stage is on the link.
        StageSent = "stage-sent",
        /// Primary: the commit is known, nothing is released.
        CommitReceived = "commit-received",
        /// Primary: the commit is handed to the worker for release.
        CommitReleased = "commit-released",
    }
    /// All points of a secondary, in the order of a checkpoint.
    SECONDARY {
        /// Secondary: the SVM stands still, nobody is told.
        Stopped = "stopped",
        /// Secondary: a part of the stage has come.
        MidStage = "mid-stage",
        /// Secondary: the stage is whole, nobody is told.
        Staged = "staged",
        /// Secondary: the commit is sent, nothing is applied.
        CommitSent = "commit-sent",
        /// Secondary: the pages are those of the commit, the rest of the state is not.
        PagesWritten = "pages-written",
        /// Secondary: applied, the SVM has not resumed.
        Applied = "applied",
    }
}

struct Stop {
    name: String,
    countdown: AtomicU32,
}

fn stop() -> Option<&'static Stop> {
    static STOP: OnceLock<Option<Stop>> = OnceLock::new();
    STOP.get_or_init(|| {
        let spec = std::env::var("COLO_TEST_STOP_AT").ok()?;
        let (name, count) = match spec.split_once(':') {
            Some((name, n)) => (name.to_owned(), n.parse().unwrap_or(1)),
            None => (spec, 1),
        };
        Some(Stop {
            name,
            countdown: AtomicU32::new(count),
        })
    })
    .as_ref()
}

/// A test wants to stop the process there.
pub fn is_awaited(point: Point) -> bool {
    stop().is_some_and(|stop| stop.name == point.name())
}

/// The process is at `point`.
pub fn reached(point: Point) {
    let Some(stop) = stop() else { return };
    if stop.name == point.name() && stop.countdown.fetch_sub(1, Ordering::Relaxed) == 1 {
        tracing::warn!("stopped at the test point {}", point.name());
        // SAFETY: raises a signal for this process only; it has no memory effects.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
}
