//! What ends a stand-in: every error names the socket, and the byte position where there is one.

use std::io;

/// What can go wrong. Nothing is released on the way out.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    /// An address that names no socket.
    #[error(
        "{address:?} is no socket address: {reason}; use [listen:|connect:]PATH or [listen:|connect:]HOST:PORT"
    )]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A socket that cannot be had.
    #[error("{socket}: cannot {what}: {source}")]
    Open {
        /// Which one: its part and its address.
        socket: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Reading failed.
    #[error("{socket}: reading at byte {at}: {source}")]
    Read {
        /// Which socket.
        socket: String,
        /// Bytes of the stream before it.
        at: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Writing failed; most often the other end has gone.
    #[error("{socket}: writing at byte {at}: {source}; is its reader gone?")]
    Write {
        /// Which socket.
        socket: String,
        /// Bytes of the stream before it.
        at: u64,
        /// What the system said.
        source: io::Error,
    },
    /// A message without a frame, or longer than any frame: the two ends disagree about the format.
    #[error(
        "{socket}: a message of {found} bytes at byte {at}; a frame has 1 to {most} (does --vnet-hdr fit the other end?)"
    )]
    Length {
        /// Which socket.
        socket: String,
        /// Bytes of the stream before the message.
        at: u64,
        /// The length it says it has.
        found: u32,
        /// The longest that is taken.
        most: u32,
    },
    /// A virtio-net header that leaves no room for a frame.
    #[error(
        "{socket}: a virtio-net header of {found} bytes in a message of {len} at byte {at} (does --vnet-hdr fit the other end?)"
    )]
    VnetHeader {
        /// Which socket.
        socket: String,
        /// Bytes of the stream before the message.
        at: u64,
        /// The header's length.
        found: u32,
        /// The message's length.
        len: u32,
    },
    /// The stream ended within a message.
    #[error("{socket}: the stream ended within a message at byte {at}, after {have} of its bytes")]
    Truncated {
        /// Which socket.
        socket: String,
        /// Bytes of the stream before the message.
        at: u64,
        /// How much of the message came, length fields included.
        have: usize,
    },
    /// Nobody is left to say that a checkpoint was taken.
    #[error(
        "{socket}: closed by its other end while a checkpoint is due; output is held and can never leave"
    )]
    NotifyGone {
        /// Which socket.
        socket: String,
    },
    /// Waiting for the sockets failed.
    #[error("waiting for the sockets: {0}")]
    Wait(io::Error),
    /// The comparator refused a message.
    #[error(transparent)]
    Core(#[from] colo_compare::PathError),
}
