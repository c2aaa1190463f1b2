//! Memory for the frames of the link's AF_XDP sockets, in chunks.
//!
//! Invariants: every access lies inside one chunk. A chunk is the kernel's while it is in a ring and this process's
//! otherwise; the caller keeps account of that.
//!
//! Does not know rings.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::ring::Area;
use crate::ring::xsk::{Umem, UmemSettings, XskError};

#[derive(Debug)]
pub(super) struct Chunks {
    area: Arc<Area>,
    bytes: usize,
    count: usize,
}

impl Chunks {
    /// Takes memory for `count` chunks of `bytes`.
    pub(super) fn new(count: usize, bytes: usize) -> io::Result<Self> {
        let area = Area::reserve(count * bytes)?;
        area.map_anonymous(count * bytes)?;
        Ok(Self {
            area: Arc::new(area),
            bytes,
            count,
        })
    }

    /// Registers it with the kernel.
    pub(super) fn register(&self) -> Result<Umem, XskError> {
        let settings = UmemSettings {
            chunk_bytes: self.bytes as u32,
            unaligned: false,
            headroom_bytes: 0,
        };
        let base = NonNull::new(self.area.base()).unwrap_or(NonNull::dangling());
        let len = (self.count * self.bytes) as u64;
        let owner = Box::new(self.area.clone());
        // SAFETY: `owner` keeps the area mapped, readable and writable; references to its bytes are made by `get` and
        // `get_mut` alone, whose callers do so for chunks that no ring has.
        unsafe { Umem::register(base, len, settings, owner) }
    }

    /// Which chunk an offset lies in.
    pub(super) fn index_of(&self, offset: u64) -> usize {
        offset as usize / self.bytes
    }

    /// Where a chunk starts.
    pub(super) fn offset_of(&self, index: usize) -> u64 {
        (index * self.bytes) as u64
    }

    /// `len` bytes at `offset`, of a chunk that no ring has. Less when the chunk ends before.
    pub(super) fn get(&self, offset: u64, len: usize) -> &[u8] {
        let (at, len) = self.inside(offset, len);
        // SAFETY: `at + len` lies inside one chunk of the area, which is mapped as long as `self`; the kernel does not
        // write to a chunk that no ring has, and this process only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.area.base().add(at), len) }
    }

    /// The same, to write to.
    pub(super) fn get_mut(&mut self, offset: u64, len: usize) -> &mut [u8] {
        let (at, len) = self.inside(offset, len);
        // SAFETY: as for `get`, and `&mut self` excludes other references.
        unsafe { std::slice::from_raw_parts_mut(self.area.base().add(at), len) }
    }

    fn inside(&self, offset: u64, len: usize) -> (usize, usize) {
        let at = (offset as usize).min(self.count * self.bytes);
        let end = (at / self.bytes + 1) * self.bytes;
        let end = end.min(self.count * self.bytes);
        (at, len.min(end - at))
    }
}
