//! Which dirty log it is to be: what is wanted, how much RAM there is and what KVM answers, as a decision without KVM.
//!
//! Invariant: a mechanism that KVM does not name is never chosen; the bitmap is there always.
//!
//! Does not enable anything, and so does not know what KVM refuses in spite of its answer.

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use serde::Deserialize;

/// From so much RAM on `Auto` is the ring.
pub(super) const RING_FROM_BYTES: u64 = 4 << 30;

/// Which mechanism is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirtyChoice {
    /// The one that makes the shorter pause with so much RAM: see [`DirtyTracker::new`](super::DirtyTracker::new).
    #[default]
    Auto,
    /// The bitmap.
    Bitmap,
    /// The ring; the bitmap where KVM has no ring.
    Ring,
}

/// What KVM says of its dirty logs when it is asked for its extensions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Answers {
    /// Bytes that an acquire/release ring may have; 0: there is none.
    pub(super) ring_acq_rel: i32,
    /// Bytes of a plain ring.
    pub(super) ring: i32,
    /// Flags of manual protection.
    pub(super) manual_protect: i32,
}

impl Answers {
    /// `check_extension` asks KVM for one of them.
    pub(super) fn of(check_extension: impl Fn(u32) -> i32) -> Self {
        Self {
            ring_acq_rel: check_extension(KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
            ring: check_extension(KVM_CAP_DIRTY_LOG_RING),
            manual_protect: check_extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
        }
    }
}

/// What is to be enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Rings, by this capability.
    Ring { capability: u32 },
    /// The bitmap, with these flags of manual protection; 0: reading clears.
    Bitmap { manual: u32 },
}

/// The log that makes the shorter pause, as far as there is a choice.
pub(super) fn plan(choice: DirtyChoice, ram_bytes: u64, answers: &Answers) -> Plan {
    let wants_ring = match choice {
        DirtyChoice::Auto => ram_bytes >= RING_FROM_BYTES,
        DirtyChoice::Bitmap => false,
        DirtyChoice::Ring => true,
    };
    if !wants_ring {
        return bitmap(answers);
    }
    // Without the acquire/release form the plain one is meant for x86, where it is the same.
    let capability = match (answers.ring_acq_rel > 0, answers.ring > 0) {
        (true, _) => KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        (false, true) => KVM_CAP_DIRTY_LOG_RING,
        (false, false) => {
            tracing::warn!(
                "KVM has no dirty ring here, so the bitmap it is: the more memory, the longer its pauses"
            );
            return bitmap(answers);
        }
    };
    Plan::Ring { capability }
}

/// The bitmap as this KVM has it.
pub(super) fn bitmap(answers: &Answers) -> Plan {
    // A failed question is negative, and has no flags.
    let has = u32::try_from(answers.manual_protect).unwrap_or(0);
    let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    // All set at first says who clears in ranges; the other way there is nobody who would.
    let manual = match has & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE {
        0 => 0,
        _ => has & wanted,
    };
    Plan::Bitmap { manual }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: u64 = RING_FROM_BYTES - 4096;
    const LARGE: u64 = RING_FROM_BYTES;
    /// Bytes of the largest ring, as Linux answers.
    const RING: i32 = 1 << 20;

    const PLAIN: Plan = Plan::Bitmap { manual: 0 };
    const RANGES: Plan = Plan::Bitmap { manual: 1 };
    const ALL_SET: Plan = Plan::Bitmap { manual: 3 };
    const ACQ_REL: Plan = Plan::Ring { capability: 223 };
    const OLD_RING: Plan = Plan::Ring { capability: 192 };

    /// What KVM answers for its two rings and for manual protection, and what follows for a ring and for a bitmap.
    const ANSWERS: &[([i32; 3], Plan, Plan)] = &[
        // No ring, whatever is wanted; the older the kernel, the less its bitmap can do.
        ([0, 0, 0], PLAIN, PLAIN),
        ([0, 0, 1], RANGES, RANGES),
        ([0, 0, 3], ALL_SET, ALL_SET),
        // The plain ring of older kernels, and both of newer ones.
        ([0, RING, 3], OLD_RING, ALL_SET),
        ([RING, RING, 3], ACQ_REL, ALL_SET),
        // The weakly ordered kind of host has one only.
        ([RING, 0, 3], ACQ_REL, ALL_SET),
        // A ring without a manual bitmap, and one beside the older manual bitmap.
        ([RING, RING, 0], ACQ_REL, PLAIN),
        ([0, RING, 0], OLD_RING, PLAIN),
        ([0, RING, 1], OLD_RING, RANGES),
        // All set without manual protection is of no use.
        ([0, 0, 2], PLAIN, PLAIN),
        ([RING, RING, 2], ACQ_REL, PLAIN),
        // Flags of the future are not asked for.
        ([0, 0, 7], ALL_SET, ALL_SET),
        // Errors are no answers, and have no flags either.
        ([-1, -1, -1], PLAIN, PLAIN),
        ([-22, RING, -22], OLD_RING, PLAIN),
        ([RING, -22, 3], ACQ_REL, ALL_SET),
    ];

    #[test]
    fn each_answer_of_kvm_leads_to_the_log_that_it_has() {
        for &([ring_acq_rel, ring, manual_protect], with_ring, without) in ANSWERS {
            let answers = Answers {
                ring_acq_rel,
                ring,
                manual_protect,
            };
            let cases = [
                (DirtyChoice::Auto, SMALL, without),
                (DirtyChoice::Auto, LARGE, with_ring),
                (DirtyChoice::Bitmap, SMALL, without),
                (DirtyChoice::Bitmap, u64::MAX, without),
                (DirtyChoice::Ring, 0, with_ring),
                (DirtyChoice::Ring, LARGE, with_ring),
            ];
            for (choice, ram_bytes, expected) in cases {
                let found = plan(choice, ram_bytes, &answers);
                assert_eq!(found, expected, "{choice:?}, {ram_bytes}, {answers:?}");
            }
            assert_eq!(bitmap(&answers), without, "{answers:?}");
        }
    }

    #[test]
    fn each_question_is_about_what_its_answer_is_taken_for() {
        // Numbers of the KVM API, not ours.
        let answers = Answers::of(|capability| match capability {
            223 => 10,
            192 => 20,
            168 => 30,
            _ => -1,
        });
        let expected = Answers {
            ring_acq_rel: 10,
            ring: 20,
            manual_protect: 30,
        };
        assert_eq!(answers, expected);
    }
}
