//! The sans-IO core that decides what leaves: comparator and translations.
//!
//! Two state machines, one per role. [`PrimaryPath`] takes what the NIC, the PVM and the SVM send
//! and says what is released, mirrored, held, and when a checkpoint is wanted. `SecondaryPath`
//! takes the mirrored input and the SVM's output, and becomes a [`PrimaryPath`] at a takeover.
//! Times are monotonic microseconds given by the caller.
//!
//! Invariants: no clock, no thread, no I/O; frames are linear tokens; bad input never panics.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod action;
mod announce;
mod cause;
mod datagram;
mod digest;
mod flat;
mod flow;
mod fragment;
mod frames;
mod ledger;
mod limits;
mod list;
mod policy;
mod primary;
mod recent;
mod record;
mod retain;
mod secondary;
pub mod seq;
mod span;
mod stats;
mod stream;
mod table;
#[doc(hidden)]
pub mod testing;
mod wheel;
pub mod wire;
mod xlate;

pub use action::{Action, PathError, Right, SecondaryAction};
pub use announce::ANNOUNCEMENT_MAX;
pub use cause::{Cause, Divergence, SHOWN_BYTES, Shown};
pub use digest::{DIGEST_HEADERS_MAX, DigestKey};
pub use flow::{Direction, FlowKey, Protocol};
pub use frames::{Frames, HEADER_MAX, Token, first_difference};
pub use limits::Limits;
pub use policy::{Opener, Policy, PolicyAction, PolicyProtocol, Prefix, Rule};
pub use primary::{History, Mode, Pairs, Passed, Pending, PrimaryPath};
pub use record::{RecordError, canonical_xlate_record};
pub use secondary::SecondaryPath;
pub use stats::{PrimaryStats, SecondaryStats};
pub use xlate::Offsets;
