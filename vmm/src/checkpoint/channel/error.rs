//! Why a page channel can't be made or can't go on.

use std::fmt;
use std::io;

use super::frame::HeaderError;

/// What was being done on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A chunk on its way to the peer.
    SendChunk,
    /// A chunk of which a part has come.
    ReceiveChunk,
    /// A checkpoint of which a part has come.
    ReceiveCheckpoint,
    /// The end of this stream, after another one has ended.
    Close,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SendChunk => "sending a chunk",
            Self::ReceiveChunk => "receiving the rest of a chunk",
            Self::ReceiveCheckpoint => "receiving the rest of a checkpoint",
            Self::Close => "waiting for the end of the stream",
        })
    }
}

/// Why a page channel can't be made or can't go on. But for [`Self::Usage`] the channel is of no
/// use afterwards.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// A setting makes no sense.
    #[error("page channel: {name} = {value}, must be {need}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// What was asked for.
        value: usize,
        /// What can be had.
        need: &'static str,
    },
    /// The kernel refuses io_uring to this process.
    #[error(
        "page channel: io_uring is not permitted (kernel.io_uring_disabled = {disabled}): \
         `sysctl kernel.io_uring_disabled=0`, or add this user to kernel.io_uring_group, \
         or let the seccomp profile pass io_uring_setup"
    )]
    NotPermitted {
        /// What the sysctl says, "?" where it can't be read.
        disabled: String,
    },
    /// The kernel is built without io_uring, or is too old.
    #[error(
        "page channel: this kernel lacks {0}; Linux 5.11 or later with CONFIG_IO_URING is needed"
    )]
    Kernel(&'static str),
    /// A step of making the ring failed.
    #[error("page channel: {what}: {source}")]
    Ring {
        /// Which one.
        what: &'static str,
        /// As the kernel said it.
        source: io::Error,
    },
    /// No memory for the buffers.
    #[error("page channel: {bytes} bytes for buffers: {source}")]
    Memory {
        /// How much.
        bytes: usize,
        /// As the kernel said it.
        source: io::Error,
    },
    /// A socket failed.
    #[error("page channel: stream {stream}, {step}: {source}")]
    Socket {
        /// Which one.
        stream: usize,
        /// Doing what.
        step: Step,
        /// As the kernel said it.
        source: io::Error,
    },
    /// The peer did not move.
    #[error("page channel: stream {stream}, {step}: nothing moved for {after_ms} ms")]
    TimedOut {
        /// Which stream.
        stream: usize,
        /// Doing what.
        step: Step,
        /// For so long.
        after_ms: u64,
    },
    /// The peer closed a stream in mid-sentence.
    #[error("page channel: stream {stream}, {step}: closed by the peer")]
    Cut {
        /// Which stream.
        stream: usize,
        /// What was open.
        step: Step,
    },
    /// What came is no header of this channel, so nothing behind it can be trusted.
    #[error("page channel: stream {stream}: {source}")]
    Header {
        /// Which stream.
        stream: usize,
        /// What is wrong.
        source: HeaderError,
    },
    /// Live pages were damaged or of an older generation: their sender believes they have arrived.
    #[error("page channel: stream {stream}: live pages {reason}")]
    Sync {
        /// Which stream.
        stream: usize,
        /// What is wrong.
        reason: String,
    },
    /// The calls came in an order that makes no sense; nothing was sent.
    #[error("page channel: {0}")]
    Usage(&'static str),
    /// Another thread ended the channel.
    #[error("page channel: ended by this host")]
    ShutDown,
}

impl ChannelError {
    /// Whether a stream is of no use any more, and another one might be: what came was damaged, or it was cut, be it alone.
    pub fn is_broken_stream(&self) -> bool {
        matches!(
            self,
            Self::Header { .. }
                | Self::Cut { .. }
                | Self::Socket { .. }
                | Self::TimedOut {
                    step: Step::Close,
                    ..
                }
        )
    }
}
