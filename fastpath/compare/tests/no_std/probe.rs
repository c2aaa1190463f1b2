//! A program without the standard library, the C library and an operating system's allocator that
//! compares two guests' output with colo-compare. `tests/no_std.rs` builds and runs it.
//!
//! Exits with 0 when what is equal left and what differs was held, with 101 otherwise.
#![no_std]
#![no_main]

extern crate alloc;
#[cfg(feature = "with_std")]
extern crate needs_std;

use core::alloc::{GlobalAlloc, Layout};
use core::arch::{asm, global_asm};
use core::cell::{Cell, UnsafeCell};
use core::panic::PanicInfo;

use colo_compare::testing::{Segment, Side, VecFrames};
use colo_compare::{Action, Cause, Limits, PrimaryPath, Right};

const ARENA_BYTES: usize = 4 << 20;

/// Gives out pieces of one array and takes nothing back.
struct Arena {
    bytes: UnsafeCell<[u8; ARENA_BYTES]>,
    used: Cell<usize>,
}

// SAFETY: the program has one thread.
unsafe impl Sync for Arena {}

// SAFETY: each piece is given out once, aligned and within the array.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let start = self.bytes.get().cast::<u8>();
        let from = start as usize + self.used.get();
        let at = from.next_multiple_of(layout.align()) - start as usize;
        if at + layout.size() > ARENA_BYTES {
            return core::ptr::null_mut();
        }
        self.used.set(at + layout.size());
        start.wrapping_add(at)
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static ARENA: Arena = Arena {
    bytes: UnsafeCell::new([0; ARENA_BYTES]),
    used: Cell::new(0),
};

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    exit(101)
}

fn exit(code: i32) -> ! {
    // SAFETY: exit_group ends the process and touches no memory.
    unsafe {
        asm!("syscall", in("rax") 231, in("rdi") code, options(noreturn, nostack));
    }
}

global_asm!(
    ".global _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {main}",
    "ud2",
    main = sym main,
);

extern "C" fn main() -> ! {
    compare();
    exit(0)
}

fn compare() {
    let mut frames = VecFrames::new(16);
    let limits = Limits {
        max_flows: 16,
        max_translations: 16,
        max_held_frames: 16,
        max_svm_frames: 16,
        ..Limits::default()
    };
    let mut path = PrimaryPath::new(limits);
    let covered = path.pair(0).expect("alone before");
    path.commit(0, &mut frames, covered).expect("in flight");
    assert!(matches!(
        path.poll_action(),
        Some(Action::PendingReleased { .. })
    ));
    let mut seq = 1;
    for (pvm, svm) in [(b"equal", b"equal"), (b"other", b"othor")] {
        let segment = Segment::new(Side::V6).seq(seq);
        seq += 5;
        let token = frames.insert(&segment.clone().payload(pvm).bytes());
        path.handle_guest_tx(1, &mut frames, token.expect("a slot"));
        let token = frames.insert(&segment.payload(svm).bytes());
        let epoch = path.epoch();
        path.handle_svm_output(2, &mut frames, epoch, 1, token.expect("a slot"));
        match path.poll_action() {
            Some(Action::Release {
                token,
                right: Right::Match,
                ..
            }) => assert!(pvm == svm && frames.take(token).ends_with(pvm)),
            Some(Action::Checkpoint(divergence)) => {
                assert!(pvm != svm && divergence.cause == Cause::Payload);
                assert_eq!(
                    (divergence.primary.bytes(), divergence.offset),
                    (&b"er"[..], 3)
                );
            }
            _ => panic!("neither released nor held"),
        }
        assert_eq!(path.poll_action().is_some(), pvm == svm, "the report");
    }
    path.close(&mut frames);
    assert_eq!(frames.used(), 0);
}

// What compiled code calls, in place of the C library's.

/// # Safety
/// Both ranges are valid and do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the ranges are the caller's; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// Both ranges are valid.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= n {
        // SAFETY: a copy upwards never reads what it has written when `to` is not in the source.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: a copy downwards never reads what it has written when `to` lies above `from`; the
    // direction flag is clear again afterwards.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _,
            inout("rdi") to.wrapping_add(n).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(n).wrapping_sub(1) => _,
            options(nostack));
    }
    to
}

/// # Safety
/// The range is valid.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, n: usize) -> *mut u8 {
    // SAFETY: the range is the caller's; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// Both ranges are valid.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for at in 0..n {
        // SAFETY: the byte lies in both ranges; volatile, so that this is not made a call of itself.
        let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// # Safety
/// Both ranges are valid.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the ranges are the caller's.
    unsafe { memcmp(a, b, n) }
}

/// Named by the compiled core library; a panic ends the program, so nothing ever unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Named by the compiled core library; never called, for the same reason.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(102)
}
