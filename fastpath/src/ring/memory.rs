//! Guest RAM: one shared memory file, mapped once, at guest physical address 0.
//!
//! Invariants: every write of the host to guest RAM goes through [`GuestRam::write`] or a sibling
//! here, which mark the page when tracking is on (rule 15); no reference to guest bytes exists, all
//! access is by copies or atomics, because the guest writes at any time; every range is checked.
//!
//! Does not know what KVM's own dirty log has seen.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering, compiler_fence};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::error::MemoryError;

/// The page that dirty tracking counts in.
pub const PAGE_BYTES: usize = 4096;

/// Which pages the host backs RAM with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// 4 KiB pages.
    Small,
    /// 2 MiB pages when the host has enough of them reserved, else 4 KiB.
    HugeIfReserved,
}

/// The RAM of one guest. Shared by the threads that serve it.
#[derive(Debug)]
pub struct GuestRam {
    region: MmapRegion,
    tracking: AtomicBool,
    host_dirty: Box<[AtomicU64]>,
}

impl GuestRam {
    /// Makes zeroed RAM of `bytes` (a multiple of 4096).
    pub fn new(bytes: u64, pages: Pages) -> Result<Self, MemoryError> {
        let size = usize::try_from(bytes).map_err(|_| MemoryError::BadSize(bytes))?;
        if size == 0 || !size.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::BadSize(bytes));
        }
        let huge = match pages {
            Pages::HugeIfReserved => map(bytes, size, libc::MFD_HUGETLB).ok(),
            Pages::Small => None,
        };
        let region = match huge {
            Some(region) => region,
            None => map(bytes, size, 0)?,
        };
        register_barrier();
        let words = (size / PAGE_BYTES).div_ceil(64);
        Ok(Self {
            region,
            tracking: AtomicBool::new(false),
            host_dirty: (0..words).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.region.size() as u64
    }

    /// Size in 4 KiB pages.
    pub fn page_count(&self) -> usize {
        self.region.size() / PAGE_BYTES
    }

    /// Words of a bitmap with one bit a page.
    pub fn bitmap_words(&self) -> usize {
        self.host_dirty.len()
    }

    /// Where the mapping starts, for the memory slot. The mapping lives as long as `self`.
    pub fn host_address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    /// Whether `len` bytes at `gpa` are RAM.
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        gpa.checked_add(len).is_some_and(|end| end <= self.bytes())
    }

    /// Copies `out.len()` bytes at `gpa` into host memory.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        self.slice(gpa, out.len())?.copy_to(out);
        Ok(())
    }

    /// Copies `bytes` to `gpa`.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.slice(gpa, bytes.len())?.copy_from(bytes);
        self.mark_written(gpa, bytes.len());
        Ok(())
    }

    /// Reads a ring index or flag word in one access.
    pub fn load_u16(&self, gpa: u64, order: Ordering) -> Result<u16, MemoryError> {
        Ok(u16::from_le(self.atomic_u16(gpa)?.load(order)))
    }

    /// Writes a ring index or flag word in one access.
    pub fn store_u16(&self, gpa: u64, value: u16, order: Ordering) -> Result<(), MemoryError> {
        self.atomic_u16(gpa)?.store(value.to_le(), order);
        self.mark_written(gpa, 2);
        Ok(())
    }

    /// Copies one page out. `page` below [`GuestRam::page_count`].
    pub fn copy_page_out(
        &self,
        page: usize,
        out: &mut [u8; PAGE_BYTES],
    ) -> Result<(), MemoryError> {
        self.read(page as u64 * PAGE_BYTES as u64, out)
    }

    /// Replaces one page. `page` below [`GuestRam::page_count`].
    pub fn write_page(&self, page: usize, bytes: &[u8; PAGE_BYTES]) -> Result<(), MemoryError> {
        self.write(page as u64 * PAGE_BYTES as u64, bytes)
    }

    /// Switches the tracking of host writes. After `set_tracking(true)` returns, every write that a
    /// later copy could miss is marked. Switching off forgets the marks.
    pub fn set_tracking(&self, on: bool) {
        self.tracking.store(on, Ordering::SeqCst);
        // Pairs with the compiler fence in `mark_written`: a writer that still saw the old value
        // has its bytes in memory when this returns, so a copy that starts now has them.
        expedited_barrier();
        if !on {
            for word in &self.host_dirty {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Adds the pages that the host wrote since the last call to `bitmap` (one bit a page, at least
    /// [`GuestRam::bitmap_words`] words) and forgets them here.
    pub fn take_host_dirty(&self, bitmap: &mut [u64]) {
        for (word, out) in self.host_dirty.iter().zip(bitmap) {
            if word.load(Ordering::Relaxed) != 0 {
                *out |= word.swap(0, Ordering::AcqRel);
            }
        }
    }

    fn slice(&self, gpa: u64, len: usize) -> Result<VolatileSlice<'_>, MemoryError> {
        let outside = MemoryError::Outside { gpa, len };
        let Ok(offset) = usize::try_from(gpa) else {
            return Err(outside);
        };
        self.region.get_slice(offset, len).map_err(|_| outside)
    }

    fn atomic_u16(&self, gpa: u64) -> Result<&AtomicU16, MemoryError> {
        if !gpa.is_multiple_of(2) {
            return Err(MemoryError::Unaligned(gpa));
        }
        let outside = MemoryError::Outside { gpa, len: 2 };
        let Ok(offset) = usize::try_from(gpa) else {
            return Err(outside);
        };
        self.region.get_atomic_ref(offset).map_err(|_| outside)
    }

    /// Marks after the bytes are written: a copier takes the bitmap first and copies then, so a page
    /// it copied too early has its mark in the next round. Off, this is one relaxed load.
    #[inline]
    fn mark_written(&self, gpa: u64, len: usize) {
        compiler_fence(Ordering::SeqCst);
        if self.tracking.load(Ordering::Relaxed) && len > 0 {
            self.mark_range(gpa as usize, len);
        }
    }

    #[cold]
    fn mark_range(&self, start: usize, len: usize) {
        for page in start / PAGE_BYTES..=(start + len - 1) / PAGE_BYTES {
            self.host_dirty[page / 64].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }
}

fn map(bytes: u64, size: usize, flags: libc::c_uint) -> Result<MmapRegion, MemoryError> {
    let file = memory_file(bytes, flags).map_err(|source| MemoryError::File { bytes, source })?;
    MmapRegion::build(
        Some(FileOffset::new(file, 0)),
        size,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED,
    )
    .map_err(|e| MemoryError::Map {
        bytes,
        reason: e.to_string(),
    })
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
        let mut bitmap = vec![0; ram.bitmap_words()];
        ram.write(0x3000, &[1]).unwrap();
        ram.take_host_dirty(&mut bitmap);
        assert!(bitmap.iter().all(|&w| w == 0));

        ram.set_tracking(true);
        ram.write(0x4fff, &[1, 2]).unwrap();
        ram.store_u16(0x9000, 7, Ordering::Release).unwrap();
        ram.take_host_dirty(&mut bitmap);
        assert_eq!(bitmap[0], 1 << 4 | 1 << 5 | 1 << 9);

        bitmap.fill(0);
        ram.take_host_dirty(&mut bitmap);
        assert_eq!(bitmap[0], 0, "taken once");
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
    fn huge_pages_fall_back() {
        assert!(GuestRam::new(4 << 20, Pages::HugeIfReserved).is_ok());
    }
}
