//! Word from the kernel that something about the links or addresses of this network namespace has changed.
//!
//! Invariants: nothing here blocks.
//!
//! Does not say what has changed: whoever hears of it looks.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A subscription; readable when there is news.
#[derive(Debug)]
pub(super) struct Rtnetlink(OwnedFd);

impl Rtnetlink {
    /// Subscribes to links, and to IP addresses if asked.
    pub(super) fn open(addresses: bool) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: plain system call that gives a new descriptor or -1.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made by the kernel and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sockaddr_nl is plain data for which all zeroes is valid.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        let mut groups = libc::RTMGRP_LINK;
        if addresses {
            groups |= libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
        }
        address.nl_groups = groups as u32;
        // SAFETY: the kernel reads one sockaddr_nl that lives on this stack.
        let answer = unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_nl>() as libc::socklen_t,
            )
        };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(fd))
    }

    /// Throws away what has come, and gives whether anything had: that it came is all that matters.
    pub(super) fn drain(&self) -> bool {
        let mut buf = [0_u8; 4096];
        let mut news = false;
        loop {
            // SAFETY: the buffer lives on this stack and has the length given.
            let n = unsafe {
                libc::recv(
                    self.0.as_raw_fd(),
                    buf.as_mut_ptr().cast(),
                    buf.len(),
                    libc::MSG_DONTWAIT,
                )
            };
            // An overrun (ENOBUFS) is one more reason to look.
            if n <= 0 && io::Error::last_os_error().raw_os_error() != Some(libc::ENOBUFS) {
                return news;
            }
            news = true;
        }
    }

    /// Readable when there is news.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
