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

/// What was opened for a shard.
#[derive(Debug)]
pub struct Ports {
    /// The transports.
    pub list: Vec<Box<dyn DatagramPort>>,
    /// How many were wanted and could not be had.
    pub refused: u64,
}

/// What a shard has for its channel.
#[derive(Debug)]
pub struct LinkEnd<'a> {
    /// Its connection.
    pub stream: &'a TcpStream,
    /// The memory of its frame pool: AF_XDP receives into its slots, once it may borrow some.
    pub pool: Option<PoolMemory>,
}

/// The transports that can be had for a connection: [`open_all_ports`] of one shard.
pub fn open_ports(
    stream: &TcpStream,
    wish: Packets,
    pool: Option<&PoolMemory>,
    mut share: impl FnMut(String) -> Option<io::Result<LinkShare>>,
) -> Ports {
    let pool = pool.cloned();
    let mut all = open_all_ports(&[LinkEnd { stream, pool }], wish, |_, name| share(name));
    all.pop().unwrap_or(Ports {
        list: Vec::new(),
        refused: 0,
    })
}

/// The transports that can be had for the hosts that the connections of all shards are between, for each shard. What cannot is
/// logged, and done without. `share` asks a shard's end of the guest's NIC, whose frames lie in that shard's pool, for the
/// link's frames, if it is the interface of this name. All shards get AF_XDP, or none.
pub fn open_all_ports(
    ends: &[LinkEnd<'_>],
    wish: Packets,
    share: impl FnMut(usize, String) -> Option<io::Result<LinkShare>>,
) -> Vec<Ports> {
    let nothing = || Ports {
        list: Vec::new(),
        refused: 0,
    };
    let mut all: Vec<Ports> = ends.iter().map(|_| nothing()).collect();
    if matches!(wish, Packets::Auto | Packets::Xdp) {
        match open_xdp(ends, share) {
            Ok(opened) => {
                for (ports, port) in all.iter_mut().zip(opened) {
                    ports.list.push(port);
                }
            }
            Err(e) => {
                all.iter_mut().for_each(|ports| ports.refused += 1);
                match wish {
                    Packets::Auto => tracing::info!("packet channel: no AF_XDP: {e}"),
                    _ => tracing::warn!("packet channel: no AF_XDP: {e}; doing without"),
                }
            }
        }
    }
    if wish == Packets::Udp {
        for (ports, end) in all.iter_mut().zip(ends) {
            match UdpPort::beside(end.stream) {
                Ok(port) => ports.list.push(Box::new(port)),
                Err(e) => {
                    ports.refused += 1;
                    tracing::warn!("packet channel: no UDP socket: {e}; doing without");
                }
            }
        }
    }
    all
}

type XdpPorts = Vec<Box<dyn DatagramPort>>;

/// On sockets of their own, or where the guest's NIC is the link's, too, through that.
fn open_xdp(
    ends: &[LinkEnd<'_>],
    share: impl FnMut(usize, String) -> Option<io::Result<LinkShare>>,
) -> Result<XdpPorts, XdpPortError> {
    let Some(first) = ends.first() else {
        return Ok(Vec::new());
    };
    let name = interface_of(first.stream)?;
    if let Some(ports) = share_all(ends, &name, share)? {
        return Ok(ports);
    }
    let pools: Vec<_> = ends.iter().map(|end| end.pool.as_ref()).collect();
    let ports = XdpPort::for_shards(&name, &pools)?.into_iter();
    Ok(ports.map(|port| Box::new(port) as _).collect())
}

/// Through the guest's NIC. `None`: that is another interface.
fn share_all(
    ends: &[LinkEnd<'_>],
    name: &str,
    mut share: impl FnMut(usize, String) -> Option<io::Result<LinkShare>>,
) -> Result<Option<XdpPorts>, XdpPortError> {
    let mut ports: XdpPorts = Vec::new();
    for (shard, end) in ends.iter().enumerate() {
        let shared = end.pool.as_ref().and_then(|pool| {
            let shared = share(shard, name.to_owned())?;
            Some(shared.map(|share| GuestNicPort::new(share, pool)))
        });
        match shared {
            Some(port) => ports.push(Box::new(port?)),
            None if shard == 0 => return Ok(None),
            None => return Err(XdpPortError::NoEnd(shard)),
        }
    }
    Ok(Some(ports))
}
