//! The memory functions that compiled code calls, and the unwinder's symbol that it never calls.
//!
//! Invariants: no function here contains a loop that the compiler could turn into a call of itself:
//! copies and fills are single moves or string instructions.

use core::arch::asm;

type Vector = core::arch::x86_64::__m128i;

/// # Safety
/// Both ranges are valid and do not overlap, as for the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if n <= 64 {
        // SAFETY: the ranges are the caller's.
        unsafe { copy_small(to, from, n) };
    } else {
        // SAFETY: the ranges are the caller's; the direction flag is clear by the ABI.
        unsafe {
            asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags));
        }
    }
    to
}

/// Reads everything before it writes anything, so the ranges may overlap.
///
/// # Safety
/// Both ranges of `n <= 64` bytes are valid.
#[inline(always)]
unsafe fn copy_small(to: *mut u8, from: *const u8, n: usize) {
    /// # Safety
    /// Both ranges hold `n` bytes, at least one `T` and at most two.
    #[inline(always)]
    unsafe fn two<T: Copy>(to: *mut u8, from: *const u8, n: usize) {
        let last = n - size_of::<T>();
        // SAFETY: both reads lie within the range.
        let (a, b) = unsafe {
            (
                from.cast::<T>().read_unaligned(),
                from.add(last).cast::<T>().read_unaligned(),
            )
        };
        // SAFETY: both writes lie within the range.
        unsafe {
            to.cast::<T>().write_unaligned(a);
            to.add(last).cast::<T>().write_unaligned(b);
        }
    }
    // SAFETY: each branch copies what its bounds allow.
    unsafe {
        match n {
            0 => {}
            1 => to.write(from.read()),
            2..=3 => two::<u16>(to, from, n),
            4..=7 => two::<u32>(to, from, n),
            8..=15 => two::<u64>(to, from, n),
            16..=32 => two::<Vector>(to, from, n),
            _ => two::<[Vector; 2]>(to, from, n),
        }
    }
}

/// # Safety
/// Both ranges are valid, as for the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if n <= 64 {
        // SAFETY: the ranges are the caller's, and small copies may overlap.
        unsafe { copy_small(to, from, n) };
    } else if (to as usize).wrapping_sub(from as usize) >= n {
        // SAFETY: a copy upwards never reads what it has written when `to` is not inside the
        // source; the ranges are the caller's.
        unsafe {
            asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags));
        }
    } else {
        // SAFETY: a copy downwards never reads what it has written when `to` lies above `from`; the
        // direction flag is clear again afterwards.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") n => _,
                inout("rdi") to.add(n - 1) => _, inout("rsi") from.add(n - 1) => _,
                options(nostack));
        }
    }
    to
}

/// # Safety
/// The range is valid, as for the C function.
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
/// Both ranges are valid, as for the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let mut i = 0;
    while i + 8 <= n {
        // SAFETY: eight bytes at `i` lie within both ranges.
        let (x, y) = unsafe {
            (
                a.add(i).cast::<u64>().read_unaligned(),
                b.add(i).cast::<u64>().read_unaligned(),
            )
        };
        if x != y {
            return if x.swap_bytes() < y.swap_bytes() {
                -1
            } else {
                1
            };
        }
        i += 8;
    }
    while i < n {
        // SAFETY: byte `i` lies within both ranges.
        let (x, y) = unsafe { (a.add(i).read(), b.add(i).read()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        i += 1;
    }
    0
}

/// # Safety
/// Both ranges are valid, as for the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the ranges are the caller's.
    unsafe { memcmp(a, b, n) }
}

/// # Safety
/// The string ends with a zero byte, as for the C function.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut n = 0;
    // SAFETY: all bytes up to the final zero belong to the string.
    while unsafe { text.add(n).read_volatile() } != 0 {
        n += 1;
    }
    n
}

/// Named by the compiled standard libraries; a panic aborts, so nothing ever unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Named by the compiled standard libraries; never called, for the same reason.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    crate::cpu::halt()
}
