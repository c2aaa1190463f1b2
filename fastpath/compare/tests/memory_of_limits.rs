//! What each limit costs, as the documentation of [`Limits`] says it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use colo_compare::{Limits, PrimaryPath, SecondaryPath};

thread_local! {
    static TAKEN_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator; adds up what a thread asks for.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN_BYTES.with(|taken| taken.set(taken.get() + layout.size()));
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer comes from `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn bytes_of<T>(make: impl FnOnce() -> T) -> usize {
    let before = TAKEN_BYTES.with(Cell::get);
    drop(make());
    TAKEN_BYTES.with(Cell::get) - before
}

/// Bytes that one more unit of a limit costs each path, where index tables are as sparse as can be.
fn per_unit(raise: impl Fn(&mut Limits, usize)) -> [f64; 2] {
    let mut worst = [0f64; 2];
    // Just above four fifths of a power of two the index tables double.
    for unit in [1 << 12, (1 << 12) * 4 / 5 + 1] {
        let none = Limits {
            max_flows: 0,
            max_translations: 0,
            max_held_frames: 0,
            max_svm_frames: 0,
            max_unacked_inputs: 0,
            max_input_frames: 0,
            max_stored_output: 0,
            ..Limits::default()
        };
        let mut some = none;
        raise(&mut some, unit);
        let primary = [none, some].map(|limits| bytes_of(|| PrimaryPath::new(limits)));
        let secondary = [none, some].map(|limits| bytes_of(|| SecondaryPath::new(limits)));
        for (worst, [none, some]) in worst.iter_mut().zip([primary, secondary]) {
            *worst = worst.max((some - none) as f64 / unit as f64);
        }
    }
    worst
}

#[test]
fn limits_cost_what_their_documentation_says() {
    type Raise = fn(&mut Limits, usize);
    let limits: [(&str, Raise, [f64; 2]); 7] = [
        ("max_flows", |limits, n| limits.max_flows = n, [192., 104.]),
        (
            "max_translations",
            |limits, n| limits.max_translations = n,
            [160., 104.],
        ),
        (
            "max_held_frames",
            |limits, n| limits.max_held_frames = n,
            [144., 4.],
        ),
        (
            "max_svm_frames",
            |limits, n| limits.max_svm_frames = n,
            [136., 0.],
        ),
        (
            "max_unacked_inputs",
            |limits, n| limits.max_unacked_inputs = n as u64,
            [0., 184.],
        ),
        (
            "max_input_frames",
            |limits, n| limits.max_input_frames = n,
            [0., 184.],
        ),
        (
            "max_stored_output",
            |limits, n| limits.max_stored_output = n,
            [0., 40.],
        ),
    ];
    for (name, raise, documented) in limits {
        let measured = per_unit(raise);
        for (measured, documented) in measured.into_iter().zip(documented) {
            assert!(
                measured <= documented && documented <= measured * 1.1,
                "{name}: {measured} bytes each, the documentation says {documented}"
            );
        }
    }
}
