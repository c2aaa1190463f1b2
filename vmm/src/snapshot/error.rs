//! Why a snapshot was not taken or is not restored.
//!
//! Invariant: every text names the file and says what to do.

use std::io;
use std::path::{Path, PathBuf};

use crate::machine::{MachineError, RecordError};

/// A snapshot could not be taken or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No room for it.
    #[error("{}: the disk is full; the guest runs on, nothing was left behind", .0.display())]
    DiskFull(PathBuf),
    /// Not one of ours.
    #[error("{}: not a snapshot", .0.display())]
    NotASnapshot(PathBuf),
    /// Of another version.
    #[error("{}: snapshot of version {found}; this program reads version {known}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// It ends early.
    #[error("{}: cut off: {bytes} bytes, {needed} needed; copy it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// What its header says.
        needed: u64,
    },
    /// A checksum does not fit.
    #[error("{}: {part} is damaged; copy it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which part.
        part: String,
    },
    /// Somebody wrote to it or cut it while its pages were in use.
    #[error(
        "{}: changed while the guest's memory is in it; the guest is stopped, since nobody knows what it would read: restore it \
         from a whole copy that nobody writes to",
        .0.display()
    )]
    Changed(PathBuf),
    /// A record in it cannot be read.
    #[error("{}: {source}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: RecordError,
    },
    /// It belongs to another machine (rule 22).
    #[error(
        "{}: {name} is {theirs} in the snapshot and {ours} here; they must be the same",
        path.display()
    )]
    Geometry {
        /// The file.
        path: PathBuf,
        /// Which setting.
        name: String,
        /// Its value in the file.
        theirs: String,
        /// Here.
        ours: String,
    },
    /// The machine refused.
    #[error("{}: {source}", path.display())]
    Machine {
        /// The file.
        path: PathBuf,
        /// Why.
        source: MachineError,
    },
}

impl SnapshotError {
    /// For `map_err` of file operations.
    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |source| match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::DiskFull(path.to_owned()),
            _ => Self::Io {
                path: path.to_owned(),
                source,
            },
        }
    }

    pub(super) fn machine(path: &Path) -> impl Fn(MachineError) -> Self + '_ {
        |source| Self::Machine {
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn record(path: &Path) -> impl Fn(RecordError) -> Self + '_ {
        |source| Self::Record {
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn damaged(path: &Path, part: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            part: part.into(),
        }
    }
}
