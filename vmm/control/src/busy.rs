//! How much of the latest time was spent in something, in slices of a window.
//!
//! Invariants: memory is fixed; a span counts when it ends, for the whole window at most.
//!
//! Does not look back further than the window; how far it does is one slice coarse.

/// Slices of a window.
const SLICES: usize = 16;

/// Spans of the latest window, added up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Busy {
    window_us: u64,
    /// The number of the latest slice since the beginning of time.
    latest: u64,
    /// By the number modulo their count.
    busy_us: [u64; SLICES],
    spans: [u32; SLICES],
}

impl Busy {
    pub(crate) fn new(window_us: u64) -> Self {
        Self {
            window_us: window_us.max(1),
            latest: 0,
            busy_us: [0; SLICES],
            spans: [0; SLICES],
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.window_us);
    }

    /// A span of so long has ended.
    pub(crate) fn add(&mut self, now_us: u64, took_us: u64) {
        let at = self.forget_old(now_us);
        self.busy_us[at] += took_us.min(self.window_us);
        self.spans[at] += 1;
    }

    /// How many percent of the window were spent, and in how many spans.
    pub(crate) fn share(&self, now_us: u64) -> (u8, u32) {
        let passed = self.slice(now_us).saturating_sub(self.latest);
        let left = (SLICES as u64).saturating_sub(passed);
        let places = (0..left).map(|n| place(self.latest.wrapping_sub(n)));
        let (mut busy_us, mut spans) = (0u64, 0);
        for at in places {
            busy_us = busy_us.saturating_add(self.busy_us[at]);
            spans += self.spans[at];
        }
        // The latest slice is not over.
        let slice_us = self.slice_us();
        let covered_us = (SLICES as u64 - 1) * slice_us + now_us % slice_us;
        let pct = (busy_us.saturating_mul(100) / covered_us).min(100);
        (pct as u8, spans)
    }

    fn slice_us(&self) -> u64 {
        self.window_us.div_ceil(SLICES as u64)
    }

    fn slice(&self, now_us: u64) -> u64 {
        now_us / self.slice_us()
    }

    /// Gives the place of the present slice.
    fn forget_old(&mut self, now_us: u64) -> usize {
        let now = self.slice(now_us).max(self.latest);
        let passed = (now - self.latest).min(SLICES as u64);
        self.latest = now;
        for at in (0..passed).map(|n| place(now.wrapping_sub(n))) {
            (self.busy_us[at], self.spans[at]) = (0, 0);
        }
        place(now)
    }
}

/// Where a slice is counted.
fn place(slice: u64) -> usize {
    (slice % SLICES as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_count_until_the_window_has_passed() {
        let mut busy = Busy::new(1_600);
        for n in 0..16 {
            busy.add(n * 100 + 50, 40);
        }
        assert_eq!(busy.share(1_599), (40, 16));
        // Slice after slice is forgotten.
        assert_eq!(busy.share(2_399), (20, 8));
        busy.add(2_399, 400);
        assert_eq!(busy.share(2_399), (45, 9));
        assert_eq!(busy.share(9_000), (0, 0));
        busy.clear();
        assert_eq!(busy.share(0), (0, 0));
    }

    #[test]
    fn a_span_is_the_window_at_most() {
        let mut busy = Busy::new(1_600);
        busy.add(500_000, 750);
        assert_eq!(busy.share(500_000), (50, 1));
        (0..9).for_each(|_| busy.add(500_000, u64::MAX));
        assert_eq!(busy.share(500_000), (100, 10));
    }
}
