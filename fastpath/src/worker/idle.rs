//! How long a worker polls in vain before it sleeps.
//!
//! Invariants: the spin time stays within its limits; it grows when a sleep turned out shorter than
//! a permitted spin, and shrinks when it was long. A thread lets others run while it spins: where there are
//! fewer processors than threads, whom it waits for may be one of them. One that may sleep does so at each turn, one
//! that never sleeps each [`BUSY_SPIN_US`], which costs it nothing where it has a processor to itself. It keeps
//! its processor from being halted, which a wake-up would have to wait for. One that may sleep lets frames gather
//! first where that is worth it ([`Gather`]).
//!
//! Does not sleep itself.

use super::gather::Gather;

/// How a worker waits for work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PollMode {
    /// Spins for a learnt time, then sleeps.
    #[default]
    Adaptive,
    /// Never sleeps; others are let run now and then while there is nothing to do.
    Busy,
    /// Sleeps at once.
    Interrupt,
}

/// Longest spin of [`PollMode::Adaptive`].
pub const SPIN_MAX_US: u64 = 100;
const SPIN_START_US: u64 = 5;
/// A thread that never sleeps lets others run when it has found nothing for so long. Without that it has always
/// used up its share of the processor when a frame comes, and is the last to run of all who want to.
const BUSY_SPIN_US: u64 = 50;

/// What to do when a step found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Spin,
    /// Spin, but let whoever has something to do go first.
    Yield,
    /// Wait a moment for more frames.
    Gather,
    Sleep,
}

#[derive(Debug)]
pub(super) struct Idle {
    mode: PollMode,
    spin_us: u64,
    since_us: Option<u64>,
    gather: Gather,
}

impl Idle {
    pub(super) fn new(mode: PollMode) -> Self {
        Self {
            mode,
            spin_us: SPIN_START_US,
            since_us: None,
            gather: Gather::default(),
        }
    }

    /// A step found work.
    pub(super) fn worked(&mut self) {
        self.since_us = None;
    }

    /// A step found nothing; `frames` have been moved since the worker started, if more may be waited for.
    pub(super) fn next(&mut self, now_us: u64, frames: Option<u64>) -> Next {
        let is_first = self.since_us.is_none();
        let since_us = *self.since_us.get_or_insert(now_us);
        match self.mode {
            PollMode::Busy if now_us.saturating_sub(since_us) < BUSY_SPIN_US => Next::Spin,
            PollMode::Busy => {
                self.since_us = None;
                Next::Yield
            }
            PollMode::Interrupt => Next::Sleep,
            PollMode::Adaptive
                if is_first && frames.is_some_and(|n| self.gather.is_worth_it(now_us, n)) =>
            {
                Next::Gather
            }
            PollMode::Adaptive if now_us.saturating_sub(since_us) < self.spin_us => Next::Yield,
            PollMode::Adaptive => Next::Sleep,
        }
    }

    /// It has waited for more frames.
    pub(super) fn gathered(&mut self, now_us: u64) {
        self.since_us = Some(now_us);
    }

    /// A sleep of this length ended with work, a command or a deadline.
    pub(super) fn slept(&mut self, slept_us: u64) {
        self.since_us = None;
        self.spin_us = if slept_us <= SPIN_MAX_US {
            (self.spin_us * 2).clamp(SPIN_START_US, SPIN_MAX_US)
        } else {
            self.spin_us / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_teach_spinning_and_long_ones_unteach_it() {
        let mut idle = Idle::new(PollMode::Adaptive);
        for _ in 0..10 {
            idle.slept(10);
        }
        assert_eq!(idle.next(1000, None), Next::Yield);
        assert_eq!(idle.next(1000 + SPIN_MAX_US - 1, None), Next::Yield);
        assert_eq!(idle.next(1000 + SPIN_MAX_US, None), Next::Sleep);
        for _ in 0..10 {
            idle.slept(100_000);
        }
        assert_eq!(idle.next(5000, None), Next::Sleep);
        idle.slept(3);
        assert_eq!(
            idle.next(6000, None),
            Next::Yield,
            "learns again from nothing"
        );
    }

    #[test]
    fn modes_are_obeyed() {
        assert_eq!(Idle::new(PollMode::Interrupt).next(0, None), Next::Sleep);
    }

    #[test]
    fn who_never_sleeps_lets_others_run_now_and_then_and_only_without_work() {
        let mut idle = Idle::new(PollMode::Busy);
        let turn = |idle: &mut Idle, from_us: u64| {
            let spins = (from_us..).take_while(|&now| idle.next(now, None) == Next::Spin);
            spins.count() as u64
        };
        assert_eq!(turn(&mut idle, 1000), BUSY_SPIN_US);
        assert_eq!(turn(&mut idle, 5000), BUSY_SPIN_US, "and then polls again");
        for now in (9000..20_000).step_by(BUSY_SPIN_US as usize - 1) {
            assert_eq!(idle.next(now, None), Next::Spin);
            idle.worked();
        }
    }
}
