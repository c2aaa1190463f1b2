//! AF_XDP: frames to and from one queue of a NIC, in memory that this process shares with the
//! kernel (Documentation/networking/af_xdp.rst).
//!
//! A [`Umem`] is that memory, registered once for all sockets that can share it. An [`XskSocket`] is
//! one queue: its fill ring gives chunks to the kernel, its rx ring gives them back with frames, its
//! tx ring takes pieces of frames, its completion ring gives these back.
//!
//! Invariants: the kernel writes only to chunks that are in a fill ring; every address and length
//! that comes from the kernel is checked against the area before anybody sees it, and every one
//! that goes to it, because the kernel swallows bad ones without a completion; each ring has one
//! producer and one consumer, of which one is the kernel.
//!
//! The rings are reached by system calls and not through the xsk-rs crate, which makes its own
//! memory for frames and knows neither unaligned chunks in foreign memory nor frames in several
//! buffers. Does not know guests, frame pools or XDP programs.

mod error;
mod interface;
mod kick;
mod lending;
mod receiver;
mod rings;
mod socket;
mod sys;
mod umem;
mod umems;

pub use error::XskError;
pub(crate) use interface::ip_of;
pub use interface::{Interface, InterfaceError};
pub(crate) use kick::{Kicks, TxRing, kick_all};
pub use lending::UmemUse;
pub use receiver::XskReceiver;
pub use socket::{
    BadDescriptor, BindOptions, CopyMode, Descriptor, Kick, Received, Rx, XskSocket, XskStatistics,
};
pub use umem::{Umem, UmemSettings};
pub(super) use umems::Umems;

#[cfg(test)]
mod tests;
