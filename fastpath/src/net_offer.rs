//! What a network device offers its driver, whatever the transport between them.
//!
//! Invariants: only features that the worker's port serves are offered; the configuration space is
//! that of virtio 1.3 section 5.1.4.
//!
//! Does not negotiate; the transports do.

use colo_bpf::Mac;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

/// `virtio_net_config` up to `mtu`: mac, status, max_virtqueue_pairs, mtu.
pub const NET_CONFIG_BYTES: usize = 12;

/// A network device as its driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetOffer {
    /// The guest's address.
    pub mac: Mac,
    /// Largest payload of a frame.
    pub mtu: u16,
    /// Checksums of frames for the guest are verified, and it is told of those that hold.
    pub guest_checksum: bool,
    /// Queue pairs, one for each worker.
    pub pairs: u16,
}

impl NetOffer {
    /// Features that every device offers, besides those of rings and transport.
    pub const ALWAYS: u64 = 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_STATUS
        | Self::CHECKSUM
        | Self::MERGEABLE;

    /// The guest may leave checksums of what it sends to the device.
    pub const CHECKSUM: u64 = 1 << VIRTIO_NET_F_CSUM;

    /// The guest need not look at checksums that the device has verified.
    pub const GUEST_CHECKSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;

    /// A frame for the guest may lie in several of its buffers.
    pub const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

    /// The driver may use several queue pairs, and says how many by the control queue.
    pub const MULTIQUEUE: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

    /// A device that offers only [`Self::ALWAYS`].
    pub const fn new(mac: Mac, mtu: u16) -> Self {
        Self {
            mac,
            mtu,
            guest_checksum: false,
            pairs: 1,
        }
    }

    /// Features besides those of rings and transport.
    pub fn features(&self) -> u64 {
        let optional = [
            (self.guest_checksum, Self::GUEST_CHECKSUM),
            (self.pairs > 1, Self::MULTIQUEUE),
        ];
        let offered = optional.iter().filter(|(offered, _)| *offered);
        Self::ALWAYS | offered.map(|(_, bits)| bits).sum::<u64>()
    }

    /// The configuration space.
    pub fn config(&self, link_is_up: bool) -> [u8; NET_CONFIG_BYTES] {
        let status = if link_is_up { VIRTIO_NET_S_LINK_UP } else { 0 };
        let mut config = [0; NET_CONFIG_BYTES];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&(status as u16).to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }
}
