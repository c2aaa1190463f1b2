//! What a page channel has counted.

/// Counts since the channel was made.
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
