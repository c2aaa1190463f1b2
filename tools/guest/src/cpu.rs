//! The instructions that Rust has no words for: entry, I/O ports, the time stamp counter.

use core::arch::{asm, global_asm};

/// 32-bit write of microseconds: sleep until an interrupt is pending (0: however long it takes).
const SLEEP_PORT: u16 = 0x600;
/// Any byte: power off.
const POWER_PORT: u16 = 0x604;

// The VMM enters with the start info in rdi and a 16-byte aligned stack top in rsp; `call` gives
// the alignment that the ABI wants at a function's first instruction.
global_asm!(
    ".section .text._start, \"ax\"",
    ".global _start",
    "_start:",
    "cld",
    "and rsp, -16",
    "xor ebp, ebp",
    "call {start}",
    "hlt",
    start = sym crate::start,
);

/// Writes a byte to an I/O port.
///
/// # Safety
/// The port must be one whose effect leaves the guest's memory as Rust expects it.
pub unsafe fn out8(port: u16, value: u8) {
    // SAFETY: the caller vouches for the port; IOPL 3 allows the instruction.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Sleeps at most so many microseconds, 0 for no limit; returns at once when an interrupt is
/// pending.
pub fn sleep(limit_us: u32) {
    // SAFETY: the sleep port only blocks. Device writes to memory meanwhile go to the rings, which
    // are read with volatile loads.
    unsafe {
        asm!("out dx, eax", in("dx") SLEEP_PORT, in("eax") limit_us,
            options(nostack, preserves_flags));
    }
}

/// Ends the virtual machine.
pub fn power_off() -> ! {
    // SAFETY: the power port ends the machine and touches no memory.
    unsafe { out8(POWER_PORT, 1) };
    halt()
}

/// Ends with a fault, which the VMM reports: `hlt` is not allowed at CPL 3.
pub fn halt() -> ! {
    loop {
        // SAFETY: the instruction faults, and nothing after it runs.
        unsafe { asm!("hlt", options(nomem, nostack)) };
    }
}

/// The time stamp counter.
pub fn rdtsc() -> u64 {
    // SAFETY: CR4.TSD is clear on this platform, so the instruction is allowed at CPL 3; it touches
    // no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}
