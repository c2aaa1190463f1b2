//! The network device (virtio 1.3 section 5.1).
//!
//! Registers and queues are those of its transport, see `virtio_mmio`; the rest is in `state`.

mod device;
mod state;

pub use device::Net;

#[cfg(test)]
mod tests;
