//! What the packet cores ask of the memory system and cannot ask themselves.
//!
//! Invariant: everything here is a hint: it changes no byte and nothing fails without it.

use colo_compare::PrimaryPath;

/// Size and alignment of a huge page.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Asks for the cache line at `address`.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 takes any address, mapped or not, and does not access it architecturally
    // (Intel SDM volume 2, PREFETCHh); SSE is part of x86-64.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for huge pages behind the tables of a new path, so that a table of a million flows does not
/// miss the TLB at every packet. Small tables are left alone.
pub fn use_huge_pages(path: &PrimaryPath) {
    for (start, bytes) in path.table_memory() {
        let from = start.addr().next_multiple_of(HUGE_PAGE_BYTES);
        let end = (start.addr() + bytes) & !(HUGE_PAGE_BYTES - 1);
        if from >= end {
            continue;
        }
        // SAFETY: MADV_HUGEPAGE (madvise(2)) changes how the range is backed, never its contents;
        // the range lies within memory that the path owns. A refusal is of no consequence.
        unsafe {
            let start = start.with_addr(from).cast_mut().cast();
            libc::madvise(start, end - from, libc::MADV_HUGEPAGE);
        }
    }
}
