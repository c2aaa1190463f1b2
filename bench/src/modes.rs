//! `modes`: the same guest under the same load, not replicated, under COLO, and in Remus mode with several intervals.
//!
//! Invariants: in each round every way of running the guest has its turn, with a guest started afresh and the loads in
//! the same order; a pair that lost its protection gives no figure; what the link and the processes did is counted
//! from before a load begins until it has ended.
//!
//! Does not separate the cost of replication from that of sharing this machine's cores with the second guest.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use colo_lab::pair::{Pair, Single};
use colo_lab::process::Process;
use colo_lab::topology::{Host, Topology};
use serde::Serialize;
use serde_json::{Value, json};

use crate::clients::Measurement;
use crate::figures::{Range, USER_HZ, cpu_ticks, table};
use crate::modes_load::{LOADS, Load, LoadOptions};
use crate::modes_plot;
use crate::place::{BenchError, Outcome, Place};

/// The interface of the link in both hosts.
const LINK: &str = "link0";

/// Options of `modes`.
#[derive(Debug, Args)]
pub(crate) struct ModesArgs {
    /// Milliseconds between the checkpoints of Remus mode
    #[arg(long, value_delimiter = ',', default_value = "25,50,100",
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    intervals: Vec<u32>,
    /// How many times each is started and measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// About how long each load lasts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Connections of each load
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=224))]
    connections: u32,
    /// Only these loads [default: all]
    #[arg(long, value_delimiter = ',', value_parser = LOADS.map(|load| load.key))]
    loads: Vec<String>,
    /// Draw throughput, latency and link bytes into a file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// How the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Run,
    Colo,
    Remus { interval_ms: u32 },
}

impl Mode {
    fn name(self) -> String {
        match self {
            Self::Run => "run".to_owned(),
            Self::Colo => "colo".to_owned(),
            Self::Remus { interval_ms } => format!("remus-{interval_ms}"),
        }
    }
}

/// One load on one guest.
#[derive(Debug, Clone, Serialize)]
struct Sample {
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// From before the client starts until it has ended.
    seconds: f64,
    /// Both directions of the pair's link; none without a pair.
    link_bytes: Option<u64>,
    primary_cpu_s: f64,
    secondary_cpu_s: Option<f64>,
    checkpoints: Option<u64>,
    divergences: Option<u64>,
    storms: Option<u64>,
}

/// One load on one way of running the guest; medians of the rounds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) mode: String,
    pub(crate) load: String,
    pub(crate) per_second: f64,
    per_second_min: f64,
    per_second_max: f64,
    /// Of the throughput of `run`.
    pub(crate) ratio: Option<f64>,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) link_bytes_per_s: Option<f64>,
    link_bytes_per_request: Option<f64>,
    primary_cpu_s: f64,
    secondary_cpu_s: Option<f64>,
    cpu_us_per_request: f64,
    seconds: f64,
    checkpoints_per_s: Option<f64>,
    divergences_per_s: Option<f64>,
    /// How often a storm of divergences led to Remus mode, in all rounds.
    storms: Option<u64>,
    rounds: Vec<Sample>,
}

/// Runs the benchmark.
pub(crate) fn run(args: &ModesArgs, place: &Place) -> Result<Outcome, BenchError> {
    let modes: Vec<Mode> = [Mode::Run, Mode::Colo]
        .into_iter()
        .chain(
            args.intervals
                .iter()
                .map(|&interval_ms| Mode::Remus { interval_ms }),
        )
        .collect();
    let chosen = |load: &&Load| args.loads.is_empty() || args.loads.iter().any(|k| k == load.key);
    let loads: Vec<&Load> = LOADS.iter().filter(chosen).collect();
    // By mode, then by load, then by round.
    let mut samples = vec![vec![Vec::new(); loads.len()]; modes.len()];
    for round in 1..=args.rounds {
        for (of_mode, &mode) in samples.iter_mut().zip(&modes) {
            eprintln!("round {round} of {}: {}", args.rounds, mode.name());
            let measured = measure(args, place, mode, &loads)?;
            for (of_load, sample) in of_mode.iter_mut().zip(measured) {
                of_load.push(sample);
            }
        }
    }
    let rows = rows(&modes, &loads, &samples);
    if let Some(file) = &args.svg {
        let svg = modes_plot::draw(&rows).map_err(BenchError::Failed)?;
        std::fs::write(file, svg).map_err(BenchError::io(format!("write {}", file.display())))?;
    }
    Ok(Outcome {
        text: text(&rows, args.rounds),
        json: json!(rows),
        clean: true,
    })
}

fn measure(
    args: &ModesArgs,
    place: &Place,
    mode: Mode,
    loads: &[&Load],
) -> Result<Vec<Sample>, BenchError> {
    let dir = place.scratch()?;
    let mut settings = place.settings();
    match mode {
        Mode::Run => {
            let single = Single::start(&settings, dir.path())?;
            return all(
                args,
                loads,
                &single.topology,
                dir.path(),
                &[&single.process],
            );
        }
        Mode::Colo => {}
        Mode::Remus { interval_ms } => {
            let lines = format!("mode = \"remus\"\nremus_interval_ms = {interval_ms}\n");
            settings.primary_extra.clone_from(&lines);
            settings.secondary_extra = lines;
        }
    }
    let pair = Pair::start(&settings, dir.path())?;
    let processes = [&pair.primary, &pair.secondary];
    all(args, loads, &pair.topology, dir.path(), &processes)
}

fn all(
    args: &ModesArgs,
    loads: &[&Load],
    topology: &Topology,
    dir: &Path,
    processes: &[&Process],
) -> Result<Vec<Sample>, BenchError> {
    let options = LoadOptions {
        client: &topology.client,
        dir,
        connections: args.connections,
        seconds: args.seconds,
    };
    let mut samples = Vec::new();
    for load in loads {
        let requests = load.prepare(&options)?;
        let before = Counted::read(topology, processes)?;
        let begun = Instant::now();
        let (measured, (after, seconds)) = load.run(&options, requests, || {
            let seconds = begun.elapsed().as_secs_f64();
            Ok((Counted::read(topology, processes)?, seconds))
        })?;
        samples.push(after.since(&before, &measured, seconds));
    }
    Ok(samples)
}

/// Counters of link and processes at one moment.
#[derive(Debug)]
struct Counted {
    link_bytes: u64,
    cpu_ticks: Vec<u64>,
    /// Of the process that faces the clients.
    status: Value,
}

impl Counted {
    fn read(topology: &Topology, processes: &[&Process]) -> Result<Self, BenchError> {
        let ticks = processes.iter().map(|process| cpu_ticks(process.pid()));
        let cpu_ticks = ticks.collect::<Result<Vec<u64>, _>>()?;
        let status = processes[0].status().map_err(|error| {
            let tail = processes[0].log_tail();
            BenchError::Failed(format!("no status: {error}; the log ends with:\n{tail}"))
        })?;
        let pair = processes.len() > 1;
        if pair && status["protected"] != true {
            return Err(BenchError::Unprotected(status));
        }
        let link_bytes = link_sent_bytes(topology, Host::A)? + link_sent_bytes(topology, Host::B)?;
        Ok(Self {
            link_bytes,
            cpu_ticks,
            status,
        })
    }

    fn since(&self, before: &Self, measured: &Measurement, seconds: f64) -> Sample {
        let is_pair = self.cpu_ticks.len() > 1;
        let cpu_s = |index: usize| {
            let (now, then) = (self.cpu_ticks.get(index)?, before.cpu_ticks.get(index)?);
            Some((now - then) as f64 / USER_HZ)
        };
        let counted = |of: fn(&Value) -> u64| {
            is_pair.then(|| of(&self.status).saturating_sub(of(&before.status)))
        };
        Sample {
            per_second: measured.per_second,
            p50_us: measured.p50_us,
            p99_us: measured.p99_us,
            seconds,
            link_bytes: is_pair.then(|| self.link_bytes - before.link_bytes),
            primary_cpu_s: cpu_s(0).unwrap_or(0.0),
            secondary_cpu_s: cpu_s(1),
            checkpoints: counted(|status| status["checkpoints"].as_u64().unwrap_or(0)),
            divergences: counted(divergences),
            storms: counted(|status| status["storms"].as_u64().unwrap_or(0)),
        }
    }
}

/// Differences of the guests' output, of every cause.
fn divergences(status: &Value) -> u64 {
    let by_cause = status["divergences"].as_object();
    by_cause.map_or(0, |causes| causes.values().filter_map(Value::as_u64).sum())
}

/// What a host has sent over the link since the link was made, frames with their headers.
fn link_sent_bytes(topology: &Topology, host: Host) -> Result<u64, BenchError> {
    let mut command = topology.host(host).command("ip");
    command.args(["-s", "-j", "link", "show", "dev", LINK]);
    let output = command.output().map_err(BenchError::io("run ip"))?;
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    document[0]["stats64"]["tx"]["bytes"]
        .as_u64()
        .ok_or_else(|| BenchError::Unreadable {
            program: "ip -s -j link",
            what: "count of bytes",
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
        })
}

fn rows(modes: &[Mode], loads: &[&Load], samples: &[Vec<Vec<Sample>>]) -> Vec<Row> {
    let mut rows = Vec::new();
    for (index, load) in loads.iter().enumerate() {
        let of_run = median(&samples[0][index], |s| s.per_second);
        for (&mode, of_mode) in modes.iter().zip(samples) {
            let row = row(mode, load, &of_mode[index]);
            let ratio = row.per_second / of_run;
            rows.push(Row {
                ratio: ratio.is_finite().then_some(ratio),
                ..row
            });
        }
    }
    rows
}

fn median(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> f64 {
    Range::of(samples.iter().map(value)).median
}

/// Nothing if the samples have no such value.
fn median_of(samples: &[Sample], value: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
    let values: Vec<f64> = samples.iter().filter_map(value).collect();
    (!values.is_empty()).then(|| Range::of(values).median)
}

fn row(mode: Mode, load: &Load, samples: &[Sample]) -> Row {
    let per_second = Range::of(samples.iter().map(|s| s.per_second));
    let requests = |s: &Sample| (s.per_second * s.seconds).max(1.0);
    let cpu_s = |s: &Sample| s.primary_cpu_s + s.secondary_cpu_s.unwrap_or(0.0);
    let rate = |count: fn(&Sample) -> Option<u64>| {
        median_of(samples, |s| Some(count(s)? as f64 / s.seconds))
    };
    let storms = samples.iter().filter_map(|s| s.storms).sum();
    Row {
        mode: mode.name(),
        load: load.name.to_owned(),
        per_second: per_second.median,
        per_second_min: per_second.min,
        per_second_max: per_second.max,
        ratio: None,
        p50_us: median(samples, |s| s.p50_us),
        p99_us: median(samples, |s| s.p99_us),
        link_bytes_per_s: rate(|s| s.link_bytes),
        link_bytes_per_request: median_of(samples, |s| Some(s.link_bytes? as f64 / requests(s))),
        primary_cpu_s: median(samples, |s| s.primary_cpu_s),
        secondary_cpu_s: median_of(samples, |s| s.secondary_cpu_s),
        cpu_us_per_request: median(samples, |s| cpu_s(s) * 1e6 / requests(s)),
        seconds: median(samples, |s| s.seconds),
        checkpoints_per_s: rate(|s| s.checkpoints),
        divergences_per_s: rate(|s| s.divergences),
        storms: (mode != Mode::Run).then_some(storms),
        rounds: samples.to_vec(),
    }
}

fn text(rows: &[Row], rounds: u32) -> String {
    let header = [
        "load",
        "mode",
        "1/s",
        "of run",
        "p50 ms",
        "p99 ms",
        "link MB/s",
        "link B/request",
        "CPU us/request",
        "checkpoints/s",
        "storms",
    ];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    let shown = |value: Option<f64>, decimals: usize| {
        value.map_or("-".to_owned(), |value| format!("{value:.decimals$}"))
    };
    for row in rows {
        cells.push(vec![
            row.load.clone(),
            row.mode.clone(),
            format!("{:.0}", row.per_second),
            shown(row.ratio, 2),
            format!("{:.2}", row.p50_us / 1e3),
            format!("{:.2}", row.p99_us / 1e3),
            shown(row.link_bytes_per_s.map(|bytes| bytes / 1e6), 1),
            shown(row.link_bytes_per_request, 0),
            format!("{:.1}", row.cpu_us_per_request),
            shown(row.checkpoints_per_s, 1),
            shown(row.storms.map(|storms| storms as f64), 0),
        ]);
    }
    format!("\nMedians of {rounds} rounds.\n\n{}", table(&cells))
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Row {
        /// One whose other figures do not matter.
        pub(crate) fn of(
            mode: &str,
            load: &str,
            per_second: f64,
            ratio: Option<f64>,
            link_bytes_per_s: Option<f64>,
        ) -> Self {
            let sample = sample(per_second, None);
            Self {
                mode: mode.to_owned(),
                load: load.to_owned(),
                ratio,
                link_bytes_per_s,
                ..row(Mode::Run, &LOADS[0], &[sample])
            }
        }
    }

    fn sample(per_second: f64, link_bytes: Option<u64>) -> Sample {
        Sample {
            per_second,
            p50_us: 500.0,
            p99_us: 900.0,
            seconds: 2.0,
            link_bytes,
            primary_cpu_s: 1.0,
            secondary_cpu_s: link_bytes.map(|_| 0.5),
            checkpoints: link_bytes.map(|_| 40),
            divergences: link_bytes.map(|_| 30),
            storms: link_bytes.map(|_| 1),
        }
    }

    #[test]
    fn rows_are_medians_beside_the_guest_that_is_not_replicated() {
        let loads = [&LOADS[0]];
        let runs = [900.0, 1000.0, 1100.0].map(|rate| sample(rate, None));
        let pairs = [400.0, 500.0, 600.0].map(|rate| sample(rate, Some(1_000_000)));
        let samples = [vec![runs.to_vec()], vec![pairs.to_vec()]];
        let rows = rows(&[Mode::Run, Mode::Colo], &loads, &samples);
        assert_eq!((rows[0].ratio, rows[1].ratio), (Some(1.0), Some(0.5)));
        assert_eq!((rows[0].link_bytes_per_s, rows[0].storms), (None, None));
        assert_eq!(rows[1].link_bytes_per_s, Some(500_000.0));
        assert_eq!(rows[1].link_bytes_per_request, Some(1000.0));
        assert_eq!(rows[1].cpu_us_per_request, 1500.0);
        assert_eq!(
            (rows[1].checkpoints_per_s, rows[1].storms),
            (Some(20.0), Some(3))
        );
    }

    #[test]
    fn divergences_of_all_causes_are_counted() {
        assert_eq!(
            divergences(&json!({"divergences": {"payload": 3, "length": 4}})),
            7
        );
        assert_eq!(divergences(&json!({})), 0);
    }
}
