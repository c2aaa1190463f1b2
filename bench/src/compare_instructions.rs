//! `instructions`: what callgrind counts per compared pair in `colo compare --sockets` and in QEMU's
//! colo-compare object.
//!
//! Invariants: a run of N pairs is taken off one of 2N, so that start and end cancel out; both comparators
//! get the same frames from the same load; nothing is timed, so the machine's load does not matter; both
//! sides are counted over the same [`Scope`], with everything that is called on the way: allocation, hash
//! tables, queues, memcmp. The kernel is on neither side.

use std::fs;
use std::path::Path;
use std::time::Duration;

use colo_lab::comparator::{Comparator, ComparatorOptions, Kind};

use crate::compare_load::{Ends, Load, Shape};
use crate::compare_row::CompareRow;
use crate::place::{BenchError, Place};

/// Pairs of the shorter run.
const PAIRS: u64 = 16_000;
/// How long a process under valgrind may take to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// From where to where is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All of the process: reading the sockets, too, and writing.
    Process,
    /// From the bytes that were read to what may leave: cutting frames off the stream, reading their
    /// headers, finding the flow, queueing, comparing, releasing.
    Compare,
}

impl Scope {
    fn kind(self) -> &'static str {
        match self {
            Self::Process => "instructions",
            Self::Compare => "instructions-compare",
        }
    }

    /// The functions within which is counted, and those within these that do not belong to it.
    ///
    /// QEMU's chardev hands what it has read to `net_fill_rstate`, which cuts messages off and calls the
    /// comparator with each; what is released is written from within, by `qemu_chr_fe_write_all`. Ours
    /// writes after it has compared.
    fn bounds(self, kind: Kind<'_>) -> (Option<&'static str>, Option<&'static str>) {
        match (self, kind) {
            (Self::Process, _) => (None, None),
            (Self::Compare, Kind::Qemu) => (Some("net_fill_rstate"), Some("qemu_chr_fe_write_all")),
            (Self::Compare, Kind::Colo(_)) => (Some("colo_sockets::engine::Engine::compare"), None),
        }
    }
}

/// Counts one shape, in QEMU's object too if `has_peer`.
pub(crate) fn run(
    place: &Place,
    shape: Shape,
    scope: Scope,
    has_peer: bool,
) -> Result<CompareRow, BenchError> {
    let ours = in_scope(place, Kind::Colo(place.colo()), shape, scope)?;
    let peer = match has_peer {
        true => Some(in_scope(place, Kind::Qemu, shape, scope)?),
        false => None,
    };
    Ok(CompareRow {
        kind: scope.kind(),
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

fn in_scope(place: &Place, kind: Kind<'_>, shape: Shape, scope: Scope) -> Result<f64, BenchError> {
    let (within, without) = scope.bounds(kind);
    let counted = per_pair(place, kind, shape, within)?;
    let excluded = match without {
        Some(_) => per_pair(place, kind, shape, without)?,
        None => 0.0,
    };
    Ok(counted - excluded)
}

/// Counts what happens within a function; in the whole process without one.
fn per_pair(
    place: &Place,
    kind: Kind<'_>,
    shape: Shape,
    within: Option<&str>,
) -> Result<f64, BenchError> {
    let pairs = PAIRS.max(4 * shape.flows as u64);
    let (short, long) = (
        count(place, kind, shape, within, pairs)?,
        count(place, kind, shape, within, 2 * pairs)?,
    );
    Ok((long as f64 - short as f64) / pairs as f64)
}

fn count(
    place: &Place,
    kind: Kind<'_>,
    shape: Shape,
    within: Option<&str>,
    pairs: u64,
) -> Result<u64, BenchError> {
    let dir = place.scratch()?;
    let counts = dir.path().join("counts");
    let file = format!("--callgrind-out-file={}", counts.display());
    let toggle = within.map(|function| format!("--toggle-collect={function}"));
    let mut under = ["valgrind", "--tool=callgrind", &file]
        .map(str::to_owned)
        .to_vec();
    under.extend(toggle);
    let options = ComparatorOptions {
        under,
        ..ComparatorOptions::default()
    };
    let mut comparator = Comparator::start(kind, &options, dir.path())?;
    let load = Ends::of(&comparator).and_then(|ends| Load::new(ends, shape));
    let passed = load.and_then(|mut load| load.pass(pairs));
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
