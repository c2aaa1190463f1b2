//! What a page channel has counted.

/// Counts since the channel was first made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Chunks handed to the kernel whole.
    pub sent_chunks: u64,
    /// Bytes handed to the kernel, headers included.
    pub sent_bytes: u64,
    /// Chunks received whole.
    pub received_chunks: u64,
    /// Bytes received, headers included.
    pub received_bytes: u64,
    /// Sends that took a part of what was asked for.
    pub short_sends: u64,
    /// Bytes of pages that the kernel put where they stay ([`Landings`](super::Landings)).
    pub landed_bytes: u64,
    /// Bytes of pages that came into a stream's buffer instead: there was no memory to land in, or nobody wants it.
    pub unlanded_bytes: u64,
    /// Bytes received into registered memory, whose pages the kernel need not look up.
    pub fixed_bytes: u64,
    /// Times that memory to receive into could not be registered (RLIMIT_MEMLOCK), or a receive into it was refused: it is
    /// received into all the same.
    pub unregistered_receives: u64,
    /// Receives of pages into memory that is not registered, because as much is as can be (16 GiB, or RLIMIT_MEMLOCK).
    pub receives_beyond_registered: u64,
    /// Times that the sender waited for a free buffer.
    pub buffer_waits: u64,
    /// System calls (`io_uring_enter`).
    pub enters: u64,
    /// Sends asked for without copying.
    pub zero_copy_sends: u64,
    /// Of these, the kernel said that it has copied.
    pub zero_copy_copied: u64,
    /// Streams that went over to plain sends, because the kernel copies or refuses.
    pub zero_copy_off: u64,
    /// 1 if the buffers could not be registered (RLIMIT_MEMLOCK).
    pub unregistered_buffers: u64,
    /// Chunks skipped: of a checkpoint that was aborted, damaged or complete.
    pub stale_chunks: u64,
    /// Chunks refused: of an older generation (rule 18).
    pub old_generation_chunks: u64,
    /// Chunks skipped: of a kind this build does not know, outside a checkpoint.
    pub unknown_chunks: u64,
    /// Checkpoints whose bytes or order were wrong.
    pub damaged_checkpoints: u64,
}

impl Counters {
    /// What both have counted, one after the other.
    pub(super) fn and(&self, other: &Self) -> Self {
        Self {
            sent_chunks: self.sent_chunks + other.sent_chunks,
            sent_bytes: self.sent_bytes + other.sent_bytes,
            received_chunks: self.received_chunks + other.received_chunks,
            received_bytes: self.received_bytes + other.received_bytes,
            short_sends: self.short_sends + other.short_sends,
            landed_bytes: self.landed_bytes + other.landed_bytes,
            unlanded_bytes: self.unlanded_bytes + other.unlanded_bytes,
            fixed_bytes: self.fixed_bytes + other.fixed_bytes,
            unregistered_receives: self.unregistered_receives + other.unregistered_receives,
            receives_beyond_registered: self.receives_beyond_registered
                + other.receives_beyond_registered,
            buffer_waits: self.buffer_waits + other.buffer_waits,
            enters: self.enters + other.enters,
            zero_copy_sends: self.zero_copy_sends + other.zero_copy_sends,
            zero_copy_copied: self.zero_copy_copied + other.zero_copy_copied,
            zero_copy_off: self.zero_copy_off + other.zero_copy_off,
            unregistered_buffers: self.unregistered_buffers.max(other.unregistered_buffers),
            stale_chunks: self.stale_chunks + other.stale_chunks,
            old_generation_chunks: self.old_generation_chunks + other.old_generation_chunks,
            unknown_chunks: self.unknown_chunks + other.unknown_chunks,
            damaged_checkpoints: self.damaged_checkpoints + other.damaged_checkpoints,
        }
    }
}
