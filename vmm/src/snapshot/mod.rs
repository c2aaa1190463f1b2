//! Snapshots: a stopped machine in a file, and a machine that starts from one.
//!
//! The file (all numbers little-endian):
//!
//! | where | what |
//! |---|---|
//! | 0 | header, one page: magic, version, where everything is, checksums |
//! | 4096 | meta record: geometry, then the records of a checkpoint (vCPUs, platform, devices) |
//! | behind it, on a page | page table: for each page of RAM 8 bytes, 0 or a flag and the page's checksum |
//! | behind it, on a page | RAM, page by page in its place; pages of zeroes are holes |
//!
//! Invariants: the guest stands still only while states and pages are written; a snapshot appears
//! under its name whole, on disk, or not at all; a restore touches nothing before header, states and
//! geometry were found right, and never writes to the file: RAM is a private mapping of it, whose pages
//! come when they are touched.
//!
//! Does not take network state with it: frames that a comparator holds, translations of connections
//! that have moved between hosts. Does not re-key the entropy of the guest: the place for that (rule 25)
//! is [`Snapshot::apply`], once the guest has a source of entropy.

mod background;
mod error;
mod format;
mod restore;
mod take;
mod watch;

pub use background::Background;
pub use error::SnapshotError;
pub use restore::Snapshot;
pub use take::{SnapshotReport, begin, serve, take};
pub use watch::Watch;

#[cfg(test)]
mod tests;
