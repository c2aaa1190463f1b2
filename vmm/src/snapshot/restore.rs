//! Opens a snapshot and puts it into a machine that has never run.
//!
//! Invariants: nothing of a file is used before its checksum was found right, guest pages excepted: they
//! are checked by [`Snapshot::verify`] when that is asked for, for to check them is to read them all; the
//! file is never written.
//!
//! Does not survive a file that is cut short or overwritten while the guest runs: its pages are the
//! guest's memory. That is noticed and told ([`Watch`]). Replacing it by another (rename) is harmless.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use colo_fastpath::ring::{GuestRam, Pages};
use memmap2::Mmap;

use super::error::SnapshotError;
use super::format::{Header, HeaderError, Meta, PAGE_BYTES, STORED, VERSION};
use super::watch::Watch;
use crate::config::Config;
use crate::geometry::geometry;
use crate::machine::{ClockJump, Machine, RecordError, VcpuState};

/// An open snapshot whose states are whole.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    file: File,
    watch: Watch,
    map: Mmap,
    header: Header,
    meta: Meta,
    vcpus: Vec<VcpuState>,
}

impl Snapshot {
    /// Opens a file and checks everything but the guest's pages.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let failed = SnapshotError::io(path);
        let file = File::open(path).map_err(&failed)?;
        let bytes = file.metadata().map_err(&failed)?.len();
        if bytes == 0 {
            return Err(SnapshotError::NotASnapshot(path.to_owned()));
        }
        let watch = Watch::new(path, &file).map_err(&failed)?;
        // SAFETY: a read-only private mapping of a whole file. Who cuts the file ends this process
        // (`watch`); who overwrites it is found out by checksums.
        let map = unsafe { Mmap::map(&file) }.map_err(&failed)?;
        let header = read_header(path, &map)?;
        if bytes < header.file_bytes() {
            return Err(SnapshotError::Truncated {
                path: path.to_owned(),
                bytes,
                needed: header.file_bytes(),
            });
        }
        let meta_end = (PAGE_BYTES + header.meta_bytes) as usize;
        let bad_record = SnapshotError::record(path);
        let meta = Meta::from_bytes(&map[PAGE_BYTES as usize..meta_end]).map_err(&bad_record)?;
        let vcpus = meta
            .vcpus
            .iter()
            .map(|record| VcpuState::from_bytes(record));
        let vcpus = vcpus.collect::<Result<_, RecordError>>();
        let vcpus = vcpus.map_err(&bad_record)?;
        let snapshot = Self {
            path: path.to_owned(),
            file,
            watch,
            header,
            meta,
            vcpus,
            map,
        };
        match crc32fast::hash(snapshot.table()) == header.table_crc {
            true => Ok(snapshot),
            false => Err(SnapshotError::damaged(path, "the page table")),
        }
    }

    /// Reads all pages and checks them.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let ram = &self.map[self.header.ram_at as usize..];
        let entry = |e: &[u8]| u64::from_le_bytes([e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]]);
        let entries = self.table().chunks_exact(8).map(entry);
        for (number, (page, entry)) in ram
            .chunks_exact(PAGE_BYTES as usize)
            .zip(entries)
            .enumerate()
        {
            let good = match entry & STORED {
                0 => page.iter().all(|&byte| byte == 0),
                _ => entry == STORED | u64::from(crc32fast::hash(page)),
            };
            if !good {
                let part = format!("guest page {number}");
                return Err(SnapshotError::damaged(&self.path, part));
            }
        }
        Ok(())
    }

    fn table(&self) -> &[u8] {
        let at = self.header.table_at as usize;
        &self.map[at..at + self.header.table_bytes() as usize]
    }

    /// Pages of the guest, and how many of them the file holds.
    pub fn pages(&self) -> (u64, u64) {
        (self.header.ram_bytes / PAGE_BYTES, self.header.stored_pages)
    }

    /// Refuses a machine with so many packet workers that this is not of, by the name of what differs
    /// (rule 22).
    pub fn check_geometry(&self, config: &Config, shards: usize) -> Result<(), SnapshotError> {
        let here = geometry(config, shards);
        let find = |list: &[(String, String)], name: &str| {
            let found = list.iter().find(|(n, _)| n == name);
            found.map_or_else(|| "not told".to_owned(), |(_, value)| value.clone())
        };
        let names = here.iter().chain(&self.meta.geometry).map(|(name, _)| name);
        for name in names {
            let (theirs, ours) = (find(&self.meta.geometry, name), find(&here, name));
            if theirs != ours {
                return Err(SnapshotError::Geometry {
                    path: self.path.clone(),
                    name: name.clone(),
                    theirs,
                    ours,
                });
            }
        }
        Ok(())
    }

    /// What looks after the file as long as a machine's memory is in it.
    pub fn into_watch(self) -> Watch {
        self.watch
    }

    /// Guest RAM whose pages come from the file when they are touched.
    pub fn ram(&self) -> Result<Arc<GuestRam>, SnapshotError> {
        let refused =
            |e: colo_fastpath::ring::MemoryError| SnapshotError::machine(&self.path)(e.into());
        let ram = GuestRam::new(self.header.ram_bytes, Pages::Small).map_err(refused)?;
        ram.overlay(&self.file, self.header.ram_at)
            .map_err(refused)?;
        Ok(Arc::new(ram))
    }

    /// Puts the states into a machine around [`Snapshot::ram`] that has never run. All of them are
    /// checked first.
    pub fn apply(&self, machine: &Machine) -> Result<(), SnapshotError> {
        let refused = SnapshotError::machine(&self.path);
        machine.check_vcpus(&self.vcpus).map_err(&refused)?;
        machine
            .check_platform(&self.meta.platform)
            .map_err(&refused)?;
        machine
            .check_devices(&self.meta.devices)
            .map_err(&refused)?;
        // The guest's source of entropy is to be re-keyed here (rule 25); it has none yet.
        machine
            .restore_vcpus(&self.vcpus, ClockJump::WallClock)
            .map_err(&refused)?;
        machine
            .restore_platform(&self.meta.platform, ClockJump::WallClock)
            .map_err(&refused)?;
        machine
            .restore_devices(&self.meta.devices)
            .map_err(&refused)
    }
}

fn read_header(path: &Path, map: &[u8]) -> Result<Header, SnapshotError> {
    let page = map.get(..PAGE_BYTES as usize).unwrap_or(map);
    Header::from_page(page).map_err(|error| match error {
        HeaderError::NotASnapshot => SnapshotError::NotASnapshot(path.to_owned()),
        HeaderError::Damaged => SnapshotError::damaged(path, "the header"),
        HeaderError::Version(found) => SnapshotError::Version {
            path: path.to_owned(),
            found,
            known: VERSION,
        },
    })
}
