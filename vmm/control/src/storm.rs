//! How the pair protects: by comparison (COLO) or by buffering until periodic checkpoints (Remus), and the switch
//! between the two (rule 21).
//!
//! What makes a storm is the share of time that the guest spends in checkpoints because outputs differ, from the begin of
//! each to its commit: so long its output waits, the pause included. The same number of checkpoints costs one guest little and
//! another all of its time.
//!
//! Invariants: the way changes only at a commit; a storm of divergences leads to Remus, and each return that fails
//! doubles the time until the next one, up to a limit. The memory of past checkpoints is bounded.

use crate::busy::Busy;

/// A single checkpoint, however long, is no storm.
const STORM_CHECKPOINTS_MIN: u32 = 2;

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
    /// So much of `window_us` spent in checkpoints that somebody asked for is a storm, in percent; 0: there is none.
    pub share_pct: u8,
    /// See `share_pct`.
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
    /// A pair that compares answers sooner than one that buffers as long as it has some of its time between checkpoints.
    pub const DEFAULT: Self = Self {
        share_pct: 90,
        window_us: 5_000_000,
        interval_min_us: 10_000,
        interval_max_us: 200_000,
        retry_us: 10_000_000,
        retry_max_us: 600_000_000,
    };
}

/// What the core does about a guest that dirties memory faster than the link carries it, or runs faster than its replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// A synchronisation ends with the first checkpoint when so few pages are left.
    pub ready_pages: u64,
    /// It does, too, when slowing the PVM down helps no more and the link carries what is left in so long.
    pub rest_us: u64,
    /// A checkpoint that takes longer from its begin to its commit slows the PVM down.
    pub slow_us: u64,
    /// A pair without checkpoints gives some of the time back so often.
    pub relief_us: u64,
    /// So long after a synchronisation that did not end a secondary may try again; doubles each time.
    pub rejoin_us: u64,
    /// Up to this.
    pub rejoin_max_us: u64,
    /// An SVM whose answers come so much later than the PVM's is slow, if that does not change by itself (rule 16).
    pub lag_us: u64,
    /// Between two looks at that.
    pub lag_look_us: u64,
    /// So long a PVM is left alone that was slowed down for that in vain; doubles each time.
    pub lag_rest_us: u64,
}

impl Pace {
    /// The usual limits.
    pub const DEFAULT: Self = Self {
        ready_pages: 256,
        rest_us: 500_000,
        slow_us: 3_000_000,
        relief_us: 1_000_000,
        rejoin_us: 5_000_000,
        rejoin_max_us: 300_000_000,
        lag_us: 5_000,
        lag_look_us: 100_000,
        lag_rest_us: 10_000_000,
    };
}

/// A change of the way, for log and status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// A storm; COLO is tried again after so long.
    Storm {
        /// So much of the window went into checkpoints,
        share_pct: u8,
        /// so many of them.
        checkpoints: u32,
        retry_us: u64,
    },
    /// COLO is tried again.
    Retry,
}

/// The switch.
#[derive(Debug)]
pub(crate) struct Switch {
    protection: Protection,
    /// Buffering, as of the last commit.
    buffers: bool,
    /// Checkpoints that were asked for while comparing.
    busy: Busy,
    /// The one in flight is such a one.
    is_wanted: bool,
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
            busy: Busy::new(protection.storm.window_us),
            is_wanted: false,
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

    /// Share of the latest window that went into checkpoints which somebody asked for, in percent.
    pub(crate) fn share_pct(&self, now_us: u64) -> u8 {
        self.busy.share(now_us).0
    }

    /// A pair begins.
    pub(crate) fn start(&mut self, now_us: u64) {
        self.buffers = self.protection.mode == Mode::Remus;
        self.busy.clear();
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
        self.is_wanted = wanted;
        let limit_pct = self.protection.storm.share_pct;
        let (share_pct, checkpoints) = self.busy.share(now_us);
        limit_pct > 0 && share_pct >= limit_pct && checkpoints >= STORM_CHECKPOINTS_MIN
    }

    /// A checkpoint that took so long is committed; what follows is buffered, or not.
    pub(crate) fn committed(&mut self, now_us: u64, took_us: u64, buffers: bool) -> Option<Change> {
        self.took_us = match self.took_us {
            0 => took_us,
            old => (old * 3 + took_us) / 4,
        };
        if core::mem::take(&mut self.is_wanted) {
            self.busy.add(now_us, took_us);
        }
        if buffers == self.buffers {
            return None;
        }
        let storm = self.protection.storm;
        let stayed_us = now_us.saturating_sub(self.since_us);
        (self.buffers, self.since_us) = (buffers, now_us);
        let (share_pct, checkpoints) = self.busy.share(now_us);
        self.busy.clear();
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
            share_pct,
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
        share_pct: 80,
        window_us: 1_600,
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

    /// Wanted checkpoints that take so long each, one every 100 us from `at` on, until one begins a buffered epoch or a window
    /// and a half has passed. Gives when that one begins.
    fn busy(switch: &mut Switch, at: u64, took_us: u64) -> Option<u64> {
        (at..at + 2_400).step_by(100).find(|&begun| {
            let buffers = switch.begin(begun, true);
            if !buffers {
                switch.committed(begun + took_us, took_us, false);
            }
            buffers
        })
    }

    /// Until COLO gives way.
    fn storm(switch: &mut Switch, at: u64) -> u64 {
        let begun = busy(switch, at, 90).unwrap();
        switch.committed(begun + 30, 30, true);
        assert!(switch.buffers());
        begun + 30
    }

    #[test]
    fn rule_21_a_share_above_the_limit_is_a_storm_and_one_below_is_not() {
        assert_eq!(busy(&mut switch(), 10_000, 79), None);
        // As many checkpoints, but longer ones.
        let at = busy(&mut switch(), 10_000, 81).unwrap();
        assert!((11_500..=11_600).contains(&at), "{at}");
    }

    #[test]
    fn rule_21_long_checkpoints_are_a_storm_unless_there_is_only_one() {
        let mut s = switch();
        s.begin(10_000, true);
        s.committed(11_500, 1_500, false);
        assert!(!s.begin(11_500, true), "one");
        for took_us in [520, 800, 1_000] {
            let mut s = switch();
            let ends = (0..8).map(|n| 10_000 + n * took_us);
            let storm = ends.into_iter().any(|begun| {
                let buffers = s.begin(begun, true);
                s.committed(begun + took_us, took_us, buffers);
                buffers
            });
            assert!(storm, "{took_us}");
        }
    }

    #[test]
    fn rule_21_what_counts_is_the_time_and_not_the_number() {
        let mut s = switch();
        let many = (10_000..20_000).all(|now| {
            let begins = !s.begin(now, true);
            s.committed(now, 0, false);
            begins
        });
        assert!(many, "ten thousand that take no time");
    }

    #[test]
    fn rule_21_periodic_checkpoints_are_no_storm() {
        let mut s = switch();
        for n in 0..100 {
            assert!(!s.begin(n * 10, false));
            s.committed(n * 10 + 10, 10, false);
        }
    }

    #[test]
    fn rule_21_the_way_changes_with_the_commit() {
        let mut s = switch();
        let begun = busy(&mut s, 0, 90).unwrap();
        assert!(!s.buffers());
        let Some(Change::Storm {
            share_pct,
            checkpoints,
            retry_us,
        }) = s.committed(begun + 30, 30, true)
        else {
            panic!("no storm");
        };
        assert!((80..=90).contains(&share_pct), "{share_pct}");
        assert!((14..=16).contains(&checkpoints), "{checkpoints}");
        assert_eq!((retry_us, s.buffers()), (5_000, true));
    }

    #[test]
    fn rule_21_returns_that_fail_come_later_and_later_and_one_that_lasts_starts_over() {
        let mut s = switch();
        let mut now = 0;
        let mut waits = [0; 4];
        for wait in &mut waits {
            let at = storm(&mut s, now);
            assert!(s.begin(at + s.retry_us - 1, false));
            now = at + s.retry_us;
            *wait = s.retry_us;
            assert!(!s.begin(now, false));
            assert_eq!(s.committed(now, 30, false), Some(Change::Retry));
            // What was before it went is forgotten: it takes a whole window again.
            assert_eq!(s.busy.share(now), (0, 0));
        }
        assert_eq!(waits, [5_000, 10_000, 15_000, 15_000]);
        storm(&mut s, now + 20_000);
        assert_eq!(s.retry_us, 5_000);
    }

    #[test]
    fn rule_21_the_interval_follows_what_a_checkpoint_takes() {
        let mut s = switch();
        assert_eq!(s.interval_us(), None);
        let begun = busy(&mut s, 0, 90).unwrap();
        s.committed(begun + 90, 90, true);
        assert_eq!(s.interval_us(), Some(100), "bounded");
        let mut now = begun + 90;
        for _ in 0..20 {
            now += 100;
            s.begin(now, false);
            s.committed(now + 30, 30, true);
        }
        assert!((60..=66).contains(&s.interval_us().unwrap()));
        for _ in 0..20 {
            now += 100;
            s.begin(now, false);
            s.committed(now + 1, 1, true);
        }
        assert_eq!(s.interval_us(), Some(10), "bounded");
    }

    #[test]
    fn rule_21_a_limit_of_nothing_switches_the_storm_off_and_remus_by_wish_stays() {
        let mut s = switch();
        s.protection.storm.share_pct = 0;
        assert_eq!(busy(&mut s, 0, 100), None);
        let mut s = switch();
        s.protection.mode = Mode::Remus;
        s.start(0);
        assert!(s.begin(u64::MAX / 2, false) && s.buffers());
        assert_eq!(s.interval_us(), Some(50_000));
    }
}
