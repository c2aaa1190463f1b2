//! The checkpoint engine: dirty pages and machine state, captured on the primary, staged and applied whole on the
//! secondary.
//!
//! `dirty` tells which pages were written, `stabilise` keeps them as they were while the guest runs on, `pages` is the set
//! that travels, `transfer` its bytes on the link, `capture` the primary's side, `stage` the secondary's. Who may
//! take a checkpoint when is decided by `colo-control`.

pub mod audit;
pub mod capture;
pub mod channel;
pub mod codec;
pub mod dirty;
#[cfg(test)]
pub(crate) mod guests;
pub mod pages;
mod pending;
pub mod stabilise;
pub mod stage;
pub mod transfer;
