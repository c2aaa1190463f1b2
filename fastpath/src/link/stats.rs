//! Counters of the packet channel.

use serde::Serialize;

/// What the packet channel did, at one end.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LinkStats {
    /// What carries what this end says: `tcp`, `udp` or `xdp`, or `mixed` where shards differ.
    pub carrier: &'static str,
    /// Bytes sent, over whatever transport, headers below the channel's own not counted.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Datagrams sent.
    pub datagrams_sent: u64,
    /// Datagrams received.
    pub datagrams_received: u64,
    /// Datagrams sent again.
    pub retransmitted: u64,
    /// Times that an acknowledgement did not come in time.
    pub timeouts: u64,
    /// Times that TCP had to carry again what datagrams did.
    pub fallbacks: u64,
    /// Times that a transport beside TCP was wanted and could not be had.
    pub transport_refusals: u64,
    /// Messages longer than a datagram.
    pub split: u64,
    /// Messages that waited outside the ring of unacknowledged ones.
    pub overflowed: u64,
    /// Received datagrams that were shorter than they said.
    pub truncated: u64,
    /// Received datagrams of another program, version or session.
    pub foreign: u64,
    /// Received datagrams with a wrong checksum.
    pub damaged: u64,
    /// Received datagrams that had come before.
    pub duplicates: u64,
    /// Received datagrams too far ahead.
    pub out_of_window: u64,
    /// Datagrams that the system refused to send, or that AF_XDP had no room to receive.
    pub send_errors: u64,
    /// Datagrams that came over UDP and found the socket full; the peer sends them again.
    pub receive_drops: u64,
    /// System calls that sent or received datagrams: wake-ups of AF_XDP, batches of UDP. Those through the guest's NIC are the
    /// NIC's.
    pub datagram_calls: u64,
    /// Of these the wake-ups that AF_XDP's ring asked for (need_wakeup).
    pub wake_ups_asked: u64,
    /// Of these, the ones after which the kernel had taken nothing; it is asked again with what comes next.
    pub wake_ups_in_vain: u64,
    /// System calls on the TCP connection.
    pub stream_calls: u64,
    /// Frames that stayed in the slot of the pool where the NIC had put them.
    pub frames_in_place: u64,
    /// Frames that were copied into a slot.
    pub frames_copied: u64,
    /// Times that reading waited for a free slot.
    pub slot_waits: u64,
    /// Connections whose AF_XDP sockets could not share the pool's memory.
    pub pool_refusals: u64,
    /// Received datagrams that were another shard's and went there.
    pub crossed_out: u64,
    /// Datagrams that other shards had received for this one.
    pub crossed_in: u64,
    /// Datagrams that crossed and found no room; the peer sends them again.
    pub crossing_drops: u64,
    /// Smoothed round-trip time in microseconds, the peer's delay included; of several shards the longest.
    pub rtt_us: u64,
}

impl LinkStats {
    /// Adds what another shard's channel did at the same time.
    pub fn join(&mut self, other: &Self) {
        self.add(other);
        if self.carrier != other.carrier {
            self.carrier = "mixed";
        }
        self.rtt_us = self.rtt_us.max(other.rtt_us);
    }

    /// Adds the counters of an earlier connection; the rest stays.
    pub fn add(&mut self, earlier: &Self) {
        let counters = [
            (&mut self.sent_bytes, earlier.sent_bytes),
            (&mut self.received_bytes, earlier.received_bytes),
            (&mut self.datagrams_sent, earlier.datagrams_sent),
            (&mut self.datagrams_received, earlier.datagrams_received),
            (&mut self.retransmitted, earlier.retransmitted),
            (&mut self.timeouts, earlier.timeouts),
            (&mut self.fallbacks, earlier.fallbacks),
            (&mut self.transport_refusals, earlier.transport_refusals),
            (&mut self.split, earlier.split),
            (&mut self.overflowed, earlier.overflowed),
            (&mut self.truncated, earlier.truncated),
            (&mut self.foreign, earlier.foreign),
            (&mut self.damaged, earlier.damaged),
            (&mut self.duplicates, earlier.duplicates),
            (&mut self.out_of_window, earlier.out_of_window),
            (&mut self.send_errors, earlier.send_errors),
            (&mut self.receive_drops, earlier.receive_drops),
            (&mut self.datagram_calls, earlier.datagram_calls),
            (&mut self.wake_ups_asked, earlier.wake_ups_asked),
            (&mut self.wake_ups_in_vain, earlier.wake_ups_in_vain),
            (&mut self.stream_calls, earlier.stream_calls),
            (&mut self.frames_in_place, earlier.frames_in_place),
            (&mut self.frames_copied, earlier.frames_copied),
            (&mut self.slot_waits, earlier.slot_waits),
            (&mut self.pool_refusals, earlier.pool_refusals),
            (&mut self.crossed_out, earlier.crossed_out),
            (&mut self.crossed_in, earlier.crossed_in),
            (&mut self.crossing_drops, earlier.crossing_drops),
        ];
        for (counter, more) in counters {
            *counter += more;
        }
    }
}
