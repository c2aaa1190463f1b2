//! Guest rings and NIC, polled: frames, worker, statistics.
//!
//! The packet path: `ring` (device side of the guest's queues) and `nic` at the edges, `frame` in
//! between, `worker` as the loop that moves them, a role as the policy of the loop.

#![cfg_attr(
    test,
    allow(clippy::disallowed_types, reason = "tests wait for each other")
)]

pub mod clock;
pub mod frame;
pub mod hint;
pub mod link;
pub mod lock;
pub mod log_budget;
pub mod mailbox;
pub mod net_offer;
pub mod nic;
pub mod pair;
pub mod policy;
pub mod processor;
pub mod ring;
pub mod shard;
pub mod stages;
pub mod stats;
pub mod vhost_user;
pub mod worker;

pub use colo_bpf::Mac;
