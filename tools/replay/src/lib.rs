//! Two packet captures through COLO's comparator: what it would have released, held and
//! checkpointed. The library behind `colo compare PRIMARY SECONDARY`.
//!
//! # How it works
//!
//! Each capture holds what one guest sent, and may hold what it received; the guest's MAC address
//! tells them apart. Frames of both go, in the order of their times, through
//! [`colo_compare::PrimaryPath`], the comparator of production:
//!
//! - What the PVM received is its input. It counts as mirrored and acknowledged at once.
//! - The SVM's sequence numbers are translated to the PVM's. The difference is learnt from the SYN
//!   or SYN-ACK of both, which is what production learns through the client's first
//!   acknowledgement, so the client's side need not be in the captures. A connection whose
//!   handshake a capture lacks is taken as it is: its numbers must agree by themselves.
//! - A checkpoint is a cut and a commit at the same instant: at once, or for TCP as soon as neither
//!   guest has said anything in the flow for 200 us, at most 5 ms later. In reality the SVM then
//!   goes on as a copy of the PVM; its capture goes on from its own state. So what it sends later
//!   and the PVM had sent before is covered by the checkpoint, and what it had sent before and the
//!   PVM has not sent yet is compared once more. In a TCP flow that diverged, the next bytes tell
//!   whether one side was only late; otherwise the SVM's stream goes on where the PVM's does (the
//!   PVM's next number minus the SVM's is added to the translation). A flow that both guests opened
//!   from different ports is one flow from then on.
//! - At the end, what is unmatched counts as late (PVM) or superfluous (SVM), and one checkpoint
//!   covers it.
//!
//! # Clocks
//!
//! When the guests' first frames are less than a second apart, both captures are taken to have one
//! clock and their times count as they are. Otherwise, as with captures of two runs, the first
//! frames count as simultaneous ([`Align`] chooses).
//!
//! # What a replay can and cannot tell
//!
//! It can tell whether two guests gave the same answers, where they did not, and which checkpoints
//! the comparator asks for. It cannot tell how long a checkpoint takes, nor what the guests would
//! have done after one, nor that a frame that left by COLO would have come later: the clients in
//! the captures have seen all of it. Captures of two runs differ in timing as well as in contents;
//! give them a longer deadline. Checksums are not verified: captures of a sending host often hold
//! frames whose checksums the NIC fills in.
//!
//! After a divergence a replay guesses how the SVM goes on. It guesses well for answers to requests;
//! a stream that differs in every message, or a message of which only a part is missing, may count a
//! few divergences more or fewer than a pair would, and where all messages have one length, a missing
//! one is taken for a difference in each that follows. The first divergence of each flow is exact.
//!
//! Memory does not grow with the captures: they are mapped, times are sorted within a window of
//! [`capture::SORT_WINDOW`] frames, and everything else has a limit. Flows beyond [`FLOWS_MAX`] at
//! the same time diverge with cause `table_full`, as they would in a pair, and count again when
//! they come back.

pub mod capture;
mod clocks;
mod flows;
mod frames;
mod mac;
mod openers;
mod replay;
mod report;
mod resync;
mod stream;
mod svm;
mod table;
#[doc(hidden)]
pub mod testing;
mod view;

use std::path::{Path, PathBuf};

use colo_compare::{Limits, Policy};

use capture::{CaptureFile, Fault, OpenError};
pub use clocks::Align;
pub use flows::FLOWS_MAX;
pub use mac::{MacError, parse_mac};
pub use report::{FlowRow, Found, LISTED_MAX, Report, Shown, Traffic};
pub use table::table;

/// How long the SVM may lag, where nothing else is said: the default of a pair.
pub const DEADLINE_MS: u64 = 20;
/// The longest deadline: a day.
pub const DEADLINE_MS_MAX: u64 = 86_400_000;

/// How to compare.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How late the SVM's equal output may be; 1 to [`DEADLINE_MS_MAX`].
    pub deadline_ms: u64,
    /// Rules for single flows.
    pub policy: Policy,
    /// Whose output is compared; `None`: who sent the first frame of the primary's capture (of the
    /// secondary's, if that is empty).
    pub guest_mac: Option<[u8; 6]>,
    /// How the captures' clocks relate.
    pub align: Align,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            deadline_ms: DEADLINE_MS,
            policy: Policy::default(),
            guest_mac: None,
            align: Align::default(),
        }
    }
}

impl Settings {
    /// Those of a pair, with more room: there is no back-pressure on a capture.
    fn limits(&self) -> Limits {
        let default = Limits::default();
        let compare_deadline_us = self.deadline_ms.clamp(1, DEADLINE_MS_MAX) * 1000;
        Limits {
            max_flows: FLOWS_MAX,
            max_held_frames: 16_384,
            max_svm_frames: 32_768,
            compare_deadline_us,
            extra_deadline_us: default.extra_deadline_us.max(compare_deadline_us),
            ..default
        }
    }
}

/// Which capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The PVM's.
    Primary,
    /// The SVM's.
    Secondary,
}

/// Two captures cannot be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputError {
    /// One of them cannot be read.
    Fault(Side, Fault),
    /// Neither holds a frame of the guest, but both or one hold others.
    NoGuest([u8; 6]),
}

/// A comparison cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A file cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A file is not a whole, readable capture.
    #[error("{}: {fault}", path.display())]
    Capture {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what to do.
        fault: Fault,
    },
    /// Neither capture holds a frame of the guest.
    #[error(
        "{} and {}: no frame of {mac}; give the guest's address with --guest-mac",
        primary.display(), secondary.display()
    )]
    NoGuest {
        /// The address that was looked for.
        mac: String,
        /// The primary's capture.
        primary: PathBuf,
        /// The secondary's capture.
        secondary: PathBuf,
    },
}

/// Replays two captures that are in memory.
pub fn replay(primary: &[u8], secondary: &[u8], settings: &Settings) -> Result<Report, InputError> {
    clocks::replay(primary, secondary, settings, |_, _| {})
}

/// Replays two files.
pub fn compare(
    primary: &Path,
    secondary: &Path,
    settings: &Settings,
) -> Result<Report, CompareError> {
    let files = [CaptureFile::open(primary)?, CaptureFile::open(secondary)?];
    let file = |side: Side| &files[usize::from(side == Side::Secondary)];
    let read_to = |side: Side, offset| file(side).read_to(offset);
    let [first, second] = [files[0].bytes(), files[1].bytes()];
    clocks::replay(first, second, settings, read_to).map_err(|error| match error {
        InputError::Fault(side, fault) => CompareError::Capture {
            path: file(side).path().to_owned(),
            fault,
        },
        InputError::NoGuest(mac) => CompareError::NoGuest {
            mac: mac::text(mac),
            primary: primary.to_owned(),
            secondary: secondary.to_owned(),
        },
    })
}
