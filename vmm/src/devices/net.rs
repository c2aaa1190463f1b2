//! The network device (virtio 1.3 section 5.1).
//!
//! Registers and queues are those of its transport, see `virtio_mmio`; the rest is in `state`.

mod control;
mod device;
mod state;

pub use control::ControlSnapshot;
pub(crate) use control::ControlStats;
pub use device::{Net, PAIRS_MAX};

#[cfg(test)]
mod multiqueue_tests;
#[cfg(test)]
mod tests;
