//! A transport for datagrams, as the packet channel sees it.
//!
//! Invariants: a received datagram lies in its slot until the slot is released; what does not fit is not sent, and the
//! caller keeps it.
//!
//! Knows no order and no retransmission, and may lose, repeat and reorder datagrams.

use std::fmt;
use std::net::SocketAddr;

use colo_bpf::Mac;
use colo_compare::Token;

use crate::frame::FramePool;
use crate::nic::Nic;

/// A received datagram in a transport's memory. It is given back with [`DatagramPort::release`].
#[derive(Debug, PartialEq, Eq)]
pub struct Slot(pub(super) u32);

/// Kinds of transport, the better one later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortKind {
    /// UDP through the kernel.
    Udp,
    /// AF_XDP: frames of an own EtherType, past the kernel's network stack.
    Xdp,
}

impl PortKind {
    /// As in configuration and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Xdp => "xdp",
        }
    }

    /// Whether what is sent to one shard may come to another: the NIC chooses the queue, and each shard has some of them.
    pub(super) fn crosses(self) -> bool {
        self == Self::Xdp
    }
}

/// Where the datagrams of one end go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortAddress {
    /// Address and port.
    Udp(SocketAddr),
    /// On the network that the two hosts share.
    Xdp(Mac),
}

impl PortAddress {
    /// The kind of transport that it belongs to.
    pub fn kind(&self) -> PortKind {
        match self {
            Self::Udp(_) => PortKind::Udp,
            Self::Xdp(_) => PortKind::Xdp,
        }
    }
}

/// System calls that tell the kernel to look at a ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WakeUps {
    /// How many there were.
    pub made: u64,
    /// How many the ring asked for (need_wakeup).
    pub asked: u64,
    /// After how many the kernel had taken nothing.
    pub in_vain: u64,
}

/// One end of a datagram transport. Never blocks.
pub trait DatagramPort: Send + fmt::Debug {
    /// Where this end receives.
    fn address(&self) -> PortAddress;

    /// Longest datagram.
    fn mtu(&self) -> usize;

    /// Where datagrams go from now on.
    fn set_peer(&mut self, peer: PortAddress);

    /// Whether [`Self::send`] will take a datagram.
    fn has_room(&self) -> bool;

    /// Takes one datagram, in two parts; it leaves with [`Self::flush`] at the latest. `false`: no room, or too long.
    fn send(&mut self, head: &[u8], payload: &[u8]) -> bool;

    /// Sends what was taken, with one wake-up. What the system refuses is lost and counted.
    fn flush(&mut self);

    /// Turns to what has come by now: [`Self::receive`] need not find what comes later.
    fn look(&mut self) {}

    /// The next received datagram.
    fn receive(&mut self) -> Option<Slot>;

    /// What was received.
    fn bytes(&self, slot: &Slot) -> &[u8];

    /// Gives a slot back.
    fn release(&mut self, slot: Slot);

    /// Takes slots of the pool that it lacks to send from and receive into, if it was opened for that pool's memory.
    fn borrow_slots(&mut self, frames: &mut FramePool) {
        let _ = frames;
    }

    /// Whether it uses the guest's NIC.
    fn shares_nic(&self) -> bool {
        false
    }

    /// Takes what has come by the guest's NIC, if it shares that, else as [`Self::borrow_slots`].
    fn take_in(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) {
        let _ = nic;
        self.borrow_slots(frames);
    }

    /// Whether what was flushed leaves with [`Self::hand_over`].
    fn has_written(&self) -> bool {
        false
    }

    /// Gives the guest's NIC what is to leave by it. True: it has no room for all of it now.
    fn hand_over(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) -> bool {
        let _ = (nic, frames);
        false
    }

    /// Makes `len` bytes from byte `start` of the datagram on a frame where they lie, and takes another slot of the
    /// pool instead. Gives the slot back where that cannot be.
    fn adopt(
        &mut self,
        slot: Slot,
        start: usize,
        len: usize,
        frames: &mut FramePool,
    ) -> Result<Token, Slot> {
        let _ = (start, len, frames);
        Err(slot)
    }

    /// Takes a datagram that another shard has received for this one, as a copy in a slot. `None`: there is none for it.
    fn copy_in(&mut self, datagram: &[u8], frames: &mut FramePool) -> Option<Slot> {
        let _ = (datagram, frames);
        None
    }

    /// Ends the use of the pool: every slot is given back, and nothing is sent or received any more.
    fn leave(&mut self, frames: &mut FramePool) {
        let _ = frames;
    }

    /// Times that the pool's memory could not be used, and what comes is copied.
    fn pool_refusals(&self) -> u64 {
        0
    }

    /// Adds what to wait for.
    fn poll_fds(&self, fds: &mut Vec<libc::pollfd>);

    /// Datagrams that the system refused to send, or lost for lack of room.
    fn errors(&self) -> u64;

    /// Datagrams that came and that the system had no room for, where it counts them apart from [`Self::errors`]. Asks the
    /// system: for reports.
    fn receive_drops(&self) -> u64 {
        0
    }

    /// System calls that it has made to send and to receive.
    fn calls(&self) -> u64 {
        0
    }

    /// Those of them that wake the kernel up, where it says when it must be.
    fn wake_ups(&self) -> WakeUps {
        WakeUps::default()
    }

    /// For tests: nothing is received any more.
    #[cfg(test)]
    fn stop_receiving(&mut self) {}
}
