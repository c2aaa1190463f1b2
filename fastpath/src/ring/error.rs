//! What can go wrong at the guest's memory and queues.
//!
//! A [`RingError`] is always the guest's fault: the device asks for a reset and counts it.

use std::io;

/// Guest memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is zero or not a whole number of pages.
    #[error("guest RAM of {0} bytes is not a whole number of 4 KiB pages")]
    BadSize(u64),
    /// The memory file could not be made.
    #[error("vm.ram_mib = {}: no memory file for guest RAM: {source}; lower it", bytes >> 20)]
    File {
        /// Size that was asked for.
        bytes: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The memory file could not be mapped.
    #[error("vm.ram_mib = {}: guest RAM cannot be mapped: {source}; lower it", bytes >> 20)]
    Map {
        /// Size that was asked for.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// The memory file does not tell what was written to.
    #[error("the kernel does not tell which guest memory is in use: {source}")]
    Holes {
        /// Why.
        source: io::Error,
    },
    /// Two regions share addresses, or one ends beyond the last.
    #[error("the memory region at guest address {0:#x} overlaps another one or has no end")]
    Overlap(u64),
    /// The range is not inside guest RAM.
    #[error("guest address {gpa:#x}, {len} bytes, is outside RAM")]
    Outside {
        /// First guest physical address.
        gpa: u64,
        /// Length of the range.
        len: usize,
    },
    /// An index that must be naturally aligned is not.
    #[error("guest address {0:#x} is not aligned")]
    Unaligned(u64),
}

/// A guest broke the rules of its queue (virtio 1.3 section 2.7).
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A queue size that is zero, not a power of two or too large.
    #[error("queue size {0} is not a power of two up to 256")]
    BadSize(u16),
    /// A ring or table does not lie in RAM at its alignment.
    #[error("the {part} at guest address {gpa:#x} is outside RAM or not aligned")]
    BadLayout {
        /// Which part of the queue.
        part: &'static str,
        /// Where the guest put it.
        gpa: u64,
    },
    /// The available index is further ahead than the queue is long.
    #[error("available index {avail} is more than {size} ahead of {next}")]
    AvailJump {
        /// What the guest wrote.
        avail: u16,
        /// Next entry the device would take.
        next: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A descriptor number that is not in the table.
    #[error("descriptor {index} is outside a table of {size}")]
    BadDescriptor {
        /// The number.
        index: u16,
        /// Entries in the table.
        size: u16,
    },
    /// More descriptors than the table has: a loop.
    #[error("descriptor chain is longer than its table: it loops")]
    Loop,
    /// A descriptor with no bytes.
    #[error("descriptor has length 0")]
    ZeroLength,
    /// A buffer that is not in guest RAM.
    #[error("buffer at {gpa:#x}, {len} bytes, is outside RAM")]
    OutsideRam {
        /// Where it starts.
        gpa: u64,
        /// Its length.
        len: u32,
    },
    /// An indirect table where none is allowed, or of a bad size.
    #[error("indirect table is nested, not negotiated, or of bad size {0}")]
    BadIndirect(u32),
    /// A device-readable descriptor behind a device-writable one.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// A buffer of the wrong direction for its queue.
    #[error("buffer has the wrong direction for its queue")]
    Direction,
    /// The ring itself could not be reached.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}
