//! A second socket on a queue that has one: another kind of frames comes to it, out of the same fill ring.
//!
//! Invariants: it has neither fill nor completion nor tx ring; the chunks that come by it were given to the first socket,
//! whose owner keeps account of them; it is closed before the first socket, or the queue stays in use.
//!
//! Does not send.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use super::error::XskError;
use super::lending::Member;
use super::rings::Consumer;
use super::socket::{Rx, XskSocket, XskStatistics};
use super::sys;
use super::umem::Umem;

/// A socket that only receives.
#[derive(Debug)]
pub struct XskReceiver {
    rx: Consumer<libc::xdp_desc>,
    entries: u32,
    umem: Umem,
    member: Member,
}

impl XskReceiver {
    /// Binds one beside `first`: to its queue, on its memory. `entries` is a power of two.
    pub fn beside(first: &XskSocket, entries: u32) -> Result<Self, XskError> {
        let (interface, queue) = (first.interface(), first.queue());
        let refused = |action, source| XskError::Refused {
            action,
            interface: interface.name().to_owned(),
            queue,
            source,
        };
        let fd = sys::open_socket().map_err(XskError::NoSocket)?;
        let rx = map_rx(fd.as_fd(), entries).map_err(|e| refused("make a second rx ring", e))?;
        // The options are those of the first socket: the kernel refuses them here.
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: libc::XDP_SHARED_UMEM,
            sxdp_ifindex: interface.index(),
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: first.as_fd().as_raw_fd() as u32,
        };
        sys::bind(fd.as_fd(), &address)
            .map_err(|e| refused("bind a second AF_XDP socket (Linux 5.10 or later does)", e))?;
        let registration = first.registration().clone();
        Ok(Self {
            rx,
            entries,
            umem: first.umem().clone(),
            member: Member { fd, registration },
        })
    }

    /// Pieces that its ring holds.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Readable when a frame is waiting.
    pub fn poll_fd(&self) -> RawFd {
        self.member.fd.as_raw_fd()
    }

    /// Takes the next received piece of a frame.
    pub fn receive(&mut self) -> Option<Rx> {
        Some(self.umem.received(self.rx.pop()?))
    }

    /// Gives the entries of the received pieces back to the kernel.
    pub fn release_rx(&mut self) {
        self.rx.release();
    }

    /// What the kernel has counted since the socket was bound.
    pub fn statistics(&self) -> io::Result<XskStatistics> {
        sys::option(self.member.fd.as_fd(), libc::XDP_STATISTICS).map(XskStatistics::from_kernel)
    }
}

impl AsFd for XskReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.member.fd.as_fd()
    }
}

fn map_rx(fd: BorrowedFd<'_>, entries: u32) -> io::Result<Consumer<libc::xdp_desc>> {
    sys::set_option(fd, libc::XDP_RX_RING, &entries)?;
    let at: libc::xdp_mmap_offsets = sys::option(fd, libc::XDP_MMAP_OFFSETS)?;
    Consumer::map(fd, libc::XDP_PGOFF_RX_RING, &at.rx, entries)
}
