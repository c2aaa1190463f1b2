//! A network laboratory on one machine: namespaces, child processes and checked load, for the demo,
//! the system tests and the benches.
//!
//! Invariants: whatever a value of this crate made (namespace, process, capture) is gone when the value is
//! dropped; names carry the process id, so that [`topology::sweep`] removes what a killed run left.
//!
//! Does not know how a pair works inside: it sees configuration files, status documents and packets.

pub mod comparator;
pub mod load;
pub mod netns;
pub mod pair;
pub mod process;
pub mod seccomp;
pub mod testpmd;
pub mod topology;
