//! Attaches classic programs to TAP devices and sockets.
//!
//! Invariants: the kernel copies the program during the call, so nothing outlives it.
//!
//! Does not keep or close the descriptors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_ulong, c_void, sock_filter, sock_fprog};

/// `_IOW('T', 213, struct sock_fprog)`
const TUNATTACHFILTER: c_ulong = 0x4010_54d5;
/// `_IOW('T', 214, struct sock_fprog)`
const TUNDETACHFILTER: c_ulong = 0x4010_54d6;

/// The kernel refused a filter.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// More instructions than a `sock_fprog` can count.
    #[error("packet filter of {0} instructions is longer than the kernel's limit")]
    TooLong(usize),
    /// The system call failed.
    #[error("the kernel refused to {action} the packet filter: {source}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Filters what the TAP device hands to its reader (the host side of the guest's NIC).
pub fn attach_to_tap(tap: BorrowedFd<'_>, program: &[sock_filter]) -> Result<(), AttachError> {
    let mut fprog = fprog_of(program)?;
    tap_ioctl(tap, TUNATTACHFILTER, &raw mut fprog, "attach")
}

/// Takes the filter of a TAP device off again.
pub fn detach_from_tap(tap: BorrowedFd<'_>) -> Result<(), AttachError> {
    let mut fprog = fprog_of(&[])?;
    tap_ioctl(tap, TUNDETACHFILTER, &raw mut fprog, "detach")
}

/// Filters what a socket receives (`SO_ATTACH_FILTER`).
pub fn attach_to_socket(
    socket: BorrowedFd<'_>,
    program: &[sock_filter],
) -> Result<(), AttachError> {
    let fprog = fprog_of(program)?;
    // SAFETY: the option value is a live sock_fprog of the given size whose filter pointer stays
    // valid during the call; the kernel only reads it.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const fprog).cast::<c_void>(),
            size_of::<sock_fprog>() as libc::socklen_t,
        )
    };
    refused_if(answer < 0, "attach")
}

fn fprog_of(program: &[sock_filter]) -> Result<sock_fprog, AttachError> {
    let len = u16::try_from(program.len()).map_err(|_| AttachError::TooLong(program.len()))?;
    Ok(sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    })
}

fn tap_ioctl(
    tap: BorrowedFd<'_>,
    request: c_ulong,
    fprog: *mut sock_fprog,
    action: &'static str,
) -> Result<(), AttachError> {
    // SAFETY: both requests take a sock_fprog that the caller keeps alive; the kernel only reads.
    let answer = unsafe { libc::ioctl(tap.as_raw_fd(), request, fprog) };
    refused_if(answer < 0, action)
}

fn refused_if(failed: bool, action: &'static str) -> Result<(), AttachError> {
    if failed {
        return Err(AttachError::Refused {
            action,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}
