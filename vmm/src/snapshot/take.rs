//! Takes a snapshot of a running machine.
//!
//! Invariants: the machine runs again whatever fails; a file under the wanted name is whole and on
//! disk; what failed leaves nothing behind.
//!
//! Does not copy pages first: the guest stands still while they are written to the page cache. It does
//! not wait for the disk.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use colo_fastpath::ring::GuestRam;
use serde::{Deserialize, Serialize};

use super::error::SnapshotError;
use super::format::{Header, Meta, PAGE_BYTES, STORED};
use crate::checkpoint::pages::PageBitmap;
use crate::config::Config;
use crate::geometry::geometry;
use crate::machine::{Machine, MachineError};
use crate::requests::{Order, Request};

/// Pages written at a time.
const BATCH_PAGES: usize = 256;

/// What a snapshot cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// How long the guest stood still.
    pub pause_us: u64,
    /// Part of it: registers and devices.
    pub state_us: u64,
    /// Pages of RAM.
    pub pages: u64,
    /// Those in the file; the others hold zeroes.
    pub stored_pages: u64,
    /// How long it took until all was on disk.
    pub total_us: u64,
}

/// Carries a request out and answers it.
pub fn serve(request: Request, machine: &Machine, config: &Config) {
    let Order::Snapshot(path) = request.order.clone();
    answer(request, &path, take(machine, config, &path));
}

/// Tells how it went.
pub(super) fn answer(
    request: Request,
    path: &Path,
    outcome: Result<SnapshotReport, SnapshotError>,
) {
    match outcome {
        Ok(report) => {
            tracing::info!("snapshot in {}: {report:?}", path.display());
            request.done(&report);
        }
        Err(e) => {
            tracing::warn!("no snapshot: {e}");
            request.refuse(&e.to_string());
        }
    }
}

/// Writes `machine`, which was made from `config`, to `path`; a file there is replaced.
pub fn take(
    machine: &Machine,
    config: &Config,
    path: &Path,
) -> Result<SnapshotReport, SnapshotError> {
    begin(machine, config, path)?()
}

/// The same up to where the machine runs again; what is given brings all of it to the disk and under its name.
pub fn begin(
    machine: &Machine,
    config: &Config,
    path: &Path,
) -> Result<impl FnOnce() -> Result<SnapshotReport, SnapshotError> + Send + use<>, SnapshotError> {
    let start = Instant::now();
    let partial = Partial::create(path)?;
    let report = capture(machine, config, path, &partial.file)?;
    let path = path.to_owned();
    Ok(move || {
        partial.publish(&path)?;
        let total_us = start.elapsed().as_micros() as u64;
        Ok(SnapshotReport { total_us, ..report })
    })
}

/// Stops the machine, fills `file`, lets the machine go on.
fn capture(
    machine: &Machine,
    config: &Config,
    path: &Path,
    file: &File,
) -> Result<SnapshotReport, SnapshotError> {
    let start = Instant::now();
    let refused = SnapshotError::machine(path);
    machine.pause_vcpus_for_capture().map_err(&refused)?;
    let outcome = capture_stopped(machine, config, path, file);
    let resumed = machine.resume_workers();
    machine.resume_vcpus().map_err(&refused)?;
    let pause_us = start.elapsed().as_micros() as u64;
    let (header, table, mut report) = outcome?;
    resumed.map_err(&refused)?;
    report.pause_us = pause_us;
    write_front(file, header, &table).map_err(SnapshotError::io(path))?;
    Ok(report)
}

fn capture_stopped(
    machine: &Machine,
    config: &Config,
    path: &Path,
    file: &File,
) -> Result<(Header, Vec<u64>, SnapshotReport), SnapshotError> {
    let start = Instant::now();
    let refused = SnapshotError::machine(path);
    let meta = Meta {
        geometry: geometry(config, machine.workers().len()),
        ..states(machine).map_err(&refused)?
    }
    .to_bytes();
    let state_us = start.elapsed().as_micros() as u64;
    let mut header = Header::plan(machine.ram().bytes(), meta.len() as u64);
    let failed = SnapshotError::io(path);
    file.set_len(header.file_bytes()).map_err(&failed)?;
    file.write_all_at(&meta, PAGE_BYTES).map_err(&failed)?;
    let table =
        write_ram(machine.ram(), file, header.ram_at).map_err(|e| e.into_snapshot_error(path))?;
    header.stored_pages = table.iter().filter(|&&entry| entry != 0).count() as u64;
    let report = SnapshotReport {
        state_us,
        pages: table.len() as u64,
        stored_pages: header.stored_pages,
        ..SnapshotReport::default()
    };
    Ok((header, table, report))
}

/// The states of a machine that stands still; its workers stand still afterwards.
fn states(machine: &Machine) -> Result<Meta, MachineError> {
    let mut meta = Meta {
        devices: machine.save_devices()?,
        ..Meta::default()
    };
    machine.save_vcpu_records(&mut meta.vcpus)?;
    machine.save_platform(&mut meta.platform)?;
    Ok(meta)
}

enum RamError {
    Io(std::io::Error),
    Memory(colo_fastpath::ring::MemoryError),
}

impl RamError {
    fn into_snapshot_error(self, path: &Path) -> SnapshotError {
        match self {
            Self::Io(source) => SnapshotError::io(path)(source),
            Self::Memory(source) => SnapshotError::machine(path)(source.into()),
        }
    }
}

/// Writes each page that is not zero to its place, which goes by its number: RAM has a gap, the file has none. Gives the
/// page table. A page that was never touched is not read: that would make it take memory.
fn write_ram(ram: &GuestRam, file: &File, ram_at: u64) -> Result<Vec<u64>, RamError> {
    let mut used = PageBitmap::new(ram.page_count());
    ram.find_data(used.words_mut()).map_err(RamError::Memory)?;
    let mut table = vec![0; ram.page_count()];
    let mut buffer = vec![0; BATCH_PAGES * PAGE_BYTES as usize];
    let mut pages = used.iter().map(|page| page as usize).peekable();
    while let Some(first) = pages.next() {
        let mut end = first + 1;
        while end - first < BATCH_PAGES && pages.next_if_eq(&end).is_some() {
            end += 1;
        }
        let batch = &mut buffer[..(end - first) * PAGE_BYTES as usize];
        ram.copy_pages_out(first, batch).map_err(RamError::Memory)?;
        let entries = &mut table[first..end];
        for (entry, page) in entries
            .iter_mut()
            .zip(batch.chunks_exact(PAGE_BYTES as usize))
        {
            *entry = entry_of(page);
        }
        write_runs(file, ram_at, first, entries, batch).map_err(RamError::Io)?;
    }
    Ok(table)
}

/// Writes the stored pages of a batch, as few calls as possible.
fn write_runs(
    file: &File,
    ram_at: u64,
    first: usize,
    entries: &[u64],
    batch: &[u8],
) -> std::io::Result<()> {
    let mut page = 0;
    for run in entries.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
        if run[0] != 0 {
            let bytes = page * PAGE_BYTES as usize..(page + run.len()) * PAGE_BYTES as usize;
            let at = ram_at + (first + page) as u64 * PAGE_BYTES;
            file.write_all_at(&batch[bytes], at)?;
        }
        page += run.len();
    }
    Ok(())
}

/// The page table's entry of a page.
fn entry_of(page: &[u8]) -> u64 {
    match page.iter().all(|&byte| byte == 0) {
        true => 0,
        false => STORED | u64::from(crc32fast::hash(page)),
    }
}

/// The header goes last: a file without one is no snapshot.
fn write_front(file: &File, mut header: Header, table: &[u64]) -> std::io::Result<()> {
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    header.table_crc = crc32fast::hash(&bytes);
    file.write_all_at(&bytes, header.table_at)?;
    file.write_all_at(&header.to_page(), 0)
}

/// A file beside the wanted one, which goes away unless it is published.
struct Partial {
    file: File,
    path: PathBuf,
    published: bool,
}

impl Partial {
    fn create(wanted: &Path) -> Result<Self, SnapshotError> {
        let Some(name) = wanted.file_name() else {
            let source = std::io::Error::from(std::io::ErrorKind::InvalidFilename);
            return Err(SnapshotError::io(wanted)(source));
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.partial", std::process::id()));
        let path = wanted.with_file_name(hidden);
        // What a process of this number left that was killed.
        let _ = std::fs::remove_file(&path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(SnapshotError::io(wanted))?;
        Ok(Self {
            file,
            path,
            published: false,
        })
    }

    fn publish(mut self, wanted: &Path) -> Result<(), SnapshotError> {
        let failed = SnapshotError::io(wanted);
        self.file.sync_all().map_err(&failed)?;
        std::fs::rename(&self.path, wanted).map_err(&failed)?;
        self.published = true;
        let directory = match wanted.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let directory = File::open(directory).map_err(&failed)?;
        directory.sync_all().map_err(&failed)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
