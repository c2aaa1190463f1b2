//! What a core tells the operator: events and counters.

use alloc::string::String;
use core::fmt;

use crate::Step;

/// Something that the log and the status tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A step took longer than it may; the checkpoint is aborted, or the link given up.
    StepTimedOut {
        /// Which.
        step: Step,
        /// The epoch of the checkpoint.
        epoch: u64,
        /// Its limit.
        limit_us: u64,
    },
    /// So many divergences, each costing so much, that the pair goes to Remus mode (rule 21).
    Storm {
        /// Checkpoints that were asked for,
        checkpoints: u32,
        /// and how many percent of the time went into them,
        share_pct: u8,
        /// within so long.
        window_us: u64,
        /// COLO is tried again after so long.
        retry_us: u64,
    },
    /// The pair tries to compare again (rule 21).
    StormOver,
    /// The PVM is slowed down, or not any more.
    Throttled {
        /// Share of time that its vCPUs may run, in percent.
        run_pct: u8,
    },
    /// The SVM's answers are late, and do not come sooner by themselves (rule 16).
    Lags {
        /// So much later than the PVM's.
        lag_us: u64,
    },
    /// They are still late though the PVM was slowed down.
    LagUnhelped {
        /// So much later than the PVM's.
        lag_us: u64,
    },
    /// The secondary cannot have the PVM's state.
    Refused {
        /// In words.
        reason: String,
    },
    /// The link is given up though both hosts live: the page channel is of no use, or no checkpoint comes to an end.
    GivenUp {
        /// In words.
        reason: String,
    },
    /// A synchronisation was given up.
    CannotFollow {
        /// In words: what the guest does and what the link carries.
        reason: String,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StepTimedOut {
                step,
                epoch,
                limit_us,
            } => write!(
                f,
                "step {step} of the checkpoint of epoch {epoch} took more than {limit_us} us"
            ),
            Self::Storm {
                checkpoints,
                share_pct,
                window_us,
                retry_us,
            } => write!(
                f,
                "storm of divergences, {checkpoints} checkpoints took {share_pct} % of {window_us} us: Remus mode; \
                 comparing is tried again in {retry_us} us"
            ),
            Self::StormOver => f.write_str("Remus mode ends, output is compared again"),
            Self::Throttled { run_pct: 100 } => f.write_str("the guest runs all the time again"),
            Self::Throttled { run_pct: 0 } => f.write_str(
                "no space for more held output: the guest stands still until a checkpoint is committed",
            ),
            Self::Throttled { run_pct } => write!(
                f,
                "the secondary does not follow: the guest runs {run_pct} % of the time"
            ),
            Self::Lags { lag_us } => write!(
                f,
                "the secondary's guest answers {lag_us} us late and does not catch up: the guest is slowed down"
            ),
            Self::LagUnhelped { lag_us } => write!(
                f,
                "the secondary's guest answers {lag_us} us late however slow the guest is: it is not slowed down for that \
                 for a while; give the secondary's host more processor time"
            ),
            Self::Refused { reason } => write!(f, "the secondary refused: {reason}"),
            Self::GivenUp { reason } | Self::CannotFollow { reason } => f.write_str(reason),
        }
    }
}

/// What happened since the core began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps that took too long, by [`Step::index`].
    pub timeouts: [u64; Step::COUNT],
    /// Checkpoints aborted before their commit, for whatever reason.
    pub aborts: u64,
    /// Aborts that came too late: the secondary had committed.
    pub late_aborts: u64,
    /// Storms of divergences.
    pub storms: u64,
    /// Stages that came whole when nobody wanted them any more.
    pub discarded: u64,
    /// Secondaries that left because they could not have the first state (rule 22).
    pub refusals: u64,
    /// Requests for a checkpoint that another one covers: it is in flight and captures nothing yet, or it is asked for already
    /// (rule 14).
    pub coalesced: u64,
    /// Links given up though both hosts lived: the page channel was of no use any more, or no checkpoint came to an end.
    pub given_up: u64,
    /// Synchronisations given up because the guest dirties faster than the link carries.
    pub not_followed: u64,
    /// How often the PVM was slowed down one level because the SVM lags (rule 16),
    pub lag_slowed: u64,
    /// and how often that did not help.
    pub lag_unhelped: u64,
}
