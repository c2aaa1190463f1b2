//! `datapath`: how fast packets go through the fast path, each figure beside its baseline of the same run.
//!
//! Invariants: the JSON document is a list of rows, each with its `kind`.

use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::datapath_vhost;
use crate::place::{BenchError, Outcome, Place};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Compared pairs of two guests' virtqueues, beside DPDK's vhost that only takes the packets
    Virtqueues,
}

/// Options of `datapath`.
#[derive(Debug, Args)]
pub(crate) struct DatapathArgs {
    /// What is measured [default: all]
    #[arg(long, value_delimiter = ',')]
    kind: Vec<Kind>,
    /// Bytes of a frame
    #[arg(long, value_delimiter = ',', default_value = "64,1400",
        value_parser = clap::value_parser!(u16).range(60..=1500))]
    payload: Vec<u16>,
    /// How often each is measured; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

/// Runs the benchmark.
pub(crate) fn run(args: &DatapathArgs, place: &Place) -> Result<Outcome, BenchError> {
    let measures = |kind| args.kind.is_empty() || args.kind.contains(&kind);
    let mut rows: Vec<Value> = Vec::new();
    let mut text = String::new();
    if measures(Kind::Virtqueues) {
        let outcome = datapath_vhost::run(place, &args.payload, args.rounds as usize)?;
        text += &outcome.text;
        rows.extend(outcome.rows);
    }
    Ok(Outcome {
        text,
        json: Value::Array(rows),
        clean: true,
    })
}
