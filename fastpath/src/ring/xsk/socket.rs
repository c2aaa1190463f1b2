//! An AF_XDP socket on one queue of an interface.
//!
//! Invariants: entries reach the kernel only by `submit_*`, and their slots only by `release_*`, so
//! one index is written for a whole batch; a descriptor that the kernel would swallow is refused
//! here.
//!
//! Does not wait: who waits polls the descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use tracing::warn;

use super::error::XskError;
use super::interface::Interface;
use super::lending::{Member, Registration, Sockets, Unbound};
use super::rings::{Consumer, Producer};
use super::sys;
use super::umem::Umem;

/// Largest ring: more entries only hold more frames for longer.
const RING_ENTRIES_MAX: u32 = 32768;

/// Of `linux/if_xdp.h`: frames that one system call sends in copy mode at most.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// Who moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// The NIC, straight to and from the area. The driver must support it.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

/// How a socket is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindOptions {
    /// Who moves the bytes.
    pub copy_mode: CopyMode,
    /// The kernel says when it must be woken, instead of looking by itself.
    pub need_wakeup: bool,
    /// Frames may be in several buffers (XDP_USE_SG, Linux 6.6).
    pub multi_buffer: bool,
    /// Entries of the fill ring.
    pub fill_entries: u32,
    /// Entries of the completion ring; at least as many as the tx ring has.
    pub completion_entries: u32,
    /// Entries of the rx ring.
    pub rx_entries: u32,
    /// Entries of the tx ring.
    pub tx_entries: u32,
}

impl Default for BindOptions {
    fn default() -> Self {
        Self {
            copy_mode: CopyMode::Copy,
            need_wakeup: true,
            multi_buffer: true,
            fill_entries: 2048,
            completion_entries: 2048,
            rx_entries: 2048,
            tx_entries: 2048,
        }
    }
}

impl BindOptions {
    fn entries(&self) -> [u32; 4] {
        [
            self.fill_entries,
            self.completion_entries,
            self.rx_entries,
            self.tx_entries,
        ]
    }

    fn check(&self) -> Result<(), XskError> {
        for (ring, entries) in ["fill", "completion", "rx", "tx"]
            .into_iter()
            .zip(self.entries())
        {
            if !entries.is_power_of_two() || entries > RING_ENTRIES_MAX {
                return Err(XskError::BadRing { ring, entries });
            }
        }
        Ok(())
    }

    fn flags(&self) -> u16 {
        let mut flags = match self.copy_mode {
            CopyMode::ZeroCopy => libc::XDP_ZEROCOPY,
            CopyMode::Copy => libc::XDP_COPY,
        };
        if self.need_wakeup {
            flags |= libc::XDP_USE_NEED_WAKEUP;
        }
        if self.multi_buffer {
            flags |= libc::XDP_USE_SG;
        }
        flags
    }
}

/// A piece of a frame to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Where it starts, from the start of the area.
    pub offset: u64,
    /// Its length.
    pub len: u32,
    /// Another piece of the same frame follows.
    pub more: bool,
}

/// The kernel would not take this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at offset {offset:#x} are not a piece of the shared area")]
pub struct BadDescriptor {
    /// Where it starts.
    pub offset: u64,
    /// Its length.
    pub len: u32,
}

/// A received piece of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The offset under which the chunk was given to [`XskSocket::fill`].
    pub chunk: u64,
    /// Where the bytes start, from the start of the area.
    pub offset: u64,
    /// How many there are.
    pub len: u32,
    /// Another piece of the same frame follows.
    pub more: bool,
}

/// What the rx ring gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rx {
    /// A piece of a frame, inside the area.
    Piece(Received),
    /// A place outside the area: the frame that it is a piece of must not be used.
    Bad {
        /// Another piece of the same frame follows.
        more: bool,
    },
}

/// What a system call for the tx ring came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// The kernel has looked at the ring.
    Done,
    /// It has not got through (EAGAIN, ENOBUFS): reap completions, then kick again.
    Again,
    /// It has thrown the frame away whose turn it was (EBUSY): no carrier, or no room behind the interface. The rest waits.
    Dropped,
    /// The interface is down or gone (ENETDOWN, ENXIO, ENODEV): what is in the ring stays there.
    Down,
}

/// The kernel's counters of a socket (XDP_STATISTICS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XskStatistics {
    /// Received frames dropped for other reasons.
    pub rx_dropped: u64,
    /// Received frames dropped because the rx ring was full.
    pub rx_ring_full: u64,
    /// Received frames dropped because the fill ring was empty.
    pub fill_ring_empty: u64,
    /// Entries of the fill ring that the kernel did not accept.
    pub rx_invalid: u64,
    /// Entries of the tx ring that the kernel did not accept.
    pub tx_invalid: u64,
    /// Times that the tx ring had nothing to send.
    pub tx_ring_empty: u64,
}

impl XskStatistics {
    pub(super) fn from_kernel(counted: libc::xdp_statistics) -> Self {
        Self {
            rx_dropped: counted.rx_dropped,
            rx_ring_full: counted.rx_ring_full,
            fill_ring_empty: counted.rx_fill_ring_empty_descs,
            rx_invalid: counted.rx_invalid_descs,
            tx_invalid: counted.tx_invalid_descs,
            tx_ring_empty: counted.tx_ring_empty_descs,
        }
    }
}

/// A bound socket.
#[derive(Debug)]
pub struct XskSocket {
    rings: Rings,
    zero_copy: bool,
    umem: Umem,
    interface: Interface,
    queue: u32,
    member: Arc<Member>,
}

/// Where a socket is to be bound, and how.
struct Wish<'a> {
    interface: &'a Interface,
    queue: u32,
    options: &'a BindOptions,
}

impl XskSocket {
    /// Binds a socket to `queue` of `interface`, on the registration of another socket of the memory if one lends it. The
    /// kernel lets go of a queue only a little after its socket is closed: [`XskError::Busy`] within a second of that is
    /// worth another try.
    pub fn bind(
        umem: &Umem,
        interface: &Interface,
        queue: u32,
        options: &BindOptions,
    ) -> Result<Self, XskError> {
        options.check()?;
        let wish = Wish {
            interface,
            queue,
            options,
        };
        let mut sockets = umem.sockets();
        if sockets.have(interface.index(), queue) {
            return Err(wish.error(io::Error::from_raw_os_error(libc::EBUSY)));
        }
        let lent = wish.borrow(&sockets)?;
        let (member, rings, multi_buffer) = match lent {
            Some(lent) => lent,
            None => wish.register(umem, &mut sockets)?,
        };
        let active: libc::xdp_options = sys::option(member.fd.as_fd(), libc::XDP_OPTIONS)
            .map_err(|e| wish.refused("read the AF_XDP options", e))?;
        let member = Arc::new(member);
        let had = BindOptions {
            multi_buffer,
            ..*options
        };
        sockets.bound(&member, interface.index(), queue, had);
        drop(sockets);
        Ok(Self {
            rings,
            zero_copy: active.flags & libc::XDP_OPTIONS_ZEROCOPY != 0,
            umem: umem.clone(),
            interface: interface.clone(),
            queue,
            member,
        })
    }

    /// The interface it was bound to.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    pub(super) fn umem(&self) -> &Umem {
        &self.umem
    }

    pub(super) fn registration(&self) -> &Arc<Registration> {
        &self.member.registration
    }

    /// The queue it was bound to.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// Whether the NIC itself reads and writes the area. Then no piece of a frame to send may cross
    /// a border of 4096 bytes, because pages that follow each other here do not for the NIC.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Readable when a frame is waiting, writable when one can be sent.
    pub fn poll_fd(&self) -> RawFd {
        self.member.fd.as_raw_fd()
    }

    /// How many chunks the fill ring takes; looks at the kernel's side when it knows of fewer than
    /// `wanted`.
    pub fn fill_free(&mut self, wanted: u32) -> u32 {
        self.rings.fill.free(wanted)
    }

    /// Gives the kernel the chunk at `offset` to receive into, `Ok(false)` when there is no room.
    pub fn fill(&mut self, offset: u64) -> Result<bool, BadDescriptor> {
        if !self.umem.takes_chunk(offset) {
            return Err(BadDescriptor {
                offset,
                len: self.umem.settings().chunk_bytes,
            });
        }
        Ok(self.rings.fill.push(offset))
    }

    /// Publishes the chunks given.
    pub fn submit_fill(&mut self) {
        self.rings.fill.submit();
    }

    /// Whether the kernel must be told that there are chunks, by [`XskSocket::wake_rx`] or a poll.
    pub fn fill_needs_wakeup(&self) -> bool {
        self.rings.fill.wakeup_wanted()
    }

    /// Takes the next received piece of a frame.
    pub fn receive(&mut self) -> Option<Rx> {
        Some(self.umem.received(self.rings.rx.pop()?))
    }

    /// Gives the entries of the received pieces back to the kernel.
    pub fn release_rx(&mut self) {
        self.rings.rx.release();
    }

    /// How many pieces the tx ring takes; looks at the kernel's side when it knows of fewer than
    /// `wanted`.
    pub fn tx_free(&mut self, wanted: u32) -> u32 {
        self.rings.tx.free(wanted)
    }

    /// Queues a piece of a frame, `Ok(false)` when there is no room. See to room for the whole
    /// frame first: the kernel waits for the last piece. The bytes are the kernel's until
    /// [`XskSocket::complete`] gives the offset back, one for each piece, in order within a frame.
    pub fn send(&mut self, piece: Descriptor) -> Result<bool, BadDescriptor> {
        if !self.umem.takes_piece(piece, self.zero_copy) {
            return Err(BadDescriptor {
                offset: piece.offset,
                len: piece.len,
            });
        }
        let options = if piece.more { libc::XDP_PKT_CONTD } else { 0 };
        Ok(self.rings.tx.push(libc::xdp_desc {
            addr: piece.offset,
            len: piece.len,
            options,
        }))
    }

    /// Pieces that are queued and not submitted.
    pub fn tx_unsubmitted(&self) -> u32 {
        self.rings.tx.unsubmitted()
    }

    /// Pieces that the kernel has not taken yet.
    pub fn tx_pending(&mut self) -> u32 {
        self.rings.tx.pending()
    }

    /// Publishes the pieces queued.
    pub fn submit_tx(&mut self) {
        self.rings.tx.submit();
    }

    /// Whether [`XskSocket::kick_tx`] is needed for what was submitted. Always so in copy mode.
    pub fn tx_needs_wakeup(&self) -> bool {
        self.rings.tx.wakeup_wanted()
    }

    /// Takes the next offset that was sent from and is ours again. Of a frame's first piece bit 0
    /// may be lost on the way (Linux 6.18 keeps a mark of its own there in copy mode): start frames
    /// at even offsets, or know them by the chunk.
    pub fn complete(&mut self) -> Option<u64> {
        self.rings.completion.pop()
    }

    /// Gives the entries of the completed pieces back to the kernel.
    pub fn release_completions(&mut self) {
        self.rings.completion.release();
    }

    /// Makes the kernel look at the tx ring. In copy mode one call sends 32 frames before Linux 6.17,
    /// later what the ring holds.
    pub fn kick_tx(&self) -> io::Result<Kick> {
        outcome(sys::send_nothing(self.member.fd.as_fd()))
    }

    /// Makes the kernel look at the fill ring.
    pub fn wake_rx(&self) -> io::Result<Kick> {
        outcome(sys::receive_nothing(self.member.fd.as_fd()))
    }

    /// What the kernel has counted since the socket was bound.
    pub fn statistics(&self) -> io::Result<XskStatistics> {
        sys::option(self.member.fd.as_fd(), libc::XDP_STATISTICS).map(XskStatistics::from_kernel)
    }
}

impl AsFd for XskSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.member.fd.as_fd()
    }
}

/// The rings of a socket.
#[derive(Debug)]
pub(super) struct Rings {
    entries: [u32; 4],
    rx: Consumer<libc::xdp_desc>,
    tx: Producer<libc::xdp_desc>,
    fill: Producer<u64>,
    completion: Consumer<u64>,
}

impl Rings {
    pub(super) fn are_as(&self, options: &BindOptions) -> bool {
        self.entries == options.entries()
    }

    fn set_up(fd: BorrowedFd<'_>, options: &BindOptions) -> io::Result<Self> {
        let (fill, completion) = (options.fill_entries, options.completion_entries);
        sys::set_option(fd, libc::XDP_RX_RING, &options.rx_entries)?;
        sys::set_option(fd, libc::XDP_TX_RING, &options.tx_entries)?;
        sys::set_option(fd, libc::XDP_UMEM_FILL_RING, &fill)?;
        sys::set_option(fd, libc::XDP_UMEM_COMPLETION_RING, &completion)?;
        let at: libc::xdp_mmap_offsets = sys::option(fd, libc::XDP_MMAP_OFFSETS)?;
        let fill_at = libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t;
        let completion_at = libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t;
        // One system call for a whole ring instead of 32 frames, from Linux 6.17 on.
        let _ = sys::set_option(fd, XDP_MAX_TX_SKB_BUDGET, &options.tx_entries);
        Ok(Self {
            entries: options.entries(),
            rx: Consumer::map(fd, libc::XDP_PGOFF_RX_RING, &at.rx, options.rx_entries)?,
            tx: Producer::map(fd, libc::XDP_PGOFF_TX_RING, &at.tx, options.tx_entries)?,
            fill: Producer::map(fd, fill_at, &at.fr, fill)?,
            completion: Consumer::map(fd, completion_at, &at.cr, completion)?,
        })
    }
}

/// A socket that is bound, its rings, and whether it has frames in several buffers.
type Opened = (Member, Rings, bool);

impl Wish<'_> {
    /// On the registration of a socket that lends it. `None`: none does, or the kernel does not let it.
    fn borrow(&self, sockets: &Sockets) -> Result<Option<Opened>, XskError> {
        for (lender, multi_buffer) in sockets.lenders(self.interface.index(), self.options) {
            let fd = sys::open_socket().map_err(XskError::of_open)?;
            let rings = self.set_up(fd.as_fd())?;
            // The kernel takes no flags: they are those of the lender.
            match self.bind_with(fd.as_fd(), libc::XDP_SHARED_UMEM, Some(&lender)) {
                Ok(()) => {
                    let registration = lender.registration.clone();
                    return Ok(Some((Member { fd, registration }, rings, multi_buffer)));
                }
                Err(e) => {
                    // The lender's interface is gone, or before Linux 5.10 is not this queue of this interface.
                    let may_be_lender =
                        matches!(e.raw_os_error(), Some(libc::EBADF | libc::EINVAL));
                    let error = self.error(e);
                    if !may_be_lender || matches!(error, XskError::NoQueue { .. }) {
                        return Err(error);
                    }
                }
            }
        }
        Ok(None)
    }

    /// On a registration of its own, for others to share.
    fn register(&self, umem: &Umem, sockets: &mut Sockets) -> Result<Opened, XskError> {
        let is_again = sockets.are_in_use();
        let Unbound { member, rings } = umem.open(sockets, self.options)?;
        let rings = match rings {
            Some(rings) => rings,
            None => self.set_up(member.fd.as_fd())?,
        };
        if let Err(e) = self.bind_with(member.fd.as_fd(), self.options.flags(), None) {
            let rings = Some(rings);
            sockets.keep(Unbound { member, rings });
            return Err(self.error(e));
        }
        if is_again {
            umem.count_again();
            let (name, queue, mib) = (self.interface.name(), self.queue, umem.bytes() >> 20);
            warn!(
                "{name}, queue {queue}: {mib} MiB are registered once more with AF_XDP: no socket that has them can share them"
            );
        }
        Ok((member, rings, self.options.multi_buffer))
    }

    fn set_up(&self, fd: BorrowedFd<'_>) -> Result<Rings, XskError> {
        let rings = Rings::set_up(fd, self.options);
        rings.map_err(|e| self.refused("make AF_XDP rings", e))
    }

    fn bind_with(
        &self,
        fd: BorrowedFd<'_>,
        sxdp_flags: u16,
        lender: Option<&Member>,
    ) -> io::Result<()> {
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags,
            sxdp_ifindex: self.interface.index(),
            sxdp_queue_id: self.queue,
            sxdp_shared_umem_fd: lender.map_or(0, |lender| lender.fd.as_raw_fd() as u32),
        };
        sys::bind(fd, &address)
    }

    fn refused(&self, action: &'static str, source: io::Error) -> XskError {
        XskError::Refused {
            action,
            interface: self.interface.name().to_owned(),
            queue: self.queue,
            source,
        }
    }

    /// Why it could not be bound.
    fn error(&self, source: io::Error) -> XskError {
        let (queue, name) = (self.queue, self.interface.name().to_owned());
        let zero_copy = self.options.copy_mode == CopyMode::ZeroCopy;
        let queues = || self.interface.rx_queues();
        match source.raw_os_error() {
            Some(libc::ENODEV) => super::InterfaceError::Missing(name).into(),
            Some(libc::ENETDOWN) => XskError::Down { interface: name },
            Some(libc::EBUSY) => XskError::Busy {
                interface: name,
                queue,
            },
            Some(libc::EPERM | libc::EACCES) => XskError::NotPermitted(source),
            Some(libc::EINVAL) if queues().is_ok_and(|queues| queue >= queues) => {
                XskError::NoQueue {
                    queues: queues().unwrap_or(0),
                    interface: name,
                    queue,
                }
            }
            Some(libc::EINVAL | libc::EOPNOTSUPP) if zero_copy => XskError::NoZeroCopy {
                interface: name,
                queue,
                source,
            },
            Some(libc::EINVAL | libc::EOPNOTSUPP) if self.options.multi_buffer => {
                XskError::NoMultiBuffer {
                    interface: name,
                    queue,
                }
            }
            _ => self.refused("bind an AF_XDP socket", source),
        }
    }
}

fn outcome(result: io::Result<()>) -> io::Result<Kick> {
    let Err(e) = result else {
        return Ok(Kick::Done);
    };
    match e.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR) => Ok(Kick::Again),
        Some(libc::EBUSY) => Ok(Kick::Dropped),
        Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV) => Ok(Kick::Down),
        _ => Err(e),
    }
}
