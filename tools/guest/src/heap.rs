//! The heap: ranges of RAM behind the global allocator.

use core::alloc::{GlobalAlloc, Layout};
use core::ops::Range;
use talc::TalcCell;
use talc::source::Manual;

/// The allocator, for one thread.
struct Heap(TalcCell<Manual>);

// SAFETY: the guest has one thread and no interrupts, so no two calls ever overlap.
unsafe impl Sync for Heap {}

// SAFETY: every method passes its arguments on to an allocator that keeps the contract.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { self.0.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static HEAP: Heap = Heap(TalcCell::new(Manual));

/// Gives the heap more memory; false when the range is too small to be of use.
///
/// # Safety
/// The range must be RAM that nothing else uses, now or later.
pub unsafe fn claim(range: Range<usize>) -> bool {
    // SAFETY: the caller hands the range over.
    unsafe { HEAP.0.claim(range.start as *mut u8, range.len()) }.is_some()
}
