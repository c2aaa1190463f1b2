//! `instructions`: what callgrind counts per compared pair in `colo compare --sockets` and in QEMU's
//! colo-compare object, each as a whole process.
//!
//! Invariants: a run of N pairs is taken off one of 2N, so that start and end cancel out; both comparators
//! get the same frames from the same load; nothing is timed, so the machine's load does not matter.
//!
//! What is counted: user space. On QEMU's side its own binary, glib and libc, on ours our binary and
//! libc: reading the sockets, finding the flow, comparing, queueing, writing. On QEMU's side practically all of it lies below
//! `net_fill_rstate`, which cuts messages off the stream and calls the comparator (callgrind's
//! `--toggle-collect=net_fill_rstate` counts the same), so its main loop does not matter. The system calls themselves are
//! on neither side.

use std::fs;
use std::path::Path;
use std::time::Duration;

use colo_lab::comparator::{Comparator, ComparatorOptions, Kind};

use crate::compare_load::{Load, Shape};
use crate::compare_row::CompareRow;
use crate::place::{BenchError, Place};

/// Pairs of the shorter run.
const PAIRS: u64 = 4000;
/// How long a process under valgrind may take to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Counts one shape, in QEMU's object too if `has_peer`.
pub(crate) fn run(place: &Place, shape: Shape, has_peer: bool) -> Result<CompareRow, BenchError> {
    let ours = per_pair(place, Kind::Colo(place.colo()), shape)?;
    let peer = match has_peer {
        true => Some(per_pair(place, Kind::Qemu, shape)?),
        false => None,
    };
    Ok(CompareRow {
        kind: "instructions",
        protocol: shape.protocol.name(),
        payload: shape.payload,
        flows: shape.flows,
        peer: peer.map(|_| "qemu"),
        instructions_per_pair: Some(ours),
        peer_instructions_per_pair: peer,
        ratio: peer.map(|peer| peer / ours),
        ..CompareRow::default()
    })
}

fn per_pair(place: &Place, kind: Kind<'_>, shape: Shape) -> Result<f64, BenchError> {
    let pairs = PAIRS.max(4 * shape.flows as u64);
    let (short, long) = (
        count(place, kind, shape, pairs)?,
        count(place, kind, shape, 2 * pairs)?,
    );
    Ok((long as f64 - short as f64) / pairs as f64)
}

fn count(place: &Place, kind: Kind<'_>, shape: Shape, pairs: u64) -> Result<u64, BenchError> {
    let dir = place.scratch()?;
    let counts = dir.path().join("counts");
    let file = format!("--callgrind-out-file={}", counts.display());
    let options = ComparatorOptions {
        under: ["valgrind", "--tool=callgrind", &file]
            .map(str::to_owned)
            .to_vec(),
        ..ComparatorOptions::default()
    };
    let mut comparator = Comparator::start(kind, &options, dir.path())?;
    let passed = Load::new(&mut comparator, shape).and_then(|mut load| load.pass(pairs));
    passed.map_err(BenchError::io("pass frames through a comparator"))?;
    comparator.process.terminate()?;
    comparator.process.wait_exit(PATIENCE)?;
    total(&counts)
}

/// The sum that callgrind wrote at the end of the process.
fn total(counts: &Path) -> Result<u64, BenchError> {
    let what = format!("read {}", counts.display());
    let text = fs::read_to_string(counts).map_err(BenchError::io(what))?;
    let mut totals = text
        .lines()
        .filter_map(|line| line.strip_prefix("totals: "));
    let last = totals
        .next_back()
        .and_then(|total| total.trim().parse().ok());
    last.ok_or(BenchError::Unreadable {
        program: "callgrind",
        what: "total",
        output: text.chars().take(500).collect(),
    })
}
