//! Event descriptors that a front-end hands over.
//!
//! Invariants: what is kept is an eventfd, not some other file; it does not block unless the
//! front-end, which shares its flags, changes that.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};

use vmm_sys_util::eventfd::EventFd;

/// Takes over a received descriptor.
pub(super) fn adopt(file: File) -> io::Result<EventFd> {
    let fd = file.as_raw_fd();
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}"))?;
    if target.as_os_str() != "anon_inode:[eventfd]" {
        let text = format!("{} is not an eventfd", target.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: F_GETFL on a descriptor that `file` owns takes no pointers.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above, F_SETFL.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `file` gives up the descriptor, so the eventfd is its only owner.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_eventfds_are_taken_and_they_do_not_block() {
        let blocking = EventFd::new(0).unwrap();
        // SAFETY: the clone's descriptor is given up by `into_raw_fd`.
        let file = unsafe { File::from_raw_fd(blocking.try_clone().unwrap().into_raw_fd()) };
        let adopted = adopt(file).unwrap();
        assert_eq!(
            adopted.read().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        blocking.write(3).unwrap();
        assert_eq!(adopted.read().unwrap(), 3);
        assert!(adopt(tempfile::tempfile().unwrap()).is_err());
    }
}
