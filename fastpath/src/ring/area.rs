//! One contiguous range of host addresses: guest RAM first, frame slots behind it.
//!
//! Invariants: the range is reserved once and never moves; what is mapped into it stays mapped as
//! long as the area lives; nobody else maps into it. An AF_XDP socket has one range as its
//! UMEM (`Documentation/networking/af_xdp.rst`), so what it sends in place and what it receives
//! into must lie side by side. All sockets on one range share its registration, as the area knows it.
//!
//! Does not say what the bytes mean.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::xsk::Umems;

/// Alignment of everything mapped, so that huge pages fit.
pub const ALIGN_BYTES: usize = 2 << 20;

/// A reserved range of addresses, mapped from its start on.
#[derive(Debug)]
pub struct Area {
    base: NonNull<u8>,
    reserved: usize,
    mapped: AtomicUsize,
    umems: Umems,
}

// SAFETY: the area only owns address space; all access to the bytes is through raw pointers, whose
// users keep the rules of the module that they are in.
unsafe impl Send for Area {}
// SAFETY: as above; its own fields are immutable, atomic or under a lock.
unsafe impl Sync for Area {}

impl Area {
    /// Reserves addresses for at least `bytes`. Costs no memory.
    pub fn reserve(bytes: usize) -> io::Result<Self> {
        let wanted = bytes
            .checked_next_multiple_of(ALIGN_BYTES)
            .and_then(|bytes| bytes.checked_add(ALIGN_BYTES))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), wanted, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let skip = start.addr().next_multiple_of(ALIGN_BYTES) - start.addr();
        let reserved = wanted - ALIGN_BYTES;
        // SAFETY: `skip` is below ALIGN_BYTES, which was added to the reservation.
        let base = unsafe { start.add(skip) };
        for (at, len) in [
            (start, skip),
            (base.wrapping_add(reserved), ALIGN_BYTES - skip),
        ] {
            if len > 0 {
                // SAFETY: both ends lie in the reservation just made, which nothing uses yet.
                unsafe { libc::munmap(at, len) };
            }
        }
        let base =
            NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self {
            base,
            reserved,
            mapped: AtomicUsize::new(0),
            umems: Umems::default(),
        })
    }

    /// First address.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes mapped so far, from the base on, without holes.
    pub fn mapped_bytes(&self) -> usize {
        self.mapped.load(Ordering::Acquire)
    }

    /// Its parts that AF_XDP sockets use.
    pub(super) fn umems(&self) -> &Umems {
        &self.umems
    }

    /// Maps `bytes` of a file, shared, behind what is mapped already. Gives where, counted from the
    /// base.
    pub fn map_file(&self, file: &File, offset: u64, bytes: usize) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        self.map(bytes, libc::MAP_SHARED, file.as_raw_fd(), offset)
    }

    /// Maps `bytes` of zeroed memory behind what is mapped already.
    pub fn map_anonymous(&self, bytes: usize) -> io::Result<usize> {
        let at = self.map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)?;
        // SAFETY: MADV_HUGEPAGE changes how the range is backed, never its contents; it was just
        // mapped. A refusal is of no consequence.
        unsafe { libc::madvise(self.base().add(at).cast(), bytes, libc::MADV_HUGEPAGE) };
        Ok(at)
    }

    /// Puts a private mapping of a file over what is mapped at `at`: its pages come when they are
    /// touched, and what is written stays here. Both `at` and `bytes` are whole pages.
    pub(super) fn overlay(
        &self,
        at: usize,
        bytes: usize,
        file: &File,
        offset: u64,
    ) -> io::Result<()> {
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let end = at.checked_add(bytes);
        if end.is_none_or(|end| end > self.mapped_bytes()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range lies in what this area has mapped (just checked), and all access to it is
        // by raw pointers that see the new bytes as they would see another writer's.
        let mapped = unsafe {
            let place = self.base().add(at).cast();
            libc::mmap(place, bytes, protection, flags, file.as_raw_fd(), offset)
        };
        match mapped {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    fn map(
        &self,
        bytes: usize,
        flags: libc::c_int,
        fd: libc::c_int,
        offset: libc::off_t,
    ) -> io::Result<usize> {
        let room = bytes
            .checked_next_multiple_of(ALIGN_BYTES)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let at = self
            .mapped
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |at| {
                at.checked_add(room).filter(|&end| end <= self.reserved)
            })
            .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: `at..at + room` lies in our reservation and was given to this call alone; what is
        // replaced there is the inaccessible placeholder.
        let mapped = unsafe {
            let place = self.base().add(at).cast();
            libc::mmap(
                place,
                bytes,
                protection,
                flags | libc::MAP_FIXED,
                fd,
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            // The place stays an inaccessible hole; an area that failed is given up as a whole.
            return Err(io::Error::last_os_error());
        }
        if room > bytes {
            self.fill_hole(at + bytes.next_multiple_of(4096), at + room);
        }
        Ok(at)
    }

    /// Backs the rest of an aligned place with zeroes nobody uses: a UMEM has no holes.
    fn fill_hole(&self, from: usize, end: usize) {
        if from >= end {
            return;
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range lies in the place that `map` has just been given, behind its bytes.
        unsafe {
            let place = self.base().add(from).cast();
            libc::mmap(
                place,
                end - from,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours alone, and whoever used it held an `Arc` to this.
        unsafe { libc::munmap(self.base().cast(), self.reserved) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_lies_side_by_side() {
        let area = Area::reserve(8 << 20).unwrap();
        assert_eq!(area.base().addr() % ALIGN_BYTES, 0);
        assert_eq!(area.map_anonymous(3 << 20).unwrap(), 0);
        assert_eq!(area.map_anonymous(4096).unwrap(), 4 << 20);
        assert_eq!(area.mapped_bytes(), 6 << 20);
        // SAFETY: all of it is mapped, and nothing else uses it.
        unsafe {
            for at in [0, (3 << 20) + 5, (4 << 20) + 4096, (6 << 20) - 1] {
                assert_eq!(area.base().add(at).read(), 0);
                area.base().add(at).write(1);
            }
        }
    }

    #[test]
    fn a_full_area_refuses() {
        let area = Area::reserve(2 << 20).unwrap();
        area.map_anonymous(4096).unwrap();
        let full = area.map_anonymous(4096).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENOMEM));
        assert!(Area::reserve(usize::MAX - 5).is_err());
    }
}
