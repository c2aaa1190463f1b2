//! What all connections share: the store, the counter, the sessions, the clock and the budget for
//! buffers.
//!
//! Invariants: large buffers of all connections together stay within `buffers_max`; the clock is
//! read only through [`Platform`].

use crate::arena::Arena;
use crate::hash::scramble;
use crate::kv::Store;
use crate::sessions::Sessions;
use alloc::boxed::Box;

/// Time and entropy, both from the time stamp counter in the real guest.
pub trait Platform {
    /// Nanoseconds since 1970.
    fn wall_ns(&self) -> u64;
    /// A value that differs at every call and on every machine (not secret).
    fn entropy(&self) -> u64;
}

/// State behind all services.
pub(crate) struct World {
    pub platform: Box<dyn Platform>,
    pub store: Store,
    pub sessions: Sessions,
    pub counter: u64,
    pub arena: Arena,
    /// Whether there is a link, and how often that has changed.
    pub link_is_up: bool,
    pub link_changes: u64,
    /// Heap bytes that connections hold for partial requests and unsent replies.
    pub buffers_held: usize,
    /// Limit of `buffers_held` beyond which requests with large buffers are refused.
    pub buffers_max: usize,
}

impl World {
    pub fn new(
        platform: Box<dyn Platform>,
        store_max: usize,
        buffers_max: usize,
        arena_max: usize,
    ) -> Self {
        Self {
            platform,
            store: Store::new(store_max),
            sessions: Sessions::default(),
            counter: 0,
            arena: Arena::new(arena_max),
            link_is_up: true,
            link_changes: 0,
            buffers_held: 0,
            buffers_max,
        }
    }

    /// Notes whether there is a link.
    pub fn set_link(&mut self, is_up: bool) {
        self.link_changes += u64::from(self.link_is_up != is_up);
        self.link_is_up = is_up;
    }

    /// Milliseconds since 1970, the unit of expiry times.
    pub fn wall_ms(&self) -> u64 {
        self.platform.wall_ns() / 1_000_000
    }

    /// 64 random bits.
    pub fn random(&self) -> u64 {
        scramble(self.platform.entropy())
    }

    /// True when `more` further bytes fit the budget.
    pub fn can_hold(&self, more: usize) -> bool {
        self.buffers_held.saturating_add(more) <= self.buffers_max
    }
}

#[cfg(test)]
#[path = "world_tests.rs"]
pub(crate) mod fake;
