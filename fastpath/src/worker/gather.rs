//! Whether frames are worth waiting for: under a load that is heavy and deep, a short wait brings a batch.
//!
//! A worker that looks again at once finds frames by twos and threes, and each turn has its price, as has each wake-up
//! of the guest and of the NIC's other end. Where enough are under way that a wait fills a batch, the whole path gets
//! more done in less time; where few are, each wait would be added to their round trip.
//!
//! Invariants: no wait without a rate of [`FRAMES_PER_MS`]; waits go on only while turns bring [`FRAMES_MIN`] each on
//! average, and are given up for [`REST_US`] otherwise. Frames that are answered one for one by so many clients as fill
//! no batch are therefore not waited for, but for a small part of the time.
//!
//! Only for a VM that is not replicated, with one worker ([`super::Role::may_gather`]). Does not wait itself.

/// How long to wait. The kernel's timer may add half as much.
pub(super) const WAIT_US: u64 = 100;
/// Frames a millisecond, both ways, from which on waiting is tried.
const FRAMES_PER_MS: u64 = 200;
/// Frames, both ways, that each wait must bring.
const FRAMES_MIN: u64 = 40;
/// Waits that are judged together.
const WAITS: u64 = 8;
/// How long the rate is looked at without waits.
const LOOK_US: u64 = 1000;
/// How long nothing is tried after waits that were not worth it.
const REST_US: u64 = 100_000;

/// What is known of the load.
#[derive(Debug, Default)]
pub(super) struct Gather {
    is_on: bool,
    /// Frames that had been moved when the present look began, and when that was.
    frames: u64,
    since_us: u64,
    waits: u64,
    rest_until_us: u64,
}

impl Gather {
    /// Whether to wait now that a turn has found nothing more; `frames` have been moved since the worker started.
    pub(super) fn is_worth_it(&mut self, now_us: u64, frames: u64) -> bool {
        let moved = frames.saturating_sub(self.frames);
        let took_us = now_us.saturating_sub(self.since_us);
        if self.is_on {
            self.waits += 1;
            if self.waits > WAITS {
                self.is_on = moved >= WAITS * FRAMES_MIN;
                if !self.is_on {
                    self.rest_until_us = now_us + REST_US;
                }
                self.look(now_us, frames);
            }
        } else if took_us >= LOOK_US {
            let is_fast = moved * 1000 >= took_us * FRAMES_PER_MS;
            self.is_on = is_fast && now_us >= self.rest_until_us;
            self.look(now_us, frames);
        }
        self.is_on
    }

    fn look(&mut self, now_us: u64, frames: u64) {
        (self.frames, self.since_us) = (frames, now_us);
        self.waits = u64::from(self.is_on);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns that bring `frames` each `every_us`, for so long; how many of them waited.
    fn waits(gather: &mut Gather, frames: u64, every_us: u64, long_us: u64) -> u64 {
        let (from_us, from) = (gather.since_us, gather.frames);
        let turns = 1..=long_us / every_us;
        let waited =
            turns.filter(|n| gather.is_worth_it(from_us + n * every_us, from + n * frames));
        waited.count() as u64
    }

    #[test]
    fn a_deep_load_is_waited_for_as_long_as_it_lasts() {
        let mut gather = Gather::default();
        let waited = waits(&mut gather, FRAMES_MIN, 100, 1_000_000);
        assert_eq!(waited, 1_000_000 / 100 - LOOK_US / 100 + 1);
        assert!(waits(&mut gather, FRAMES_MIN / 2, 100, 50_000) <= WAITS);
    }

    #[test]
    fn a_load_that_fills_no_batch_is_tried_seldom() {
        let mut gather = Gather::default();
        // As fast as can be, but few at a time.
        let waited = waits(&mut gather, FRAMES_MIN - 1, 10, 1_000_000);
        assert!(waited >= WAITS, "it is tried");
        assert!(waited <= 10 * WAITS, "{waited}");
    }

    #[test]
    fn a_slow_load_is_never_waited_for() {
        let mut gather = Gather::default();
        let waited = waits(&mut gather, FRAMES_PER_MS - 1, 1000, 1_000_000);
        assert_eq!(waited, 0);
    }
}
