//! Which mechanism will steal less time from the guest: predicted from what was measured.
//!
//! Sans-IO. The figures start with a calibration of a few milliseconds and follow each capture.

use serde::Serialize;

/// Weight of a new measurement.
const LEARN: f64 = 0.25;
/// A set smaller than this teaches little about what a page costs.
const LEARN_PAGES: u64 = 64;

/// Measured costs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Model {
    /// Copying one page while the guest stands still.
    pub copy_page_ns: f64,
    /// One call that protects.
    pub protect_call_ns: f64,
    /// Each page of it.
    pub protect_page_ns: f64,
    /// One fault of the guest at a protected page.
    pub fault_ns: f64,
    /// Reading one page, from the capture to its release.
    pub read_page_ns: f64,
    /// How many of the faults expected there were.
    pub fault_ratio: f64,
}

/// What is known of a set before it is captured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Outlook {
    /// Pages in it.
    pub(super) pages: u64,
    /// Of these, pages that the set before had as well: the guest writes them again and again.
    pub(super) hot: u64,
    /// Since the set before.
    pub(super) interval_ns: f64,
    /// Calls and pages to protect all of it.
    pub(super) whole: Runs,
    /// Calls and pages to protect all but the hot ones.
    pub(super) cold: Runs,
}

/// Calls, and pages covered by them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Runs {
    pub(super) calls: u64,
    pub(super) pages: u64,
}

/// Predicted stolen time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Forecast {
    pub(super) copy_ns: f64,
    pub(super) protect_ns: f64,
    pub(super) mixed_ns: f64,
}

impl Model {
    pub(super) fn forecast(&self, o: &Outlook) -> Forecast {
        let protect = |runs: Runs| {
            runs.calls as f64 * self.protect_call_ns + runs.pages as f64 * self.protect_page_ns
        };
        let cold = (o.pages - o.hot.min(o.pages)) as f64;
        Forecast {
            copy_ns: o.pages as f64 * self.copy_page_ns,
            protect_ns: protect(o.whole) + self.faults(o, o.pages as f64) * self.fault_ns,
            mixed_ns: o.hot as f64 * self.copy_page_ns
                + protect(o.cold)
                + self.faults(o, cold) * self.fault_ns,
        }
    }

    /// Faults expected while `exposed` pages are read. A hot page is written once an interval, evenly spread; of the
    /// others, which came new into this set, as many are written again as come new into a set of that length.
    fn faults(&self, o: &Outlook, exposed: f64) -> f64 {
        if o.pages == 0 || o.interval_ns <= 0.0 {
            return exposed * self.fault_ratio;
        }
        // A page is exposed for half of the time on average.
        let time_ns = exposed * self.read_page_ns / 2.0;
        let share = (time_ns / o.interval_ns).min(1.0);
        let all = o.pages as f64;
        let hot = (exposed - (all - o.hot as f64)).max(0.0);
        let cold = exposed - hot;
        // Of the pages of a set, the share that is written in the next as well.
        let again = o.hot as f64 / all;
        (hot * share + cold * share * again) * self.fault_ratio
    }

    /// After a copy of `pages`.
    pub(super) fn copied(&mut self, pages: u64, ns: u64) {
        if pages >= LEARN_PAGES {
            learn(&mut self.copy_page_ns, ns as f64 / pages as f64);
        }
    }

    /// After protecting.
    pub(super) fn protected(&mut self, runs: Runs, ns: u64) {
        if runs.pages < LEARN_PAGES {
            return;
        }
        let expected =
            runs.calls as f64 * self.protect_call_ns + runs.pages as f64 * self.protect_page_ns;
        let factor = (ns as f64 / expected.max(1.0)).clamp(0.1, 10.0);
        let (call_ns, page_ns) = (self.protect_call_ns * factor, self.protect_page_ns * factor);
        learn(&mut self.protect_call_ns, call_ns);
        learn(&mut self.protect_page_ns, page_ns);
    }

    /// After the last page was read: `expected` faults came as `faults`, which took `stall_ns`.
    pub(super) fn read(&mut self, pages: u64, ns: u64, expected: f64, faults: u64, stall_ns: u64) {
        if pages < LEARN_PAGES {
            return;
        }
        learn(&mut self.read_page_ns, ns as f64 / pages as f64);
        if expected >= 1.0 || faults > 0 {
            let ratio = (faults as f64 / expected.max(1.0)).clamp(0.01, 100.0);
            let ratio = self.fault_ratio * ratio;
            learn(&mut self.fault_ratio, ratio.clamp(0.001, 100.0));
        }
        if faults > 0 {
            learn(&mut self.fault_ns, stall_ns as f64 / faults as f64);
        }
    }

    /// What [`Model::read`] compares with.
    pub(super) fn expected_faults(&self, o: &Outlook, exposed: u64) -> f64 {
        self.faults(o, exposed as f64)
    }
}

fn learn(value: &mut f64, measured: f64) {
    *value += (measured - *value) * LEARN;
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Model = Model {
        copy_page_ns: 350.0,
        protect_call_ns: 1000.0,
        protect_page_ns: 60.0,
        fault_ns: 57_000.0,
        read_page_ns: 1000.0,
        fault_ratio: 1.0,
    };

    fn outlook(pages: u64, hot: u64, interval_ms: f64) -> Outlook {
        Outlook {
            pages,
            hot,
            interval_ns: interval_ms * 1e6,
            whole: Runs { calls: 10, pages },
            cold: Runs {
                calls: 20,
                pages: pages - hot,
            },
        }
    }

    #[test]
    fn a_set_written_again_and_again_is_copied_and_a_quiet_one_protected() {
        let busy = MODEL.forecast(&outlook(1000, 1000, 20.0));
        assert!(busy.copy_ns < busy.protect_ns);
        let quiet = MODEL.forecast(&outlook(100_000, 0, 1000.0));
        assert!(quiet.protect_ns < quiet.copy_ns, "{quiet:?}");
        let both = MODEL.forecast(&outlook(100_000, 5_000, 1000.0));
        assert!(
            both.mixed_ns < both.protect_ns.min(both.copy_ns),
            "{both:?}"
        );
    }

    #[test]
    fn it_follows_what_is_measured() {
        let mut model = MODEL;
        for _ in 0..40 {
            model.copied(1000, 700_000);
            let runs = Runs {
                calls: 10,
                pages: 1000,
            };
            model.protected(runs, 140_000);
            let expected = model.expected_faults(&outlook(1000, 1000, 20.0), 1000);
            model.read(1000, 2_000_000, expected, 10, 300_000);
        }
        let near = |value: f64, wanted: f64| (value / wanted - 1.0).abs() < 0.01;
        assert!(near(model.copy_page_ns, 700.0), "{model:?}");
        assert!(near(model.protect_page_ns, 120.0), "{model:?}");
        assert!(near(model.fault_ns, 30_000.0), "{model:?}");
        let expected = model.expected_faults(&outlook(1000, 1000, 20.0), 1000);
        assert!(near(expected, 10.0), "{model:?}: {expected}");
        let before = model;
        model.copied(LEARN_PAGES - 1, 1 << 40);
        assert_eq!(model.copy_page_ns, before.copy_page_ns, "too few to tell");
    }
}
