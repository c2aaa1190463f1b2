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
pub fn open_one(net: &NetConfig, filter: Filter) -> Result<Box<dyn Nic>, NicError> {
    match xdp_config(net, filter) {
        Some(config) => Ok(Box::new(XdpNic::open(config)?)),
        None => Ok(Box::new(Tap::open(tap_name(net), net.mtu, filter)?)),
    }
}

/// The same with an end for each shard.
pub fn open(net: &NetConfig, filter: Filter, shards: usize) -> Result<Vec<Box<dyn Nic>>, NicError> {
    if shards == 1 {
        return Ok(vec![open_one(net, filter)?]);
    }
    match xdp_config(net, filter) {
        Some(config) => Ok(boxed(XdpNic::open_shards(config, shards)?)),
        None => Ok(boxed(Tap::open_queues(
            tap_name(net),
            net.mtu,
            filter,
            shards,
        )?)),
    }
}

fn xdp_config(net: &NetConfig, filter: Filter) -> Option<XdpNicConfig> {
    net.interface.as_ref().map(|interface| XdpNicConfig {
        mode: net.xdp,
        ..XdpNicConfig::new(interface, net.mac, net.mtu, filter)
    })
}

fn tap_name(net: &NetConfig) -> &str {
    net.tap.as_deref().unwrap_or_default()
}

fn boxed<N: Nic + 'static>(ends: Vec<N>) -> Vec<Box<dyn Nic>> {
    let boxed = |end| Box::new(end) as Box<dyn Nic>;
    ends.into_iter().map(boxed).collect()
}
