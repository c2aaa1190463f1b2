//! How late the SVM's answers are (rule 16): what the control thread looks at to tell a lag that does not shrink.
//!
//! Invariants: lateness begins when the SVM has caught up with its resume, or could have, so a checkpoint is none of it; a
//! worker writes shared memory once a batch, and nobody is woken.
//!
//! Does not judge what is late.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A commit is applied and the SVM runs before this has passed, unless it lags.
const APPLY_US: u64 = 100_000;

/// What all shards of a primary have seen since it was taken last; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Answers(Arc<[AtomicU64; 2]>);

impl Answers {
    /// How many answers of the SVM released something, and how late they were together, in microseconds.
    pub fn take(&self) -> (u64, u64) {
        // A batch that comes in between is halved: the mean of the next look does not show it.
        let [answers, late_us] = &*self.0;
        (
            answers.swap(0, Ordering::Relaxed),
            late_us.swap(0, Ordering::Relaxed),
        )
    }

    fn add(&self, answers: u64, late_us: u64) {
        self.0[0].fetch_add(answers, Ordering::Relaxed);
        self.0[1].fetch_add(late_us, Ordering::Relaxed);
    }
}

/// One shard's view.
#[derive(Debug)]
pub(super) struct Lateness {
    shared: Answers,
    /// The SVM can answer from here on.
    since_us: u64,
    /// Since `tell`.
    answers: u64,
    late_us: u64,
}

impl Lateness {
    pub(super) fn new(shared: Answers) -> Self {
        Self {
            shared,
            since_us: u64::MAX,
            answers: 0,
            late_us: 0,
        }
    }

    /// A commit: the SVM is on its way to another state.
    pub(super) fn committed(&mut self, now_us: u64) {
        self.since_us = now_us + APPLY_US;
    }

    /// It has consumed what came before its resume (rule 9).
    pub(super) fn caught_up(&mut self, now_us: u64) {
        self.since_us = self.since_us.min(now_us);
    }

    /// There is no SVM any more.
    pub(super) fn detached(&mut self) {
        self.since_us = u64::MAX;
    }

    /// An answer released a frame that was held for so long.
    #[inline]
    pub(super) fn matched(&mut self, now_us: u64, held_us: u64) {
        if let Some(could_us) = now_us.checked_sub(self.since_us) {
            self.answers += 1;
            self.late_us += held_us.min(could_us);
        }
    }

    /// A batch is through.
    #[inline]
    pub(super) fn tell(&mut self) {
        if self.answers > 0 {
            self.shared.add(self.answers, self.late_us);
            (self.answers, self.late_us) = (0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn late() -> (Answers, Lateness) {
        let shared = Answers::default();
        (shared.clone(), Lateness::new(shared))
    }

    fn told(shared: &Answers, late: &mut Lateness) -> (u64, u64) {
        late.tell();
        shared.take()
    }

    #[test]
    fn rule_16_lateness_begins_when_the_svm_has_caught_up() {
        let (shared, mut late) = late();
        late.committed(1_000);
        late.matched(1_500, 400);
        assert_eq!(told(&shared, &mut late), (0, 0), "it is applied meanwhile");
        late.caught_up(2_000);
        late.matched(2_300, 1_300);
        late.matched(2_400, 50);
        assert_eq!(told(&shared, &mut late), (2, 350));
        assert_eq!(told(&shared, &mut late), (0, 0));
        late.caught_up(9_000);
        late.matched(9_100, 500);
        assert_eq!(told(&shared, &mut late), (1, 500), "its first word counts");
    }

    #[test]
    fn rule_16_an_svm_that_does_not_catch_up_is_late_all_the_same() {
        let (shared, mut late) = late();
        late.committed(1_000);
        late.matched(1_000 + APPLY_US + 70, 90_000);
        assert_eq!(told(&shared, &mut late), (1, 70));
    }

    #[test]
    fn rule_16_shards_count_together_and_nobody_counts_without_an_svm() {
        let (shared, mut one) = late();
        let mut two = Lateness::new(shared.clone());
        one.matched(5, 5);
        for late in [&mut one, &mut two] {
            late.committed(0);
            late.caught_up(0);
            late.matched(10, 3);
            late.tell();
        }
        assert_eq!(shared.take(), (2, 6));
        two.detached();
        two.matched(20, 3);
        assert_eq!(told(&shared, &mut two), (0, 0));
    }
}
