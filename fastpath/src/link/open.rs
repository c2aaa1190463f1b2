//! Which datagram transports this host can offer for a connection.

use std::net::TcpStream;

use serde::{Deserialize, Serialize};

use super::port::DatagramPort;
use super::udp::UdpPort;
use super::xdp::{PoolMemory, XdpPort};

/// What may carry the packet channel beside TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Packets {
    /// AF_XDP if both hosts have it, else TCP.
    #[default]
    Auto,
    /// TCP only.
    Tcp,
    /// UDP, if the peer has it.
    Udp,
    /// AF_XDP, if the peer has it.
    Xdp,
}

/// The transports that can be had for the hosts that `stream` connects. What cannot is logged, and done without. With
/// `pool`, AF_XDP receives into the slots of the pool that this is the memory of, once it may borrow some.
pub fn open_ports(
    stream: &TcpStream,
    wish: Packets,
    pool: Option<&PoolMemory>,
) -> Vec<Box<dyn DatagramPort>> {
    let mut ports: Vec<Box<dyn DatagramPort>> = Vec::new();
    if matches!(wish, Packets::Auto | Packets::Xdp) {
        match XdpPort::beside(stream, pool) {
            Ok(port) => ports.push(Box::new(port)),
            Err(e) if wish == Packets::Auto => tracing::info!("packet channel: no AF_XDP: {e}"),
            Err(e) => tracing::warn!("packet channel: no AF_XDP: {e}; doing without"),
        }
    }
    if wish == Packets::Udp {
        match UdpPort::beside(stream) {
            Ok(port) => ports.push(Box::new(port)),
            Err(e) => tracing::warn!("packet channel: no UDP socket: {e}; doing without"),
        }
    }
    ports
}
