//! Deadlines of flows: a timer wheel whose lists run through the flows themselves.
//!
//! Invariants: a flow is in at most one list of the wheel; [`Wheel::next_due_us`] may be early,
//! never late; arming, disarming and asking cost the same however many flows are armed.

use crate::list::NIL;

/// Microseconds per tick, as a power of two.
const TICK_BITS: u32 = 12;
/// Lists of the wheel: two seconds, longer than the default deadlines. What is further away is looked at again then.
const BUCKETS: usize = 512;
/// The list of what [`Wheel::expire`] has found.
const EXPIRED: usize = BUCKETS;
/// Instead of a tick: in the list of the expired, in no list.
const IN_EXPIRED: u32 = u32::MAX - 1;
const OFF: u32 = u32::MAX;

/// A flow's place in the wheel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timer {
    prev: u32,
    next: u32,
    /// The low bits of its tick; which bucket that is.
    tick: u32,
}

impl Timer {
    pub(crate) const OFF: Self = Self {
        prev: NIL,
        next: NIL,
        tick: OFF,
    };
}

/// Whoever has the timers.
pub(crate) trait Timers {
    /// The timer of flow `id`, which is armed.
    fn timer(&mut self, id: u32) -> &mut Timer;
}

/// A tick as timers store it: the two largest numbers mean something else. They come once in months,
/// and a flow is then looked at a tick early.
const fn tick_number(tick: u64) -> u32 {
    let low = tick as u32;
    if low >= IN_EXPIRED {
        low - BUCKETS as u32
    } else {
        low
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Wheel {
    heads: [u32; BUCKETS + 1],
    due_us: [u64; BUCKETS],
    occupied: [u64; BUCKETS / 64],
    /// No armed flow is in a bucket before this tick.
    base: u64,
    armed: usize,
}

impl Wheel {
    pub(crate) const fn new() -> Self {
        Self {
            heads: [NIL; BUCKETS + 1],
            due_us: [u64::MAX; BUCKETS],
            occupied: [0; BUCKETS / 64],
            base: 0,
            armed: 0,
        }
    }

    /// Forgets all flows, whose timers are to be forgotten too.
    pub(crate) fn clear(&mut self) {
        if self.armed > 0 {
            *self = Self::new();
        }
    }

    /// Whether a flow with this timer is looked at when it is due at `due_us`, or before.
    #[inline]
    pub(crate) fn covers(&self, timer: &Timer, due_us: u64) -> bool {
        if timer.tick >= IN_EXPIRED {
            return false;
        }
        let ahead = tick_number(due_us >> TICK_BITS).wrapping_sub(timer.tick) as i32;
        ahead > 0 || ahead == 0 && self.due_us[timer.tick as usize % BUCKETS] <= due_us
    }

    /// Arms a flow, or changes when it is due.
    pub(crate) fn arm(&mut self, timers: &mut impl Timers, id: u32, now_us: u64, due_us: u64) {
        if self.armed == 0 {
            self.base = now_us >> TICK_BITS;
        }
        let last = self.base + BUCKETS as u64 - 1;
        let due_tick = due_us >> TICK_BITS;
        let tick = due_tick.clamp(self.base, last);
        let bucket = tick as usize % BUCKETS;
        let look_us = if due_tick > last {
            last << TICK_BITS
        } else {
            due_us
        };
        self.disarm(timers, id);
        self.due_us[bucket] = self.due_us[bucket].min(look_us);
        self.push(timers, id, bucket, tick_number(tick));
        self.armed += 1;
    }

    fn push(&mut self, timers: &mut impl Timers, id: u32, bucket: usize, tick: u32) {
        let next = core::mem::replace(&mut self.heads[bucket], id);
        if next != NIL {
            timers.timer(next).prev = id;
        }
        *timers.timer(id) = Timer {
            prev: NIL,
            next,
            tick,
        };
        if bucket < BUCKETS {
            self.occupied[bucket / 64] |= 1 << (bucket % 64);
        }
    }

    pub(crate) fn disarm(&mut self, timers: &mut impl Timers, id: u32) {
        let Timer { prev, next, tick } = core::mem::replace(timers.timer(id), Timer::OFF);
        if tick == OFF {
            return;
        }
        self.armed -= 1;
        if next != NIL {
            timers.timer(next).prev = prev;
        }
        if prev != NIL {
            timers.timer(prev).next = next;
            return;
        }
        let bucket = match tick {
            IN_EXPIRED => EXPIRED,
            tick => tick as usize % BUCKETS,
        };
        self.heads[bucket] = next;
        if next == NIL && bucket < BUCKETS {
            self.empty(bucket);
        }
    }

    fn empty(&mut self, bucket: usize) {
        self.heads[bucket] = NIL;
        self.due_us[bucket] = u64::MAX;
        self.occupied[bucket / 64] &= !(1 << (bucket % 64));
    }

    /// The first bucket in use, in the order of time.
    fn first(&self) -> Option<usize> {
        let start = self.base as usize % BUCKETS;
        let words = self.occupied.len();
        for n in 0..=words {
            let word = (start / 64 + n) % words;
            // The word of the start is looked at twice: first from there on, last up to there.
            let seen = match n {
                0 => !0 << (start % 64),
                n if n == words => !(!0 << (start % 64)),
                _ => !0,
            };
            let bits = self.occupied[word] & seen;
            if bits != 0 {
                return Some(word * 64 + bits.trailing_zeros() as usize);
            }
        }
        None
    }

    /// When [`Wheel::expire`] should be called.
    pub(crate) fn next_due_us(&self) -> Option<u64> {
        if self.armed == 0 {
            return None;
        }
        self.first().map(|bucket| self.due_us[bucket])
    }

    /// Finds the flows that may be due: [`Wheel::pop_expired`] gives them.
    pub(crate) fn expire(&mut self, timers: &mut impl Timers, now_us: u64) {
        let now = now_us >> TICK_BITS;
        while let Some(bucket) = self.first() {
            let ahead = (bucket + BUCKETS - self.base as usize % BUCKETS) % BUCKETS;
            if self.base + ahead as u64 > now {
                break;
            }
            let mut id = self.heads[bucket];
            self.empty(bucket);
            while id != NIL {
                let next = timers.timer(id).next;
                self.push(timers, id, EXPIRED, IN_EXPIRED);
                id = next;
            }
        }
        self.base = self.base.max(now);
    }

    /// The next flow that may be due; it is no longer armed.
    pub(crate) fn pop_expired(&mut self, timers: &mut impl Timers) -> Option<u32> {
        let id = self.heads[EXPIRED];
        if id == NIL {
            return None;
        }
        self.disarm(timers, id);
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    struct Flows(Vec<Timer>);

    impl Timers for Flows {
        fn timer(&mut self, id: u32) -> &mut Timer {
            &mut self.0[id as usize]
        }
    }

    proptest! {
        #[test]
        fn nothing_is_early_lost_or_late(
            steps in proptest::collection::vec((0u32..12, 0u64..9_000_000, 0u64..900_000, any::<bool>()), 1..200),
        ) {
            let mut flows = Flows(alloc::vec![Timer::OFF; 12]);
            let mut due = [None; 12];
            let mut wheel = Wheel::new();
            let mut now_us = 5_000_000;
            for (id, wait_us, pass_us, is_armed) in steps {
                if is_armed {
                    due[id as usize] = Some(now_us + wait_us);
                    wheel.arm(&mut flows, id, now_us, now_us + wait_us);
                } else {
                    due[id as usize] = None;
                    wheel.disarm(&mut flows, id);
                }
                now_us += pass_us;
                // What the path does: looks when told to, arms again what was not due.
                while let Some(next_us) = wheel.next_due_us() {
                    let first = due.iter().flatten().min();
                    prop_assert!(first.is_some_and(|first| next_us <= *first));
                    if next_us > now_us {
                        break;
                    }
                    wheel.expire(&mut flows, now_us);
                    while let Some(id) = wheel.pop_expired(&mut flows) {
                        let due_us = due[id as usize];
                        prop_assert!(due_us.is_some());
                        if let Some(due_us) = due_us.filter(|due_us| *due_us > now_us) {
                            wheel.arm(&mut flows, id, now_us, due_us);
                        } else {
                            due[id as usize] = None;
                        }
                    }
                }
                prop_assert!(due.iter().flatten().all(|due_us| *due_us > now_us));
                prop_assert_eq!(wheel.next_due_us().is_some(), due.iter().any(Option::is_some));
            }
        }
    }
}
