//! The NIC that a configuration asks for.
//!
//! Does not decide what may pass: the role sets the filter.

use colo_fastpath::nic::{Filter, Nic, Tap, TapError};

use crate::config::NetConfig;

/// A NIC could not be used.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// A TAP device.
    #[error(transparent)]
    Tap(#[from] TapError),
}

impl NicError {
    /// Whether it is the configuration that is wrong, not the host.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Tap(TapError::BadName(_)))
    }
}

/// Opens the NIC of `[net]`, which lets through what `filter` says from the start.
pub fn open(net: &NetConfig, filter: Filter) -> Result<Box<dyn Nic>, NicError> {
    let name = net.tap.as_deref().unwrap_or_default();
    Ok(Box::new(Tap::open(name, net.mtu, filter)?))
}
