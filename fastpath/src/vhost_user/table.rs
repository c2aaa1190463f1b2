//! The memory table of a front-end: which files are which guest addresses.
//!
//! Invariants: regions neither overlap nor wrap, and lie inside their files at the time of the
//! table; an address is translated only with all the bytes behind it.
//!
//! Does not map anything.

use std::fs::File;
use std::io;

use crate::ring::RegionSource;

/// Regions that a table may have; the protocol's own limit without memory slots is 8.
pub const REGIONS_MAX: usize = 8;

/// A table that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The number of regions is none or too many.
    #[error("memory table of {0} regions; between 1 and {REGIONS_MAX} can be served")]
    Count(usize),
    /// Two regions share addresses.
    #[error("memory regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest address of one.
        first: u64,
        /// Guest address of the other.
        second: u64,
    },
    /// A region goes beyond the end of its file: touching it would be fatal.
    #[error("memory region at {gpa:#x} ends {past} bytes behind the end of its file")]
    Short {
        /// Guest address.
        gpa: u64,
        /// By how much.
        past: u64,
    },
    /// A file could not be asked for its size.
    #[error("the file of the memory region at {gpa:#x}: {source}")]
    File {
        /// Guest address.
        gpa: u64,
        /// Why.
        source: io::Error,
    },
}

/// One region.
#[derive(Debug)]
pub struct TableRegion {
    /// First guest physical address.
    pub gpa: u64,
    /// Size.
    pub bytes: u64,
    /// Where it is in the front-end's own address space: ring addresses are given in those.
    pub user_address: u64,
    /// The shared file.
    pub file: File,
    /// Where in the file it begins.
    pub offset: u64,
}

/// A checked table.
#[derive(Debug)]
pub struct Table {
    regions: Vec<TableRegion>,
}

impl Table {
    /// Checks a table; no region wraps (the message's own check).
    pub fn new(regions: Vec<TableRegion>) -> Result<Self, TableError> {
        if regions.is_empty() || regions.len() > REGIONS_MAX {
            return Err(TableError::Count(regions.len()));
        }
        for (at, region) in regions.iter().enumerate() {
            for other in &regions[..at] {
                let guest = overlap((region.gpa, region.bytes), (other.gpa, other.bytes));
                let user = overlap(
                    (region.user_address, region.bytes),
                    (other.user_address, other.bytes),
                );
                if guest || user {
                    return Err(TableError::Overlap {
                        first: other.gpa,
                        second: region.gpa,
                    });
                }
            }
            region.check_file()?;
        }
        Ok(Self { regions })
    }

    /// The guest physical address of `bytes` bytes at a front-end address.
    pub fn gpa_of(&self, user_address: u64, bytes: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let at = user_address.checked_sub(region.user_address)?;
            let inside = at.checked_add(bytes)? <= region.bytes;
            inside.then(|| region.gpa + at)
        })
    }

    /// The regions as guest RAM is mapped from them.
    pub fn sources(&self) -> Result<Vec<RegionSource>, TableError> {
        let source = |region: &TableRegion| {
            let gpa = region.gpa;
            let file = region.file.try_clone();
            Ok(RegionSource {
                gpa,
                bytes: region.bytes,
                file: file.map_err(|source| TableError::File { gpa, source })?,
                offset: region.offset,
            })
        };
        self.regions.iter().map(source).collect()
    }
}

impl TableRegion {
    fn check_file(&self) -> Result<(), TableError> {
        let gpa = self.gpa;
        let metadata = self.file.metadata();
        let size = metadata
            .map_err(|source| TableError::File { gpa, source })?
            .len();
        match (self.offset + self.bytes).checked_sub(size) {
            Some(past) if past > 0 => Err(TableError::Short { gpa, past }),
            _ => Ok(()),
        }
    }
}

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gpa: u64, user_address: u64, bytes: u64) -> TableRegion {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x3000).unwrap();
        TableRegion {
            gpa,
            bytes,
            user_address,
            file,
            offset: 0x1000,
        }
    }

    #[test]
    fn addresses_are_translated_with_all_their_bytes() {
        let regions = vec![
            region(0, 0x7000_0000, 0x2000),
            region(1 << 32, 0x9000_0000, 0x1000),
        ];
        let table = Table::new(regions).unwrap();
        assert_eq!(table.gpa_of(0x7000_1000, 0x1000), Some(0x1000));
        assert_eq!(table.gpa_of(0x7000_1000, 0x1001), None);
        assert_eq!(table.gpa_of(0x9000_0ff0, 0x10), Some((1 << 32) + 0xff0));
        assert_eq!(table.gpa_of(0x6fff_ffff, 1), None);
        assert_eq!(table.gpa_of(u64::MAX, 2), None);
    }

    #[test]
    fn bad_tables_are_named() {
        let bad = |regions| Table::new(regions).unwrap_err();
        assert!(matches!(bad(vec![]), TableError::Count(0)));
        let many = (0..9).map(|n| region(n << 20, n << 20, 0x1000)).collect();
        assert!(matches!(bad(many), TableError::Count(9)));
        let same = vec![region(0, 0, 0x2000), region(0x1000, 0x10_0000, 0x1000)];
        assert!(matches!(bad(same), TableError::Overlap { .. }));
        let same = vec![region(0, 0, 0x2000), region(0x10_0000, 0x1fff, 0x1000)];
        assert!(matches!(bad(same), TableError::Overlap { .. }));
        let long = vec![region(0, 0, 0x2001)];
        assert!(matches!(bad(long), TableError::Short { past: 1, .. }));
    }
}
