//! Whether the secondary can follow: slows a PVM down that dirties memory faster than the link carries it, or says
//! that it cannot be protected; what the SVM's lag asks for (`lag`) counts as well, the slower of the two.
//!
//! Invariant: a synchronisation ends. Each round that does not shrink what is left by a quarter takes time from the
//! PVM's vCPUs; when there is none left to take, what is left goes with the first checkpoint if the link carries it in
//! a moment, else it is given up.

use core::fmt;

use crate::lag::Lag;
use crate::storm::Pace;

/// Share of time that the vCPUs may run, in percent, from one level to the next.
const SHARES: [u8; 9] = [100, 70, 50, 30, 20, 10, 5, 2, 1];
/// A synchronisation that shrinks ends before that many rounds: each leaves three quarters at most.
const ROUNDS_MAX: u32 = 64;

/// Pages in a time, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    pages_per_s: u64,
}

impl Rate {
    pub(crate) fn of(pages: u64, us: u64) -> Self {
        let pages_per_s = pages.saturating_mul(1_000_000) / us.max(1);
        Self { pages_per_s }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = self.pages_per_s.saturating_mul(4096) / 100_000;
        let (mb, tenth) = (tenths / 10, tenths % 10);
        write!(f, "{} pages/s ({mb}.{tenth} MB/s)", self.pages_per_s)
    }
}

/// What follows a round of a synchronisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    /// Few pages are left, or as few as there will ever be.
    Ready,
    /// Another round.
    Again,
    /// The guest cannot be followed.
    GiveUp,
}

/// The controller.
#[derive(Debug)]
pub(crate) struct Pacer {
    level: usize,
    rounds: u32,
    /// Whether the SVM keeps up (rule 16).
    pub(crate) lag: Lag,
    /// The hold space is exhausted: the vCPUs stand still (rule 14).
    hold_is_full: bool,
    /// What the shell was told last.
    told_pct: u8,
    /// Nobody may join before.
    rejoin_at_us: u64,
    rejoin_us: u64,
    /// When some of the time is given back, without a checkpoint that says so.
    relief_at_us: u64,
}

impl Pacer {
    pub(crate) fn new() -> Self {
        Self {
            level: 0,
            rounds: 0,
            lag: Lag::default(),
            hold_is_full: false,
            told_pct: 100,
            rejoin_at_us: 0,
            rejoin_us: 0,
            relief_at_us: 0,
        }
    }

    /// The share that the shell is to be told of, when it has changed.
    pub(crate) fn change(&mut self) -> Option<u8> {
        let run_pct = self.run_pct();
        (core::mem::replace(&mut self.told_pct, run_pct) != run_pct).then_some(run_pct)
    }

    /// Share of time that the vCPUs may run.
    pub(crate) fn run_pct(&self) -> u8 {
        match self.hold_is_full {
            true => 0,
            false => SHARES[self.level.max(self.lag.level())],
        }
    }

    pub(crate) fn hold_full(&mut self, is_full: bool) {
        self.hold_is_full = is_full;
    }

    pub(crate) fn may_join(&self, now_us: u64) -> bool {
        self.rejoin_at_us <= now_us
    }

    /// A synchronisation begins, or there is no secondary any more.
    pub(crate) fn reset(&mut self) {
        (self.level, self.rounds) = (0, 0);
        self.lag.reset();
    }

    /// A round sent so many pages in so long, while so many became dirty.
    pub(crate) fn round(
        &mut self,
        now_us: u64,
        pace: &Pace,
        sent_pages: u64,
        dirty_pages: u64,
        took_us: u64,
    ) -> Round {
        self.rounds += 1;
        if dirty_pages <= pace.ready_pages {
            return Round::Ready;
        }
        let shrinks = dirty_pages.saturating_mul(4) <= sent_pages.saturating_mul(3);
        let slowed = shrinks || self.slow_down();
        if slowed && self.rounds < ROUNDS_MAX {
            return Round::Again;
        }
        // All that the guest writes to can be dirty again in however short a round; a capture holds it still.
        let product = |pages: u64, us: u64| u128::from(pages) * u128::from(us);
        if product(dirty_pages, took_us) <= product(sent_pages, pace.rest_us) {
            return Round::Ready;
        }
        self.rejoin_us = match self.rejoin_us {
            0 => pace.rejoin_us,
            us => (us * 2).min(pace.rejoin_max_us),
        };
        self.rejoin_at_us = now_us + self.rejoin_us;
        Round::GiveUp
    }

    /// Takes time from the vCPUs; false when there is none left to take.
    pub(crate) fn slow_down(&mut self) -> bool {
        let slowed = self.level + 1 < SHARES.len();
        self.level += usize::from(slowed);
        slowed
    }

    /// A checkpoint that took so long is committed.
    pub(crate) fn committed(&mut self, now_us: u64, pace: &Pace, took_us: u64) {
        self.rejoin_us = 0;
        self.relief_at_us = now_us + pace.relief_us;
        if took_us > pace.slow_us {
            self.slow_down();
        } else {
            self.level = self.level.saturating_sub(1);
        }
    }

    /// When a pair that needs no checkpoint gives time back; `None` while the vCPUs have all of it.
    pub(crate) fn relief_at_us(&self) -> Option<u64> {
        (self.level > 0).then_some(self.relief_at_us)
    }

    /// Gives time back, if it is due.
    pub(crate) fn relieve(&mut self, now_us: u64, pace: &Pace) {
        if self.relief_at_us().is_some_and(|at| at <= now_us) {
            self.level -= 1;
            self.relief_at_us = now_us + pace.relief_us;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace::DEFAULT;

    /// A round that the guest outran as far as it can.
    const LONG_US: u64 = 2 * PACE.rest_us;

    /// After rounds of so long that all helped nothing.
    fn slowest(took_us: u64) -> Pacer {
        let mut pacer = Pacer::new();
        let mut shares = [0; SHARES.len() - 1];
        for share in &mut shares {
            assert_eq!(pacer.round(9, &PACE, 1000, 1000, took_us), Round::Again);
            *share = pacer.change().unwrap();
        }
        assert_eq!(shares, SHARES[1..]);
        pacer
    }

    #[test]
    fn a_guest_that_dirties_faster_than_the_link_is_slowed_and_then_given_up() {
        let mut pacer = slowest(LONG_US);
        assert_eq!(pacer.round(9, &PACE, 1000, 751, LONG_US), Round::GiveUp);
        assert!(!pacer.may_join(8 + PACE.rejoin_us) && pacer.may_join(9 + PACE.rejoin_us));
    }

    #[test]
    fn what_slowing_does_not_shrink_goes_with_the_checkpoint_if_the_link_carries_it_in_a_moment() {
        let rounds = [
            (1000, 1000, PACE.rest_us, Round::Ready),
            (1000, 1000, PACE.rest_us + 1, Round::GiveUp),
            // At the rate of the round, not in its time.
            (1000, 2000, PACE.rest_us / 2, Round::Ready),
            (1000, 2001, PACE.rest_us / 2, Round::GiveUp),
            (0, 1000, 1, Round::GiveUp),
            (1 << 60, 1 << 60, 1 << 60, Round::GiveUp),
        ];
        for (sent_pages, dirty_pages, took_us, what) in rounds {
            let mut pacer = slowest(PACE.rest_us);
            let round = pacer.round(9, &PACE, sent_pages, dirty_pages, took_us);
            assert_eq!(round, what, "{sent_pages} {dirty_pages} {took_us}");
            assert_eq!(pacer.may_join(9), what == Round::Ready);
        }
    }

    #[test]
    fn rates_are_pages_and_megabytes_a_second() {
        let text = |pages, us| alloc::format!("{}", Rate::of(pages, us));
        assert_eq!(text(1000, 2_000_000), "500 pages/s (2.0 MB/s)");
        assert_eq!(text(123, 0), "123000000 pages/s (503808.0 MB/s)");
        assert_eq!(text(0, 5), "0 pages/s (0.0 MB/s)");
    }

    #[test]
    fn a_round_that_shrinks_takes_nothing_from_the_guest() {
        let mut pacer = Pacer::new();
        assert_eq!(pacer.round(0, &PACE, 1000, 750, LONG_US), Round::Again);
        assert_eq!(pacer.change(), None);
        assert_eq!(pacer.round(0, &PACE, 750, 256, LONG_US), Round::Ready);
    }

    #[test]
    fn no_sequence_of_rounds_is_endless() {
        let mut pacer = Pacer::new();
        let mut round = || pacer.round(0, &PACE, u64::MAX / 8, 300, u64::MAX);
        let rounds = (0..1000).take_while(|_| round() == Round::Again);
        assert!(rounds.count() < 100);
    }

    #[test]
    fn rule_14_without_hold_space_the_vcpus_stand_still() {
        let mut pacer = Pacer::new();
        pacer.slow_down();
        assert_eq!(pacer.change(), Some(70));
        pacer.hold_full(true);
        assert_eq!(pacer.change(), Some(0));
        pacer.hold_full(false);
        assert_eq!(pacer.change(), Some(70));
    }

    #[test]
    fn rule_16_the_slower_of_two_reasons_counts() {
        let mut pacer = Pacer::new();
        let late_us = 2 * PACE.lag_us;
        for look in 1..=6 {
            pacer
                .lag
                .answers(look * PACE.lag_look_us, &PACE, 1, late_us);
        }
        assert_eq!(pacer.change(), Some(50));
        pacer.slow_down();
        assert_eq!(pacer.change(), None);
        pacer.reset();
        assert_eq!(pacer.change(), Some(100));
    }

    #[test]
    fn quick_checkpoints_give_the_time_back() {
        let mut pacer = Pacer::new();
        pacer.committed(0, &PACE, PACE.slow_us + 1);
        assert_eq!(pacer.change(), Some(70));
        pacer.committed(0, &PACE, PACE.slow_us);
        assert_eq!(pacer.change(), Some(100));
    }

    #[test]
    fn a_pair_without_checkpoints_gives_the_time_back_little_by_little() {
        let mut pacer = Pacer::new();
        pacer.relieve(u64::MAX, &PACE);
        assert_eq!((pacer.change(), pacer.relief_at_us()), (None, None));
        pacer.slow_down();
        pacer.slow_down();
        pacer.committed(7, &PACE, PACE.slow_us + 1);
        assert_eq!(pacer.change(), Some(30));
        for share in [50, 70, 100] {
            let at_us = pacer.relief_at_us().unwrap();
            pacer.relieve(at_us - 1, &PACE);
            assert_eq!(pacer.change(), None);
            pacer.relieve(at_us, &PACE);
            assert_eq!(pacer.change(), Some(share));
        }
        assert_eq!(pacer.relief_at_us(), None);
    }
}
