//! The virtio-mmio transport, version 2 (virtio 1.3 section 4.2).

mod device;
mod state;

pub use device::{Backend, BackendError, NOTIFY_OFFSET, VirtioMmio, WINDOW_BYTES};
pub use state::DeviceState;

#[cfg(test)]
mod tests;
