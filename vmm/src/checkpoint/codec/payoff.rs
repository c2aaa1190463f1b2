//! Whether a way to make pages smaller pays: does the link need longer for the bytes it saves than the processor for
//! saving them?
//!
//! It is asked after each window of attempts. If not, the way rests for a number of pages, which quadruples each time up to a
//! limit, and is then tried for a window again.
//!
//! Invariants: the cost of an attempt that was not timed is that of the timed ones of its window, without the longest of
//! these: whoever was interrupted knows nothing of the work; a way that pays again rests for a short time at first.
//!
//! Holds no clock: who tries tells how long it took.

use super::counters::AttemptCounter;
use crate::checkpoint::pages::PAGE_BYTES;

/// Attempts between two questions.
pub const WINDOW: u32 = 64;
/// Pages of the first rest.
pub const REST_MIN_PAGES: u32 = 512;
/// Pages of the longest rest.
pub const REST_MAX_PAGES: u32 = 1 << 15;

/// The state of one way.
#[derive(Debug, Clone)]
pub struct Payoff {
    /// One in so many attempts is timed.
    timed_one_in: u32,
    attempts: u32,
    timed: u32,
    timed_ns: u64,
    /// Part of it: the longest.
    longest_ns: u64,
    saved_bytes: u64,
    rest_left_pages: u32,
    rest_next_pages: u32,
    counter: AttemptCounter,
}

impl Payoff {
    /// One in `timed_one_in` attempts is timed: 1 where reading the clock costs little beside an attempt.
    pub fn new(timed_one_in: u32) -> Self {
        Self {
            timed_one_in: timed_one_in.clamp(1, WINDOW),
            attempts: 0,
            timed: 0,
            timed_ns: 0,
            longest_ns: 0,
            saved_bytes: 0,
            rest_left_pages: 0,
            rest_next_pages: REST_MIN_PAGES,
            counter: AttemptCounter::default(),
        }
    }

    /// What was counted.
    pub fn counter(&self) -> AttemptCounter {
        self.counter
    }

    /// True if it rests now.
    pub fn is_resting(&self) -> bool {
        self.rest_left_pages > 0
    }

    /// Whether to try it on the next page. Each call counts as a page.
    pub fn allows(&mut self) -> bool {
        if self.rest_left_pages == 0 {
            return true;
        }
        self.rest_left_pages -= 1;
        self.counter.rested += 1;
        false
    }

    /// Tries it on a page: `attempt` gives the result, `None` where that was not small enough.
    pub fn attempt<'a>(
        &mut self,
        link_bytes_per_s: u64,
        now_ns: &mut impl FnMut() -> u64,
        attempt: impl FnOnce() -> Option<&'a [u8]>,
    ) -> Option<&'a [u8]> {
        let is_timed = self.attempts.is_multiple_of(self.timed_one_in);
        let start_ns = if is_timed { now_ns() } else { 0 };
        let bytes = attempt();
        if is_timed {
            let took_ns = now_ns().saturating_sub(start_ns);
            self.timed += 1;
            self.timed_ns += took_ns;
            self.longest_ns = self.longest_ns.max(took_ns);
        }
        let saved = bytes.map(|bytes| PAGE_BYTES.saturating_sub(bytes.len()));
        self.count(link_bytes_per_s, saved);
        bytes
    }

    /// An attempt that is known to take so long, and has saved so many bytes.
    pub fn note(&mut self, link_bytes_per_s: u64, took_ns: u64, saved_bytes: Option<usize>) {
        self.timed += 1;
        self.timed_ns += took_ns;
        self.count(link_bytes_per_s, saved_bytes);
    }

    fn count(&mut self, link_bytes_per_s: u64, saved_bytes: Option<usize>) {
        self.counter.tried += 1;
        self.attempts += 1;
        match saved_bytes {
            Some(bytes) => self.saved_bytes += bytes as u64,
            None => self.counter.refused += 1,
        }
        if self.attempts == WINDOW {
            self.end_window(link_bytes_per_s);
        }
    }

    fn end_window(&mut self, link_bytes_per_s: u64) {
        if self.has_paid(link_bytes_per_s) {
            self.rest_next_pages = REST_MIN_PAGES;
        } else {
            self.counter.rests += 1;
            self.rest_left_pages = self.rest_next_pages;
            self.rest_next_pages = (self.rest_next_pages * 4).min(REST_MAX_PAGES);
        }
        (self.attempts, self.timed) = (0, 0);
        (self.timed_ns, self.longest_ns, self.saved_bytes) = (0, 0, 0);
    }

    fn has_paid(&self, link_bytes_per_s: u64) -> bool {
        let attempts = u128::from(self.attempts);
        let (timed, timed_ns) = match self.timed {
            0 | 1 => (1, self.timed_ns),
            // None was longest where none was measured.
            timed if self.longest_ns == 0 => (timed, self.timed_ns),
            timed => (timed - 1, self.timed_ns - self.longest_ns),
        };
        let cpu_ns = u128::from(timed_ns) * attempts / u128::from(timed);
        let saved = u128::from(self.saved_bytes);
        saved > 0 && saved * 1_000_000_000 >= cpu_ns * u128::from(link_bytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const LINK: u64 = 1_000_000_000;
    const RESULT: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

    /// One window in which each attempt takes `ns` and leaves `bytes` of 4096.
    fn window(payoff: &mut Payoff, ns: u64, bytes: Option<usize>) {
        let clock = Cell::new(0);
        for _ in 0..WINDOW {
            assert!(payoff.allows());
            payoff.attempt(LINK, &mut || clock.get(), || {
                clock.set(clock.get() + ns);
                bytes.map(|bytes| &RESULT[..bytes])
            });
        }
    }

    fn rest(payoff: &mut Payoff) -> u32 {
        (0..).find(|_| payoff.allows()).unwrap()
    }

    #[test]
    fn it_goes_on_while_the_link_would_need_longer() {
        // 2096 bytes saved: 2096 ns of this link.
        let mut payoff = Payoff::new(1);
        window(&mut payoff, 2096, Some(2000));
        assert!(!payoff.is_resting());
        window(&mut payoff, 2097, Some(2000));
        assert!(payoff.is_resting());
        assert_eq!((payoff.counter().tried, payoff.counter().rests), (128, 1));
    }

    #[test]
    fn what_saves_nothing_rests_longer_each_time_until_it_pays() {
        let mut payoff = Payoff::new(8);
        let mut rests = Vec::new();
        for _ in 0..5 {
            window(&mut payoff, 10, None);
            rests.push(rest(&mut payoff));
        }
        let max = REST_MAX_PAGES;
        assert_eq!(rests, [512, 2048, 8192, max, max]);
        assert_eq!(payoff.counter().refused, 5 * u64::from(WINDOW));
        assert_eq!(
            payoff.counter().rested,
            u64::from(rests.iter().sum::<u32>())
        );
        window(&mut payoff, 10, Some(10));
        assert!(!payoff.is_resting());
        window(&mut payoff, 10, None);
        assert_eq!(rest(&mut payoff), REST_MIN_PAGES);
    }

    #[test]
    fn one_interruption_says_nothing_of_the_work() {
        for (interruptions, rests) in [(1, false), (2, true)] {
            let mut payoff = Payoff::new(8);
            let clock = Cell::new(0);
            for n in 0..WINDOW {
                payoff.attempt(LINK, &mut || clock.get(), || {
                    let is_interrupted = n.is_multiple_of(8) && n / 8 < interruptions;
                    clock.set(clock.get() + if is_interrupted { 10_000_000 } else { 300 });
                    Some(&RESULT[..100])
                });
            }
            assert_eq!(payoff.is_resting(), rests, "{interruptions}");
        }
    }

    #[test]
    fn timed_attempts_stand_for_all() {
        let mut reads = 0;
        let mut payoff = Payoff::new(8);
        for n in 0..u64::from(WINDOW) {
            let mut clock = || {
                reads += 1;
                // 2097 ns apart, on attempts 0, 8, 16, ...
                n * 10_000 + reads % 2 * 2097
            };
            payoff.attempt(LINK, &mut clock, || Some(&RESULT[..2000]));
        }
        assert_eq!(reads, 2 * u64::from(WINDOW) / 8);
        // The clock read first gives the later value: no time has passed.
        assert!(!payoff.is_resting());
    }
}
