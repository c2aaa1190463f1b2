//! How often a line may be logged that a guest can cause as often as it likes: a few in a row, then seldom.
//!
//! Invariant: the first lines after a quiet time are written, and each that is written says how many before it were not.
//!
//! Does not log, and does not count what happened: that is the counters'.

use std::fmt;

/// So many lines in [`PERIOD_US`].
const LINES: u32 = 5;
const PERIOD_US: u64 = 10_000_000;

/// The lines of one kind.
#[derive(Debug, Default)]
pub struct LogBudget {
    begun_us: u64,
    written: u32,
    left_out: u64,
}

impl LogBudget {
    /// Whether one more is to be written now.
    pub fn line(&mut self, now_us: u64) -> Option<LeftOut> {
        if now_us.saturating_sub(self.begun_us) >= PERIOD_US {
            (self.begun_us, self.written) = (now_us, 0);
        }
        if self.written >= LINES {
            self.left_out += 1;
            return None;
        }
        self.written += 1;
        Some(LeftOut(std::mem::take(&mut self.left_out)))
    }
}

/// How many lines were not written; to end the next one with.
#[derive(Debug, PartialEq, Eq)]
pub struct LeftOut(u64);

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " ({n} lines like this were left out)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_in_a_row_are_written_then_seldom_and_none_is_forgotten() {
        let mut budget = LogBudget::default();
        let from_us = 50_000_000;
        let mut told = Vec::new();
        for n in 0..1000 {
            told.extend(budget.line(from_us + n));
        }
        assert_eq!(told, [0; LINES as usize].map(LeftOut));
        let next = budget.line(from_us + PERIOD_US).unwrap();
        assert_eq!(next.to_string(), " (995 lines like this were left out)");
        assert_eq!(budget.line(from_us + PERIOD_US + 1), Some(LeftOut(0)));
        assert_eq!(LeftOut(0).to_string(), "");
    }
}
