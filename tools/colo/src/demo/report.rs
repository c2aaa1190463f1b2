//! The demo's report for a person.
//!
//! Invariant: the text depends on the outcome only.
//!
//! Does not measure.

use std::time::Duration;

use colo_lab::load::{Latency, Progress};

use super::DemoArgs;
use super::numbers::{bars, bytes, grouped, micros, percent, resampled, spread};
use super::outcome::Outcome;
use super::paint::Paint;

/// Columns of the throughput curve.
const CURVE: usize = 60;
/// Notes shown about errors.
const NOTES: usize = 12;

/// The first lines of a run.
pub(super) fn title(args: &DemoArgs, paint: Paint) -> String {
    let load = format!("{} connections for {} s", args.clients, args.seconds);
    let kind = if args.no_divergence {
        ", deterministic requests"
    } else {
        ""
    };
    let kill = if args.no_failover {
        ""
    } else {
        ", primary killed half-way"
    };
    format!(
        "\n  {}  {}\n\n",
        paint.strong("colo demo"),
        paint.dim(&format!("{load}{kind}{kill}"))
    )
}

/// The line that is shown during the load.
pub(super) fn progress(
    elapsed: Duration,
    whole: Duration,
    samples: &[u64],
    progress: &Progress,
) -> String {
    let recent = &samples[samples.len().saturating_sub(20)..];
    let bad = progress.client_errors + progress.wrong_responses;
    let bad = if bad > 0 {
        format!("  {bad} bad")
    } else {
        String::new()
    };
    format!(
        "  … {:4.1} of {} s  {}  {} answers{bad}",
        elapsed.as_secs_f64(),
        whole.as_secs(),
        bars(recent),
        grouped(progress.responses),
    )
}

/// The whole report.
pub(super) fn text(outcome: &Outcome, paint: Paint) -> String {
    let mut text = String::from("\n");
    clients(&mut text, outcome, paint);
    lockstep(&mut text, outcome, paint);
    if outcome.failover {
        failover(&mut text, outcome, paint);
    }
    verdict(&mut text, outcome, paint);
    text
}

fn heading(text: &mut String, title: &str, columns: &str, paint: Paint) {
    let line = format!(
        "  {} {}",
        paint.strong(&format!("{title:<17}")),
        paint.dim(columns)
    );
    push(text, line.trim_end());
}

fn push(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

fn clients(text: &mut String, outcome: &Outcome, paint: Paint) {
    let load = &outcome.load;
    let columns = format!(
        "{:>6} {:>10} {:>9} {:>8} {:>8} {:>8} {:>8}",
        "conns", "answers", "per s", "p50", "p99", "p99.9", "max"
    );
    heading(text, "Clients", &columns, paint);
    for share in &load.shares {
        let connections = share.connections.to_string();
        row(
            text,
            share.protocol,
            &connections,
            &share.latency_us,
            load.seconds,
        );
    }
    if let Some(probe) = &load.probe {
        row(text, "UDP probe", "", &probe.round_trip_us, load.seconds);
    }
    let connections: usize = load.shares.iter().map(|share| share.connections).sum();
    row(
        text,
        "all TCP",
        &connections.to_string(),
        &load.latency_us,
        load.seconds,
    );
    text.push('\n');
    let mark = outcome
        .kill_sample
        .map(|at| at * CURVE / outcome.samples.len().max(1));
    let curve = bars(&resampled(&outcome.samples, CURVE));
    push(
        text,
        &format!("    {:<15} {}", "answers / time", paint.tint(&curve)),
    );
    if let Some(mark) = mark {
        let space = " ".repeat(mark.min(CURVE - 1));
        push(
            text,
            &format!("    {:<15} {space}{}", "", paint.bad("▲ killed")),
        );
    }
    text.push('\n');
}

fn row(text: &mut String, name: &str, connections: &str, latency: &Latency, seconds: f64) {
    let rate = latency.count as f64 / seconds.max(0.001);
    let line = format!(
        "    {name:<15} {connections:>6} {:>10} {:>9} {:>8} {:>8} {:>8} {:>8}",
        grouped(latency.count),
        grouped(rate as u64),
        micros(latency.p50),
        micros(latency.p99),
        micros(latency.p999),
        micros(latency.max),
    );
    push(text, &line);
}

fn lockstep(text: &mut String, outcome: &Outcome, paint: Paint) {
    let figures = &outcome.figures;
    heading(text, "Lockstep", "", paint);
    field(
        text,
        "compared",
        &format!("{} packets", grouped(figures.compared)),
    );
    let released = figures.released_by_match + figures.released_by_checkpoint;
    let data = figures.data_by_match + figures.data_by_checkpoint;
    let by = |count: u64, of_data: u64| {
        format!(
            "{} packets, {}; {} of those with data",
            grouped(count),
            percent(count, released),
            percent(of_data, data)
        )
    };
    field(
        text,
        "by match",
        &by(figures.released_by_match, figures.data_by_match),
    );
    field(
        text,
        "by checkpoint",
        &by(figures.released_by_checkpoint, figures.data_by_checkpoint),
    );
    let mut causes: Vec<_> = figures.divergences.iter().collect();
    causes.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let named: Vec<_> = causes
        .iter()
        .map(|(cause, count)| format!("{cause} {}", grouped(**count)))
        .collect();
    let sum = grouped(figures.divergence_count());
    let named = if named.is_empty() {
        String::new()
    } else {
        format!(": {}", named.join(", "))
    };
    field(text, "divergences", &format!("{sum}{named}"));
    let per_second = figures.checkpoints as f64 / seconds_paired(outcome);
    field(
        text,
        "checkpoints",
        &format!("{}, {per_second:.1} per s", grouped(figures.checkpoints)),
    );
    if figures.checkpoints > 0 {
        let pages = figures.dirty_pages;
        field(text, "pause", &spread(figures.pause_us));
        field(text, "stolen", &spread(figures.stolen_us));
        field(text, "commit", &spread(figures.commit_us));
        field(text, "hold", &spread(figures.hold_us));
        let shown = [pages.p50, pages.p99, pages.max].map(grouped);
        field(
            text,
            "dirty pages",
            &format!("p50 {}, p99 {}, max {}", shown[0], shown[1], shown[2]),
        );
    }
    field(text, "over the link", &bytes(figures.link_bytes));
    text.push('\n');
}

/// How long the pair was one, as far as this run knows.
fn seconds_paired(outcome: &Outcome) -> f64 {
    let seconds = outcome
        .killed_at
        .map_or(outcome.load.seconds, |at| at.as_secs_f64());
    seconds.max(0.001)
}

fn failover(text: &mut String, outcome: &Outcome, paint: Paint) {
    heading(text, "Failover", "", paint);
    let killed = outcome.killed_at.unwrap_or_default().as_secs_f64();
    field(
        text,
        "kill",
        &format!("SIGKILL to the primary at {killed:.2} s"),
    );
    let outage = outcome
        .outage_ms()
        .map_or("not measured".to_owned(), |ms| format!("{ms:.0} ms"));
    let outage = paint.strong(&outage);
    field(
        text,
        "outage",
        &format!("{outage}, the longest silence of a 1 kHz UDP echo"),
    );
    if let Some(ms) = outcome.takeover_ms {
        let role = outcome.survivor["role"].as_str().unwrap_or("unknown");
        let generation = &outcome.survivor["generation"];
        let shown = format!("{role}, generation {generation}, {ms:.0} ms after the kill");
        field(text, "secondary is", &shown);
    }
    if let Some(survival) = outcome.load.survival {
        let lost = format!(
            "{} open, {} lost",
            survival.connections_before, survival.connections_lost
        );
        field(text, "connections", &lost);
        let flight = survival.in_flight_us;
        let shown = format!(
            "{}, answered after {} (p50), {} (max)",
            grouped(flight.count),
            micros(flight.p50),
            micros(flight.max)
        );
        field(text, "in flight", &shown);
    }
    if let Some(probe) = &outcome.load.probe {
        let silent = probe.sent - probe.answered;
        field(
            text,
            "UDP probe",
            &format!(
                "{} of {} datagrams unanswered, {} answered twice",
                grouped(silent),
                grouped(probe.sent),
                grouped(probe.duplicates)
            ),
        );
    }
    text.push('\n');
}

fn field(text: &mut String, name: &str, value: &str) {
    push(text, &format!("    {name:<15} {value}"));
}

fn verdict(text: &mut String, outcome: &Outcome, paint: Paint) {
    let good = outcome.failures().is_empty();
    let word = if good {
        paint.good("passed")
    } else {
        paint.bad("FAILED")
    };
    push(
        text,
        &format!("  {} {word}", paint.strong("Verdict          ")),
    );
    for check in outcome.checks() {
        let line = if check.holds {
            format!("    {} {}", paint.good("✓"), check.success)
        } else {
            format!("    {} {}", paint.bad("✗"), paint.bad(&check.failure))
        };
        push(text, &line);
    }
    for note in outcome.load.notes.iter().take(NOTES) {
        push(text, &format!("      {}", paint.dim(note)));
    }
    if outcome.load.notes.len() > NOTES {
        push(text, &format!("      {}", paint.dim("and more")));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::super::figures::Figures;
    use super::*;
    use colo_lab::load::{LoadReport, ProbeReport, Survival};
    use serde_json::Value;

    fn outcome() -> Outcome {
        let latency = Latency {
            count: 12_345,
            p50: 110,
            p99: 2_400,
            p999: 14_000,
            max: 1_210_000,
        };
        let status = serde_json::json!({
            "protected": true, "compared": 9000, "released_by_match": 8900,
            "released_by_checkpoint": 100, "released_data_by_match": 4000,
            "released_data_by_checkpoint": 90, "divergences": {"payload": 70, "deadline": 3},
            "checkpoints": 60, "checkpoint_pause_us": {"p50": 900, "p99": 2000, "max": 2100},
            "stolen_us": {"p50": 901, "p99": 2001, "max": 2101},
            "commit_us": {"p50": 3300, "p99": 14000, "max": 15000},
            "hold_us": {"p50": 1500, "p99": 20000, "max": 21000}, "link_bytes": 7_000_000,
        });
        Outcome {
            load: LoadReport {
                seconds: 20.0,
                requests: 12_345,
                responses: 12_345,
                received_bytes: 1,
                client_errors: 0,
                wrong_responses: 0,
                audited: 400,
                latency_us: latency,
                shares: Vec::new(),
                survival: Some(Survival {
                    connections_before: 16,
                    connections_lost: 0,
                    in_flight_us: latency,
                }),
                probe: Some(ProbeReport {
                    outage_us: Some(231_000),
                    ..ProbeReport::default()
                }),
                notes: Vec::new(),
            },
            figures: Figures::from_status(&status),
            survivor: serde_json::json!({"role": "alone", "generation": 2}),
            failover: true,
            diverging: true,
            takeover_ms: Some(215.0),
            killed_at: Some(Duration::from_secs(10)),
            samples: vec![5, 6, 0, 6],
            kill_sample: Some(2),
        }
    }

    #[test]
    fn a_good_run_passes_and_any_flaw_fails() {
        type Flaw = fn(&mut Outcome);
        assert_eq!(outcome().failures(), Vec::<String>::new());
        let flaws: [Flaw; 9] = [
            |outcome| outcome.load.wrong_responses = 1,
            |outcome| outcome.load.client_errors = 1,
            |outcome| outcome.load.requests += 1,
            |outcome| (outcome.load.requests, outcome.load.responses) = (0, 0),
            |outcome| outcome.figures.compared = 0,
            |outcome| outcome.figures.checkpoints = 0,
            |outcome| outcome.takeover_ms = None,
            |outcome| {
                outcome.load.survival.as_mut().unwrap().connections_lost = 1;
            },
            |outcome| (outcome.failover, outcome.figures.protected) = (false, false),
        ];
        for (number, flaw) in flaws.into_iter().enumerate() {
            let mut outcome = outcome();
            flaw(&mut outcome);
            assert_eq!(outcome.failures().len(), 1, "flaw {number}");
        }
    }

    #[test]
    fn the_report_fits_a_terminal_and_shows_the_figures() {
        let text = text(&outcome(), Paint::plain());
        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
        for part in [
            "231 ms",
            "97.8 %",
            "payload 70, deadline 3",
            "passed",
            "▲ killed",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn the_json_has_the_agreed_keys() {
        let text = super::super::figures::json(&outcome());
        let value: Value = serde_json::from_str(&text).unwrap();
        let keys = |value: &Value| -> Vec<String> {
            let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys
        };
        let mut expected = "requests responses client_errors wrong_responses compared \
             released_by_match released_by_checkpoint divergences checkpoints \
             checkpoint_pause_us stolen_us commit_us hold_us failover latency_us"
            .split_whitespace()
            .collect::<Vec<_>>();
        expected.sort();
        assert_eq!(keys(&value), expected);
        assert_eq!(keys(&value["checkpoint_pause_us"]), ["max", "p50", "p99"]);
        for (key, p50) in [("stolen_us", 901), ("commit_us", 3300), ("hold_us", 1500)] {
            assert_eq!(keys(&value[key]), ["max", "p50", "p99"]);
            assert_eq!(value[key]["p50"], p50, "{key}");
        }
        let failover = ["connections_before", "connections_lost", "outage_ms"];
        assert_eq!(keys(&value["failover"]), failover);
        assert_eq!(keys(&value["latency_us"]), ["p50", "p99", "p999"]);
        assert_eq!(
            (&value["divergences"], &value["requests"]),
            (&73.into(), &12_345.into())
        );
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(1_234_567), "1 234 567");
        assert_eq!(grouped(12), "12");
        let shown = [999, 1_000, 14_000, 1_210_000].map(micros);
        assert_eq!(shown, ["999 µs", "1.0 ms", "14 ms", "1.21 s"]);
        assert_eq!(bars(&[0, 1, 8]), " ▁█");
    }
}
