//! Sizes and times of the two paths.
//!
//! Invariant: every queue and table of the crate is bounded by a field here; reaching one means
//! back-pressure or a checkpoint, never a drop of something that is owed to anyone.
//!
//! Each path takes all its memory when it is made. The bytes given here are those of one more unit
//! at worst, when the number is just above four fifths of a power of two and the index of a table is
//! sparse; just below, a unit of a table takes 10 bytes less. Frames themselves are the shell's.

use crate::record;
use crate::stream::FAR_BEHIND;

/// The bounds. Both hosts of a pair use the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Flows in the comparator's table and in the pair translation. 192 bytes each on the primary,
    /// 104 on the secondary.
    pub max_flows: usize,
    /// Client-facing translations. 160 bytes each on the primary, 104 on the secondary.
    pub max_translations: usize,
    /// PVM frames held or deferred; above it [`crate::PrimaryPath::room`] is false. 144 bytes each
    /// on the primary, 4 on the secondary, for the pending output of a checkpoint.
    pub max_held_frames: usize,
    /// Frames that may come at the end of an epoch in excess of `max_held_frames` or
    /// `max_stored_output`: those on their way from one shard to another. As many bytes each as those.
    /// 0 means that there is one shard; with several, fragments of TCP are held until a commit.
    pub crossing_frames: usize,
    /// SVM frames kept by the comparator, history included. 136 bytes each on the primary.
    pub max_svm_frames: usize,
    /// Bytes of one flow's released SVM segments that are kept until the client's ACK. They stay in
    /// their frames, of which there are `max_svm_frames` at most. 1 GiB at most.
    pub max_history_bytes: usize,
    /// Mirrored frames that the secondary has not acknowledged. 184 bytes each on the secondary,
    /// which may have to keep that many above `max_input_frames`.
    pub max_unacked_inputs: u64,
    /// Input frames that the secondary keeps: undelivered and retained together. Above it, it stops
    /// to acknowledge and asks for a checkpoint. 184 bytes each on the secondary.
    pub max_input_frames: usize,
    /// SVM output that the secondary stores until the primary reports it released; above it
    /// [`crate::SecondaryPath::room`] is false. 40 bytes each on the secondary.
    pub max_stored_output: usize,
    /// Payload of fewer bytes travels as it is, also where digests are asked for.
    pub digest_min_bytes: usize,
    /// How late the SVM's equal output may be.
    pub compare_deadline_us: u64,
    /// How late the secondary's acknowledgement of input may be (rule 6).
    pub ack_deadline_us: u64,
    /// How long the SVM may take to consume its backlog after a resume (rule 9).
    pub lag_deadline_us: u64,
    /// How long SVM output may have no PVM counterpart.
    pub extra_deadline_us: u64,
    /// How long unequal datagrams may wait for each other's reordered counterparts.
    pub settle_us: u64,
    /// How many SVM datagrams the next PVM datagram is compared with.
    pub reorder_window: usize,
    /// First wait before input is delivered again to a guest that does not acknowledge it.
    pub redeliver_us: u64,
    /// How long a flow without traffic is remembered, in seconds.
    pub flow_idle_s: u32,
    /// The same after both ends have closed (RFC 9293 section 3.6.1: twice the segment lifetime).
    pub time_wait_s: u32,
    /// Added to the timestamp offset at a takeover, in ticks of the guest's timestamp clock
    /// (rule 3): covers what the old primary sent without the secondary knowing.
    pub takeover_ts_slack: u32,
    /// Keys the hashes of the tables, so that clients cannot choose addresses that collide. The
    /// shell draws it at random; the cores have no random source.
    pub hash_seed: u64,
    /// A mutation for tests: everything counts as equal. Output is then not protected.
    pub canary_equal: bool,
}

impl Limits {
    /// Input frames that the secondary can have at most: it stops to acknowledge above
    /// `max_input_frames`, and the primary stops to send `max_unacked_inputs` later.
    pub(crate) const fn input_capacity(&self) -> usize {
        self.max_input_frames + self.max_unacked_inputs as usize
    }

    /// History of one flow, as far as sequence numbers tell which byte is which.
    pub(crate) fn history_bytes(&self) -> u32 {
        self.max_history_bytes.min(FAR_BEHIND as usize) as u32
    }

    /// Longest record that [`crate::PrimaryPath::export_client_xlate`] makes, in bytes.
    pub const fn xlate_record_max(&self) -> usize {
        record::max_len(self.max_translations)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_flows: 65_536,
            max_translations: 65_536,
            max_held_frames: 2048,
            crossing_frames: 0,
            max_svm_frames: 4096,
            max_history_bytes: 256 * 1024,
            max_unacked_inputs: 1024,
            max_input_frames: 4096,
            max_stored_output: 4096,
            digest_min_bytes: 128,
            compare_deadline_us: 20_000,
            ack_deadline_us: 100_000,
            lag_deadline_us: 2_000_000,
            extra_deadline_us: 200_000,
            settle_us: 2_000,
            reorder_window: 4,
            redeliver_us: 50_000,
            flow_idle_s: 7200,
            time_wait_s: 120,
            takeover_ts_slack: 1000,
            hash_seed: 0,
            canary_equal: false,
        }
    }
}
