//! How long the guest polls in vain before it sleeps.
//!
//! Invariants: never longer than it was told; not at all where sleeps are long, because on a machine with few
//! processors somebody else waits for this one, often whoever has the next frame.
//!
//! Does not sleep itself.

/// What a sleep costs at least: a sleep port is left through the VMM, which takes 28 us here. A wait that is
/// shorter than that and a permitted poll is better polled for.
const SLEEP_COST_US: i64 = 30;
const SPIN_START_US: i64 = 5;

/// How long to poll, as sleeps have taught.
pub struct Patience {
    spin_us: i64,
    spin_max_us: i64,
}

impl Patience {
    /// At most so long.
    pub fn new(spin_max_us: i64) -> Self {
        Self {
            spin_us: 0,
            spin_max_us,
        }
    }

    /// How long to poll now.
    pub fn spin_us(&self) -> i64 {
        self.spin_us
    }

    /// A sleep took so long, its cost included.
    pub fn slept(&mut self, slept_us: i64) {
        self.spin_us = if slept_us <= self.spin_max_us + SLEEP_COST_US {
            (self.spin_us * 2).max(SPIN_START_US).min(self.spin_max_us)
        } else {
            self.spin_us / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_teach_polling_up_to_its_limit_and_long_ones_unteach_it() {
        let mut patience = Patience::new(20);
        assert_eq!(patience.spin_us(), 0);
        for _ in 0..5 {
            patience.slept(SLEEP_COST_US + 20);
        }
        assert_eq!(patience.spin_us(), 20);
        for _ in 0..5 {
            patience.slept(SLEEP_COST_US + 21);
        }
        assert_eq!(patience.spin_us(), 0);
        let mut never = Patience::new(0);
        never.slept(1);
        assert_eq!(never.spin_us(), 0);
    }
}
