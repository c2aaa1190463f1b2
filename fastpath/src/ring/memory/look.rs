//! Guest bytes that are looked at where they lie: compared, summed, copied.
//!
//! Invariant: no reference to guest bytes exists; each byte is read once by a call, and what is used afterwards are the
//! host's bytes, a sum or a copy of what was read (invariant 7).
//!
//! Does not write to the guest.

use std::marker::PhantomData;

use super::super::checked;
use super::super::error::MemoryError;
use super::GuestRam;
use crate::hint::prefetch;

const CACHE_LINE_BYTES: usize = 64;

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
}
