//! What addresses a NIC receives for, besides its own.
//!
//! Invariants: the NIC goes back to its own when the [`Membership`] is dropped or the process ends.
//!
//! Does not receive anything: the packet socket has no protocol.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use colo_bpf::Mac;

/// Addresses that a NIC was told to receive for (rule 24).
#[derive(Debug)]
pub(super) struct Membership {
    fd: OwnedFd,
    index: u32,
}

impl Membership {
    /// Makes the interface receive for these addresses and for every multicast group, or for
    /// everybody.
    pub(super) fn join(index: u32, macs: &[Mac], everybody: bool) -> io::Result<Self> {
        // SAFETY: plain system call that gives a new descriptor or -1.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made by the kernel and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let membership = Self { fd, index };
        if everybody {
            membership.add_everybody()?;
            return Ok(membership);
        }
        membership.add(libc::PACKET_MR_ALLMULTI, None)?;
        for mac in macs {
            membership.add_mac(*mac)?;
        }
        Ok(membership)
    }

    /// Adds one address. A NIC that has no room for it receives everything.
    pub(super) fn add_mac(&self, mac: Mac) -> io::Result<()> {
        self.add(libc::PACKET_MR_UNICAST, Some(mac))
            .or_else(|_| self.add_everybody())
    }

    /// Receives everything.
    pub(super) fn add_everybody(&self) -> io::Result<()> {
        self.add(libc::PACKET_MR_PROMISC, None)
    }

    fn add(&self, kind: libc::c_int, mac: Option<Mac>) -> io::Result<()> {
        let mut address = [0; 8];
        if let Some(mac) = mac {
            address[..6].copy_from_slice(&mac);
        }
        let request = libc::packet_mreq {
            mr_ifindex: self.index as libc::c_int,
            mr_type: kind as libc::c_ushort,
            mr_alen: if mac.is_some() { 6 } else { 0 },
            mr_address: address,
        };
        // SAFETY: the kernel reads one packet_mreq that lives on this stack.
        let answer = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_ADD_MEMBERSHIP,
                (&raw const request).cast(),
                size_of::<libc::packet_mreq>() as libc::socklen_t,
            )
        };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
