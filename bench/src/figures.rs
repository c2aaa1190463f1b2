//! Numbers: spread of a few values, percentiles, CPU time of a process, a table.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::place::BenchError;

/// Ticks a second in /proc (fixed by the ABI on x86-64).
pub(crate) const USER_HZ: f64 = 100.0;

/// The middle and both ends of some values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Range {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Range {
    /// All 0 without values.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values = sorted(values);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else {
            return Self::default();
        };
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Self {
            median: (low + high) / 2.0,
            min,
            max,
        }
    }
}

/// The smallest value that `percent` of all are not above; 0 without values.
pub(crate) fn percentile(values: impl IntoIterator<Item = f64>, percent: usize) -> f64 {
    let values = sorted(values);
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(0.0)
}

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The share of one core that each process uses during `time`, in percent.
pub(crate) fn cpu_percent(pids: &[u32], time: Duration) -> Result<Vec<f64>, BenchError> {
    let ticks = || {
        let all = pids.iter().map(|&pid| cpu_ticks(pid));
        all.collect::<Result<Vec<u64>, _>>()
    };
    let (begun, before) = (Instant::now(), ticks()?);
    thread::sleep(time);
    let (seconds, after) = (begun.elapsed().as_secs_f64(), ticks()?);
    let used = after
        .iter()
        .zip(before)
        .map(|(after, before)| after - before);
    let percent = used.map(|ticks| ticks as f64 / USER_HZ / seconds * 100.0);
    Ok(percent.collect())
}

/// Time that a process has used, in 100ths of a second.
pub(crate) fn cpu_ticks(pid: u32) -> Result<u64, BenchError> {
    let path = format!("/proc/{pid}/stat");
    let what = format!("read {path}");
    let stat = std::fs::read_to_string(Path::new(&path)).map_err(BenchError::io(what))?;
    stat_ticks(&stat).ok_or(BenchError::Unreadable {
        program: "/proc/PID/stat",
        what: "CPU time",
        output: stat,
    })
}

/// User and system time, fields 14 and 15 of proc_pid_stat(5); the guest's time is in the first.
fn stat_ticks(stat: &str) -> Option<u64> {
    // The command's name may contain anything; counting starts behind it, with field 3.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Aligned columns, the first to the left, the others to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let length =
        |row: &Vec<String>, column: usize| row.get(column).map_or(0, |c| c.chars().count());
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter()
                .map(|row| length(row, column))
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate();
        let line: Vec<String> = cells
            .map(|(column, (cell, &width))| match column {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text += line.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_percentiles_are_those_of_the_sorted_values() {
        let range = Range::of([3.0, 1.0, 2.0]);
        assert_eq!((range.median, range.min, range.max), (2.0, 1.0, 3.0));
        assert_eq!(Range::of([1.0, 4.0]).median, 2.5);
        assert_eq!(Range::of([]), Range::default());
        let values = || (1..=20).rev().map(f64::from);
        let found = [0, 50, 99, 100].map(|percent| percentile(values(), percent));
        assert_eq!(found, [1.0, 10.0, 20.0, 20.0]);
        assert_eq!(percentile([], 50), 0.0);
    }

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 8 7 6 123 45 0 0 20 0 1 0 999";
        assert_eq!(stat_ticks(stat), Some(168));
        assert_eq!(stat_ticks("7 (a"), None);
        assert_eq!(stat_ticks("7 (a) S 1"), None);
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["a".to_owned(), "10".to_owned()],
            vec!["long".to_owned(), "9".to_owned()],
        ];
        assert_eq!(table(&rows), "a     10\nlong   9\n");
    }
}
