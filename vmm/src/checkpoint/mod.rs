//! The checkpoint engine: dirty pages and machine state, captured on the primary, staged and applied whole on the
//! secondary.
//!
//! Primary: `dirty` tells which pages were written, `capture` stops the guest for a moment, `stabilise` keeps the pages,
//! `outbound` sends what the secondary lacks, `ahead` some of it before it is needed. Secondary: `stage` receives and applies, `staging` holds what has come.
//! Both: `codec` makes pages small, `channel` carries them, `states` are the other records, `stop` is what a stopped SVM
//! tells, `digester` computes digests ahead of the sender. Who may take a checkpoint when is decided by `colo-control`.

pub mod ahead;
pub mod audit;
pub mod capture;
pub mod channel;
pub mod codec;
mod digester;
pub mod dirty;
#[cfg(test)]
pub(crate) mod guests;
pub mod outbound;
pub mod pages;
mod pending;
pub mod stabilise;
pub mod stage;
pub mod staging;
pub mod states;
pub mod stop;
