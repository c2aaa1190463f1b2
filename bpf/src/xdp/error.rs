//! Why the XDP program is not where it should be, and what to do.

use std::error::Error;
use std::io;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;

/// The XDP program could not be loaded, attached or told something.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// Not permitted.
    #[error(
        "no permission to {action} the XDP program: {source}; run as root or with CAP_BPF and \
         CAP_NET_ADMIN (before Linux 5.11 also raise RLIMIT_MEMLOCK: ulimit -l unlimited)"
    )]
    NotPermitted {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel knows no such program.
    #[error(
        "this kernel refuses to {action} the XDP program: {reason}; Linux 5.18 or later with \
         CONFIG_BPF_SYSCALL and CONFIG_XDP_SOCKETS is needed, or use a TAP device"
    )]
    Unsupported {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        reason: String,
    },
    /// No memory for the maps.
    #[error(
        "no memory to {action} the XDP program: {source}; free memory or raise the limit of \
         locked memory (ulimit -l, LimitMEMLOCK= of systemd)"
    )]
    NoMemory {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No such interface.
    #[error("interface \"{interface}\" does not exist; `ip link` lists those that do")]
    NoInterface {
        /// Its name.
        interface: String,
    },
    /// Another program is there.
    #[error(
        "another XDP program is attached to \"{interface}\"; `ip link show dev {interface}` names \
         it: stop what attached it, or name another interface"
    )]
    Occupied {
        /// Where.
        interface: String,
    },
    /// The driver cannot run XDP programs, or not as it is set up now.
    #[error(
        "the driver of \"{interface}\" cannot run the XDP program: {source}; use generic mode, or \
         see whether its MTU, queues or offloads (LRO) are in the way"
    )]
    NoDriverMode {
        /// Where.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It is already attached.
    #[error("the XDP program is attached to \"{interface}\" already")]
    Attached {
        /// Where.
        interface: String,
    },
    /// A table of the program is full, or has no such place.
    #[error("the XDP program has no room for {what}: its limit is {limit}")]
    Full {
        /// What did not fit.
        what: String,
        /// How many do.
        limit: u32,
    },
    /// The socket is not one that frames can go to.
    #[error("queue {queue}: the descriptor is not an AF_XDP socket")]
    NotAnXsk {
        /// Of which queue.
        queue: u32,
    },
    /// Any other refusal.
    #[error("cannot {action} the XDP program{at}: {reason}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// On which interface, as " on NAME".
        at: String,
        /// The kernel's or the loader's answer, with its causes.
        reason: String,
    },
}

impl XdpError {
    /// Of a step that has nothing to do with one interface.
    pub(super) fn of(action: &'static str, error: &(dyn Error + 'static)) -> Self {
        let reason = chain(error);
        let Some(errno) = errno_of(error) else {
            return Self::Refused {
                action,
                at: String::new(),
                reason,
            };
        };
        let source = io::Error::from_raw_os_error(errno);
        match errno {
            libc::EPERM | libc::EACCES => Self::NotPermitted { action, source },
            libc::ENOMEM => Self::NoMemory { action, source },
            libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP if action == "load" => {
                Self::Unsupported { action, reason }
            }
            _ => Self::Refused {
                action,
                at: String::new(),
                reason,
            },
        }
    }

    /// Of attaching to an interface.
    pub(super) fn of_attach(interface: &str, driver_mode: bool, error: &io::Error) -> Self {
        let interface = interface.to_owned();
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::of("attach", error),
            Some(libc::EBUSY | libc::EEXIST) => Self::Occupied { interface },
            Some(libc::ENODEV) => Self::NoInterface { interface },
            Some(errno) if driver_mode => Self::NoDriverMode {
                interface,
                source: io::Error::from_raw_os_error(errno),
            },
            _ => Self::Refused {
                action: "attach",
                at: format!(" on \"{interface}\""),
                reason: chain(error),
            },
        }
    }
}

/// The error and its causes in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// The kernel's answer, wherever the loader has put it.
fn errno_of(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        next = inner(error).or_else(|| error.source());
    }
    None
}

/// Transparent errors hide what they hold from `source`.
fn inner<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    if let Some(error) = error.downcast_ref::<EbpfError>() {
        return match error {
            EbpfError::MapError(e) => Some(e),
            EbpfError::ProgramError(e) => Some(e),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref::<ProgramError>() {
        return match error {
            ProgramError::SyscallError(e) => Some(&e.io_error),
            ProgramError::LoadError { io_error, .. } => Some(io_error),
            ProgramError::MapError(e) => Some(e),
            _ => None,
        };
    }
    match error.downcast_ref::<MapError>()? {
        MapError::SyscallError(e) => Some(&e.io_error),
        MapError::CreateError { io_error, .. } => Some(io_error),
        _ => None,
    }
}
