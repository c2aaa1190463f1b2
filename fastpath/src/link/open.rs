//! Which datagram transports this host can offer for a connection.

use std::io;
use std::net::TcpStream;

use serde::{Deserialize, Serialize};

use super::port::DatagramPort;
use super::udp::UdpPort;
use super::xdp::{GuestNicPort, PoolMemory, XdpPort, XdpPortError, interface_of};
use crate::nic::LinkShare;

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

/// What [`open_ports`] has opened.
#[derive(Debug)]
pub struct Ports {
    /// The transports.
    pub list: Vec<Box<dyn DatagramPort>>,
    /// How many were wanted and could not be had.
    pub refused: u64,
}

/// The transports that can be had for the hosts that `stream` connects. What cannot is logged, and done without. With
/// `pool`, AF_XDP receives into the slots of the pool that this is the memory of, once it may borrow some. `share` asks the
/// guest's NIC, whose frames lie in that pool, for the link's frames, if it is the interface of this name.
pub fn open_ports(
    stream: &TcpStream,
    wish: Packets,
    pool: Option<&PoolMemory>,
    share: impl FnOnce(String) -> Option<io::Result<LinkShare>>,
) -> Ports {
    let mut list: Vec<Box<dyn DatagramPort>> = Vec::new();
    let mut refused = 0;
    if matches!(wish, Packets::Auto | Packets::Xdp) {
        match open_xdp(stream, pool, share) {
            Ok(port) => list.push(port),
            Err(e) => {
                refused += 1;
                match wish {
                    Packets::Auto => tracing::info!("packet channel: no AF_XDP: {e}"),
                    _ => tracing::warn!("packet channel: no AF_XDP: {e}; doing without"),
                }
            }
        }
    }
    if wish == Packets::Udp {
        match UdpPort::beside(stream) {
            Ok(port) => list.push(Box::new(port)),
            Err(e) => {
                refused += 1;
                tracing::warn!("packet channel: no UDP socket: {e}; doing without");
            }
        }
    }
    Ports { list, refused }
}

/// On sockets of its own, or where the guest's NIC is the link's, too, through that.
fn open_xdp(
    stream: &TcpStream,
    pool: Option<&PoolMemory>,
    share: impl FnOnce(String) -> Option<io::Result<LinkShare>>,
) -> Result<Box<dyn DatagramPort>, XdpPortError> {
    if let Some(pool) = pool
        && let Some(share) = share(interface_of(stream)?)
    {
        return Ok(Box::new(GuestNicPort::new(share?, pool)));
    }
    Ok(Box::new(XdpPort::beside(stream, pool)?))
}
