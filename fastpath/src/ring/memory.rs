//! Guest RAM: shared memory, mapped once, in one region or a few.
//!
//! Invariants: every write of the host to guest RAM goes through [`GuestRam::write`] or a sibling
//! here, which ask the guard first when it is armed and mark the page when tracking is on (rule 15);
//! no reference to guest bytes exists, all access is by copies or atomics, because the guest writes
//! at any time; every range is checked.
//!
//! Does not know what KVM's own dirty log has seen.

mod look;
mod mapping;
mod marks;
mod writes;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use super::area::Area;
use super::error::MemoryError;
use super::guard::GuardSlot;
use super::holes::MemoryFile;

use marks::HostMarks;

pub use look::GuestBytes;
pub use mapping::{Pages, RegionSource};

/// The page that dirty tracking counts in.
pub const PAGE_BYTES: usize = 4096;

/// Register windows of devices begin here: RAM goes on behind them.
pub const LOW_RAM_END: u64 = 0xd000_0000;
/// Where RAM goes on.
pub const HIGH_RAM_START: u64 = 1 << 32;

#[derive(Debug)]
struct Region {
    gpa: u64,
    first_page: usize,
    memory: MmapRegion,
}

impl Region {
    /// Where a range of the guest lies in this region, if it does.
    #[inline]
    fn offset_of(&self, gpa: u64, len: u64) -> Option<usize> {
        let at = gpa.wrapping_sub(self.gpa);
        let bytes = self.memory.size() as u64;
        (at <= bytes && len <= bytes - at).then_some(at as usize)
    }
}

/// The RAM of one guest. Shared by the threads that serve it.
#[derive(Debug)]
pub struct GuestRam {
    // Dropped before the area that they lie in.
    regions: Box<[Region]>,
    area: Arc<Area>,
    tracking: AtomicBool,
    guard: GuardSlot,
    host_dirty: HostMarks,
    huge: bool,
    /// The memory, page after page in one file, as long as nothing else lies over it.
    file: MemoryFile,
}

impl GuestRam {
    /// The range of host addresses that RAM lies in, with room for frame slots behind it.
    pub fn area(&self) -> &Arc<Area> {
        &self.area
    }

    /// Whether huge pages that the host has reserved back it.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.page_count() as u64 * PAGE_BYTES as u64
    }

    /// Size in 4 KiB pages.
    pub fn page_count(&self) -> usize {
        let pages = |region: &Region| region.memory.size() / PAGE_BYTES;
        self.regions.iter().map(pages).sum()
    }

    /// The guest physical addresses that are RAM, rising.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let range = |region: &Region| region.gpa..region.gpa + region.memory.size() as u64;
        self.regions.iter().map(range)
    }

    /// Words of a bitmap with one bit a page.
    pub fn bitmap_words(&self) -> usize {
        self.host_dirty.words()
    }

    /// Where the first region's mapping starts, for the memory slot. The mapping lives as long as
    /// `self`.
    pub fn host_address(&self) -> u64 {
        self.regions[0].memory.as_ptr() as u64
    }

    /// The host addresses of `len` bytes at `gpa`, which stay valid as long as `self`. The guest
    /// may write them at any time: no reference may be made of them.
    pub fn host_range(&self, gpa: u64, len: usize) -> Result<*mut u8, MemoryError> {
        let (region, at) = self.find(gpa, len)?;
        Ok(region.memory.as_ptr().wrapping_add(at))
    }

    /// Whether `len` bytes at `gpa` are RAM.
    #[inline]
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        let holds = |region: &Region| region.offset_of(gpa, len).is_some();
        self.regions.iter().any(holds)
    }

    /// Copies `out.len()` bytes at `gpa` into host memory.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        self.slice(gpa, out.len())?.copy_to(out);
        Ok(())
    }

    /// Copies `bytes` to `gpa`.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let slice = self.slice(gpa, bytes.len())?;
        self.before_write(gpa, bytes.len());
        slice.copy_from(bytes);
        self.mark_written(gpa, bytes.len());
        Ok(())
    }

    /// Reads a ring index or flag word in one access.
    pub fn load_u16(&self, gpa: u64, order: Ordering) -> Result<u16, MemoryError> {
        Ok(u16::from_le(self.atomic_u16(gpa)?.load(order)))
    }

    /// Writes a ring index or flag word in one access.
    pub fn store_u16(&self, gpa: u64, value: u16, order: Ordering) -> Result<(), MemoryError> {
        let word = self.atomic_u16(gpa)?;
        self.before_write(gpa, 2);
        word.store(value.to_le(), order);
        self.mark_written(gpa, 2);
        Ok(())
    }

    /// Copies one page out. `page` below [`GuestRam::page_count`].
    pub fn copy_page_out(
        &self,
        page: usize,
        out: &mut [u8; PAGE_BYTES],
    ) -> Result<(), MemoryError> {
        self.read(self.gpa_of(page)?, out)
    }

    /// Copies pages in a row out, from `first` on. All below [`GuestRam::page_count`].
    pub fn copy_pages_out(&self, first: usize, out: &mut [u8]) -> Result<(), MemoryError> {
        let (mut page, mut rest) = (first, out);
        for region in &self.regions {
            let end = region.first_page + region.memory.size() / PAGE_BYTES;
            if page < end && !rest.is_empty() {
                let len = rest.len().min((end - page) * PAGE_BYTES);
                let (here, later) = std::mem::take(&mut rest).split_at_mut(len);
                self.read(self.gpa_of(page)?, here)?;
                (page, rest) = (end, later);
            }
        }
        match rest.len() {
            0 => Ok(()),
            len => Err(MemoryError::Outside {
                gpa: page as u64 * PAGE_BYTES as u64,
                len,
            }),
        }
    }

    /// Replaces one page. `page` below [`GuestRam::page_count`].
    pub fn write_page(&self, page: usize, bytes: &[u8; PAGE_BYTES]) -> Result<(), MemoryError> {
        self.write(self.gpa_of(page)?, bytes)
    }

    #[inline]
    fn find(&self, gpa: u64, len: usize) -> Result<(&Region, usize), MemoryError> {
        for region in &self.regions {
            if let Some(at) = region.offset_of(gpa, len as u64) {
                return Ok((region, at));
            }
        }
        Err(MemoryError::Outside { gpa, len })
    }

    fn slice(&self, gpa: u64, len: usize) -> Result<VolatileSlice<'_>, MemoryError> {
        let (region, at) = self.find(gpa, len)?;
        let outside = |_| MemoryError::Outside { gpa, len };
        region.memory.get_slice(at, len).map_err(outside)
    }

    fn atomic_u16(&self, gpa: u64) -> Result<&AtomicU16, MemoryError> {
        if !gpa.is_multiple_of(2) {
            return Err(MemoryError::Unaligned(gpa));
        }
        let (region, at) = self.find(gpa, 2)?;
        let outside = |_| MemoryError::Outside { gpa, len: 2 };
        region.memory.get_atomic_ref(at).map_err(outside)
    }

    /// Guest physical address of a page.
    fn gpa_of(&self, page: usize) -> Result<u64, MemoryError> {
        let region = self.regions.iter().rev().find(|r| r.first_page <= page);
        let at = |region: &Region| region.gpa + ((page - region.first_page) * PAGE_BYTES) as u64;
        let outside = MemoryError::Outside {
            gpa: page as u64 * PAGE_BYTES as u64,
            len: PAGE_BYTES,
        };
        region.map(at).ok_or(outside)
    }
}

#[cfg(test)]
#[path = "memory/tests.rs"]
mod tests;
