//! Named points at which a test can stop the whole process, to kill it exactly there.
//!
//! `COLO_TEST_STOP_AT=NAME` (or `NAME:N` for the Nth time) raises SIGSTOP at that point. Without the variable a point
//! costs one load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where a checkpoint can be interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Primary: the SVM has stopped, nothing is captured yet.
    SvmStopped,
    /// Primary: captured, the PVM stands still yet.
    Paused,
    /// Primary: captured, the guest runs on, nothing is sent.
    Captured,
    /// Primary: half of the stage is on the link.
    MidTransfer,
    /// Primary: the whole stage is on the link.
    StageSent,
    /// Primary: the commit is known, nothing is released.
    CommitReceived,
    /// Primary: the commit is handed to the worker for release.
    CommitReleased,
    /// Secondary: the SVM stands still, nobody is told.
    Stopped,
    /// Secondary: a part of the stage has come.
    MidStage,
    /// Secondary: the stage is whole, nobody is told.
    Staged,
    /// Secondary: the commit is sent, nothing is applied.
    CommitSent,
    /// Secondary: the pages are those of the commit, the rest of the state is not.
    PagesWritten,
    /// Secondary: applied, the SVM has not resumed.
    Applied,
}

impl Point {
    /// All points of a primary, in the order of a checkpoint.
    pub const PRIMARY: [Self; 7] = [
        Self::SvmStopped,
        Self::Paused,
        Self::Captured,
        Self::MidTransfer,
        Self::StageSent,
        Self::CommitReceived,
        Self::CommitReleased,
    ];
    /// All points of a secondary, in the order of a checkpoint.
    pub const SECONDARY: [Self; 6] = [
        Self::Stopped,
        Self::MidStage,
        Self::Staged,
        Self::CommitSent,
        Self::PagesWritten,
        Self::Applied,
    ];

    /// The name in the variable.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SvmStopped => "svm-stopped",
            Self::Paused => "paused",
            Self::Captured => "captured",
            Self::MidTransfer => "mid-transfer",
            Self::StageSent => "stage-sent",
            Self::CommitReceived => "commit-received",
            Self::CommitReleased => "commit-released",
            Self::Stopped => "stopped",
            Self::MidStage => "mid-stage",
            Self::Staged => "staged",
            Self::CommitSent => "commit-sent",
            Self::PagesWritten => "pages-written",
            Self::Applied => "applied",
        }
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
