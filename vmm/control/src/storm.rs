//! How the pair protects: by comparison (COLO) or by buffering until periodic checkpoints (Remus), and the switch
//! between the two (rule 21).
//!
//! Invariants: the way changes only at a commit; a storm of divergences leads to Remus, and each return that fails
//! doubles the time until the next one, up to a limit. The memory of past checkpoints is bounded.

use alloc::collections::VecDeque;

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Output is compared; checkpoints on divergence.
    #[default]
    Colo,
    /// The SVM stands still; all output waits for the next periodic checkpoint.
    Remus,
}

/// How output is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protection {
    /// What the operator wants.
    pub mode: Mode,
    /// Between checkpoints in Remus mode by the operator's wish.
    pub remus_interval_us: u64,
    /// When COLO gives way to Remus by itself.
    pub storm: Storm,
    /// Whether the secondary can follow at all.
    pub pace: Pace,
}

impl Protection {
    /// COLO with the usual limits.
    pub const DEFAULT: Self = Self {
        mode: Mode::Colo,
        remus_interval_us: 50_000,
        storm: Storm::DEFAULT,
        pace: Pace::DEFAULT,
    };
}

impl Default for Protection {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What counts as a storm of divergences, and what follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storm {
    /// So many checkpoints that somebody asked for within `window_us` are a storm; 0: there is none.
    pub checkpoints: u32,
    /// See `checkpoints`.
    pub window_us: u64,
    /// The interval in Remus mode is twice what a checkpoint takes, but not less than this,
    pub interval_min_us: u64,
    /// and not more than this.
    pub interval_max_us: u64,
    /// So long after a storm began COLO is tried again.
    pub retry_us: u64,
    /// A return that ends in another storm doubles that time up to this.
    pub retry_max_us: u64,
}

impl Storm {
    /// 20 checkpoints a second over 5 seconds: about as many as Remus at 50 ms takes anyway.
    pub const DEFAULT: Self = Self {
        checkpoints: 100,
        window_us: 5_000_000,
        interval_min_us: 10_000,
        interval_max_us: 200_000,
        retry_us: 10_000_000,
        retry_max_us: 600_000_000,
    };
}

/// What the core does about a guest that dirties memory faster than the link carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// A synchronisation ends with the first checkpoint when so few pages are left.
    pub ready_pages: u64,
    /// A checkpoint that takes longer from its begin to its commit slows the PVM down.
    pub slow_us: u64,
    /// A pair without checkpoints gives some of the time back so often.
    pub relief_us: u64,
    /// So long after a synchronisation that did not end a secondary may try again; doubles each time.
    pub rejoin_us: u64,
    /// Up to this.
    pub rejoin_max_us: u64,
}

impl Pace {
    /// The usual limits.
    pub const DEFAULT: Self = Self {
        ready_pages: 256,
        slow_us: 3_000_000,
        relief_us: 1_000_000,
        rejoin_us: 5_000_000,
        rejoin_max_us: 300_000_000,
    };
}

/// A change of the way, for log and status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// A storm of so many checkpoints within the window; COLO is tried again after so long.
    Storm { checkpoints: u32, retry_us: u64 },
    /// COLO is tried again.
    Retry,
}

/// The switch.
#[derive(Debug)]
pub(crate) struct Switch {
    protection: Protection,
    /// Buffering, as of the last commit.
    buffers: bool,
    /// Instants of checkpoints that were asked for while comparing, the latest `storm.checkpoints`.
    recent: VecDeque<u64>,
    /// When the present way began.
    since_us: u64,
    /// How long a storm lasts at least.
    retry_us: u64,
    /// COLO was tried again since the pair began.
    tried: bool,
    /// Checkpoints from begin to commit, smoothed.
    took_us: u64,
}

impl Switch {
    pub(crate) fn new(protection: Protection) -> Self {
        Self {
            protection,
            buffers: protection.mode == Mode::Remus,
            recent: VecDeque::new(),
            since_us: 0,
            retry_us: protection.storm.retry_us,
            tried: false,
            took_us: 0,
        }
    }

    pub(crate) fn protection(&self) -> &Protection {
        &self.protection
    }

    /// Whether output is buffered now.
    pub(crate) fn buffers(&self) -> bool {
        self.buffers
    }

    /// A pair begins.
    pub(crate) fn start(&mut self, now_us: u64) {
        self.buffers = self.protection.mode == Mode::Remus;
        self.recent.clear();
        (self.since_us, self.took_us, self.tried) = (now_us, 0, false);
        self.retry_us = self.protection.storm.retry_us;
    }

    /// A checkpoint begins; gives whether the epoch that follows it is buffered.
    pub(crate) fn begin(&mut self, now_us: u64, wanted: bool) -> bool {
        if self.protection.mode == Mode::Remus {
            return true;
        }
        if self.buffers {
            return now_us < self.since_us + self.retry_us;
        }
        let storm = self.protection.storm;
        if storm.checkpoints == 0 {
            return false;
        }
        if wanted {
            self.recent.push_back(now_us);
        }
        let most = storm.checkpoints as usize;
        while self.recent.len() > most
            || self
                .recent
                .front()
                .is_some_and(|&at| at + storm.window_us < now_us)
        {
            self.recent.pop_front();
        }
        self.recent.len() >= most
    }

    /// A checkpoint that took so long is committed; what follows is buffered, or not.
    pub(crate) fn committed(&mut self, now_us: u64, took_us: u64, buffers: bool) -> Option<Change> {
        self.took_us = match self.took_us {
            0 => took_us,
            old => (old * 3 + took_us) / 4,
        };
        if buffers == self.buffers {
            return None;
        }
        let storm = self.protection.storm;
        let stayed_us = now_us.saturating_sub(self.since_us);
        (self.buffers, self.since_us) = (buffers, now_us);
        let checkpoints = self.recent.len() as u32;
        self.recent.clear();
        if !buffers {
            self.tried = true;
            return Some(Change::Retry);
        }
        // Hysteresis: a return that did not last as long as the wait before it has failed.
        let failed = self.tried && stayed_us < self.retry_us.max(storm.window_us * 2);
        self.retry_us = match failed {
            true => self.retry_us.saturating_mul(2).min(storm.retry_max_us),
            false => storm.retry_us,
        };
        Some(Change::Storm {
            checkpoints,
            retry_us: self.retry_us,
        })
    }

    /// Between the begins of periodic checkpoints; `None`: as configured for COLO.
    pub(crate) fn interval_us(&self) -> Option<u64> {
        let Protection {
            mode,
            remus_interval_us,
            storm,
            ..
        } = self.protection;
        match (mode, self.buffers) {
            (Mode::Remus, _) => Some(remus_interval_us.max(1)),
            (Mode::Colo, true) => {
                let most_us = storm.interval_max_us.max(storm.interval_min_us).max(1);
                Some((2 * self.took_us).clamp(storm.interval_min_us.clamp(1, most_us), most_us))
            }
            (Mode::Colo, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORM: Storm = Storm {
        checkpoints: 3,
        window_us: 1_000,
        interval_min_us: 10,
        interval_max_us: 100,
        retry_us: 5_000,
        retry_max_us: 15_000,
    };

    fn switch() -> Switch {
        let mut switch = Switch::new(Protection {
            storm: STORM,
            ..Protection::DEFAULT
        });
        switch.start(0);
        switch
    }

    /// Three wanted checkpoints, one every `every_us` from `at` on; the last answer and instant.
    fn three(switch: &mut Switch, at: u64, every_us: u64) -> (bool, u64) {
        let mut answer = (false, at);
        for n in 0..3 {
            answer = (switch.begin(at + n * every_us, true), at + n * every_us);
        }
        answer
    }

    #[test]
    fn rule_21_a_rate_above_the_limit_is_a_storm_and_one_below_is_not() {
        let mut s = switch();
        assert!(!three(&mut s, 10_000, 501).0);
        assert!(three(&mut s, 20_000, 500).0);
        let mut s = switch();
        s.begin(0, false);
        assert!(
            !s.begin(1, true) && !s.begin(2, true),
            "periodic ones do not count"
        );
    }

    #[test]
    fn rule_21_the_way_changes_with_the_commit() {
        let mut s = switch();
        let (buffers, at) = three(&mut s, 0, 1);
        assert!(buffers && !s.buffers());
        let change = s.committed(at + 30, 30, buffers);
        let (checkpoints, retry_us) = (3, 5_000);
        assert_eq!(
            change,
            Some(Change::Storm {
                checkpoints,
                retry_us
            })
        );
        assert!(s.buffers());
    }

    #[test]
    fn rule_21_returns_that_fail_come_later_and_later_and_one_that_lasts_starts_over() {
        let mut s = switch();
        let mut now = 0;
        let mut waits = [0; 4];
        for wait in &mut waits {
            let (buffers, at) = three(&mut s, now, 1);
            assert!(buffers);
            s.committed(at, 30, true);
            assert!(s.begin(at + s.retry_us - 1, false));
            now = at + s.retry_us;
            *wait = s.retry_us;
            assert!(!s.begin(now, false));
            assert_eq!(s.committed(now, 30, false), Some(Change::Retry));
        }
        assert_eq!(waits, [5_000, 10_000, 15_000, 15_000]);
        let (_, at) = three(&mut s, now + 20_000, 1);
        s.committed(at, 30, true);
        assert_eq!(s.retry_us, 5_000);
    }

    #[test]
    fn rule_21_the_interval_follows_what_a_checkpoint_takes() {
        let mut s = switch();
        assert_eq!(s.interval_us(), None);
        let (buffers, at) = three(&mut s, 0, 1);
        s.committed(at, 30, buffers);
        assert_eq!(s.interval_us(), Some(60));
        s.committed(at, 2, true);
        assert_eq!(s.interval_us(), Some(46));
        s.committed(at, 10_000, true);
        assert_eq!(s.interval_us(), Some(100), "bounded");
    }

    #[test]
    fn rule_21_a_limit_of_nothing_switches_the_storm_off_and_remus_by_wish_stays() {
        let mut s = switch();
        s.protection.storm.checkpoints = 0;
        assert!(!three(&mut s, 0, 1).0);
        let mut s = switch();
        s.protection.mode = Mode::Remus;
        s.start(0);
        assert!(s.begin(u64::MAX / 2, false) && s.buffers());
        assert_eq!(s.interval_us(), Some(50_000));
    }
}
