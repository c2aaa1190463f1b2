//! The devices of a machine, all in the same shape: device, state, tests.

pub mod net;
pub(crate) mod serial;
pub mod virtio_mmio;
