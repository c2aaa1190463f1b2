//! Why a checkpoint is refused on the secondary, or an apply failed.
//!
//! Does not say what follows: what is refused before the commit point costs the checkpoint, a failed apply the secondary
//! (rule 13).

use colo_fastpath::ring::MemoryError;

use crate::checkpoint::ahead::area::AreaError;
use crate::checkpoint::audit::AuditError;
use crate::checkpoint::staging::StagingError;
use crate::machine::MachineError;
use crate::machine::record::RecordError;

/// Why a stage is refused or an apply failed.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The checkpoint lacks something or has too much of it.
    #[error("checkpoint has {found} {what} records, {expected} needed")]
    Count {
        /// Which kind.
        what: &'static str,
        /// How many came.
        found: usize,
        /// How many this machine needs.
        expected: usize,
    },
    /// A record of a kind that this build does not know.
    #[error("checkpoint has a state record of unknown kind {0}; update the secondary")]
    UnknownKind(u16),
    /// A record that its owner refuses.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The worker is gone or in another role.
    #[error("the packet worker is not in the secondary's role")]
    Role,
    /// The packet core refuses the translations.
    #[error("translations: {0}")]
    Translations(String),
    /// A chunk makes no sense, or there is no memory for it.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A checkpoint names pages that had not come ahead, or its list of them is none.
    #[error(transparent)]
    Area(#[from] AreaError),
    /// The primary has not told the key of page digests.
    #[error("a checkpoint without the key of its page digests")]
    NoKey,
    /// The audit found something.
    #[error("audit: the applied image is not the captured one: {0}")]
    Different(String),
    /// The audit could not be made.
    #[error("audit: {0}")]
    Audit(#[from] AuditError),
    /// Live pages for a machine that has run.
    #[error("live pages came after the first checkpoint")]
    LateSync,
    /// Guest memory can't be written.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

impl StageError {
    /// Whether the next checkpoint would be refused for the same reason (rule 22).
    pub(super) fn is_unfit(&self) -> bool {
        match self {
            Self::Count { .. } | Self::UnknownKind(_) | Self::Translations(_) => true,
            // What was not committed is in the next one, too.
            Self::Staging(e) => {
                matches!(e, StagingError::TooLarge { .. } | StagingError::NoMemory(_))
            }
            Self::Machine(e) => match e {
                MachineError::Record(e) => !matches!(e, RecordError::Damaged(_)),
                MachineError::Kvm(e) => !e.is_passing(),
                MachineError::Shape { .. } => true,
                _ => false,
            },
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_22_what_this_host_cannot_have_is_told_from_what_was_damaged() {
        let unfit = |e: MachineError| StageError::from(e).is_unfit();
        assert!(unfit(MachineError::Shape {
            found: 2,
            expected: 1
        }));
        let (theirs, ours) = ("2 kHz".to_owned(), "1 kHz".to_owned());
        let differs = RecordError::Unfit {
            what: "vCPU",
            field: "TSC frequency".to_owned(),
            theirs,
            ours,
        };
        assert!(unfit(differs.into()));
        assert!(!unfit(RecordError::Damaged("vCPU").into()));
        let too_large = StageError::from(StagingError::TooLarge { limit_mib: 1 });
        assert!(too_large.is_unfit() && too_large.to_string().contains("stage_mib = 1"));
        let twice = StagingError::Twice { number: 7 };
        assert!(!StageError::from(twice).is_unfit());
        assert!(StageError::UnknownKind(99).is_unfit());
    }
}
