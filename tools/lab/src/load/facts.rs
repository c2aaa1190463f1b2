//! What the client side knows to be true of the guest, shared by all conversations.
//!
//! Invariants: a fact is recorded when its answer arrives, never when its request leaves; a request remembers
//! the facts at its departure (a *floor*), and its answer may not fall below them.
//!
//! Does not know protocols.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

/// Notes kept about wrong answers and lost connections; counts go on.
const NOTES_MAX: usize = 40;
/// Session tokens and random numbers remembered.
const REMEMBERED_MAX: usize = 4096;
/// Values of a shared counter whose uniqueness is watched.
const WATCHED_MAX: u64 = 64 << 20;
/// How far the guest's wall clock may be from ours.
const CLOCK_TOLERANCE_US: u64 = 30_000_000;

/// Everything the conversations share.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Distinguishes this run's keys from those of other runs against the same guest.
    pub(crate) tag: String,
    /// Only deterministic requests may be made.
    pub(crate) deterministic: bool,
    /// No connection raises anything any more.
    pub(crate) quiet: bool,
    /// The counter behind `POST /counter`.
    pub(crate) posts: Rising,
    /// The shared key that every RESP conversation increments.
    pub(crate) hits: Rising,
    /// Highest wall-clock time the guest told, in microseconds since 1970.
    pub(crate) clock_us: u64,
    /// Sessions the guest opened.
    pub(crate) sessions: Vec<Session>,
    /// What `/bytes/N` begins with, for every N.
    pub(crate) page: Vec<u8>,
    randoms: HashSet<String>,
    wrong: u64,
    notes: Vec<String>,
}

impl Facts {
    pub(crate) fn new(tag: String, deterministic: bool) -> Self {
        Self {
            tag,
            deterministic,
            quiet: false,
            posts: Rising::default(),
            hits: Rising::default(),
            clock_us: 0,
            sessions: Vec::new(),
            page: (0..super::PAGE_MAX).map(page_byte).collect(),
            randoms: HashSet::new(),
            wrong: 0,
            notes: Vec::new(),
        }
    }

    /// Counts a wrong answer.
    pub(crate) fn wrong(&mut self, what: String) {
        self.wrong += 1;
        self.note(format!("wrong: {what}"));
    }

    /// Counts a wrong answer if there is one.
    pub(crate) fn judge(&mut self, verdict: Result<(), String>) {
        if let Err(what) = verdict {
            self.wrong(what);
        }
    }

    pub(crate) fn note(&mut self, what: String) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push(what);
        }
    }

    pub(crate) fn wrong_count(&self) -> u64 {
        self.wrong
    }

    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Another session can be remembered.
    pub(crate) fn wants_sessions(&self) -> bool {
        self.sessions.len() < super::SESSIONS_MAX
    }

    /// A random value must be new.
    pub(crate) fn random_seen(&mut self, value: String) -> Result<(), String> {
        if self.randoms.len() < REMEMBERED_MAX && !self.randoms.insert(value.clone()) {
            return Err(format!("random value {value} came twice"));
        }
        Ok(())
    }

    /// The guest's wall clock may not go back behind `floor_us`, nor be far from ours.
    pub(crate) fn time_told(&mut self, floor_us: u64, told_us: u64) -> Result<(), String> {
        self.clock_us = self.clock_us.max(told_us);
        if told_us < floor_us {
            return Err(format!("time went back by {} us", floor_us - told_us));
        }
        let here_us = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
            });
        if told_us.abs_diff(here_us) > CLOCK_TOLERANCE_US {
            return Err(format!(
                "time {told_us} us is far from the client's {here_us} us"
            ));
        }
        Ok(())
    }
}

/// A session that the guest opened.
#[derive(Debug)]
pub(crate) struct Session {
    /// Its secret name.
    pub(crate) token: String,
    /// What the guest says about it, once it was asked.
    pub(crate) told: Option<String>,
}

impl Session {
    /// The guest was asked about it.
    pub(crate) fn asked(&mut self, told: String) -> Result<(), String> {
        match &self.told {
            Some(before) if *before != told => Err(format!(
                "session {} is {told:?}, was {before:?}",
                self.token
            )),
            _ => {
                self.told = Some(told);
                Ok(())
            }
        }
    }
}

/// Byte `i` of every `/bytes/N` page.
fn page_byte(i: usize) -> u8 {
    // The remainder is below 26.
    b'a' + ((i * 7 + i / 251) % 26) as u8
}

/// A counter that several connections raise by one at a time.
#[derive(Debug, Default)]
pub(crate) struct Rising {
    highest: u64,
    acknowledged: u64,
    unknown: u64,
    seen: Vec<u64>,
}

impl Rising {
    /// To be remembered when a raising request leaves.
    pub(crate) fn floor(&self) -> u64 {
        self.highest
    }

    /// A raise was answered with `value`; its request left at `floor`.
    pub(crate) fn raised(&mut self, floor: u64, value: u64) -> Result<(), String> {
        self.acknowledged += 1;
        self.highest = self.highest.max(value);
        if value <= floor {
            return Err(format!("counter went back: {value} after {floor}"));
        }
        if value < WATCHED_MAX {
            let (word, bit) = ((value / 64) as usize, value % 64);
            if self.seen.len() <= word {
                self.seen.resize(word + 1, 0);
            }
            if self.seen[word] & (1 << bit) != 0 {
                return Err(format!("counter gave {value} twice"));
            }
            self.seen[word] |= 1 << bit;
        }
        Ok(())
    }

    /// A raise was never answered: it may have happened or not.
    pub(crate) fn lost(&mut self) {
        self.unknown += 1;
    }

    /// The counter was read, and its request left at `floor`.
    pub(crate) fn read(&mut self, floor: u64, value: u64) -> Result<(), String> {
        self.highest = self.highest.max(value);
        if value < floor {
            return Err(format!("counter went back: read {value} after {floor}"));
        }
        Ok(())
    }

    /// A counter that began at 0 and was raised by nobody else was read when no raise was under way.
    pub(crate) fn settled(&self, value: u64) -> Result<(), String> {
        let (low, high) = (self.acknowledged, self.acknowledged + self.unknown);
        if (low..=high).contains(&value) {
            return Ok(());
        }
        Err(format!(
            "counter is {value}, but {low} raises were acknowledged ({high} at most)"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rising_counter_may_not_repeat_or_fall() {
        let mut counter = Rising::default();
        assert!(counter.raised(0, 2).is_ok());
        // Left before 2 was known.
        assert!(counter.raised(0, 1).is_ok());
        assert!(counter.raised(0, 2).unwrap_err().contains("twice"));
        assert!(
            counter
                .raised(counter.floor(), 2)
                .unwrap_err()
                .contains("back")
        );
    }

    #[test]
    fn a_settled_counter_equals_what_was_acknowledged() {
        let mut counter = Rising::default();
        counter.raised(0, 1).unwrap();
        counter.raised(1, 2).unwrap();
        assert!(counter.settled(2).is_ok() && counter.settled(1).is_err());
        counter.lost();
        assert!(counter.settled(3).is_ok() && counter.settled(4).is_err());
    }

    #[test]
    fn time_may_not_go_back() {
        let mut facts = Facts::new("t".to_owned(), false);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_micros() as u64;
        assert!(facts.time_told(0, now).is_ok());
        assert!(facts.time_told(facts.clock_us, now - 1).is_err());
        assert!(facts.time_told(0, 1_000).is_err());
    }
}
