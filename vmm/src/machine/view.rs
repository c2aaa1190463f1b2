//! A second mapping of guest RAM, for KVM alone.
//!
//! Invariants: the host reads and writes guest RAM through its own mapping, the guest through this one, so that pages can be
//! write-protected against the guest (userfaultfd works on mappings) while the host goes on reading and writing; it is as
//! aligned as the host's, so that large pages fit.
//!
//! Does not protect anything.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use colo_fastpath::ring::GuestRam;

/// Alignment of a large page.
const ALIGN_BYTES: usize = 2 << 20;

/// Where KVM sees guest RAM.
#[derive(Debug)]
pub struct GuestView {
    base: NonNull<libc::c_void>,
    bytes: usize,
    ram: Arc<GuestRam>,
}

// SAFETY: this structure only owns addresses; nothing is accessed through it.
unsafe impl Send for GuestView {}
// SAFETY: as above.
unsafe impl Sync for GuestView {}

impl GuestView {
    /// Maps all of `ram` once more, which has to lie in a row.
    pub(super) fn new(ram: Arc<GuestRam>) -> io::Result<Self> {
        if !ram.is_in_a_row() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let bytes = ram.bytes() as usize;
        let room = bytes + ALIGN_BYTES;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let skip = start.addr().next_multiple_of(ALIGN_BYTES) - start.addr();
        let base = start.wrapping_byte_add(skip);
        // An old size of 0 duplicates a shared mapping (mremap(2)).
        // SAFETY: the target lies in the reservation just made, which nothing uses; the source stays as it is.
        let mapped = unsafe {
            libc::mremap(
                ram.host_address() as *mut libc::c_void,
                0,
                bytes,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                base,
            )
        };
        let outcome = match mapped {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            _ => Ok(()),
        };
        let end = base.wrapping_byte_add(bytes);
        let rest = room - skip - bytes;
        for (at, len) in [(start, skip), (end, rest)] {
            if len > 0 {
                // SAFETY: both ends lie in the reservation, outside of what was mapped.
                unsafe { libc::munmap(at, len) };
            }
        }
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        let view = Self { base, bytes, ram };
        outcome.map(|()| view)
    }

    /// First address.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The memory that it shows.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
}

impl Drop for GuestView {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone (reserved in `new`); whoever gave it to KVM keeps this until the slot is gone.
        unsafe { libc::munmap(self.base.as_ptr(), self.bytes) };
    }
}
