//! The program's counters: frames by verdict.
//!
//! Invariants: the order of the fields is that of `enum verdict` in `program.bpf.c`; every frame is
//! in exactly one of them.
//!
//! Does not reset anything.

/// Verdicts of the program.
pub(super) const VERDICTS: usize = 10;

/// Frames by verdict, since the program was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpCounters {
    /// To the host: neither the guest's nor the link's.
    pub host_frames: u64,
    /// To the host: ARP or neighbour solicitation for one of its addresses.
    pub host_neighbour_frames: u64,
    /// To the host: broadcast or multicast, by [`Groups`](super::Groups).
    pub host_group_frames: u64,
    /// To the host: shorter than an Ethernet header.
    pub short_frames: u64,
    /// To the guest's socket, unicast.
    pub guest_frames: u64,
    /// To the guest's socket, broadcast or multicast.
    pub guest_group_frames: u64,
    /// The guest's, dropped because this host does not speak for it.
    pub guest_dropped_frames: u64,
    /// The guest's, dropped because no socket is bound to the queue they came by.
    pub guest_unbound_frames: u64,
    /// To the link's socket.
    pub link_frames: u64,
    /// The link's, dropped because no socket is bound to the queue they came by.
    pub link_unbound_frames: u64,
}

impl XdpCounters {
    pub(super) fn from_verdicts(verdicts: [u64; VERDICTS]) -> Self {
        let [
            host_frames,
            host_neighbour_frames,
            host_group_frames,
            short_frames,
            guest_frames,
            guest_group_frames,
            guest_dropped_frames,
            guest_unbound_frames,
            link_frames,
            link_unbound_frames,
        ] = verdicts;
        Self {
            host_frames,
            host_neighbour_frames,
            host_group_frames,
            short_frames,
            guest_frames,
            guest_group_frames,
            guest_dropped_frames,
            guest_unbound_frames,
            link_frames,
            link_unbound_frames,
        }
    }
}
