//! What the comparator asks of the memory system and cannot ask itself.
//!
//! Invariant: a hint changes no byte, and nothing fails without it.

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
