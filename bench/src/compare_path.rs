//! `path`: CPU time per compared pair of `colo compare --sockets` beside QEMU's colo-compare object, over
//! the same unix sockets, with the same frames from the same load; and `floor`, what the sockets alone take.
//!
//! Invariants: rounds take turns, QEMU's, ours and the floor's; what is counted is the time on a CPU of all threads of
//! the process, user and kernel, from a state of rest to a state of rest, after a warm-up.
//!
//! Does not count the load's own time, which is the same for both.

use std::fs;
use std::time::{Duration, Instant};

use colo_lab::comparator::{Comparator, ComparatorOptions, Kind};

use crate::compare_floor::Floor;
use crate::compare_load::{Ends, Load, Shape};
use crate::compare_row::CompareRow;
use crate::figures::Range;
use crate::place::{BenchError, Place};

/// About how long a round takes; short ones are mostly the start of caches and of the clock.
const ROUND: Duration = Duration::from_millis(700);
/// Pairs before the first round, and to find out how many make a round.
const WARM_UP: u64 = 20_000;

/// What one comparator did in one round.
#[derive(Debug, Clone, Copy)]
struct Round {
    cpu_ns: f64,
    pairs_per_s: f64,
}

/// What tells the time that whoever is under load has spent on a CPU.
type CpuNs<'a> = Box<dyn Fn() -> Result<u64, BenchError> + 'a>;

/// One comparator, or the floor, under load.
struct Runner<'a> {
    load: Load,
    cpu_ns: CpuNs<'a>,
    pairs: u64,
}

impl<'a> Runner<'a> {
    fn of(comparator: &Comparator, shape: Shape) -> Result<Self, BenchError> {
        let pid = comparator.process.pid();
        let ends = Ends::of(comparator).map_err(BenchError::io("share sockets"))?;
        Self::new(ends, Box::new(move || cpu_ns(pid)), shape)
    }

    fn new(ends: Ends, cpu_ns: CpuNs<'a>, shape: Shape) -> Result<Self, BenchError> {
        let load = Load::new(ends, shape).map_err(BenchError::io("set up the load"))?;
        let mut runner = Self {
            load,
            cpu_ns,
            pairs: WARM_UP.max(4 * shape.flows as u64),
        };
        runner.round()?;
        let Round { pairs_per_s, .. } = runner.round()?;
        runner.pairs = (pairs_per_s * ROUND.as_secs_f64()) as u64;
        Ok(runner)
    }

    fn round(&mut self) -> Result<Round, BenchError> {
        let (begun, before) = (Instant::now(), (self.cpu_ns)()?);
        let passed = self.load.pass(self.pairs);
        passed.map_err(BenchError::io("pass frames through a comparator"))?;
        let seconds = begun.elapsed().as_secs_f64();
        let used = (self.cpu_ns)()? - before;
        let pairs = self.pairs as f64;
        Ok(Round {
            cpu_ns: used as f64 / pairs,
            pairs_per_s: pairs / seconds,
        })
    }
}

/// Measures one shape, `rounds` times each: ours beside QEMU's, and the floor.
pub(crate) fn run(
    place: &Place,
    shape: Shape,
    rounds: usize,
) -> Result<[CompareRow; 2], BenchError> {
    let options = ComparatorOptions::default();
    let (peer_dir, our_dir) = (place.scratch()?, place.scratch()?);
    let peer = Comparator::start(Kind::Qemu, &options, peer_dir.path())?;
    let ours = Comparator::start(Kind::Colo(place.colo()), &options, our_dir.path())?;
    let (floor, ends) = Floor::start().map_err(BenchError::io("start a forwarder"))?;
    let mut runners = [
        Runner::of(&peer, shape)?,
        Runner::of(&ours, shape)?,
        Runner::new(ends, Box::new(|| floor.cpu_ns()), shape)?,
    ];
    let frame_bits = 8.0 * runners[0].load.frame_bytes() as f64;
    let mut results = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (runner, results) in runners.iter_mut().zip(&mut results) {
            results.push(runner.round()?);
        }
    }
    let [peer_requests, requests, _] = runners.map(|runner| runner.load.requests());
    floor.end()?;
    if requests > 0 {
        return Err(BenchError::Compared { requests });
    }
    let [peer, ours, floor] = results.map(|rounds| median(&rounds));
    let row = |kind,
               Round {
                   cpu_ns,
                   pairs_per_s,
               }| CompareRow {
        kind,
        protocol: shape.protocol.name(),
        payload: shape.payload,
        flows: shape.flows,
        ns_per_pair: Some(cpu_ns),
        pairs_per_s: Some(pairs_per_s),
        gbit_s: Some(pairs_per_s * frame_bits / 1e9),
        ..CompareRow::default()
    };
    let path = CompareRow {
        peer: Some("qemu"),
        peer_cpu_ns_per_pair: Some(peer.cpu_ns),
        peer_pairs_per_s: Some(peer.pairs_per_s),
        peer_requests: Some(peer_requests),
        ratio: Some(peer.cpu_ns / ours.cpu_ns),
        ..row("path", ours)
    };
    Ok([path, row("floor", floor)])
}

fn median(rounds: &[Round]) -> Round {
    let of = |value: fn(&Round) -> f64| Range::of(rounds.iter().map(value)).median;
    Round {
        cpu_ns: of(|round| round.cpu_ns),
        pairs_per_s: of(|round| round.pairs_per_s),
    }
}

/// Time on a CPU of all threads, from /proc/PID/task/TID/schedstat.
fn cpu_ns(pid: u32) -> Result<u64, BenchError> {
    let folder = format!("/proc/{pid}/task");
    let what = format!("read {folder}");
    let mut total = 0;
    for task in fs::read_dir(&folder).map_err(BenchError::io(what))? {
        let path = task
            .map_err(BenchError::io("list threads"))?
            .path()
            .join("schedstat");
        let what = format!("read {}", path.display());
        let text = fs::read_to_string(&path).map_err(BenchError::io(what))?;
        let first = text
            .split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok());
        total += first.ok_or(BenchError::Unreadable {
            program: "/proc/PID/task/TID/schedstat",
            what: "CPU time",
            output: text,
        })?;
    }
    Ok(total)
}
