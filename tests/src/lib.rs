//! What the system tests share: the binary under test, what a machine must have, and clients that no one
//! here wrote.
//!
//! Invariants: system tests take turns ([`bench::Bench`]), across processes too; a test that cannot run says
//! `SKIPPED: why` on standard output.
//!
//! The simulation shares nothing with this: see `sim/`. [`fuzz`] holds the bodies of the fuzz targets.

pub mod bench;
pub mod clients;
pub mod compare;
pub mod deaf;
pub mod fuzz;
pub mod lesser;
pub mod loads;
pub mod lossy;
pub mod quota;
pub mod relay;
pub mod status;
pub mod streams;
pub mod wire;
