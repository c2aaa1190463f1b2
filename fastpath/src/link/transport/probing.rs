//! When transports are asked whether they work, and how long they rest after they failed.
//!
//! Invariants: the rest doubles each time that all failed or one was given up, and halves for each [`HEALTHY_US`] in which
//! one was heard to carry. So a path that comes and goes moves the channel about once in so long at most, and the failure
//! of one that was well for some minutes is as good as the first.
//!
//! Sends nothing.

/// Between probes of one transport, first and later.
const PROBE_SOON_US: u64 = 5_000;
const PROBE_LATER_US: u64 = 50_000;
const PROBES_SOON: u32 = 8;
/// Probes without an answer after which the next transport is tried.
const PROBES: u32 = 24;
/// Rest after all transports failed or one was given up.
pub(in crate::link) const REST_MIN_US: u64 = 1_000_000;
pub(in crate::link) const REST_MAX_US: u64 = 60_000_000;
/// A transport that was heard for so long is none that only seems to work.
pub(in crate::link) const HEALTHY_US: u64 = REST_MAX_US;

/// See the module.
#[derive(Debug)]
pub(super) struct Probing {
    /// Which transport, as an index of those in common.
    turn: usize,
    tried: u32,
    next_us: u64,
    rest_us: u64,
    /// Answers to earlier questions do not count.
    valid_from: u64,
    question: u64,
    /// Since when one carries, or did, and when it was heard last.
    carries_from_us: u64,
    heard_us: u64,
}

impl Probing {
    pub(super) fn new() -> Self {
        Self {
            turn: 0,
            tried: 0,
            next_us: 0,
            rest_us: REST_MIN_US,
            valid_from: 1,
            question: 0,
            carries_from_us: 0,
            heard_us: 0,
        }
    }

    /// There are transports to ask from now on.
    pub(super) fn begin(&mut self, now_us: u64) {
        self.next_us = now_us;
    }

    /// When the next question is due.
    pub(super) fn due_us(&self) -> u64 {
        self.next_us
    }

    /// The question that is due, and for which of so many transports.
    pub(super) fn ask(&mut self, now_us: u64, transports: usize) -> Option<(usize, u64)> {
        if transports == 0 || self.next_us > now_us {
            return None;
        }
        if self.tried == PROBES {
            self.tried = 0;
            self.turn += 1;
            if self.turn.is_multiple_of(transports) {
                self.rest(now_us);
                return None;
            }
        }
        self.tried += 1;
        self.question += 1;
        let soon = self.tried < PROBES_SOON;
        self.next_us = now_us + if soon { PROBE_SOON_US } else { PROBE_LATER_US };
        Some((self.turn % transports, self.question))
    }

    /// Whether the answer to this question says that the transport works.
    pub(super) fn is_valid(&self, question: u64) -> bool {
        question >= self.valid_from && question <= self.question
    }

    /// One carries from now on.
    pub(super) fn carries(&mut self, now_us: u64) {
        (self.carries_from_us, self.heard_us) = (now_us, now_us);
    }

    /// The peer was heard over it.
    pub(super) fn heard(&mut self, now_us: u64) {
        self.heard_us = now_us;
    }

    /// It was given up. What was asked before is of no use.
    pub(super) fn given_up(&mut self, now_us: u64) {
        // What it did after it was heard last nobody knows.
        let healthy = self.heard_us.saturating_sub(self.carries_from_us) / HEALTHY_US;
        self.rest_us = (self.rest_us >> healthy.min(63)).max(REST_MIN_US);
        self.tried = 0;
        self.turn = 0;
        self.valid_from = self.question + 1;
        self.rest(now_us);
    }

    fn rest(&mut self, now_us: u64) {
        self.next_us = now_us + self.rest_us;
        self.rest_us = (2 * self.rest_us).min(REST_MAX_US);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_US: u64 = 1_000_000;

    /// A channel whose path is there or not, as `is_up` says. Looks at it each millisecond.
    struct Channel {
        probing: Probing,
        now_us: u64,
        carries: bool,
        moves: u32,
    }

    impl Channel {
        fn new() -> Self {
            let mut probing = Probing::new();
            probing.begin(0);
            Self {
                probing,
                now_us: 0,
                carries: false,
                moves: 0,
            }
        }

        fn run(&mut self, for_us: u64, is_up: impl Fn(u64) -> bool) {
            let end_us = self.now_us + for_us;
            while self.now_us < end_us {
                self.now_us += 1000;
                let up = is_up(self.now_us);
                match self.carries {
                    true if up => self.probing.heard(self.now_us),
                    true => {
                        self.probing.given_up(self.now_us);
                        self.carries = false;
                        self.moves += 1;
                    }
                    false => {
                        if self.probing.ask(self.now_us, 1).is_some() && up {
                            self.probing.carries(self.now_us);
                            self.carries = true;
                            self.moves += 1;
                        }
                    }
                }
            }
        }

        fn rest_left_us(&self) -> u64 {
            self.probing.due_us() - self.now_us
        }
    }

    #[test]
    fn a_path_that_stays_away_is_asked_more_and_more_seldom() {
        let mut channel = Channel::new();
        channel.run(SECOND_US / 10, |_| true);
        assert!(channel.carries);
        channel.run(600 * SECOND_US, |_| false);
        let asked = channel.probing.question;
        channel.run(120 * SECOND_US, |_| false);
        // Each time for about a second.
        assert!(channel.probing.question <= asked + 2 * u64::from(PROBES));
        channel.run(2 * REST_MAX_US, |_| true);
        assert!(channel.carries);
    }

    #[test]
    fn a_path_that_was_well_for_long_is_asked_soon_when_it_fails_again() {
        let mut channel = Channel::new();
        channel.run(600 * SECOND_US, |_| false);
        channel.run(2 * REST_MAX_US, |_| true);
        assert!(channel.carries);
        // It fails after a few seconds: it is left alone for long.
        let mut early = channel;
        early.run(1000, |_| false);
        assert!(early.rest_left_us() > REST_MAX_US / 4);
        early.run(2 * REST_MAX_US, |_| true);
        // And after some minutes: as the first time.
        early.run(6 * HEALTHY_US + SECOND_US, |_| true);
        early.run(1000, |_| false);
        assert!(!early.carries && early.rest_left_us() <= REST_MIN_US);
        early.run(REST_MIN_US, |_| true);
        assert!(early.carries);
    }

    #[test]
    fn time_in_which_nothing_was_heard_is_not_health() {
        let mut probing = Probing::new();
        for now_us in [0, SECOND_US, 2 * SECOND_US] {
            probing.carries(now_us);
            probing.given_up(now_us);
        }
        probing.carries(10 * SECOND_US);
        probing.heard(11 * SECOND_US);
        let later_us = 11 * SECOND_US + 10 * HEALTHY_US;
        probing.given_up(later_us);
        assert_eq!(probing.due_us(), later_us + 8 * REST_MIN_US);
    }

    #[test]
    fn a_path_that_comes_and_goes_does_not_make_the_channel_come_and_go() {
        const HOUR_US: u64 = 3600 * SECOND_US;
        for up_us in [
            SECOND_US / 10,
            5 * SECOND_US,
            40 * SECOND_US,
            90 * SECOND_US,
        ] {
            let mut channel = Channel::new();
            channel.run(HOUR_US, |now_us| now_us % (2 * up_us) < up_us);
            // There and back each time, and a few moves before the rest has grown.
            let most = 2 * (HOUR_US / HEALTHY_US) + 16;
            assert!(
                u64::from(channel.moves) <= most,
                "{up_us}: {}",
                channel.moves
            );
            assert!(channel.moves >= 2, "{up_us}");
        }
    }

    #[test]
    fn answers_to_questions_from_before_it_was_given_up_do_not_count() {
        let mut probing = Probing::new();
        let (_, first) = probing.ask(0, 2).unwrap();
        assert!(probing.is_valid(first) && !probing.is_valid(first + 1));
        probing.carries(0);
        probing.given_up(0);
        assert!(!probing.is_valid(first));
        assert_eq!(probing.ask(0, 2), None);
        let (transport, second) = probing.ask(REST_MIN_US, 2).unwrap();
        assert!(transport == 0 && probing.is_valid(second));
    }

    #[test]
    fn each_transport_has_its_turn_before_the_rest() {
        let mut probing = Probing::new();
        let mut asked = [0; 2];
        let mut now_us = 0;
        while let Some((transport, _)) = probing.ask(now_us, 2) {
            asked[transport] += 1;
            now_us = probing.due_us();
        }
        assert_eq!(asked, [PROBES; 2]);
        assert_eq!(probing.due_us(), now_us + REST_MIN_US);
        assert_eq!(probing.ask(u64::MAX / 2, 0), None);
    }
}
