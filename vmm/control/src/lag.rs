//! Whether the SVM keeps up with the PVM, and how much slower the PVM must be for that (rule 16).
//!
//! What is looked at is how much later the SVM's answers come than the PVM's, on average over a while, without the round
//! trip of the link. A lag that is small, or that shrinks, is nothing to do about: the SVM has work to catch up with after
//! every checkpoint. One that neither is takes time from the PVM, a level at a time; one that is small gives it back.
//!
//! Invariants: a checkpoint's stop is no lag, whoever counts the answers leaves it out; without answers nothing is
//! concluded; a PVM that was slowed down as far as is sensible without any help gets all of its time back, and is left
//! alone for a while that doubles.
//!
//! Does not decide whether a late answer is a divergence.

use crate::storm::Pace;

/// Looks with a large lag, one after the other, before something is done.
const LOOKS: u32 = 3;
/// No further down: a guest that answers ten times more slowly than it could is worse off than with checkpoints.
pub(crate) const LEVEL_MAX: usize = 5;
/// The while in which a PVM is left alone doubles so often at most.
const RESTS_MAX: u32 = 6;

/// What a look has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// The PVM is slowed down one level.
    Slowed,
    /// It gets some time back.
    Relieved,
    /// Slowing down has not helped; it gets all of it back.
    Unhelped,
}

/// The controller.
#[derive(Debug, Default)]
pub(crate) struct Lag {
    /// Since the last look.
    answers: u64,
    late_us: u64,
    look_at_us: u64,
    /// As of the last look that had answers.
    lag_us: u64,
    /// Of the link, 0: not known yet.
    rtt_us: u64,
    level: usize,
    /// Looks with a large lag since it was small, or since something was done.
    late_looks: u32,
    /// The lag then.
    before_us: u64,
    relief_at_us: u64,
    /// Not slowed down before.
    rest_until_us: u64,
    rests: u32,
}

impl Lag {
    /// There is another secondary, or none.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Place in the table of shares.
    pub(crate) fn level(&self) -> usize {
        self.level
    }

    /// How much later the SVM's answers came than the PVM's, as far as the link does not explain it.
    pub(crate) fn lag_us(&self) -> u64 {
        self.lag_us
    }

    /// A round trip was measured. Of late ones most of the time was spent waiting for a processor, so short ones count.
    pub(crate) fn round_trip(&mut self, rtt_us: u64) {
        self.rtt_us = match self.rtt_us {
            0 => rtt_us,
            known => rtt_us.min(known + known / 8 + 1),
        };
    }

    /// So many answers came from the SVM, so much later than the PVM's all together.
    pub(crate) fn answers(
        &mut self,
        now_us: u64,
        pace: &Pace,
        answers: u64,
        late_us: u64,
    ) -> Option<Change> {
        self.answers = self.answers.saturating_add(answers);
        self.late_us = self.late_us.saturating_add(late_us);
        if now_us < self.look_at_us {
            return None;
        }
        self.look_at_us = now_us + pace.lag_look_us;
        self.look(now_us, pace)
    }

    fn look(&mut self, now_us: u64, pace: &Pace) -> Option<Change> {
        let (answers, late_us) = (self.answers, self.late_us);
        (self.answers, self.late_us) = (0, 0);
        if let Some(mean_us) = late_us.checked_div(answers) {
            self.lag_us = mean_us.saturating_sub(self.rtt_us);
            if self.lag_us > pace.lag_us {
                self.relief_at_us = now_us + pace.relief_us;
                return self.late(now_us, pace);
            }
            self.late_looks = 0;
        }
        self.relieve(now_us, pace)
    }

    fn late(&mut self, now_us: u64, pace: &Pace) -> Option<Change> {
        if self.late_looks == 0 {
            self.before_us = self.lag_us;
        }
        self.late_looks += 1;
        if self.late_looks < LOOKS {
            return None;
        }
        self.late_looks = 0;
        let shrinks = self.lag_us.saturating_mul(4) <= self.before_us.saturating_mul(3);
        if shrinks || now_us < self.rest_until_us {
            return None;
        }
        if self.level < LEVEL_MAX {
            self.level += 1;
            return Some(Change::Slowed);
        }
        self.level = 0;
        self.rest_until_us = now_us + (pace.lag_rest_us << self.rests);
        self.rests = (self.rests + 1).min(RESTS_MAX);
        Some(Change::Unhelped)
    }

    fn relieve(&mut self, now_us: u64, pace: &Pace) -> Option<Change> {
        if self.level == 0 || now_us < self.relief_at_us {
            return None;
        }
        self.level -= 1;
        self.relief_at_us = now_us + pace.relief_us;
        if self.level == 0 {
            // It has helped.
            self.rests = 0;
        }
        Some(Change::Relieved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace::DEFAULT;
    const LATE_US: u64 = 4 * PACE.lag_us;

    /// A controller, and the time.
    struct Lab {
        lag: Lag,
        now_us: u64,
    }

    impl Lab {
        fn new() -> Self {
            let (lag, now_us) = (Lag::default(), 1_000_000);
            Self { lag, now_us }
        }

        /// A look later, ten answers came, each so late.
        fn look(&mut self, late_us: u64) -> Option<Change> {
            self.idle(10, late_us * 10)
        }

        fn idle(&mut self, answers: u64, late_us: u64) -> Option<Change> {
            self.now_us += PACE.lag_look_us;
            self.lag.answers(self.now_us, &PACE, answers, late_us)
        }

        /// What so many looks with the same lag change.
        fn looks(&mut self, many: u32, late_us: u64) -> Vec<Change> {
            (0..many).filter_map(|_| self.look(late_us)).collect()
        }
    }

    use alloc::vec::Vec;

    #[test]
    fn rule_16_a_lag_that_does_not_shrink_slows_the_pvm_down_level_by_level() {
        let mut lab = Lab::new();
        assert_eq!(lab.looks(LOOKS - 1, LATE_US), []);
        assert_eq!(lab.look(LATE_US), Some(Change::Slowed));
        assert_eq!((lab.lag.level(), lab.lag.lag_us()), (1, LATE_US));
        assert_eq!(lab.looks(2 * LOOKS, LATE_US), [Change::Slowed; 2]);
        assert_eq!(lab.lag.level(), 3);
    }

    #[test]
    fn rule_16_a_lag_that_shrinks_takes_nothing() {
        let mut lab = Lab::new();
        let mut late_us = 100 * PACE.lag_us;
        while late_us > PACE.lag_us {
            assert_eq!(lab.look(late_us), None, "{late_us}");
            // By a quarter in three looks.
            late_us = late_us * 86 / 100;
        }
    }

    #[test]
    fn rule_16_a_lag_that_grows_slows_down_even_from_a_small_one() {
        let mut lab = Lab::new();
        let found = (1..20).find(|n| lab.look(n * PACE.lag_us / 2).is_some());
        assert_eq!(found, Some(5), "2.5 times the limit, the third above it");
    }

    #[test]
    fn rule_16_a_healthy_pair_and_a_hiccup_now_and_then_take_nothing() {
        let mut lab = Lab::new();
        for n in 0..1000 {
            let late_us = if n % 3 == 0 { LATE_US } else { PACE.lag_us };
            assert_eq!(lab.look(late_us), None, "{n}");
        }
    }

    #[test]
    fn rule_16_a_small_lag_gives_the_time_back_little_by_little() {
        let mut lab = Lab::new();
        assert_eq!(lab.looks(2 * LOOKS, LATE_US).len(), 2);
        let since_us = lab.now_us;
        assert_eq!(lab.look(PACE.lag_us), None, "not at once");
        let a_while = (2 * PACE.relief_us / PACE.lag_look_us) as u32;
        assert_eq!(lab.looks(a_while, PACE.lag_us), [Change::Relieved; 2]);
        assert!(lab.now_us >= since_us + 2 * PACE.relief_us);
        assert_eq!(lab.lag.level(), 0);
    }

    #[test]
    fn rule_16_a_guest_that_rests_gets_its_time_back() {
        let mut lab = Lab::new();
        lab.looks(LOOKS, LATE_US);
        let a_while = 1 + PACE.relief_us / PACE.lag_look_us;
        let changes: Vec<_> = (0..a_while).filter_map(|_| lab.idle(0, 0)).collect();
        assert_eq!(changes, [Change::Relieved]);
    }

    #[test]
    fn rule_16_the_round_trip_of_the_link_is_no_lag() {
        let mut lab = Lab::new();
        lab.lag.round_trip(LATE_US);
        assert_eq!(lab.looks(10 * LOOKS, LATE_US + PACE.lag_us), []);
        assert_eq!(lab.lag.lag_us(), PACE.lag_us);
        // Short ones count at once, long ones when they last.
        lab.lag.round_trip(LATE_US * 9);
        assert!(lab.lag.rtt_us < LATE_US * 9 / 8 + 2);
        lab.lag.round_trip(1);
        assert_eq!(lab.lag.rtt_us, 1);
        assert_eq!(lab.looks(LOOKS, LATE_US), [Change::Slowed]);
    }

    #[test]
    fn rule_16_what_slowing_down_does_not_help_gets_its_time_back_and_is_left_alone_for_longer_and_longer()
     {
        let mut lab = Lab::new();
        let mut rests = Vec::new();
        for _ in 0..3 {
            let mut changes = Vec::new();
            let begun_us = lab.now_us;
            while changes.last() != Some(&Change::Unhelped) {
                changes.extend(lab.look(LATE_US));
            }
            assert_eq!(changes.len(), LEVEL_MAX + 1);
            assert_eq!(lab.lag.level(), 0);
            // The first level is taken by the looks in which the rest ends.
            let slowing_us = u64::from(LOOKS) * PACE.lag_look_us * LEVEL_MAX as u64;
            rests.push((lab.now_us - begun_us - slowing_us) / PACE.lag_rest_us);
        }
        assert_eq!(rests, [0, 1, 2]);
    }

    #[test]
    fn looks_are_as_far_apart_as_they_should_be_and_numbers_do_not_overflow() {
        let mut lag = Lag::default();
        assert_eq!(lag.answers(5, &PACE, 1, 7), None);
        assert_eq!(lag.answers(6, &PACE, u64::MAX, u64::MAX), None);
        assert_eq!(lag.answers(7, &PACE, u64::MAX, u64::MAX), None);
        assert_eq!(lag.lag_us(), 7);
        assert_eq!(lag.answers(5 + PACE.lag_look_us, &PACE, 0, 0), None);
        assert_eq!(lag.lag_us(), 1);
    }
}
