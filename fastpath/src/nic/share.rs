//! A NIC that carries the guest's frames lets the link's packet channel use it, too.
//!
//! Invariants: a slot with a frame for the link is the channel's from [`Nic::receive_link`](super::Nic::receive_link) on, and
//! still lent by the pool; the NIC lets the link's frames through as long as the [`LinkShare`] lives.
//!
//! Does not know what the frames say.

use std::sync::{Arc, Weak};

use colo_bpf::Mac;

/// The right to a NIC's frames for the link.
#[derive(Debug)]
pub struct LinkShare {
    /// The NIC's own address, to which the link's frames go.
    pub mac: Mac,
    /// Longest payload behind the Ethernet header that can be received.
    pub mtu: usize,
    _held: Arc<()>,
}

impl LinkShare {
    /// The right, and how the NIC finds out that it has ended.
    pub(super) fn new(mac: Mac, mtu: usize) -> (Self, Weak<()>) {
        let held = Arc::new(());
        let holder = Arc::downgrade(&held);
        let share = Self {
            mac,
            mtu,
            _held: held,
        };
        (share, holder)
    }
}

/// A received frame of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkFrame {
    /// Its slot, lent by the pool.
    pub slot: u32,
    /// Where in the slot it starts.
    pub start: usize,
    /// Its length.
    pub len: usize,
}
