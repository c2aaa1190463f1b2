//! How a page channel works, and what can't be.

use std::time::Duration;

use super::error::ChannelError;

/// Streams that a channel has at most.
pub const STREAMS_MAX: usize = 16;
/// Bytes of a chunk's payload if nothing else is asked for.
pub const CHUNK_BYTES: usize = 256 << 10;
const CHUNK_BYTES_MIN: usize = 4096;
const CHUNK_BYTES_MAX: usize = 4 << 20;

/// How a channel works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of payload of a chunk at most; the same on both hosts.
    pub chunk_bytes: usize,
    /// Chunks that are under way at most, more than streams. What does not fit a cache is copied twice from memory.
    pub send_buffers: usize,
    /// How long a peer may stand still.
    pub timeout: Duration,
    /// Send without copying where the kernel does not copy all the same.
    pub zero_copy: bool,
    /// The generation that is known at the start (rule 18).
    pub generation: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            chunk_bytes: CHUNK_BYTES,
            send_buffers: 16,
            timeout: Duration::from_secs(5),
            zero_copy: true,
            generation: 0,
        }
    }
}

/// Refuses by name what makes no sense.
pub(super) fn check(streams: usize, settings: &Settings) -> Result<(), ChannelError> {
    let need = |good: bool, name, value, need| match good {
        true => Ok(()),
        false => Err(ChannelError::Setting { name, value, need }),
    };
    let chunk = settings.chunk_bytes;
    need(
        (1..=STREAMS_MAX).contains(&streams),
        "streams",
        streams,
        "1 to 16",
    )?;
    let fits = (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk);
    need(fits, "chunk_bytes", chunk, "4 KiB to 4 MiB")?;
    let buffers = settings.send_buffers;
    let enough = (streams + 1..=1024).contains(&buffers);
    need(
        enough,
        "send_buffers",
        buffers,
        "more than streams, at most 1024",
    )?;
    let timeout_ms = settings.timeout.as_millis() as usize;
    need(timeout_ms > 0, "timeout_ms", timeout_ms, "at least 1")
}
