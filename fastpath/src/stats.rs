//! Counters of one thread, readable by all.
//!
//! Invariants: each counter has one writer, so an addition is a plain load and store; readers may be
//! a moment behind but never see a torn value.
//!
//! Does not aggregate over threads or time.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::frame::CopyCause;

/// A counter with a single writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the owning thread calls this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// The present value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Declares a block of counters together with its serialisable copy.
#[macro_export]
macro_rules! counters {
    ($(#[$doc:meta])* $live:ident => $copy:ident { $($(#[$field_doc:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $live { $($(#[$field_doc])* pub $field: $crate::stats::Counter,)* }

        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, $crate::stats::Serialise)]
        pub struct $copy { $($(#[$field_doc])* pub $field: u64,)* }

        impl $live {
            /// The values of this moment.
            pub fn snapshot(&self) -> $copy {
                $copy { $($field: self.$field.get(),)* }
            }
        }

        impl $copy {
            /// Adds what another thread counted.
            pub fn add(&mut self, other: &Self) {
                $(self.$field += other.$field;)*
            }

            /// Names and values, for tables.
            pub fn entries(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field),)*]
            }
        }
    };
}

pub use serde::Serialize as Serialise;

counters! {
    /// What a worker has done.
    WorkerStats => WorkerSnapshot {
        /// Frames put into the guest's receive queue.
        guest_rx_frames,
        /// Bytes of these.
        guest_rx_bytes,
        /// Frames dropped because the guest's buffer was too small.
        guest_rx_too_small,
        /// Frames taken from the guest's transmit queue.
        guest_tx_frames,
        /// Bytes of these.
        guest_tx_bytes,
        /// Transmit buffers dropped: too short, too long, or asking for offloads.
        guest_tx_bad,
        /// Frames read from the NIC.
        nic_rx_frames,
        /// Frames from the NIC that were longer than the MTU allows.
        nic_rx_oversize,
        /// Reads that the NIC refused.
        nic_rx_errors,
        /// Frames given to the NIC.
        nic_tx_frames,
        /// Times the NIC had no room and the frame was kept.
        nic_tx_blocked,
        /// Frames that the NIC refused.
        nic_tx_errors,
        /// Frames in the guest's memory that a NIC which stood still had not sent when the guest got the memory back.
        nic_tx_exposed,
        /// Times a frame had to wait because no slot was free.
        frames_exhausted,
        /// Payload bytes sent from where they lay, without a copy in this process. The first 256 bytes of a frame whose
        /// header is read are always host memory (rule 10) and count nowhere; of a frame that is copied at once all count.
        tx_in_place_bytes,
        /// Bytes of the guest's frames copied because the frame is short.
        copied_small_bytes,
        /// ... because it lay in too many buffers.
        copied_scattered_bytes,
        /// ... because too many of the guest's buffers were in use.
        copied_pressure_bytes,
        /// ... because it was compared otherwise than as a whole with its counterpart.
        copied_compared_bytes,
        /// ... because it was compared by its digest.
        copied_digested_bytes,
        /// ... because it was undecided at a capture, or while a divergence was pending.
        copied_undecided_bytes,
        /// ... because the secondary works on copies.
        copied_role_bytes,
        /// ... because the NIC takes frames in one piece only.
        copied_gathered_bytes,
        /// ... because the frame was read as a whole, for the link or a record.
        copied_read_bytes,
        /// ... because the frame belongs to another shard.
        copied_crossing_bytes,
        /// Frames handed to other shards: theirs, or for the guest's queues that they serve.
        crossed_out_frames,
        /// Frames taken over from other shards.
        crossed_in_frames,
        /// Times that reading stopped because another shard had no room for its frames.
        crossing_waits,
        /// Frames for the guest that another shard had no room for and gave back.
        crossing_returns,
        /// Interrupts sent to the guest.
        guest_calls,
        /// Notifications received from the guest.
        guest_kicks,
        /// Times a broken queue made the device ask for a reset.
        ring_errors,
        /// Times the guest was told that the NIC's link has come or gone.
        link_changes,
        /// Batches with work in them.
        busy_batches,
        /// Times it let other threads run though it did not sleep.
        yields,
        /// Times it asked the system how often others had run meanwhile.
        looks_around,
        /// Times it moved to another processor because it polled beside another thread that polls.
        moves,
        /// Times it waited a moment for more frames.
        gathers,
        /// Times the worker went to sleep.
        sleeps,
        /// Commands handled.
        commands,
    }
}

impl WorkerStats {
    /// Frames from the guest and for it.
    pub(crate) fn guest_frames(&self) -> u64 {
        self.guest_rx_frames.get() + self.guest_tx_frames.get()
    }

    /// Counts bytes of the guest's frames that were copied.
    pub fn count_copied(&self, cause: CopyCause, bytes: u64) {
        let counter = match cause {
            CopyCause::Small => &self.copied_small_bytes,
            CopyCause::Scattered => &self.copied_scattered_bytes,
            CopyCause::Pressure => &self.copied_pressure_bytes,
            CopyCause::Compared => &self.copied_compared_bytes,
            CopyCause::Digested => &self.copied_digested_bytes,
            CopyCause::Undecided => &self.copied_undecided_bytes,
            CopyCause::Role => &self.copied_role_bytes,
            CopyCause::Gathered => &self.copied_gathered_bytes,
            CopyCause::Read => &self.copied_read_bytes,
            CopyCause::Crossing => &self.copied_crossing_bytes,
        };
        counter.add(bytes);
    }
}

impl WorkerSnapshot {
    /// How much of the guest's payload that was sent or copied left from where it lay, in per cent; `None` before
    /// there was any.
    pub fn tx_in_place_pct(&self) -> Option<f64> {
        let copied = [
            self.copied_small_bytes,
            self.copied_scattered_bytes,
            self.copied_pressure_bytes,
            self.copied_compared_bytes,
            self.copied_digested_bytes,
            self.copied_undecided_bytes,
            self.copied_role_bytes,
            self.copied_gathered_bytes,
            self.copied_read_bytes,
            self.copied_crossing_bytes,
        ];
        let in_place = self.tx_in_place_bytes;
        let all = in_place + copied.iter().sum::<u64>();
        (all > 0).then(|| 100.0 * in_place as f64 / all as f64)
    }
}

const _: fn() = || {
    fn serialisable<T: Serialize>() {}
    serialisable::<WorkerSnapshot>();
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_of_a_copy_lowers_the_share_in_place() {
        let mut counted = WorkerSnapshot::default();
        assert_eq!(counted.tx_in_place_pct(), None);
        counted.tx_in_place_bytes = 900;
        assert_eq!(counted.tx_in_place_pct(), Some(100.0));
        let causes = [
            CopyCause::Small,
            CopyCause::Scattered,
            CopyCause::Pressure,
            CopyCause::Compared,
            CopyCause::Digested,
            CopyCause::Undecided,
            CopyCause::Role,
            CopyCause::Gathered,
            CopyCause::Read,
            CopyCause::Crossing,
        ];
        for cause in causes {
            let stats = WorkerStats::default();
            stats.tx_in_place_bytes.add(900);
            stats.count_copied(cause, 100);
            assert_eq!(stats.snapshot().tx_in_place_pct(), Some(90.0), "{cause:?}");
        }
    }
}
