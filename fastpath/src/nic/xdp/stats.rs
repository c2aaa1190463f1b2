//! What an AF_XDP NIC counts.

use crate::counters;

counters! {
    /// What a NIC over AF_XDP has met with.
    XdpNicStats => XdpNicSnapshot {
        /// Received pieces that were copied behind the first of their frame.
        rx_gathered_pieces,
        /// Received frames dropped: longer than a slot, or outside the memory.
        spoilt_frames,
        /// Frames to send that were copied into one piece because the kernel or the driver takes no others.
        tx_gathered_one_piece_frames,
        /// The same, because they had more pieces than it takes.
        tx_gathered_many_pieces_frames,
        /// The same, because a part of them lay outside the shared memory.
        tx_gathered_outside_frames,
        /// Frames to send that even so did not fit.
        tx_too_long,
        /// Frames not sent because the NIC had no link or was gone.
        tx_without_link,
        /// Frames under way when the NIC went, which may not have left.
        tx_lost_frames,
        /// Frames that the kernel threw away: the interface had just lost its carrier, or there was no room behind it.
        tx_dropped_frames,
        /// System calls to send.
        tx_kicks,
        /// The same, after which the kernel had taken nothing; it is told again with what comes next.
        tx_kicks_in_vain,
        /// Whole frames that were received for the link.
        link_frames,
        /// Frames for the link that were dropped: in several pieces, or outside the memory.
        link_spoilt_frames,
        /// Completions of nothing that was sent.
        strange_completions,
        /// Times that the link went.
        link_losses,
        /// Times that the NIC itself went, or lost queues.
        nic_losses,
        /// Times that it came back.
        nic_returns,
        /// Queues that were added while it ran.
        queues_added,
        /// Attempts to use it again that failed.
        return_failures,
    }
}
