//! Why there is no AF_XDP socket, and what to do.

use std::io;

use super::interface::InterfaceError;

/// An AF_XDP socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum XskError {
    /// Built without CONFIG_XDP_SOCKETS.
    #[error(
        "this kernel has no AF_XDP (CONFIG_XDP_SOCKETS): a guest needs a TAP device (net.tap) here, the link's packets go \
         over TCP or UDP (replication.packets)"
    )]
    NoAfXdp,
    /// Not permitted.
    #[error("no permission for AF_XDP sockets: {0}; run as root or with CAP_NET_RAW")]
    NotPermitted(#[source] io::Error),
    /// No socket at all, for another reason.
    #[error("cannot open an AF_XDP socket: {0}")]
    NoSocket(#[source] io::Error),
    /// The memory does not suit.
    #[error("{bytes} bytes at {address:#x} cannot hold frames: {reason}")]
    BadArea {
        /// Where it starts.
        address: usize,
        /// How long it is.
        bytes: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The pages cannot be pinned.
    #[error(
        "{} MiB cannot be locked into memory for AF_XDP{}: {source}; give CAP_IPC_LOCK, or raise \
         RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK= of systemd), or lower vm.ram_mib",
        bytes >> 20, how_often(*again)
    )]
    LockedMemory {
        /// How much was wanted.
        bytes: u64,
        /// Other sockets have the same memory and could not lend it.
        again: bool,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A ring of a size that no ring has.
    #[error("the {ring} ring cannot have {entries} entries: use a power of two up to 32768")]
    BadRing {
        /// Which.
        ring: &'static str,
        /// How many were wanted.
        entries: u32,
    },
    /// The interface cannot be used at all.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// No such queue.
    #[error(
        "\"{interface}\" has no queue {queue}, only {queues}; `ethtool -l {interface}` shows them, \
         `ethtool -L` changes their number"
    )]
    NoQueue {
        /// Where.
        interface: String,
        /// Which was wanted.
        queue: u32,
        /// How many there are.
        queues: u32,
    },
    /// Another AF_XDP socket has the queue.
    #[error(
        "queue {queue} of \"{interface}\" is in use by another AF_XDP socket; stop that program \
         (`ss --xdp -p` names it), or name another interface"
    )]
    Busy {
        /// Where.
        interface: String,
        /// Which queue.
        queue: u32,
    },
    /// The driver copies.
    #[error(
        "the driver of \"{interface}\" has no zero-copy AF_XDP on queue {queue}: {source}; use \
         copy mode"
    )]
    NoZeroCopy {
        /// Where.
        interface: String,
        /// Which queue.
        queue: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No frames in several buffers.
    #[error(
        "queue {queue} of \"{interface}\": this kernel or driver does not take AF_XDP frames in \
         several buffers (Linux 6.6 or later does); bind without"
    )]
    NoMultiBuffer {
        /// Where.
        interface: String,
        /// Which queue.
        queue: u32,
    },
    /// The interface is down.
    #[error("\"{interface}\" is down; `ip link set {interface} up`")]
    Down {
        /// Which.
        interface: String,
    },
    /// Any other refusal.
    #[error("cannot {action} for queue {queue} of \"{interface}\": {source}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// Where.
        interface: String,
        /// Which queue.
        queue: u32,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl XskError {
    pub(super) fn of_open(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(error),
            Some(libc::EAFNOSUPPORT | libc::ESOCKTNOSUPPORT) => Self::NoAfXdp,
            _ => Self::NoSocket(error),
        }
    }
}

fn how_often(again: bool) -> &'static str {
    match again {
        false => ", once for all queues that use it",
        true => " once more, because sockets that have it cannot share it",
    }
}
