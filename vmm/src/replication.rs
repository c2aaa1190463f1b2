//! Replication: the link, the arbiter, and the control threads of the two roles.
//!
//! `primary` and `secondary` carry out what the cores of `colo-control` decide; `link` and `control_link` are the
//! channels, `opening` opens those for packets, `arbiter` is the generation file (`asking` its thread, `name` this host's
//! name there), `report` what `colo status` shows (`applied`: of a secondary's checkpoints).

mod again;
mod applied;
pub mod arbiter;
mod asking;
mod control_link;
mod engine;
mod guest_end;
mod host;
pub mod link;
mod name;
mod opening;
mod primary;
mod report;
mod secondary;
mod wait;

pub use host::{End, ReplicaError, StopRequest, run_primary, run_secondary};
pub use report::PairStatus;

use primary::PrimaryShell;
use secondary::{SecondaryEnd, SecondaryShell};
