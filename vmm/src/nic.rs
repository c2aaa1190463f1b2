//! The NIC that a configuration asks for.
//!
//! Does not decide what may pass: the role sets the filter.

use colo_fastpath::nic::{Filter, Nic, Tap, TapError, XdpNic, XdpNicConfig, XdpNicError};

use crate::config::NetConfig;

/// A NIC could not be used.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// A TAP device.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// An interface over AF_XDP.
    #[error(transparent)]
    Xdp(#[from] XdpNicError),
}

impl NicError {
    /// Whether it is the configuration that is wrong, not the host.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Tap(TapError::BadName(_)))
    }
}

/// Opens the NIC of `[net]`, which lets through what `filter` says from the start.
pub fn open(net: &NetConfig, filter: Filter) -> Result<Box<dyn Nic>, NicError> {
    if let Some(interface) = &net.interface {
        let config = XdpNicConfig {
            mode: net.xdp,
            ..XdpNicConfig::new(interface, net.mac, net.mtu, filter)
        };
        return Ok(Box::new(XdpNic::open(config)?));
    }
    let name = net.tap.as_deref().unwrap_or_default();
    Ok(Box::new(Tap::open(name, net.mtu, filter)?))
}
