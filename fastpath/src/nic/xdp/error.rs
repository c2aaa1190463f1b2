//! Why a NIC cannot be used through AF_XDP, and what to do.

use std::io;

use colo_bpf::XdpError;

use crate::ring::xsk::{InterfaceError, XskError};

/// A NIC could not be used through AF_XDP.
#[derive(Debug, thiserror::Error)]
pub enum XdpNicError {
    /// The interface.
    #[error("net.interface: {0}")]
    Interface(#[from] InterfaceError),
    /// A socket or its memory.
    #[error("net.interface: {0}")]
    Xsk(#[from] XskError),
    /// The XDP program.
    #[error("net.interface: {0}")]
    Xdp(#[from] XdpError),
    /// The guest may send longer frames than the NIC.
    #[error(
        "net.mtu = {wanted}, but \"{interface}\" has an MTU of {mtu}; \
         `ip link set {interface} mtu {wanted}`, or lower net.mtu"
    )]
    Mtu {
        /// Which.
        interface: String,
        /// What it has.
        mtu: u32,
        /// What the guest is promised.
        wanted: u16,
    },
    /// The guest's frames may need several buffers.
    #[error(
        "net.mtu = {wanted} needs AF_XDP frames in several buffers, which this kernel or the \
         driver of \"{interface}\" does not take (Linux 6.6 or later does); lower net.mtu to {max} \
         or use a TAP device"
    )]
    LongFrames {
        /// Which.
        interface: String,
        /// What the guest is promised.
        wanted: u16,
        /// What goes without.
        max: u32,
    },
    /// Slots below the smallest chunk.
    #[error("frame slots of {0} bytes are too small for AF_XDP, which needs 2048")]
    SmallSlots(usize),
    /// Not enough slots for the queues.
    #[error(
        "{slots} frame slots are too few for the {queues} receive queues of \"{interface}\"; \
         lower their number with `ethtool -L {interface}`"
    )]
    FewSlots {
        /// Which.
        interface: String,
        /// How many there are.
        slots: usize,
        /// For how many queues.
        queues: u32,
    },
    /// Every shard needs a queue.
    #[error(
        "net.interface: \"{interface}\" has {queues} receive queues, but host.shards = {shards} needs \
         at least as many; `ethtool -L {interface} combined {shards}` (or `rx {shards} tx {shards}`), \
         or lower host.shards"
    )]
    FewQueues {
        /// Which.
        interface: String,
        /// How many it has.
        queues: u32,
        /// How many shards there are.
        shards: u32,
    },
    /// The link's packet channel of an earlier pair is still there.
    #[error("the link's packets have \"{interface}\" already")]
    Shared {
        /// Which.
        interface: String,
    },
    /// The NIC is not in use at the moment.
    #[error("\"{interface}\" is lost; the link's packets can share it when it is back")]
    Lost {
        /// Which.
        interface: String,
    },
    /// The probe of one queue failed.
    #[error(
        "probe: a frame for the guest that comes by queue {queue} of \"{interface}\" would not \
         reach its socket"
    )]
    Probe {
        /// Which.
        interface: String,
        /// Which queue.
        queue: u32,
    },
    /// The NIC does not take the guest's address.
    #[error("\"{interface}\" cannot be told to receive for the guest: {source}")]
    Address {
        /// Which.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The link cannot be watched.
    #[error("the link of \"{interface}\" cannot be watched: {source}")]
    Watch {
        /// Which.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl XdpNicError {
    /// Whether a lesser mode may do.
    pub(super) fn is_about_mode(&self) -> bool {
        matches!(
            self,
            Self::Xsk(XskError::NoZeroCopy { .. }) | Self::Xdp(XdpError::NoDriverMode { .. })
        )
    }
}
