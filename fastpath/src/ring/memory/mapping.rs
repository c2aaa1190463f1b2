//! How guest RAM is made: of files, mapped side by side in one range of addresses.
//!
//! Invariants: regions do not overlap and are whole pages; frame slots have room behind them.
//!
//! Does not access what is in it.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vm_memory::MmapRegion;

use super::super::area::{ALIGN_BYTES, Area};
use super::super::error::MemoryError;
use super::super::guard::GuardSlot;
use super::super::holes::MemoryFile;
use super::marks::HostMarks;
use super::writes::register_barrier;
use super::{GuestRam, HIGH_RAM_START, LOW_RAM_END, PAGE_BYTES, Region};

/// Addresses kept free behind guest RAM for the frame slots; costs no memory.
const SLOT_ROOM_BYTES: usize = 32 << 30;

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
        let mut sizes = sources.iter().map(|source| source.bytes);
        let total = sizes.try_fold(0, u64::checked_add);
        let total = total.ok_or(MemoryError::BadSize(u64::MAX))?;
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
        Ok(Self {
            regions: regions.into_boxed_slice(),
            area: Arc::new(area),
            tracking: AtomicBool::new(false),
            guard: GuardSlot::default(),
            huge: false,
            file: MemoryFile::default(),
            host_dirty: HostMarks::new(pages),
        })
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

    /// Sets in `bitmap` (one bit a page, at least [`GuestRam::bitmap_words`] words) the pages that something may have
    /// been written to, without touching any. The others have never been written to or read, take no memory, and
    /// are zeros. A page that is written to meanwhile may be left out: only dirty tracking tells of it.
    pub fn find_data(&self, bitmap: &mut [u64]) -> Result<(), MemoryError> {
        let found = self.file.find_data(self.page_count(), bitmap);
        found.map_err(|source| MemoryError::Holes { source })
    }
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

pub(super) fn memory_file(bytes: u64, flags: libc::c_uint) -> io::Result<File> {
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
