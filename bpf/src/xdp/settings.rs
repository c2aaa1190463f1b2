//! What the XDP program can be told, and how the program spells it.
//!
//! Invariants: the numbers agree with `program.bpf.c`; the default lets nothing through.
//!
//! Does not talk to the kernel.

use std::fmt;

/// The EtherType of the link's packet channel unless another is set: the first of those for local
/// experiments (IEEE 802).
pub const LINK_ETHERTYPE: u16 = 0x88b5;

/// What becomes of the guest's frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestFrames {
    /// They are dropped: a secondary before its promotion (rule 24).
    #[default]
    Drop,
    /// They go to the guest's sockets.
    Accept,
    /// Every frame is the guest's, whatever its address, except the link's: for a NIC that the
    /// host does not use.
    Everything,
}

/// Who gets broadcast and multicast that does not ask for a known address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Groups {
    /// The guest: right when the host needs no DHCP, router advertisements or the like there.
    #[default]
    Guest,
    /// The host; the guest gets only what asks for an address that is known as its own.
    Host,
    /// The host, all of it: whoever serves the guest takes copies behind the host's driver.
    Copied,
}

/// Whose an IP address is. ARP requests and neighbour solicitations for it go there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressOwner {
    /// The host that the NIC is shared with.
    Host,
    /// The guest.
    Guest,
}

/// How the frames of the link's packet channel are known. They are unicast, and not to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkChannel {
    /// By EtherType; [`LINK_ETHERTYPE`] unless something else uses it.
    pub ethertype: Option<u16>,
    /// By UDP port, over IPv4 without options or IPv6 without extension headers.
    pub udp_port: Option<u16>,
}

/// Where the kernel is asked to run the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// In the driver, or in the kernel's network stack when the driver cannot.
    #[default]
    Best,
    /// Only there.
    Only(AttachMode),
}

/// Where the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// In the driver (native XDP).
    Driver,
    /// In the network stack, behind the driver (generic XDP): works everywhere, slower.
    Generic,
}

/// How the program was attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Where it runs.
    pub mode: AttachMode,
    /// Why it does not run in the driver, when that was tried.
    pub fallback_reason: Option<String>,
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Driver => "driver",
            Self::Generic => "generic",
        })
    }
}

/// The program's configuration, word by word as in `struct config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) guest_frames: GuestFrames,
    pub(super) groups: Groups,
    pub(super) link: LinkChannel,
}

impl Config {
    pub(super) fn words(self) -> [u32; 4] {
        let mode = match self.guest_frames {
            GuestFrames::Drop => 0,
            GuestFrames::Accept => 1,
            GuestFrames::Everything => 2,
        };
        let groups = match self.groups {
            Groups::Guest => 0,
            Groups::Host => 1,
            Groups::Copied => 2,
        };
        let link_type = self.link.ethertype.map_or(0, u32::from);
        let link_port = self.link.udp_port.map_or(0, u32::from);
        [mode, groups, link_type, link_port]
    }
}

impl AddressOwner {
    pub(super) fn word(self) -> u32 {
        match self {
            Self::Host => 1,
            Self::Guest => 2,
        }
    }
}
