//! Plain counters of the two paths; the thread that owns a path reads and publishes them.
//!
//! Invariant: every frame that is dropped or given back unsent is counted somewhere here.

use crate::action::Right;
use crate::cause::Cause;

/// Declares counters that can be summed up over the shards of a VM.
macro_rules! summable {
    ($(#[$attribute:meta])* pub struct $name:ident {
        $($(#[$field_attribute:meta])* pub $field:ident: $kind:ty,)*
    }) => {
        $(#[$attribute])*
        pub struct $name { $($(#[$field_attribute])* pub $field: $kind,)* }

        impl $name {
            /// Adds what another shard counted.
            pub fn add(&mut self, other: &Self) {
                $(self.$field.sum_up(&other.$field);)*
            }
        }
    };
}

trait SumUp {
    fn sum_up(&mut self, other: &Self);
}

impl SumUp for u64 {
    fn sum_up(&mut self, other: &Self) {
        *self += other;
    }
}

impl SumUp for [u64; Cause::COUNT] {
    fn sum_up(&mut self, other: &Self) {
        for (count, more) in self.iter_mut().zip(other) {
            *count += more;
        }
    }
}

summable! {
/// What a [`crate::PrimaryPath`] has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrimaryStats {
    /// Frames that the PVM sent.
    pub produced: u64,
    /// Frames that the SVM sent.
    pub svm_output: u64,
    /// PVM frames that were judged against SVM output.
    pub compared: u64,
    /// Frames that left because the SVM sent the same.
    pub released_by_match: u64,
    /// The same, only those that carry TCP payload or are datagrams.
    pub released_data_by_match: u64,
    /// Frames that left because a checkpoint covers them.
    pub released_by_checkpoint: u64,
    /// The same, only those that carry TCP payload or are datagrams.
    pub released_data_by_checkpoint: u64,
    /// Frames that left because they need no counterpart (pure ACKs, retransmissions).
    pub released_free: u64,
    /// Frames that left because a policy does not protect their flow.
    pub released_by_policy: u64,
    /// Frames that left because this host is alone.
    pub released_alone: u64,
    /// Differences found, by cause; at most one per flow and epoch.
    pub divergences: [u64; Cause::COUNT],
    /// Checkpoint requests, by cause; at most one per epoch.
    pub requests: [u64; Cause::COUNT],
    /// Input frames mirrored.
    pub mirrored: u64,
    /// SVM output of an epoch that is over.
    pub svm_stale: u64,
    /// SVM output that found no room (a checkpoint follows).
    pub svm_overflow: u64,
    /// SVM output that came as a digest.
    pub digests: u64,
    /// Digests whose headers do not say what they stand for: bytes were asked for, or are others.
    pub bad_digests: u64,
    /// SVM output whose bytes were asked for, because its digest did not say enough.
    pub fetched: u64,
    /// SVM datagrams that the PVM never sent.
    pub svm_surplus: u64,
    /// SVM segments given up as history before the client acknowledged them.
    pub history_dropped: u64,
    /// Flows forgotten to make room.
    pub flows_evicted: u64,
    /// Flows forgotten because they were idle or closed for long.
    pub flows_expired: u64,
    /// Flows looked at for that: only when a new flow comes.
    pub flow_expiry_looks: u64,
    /// Translations forgotten to make room: connections lost.
    pub translations_evicted: u64,
    /// Segments that lost their payload because their translation is not learnt yet.
    pub stripped: u64,
    /// Inherited input put to the guest again.
    pub redelivered: u64,
}
}

impl PrimaryStats {
    /// PVM frames that have left, for whatever reason.
    pub fn released(&self) -> u64 {
        let in_pair = self.released_by_match + self.released_by_checkpoint + self.released_free;
        in_pair + self.released_by_policy + self.released_alone
    }

    /// A frame has left; `is_data` when it carries TCP payload or is a datagram.
    pub(crate) fn count_release(&mut self, right: Right, is_data: bool) {
        match right {
            Right::Match => {
                self.released_by_match += 1;
                self.released_data_by_match += u64::from(is_data);
            }
            Right::Checkpoint => {
                self.released_by_checkpoint += 1;
                self.released_data_by_checkpoint += u64::from(is_data);
            }
            Right::Free => self.released_free += 1,
            Right::Policy => self.released_by_policy += 1,
            Right::Alone => self.released_alone += 1,
        }
    }
}

summable! {
/// What a `SecondaryPath` has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SecondaryStats {
    /// Input frames that came over the link.
    pub mirrored: u64,
    /// Input frames put to the SVM, redelivery included.
    pub delivered: u64,
    /// Input frames put to the SVM again.
    pub redelivered: u64,
    /// Frames that the SVM sent.
    pub produced: u64,
    /// SVM frames that are not sent to the primary (pure ACKs).
    pub pure_acks: u64,
    /// SVM frames sent to the primary.
    pub sent: u64,
    /// The same, only those of which a digest was sent.
    pub digests: u64,
    /// Digests whose bytes the primary asked for.
    pub fetched: u64,
    /// Bytes that the primary asked for and that are not here any more, or travel anyway.
    pub fetched_in_vain: u64,
    /// Pair translations learnt.
    pub learnt: u64,
    /// Input frames dropped by a commit that includes them.
    pub dropped_by_commit: u64,
    /// Checkpoint requests, by cause.
    pub requests: [u64; Cause::COUNT],
}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_of_every_shard_counts() {
        let mut sum = PrimaryStats::default();
        let mut one = PrimaryStats {
            produced: 3,
            ..PrimaryStats::default()
        };
        one.divergences[Cause::COUNT - 1] = 2;
        sum.add(&one);
        sum.add(&one);
        assert_eq!((sum.produced, sum.divergences[Cause::COUNT - 1]), (6, 4));
        assert_eq!(sum.compared, 0);
    }
}
