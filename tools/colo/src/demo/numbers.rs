//! Numbers as a person reads them: grouped, in the unit that suits them, or as bars.
//!
//! Does not know what they mean.

use std::fmt::Write as _;

use super::figures::Spread;

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// `1234567` as `1 234 567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Microseconds in the unit that suits them.
pub(super) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..10_000 => format!("{:.1} ms", us as f64 / 1e3),
        10_000..1_000_000 => format!("{} ms", us / 1_000),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

pub(super) fn spread(spread: Spread) -> String {
    format!(
        "p50 {}, p99 {}, max {}",
        micros(spread.p50),
        micros(spread.p99),
        micros(spread.max)
    )
}

pub(super) fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{} kB", count / 1_000),
        _ => format!("{:.1} MB", count as f64 / 1e6),
    }
}

pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "–".to_owned();
    }
    let mut text = String::new();
    // Writing to a string does not fail.
    write!(text, "{:.1} %", part as f64 * 100.0 / whole as f64).ok();
    text
}

pub(super) fn bars(samples: &[u64]) -> String {
    let highest = samples.iter().copied().max().unwrap_or(0).max(1);
    samples
        .iter()
        .map(|&sample| {
            let step = (sample * BARS.len() as u64).div_ceil(highest).max(1) - 1;
            if sample == 0 {
                ' '
            } else {
                BARS[step as usize]
            }
        })
        .collect()
}

/// The same curve in `columns` columns.
pub(super) fn resampled(samples: &[u64], columns: usize) -> Vec<u64> {
    let at = |column: usize| samples.get(column * samples.len() / columns).copied();
    (0..columns).filter_map(at).collect()
}
