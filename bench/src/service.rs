//! What replication costs a service: the same clients against `colo run` and against a pair, in turn.
//!
//! Invariants: both run in the same rounds on the same machine, never at the same time; a pair that lost
//! its protection gives no figure.
//!
//! Does not separate the cost of replication from that of sharing this machine's cores with the second
//! guest.

use std::thread;
use std::time::Duration;

use clap::Args;
use colo_lab::netns::Netns;
use colo_lab::pair::{Pair, Single};
use serde::Serialize;
use serde_json::{Value, json};

use crate::clients::{self, Measurement};
use crate::figures::{Range, cpu_percent, table};
use crate::place::{BenchError, Outcome, Place};

/// Pages that wrk asks for.
const PAGES: [&str; 2] = ["/", "/bytes/65536"];
/// Requests under way per connection of redis-benchmark.
const PIPELINES: [u32; 2] = [1, 16];
/// From the start of guests to the measurement of their idle time.
const SETTLE: Duration = Duration::from_millis(500);
/// How long idle time is measured.
const IDLE: Duration = Duration::from_secs(5);
/// What of the primary's status is shown.
const TIMES: [&str; 4] = ["checkpoint_pause_us", "commit_us", "hold_us", "dirty_pages"];

/// Options of `service`.
#[derive(Debug, Args)]
pub(crate) struct ServiceArgs {
    /// How many times each of the two is started and measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Requests of redis-benchmark per command
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1000..))]
    requests: u32,
    /// How long wrk asks for each page
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
}

/// One round of one of the two.
#[derive(Debug, Serialize)]
struct Sample {
    measurements: Vec<Measurement>,
    /// By process.
    idle_cpu_percent: Vec<f64>,
    /// Of the process that faces the clients, after the load.
    status: Value,
}

/// Runs the benchmark.
pub(crate) fn run(args: &ServiceArgs, place: &Place) -> Result<Outcome, BenchError> {
    let (mut runs, mut pairs) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}: colo run", args.rounds);
        runs.push(measure_run(args, place)?);
        eprintln!("round {round} of {}: pair", args.rounds);
        pairs.push(measure_pair(args, place)?);
    }
    Ok(Outcome {
        text: text(&runs, &pairs),
        json: json!({ "benchmark": "service", "run": runs, "pair": pairs }),
        clean: true,
    })
}

fn measure_run(args: &ServiceArgs, place: &Place) -> Result<Sample, BenchError> {
    let dir = place.scratch()?;
    let single = Single::start(&place.settings(), dir.path())?;
    let idle_cpu_percent = idle(&[single.process.pid()])?;
    let measurements = load(args, &single.topology.client, dir.path())?;
    let status = single
        .process
        .status()
        .map_err(BenchError::io("read the status of colo run"))?;
    Ok(Sample {
        measurements,
        idle_cpu_percent,
        status,
    })
}

fn measure_pair(args: &ServiceArgs, place: &Place) -> Result<Sample, BenchError> {
    let dir = place.scratch()?;
    let pair = Pair::start(&place.settings(), dir.path())?;
    let idle_cpu_percent = idle(&[pair.primary.pid(), pair.secondary.pid()])?;
    let measurements = load(args, &pair.topology.client, dir.path())?;
    let status = pair
        .primary
        .status()
        .map_err(BenchError::io("read the primary's status"))?;
    if status["protected"] != true {
        return Err(BenchError::Unprotected(status));
    }
    Ok(Sample {
        measurements,
        idle_cpu_percent,
        status,
    })
}

fn idle(pids: &[u32]) -> Result<Vec<f64>, BenchError> {
    thread::sleep(SETTLE);
    cpu_percent(pids, IDLE)
}

fn load(
    args: &ServiceArgs,
    client: &Netns,
    dir: &std::path::Path,
) -> Result<Vec<Measurement>, BenchError> {
    let mut all = Vec::new();
    for pipeline in PIPELINES {
        all.extend(clients::redis_benchmark(
            client,
            dir,
            args.requests,
            pipeline,
        )?);
    }
    for page in PAGES {
        all.push(clients::wrk(client, dir, page, args.seconds)?);
    }
    Ok(all)
}

fn text(runs: &[Sample], pairs: &[Sample]) -> String {
    let header = [
        "",
        "run 1/s",
        "pair 1/s",
        "pair/run",
        "min..max",
        "run p99 us",
        "pair p99 us",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let names = runs.first().map_or(&[][..], |sample| &sample.measurements);
    for (line, name) in names.iter().enumerate() {
        let row = row(runs, pairs, line);
        rows.push([vec![name.name.clone()], row].concat());
    }
    format!(
        "\nMedians of {} rounds; the ratio is that of the medians, its range that of the rounds.\n\n\
         {}\n{}\n{}",
        runs.len(),
        table(&rows),
        idle_text(runs, pairs),
        pair_text(pairs),
    )
}

fn row(runs: &[Sample], pairs: &[Sample], line: usize) -> Vec<String> {
    let of = |samples: &[Sample], value: fn(&Measurement) -> f64| -> Vec<f64> {
        samples
            .iter()
            .map(|sample| value(&sample.measurements[line]))
            .collect()
    };
    let (run, pair) = (of(runs, |m| m.per_second), of(pairs, |m| m.per_second));
    let ratios = Range::of(pair.iter().zip(&run).map(|(pair, run)| pair / run));
    let p99 = |samples| Range::of(of(samples, |m| m.p99_us)).median;
    let (run, pair) = (Range::of(run).median, Range::of(pair).median);
    vec![
        format!("{run:.0}"),
        format!("{pair:.0}"),
        format!("{:.2}", pair / run),
        format!("{:.2}..{:.2}", ratios.min, ratios.max),
        format!("{:.0}", p99(runs)),
        format!("{:.0}", p99(pairs)),
    ]
}

fn idle_text(runs: &[Sample], pairs: &[Sample]) -> String {
    let process = |samples: &[Sample], index: usize| {
        let all = samples
            .iter()
            .filter_map(|sample| sample.idle_cpu_percent.get(index));
        format!("{:.1} %", Range::of(all.copied()).median)
    };
    format!(
        "idle CPU (of one core): run {}, primary {}, secondary {}\n",
        process(runs, 0),
        process(pairs, 0),
        process(pairs, 1),
    )
}

/// What the primary counted.
fn pair_text(pairs: &[Sample]) -> String {
    let of = |path: &[&str]| {
        let all = pairs.iter().map(|sample| number(&sample.status, path));
        Range::of(all)
    };
    let share = Range::of(pairs.iter().map(|sample| match_percent(&sample.status)));
    let mut text = format!(
        "pair: {:.2} % of data packets released by match ({:.2}..{:.2}), \
         {:.0} checkpoints a round ({:.0}..{:.0})\n",
        share.median,
        share.min,
        share.max,
        of(&["checkpoints"]).median,
        of(&["checkpoints"]).min,
        of(&["checkpoints"]).max,
    );
    let causes = pairs
        .iter()
        .map(|sample| sample.status["checkpoint_causes"].to_string());
    text += &format!(
        "checkpoint causes by round: {}\n\n",
        causes.collect::<Vec<_>>().join(" ")
    );
    let mut rows = vec![
        ["since pairing", "p50", "p99", "max"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for key in TIMES {
        let [p50, p99] = ["p50", "p99"].map(|part| format!("{:.0}", of(&[key, part]).median));
        rows.push(vec![
            key.to_owned(),
            p50,
            p99,
            format!("{:.0}", of(&[key, "max"]).max),
        ]);
    }
    text + &table(&rows)
}

/// A number in a document; 0 if there is none.
fn number(document: &Value, path: &[&str]) -> f64 {
    let found = path.iter().fold(document, |value, key| &value[key]);
    found.as_f64().unwrap_or(0.0)
}

/// The share of data packets that left because the secondary's guest sent the same bytes.
fn match_percent(status: &Value) -> f64 {
    let by_match = number(status, &["released_data_by_match"]);
    let all = by_match + number(status, &["released_data_by_checkpoint"]);
    100.0 * by_match / all.max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(per_second: f64, by_match: u64) -> Sample {
        Sample {
            measurements: vec![Measurement {
                name: "SET -P 1".to_owned(),
                per_second,
                p50_us: 1.0,
                p99_us: 7.0,
            }],
            idle_cpu_percent: vec![0.5, 1.5],
            status: json!({
                "released_data_by_match": by_match, "released_data_by_checkpoint": 100 - by_match,
                "checkpoints": 4, "checkpoint_causes": {"deadline": 3}, "hold_us": {"p50": 90},
            }),
        }
    }

    #[test]
    fn the_report_pairs_the_rounds() {
        let runs = [sample(100.0, 0), sample(200.0, 0), sample(300.0, 0)];
        let pairs = [sample(50.0, 98), sample(50.0, 99), sample(60.0, 100)];
        let text = text(&runs, &pairs);
        let row: Vec<&str> = text
            .lines()
            .find(|l| l.starts_with("SET"))
            .unwrap()
            .split("  ")
            .collect();
        let row: Vec<&str> = row
            .into_iter()
            .map(str::trim)
            .filter(|cell| !cell.is_empty())
            .collect();
        assert_eq!(
            row,
            ["SET -P 1", "200", "50", "0.25", "0.20..0.50", "7", "7"]
        );
        for part in [
            "99.00 % of data packets",
            "(98.00..100.00)",
            "secondary 1.5 %",
            "deadline",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
