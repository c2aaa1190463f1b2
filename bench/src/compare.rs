//! `compare`: what a comparison costs, beside QEMU's comparator.
//!
//! Invariants: one row for each kind, protocol, payload and number of flows; a baseline is measured in the same
//! run. The JSON document is the list of rows.

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::compare_instructions::Scope;
use crate::compare_load::{Protocol, Shape};
use crate::compare_row::CompareRow;
use crate::figures::table;
use crate::place::{BenchError, Outcome, Place};
use crate::{compare_core, compare_instructions, compare_path};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// In memory, beside a memcmp of as many bytes
    Core,
    /// In memory, with the SVM's output as headers and digests
    Digest,
    /// Instructions that callgrind counts in `colo compare --sockets`: in all, and in comparing alone
    Instructions,
    /// CPU time of `colo compare --sockets` beside QEMU's object, and what the sockets alone take
    Path,
}

/// Whose figures stand beside ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// QEMU's colo-compare object
    Qemu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProtocolArg {
    Tcp,
    Udp,
}

/// Options of `compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// What is measured [default: all that the options allow]
    #[arg(long, value_delimiter = ',')]
    kind: Vec<Kind>,
    /// Bytes of payload
    #[arg(long, value_delimiter = ',', default_value = "64,512,1400",
        value_parser = clap::value_parser!(u16).range(4..=1460))]
    payload: Vec<u16>,
    /// Flows at once
    #[arg(long, value_delimiter = ',', default_value = "1,64,10000,1000000",
        value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    flows: Vec<u32>,
    /// What the frames carry
    #[arg(long, value_delimiter = ',', default_value = "tcp,udp")]
    protocol: Vec<ProtocolArg>,
    /// Measure this comparator, too
    #[arg(long)]
    peer: Option<Peer>,
    /// How often each is measured; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

/// QEMU forgets all connections when it has more.
const PEER_FLOWS_MAX: usize = 16_384;

/// Runs the benchmark.
pub(crate) fn run(args: &CompareArgs, place: &Place) -> Result<Outcome, BenchError> {
    let measures = |kind| args.kind.is_empty() || args.kind.contains(&kind);
    let mut rows = Vec::new();
    for shape in shapes(args) {
        eprintln!("{shape:?}");
        if measures(Kind::Core) {
            rows.extend(compare_core::run(shape, args.rounds as usize)?);
        }
        if measures(Kind::Digest) {
            rows.push(compare_core::run_digest(shape, args.rounds as usize)?);
        }
        let peer_can = shape.flows <= PEER_FLOWS_MAX;
        if measures(Kind::Instructions) && peer_can {
            let has_peer = args.peer.is_some();
            for scope in [Scope::Process, Scope::Compare] {
                rows.push(compare_instructions::run(place, shape, scope, has_peer)?);
            }
        }
        if measures(Kind::Path) && args.peer.is_some() && peer_can {
            rows.extend(compare_path::run(place, shape, args.rounds as usize)?);
        }
    }
    Ok(Outcome {
        text: text(&rows),
        json: json!(rows),
        clean: true,
    })
}

fn shapes(args: &CompareArgs) -> Vec<Shape> {
    let mut shapes = Vec::new();
    for protocol in &args.protocol {
        for payload in &args.payload {
            for flows in &args.flows {
                let protocol = match protocol {
                    ProtocolArg::Tcp => Protocol::Tcp,
                    ProtocolArg::Udp => Protocol::Udp,
                };
                shapes.push(Shape {
                    protocol,
                    payload: usize::from(*payload),
                    flows: *flows as usize,
                });
            }
        }
    }
    shapes
}

fn text(rows: &[CompareRow]) -> String {
    let heads = [
        "kind",
        "protocol",
        "payload",
        "flows",
        "ns/pair",
        "pairs/s",
        "Gbit/s",
        "peer ns",
        "peer 1/s",
        "instr",
        "peer instr",
        "ratio",
    ];
    let mut lines = vec![heads.map(str::to_owned).to_vec()];
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    for row in rows {
        lines.push(vec![
            row.kind.to_owned(),
            row.protocol.to_owned(),
            row.payload.to_string(),
            row.flows.to_string(),
            number(row.ns_per_pair, 1),
            number(row.pairs_per_s, 0),
            number(row.gbit_s, 2),
            number(row.peer_cpu_ns_per_pair, 0),
            number(row.peer_pairs_per_s, 0),
            number(row.instructions_per_pair, 0),
            number(row.peer_instructions_per_pair, 0),
            number(row.ratio, 1),
        ]);
    }
    table(&lines)
}
