//! The memory that AF_XDP sockets share with the kernel (UMEM): pinned once, used by every queue.
//!
//! Invariants: the area stays mapped as long as a [`Umem`] or a socket on it exists; sockets that
//! share it were bound with the same options (a rule of the kernel).
//!
//! Does not say who uses which part of the area: the kernel writes wherever a fill ring says.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use crate::lock::{Lock, Locked};

use super::error::XskError;
use super::socket::{BindOptions, Descriptor, Received, Rings, Rx};
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

/// An area of memory, registered with the kernel. Clones are the same registration.
#[derive(Clone, Debug)]
pub struct Umem {
    area: Arc<Area>,
}

#[derive(Debug)]
struct Area {
    base: usize,
    bytes: u64,
    settings: UmemSettings,
    sockets: Lock<Sockets>,
    /// What keeps the area mapped.
    _owner: Box<dyn Any + Send + Sync>,
}

/// The kernel knows an area by the sockets that use it.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// Registered, and not bound to a queue yet. Registering pins every page, so it is kept when a
    /// queue cannot be had.
    registered: Option<Unbound>,
    bound: Vec<Bound>,
    options: Option<BindOptions>,
}

/// A socket that is not bound.
#[derive(Debug)]
pub(super) struct Unbound {
    pub(super) fd: OwnedFd,
    /// Its rings, if it has them: it cannot get others.
    pub(super) rings: Option<Rings>,
}

#[derive(Debug)]
struct Bound {
    fd: Weak<OwnedFd>,
    interface_index: u32,
    queue: u32,
}

/// What a socket is to be bound through.
pub(super) enum Place {
    /// Its own registration of the area.
    First,
    /// The registration of a socket on another queue.
    Shared(Arc<OwnedFd>),
    /// A socket of the same queue, whose fill and completion rings serve both.
    SameQueue(Arc<OwnedFd>),
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
        let area = Area {
            base: base.addr().get(),
            bytes,
            settings,
            sockets: Lock::default(),
            _owner: owner,
        };
        area.check()?;
        let fd = area.register()?;
        area.sockets().registered = Some(Unbound { fd, rings: None });
        Ok(Self {
            area: Arc::new(area),
        })
    }

    /// Length of the area.
    pub fn bytes(&self) -> u64 {
        self.area.bytes
    }

    /// How it is cut.
    pub fn settings(&self) -> UmemSettings {
        self.area.settings
    }

    /// The longest piece of a frame that one chunk takes.
    pub fn received_bytes_max(&self) -> u32 {
        let settings = self.area.settings;
        settings.chunk_bytes - XDP_PACKET_HEADROOM - settings.headroom_bytes
    }

    /// Whether the kernel accepts a chunk at `offset` into a fill ring.
    pub(super) fn takes_chunk(&self, offset: u64) -> bool {
        let chunk = u64::from(self.area.settings.chunk_bytes);
        let aligned = self.area.settings.unaligned || offset.is_multiple_of(chunk);
        aligned && self.contains(offset, chunk)
    }

    /// Whether the kernel accepts a piece of a frame into a tx ring.
    pub(super) fn takes_piece(&self, piece: Descriptor, splits_pages: bool) -> bool {
        let (offset, len) = (piece.offset, u64::from(piece.len));
        let chunk = u64::from(self.area.settings.chunk_bytes);
        let mut fits = len > 0 && len <= chunk && self.contains(offset, len);
        if !self.area.settings.unaligned {
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
            .is_some_and(|end| end <= self.area.bytes)
    }

    /// What the kernel's address of a received piece means: the chunk that was given, and where
    /// in the area the bytes start.
    fn place_of(&self, address: u64) -> (u64, u64) {
        if self.area.settings.unaligned {
            let chunk = address & libc::XSK_UNALIGNED_BUF_ADDR_MASK;
            let offset = address >> libc::XSK_UNALIGNED_BUF_OFFSET_SHIFT;
            return (chunk, chunk + offset);
        }
        let chunk = u64::from(self.area.settings.chunk_bytes);
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

    /// The sockets of the area, locked until one more is bound.
    pub(super) fn sockets(&self) -> Locked<'_, Sockets> {
        self.area.sockets()
    }

    /// A socket to bind at `place`; one that has rings has them as `options` say.
    pub(super) fn open(
        &self,
        sockets: &mut Sockets,
        place: &Place,
        options: &BindOptions,
    ) -> Result<Unbound, XskError> {
        if !matches!(place, Place::First) {
            let fd = sys::open_socket().map_err(open_error)?;
            return Ok(Unbound { fd, rings: None });
        }
        let suits = |unbound: &Unbound| {
            let rings = unbound.rings.as_ref();
            rings.is_none_or(|rings| rings.are_as(options))
        };
        if let Some(registered) = sockets.registered.take().filter(suits) {
            return Ok(registered);
        }
        let fd = self.area.register()?;
        Ok(Unbound { fd, rings: None })
    }
}

impl Area {
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

    fn register(&self) -> Result<OwnedFd, XskError> {
        let fd = sys::open_socket().map_err(open_error)?;
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
            .map_err(|e| self.register_error(e))?;
        Ok(fd)
    }

    fn register_error(&self, source: io::Error) -> XskError {
        match source.raw_os_error() {
            Some(libc::EFAULT) => self.bad("it is not mapped for writing"),
            Some(libc::EINVAL) => self.bad("the kernel does not cut it so (Linux 5.4 or later)"),
            _ => XskError::LockedMemory {
                bytes: self.bytes,
                source,
            },
        }
    }
}

impl Sockets {
    /// Keeps a socket that could not be bound for the next one.
    pub(super) fn keep(&mut self, place: &Place, unbound: Unbound) {
        if matches!(place, Place::First) {
            self.registered = Some(unbound);
        }
    }

    /// Where a socket for this queue has to be bound.
    pub(super) fn place_for(&mut self, interface_index: u32, queue: u32) -> Place {
        self.bound.retain(|bound| bound.fd.strong_count() > 0);
        let mut shared = None;
        for bound in &self.bound {
            let Some(fd) = bound.fd.upgrade() else {
                continue;
            };
            if (bound.interface_index, bound.queue) == (interface_index, queue) {
                return Place::SameQueue(fd);
            }
            shared = Some(fd);
        }
        shared.map_or(Place::First, Place::Shared)
    }

    /// Whether a socket with these options may share what is there.
    pub(super) fn agree(&self, place: &Place, options: &BindOptions) -> bool {
        match place {
            Place::First => true,
            _ => self.options.is_some_and(|first| first.agrees(options)),
        }
    }

    pub(super) fn bound(
        &mut self,
        fd: &Arc<OwnedFd>,
        interface_index: u32,
        queue: u32,
        options: &BindOptions,
    ) {
        self.options = Some(*options);
        self.bound.push(Bound {
            fd: Arc::downgrade(fd),
            interface_index,
            queue,
        });
    }
}

fn open_error(error: io::Error) -> XskError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => XskError::NotPermitted(error),
        Some(libc::EAFNOSUPPORT | libc::ESOCKTNOSUPPORT) => XskError::NoAfXdp,
        _ => XskError::NoSocket(error),
    }
}
