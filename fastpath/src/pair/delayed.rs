//! What one host tells the other without haste: with the next frame if there is one soon, else after a while.
//!
//! Each message of its own wakes the other host's worker, and on a machine that is short of processors that is time
//! which a request waits for.
//!
//! Invariants: what was noted is said within [`DELAY_US`] and a wake-up, or after [`COUNT_MAX`] of its kind.
//!
//! Does not hold what is to be said.

/// How long it may wait for company.
const DELAY_US: u64 = 200;
/// So many are not kept waiting.
const COUNT_MAX: u64 = 32;

/// When to say what has been noted.
#[derive(Debug, Default)]
pub(super) struct Delayed {
    due_us: Option<u64>,
}

impl Delayed {
    /// There is something to say, `count` in all.
    pub(super) fn note(&mut self, now_us: u64, count: u64) {
        let due_us = self.due_us.get_or_insert(now_us + DELAY_US);
        if count >= COUNT_MAX {
            *due_us = now_us;
        }
    }

    /// When it has to be said.
    pub(super) fn due_us(&self) -> Option<u64> {
        self.due_us
    }

    /// Whether it has to be said now.
    pub(super) fn is_due(&self, now_us: u64) -> bool {
        self.due_us.is_some_and(|due_us| due_us <= now_us)
    }

    /// It was said, or is nobody's business any more.
    pub(super) fn clear(&mut self) {
        self.due_us = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_wait_for_the_time_of_the_first_and_many_for_none() {
        let mut delayed = Delayed::default();
        assert_eq!(delayed.due_us(), None);
        delayed.note(1000, 1);
        delayed.note(1100, 2);
        assert!(!delayed.is_due(1000 + DELAY_US - 1));
        assert!(delayed.is_due(1000 + DELAY_US));
        delayed.note(1150, COUNT_MAX);
        assert!(delayed.is_due(1150));
        delayed.clear();
        assert!(!delayed.is_due(u64::MAX));
    }
}
