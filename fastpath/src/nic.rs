//! The seam between the worker and whatever carries frames to the clients.
//!
//! Invariants: nothing here blocks; a frame leaves whole or not at all.
//!
//! Does not know about guests, roles or comparison.

mod socket;
mod tap;

use std::io;
use std::os::fd::RawFd;

use colo_bpf::Mac;

pub use socket::SocketNic;
pub use tap::{Tap, TapError};

/// What became of a frame handed to [`Nic::send`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The NIC has it.
    Done,
    /// The NIC has no room now: keep the frame and try again.
    WouldBlock,
}

/// What the NIC lets through to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Everything.
    Open,
    /// The guest's address, broadcast and multicast.
    Guest(Mac),
    /// Nothing: a secondary before its promotion (rule 24).
    DropAll,
}

/// A NIC that the worker polls.
pub trait Nic: Send {
    /// For logs and reports.
    fn name(&self) -> &str;

    /// Copies the next frame into `buf` and gives its length; `None` when none is waiting. A frame
    /// longer than `buf` is cut off.
    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>>;

    /// Sends one whole frame.
    fn send(&mut self, frame: &[u8]) -> io::Result<Sent>;

    /// Readable when a frame is waiting, writable when one can be sent.
    fn poll_fd(&self) -> RawFd;

    /// Largest payload behind the Ethernet header.
    fn mtu(&self) -> u16;

    /// Replaces the filter, for frames that arrive from now on.
    fn set_filter(&mut self, filter: Filter) -> io::Result<()>;
}
