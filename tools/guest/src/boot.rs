//! Reads what the VMM passes: the PVH start info (`hvm_start_info`, Xen's public headers), its
//! memory map and the command line.
//!
//! Invariants: the heap ranges are RAM by the map, above the image and above everything the VMM put
//! below 1 MiB.

use core::ffi::CStr;
use core::ops::Range;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
/// Memory below is the VMM's and the image's.
const LOWEST: u64 = 2 << 20;

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modules_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryRange {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// What the guest needs of it.
pub struct Boot {
    /// The command line.
    pub command_line: &'static str,
    map: &'static [MemoryRange],
}

impl Boot {
    /// All ranges of free RAM.
    pub fn heap(&self) -> impl Iterator<Item = Range<usize>> {
        let lowest = LOWEST.max(image_end()).next_multiple_of(4096);
        let ram = self.map.iter().filter(|range| range.kind == RAM);
        let free = ram.map(move |range| {
            let start = range.addr.max(lowest);
            let end = range.addr.saturating_add(range.size);
            start as usize..end.max(start) as usize
        });
        free.filter(|range| !range.is_empty())
    }
}

/// Reads the start info at `address`.
///
/// # Safety
/// `address` is what the VMM passed at entry.
pub unsafe fn read(address: u64) -> Result<Boot, &'static str> {
    // SAFETY: the VMM put the structure there, readable and aligned, and nobody changes it.
    let info = unsafe { &*(address as *const StartInfo) };
    if info.magic != MAGIC || info.version < 1 {
        return Err("no start info of version 1 or later");
    }
    // SAFETY: the start info names a zero-terminated string that nobody changes.
    let command_line = unsafe { CStr::from_ptr(info.cmdline_paddr as *const i8) };
    // SAFETY: the start info names that many entries, readable and aligned.
    let map = unsafe {
        core::slice::from_raw_parts(
            info.memmap_paddr as *const MemoryRange,
            info.memmap_entries as usize,
        )
    };
    Ok(Boot {
        command_line: command_line
            .to_str()
            .map_err(|_| "the command line is not UTF-8")?,
        map,
    })
}

fn image_end() -> u64 {
    unsafe extern "C" {
        static image_end: u8;
    }
    (&raw const image_end) as u64
}
