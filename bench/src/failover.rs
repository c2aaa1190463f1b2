//! How long a service is away when its primary is killed at a random moment of a load, and what is lost.
//!
//! Invariants: each kill meets a fresh pair; every answer is checked by the load, and everything
//! acknowledged before the kill is asked for again after it; a kill that could not be measured is
//! counted, never left out.
//!
//! The baseline is the longest gap that the same probe saw before the kill.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use colo_lab::load::{Load, LoadConfig, LoadReport};
use colo_lab::pair::Pair;
use colo_lab::topology::Host;
use serde::Serialize;
use serde_json::json;

use crate::figures::{percentile, table};
use crate::place::{BenchError, Outcome, Place};

/// Earliest and latest kill after the begin of the load.
const MOMENT_MS: std::ops::Range<u64> = 500..3000;
/// How long the load goes on after the takeover.
const AFTERWARDS: Duration = Duration::from_secs(2);

/// Options of `failover`.
#[derive(Debug, Args)]
pub(crate) struct FailoverArgs {
    /// How many pairs lose their primary
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    kills: u64,
    /// Connections of the load
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=224))]
    clients: u64,
    /// Cut the link right before the kill, so that only missing heartbeats tell of it
    #[arg(long)]
    silent: bool,
}

/// One kill.
#[derive(Debug, Serialize)]
struct Kill {
    moment_ms: u64,
    /// From the signal until the secondary said that it is alone.
    takeover_ms: f64,
    load: LoadReport,
}

impl Kill {
    fn outage_ms(&self) -> Option<f64> {
        let outage_us = self.load.probe?.outage_us?;
        Some(outage_us as f64 / 1e3)
    }

    fn gap_before_ms(&self) -> f64 {
        self.load
            .probe
            .map_or(0.0, |probe| probe.longest_gap_us as f64 / 1e3)
    }

    /// Connections open at the kill, and those lost.
    fn connections(&self) -> (usize, usize) {
        let survival = self.load.survival.unwrap_or_default();
        (survival.connections_before, survival.connections_lost)
    }

    /// Requests that got no whole answer.
    fn unanswered(&self) -> u64 {
        self.load.requests.saturating_sub(self.load.responses)
    }

    fn is_clean(&self) -> bool {
        let (open, lost) = self.connections();
        let errors = self.load.wrong_responses + self.load.client_errors + self.unanswered();
        errors == 0 && open > 0 && lost == 0 && self.outage_ms().is_some()
    }
}

/// Runs the benchmark.
pub(crate) fn run(args: &FailoverArgs, place: &Place) -> Result<Outcome, BenchError> {
    let (mut kills, mut failures) = (Vec::new(), Vec::new());
    for number in 1..=args.kills {
        match kill(args, place, number) {
            Ok(kill) => {
                let (takeover, outage) = (kill.takeover_ms, kill.outage_ms().unwrap_or(f64::NAN));
                eprintln!("kill {number}: takeover {takeover:.0} ms, outage {outage:.1} ms");
                for note in &kill.load.notes {
                    eprintln!("  {note}");
                }
                kills.push(kill);
            }
            Err(error) => {
                eprintln!("kill {number}: {error}");
                failures.push(error.to_string());
            }
        }
    }
    let clean = failures.is_empty() && kills.iter().all(Kill::is_clean);
    Ok(Outcome {
        text: text(&kills, failures.len(), args.silent),
        json: json!({
            "benchmark": "failover", "silent": args.silent, "kills": kills, "failures": failures,
        }),
        clean,
    })
}

fn kill(args: &FailoverArgs, place: &Place, seed: u64) -> Result<Kill, BenchError> {
    let dir = place.scratch()?;
    let mut pair = Pair::start(&place.settings(), dir.path())?;
    let config = LoadConfig::new(usize::try_from(args.clients).unwrap_or(1), seed);
    let load = Load::start(&pair.topology.client, config)?;
    let moment_ms = random_moment_ms();
    thread::sleep(Duration::from_millis(moment_ms));
    load.mark_kill();
    if args.silent {
        pair.topology.cut_link()?;
    }
    let begun = Instant::now();
    pair.primary.kill()?;
    pair.wait_alone(Host::B)?;
    let takeover_ms = begun.elapsed().as_secs_f64() * 1e3;
    thread::sleep(AFTERWARDS);
    Ok(Kill {
        moment_ms,
        takeover_ms,
        load: load.finish()?,
    })
}

fn random_moment_ms() -> u64 {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = clock.map_or(0, |since| u64::from(since.subsec_nanos()));
    MOMENT_MS.start + nanos / 1000 % (MOMENT_MS.end - MOMENT_MS.start)
}

fn text(kills: &[Kill], failures: usize, silent: bool) -> String {
    let mut rows = vec![["ms", "p50", "p99", "max"].map(str::to_owned).to_vec()];
    let mut row = |name: &str, values: Vec<f64>| {
        let cell = |percent| format!("{:.1}", percentile(values.iter().copied(), percent));
        rows.push(vec![name.to_owned(), cell(50), cell(99), cell(100)]);
    };
    row("outage", kills.iter().filter_map(Kill::outage_ms).collect());
    row(
        "takeover",
        kills.iter().map(|kill| kill.takeover_ms).collect(),
    );
    row(
        "longest gap before",
        kills.iter().map(Kill::gap_before_ms).collect(),
    );
    let sum = |value: fn(&Kill) -> u64| kills.iter().map(value).sum::<u64>();
    format!(
        "\n{} primaries killed under load{}; {failures} could not be measured.\n\n{}\n\
         connections open at the kills {}, lost {}\n\
         requests {}, unanswered {}, wrong answers {}, client errors {}\n\
         acknowledged facts asked for again {}\n",
        kills.len(),
        if silent { ", the link cut before" } else { "" },
        table(&rows),
        sum(|kill| kill.connections().0 as u64),
        sum(|kill| kill.connections().1 as u64),
        sum(|kill| kill.load.requests),
        sum(Kill::unanswered),
        sum(|kill| kill.load.wrong_responses),
        sum(|kill| kill.load.client_errors),
        sum(|kill| kill.load.audited),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_lab::load::{Latency, ProbeReport, Survival};

    fn kill(outage_us: u64) -> Kill {
        Kill {
            moment_ms: 700,
            takeover_ms: 12.0,
            load: LoadReport {
                seconds: 3.0,
                requests: 10,
                responses: 10,
                received_bytes: 0,
                client_errors: 0,
                wrong_responses: 0,
                audited: 4,
                latency_us: Latency::default(),
                shares: Vec::new(),
                survival: Some(Survival {
                    connections_before: 16,
                    ..Survival::default()
                }),
                probe: Some(ProbeReport {
                    outage_us: Some(outage_us),
                    ..ProbeReport::default()
                }),
                notes: Vec::new(),
            },
        }
    }

    #[test]
    fn any_loss_is_no_clean_kill() {
        assert!(kill(5).is_clean());
        let flaws: [fn(&mut Kill); 6] = [
            |kill| kill.load.responses -= 1,
            |kill| kill.load.wrong_responses = 1,
            |kill| kill.load.client_errors = 1,
            |kill| kill.load.survival = None,
            |kill| kill.load.survival.as_mut().unwrap().connections_lost = 1,
            |kill| kill.load.probe = None,
        ];
        for (number, flaw) in flaws.into_iter().enumerate() {
            let mut kill = kill(5);
            flaw(&mut kill);
            assert!(!kill.is_clean(), "flaw {number}");
        }
    }

    #[test]
    fn the_report_sums_the_kills() {
        let text = text(&[kill(30_000), kill(50_000)], 1, false);
        for part in [
            "outage",
            "30.0",
            "50.0",
            "1 could not",
            "kills 32, lost 0",
            "again 8",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
