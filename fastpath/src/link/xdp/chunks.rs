//! Memory for the frames of the link's AF_XDP sockets, in chunks: memory of their own, or the slots of a frame pool.
//!
//! Invariants: every access lies inside one chunk. A chunk is the kernel's while it is in a ring and this process's
//! otherwise; the caller keeps account of that. Of a pool's slots only those are touched that the pool has lent.
//!
//! Does not know rings.

use std::io;
use std::sync::Arc;

use crate::frame::FramePool;
use crate::ring::Area;
use crate::ring::xsk::{Umem, UmemSettings, XskError};

/// Where the slots of a frame pool lie, for sockets that receive into them.
#[derive(Clone, Debug)]
pub struct PoolMemory {
    area: Arc<Area>,
    at: usize,
    slot_bytes: usize,
    slots: usize,
}

impl PoolMemory {
    /// Those of this pool.
    pub fn of(frames: &FramePool) -> Self {
        let (at, bytes) = frames.slots_place();
        let slot_bytes = frames.slot_bytes();
        Self {
            area: frames.area().clone(),
            at,
            slot_bytes,
            slots: bytes / slot_bytes,
        }
    }

    /// Whether these are that pool's slots.
    pub(super) fn is_of(&self, frames: &FramePool) -> bool {
        Arc::ptr_eq(&self.area, frames.area()) && self.at == frames.slots_place().0
    }

    /// How many slots there are.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// What a slot holds.
    pub(super) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// What the kernel may write of a slot; `None`: less than it takes.
    pub(super) fn chunk_bytes(&self) -> Option<usize> {
        match self.slot_bytes {
            4096.. => Some(4096),
            2048.. => Some(2048),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(super) struct Chunks {
    area: Arc<Area>,
    /// Where the first chunk starts in the area.
    at: usize,
    /// From one chunk to the next.
    bytes: usize,
    count: usize,
    settings: UmemSettings,
}

impl Chunks {
    /// The slots of a pool, cut into chunks of `chunk_bytes`.
    pub(super) fn of_pool(pool: &PoolMemory, chunk_bytes: usize) -> Self {
        Self {
            area: pool.area.clone(),
            at: pool.at,
            bytes: pool.slot_bytes,
            count: pool.slots,
            settings: UmemSettings {
                chunk_bytes: chunk_bytes as u32,
                ..UmemSettings::default()
            },
        }
    }

    /// Takes memory for `count` chunks of `bytes`.
    pub(super) fn new(count: usize, bytes: usize) -> io::Result<Self> {
        let area = Area::reserve(count * bytes)?;
        area.map_anonymous(count * bytes)?;
        Ok(Self {
            area: Arc::new(area),
            at: 0,
            bytes,
            count,
            settings: UmemSettings {
                chunk_bytes: bytes as u32,
                unaligned: false,
                headroom_bytes: 0,
            },
        })
    }

    /// As the kernel knows it; with a pool's memory the NIC may share that.
    pub(super) fn umem(&self) -> Result<Umem, XskError> {
        let len = (self.count * self.bytes) as u64;
        // SAFETY: references to its bytes are made by `get` and `get_mut` alone, whose callers do so for chunks that no
        // ring has.
        unsafe { Umem::in_area(&self.area, self.at, len, self.settings) }
    }

    /// What a chunk holds.
    pub(super) fn chunk_bytes(&self) -> usize {
        self.bytes
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
        // write to a chunk that no ring has, and this process only through `&mut self`: a slot that a pool has lent
        // has no token.
        unsafe { std::slice::from_raw_parts(self.area.base().add(self.at + at), len) }
    }

    /// The same, to write to.
    pub(super) fn get_mut(&mut self, offset: u64, len: usize) -> &mut [u8] {
        let (at, len) = self.inside(offset, len);
        // SAFETY: as for `get`, and `&mut self` excludes other references.
        unsafe { std::slice::from_raw_parts_mut(self.area.base().add(self.at + at), len) }
    }

    fn inside(&self, offset: u64, len: usize) -> (usize, usize) {
        let at = (offset as usize).min(self.count * self.bytes);
        let end = (at / self.bytes + 1) * self.bytes;
        let end = end.min(self.count * self.bytes);
        (at, len.min(end - at))
    }
}
