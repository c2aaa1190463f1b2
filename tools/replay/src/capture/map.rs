//! A capture file, mapped into memory.
//!
//! Invariants: the mapping is read-only and private; the only unsafe code of this crate is here.
//!
//! A file that somebody cuts short while it is mapped ends the process (SIGBUS): captures that are
//! still being written are to be copied first.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, UncheckedAdvice};

/// How much is read before the pages behind are given back.
const BEHIND_BYTES: usize = 32 << 20;

/// A file cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there, or not for us.
    #[error("{}: cannot be opened: {source}; name an existing, readable capture", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a pipe or a device.
    #[error("{}: not a regular file; save the capture to a file first", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The system refuses to map it.
    #[error("{}: cannot be mapped into memory: {source}; copy it to a local disk", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// See the module.
#[derive(Debug)]
pub struct CaptureFile {
    path: PathBuf,
    /// `None`: an empty file.
    map: Option<Mmap>,
    /// Pages up to here were given back.
    behind: Cell<usize>,
}

impl CaptureFile {
    /// Maps a file.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let path = path.to_owned();
        // Before it is opened: opening a pipe waits for its writer.
        let opened = match std::fs::metadata(&path) {
            Ok(metadata) if !metadata.is_file() => return Err(OpenError::NotAFile { path }),
            Ok(_) => File::open(&path),
            Err(source) => Err(source),
        };
        let opened = opened.and_then(|file| Ok((file.metadata()?.len(), file)));
        let (len, file) = match opened {
            Ok(opened) => opened,
            Err(source) => return Err(OpenError::Open { path, source }),
        };
        if len == 0 {
            let (map, behind) = (None, Cell::new(0));
            return Ok(Self { path, map, behind });
        }
        // SAFETY: the mapping is read-only, private and owned by this value, which outlives every
        // slice of it. Another process that changes the file meanwhile can make us compare wrong
        // bytes or end with SIGBUS, but no memory of ours is written through it.
        let map = match unsafe { Mmap::map(&file) } {
            Ok(map) => map,
            Err(source) => return Err(OpenError::Map { path, source }),
        };
        // Only advice: reading works without it.
        map.advise(Advice::Sequential).ok();
        let (map, behind) = (Some(map), Cell::new(0));
        Ok(Self { path, map, behind })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// It was read up to `offset`: gives the pages behind back, so that a large file does not fill
    /// the memory. What still waits there is read from the file again when it is looked at.
    pub(crate) fn read_to(&self, offset: u64) {
        let (offset, behind) = (offset as usize, self.behind.get());
        if let Some(map) = self
            .map
            .as_ref()
            .filter(|_| offset >= behind + BEHIND_BYTES)
        {
            // Page sizes divide it.
            let end = offset / BEHIND_BYTES * BEHIND_BYTES;
            // SAFETY: the range lies within the mapping, for a record begins at `offset`. The
            // mapping is of a file, shared with no other value and never written, so that pages
            // that are dropped come back with the bytes of the file.
            let given = unsafe {
                map.unchecked_advise_range(UncheckedAdvice::DontNeed, behind, end - behind)
            };
            // Only advice: without it, the system finds them by itself.
            given.ok();
            self.behind.set(end);
        }
    }
}
