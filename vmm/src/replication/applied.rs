//! What checkpoints cost a secondary: the latest one in parts, and the distribution of each part.
//!
//! Times are microseconds; what each contains, and what it does not, is in the table of README.md (rule 17).

use serde::Serialize;

use super::engine::EngineCounters;
use super::report::Spread;
use crate::checkpoint::ahead::area::AreaCounters;
use crate::checkpoint::stage::ApplyCost;
use crate::checkpoint::staging::StagedPages;

/// One checkpoint, as its secondary saw it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[allow(
    missing_docs,
    reason = "the names are the documentation; units are in them"
)]
pub struct AppliedReport {
    pub epoch: u64,
    /// From its first chunk until it was accepted.
    pub stage_us: u64,
    /// From the order until the SVM ran: the next four.
    pub apply_us: u64,
    pub write_us: u64,
    pub load_us: u64,
    pub audit_us: u64,
    pub resume_us: u64,
    /// Written to guest memory.
    pub pages: u64,
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
        self.stage_us.record(cost.stage_us);
        self.apply_us.record(cost.apply_us);
        self.write_us.record(cost.write_us);
        self.load_us.record(cost.load_us);
        if cost.audit_us > 0 {
            self.audit_us.record(cost.audit_us);
        }
        self.resume_us.record(cost.resume_us);
        self.last = Some(AppliedReport {
            epoch,
            stage_us: cost.stage_us,
            apply_us: cost.apply_us,
            write_us: cost.write_us,
            load_us: cost.load_us,
            audit_us: cost.audit_us,
            resume_us: cost.resume_us,
            pages: cost.pages,
        });
        self.area = cost.area;
        self.engine = cost.into();
        self.staged = cost.staged;
        self.count += 1;
    }
}
