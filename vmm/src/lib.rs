//! The virtual machine monitor and its replication.
//!
//! A guest is a [`machine::Machine`] made from a [`config::Config`]: memory, vCPU threads and
//! devices. Packets do not pass through here; `colo_fastpath` moves them.

pub mod checkpoint;
pub mod config;
pub mod devices;
pub mod geometry;
pub mod machine;
pub mod nic;
pub mod replication;
pub mod requests;
pub mod snapshot;
pub mod status;
pub mod testpoint;
