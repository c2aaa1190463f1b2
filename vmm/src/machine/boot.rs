//! Boots a user-mode guest: a static ELF64 that starts at CPL 3 (ARCHITECTURE.md, "Guest platform").
//!
//! Invariants: everything below 1 MiB is the VMM's, the stack is the top of the RAM below the register
//! windows and no segment may touch either; every number in the image is checked before it is used.
//!
//! Does not boot kernels.

use colo_fastpath::ring::{GuestRam, LOW_RAM_END, MemoryError};
use elf::ElfBytes;
use elf::abi::{EM_X86_64, ET_EXEC, PT_INTERP, PT_LOAD};
use elf::endian::LittleEndian;
use elf::file::Class;
use kvm_bindings::{kvm_segment, kvm_xcr};
use kvm_ioctls::VcpuFd;

use super::kvm::KvmError;
use super::vcpu_shape::write_msr;

/// Stack at the top of RAM below the register windows.
pub const STACK_BYTES: u64 = 256 << 10;
/// Where register windows start.
pub(crate) const MMIO_BASE: u64 = LOW_RAM_END;

const LOW_END: u64 = 1 << 20;
const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x8000;
const COMMAND_LINE_MAX: usize = 4096;
const PML4: u64 = 0x1_0000;
const PDPT: u64 = 0x1_1000;
const PAGE_DIRECTORIES: u64 = 0x1_2000;
/// Where the page tables lie that a guest starts with.
#[cfg(test)]
pub(crate) const PAGE_TABLES: std::ops::Range<u64> = PML4..LOW_END;

/// Present, writable, user, accessed, dirty: nobody has to write the tables later.
const PAGE_FLAGS: u64 = 0x67;
const LARGE_PAGE: u64 = 0x80;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

const MSR_LSTAR: u32 = 0xc000_0082;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const MEMORY_RAM: u32 = 1;
const MEMORY_RESERVED: u32 = 2;

/// An image cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not an ELF file, or a broken one.
    #[error("not an ELF file: {0}")]
    NotElf(#[from] elf::ParseError),
    /// ELF, but not for this machine.
    #[error("needs a static 64-bit x86 executable (ET_EXEC, no interpreter), this is {0}")]
    WrongKind(&'static str),
    /// No loadable bytes.
    #[error("has no loadable segment")]
    Empty,
    /// A segment is where it must not be.
    #[error("segment {start:#x}+{bytes:#x} must lie in {low:#x}..{high:#x}; raise vm.ram_mib?")]
    OutsideRam {
        /// Guest physical address.
        start: u64,
        /// Size in memory.
        bytes: u64,
        /// First usable address.
        low: u64,
        /// First address behind usable RAM.
        high: u64,
    },
    /// The entry point is not in a segment.
    #[error("entry point {0:#x} is outside its segments")]
    Entry(u64),
    /// The command line does not fit.
    #[error("the command line (vm.cmdline) is too long: {0} bytes, at most {COMMAND_LINE_MAX}")]
    CommandLine(usize),
    /// RAM too small for the VMM's part.
    #[error("needs at least 4 MiB (vm.ram_mib)")]
    RamTooSmall,
    /// Guest memory refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Where a loaded guest starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    rip: u64,
    rsp: u64,
    rdi: u64,
}

/// Loads an image, its command line and its page tables.
pub(super) fn load(ram: &GuestRam, image: &[u8], cmdline: &str) -> Result<Entry, BootError> {
    let stack_top = ram.ranges().next().map_or(0, |low| low.end);
    if stack_top < 4 << 20 {
        return Err(BootError::RamTooSmall);
    }
    let high = stack_top - STACK_BYTES;
    let rip = load_segments(ram, image, high)?;
    write_page_tables(ram)?;
    write_start_info(ram, cmdline, high)?;
    Ok(Entry {
        rip,
        rsp: stack_top,
        rdi: START_INFO,
    })
}

fn load_segments(ram: &GuestRam, image: &[u8], high: u64) -> Result<u64, BootError> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(image)?;
    let header = &file.ehdr;
    if header.class != Class::ELF64 {
        return Err(BootError::WrongKind("32-bit"));
    }
    if header.e_machine != EM_X86_64 {
        return Err(BootError::WrongKind("for another processor"));
    }
    if header.e_type != ET_EXEC {
        return Err(BootError::WrongKind("relocatable or dynamic"));
    }
    let segments = file.segments().ok_or(BootError::Empty)?;
    let (mut loaded, mut entry_found) = (false, false);
    for segment in segments.iter() {
        if segment.p_type == PT_INTERP {
            return Err(BootError::WrongKind("dynamically linked"));
        }
        if segment.p_type != PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        let (start, bytes) = (segment.p_paddr, segment.p_memsz);
        let end = start.checked_add(bytes);
        let fits = start >= LOW_END && end.is_some_and(|end| end <= high);
        if !fits || segment.p_filesz > bytes {
            return Err(BootError::OutsideRam {
                start,
                bytes,
                low: LOW_END,
                high,
            });
        }
        ram.write(start, file.segment_data(&segment)?)?;
        loaded = true;
        entry_found |= (start..start + bytes).contains(&header.e_entry);
    }
    if !loaded {
        return Err(BootError::Empty);
    }
    if !entry_found {
        return Err(BootError::Entry(header.e_entry));
    }
    Ok(header.e_entry)
}

/// Identity map: RAM and 2 MiB of register windows, in 2 MiB user pages.
fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    put_u64(ram, PML4, PDPT | PAGE_FLAGS)?;
    let end = ram.ranges().map(|range| range.end).max().unwrap_or(0);
    for gib in 0..end.div_ceil(1 << 30).max(4) {
        put_u64(
            ram,
            PDPT + 8 * gib,
            (PAGE_DIRECTORIES + 0x1000 * gib) | PAGE_FLAGS,
        )?;
    }
    let ram_pages = ram
        .ranges()
        .flat_map(|range| range.step_by(LARGE_PAGE_BYTES as usize));
    for address in ram_pages.chain([MMIO_BASE]) {
        let entry = PAGE_DIRECTORIES + 8 * (address / LARGE_PAGE_BYTES);
        put_u64(ram, entry, address | PAGE_FLAGS | LARGE_PAGE)?;
    }
    Ok(())
}

/// `hvm_start_info` version 1 (Xen's `start_info.h`, the PVH boot protocol).
fn write_start_info(ram: &GuestRam, cmdline: &str, high: u64) -> Result<(), BootError> {
    if cmdline.len() >= COMMAND_LINE_MAX {
        return Err(BootError::CommandLine(cmdline.len()));
    }
    ram.write(COMMAND_LINE, cmdline.as_bytes())?;
    ram.write(COMMAND_LINE + cmdline.len() as u64, &[0])?;

    let mut map = vec![
        (0, LOW_END, MEMORY_RESERVED),
        (LOW_END, high - LOW_END, MEMORY_RAM),
    ];
    let above = ram.ranges().skip(1);
    map.extend(above.map(|range| (range.start, range.end - range.start, MEMORY_RAM)));
    for (at, (start, bytes, kind)) in (MEMORY_MAP..).step_by(24).zip(map.iter().copied()) {
        put_u64(ram, at, start)?;
        put_u64(ram, at + 8, bytes)?;
        put_u64(ram, at + 16, u64::from(kind))?;
    }
    let mut info = Vec::with_capacity(56);
    for word in [START_INFO_MAGIC, 1, 0, 0] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for pointer in [0, COMMAND_LINE, 0, MEMORY_MAP, map.len() as u64] {
        info.extend_from_slice(&pointer.to_le_bytes());
    }
    ram.write(START_INFO, &info)?;
    Ok(())
}

fn put_u64(ram: &GuestRam, gpa: u64, value: u64) -> Result<(), BootError> {
    Ok(ram.write(gpa, &value.to_le_bytes())?)
}

/// Puts vCPU 0 in front of the first instruction, in 64-bit mode at CPL 3.
pub(super) fn enter_user_mode(fd: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut sregs = fd
        .get_sregs()
        .map_err(KvmError::refused("read the system registers"))?;
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = PML4;
    // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
    sregs.cr4 = 0x20 | 0x600 | 1 << 18;
    // LME, LMA, SCE.
    sregs.efer = 0x501;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x2b,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x33,
        type_: 11,
        l: 1,
        db: 0,
        ..data
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // No table of handlers: every exception is a triple fault.
    sregs.idt.limit = 0;
    sregs.gdt.limit = 0;
    fd.set_sregs(&sregs)
        .map_err(KvmError::refused("enter 64-bit user mode"))?;

    // `syscall` goes to an address that is never mapped, not to wherever reset left it.
    write_msr(fd, MSR_LSTAR, 0xffff_8000_0000_0000)?;

    let mut xcrs = kvm_bindings::kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        value: 7,
        ..Default::default()
    };
    fd.set_xcrs(&xcrs)
        .map_err(KvmError::refused("enable AVX"))?;

    let mut regs = kvm_bindings::kvm_regs::default();
    (regs.rip, regs.rsp, regs.rdi, regs.rflags) = (entry.rip, entry.rsp, entry.rdi, 0x3002);
    fd.set_regs(&regs)
        .map_err(KvmError::refused("write the registers"))
}

#[cfg(test)]
#[path = "boot_tests.rs"]
mod tests;
