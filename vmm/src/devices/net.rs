//! The network device (virtio 1.3 section 5.1).
//!
//! Its state is that of its transport and queues; see `virtio_mmio`.

mod device;

pub use device::Net;

#[cfg(test)]
mod tests;
