//! How long frames stay in each stage of the packet path, in nanoseconds.
//!
//! Invariants: off, it costs one branch a frame and no memory; on, a frame is stamped when it enters
//! a stage and counted when it leaves it, at two reads of the clock; nothing allocates after
//! [`Stages::new`].
//!
//! Does not sum up over threads.

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest time recorded: ten minutes.
const MAX_NS: u64 = 600_000_000_000;

/// A part of a frame's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Taken from the NIC until it lies in the guest's receive buffer.
    NicToGuest,
    /// Taken from the guest's queue until the comparator has it.
    GuestToCompare,
    /// Taken from the guest's queue until it may leave.
    Hold,
    /// May leave (unreplicated: taken from the guest) until the NIC has it.
    CompareToNic,
}

/// All stages, in the order of a request and its response.
pub const STAGES: [Stage; 4] = [
    Stage::NicToGuest,
    Stage::GuestToCompare,
    Stage::Hold,
    Stage::CompareToNic,
];

impl Stage {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::NicToGuest => "nic_to_guest",
            Self::GuestToCompare => "guest_to_compare",
            Self::Hold => "hold",
            Self::CompareToNic => "compare_to_nic",
        }
    }
}

/// The distributions of one worker.
#[derive(Clone, Debug)]
pub struct Stages {
    histograms: [Histogram<u64>; STAGES.len()],
}

impl Stages {
    /// Nothing recorded.
    pub fn new() -> Self {
        let new = |_| Histogram::new_with_bounds(1, MAX_NS, 3).expect("constant bounds");
        Self {
            histograms: STAGES.map(new),
        }
    }

    /// Records one frame.
    #[inline]
    pub fn record(&mut self, stage: Stage, ns: u64) {
        self.histograms[stage as usize].saturating_record(ns.max(1));
    }

    /// Adds what another worker recorded.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.histograms.iter_mut().zip(&other.histograms) {
            // Their bounds are equal.
            let _ = sum.add(more);
        }
    }

    /// The distribution of one stage.
    pub fn histogram(&self, stage: Stage) -> &Histogram<u64> {
        &self.histograms[stage as usize]
    }

    /// What a report says, one entry a stage.
    pub fn report(&self) -> Vec<StageReport> {
        STAGES
            .into_iter()
            .map(|stage| StageReport::of(stage, self.histogram(stage)))
            .collect()
    }
}

impl Default for Stages {
    fn default() -> Self {
        Self::new()
    }
}

/// One stage in a report; times in nanoseconds.
#[derive(Clone, Debug, Serialize)]
pub struct StageReport {
    /// Its name.
    pub stage: &'static str,
    /// Frames.
    pub count: u64,
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
    /// Longest.
    pub max_ns: u64,
    /// Everything: value and number of frames, ascending.
    pub buckets: Vec<(u64, u64)>,
}

impl StageReport {
    fn of(stage: Stage, h: &Histogram<u64>) -> Self {
        let buckets = h.iter_recorded();
        Self {
            stage: stage.name(),
            count: h.len(),
            p50_ns: h.value_at_quantile(0.5),
            p99_ns: h.value_at_quantile(0.99),
            p999_ns: h.value_at_quantile(0.999),
            max_ns: h.max(),
            buckets: buckets
                .map(|step| (step.value_iterated_to(), step.count_at_value()))
                .collect(),
        }
    }
}

/// The text that HdrHistogram's plotters read (`.hgrm`): percentiles of `buckets` (value, count),
/// values divided by `unit`.
pub fn hgrm(buckets: &[(u64, u64)], unit: f64) -> String {
    use std::fmt::Write as _;
    let total: u64 = buckets.iter().map(|(_, count)| count).sum();
    let of_total = |n: f64| if total == 0 { 0.0 } else { n / total as f64 };
    let sum: f64 = buckets.iter().map(|&(v, n)| v as f64 * n as f64).sum();
    let mean = of_total(sum);
    let square = |&(v, n): &(u64, u64)| (v as f64 - mean).powi(2) * n as f64;
    let deviation = of_total(buckets.iter().map(square).sum()).sqrt();
    let max = buckets.last().map_or(0, |(value, _)| *value) as f64;
    let mut text = format!(
        "{:>12} {:>14} {:>10} {:>14}\n\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    );
    let mut below = 0;
    for (value, count) in buckets {
        below += count;
        let quantile = of_total(below as f64);
        let value = *value as f64 / unit;
        let inverse = 1.0 / (1.0 - quantile);
        // Writing to a string does not fail.
        let _ = match inverse.is_finite() {
            true => writeln!(
                text,
                "{value:12.3} {quantile:2.12} {below:10} {inverse:14.2}"
            ),
            false => writeln!(text, "{value:12.3} {quantile:2.12} {below:10}"),
        };
    }
    let (mean, deviation, max) = (mean / unit, deviation / unit, max / unit);
    let _ = write!(
        text,
        "#[Mean    = {mean:12.3}, StdDeviation   = {deviation:12.3}]\n\
         #[Max     = {max:12.3}, Total count    = {total:12}]\n\
         #[Buckets = {:12}, SubBuckets     = {:12}]\n",
        buckets.len(),
        2048
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_reported() {
        let mut stages = Stages::new();
        for ns in [1000, 1000, 3000, 0] {
            stages.record(Stage::Hold, ns);
        }
        let report = stages.report();
        let hold = report.iter().find(|r| r.stage == "hold").unwrap();
        assert_eq!((hold.count, hold.p50_ns, hold.max_ns), (4, 1000, 3001));
        let counted: u64 = hold.buckets.iter().map(|(_, n)| n).sum();
        assert_eq!(counted, 4);
        assert!(report.iter().all(|r| r.stage == "hold" || r.count == 0));
    }

    #[test]
    fn hgrm_has_the_columns_of_hdr_histogram() {
        let text = hgrm(&[(1000, 3), (2000, 1)], 1000.0);
        let rows: Vec<Vec<f64>> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .skip(2)
            .map(|line| {
                line.split_whitespace()
                    .map(|v| v.parse().unwrap())
                    .collect()
            })
            .collect();
        assert_eq!(rows[0], [1.0, 0.75, 3.0, 4.0]);
        assert_eq!(rows[1], [2.0, 1.0, 4.0]);
        assert!(text.contains("Total count    =            4"), "{text}");
        assert!(hgrm(&[], 1.0).contains("Total count    =            0"));
    }
}
