//! Guest RAM: shared memory, mapped once, in one region or a few.
//!
//! Invariants: every write of the host to guest RAM goes through [`GuestRam::write`] or a sibling
//! here, which ask the guard first when it is armed and mark the page when tracking is on (rule 15);
//! no reference to guest bytes exists, all access is by copies or atomics, because the guest writes
//! at any time; every range is checked.
//!
//! Does not know what KVM's own dirty log has seen.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::{Range, RangeInclusive};
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering, compiler_fence};
use std::sync::{Arc, Weak};

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::hint::prefetch;

use super::area::{ALIGN_BYTES, Area};
use super::checked;
use super::error::MemoryError;
use super::guard::{GuardSlot, WriteGuard};
use super::holes::MemoryFile;

/// Addresses kept free behind guest RAM for the frame slots; costs no memory.
const SLOT_ROOM_BYTES: usize = 32 << 30;

/// The page that dirty tracking counts in.
pub const PAGE_BYTES: usize = 4096;

/// Words of the marks of host writes that have one mark together.
const BLOCK_WORDS: usize = 64;

const CACHE_LINE_BYTES: usize = 64;

/// Register windows of devices begin here: RAM goes on behind them.
pub const LOW_RAM_END: u64 = 0xd000_0000;
/// Where RAM goes on.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Which pages the host backs RAM with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// 4 KiB pages.
    Small,
    /// 2 MiB pages when the host has enough of them reserved, else 4 KiB.
    HugeIfReserved,
}

/// A piece of guest RAM that somebody else made (a vhost-user front-end).
#[derive(Debug)]
pub struct RegionSource {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Length; a multiple of 4096.
    pub bytes: u64,
    /// The memory, to be mapped shared.
    pub file: File,
    /// Where in the file it starts; a multiple of the file's page size.
    pub offset: u64,
}

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
    host_dirty: Box<[AtomicU64]>,
    /// A bit for each block of these that has any: what is looked at while the guest stands still must not grow with RAM.
    host_dirty_blocks: Box<[AtomicU64]>,
    huge: bool,
    /// The memory, page after page in one file, as long as nothing else lies over it.
    file: MemoryFile,
}

/// A range of guest RAM. The guest may write it at any time, so it is only ever copied.
#[derive(Clone, Copy, Debug)]
pub struct GuestBytes<'a> {
    at: *const u8,
    len: usize,
    ram: PhantomData<&'a GuestRam>,
}

impl GuestBytes<'_> {
    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies what begins `skip` bytes in; `out` must not reach beyond the end.
    #[inline]
    pub fn copy_to(&self, skip: usize, out: &mut [u8]) {
        assert!(skip <= self.len && out.len() <= self.len - skip);
        // SAFETY: the range lies in RAM (`view`), which the lifetime keeps mapped, and the copy in the range
        // (just checked). The guest may write it meanwhile: then some mixture is copied.
        unsafe {
            std::ptr::copy_nonoverlapping(self.at.add(skip), out.as_mut_ptr(), out.len());
        }
    }

    /// Whether what begins `skip` bytes in is `bytes`, which must not reach beyond the end.
    #[inline]
    pub fn equal_at(&self, skip: usize, bytes: &[u8]) -> bool {
        assert!(skip <= self.len && bytes.len() <= self.len - skip);
        // SAFETY: the range lies in RAM and in this (as in `copy_to`). The guest may write it meanwhile: then
        // the answer is that of some mixture, and what is used afterwards is `bytes`, never what lies in the guest.
        let order = unsafe {
            let ours = self.at.add(skip).cast();
            libc::memcmp(ours, bytes.as_ptr().cast(), bytes.len())
        };
        order == 0
    }

    /// The sum of the `len` bytes that begin `skip` bytes in, if those at the same place of `other` are the same
    /// (rule 10); they must not reach beyond the end of either. Each is read once.
    #[inline]
    pub fn equal_and_sum(&self, skip: usize, other: &GuestBytes<'_>, len: usize) -> Option<u16> {
        assert!(skip <= self.len && len <= self.len - skip);
        assert!(skip <= other.len && len <= other.len - skip);
        // SAFETY: both ranges lie in RAM (as in `copy_to`) and in these (just checked).
        unsafe { checked::compare_and_sum(self.at.add(skip), other.at.add(skip), len) }
    }

    /// Asks for the first `lines` cache lines of it.
    #[inline(always)]
    pub fn prefetch(&self, lines: usize) {
        let len = self.len.min(lines * CACHE_LINE_BYTES);
        for at in (0..len).step_by(CACHE_LINE_BYTES) {
            prefetch(self.at.wrapping_add(at));
        }
    }
}

impl GuestRam {
    /// Makes zeroed RAM of `bytes` (a multiple of 4096): from guest physical address 0 up to
    /// [`LOW_RAM_END`], the rest from [`HIGH_RAM_START`] on.
    pub fn new(bytes: u64, pages: Pages) -> Result<Self, MemoryError> {
        whole_pages(bytes)?;
        let huge = match pages {
            Pages::HugeIfReserved => Self::with_files(bytes, libc::MFD_HUGETLB).ok(),
            Pages::Small => None,
        };
        match huge {
            Some(ram) => Ok(Self {
                huge: true,
                // Such a file does not tell its holes.
                file: MemoryFile::default(),
                ..ram
            }),
            None => Self::with_files(bytes, 0),
        }
    }

    fn with_files(bytes: u64, flags: libc::c_uint) -> Result<Self, MemoryError> {
        // A huge page is never cut.
        let file_bytes = match flags {
            0 => bytes,
            _ => bytes.next_multiple_of(ALIGN_BYTES as u64),
        };
        let failed = |source| MemoryError::File { bytes, source };
        let file = memory_file(file_bytes, flags).map_err(failed)?;
        let whole = MemoryFile::new(file.try_clone().map_err(failed)?);
        let low = bytes.min(LOW_RAM_END);
        let mut sources = vec![RegionSource {
            gpa: 0,
            bytes: low,
            file: file.try_clone().map_err(failed)?,
            offset: 0,
        }];
        if bytes > low {
            // Right behind the other, in the file as at the host's addresses.
            sources.push(RegionSource {
                gpa: HIGH_RAM_START,
                bytes: bytes - low,
                file,
                offset: low,
            });
        }
        let ram = Self::from_regions(sources)?;
        Ok(Self { file: whole, ..ram })
    }

    /// RAM that lies where `sources` say, in any order, without overlaps.
    pub fn from_regions(mut sources: Vec<RegionSource>) -> Result<Self, MemoryError> {
        sources.sort_by_key(|source| source.gpa);
        let total: u64 = sources.iter().map(|source| source.bytes).sum();
        let refused = |source| MemoryError::Map {
            bytes: total,
            source,
        };
        let room = usize::try_from(total)
            .ok()
            .and_then(|bytes| bytes.checked_add(sources.len() * ALIGN_BYTES + SLOT_ROOM_BYTES))
            .ok_or(MemoryError::BadSize(total))?;
        let area = Area::reserve(room).map_err(refused)?;
        let mut regions: Vec<Region> = Vec::with_capacity(sources.len());
        let mut pages = 0;
        for source in &sources {
            let size = whole_pages(source.bytes)?;
            let end_of_last = regions
                .last()
                .map_or(0, |last| last.gpa + last.memory.size() as u64);
            if source.gpa < end_of_last || source.gpa.checked_add(source.bytes).is_none() {
                return Err(MemoryError::Overlap(source.gpa));
            }
            let at = area
                .map_file(&source.file, source.offset, size)
                .map_err(refused)?;
            regions.push(Region {
                gpa: source.gpa,
                first_page: pages,
                memory: view(&area, at, size).map_err(refused)?,
            });
            pages += size / PAGE_BYTES;
        }
        if regions.is_empty() {
            return Err(MemoryError::BadSize(0));
        }
        register_barrier();
        let words = pages.div_ceil(64);
        Ok(Self {
            regions: regions.into_boxed_slice(),
            area: Arc::new(area),
            tracking: AtomicBool::new(false),
            guard: GuardSlot::default(),
            huge: false,
            file: MemoryFile::default(),
            host_dirty: zeros(words),
            host_dirty_blocks: zeros(words.div_ceil(64 * BLOCK_WORDS)),
        })
    }

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
        self.host_dirty.len()
    }

    /// Makes the bytes of `file` from `offset` on the contents of RAM, which must be one region. They are
    /// read when they are touched; the file is never written. Before anybody uses this RAM, and with
    /// small pages.
    pub fn overlay(&self, file: &File, offset: u64) -> Result<(), MemoryError> {
        let bytes = self.bytes();
        let refused = |source| MemoryError::Map { bytes, source };
        // The first region lies at the area's start; the others have to lie right behind.
        if !self.is_in_a_row() {
            return Err(refused(io::ErrorKind::Unsupported.into()));
        }
        self.file.hide();
        self.area
            .overlay(0, bytes as usize, file, offset)
            .map_err(refused)
    }

    /// Whether host addresses go on from one region to the next, as they do in memory of [`Self::new`].
    pub fn is_in_a_row(&self) -> bool {
        let start = self.host_address() as usize;
        let follows = |region: &Region| {
            region.memory.as_ptr() as usize == start + region.first_page * PAGE_BYTES
        };
        self.regions.iter().all(follows)
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

    /// Whether the bytes at `gpa` are these. They are read once.
    pub fn equals(&self, gpa: u64, bytes: &[u8]) -> Result<bool, MemoryError> {
        let guest = self.host_range(gpa, bytes.len())?;
        // SAFETY: `host_range` has checked the range, and `self` keeps it mapped. The guest may
        // write it meanwhile: then the answer is that of some mixture, and the caller sends `bytes`,
        // never what lies in the guest.
        let order = unsafe { libc::memcmp(guest.cast(), bytes.as_ptr().cast(), bytes.len()) };
        Ok(order == 0)
    }

    /// The `len` bytes at `gpa`, found once.
    #[inline]
    pub fn view(&self, gpa: u64, len: u32) -> Result<GuestBytes<'_>, MemoryError> {
        let at = self.host_range(gpa, len as usize)?;
        Ok(GuestBytes {
            at,
            len: len as usize,
            ram: PhantomData,
        })
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

    /// The sum of the bytes at `gpa` if they are these (rule 10). They are read once.
    pub fn equals_and_sum(&self, gpa: u64, bytes: &[u8]) -> Result<Option<u16>, MemoryError> {
        let guest = self.host_range(gpa, bytes.len())?;
        // SAFETY: `host_range` has checked the range, and `self` keeps it mapped; the others are a slice.
        Ok(unsafe { checked::compare_and_sum(guest, bytes.as_ptr(), bytes.len()) })
    }

    /// Copies the bytes at `gpa` to `out`, as many as `bytes` has; whether they are the same (rule 10). They are read once.
    pub fn copy_and_compare(
        &self,
        gpa: u64,
        bytes: &[u8],
        out: &mut [u8],
    ) -> Result<bool, MemoryError> {
        assert_eq!(bytes.len(), out.len());
        let guest = self.host_range(gpa, bytes.len())?;
        // SAFETY: `host_range` has checked the range, and `self` keeps it mapped; the others are slices of the same length.
        Ok(unsafe {
            checked::compare_and_copy(guest, bytes.as_ptr(), out.as_mut_ptr(), bytes.len())
        })
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

    /// Switches the tracking of host writes. After `set_tracking(true)` returns, every write that a
    /// later copy could miss is marked. Switching off forgets the marks.
    pub fn set_tracking(&self, on: bool) {
        self.tracking.store(on, Ordering::SeqCst);
        // Pairs with the compiler fence in `mark_written`: a writer that still saw the old value
        // has its bytes in memory when this returns, so a copy that starts now has them.
        expedited_barrier();
        if !on {
            for word in self.host_dirty.iter().chain(&self.host_dirty_blocks) {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Names who is asked before host writes, in place of who was. Only while unarmed.
    pub fn set_guard(&self, guard: Weak<dyn WriteGuard>) {
        self.guard.set(guard);
    }

    /// Switches the questions to the guard. It is switched on only while every thread that writes here
    /// stands still, and what lets it go on (a message, a lock) shows it the switch.
    pub fn arm_guard(&self, on: bool) {
        self.guard.arm(on);
    }

    /// Gives the pages that the host wrote since the last call, as words of a bitmap (one bit a page) with their places, rising,
    /// and forgets them here.
    pub fn take_host_dirty(&self, mut each: impl FnMut(usize, u64)) {
        for (at, blocks) in self.host_dirty_blocks.iter().enumerate() {
            if blocks.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut rest = blocks.swap(0, Ordering::SeqCst);
            while rest != 0 {
                let first = (at * 64 + rest.trailing_zeros() as usize) * BLOCK_WORDS;
                rest &= rest - 1;
                let end = self.host_dirty.len().min(first + BLOCK_WORDS);
                for (at, word) in (first..).zip(&self.host_dirty[first..end]) {
                    if word.load(Ordering::Relaxed) != 0 {
                        each(at, word.swap(0, Ordering::SeqCst));
                    }
                }
            }
        }
    }

    /// Sets in `bitmap` (one bit a page, at least [`GuestRam::bitmap_words`] words) the pages that something may have
    /// been written to, without touching any. The others have never been written to or read, take no memory, and
    /// are zeros. A page that is written to meanwhile may be left out: only dirty tracking tells of it.
    pub fn find_data(&self, bitmap: &mut [u64]) -> Result<(), MemoryError> {
        let found = self.file.find_data(self.page_count(), bitmap);
        found.map_err(|source| MemoryError::Holes { source })
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

    /// Before the bytes of a range inside RAM are written. Unarmed, this is one relaxed load.
    #[inline]
    pub(super) fn before_write(&self, gpa: u64, len: usize) {
        if self.guard.is_armed()
            && let Some(pages) = self.pages_of(gpa, len)
        {
            self.guard.ask(pages);
        }
    }

    /// Marks after the bytes are written: a copier takes the bitmap first and copies then, so a page
    /// it copied too early has its mark in the next round. Off, this is one relaxed load.
    #[inline]
    pub(super) fn mark_written(&self, gpa: u64, len: usize) {
        compiler_fence(Ordering::SeqCst);
        if self.tracking.load(Ordering::Relaxed) && len > 0 {
            self.mark_range(gpa, len);
        }
    }

    /// The pages that a range touches; `None` for an empty one and outside RAM.
    fn pages_of(&self, gpa: u64, len: usize) -> Option<RangeInclusive<usize>> {
        let last_byte = len.checked_sub(1)?;
        let (region, at) = self.find(gpa, len).ok()?;
        let page = |at: usize| region.first_page + at / PAGE_BYTES;
        Some(page(at)..=page(at + last_byte))
    }

    #[cold]
    fn mark_range(&self, gpa: u64, len: usize) {
        let Some(pages) = self.pages_of(gpa, len) else {
            return;
        };
        for page in pages {
            // The page before its block, and none of both later than a look at the block: so whoever takes the blocks and
            // then the pages misses none that was marked before.
            self.host_dirty[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
            let block = page / 64 / BLOCK_WORDS;
            let (blocks, bit) = (&self.host_dirty_blocks[block / 64], 1 << (block % 64));
            if blocks.load(Ordering::SeqCst) & bit == 0 {
                blocks.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }
}

fn zeros(words: usize) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

fn whole_pages(bytes: u64) -> Result<usize, MemoryError> {
    let size = usize::try_from(bytes).map_err(|_| MemoryError::BadSize(bytes))?;
    if size == 0 || !size.is_multiple_of(PAGE_BYTES) {
        return Err(MemoryError::BadSize(bytes));
    }
    Ok(size)
}

/// Volatile access to a piece of the area.
fn view(area: &Area, at: usize, size: usize) -> io::Result<MmapRegion> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the area has just mapped `size` bytes at `at`, and whoever holds the view holds the
    // area as well (`GuestRam`).
    let view = unsafe {
        let start = area.base().add(at);
        MmapRegion::build_raw(start, size, protection, libc::MAP_SHARED)
    };
    view.map_err(io::Error::other)
}

fn memory_file(bytes: u64, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a constant C string; the call returns a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"colo-guest-ram".as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made by the kernel and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

fn register_barrier() {
    membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
}

/// A full memory barrier on every running thread of this process.
fn expedited_barrier() {
    if membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) != 0 {
        // Kernels before 4.14: slower, same effect.
        membarrier(libc::MEMBARRIER_CMD_GLOBAL);
    }
}

fn membarrier(command: libc::c_int) -> libc::c_long {
    // SAFETY: membarrier takes no pointers.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        GuestRam::new(1 << 20, Pages::Small).unwrap()
    }

    #[test]
    fn ranges_are_checked_to_the_last_byte() {
        let ram = ram();
        assert!(ram.write((1 << 20) - 4, &[1, 2, 3, 4]).is_ok());
        assert!(ram.write((1 << 20) - 3, &[1, 2, 3, 4]).is_err());
        assert!(ram.read(u64::MAX - 1, &mut [0; 4]).is_err());
        assert!(ram.load_u16(1 << 20, Ordering::Relaxed).is_err());
        assert!(ram.load_u16(1, Ordering::Relaxed).is_err());
        assert!(ram.contains(0, 1 << 20) && !ram.contains(1, 1 << 20));
        assert!(!ram.contains(u64::MAX, 2));
    }

    #[test]
    fn host_writes_are_marked_only_while_tracking() {
        let ram = ram();
        let taken = || taken(&ram);
        ram.write(0x3000, &[1]).unwrap();
        assert_eq!(taken(), []);

        ram.set_tracking(true);
        ram.write(0x4fff, &[1, 2]).unwrap();
        ram.store_u16(0x9000, 7, Ordering::Release).unwrap();
        assert_eq!(taken(), [(0, 1 << 4 | 1 << 5 | 1 << 9)]);
        assert_eq!(taken(), [], "taken once");
        ram.write(0x4000, &[1]).unwrap();
        ram.set_tracking(false);
        ram.set_tracking(true);
        assert_eq!(taken(), [], "off and on again forgets");
        ram.write(0x4000, &[1]).unwrap();
        assert_eq!(taken(), [(0, 1 << 4)]);
    }

    fn taken(ram: &GuestRam) -> Vec<(usize, u64)> {
        let mut taken = Vec::new();
        ram.take_host_dirty(|at, pages| taken.push((at, pages)));
        taken
    }

    #[test]
    fn host_writes_are_found_in_any_block_of_a_large_memory() {
        // Only addresses: pages that nobody writes take no memory.
        let ram = GuestRam::new(2 << 30, Pages::Small).unwrap();
        ram.set_tracking(true);
        let pages = [
            0,
            63,
            64,
            64 * 64 - 1,
            64 * 64,
            64 * 64 * 64 + 7,
            (2 << 18) - 1,
        ];
        for _ in 0..3 {
            for page in pages {
                ram.write((page * PAGE_BYTES) as u64, &[1]).unwrap();
            }
            let mut marks: Vec<(usize, u64)> = Vec::new();
            for page in pages {
                match marks.last_mut() {
                    Some((at, word)) if *at == page / 64 => *word |= 1 << (page % 64),
                    _ => marks.push((page / 64, 1 << (page % 64))),
                }
            }
            assert_eq!(taken(&ram), marks);
            assert_eq!(taken(&ram), []);
        }
    }

    #[derive(Debug, Default)]
    struct Asked(
        std::sync::Mutex<Vec<(RangeInclusive<usize>, u8)>>,
        Weak<GuestRam>,
    );

    impl WriteGuard for Asked {
        fn before_write(&self, pages: RangeInclusive<usize>) {
            let mut byte = [0];
            let ram = self.1.upgrade().unwrap();
            ram.read(*pages.start() as u64 * 4096, &mut byte).unwrap();
            self.0.lock().unwrap().push((pages, byte[0]));
        }
    }

    #[test]
    fn the_guard_is_asked_before_each_write_while_it_is_armed() {
        let ram = Arc::new(ram());
        let asked = Arc::new(Asked(Default::default(), Arc::downgrade(&ram)));
        let guard: Arc<dyn WriteGuard> = asked.clone();
        ram.set_guard(Arc::downgrade(&guard));
        ram.write(0x3000, &[1]).unwrap();
        ram.arm_guard(true);
        ram.write(0x3000, &[2; 4097]).unwrap();
        ram.store_u16(0x3000, 0x0303, Ordering::Release).unwrap();
        ram.write(0x3000, &[]).unwrap();
        assert!(ram.write(1 << 20, &[4]).is_err());
        ram.arm_guard(false);
        ram.write(0x3000, &[5]).unwrap();
        assert_eq!(*asked.0.lock().unwrap(), [(3..=4, 1), (3..=3, 2)]);
        ram.arm_guard(true);
        drop((guard, asked));
        ram.write(0x3000, &[6]).unwrap();
    }

    #[test]
    fn pages_go_out_and_in() {
        let ram = ram();
        let page = [0x5a; PAGE_BYTES];
        ram.write_page(255, &page).unwrap();
        let mut back = [0; PAGE_BYTES];
        ram.copy_page_out(255, &mut back).unwrap();
        assert_eq!(page, back);
        assert!(ram.write_page(256, &page).is_err());
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(matches!(
            GuestRam::new(0, Pages::Small),
            Err(MemoryError::BadSize(0))
        ));
        assert!(GuestRam::new(4097, Pages::Small).is_err());
        assert!(GuestRam::new(1 << 62, Pages::Small).is_err());
    }

    #[test]
    fn regions_are_one_memory() {
        let source = |gpa, bytes, offset| RegionSource {
            gpa,
            bytes,
            file: memory_file(1 << 20, 0).unwrap(),
            offset,
        };
        let ram = GuestRam::from_regions(vec![
            source(0x10_0000, 0x8000, 0x4000),
            source(0, 0x4000, 0),
        ])
        .unwrap();
        assert_eq!((ram.bytes(), ram.page_count()), (0xc000, 12));
        assert!(ram.contains(0x3fff, 1) && ram.contains(0x10_7ffe, 2));
        assert!(
            !ram.contains(0x3fff, 2) && !ram.contains(0x10_7fff, 2) && !ram.contains(0x8000, 1)
        );
        ram.set_tracking(true);
        ram.write(0x10_1000, b"high").unwrap();
        ram.write(0x3ffc, b"low!").unwrap();
        assert!(ram.write(0x3ffd, b"over").is_err());
        assert_eq!(taken(&ram), [(0, 1 << 3 | 1 << 5)]);
        let mut page = [0; PAGE_BYTES];
        ram.copy_page_out(5, &mut page).unwrap();
        assert_eq!(&page[..4], b"high");
        assert!(ram.equals(0x3ffc, b"low!").unwrap() && !ram.equals(0x3ffc, b"low?").unwrap());
        assert!(ram.copy_page_out(12, &mut page).is_err());
        let overlap = GuestRam::from_regions(vec![source(0, 0x4000, 0), source(0x3000, 0x1000, 0)]);
        assert!(matches!(overlap, Err(MemoryError::Overlap(0x3000))));
        assert!(GuestRam::from_regions(Vec::new()).is_err());
    }

    #[test]
    fn ram_leaves_the_register_windows_free() {
        let ram = GuestRam::new(LOW_RAM_END + (1 << 20), Pages::Small).unwrap();
        let high = HIGH_RAM_START..HIGH_RAM_START + (1 << 20);
        assert!(ram.ranges().eq([0..LOW_RAM_END, high]) && ram.is_in_a_row());
        assert!(!ram.contains(LOW_RAM_END, 1) && !ram.contains(LOW_RAM_END - 1, 2));
        ram.write(HIGH_RAM_START + 0x3000, b"high").unwrap();
        let mut page = [0; PAGE_BYTES];
        let number = (LOW_RAM_END >> 12) as usize + 3;
        ram.copy_page_out(number, &mut page).unwrap();
        assert_eq!(&page[..4], b"high");
        ram.write(LOW_RAM_END - 4, b"low!").unwrap();
        ram.write(HIGH_RAM_START, b"next").unwrap();
        let mut both = vec![0; 2 * PAGE_BYTES];
        ram.copy_pages_out(number - 4, &mut both).unwrap();
        assert_eq!(&both[PAGE_BYTES - 4..PAGE_BYTES + 4], b"low!next");
        assert!(ram.copy_pages_out(ram.page_count() - 1, &mut both).is_err());
    }

    #[test]
    fn huge_pages_fall_back() {
        assert!(GuestRam::new(4 << 20, Pages::HugeIfReserved).is_ok());
    }
}
