//! Which pages of guest RAM were never touched: the holes of its memory file.
//!
//! `lseek` with SEEK_DATA and SEEK_HOLE walks the file's page cache in the kernel. It maps and allocates nothing, where
//! reading a hole through a shared mapping would allocate its page; pages that were swapped out count as data. A file of
//! reserved huge pages (hugetlbfs) knows no holes and is all data; its memory is set aside in any case.
//!
//! Does not know what is in a page: one that was read or written as zeros is data.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::memory::PAGE_BYTES;

/// A file whose byte `n * 4096` is the first of page `n`; or nothing that tells holes.
#[derive(Debug, Default)]
pub(super) struct MemoryFile {
    file: Option<File>,
    hidden: AtomicBool,
}

impl MemoryFile {
    pub(super) fn new(file: File) -> Self {
        Self {
            file: Some(file),
            hidden: AtomicBool::new(false),
        }
    }

    /// Something else is mapped in its place: it tells nothing any more.
    pub(super) fn hide(&self) {
        self.hidden.store(true, Ordering::SeqCst);
    }

    /// Sets the bits of all pages below `pages` that are no holes.
    pub(super) fn find_data(&self, pages: usize, bitmap: &mut [u64]) -> io::Result<()> {
        let known = self.file.as_ref();
        let known = known.filter(|_| !self.hidden.load(Ordering::SeqCst));
        let Some(file) = known else {
            set(bitmap, 0, pages);
            return Ok(());
        };
        let mut page = 0;
        while page < pages
            && let Some(start) = seek(file, page, libc::SEEK_DATA)?
        {
            // Behind the last data is a hole, at the end of the file at the latest.
            let end =
                seek(file, start / PAGE_BYTES, libc::SEEK_HOLE)?.unwrap_or(pages * PAGE_BYTES);
            let end = end.div_ceil(PAGE_BYTES).max(page + 1).min(pages);
            set(bitmap, start / PAGE_BYTES, end);
            page = end;
        }
        Ok(())
    }
}

/// The next byte of this kind from a page on; `None`: there is none.
fn seek(file: &File, page: usize, whence: libc::c_int) -> io::Result<Option<usize>> {
    let from = libc::off_t::try_from(page * PAGE_BYTES).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open; the call has no memory effects. Nobody uses the file's position.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    if let Ok(at) = usize::try_from(at) {
        return Ok(Some(at));
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        e => Err(e),
    }
}

fn set(bitmap: &mut [u64], first: usize, end: usize) {
    let mut page = first;
    while page < end {
        let (word, bit) = (page / 64, page % 64);
        let count = (64 - bit).min(end - page);
        let ones = u64::MAX >> (64 - count) << bit;
        if let Some(word) = bitmap.get_mut(word) {
            *word |= ones;
        }
        page += count;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::super::memory::{GuestRam, HIGH_RAM_START, LOW_RAM_END, Pages};

    fn data(ram: &GuestRam) -> Vec<usize> {
        let mut bitmap = vec![0u64; ram.bitmap_words()];
        ram.find_data(&mut bitmap).unwrap();
        let is_set = |page: &usize| bitmap[page / 64] >> (page % 64) & 1 == 1;
        (0..bitmap.len() * 64).filter(is_set).collect()
    }

    #[test]
    fn pages_that_were_written_or_read_are_data_and_looking_touches_none() {
        let ram = GuestRam::new(1000 * 4096, Pages::Small).unwrap();
        assert!(data(&ram).is_empty());
        for page in [0, 1, 63, 64, 130, 999] {
            ram.write(page * 4096 + 4095, &[0]).unwrap();
        }
        ram.read(500 * 4096, &mut [0]).unwrap();
        for _ in 0..2 {
            assert_eq!(data(&ram), [0, 1, 63, 64, 130, 500, 999]);
        }
        for page in 0..1000 {
            ram.write(page * 4096, &[1]).unwrap();
        }
        assert_eq!(data(&ram), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn pages_count_on_behind_the_register_windows() {
        let ram = GuestRam::new(LOW_RAM_END + (64 << 20), Pages::Small).unwrap();
        let low = (LOW_RAM_END / 4096) as usize;
        ram.write(LOW_RAM_END - 1, &[1]).unwrap();
        ram.write(HIGH_RAM_START + 2 * 4096, &[1]).unwrap();
        assert_eq!(data(&ram), [low - 1, low + 2]);
    }

    #[test]
    fn what_lies_over_the_file_is_all_data() {
        let ram = GuestRam::new(1000 * 4096, Pages::Small).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(1000 * 4096).unwrap();
        ram.overlay(&file, 0).unwrap();
        assert_eq!(data(&ram), (0..1000).collect::<Vec<_>>());
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }
}
