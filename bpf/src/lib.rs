//! Packet filters that the kernel runs for colo: what a host's NIC lets through to its guest.
//!
//! Invariants: a program is loop-free and ends in an accept or a reject on every path; a frame
//! too short for a load is rejected (the kernel's rule). Until promotion the secondary runs
//! [`drop_all`] or [`GuestFrames::Drop`] (rule 24).
//!
//! Classic filters are for TAP devices and sockets, the XDP program ([`XdpProgram`]) for AF_XDP.
//! Does not open sockets or devices.

mod attach;
mod program;
mod xdp;

pub use attach::{AttachError, attach_to_socket, attach_to_tap, detach_from_tap};
pub use program::{Mac, drop_all, for_guest};
pub use xdp::{
    AddressOwner, Attach, AttachMode, Attached, Groups, GuestFrames, LINK_ETHERTYPE, LinkChannel,
    XdpCounters, XdpError, XdpProgram,
};
