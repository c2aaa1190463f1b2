//! The memory that AF_XDP sockets share with the kernel (UMEM): pinned once, used by every queue.
//!
//! Invariants: the memory stays mapped as long as a [`Umem`] or a socket on it exists. The first socket registers it, all
//! others have that registration from one that is open, whether or not the first still is; where none lends it, it is
//! registered once more, which is counted.
//!
//! Does not say who uses which part of it: the kernel writes wherever a fill ring says.

use std::any::Any;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::lock::{Lock, Locked};

use super::error::XskError;
use super::lending::{Counts, Member, Registration, Sockets, UmemUse, Unbound};
use super::socket::{BindOptions, Descriptor, Received, Rx};
use super::sys;

/// The kernel keeps this much in front of each received frame.
const XDP_PACKET_HEADROOM: u32 = 256;

/// How an area is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UmemSettings {
    /// Bytes that the kernel may write from the start of a chunk: a power of two from 2048 to
    /// 4096. Also the longest piece of a frame that can be sent.
    pub chunk_bytes: u32,
    /// Chunks start anywhere, and what is sent does too.
    pub unaligned: bool,
    /// Bytes that stay free in front of each received frame, beyond the kernel's own 256.
    pub headroom_bytes: u32,
}

impl Default for UmemSettings {
    fn default() -> Self {
        Self {
            chunk_bytes: 4096,
            unaligned: true,
            headroom_bytes: 0,
        }
    }
}

/// Memory that is registered with the kernel. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct Umem {
    memory: Arc<Memory>,
}

#[derive(Debug)]
pub(super) struct Memory {
    base: usize,
    bytes: u64,
    settings: UmemSettings,
    sockets: Lock<Sockets>,
    counts: Arc<Counts>,
    /// What keeps it mapped.
    _owner: Box<dyn Any + Send + Sync>,
}

impl Umem {
    /// Registers `bytes` at `base`, which must be page-aligned, and pins its pages. `owner` is kept
    /// as long as the registration.
    ///
    /// # Safety
    ///
    /// The area is mapped readable and writable for as long as `owner` lives, and there is no
    /// reference to bytes that the kernel may write: the chunks that are handed to
    /// [`XskSocket::fill`](super::XskSocket::fill) until they come back.
    pub unsafe fn register(
        base: NonNull<u8>,
        bytes: u64,
        settings: UmemSettings,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Self, XskError> {
        // SAFETY: the caller says the same.
        unsafe { Self::register_counted(base, bytes, settings, owner, Arc::default()) }
    }

    /// The same; `counts` are those of all registrations of the owner.
    ///
    /// # Safety
    ///
    /// As for [`Self::register`].
    pub(super) unsafe fn register_counted(
        base: NonNull<u8>,
        bytes: u64,
        settings: UmemSettings,
        owner: Box<dyn Any + Send + Sync>,
        counts: Arc<Counts>,
    ) -> Result<Self, XskError> {
        let memory = Memory {
            base: base.addr().get(),
            bytes,
            settings,
            sockets: Lock::default(),
            counts,
            _owner: owner,
        };
        memory.check()?;
        let registered = memory.register(false)?;
        memory.sockets().keep(registered);
        Ok(Self {
            memory: Arc::new(memory),
        })
    }

    pub(super) fn of(memory: Arc<Memory>) -> Self {
        Self { memory }
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// How often it is registered; of a part of an [`Area`](crate::ring::Area), with all other parts of that.
    pub fn usage(&self) -> UmemUse {
        self.memory.counts.read()
    }

    /// Length of the area.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes
    }

    /// How it is cut.
    pub fn settings(&self) -> UmemSettings {
        self.memory.settings
    }

    /// The longest piece of a frame that one chunk takes.
    pub fn received_bytes_max(&self) -> u32 {
        let settings = self.memory.settings;
        settings.chunk_bytes - XDP_PACKET_HEADROOM - settings.headroom_bytes
    }

    /// Whether the kernel accepts a chunk at `offset` into a fill ring.
    pub(super) fn takes_chunk(&self, offset: u64) -> bool {
        let chunk = u64::from(self.memory.settings.chunk_bytes);
        let aligned = self.memory.settings.unaligned || offset.is_multiple_of(chunk);
        aligned && self.contains(offset, chunk)
    }

    /// Whether the kernel accepts a piece of a frame into a tx ring.
    pub(super) fn takes_piece(&self, piece: Descriptor, splits_pages: bool) -> bool {
        let (offset, len) = (piece.offset, u64::from(piece.len));
        let chunk = u64::from(self.memory.settings.chunk_bytes);
        let mut fits = len > 0 && len <= chunk && self.contains(offset, len);
        if !self.memory.settings.unaligned {
            fits &= offset % chunk + len <= chunk;
        }
        if splits_pages {
            fits &= offset % 4096 + len <= 4096;
        }
        fits
    }

    pub(super) fn contains(&self, offset: u64, len: u64) -> bool {
        offset
            .checked_add(len)
            .is_some_and(|end| end <= self.memory.bytes)
    }

    /// What the kernel's address of a received piece means: the chunk that was given, and where
    /// in the area the bytes start.
    fn place_of(&self, address: u64) -> (u64, u64) {
        if self.memory.settings.unaligned {
            let chunk = address & libc::XSK_UNALIGNED_BUF_ADDR_MASK;
            let offset = address >> libc::XSK_UNALIGNED_BUF_OFFSET_SHIFT;
            return (chunk, chunk + offset);
        }
        let chunk = u64::from(self.memory.settings.chunk_bytes);
        (address & !(chunk - 1), address)
    }

    /// A received piece of a frame, if it lies in a chunk of the area.
    pub(super) fn received(&self, descriptor: libc::xdp_desc) -> Rx {
        let more = descriptor.options & libc::XDP_PKT_CONTD != 0;
        let (chunk, offset) = self.place_of(descriptor.addr);
        let inside = self.takes_chunk(chunk)
            && self.contains(offset, u64::from(descriptor.len))
            && offset - chunk + u64::from(descriptor.len) <= u64::from(self.settings().chunk_bytes);
        if !inside {
            return Rx::Bad { more };
        }
        Rx::Piece(Received {
            chunk,
            offset,
            len: descriptor.len,
            more,
        })
    }

    /// The sockets that have it, locked until one more is bound.
    pub(super) fn sockets(&self) -> Locked<'_, Sockets> {
        self.memory.sockets()
    }

    /// A socket to bind that has registered the memory. One that has rings has them as `options` say.
    pub(super) fn open(
        &self,
        sockets: &mut Sockets,
        options: &BindOptions,
    ) -> Result<Unbound, XskError> {
        match sockets.take_kept(options) {
            Some(registered) => Ok(registered),
            None => self.memory.register(sockets.are_in_use()),
        }
    }

    /// It had to be registered although other sockets have it.
    pub(super) fn count_again(&self) {
        self.memory.counts.count_again();
    }
}

impl Memory {
    /// Whether `bytes` from its start on, cut like this, are a part of it.
    pub(super) fn covers(&self, bytes: u64, settings: UmemSettings) -> bool {
        self.settings == settings && bytes <= self.bytes
    }

    fn sockets(&self) -> Locked<'_, Sockets> {
        self.sockets.lock()
    }

    fn check(&self) -> Result<(), XskError> {
        let chunk = self.settings.chunk_bytes;
        let reason = if !self.base.is_multiple_of(4096) {
            "it does not start at a page"
        } else if !(2048..=4096).contains(&chunk) || !chunk.is_power_of_two() {
            "chunks have 2048 or 4096 bytes"
        } else if self.settings.headroom_bytes >= chunk - XDP_PACKET_HEADROOM {
            "the headroom leaves nothing of a chunk"
        } else if self.bytes < u64::from(chunk) || self.bytes > 1 << 48 {
            "it has fewer bytes than a chunk, or more than 2^48"
        } else if !self.settings.unaligned && !self.bytes.is_multiple_of(u64::from(chunk)) {
            "it is not a whole number of chunks"
        } else {
            return Ok(());
        };
        Err(self.bad(reason))
    }

    fn bad(&self, reason: &'static str) -> XskError {
        XskError::BadArea {
            address: self.base,
            bytes: self.bytes,
            reason,
        }
    }

    /// `again`: other sockets have it.
    fn register(&self, again: bool) -> Result<Unbound, XskError> {
        let fd = sys::open_socket().map_err(XskError::of_open)?;
        // SAFETY: xdp_umem_reg is plain data for which all zeroes is valid.
        let mut registration: libc::xdp_umem_reg = unsafe { std::mem::zeroed() };
        registration.addr = self.base as u64;
        registration.len = self.bytes;
        registration.chunk_size = self.settings.chunk_bytes;
        registration.headroom = self.settings.headroom_bytes;
        if self.settings.unaligned {
            registration.flags = libc::XDP_UMEM_UNALIGNED_CHUNK_FLAG;
        }
        sys::set_option(fd.as_fd(), libc::XDP_UMEM_REG, &registration)
            .map_err(|e| self.register_error(e, again))?;
        let registration = Registration::new(self.bytes, &self.counts);
        Ok(Unbound {
            member: Member { fd, registration },
            rings: None,
        })
    }

    fn register_error(&self, source: io::Error, again: bool) -> XskError {
        match source.raw_os_error() {
            Some(libc::EFAULT) => self.bad("it is not mapped for writing"),
            Some(libc::EINVAL) => self.bad("the kernel does not cut it so (Linux 5.4 or later)"),
            _ => XskError::LockedMemory {
                bytes: self.bytes,
                again,
                source,
            },
        }
    }
}
