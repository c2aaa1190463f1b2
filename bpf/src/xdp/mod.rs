//! The XDP program on a host's NIC: what goes to the guest's AF_XDP sockets, what to the link's,
//! and what stays with the host.
//!
//! Invariants: the program is configured before it is attached; until [`GuestFrames::Accept`] or
//! [`GuestFrames::Everything`] is set, no frame of the guest leaves the NIC (rule 24); the program
//! is off the NIC again when its [`XdpProgram`] or the process ends.
//!
//! Sees frames as they lie in memory: a NIC that takes VLAN tags out of received frames
//! (`ethtool -K NIC rxvlan off` stops it) shows the program untagged frames. Does not open AF_XDP
//! sockets.

mod counters;
mod error;
mod link;
mod loader;
mod settings;

pub use counters::XdpCounters;
pub use error::XdpError;
pub use loader::XdpProgram;
pub use settings::{
    AddressOwner, Attach, AttachMode, Attached, Groups, GuestFrames, LINK_ETHERTYPE, LinkChannel,
};
