//! What checkpoints cost a secondary: the latest one in parts, and the distribution of each part.
//!
//! Times are microseconds; what each contains, and what it does not, is in the table of README.md (rule 17).

use serde::Serialize;

use super::engine::EngineCounters;
use super::report::Spread;
use crate::checkpoint::ahead::area::AreaCounters;
use crate::checkpoint::stage::{ApplyCost, ApplyParts};
use crate::checkpoint::staging::StagedPages;

/// One checkpoint, as its secondary saw it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct AppliedReport {
    /// Its epoch.
    pub epoch: u64,
    /// What it cost.
    #[serde(flatten)]
    pub parts: ApplyParts,
}

/// The distributions, owned by the control thread.
#[derive(Debug, Default)]
pub struct ApplyTimes {
    pub(super) stage_us: Spread,
    pub(super) apply_us: Spread,
    pub(super) write_us: Spread,
    pub(super) load_us: Spread,
    pub(super) audit_us: Spread,
    pub(super) resume_us: Spread,
    pub(super) last: Option<AppliedReport>,
    pub(super) area: AreaCounters,
    pub(super) engine: EngineCounters,
    pub(super) staged: StagedPages,
    /// Checkpoints applied.
    pub count: u64,
}

impl ApplyTimes {
    /// The one of an epoch was applied.
    pub fn applied(&mut self, epoch: u64, cost: &ApplyCost) {
        let parts = cost.parts;
        self.stage_us.record(parts.stage_us);
        self.apply_us.record(parts.apply_us);
        self.write_us.record(parts.write_us);
        self.load_us.record(parts.load_us);
        if parts.audit_us > 0 {
            self.audit_us.record(parts.audit_us);
        }
        self.resume_us.record(parts.resume_us);
        self.last = Some(AppliedReport { epoch, parts });
        self.area = cost.area;
        self.engine = cost.into();
        self.staged = cost.staged;
        self.count += 1;
    }
}
