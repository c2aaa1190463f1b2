//! Buffers that the kernel reads and writes: pages of one anonymous mapping, each buffer owned by one place.
//!
//! Invariants: buffers do not overlap; the mapping lives as long as any of its buffers; a buffer inside an operation
//! is held by `operations` and can't be reached, since a [`Buffer`] is neither `Copy` nor `Clone`.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

/// Buffers begin on pages.
pub(super) const PAGE_BYTES: usize = 4096;

/// What the kernel makes a huge page of.
const HUGE_BYTES: usize = 2 << 20;

/// An anonymous mapping.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    pub(super) fn new(bytes: usize) -> io::Result<Self> {
        Self::with_tail(bytes, 0)
    }

    /// With `tail` bytes behind it, which are too few for huge pages.
    pub(super) fn with_tail(huge: usize, tail: usize) -> io::Result<Self> {
        // The kernel begins a mapping of whole huge pages on one; what is never touched is none.
        let bytes = match tail {
            0 => huge,
            _ => (huge + tail).next_multiple_of(HUGE_BYTES),
        };
        let (access, sort) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, sort, -1, 0) };
        let base = NonNull::new(at.cast::<u8>()).filter(|_| at != libc::MAP_FAILED);
        let base = base.ok_or_else(io::Error::last_os_error)?;
        // Only speed depends on it.
        // SAFETY: the ranges are parts of the mapping just made.
        unsafe {
            libc::madvise(base.as_ptr().cast(), huge, libc::MADV_HUGEPAGE);
            if tail > 0 {
                let behind = base.as_ptr().add(huge).cast();
                libc::madvise(behind, bytes - huge, libc::MADV_NOHUGEPAGE);
            }
        }
        Ok(Self { base, bytes })
    }

    /// Where a page begins; the last one if there are not so many.
    pub(super) fn page(&self, index: usize) -> NonNull<u8> {
        let last = self.bytes.saturating_sub(1) / PAGE_BYTES;
        // SAFETY: the page is one of the mapping's.
        unsafe { self.base.add(index.min(last) * PAGE_BYTES) }
    }

    /// Its first pages.
    pub(super) fn part(&self, pages: usize) -> libc::iovec {
        libc::iovec {
            iov_base: self.base.as_ptr().cast(),
            iov_len: self.bytes.min(pages * PAGE_BYTES),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; the last buffer, which kept it alive, is gone.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// A part of a mapping, with exclusive access to it.
#[derive(Debug)]
pub(super) struct Buffer {
    index: u32,
    base: NonNull<u8>,
    bytes: usize,
    mapping: Rc<Mapping>,
}

impl Buffer {
    /// Buffers of these sizes, and the part of the mapping that the first `registered` of them are in.
    pub(super) fn carve(
        sizes: &[usize],
        registered: usize,
    ) -> io::Result<(Vec<Self>, libc::iovec)> {
        let place = |size: &usize| size.next_multiple_of(PAGE_BYTES);
        let mapping = Rc::new(Mapping::new(sizes.iter().map(place).sum())?);
        let part = libc::iovec {
            iov_base: mapping.base.as_ptr().cast(),
            iov_len: sizes.iter().take(registered).map(place).sum(),
        };
        let mut at = 0;
        let buffers = sizes.iter().zip(0..).map(|(size, index)| {
            // SAFETY: the mapping is as long as all places together.
            let base = unsafe { mapping.base.add(at) };
            at += place(size);
            Self {
                index,
                base,
                bytes: *size,
                mapping: mapping.clone(),
            }
        });
        Ok((buffers.collect(), part))
    }

    /// The memory of buffers that lie in a row.
    pub(super) fn span(buffers: &[Self]) -> libc::iovec {
        let begin = buffers
            .first()
            .map_or(0, |first| first.base.as_ptr() as usize);
        let end = buffers
            .last()
            .map_or(0, |last| last.base.as_ptr() as usize + last.bytes);
        libc::iovec {
            iov_base: buffers
                .first()
                .map_or(std::ptr::null_mut(), |first| first.base.as_ptr().cast()),
            iov_len: end - begin,
        }
    }

    /// Its number among all buffers of the mapping.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Keeps the memory mapped for ever: the kernel may still write to it.
    pub(super) fn leak(self) {
        std::mem::forget(self.mapping);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `carve` gave this range to this buffer alone; the mapping lives; the kernel has no operation on it,
        // for then `operations` would hold it.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_do_not_overlap_and_outlive_each_other() {
        let (mut buffers, part) = Buffer::carve(&[100, 5000, 8], 2).unwrap();
        assert_eq!(part.iov_len, 3 * PAGE_BYTES);
        for (buffer, value) in buffers.iter_mut().zip(1..) {
            buffer.fill(value);
        }
        let last = buffers.pop().unwrap();
        for (buffer, value) in buffers.iter().zip(1..) {
            assert!(buffer.iter().all(|b| *b == value));
        }
        drop(buffers);
        assert_eq!((&*last, last.index()), ([3; 8].as_slice(), 2));
    }
}
