//! Time from the time stamp counter.
//!
//! Invariants: needs no exit; never goes back as long as the counter does not.

use crate::cpu::rdtsc;
use colo_guest_server::Platform;

/// Converts counter ticks, by multiplication with fixed-point reciprocals.
#[derive(Clone, Copy)]
pub struct Clock {
    /// Microseconds per tick, times 2^64.
    us_per_tick: u64,
    /// Nanoseconds per tick, times 2^48.
    ns_per_tick: u64,
    wall_ns: u64,
}

impl Clock {
    /// `tsc_khz` is at least 1000; `wall_ns` is the wall clock, in ns since 1970, when the counter
    /// was 0.
    pub fn new(tsc_khz: u64, wall_ns: u64) -> Self {
        let per_tick = |per_ms: u128, shift: u32| ((per_ms << shift) / u128::from(tsc_khz)) as u64;
        Self {
            us_per_tick: per_tick(1000, 64),
            ns_per_tick: per_tick(1_000_000, 48),
            wall_ns,
        }
    }

    /// Microseconds since the counter was 0.
    pub fn now_us(&self) -> i64 {
        ((u128::from(rdtsc()) * u128::from(self.us_per_tick)) >> 64) as i64
    }
}

impl Platform for Clock {
    fn wall_ns(&self) -> u64 {
        let ns = (u128::from(rdtsc()) * u128::from(self.ns_per_tick)) >> 48;
        self.wall_ns.wrapping_add(ns as u64)
    }

    fn entropy(&self) -> u64 {
        rdtsc()
    }
}
