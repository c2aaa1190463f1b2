//! The sans-IO state machines of the two roles: pairing, checkpoint, heartbeat, failover.
//!
//! Time (`now_us`, monotonic), messages and results of the shell's work go in (`handle_*`), [`Action`]s come out
//! (`poll_action`). The cores hold no clock, socket, thread or random source.
//!
//! Who speaks is decided by the arbiter alone (rule 18): a core asks for a compare-and-swap and changes its role
//! only on the answer [`Reply::Won`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod arbiter;
mod busy;
mod farewell;
mod lag;
mod msg;
mod notice;
mod pace;
mod primary;
mod secondary;
mod storm;
mod timing;

pub use arbiter::{Cas, Expect, Record, Reply, Standing};
pub use msg::{
    Geometry, HOLDER, Msg, MsgError, NOTHING, VERSION_ABORT_ANSWERED, VERSION_BULK, VERSION_MAX,
    VERSION_MIN, VERSION_SPARSE,
};
pub use notice::{Counters, Notice};
pub use primary::{Primary, PrimaryEvent, PrimaryState};
pub use secondary::{Secondary, SecondaryEvent, SecondaryState};
pub use storm::{Mode, Pace, Protection, Storm};
pub use timing::{Step, StepLimits, Timing};

use alloc::string::String;
use alloc::vec::Vec;

/// What a core asks its shell to do. The shell reports results as events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this message on the control channel.
    Send(Msg),
    /// Ask the arbiter; answer with an `Arbiter` event.
    Arbiter(Cas),
    /// Primary: switch dirty tracking on and send all pages, a first round; answer `SyncRound`.
    StartSync,
    /// Primary: send another round, of what became dirty since; answer `SyncRound`.
    SyncRound,
    /// Primary: stop the vCPUs, quiesce the worker, capture and let go on (rules 11, 12). `first`: the
    /// packet path starts to pair with this cut. Answer `Captured`, later `Sent`, or `CheckpointFailed`.
    Capture {
        /// The epoch that this capture ends.
        epoch: u64,
        /// The capture completes the synchronisation of a joining secondary.
        first: bool,
        /// Pages the SVM dirtied since the last commit: a little-endian bitmap, one bit a page.
        svm_dirty: Vec<u8>,
        /// The epoch that follows is buffered, not compared (Remus): its input is not mirrored, all its output
        /// waits for its commit.
        buffer: bool,
    },
    /// Primary: the checkpoint of this epoch is committed; release what it covers.
    Commit {
        /// The epoch.
        epoch: u64,
    },
    /// The checkpoint of this epoch failed. Primary: keep its dirty set for the next one (rule 14).
    /// Secondary: forget the stage and let the SVM go on from where it stands.
    Abort {
        /// The epoch.
        epoch: u64,
    },
    /// Secondary: a stage that was reported whole is not wanted (any more); forget it, the SVM stays as it is.
    Discard {
        /// The epoch.
        epoch: u64,
    },
    /// Primary: the PVM's vCPUs may run this share of the time; 0: they stand still until further notice.
    Throttle {
        /// Percent.
        run_pct: u8,
    },
    /// For the log and the list of events in the status; nothing is to be done.
    Tell(Notice),
    /// Primary: the generation was won; release everything, switch tracking off, speak alone.
    GoAlone,
    /// Primary: the secondary is gone and this host does not speak: switch tracking off, all else stays held.
    Detach,
    /// Nothing may leave (true) until further notice (false).
    Mute(bool),
    /// Primary: what needs no word of the secondary may leave until this instant (rule 18).
    Lease {
        /// Monotonic microseconds.
        until_us: u64,
    },
    /// Close all link channels.
    CloseLink {
        /// For the log and the peer.
        reason: String,
    },
    /// Secondary: stop the SVM, flush its output to the link; answer `SvmStopped`.
    StopSvm {
        /// The epoch that ends.
        epoch: u64,
    },
    /// Secondary: the stage is committed; apply it and let the SVM run from it. Answer `Applied`.
    Apply {
        /// The epoch.
        epoch: u64,
        /// The SVM does not run from it but stands still (Remus); `Abort` or `TakeOver` lets it go on.
        halt: bool,
    },
    /// Secondary: the generation was won; the SVM is the VM now (a stopped one continues untouched).
    TakeOver {
        /// The generation won.
        generation: u64,
    },
    /// Stop the virtual machine and end with this outcome.
    Stop(Outcome),
}

/// Why a role ended for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off or the operator stopped the VM; both sides know.
    Off,
    /// Another host holds the VM.
    Deposed {
        /// The arbiter's record that says so.
        record: Record,
    },
    /// The peer refused to pair, or we it.
    Refused {
        /// In words.
        reason: String,
    },
    /// The link went before the secondary held a complete state; it may join again.
    NotSynced,
    /// Something that cannot go on: a committed checkpoint that could not be applied (rule 13: never take
    /// over), a guest that faulted.
    Failed {
        /// In words.
        reason: String,
    },
}
