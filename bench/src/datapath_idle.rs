//! `idle`: what the processes of a pair use with nothing to do, thread by thread, beside a guest that is
//! not replicated.
//!
//! Invariants: nobody asks the guests anything meanwhile; a pair that lost its protection gives no
//! figure.

use std::thread;
use std::time::{Duration, Instant};

use colo_lab::pair::{Pair, Settings, Single};

use crate::datapath::DatapathArgs;
use crate::datapath_cpu::CpuTimes;
use crate::datapath_row::{Figures, Row};
use crate::place::{BenchError, Place};

/// From the start of guests to their idle time: polling unlearns its patience, connections close.
const SETTLE: Duration = Duration::from_secs(2);

/// Runs it.
pub(crate) fn run(args: &DatapathArgs, place: &Place) -> Result<Vec<Row>, BenchError> {
    let mut settings = place.settings();
    settings.poll = args.poll();
    settings.xdp = args.xdp();
    let (mut runs, mut primaries, mut secondaries) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        eprintln!("idle, round {round} of {}", args.rounds);
        runs.push(measure_run(&settings, place, args.time())?);
        let [primary, secondary] = measure_pair(&settings, place, args.time())?;
        primaries.push(primary);
        secondaries.push(secondary);
    }
    let run = Figures::median(&runs);
    let row = |process: &str, rounds: &[Figures]| {
        let figures = Figures::median(rounds).with_all("peer_", run.clone());
        Row::new("idle", None, figures)
            .label("process", process)
            .label("poll", settings.poll.clone())
    };
    Ok(vec![
        row("primary", &primaries),
        row("secondary", &secondaries),
    ])
}

fn measure_run(settings: &Settings, place: &Place, time: Duration) -> Result<Figures, BenchError> {
    let dir = place.scratch()?;
    let single = Single::start(settings, dir.path())?;
    let [figures] = rest([single.process.pid()], time)?;
    Ok(figures)
}

fn measure_pair(
    settings: &Settings,
    place: &Place,
    time: Duration,
) -> Result<[Figures; 2], BenchError> {
    let dir = place.scratch()?;
    let pair = Pair::start(settings, dir.path())?;
    let figures = rest([pair.primary.pid(), pair.secondary.pid()], time)?;
    let status = pair.primary.status();
    let status = status.map_err(BenchError::io("read the primary's status"))?;
    match status["protected"] == true {
        true => Ok(figures),
        false => Err(BenchError::Unprotected(status)),
    }
}

/// Reads what these processes use in `time`.
fn rest<const N: usize>(pids: [u32; N], time: Duration) -> Result<[Figures; N], BenchError> {
    thread::sleep(SETTLE);
    let read = || -> Result<Vec<CpuTimes>, BenchError> {
        pids.iter().map(|&pid| CpuTimes::read(pid)).collect()
    };
    let (begun, before) = (Instant::now(), read()?);
    thread::sleep(time);
    let (seconds, after) = (begun.elapsed().as_secs_f64(), read()?);
    Ok(std::array::from_fn(|n| {
        figures(&after[n].since(&before[n]), seconds)
    }))
}

/// Of the process, then of its threads by name.
fn figures(used: &CpuTimes, seconds: f64) -> Figures {
    let percent = |cpu_ns: u64| cpu_ns as f64 / 1e9 / seconds * 100.0;
    let mut figures = Figures::default().with("cpu_percent", used.process_s() / seconds * 100.0);
    let mut seen: Vec<&str> = Vec::new();
    for thread in &used.0 {
        let name = thread.name.as_str();
        let of_name = || used.0.iter().filter(|other| other.name == name);
        if seen.contains(&name) {
            continue;
        }
        seen.push(name);
        let cpu_ns = of_name().map(|thread| thread.cpu_ns).sum();
        let sleeps: u64 = of_name().map(|thread| thread.sleeps).sum();
        figures = figures
            .with(format!("{name}_cpu_percent"), percent(cpu_ns))
            .with(format!("{name}_sleeps_per_s"), sleeps as f64 / seconds);
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath_cpu::ThreadTime;

    #[test]
    fn threads_of_one_name_are_one_figure() {
        let thread = |id, name: &str, cpu_ns, sleeps| ThreadTime {
            id,
            name: name.to_owned(),
            cpu_ns,
            sleeps,
        };
        let used = CpuTimes(vec![
            thread(1, "worker", 10_000_000, 4),
            thread(2, "vcpu0", 20_000_000, 6),
            thread(3, "worker", 10_000_000, 4),
        ]);
        let figures = figures(&used, 2.0);
        assert_eq!(figures.get("cpu_percent"), Some(2.0));
        assert_eq!(figures.get("worker_cpu_percent"), Some(1.0));
        assert_eq!(figures.get("worker_sleeps_per_s"), Some(4.0));
        assert_eq!(figures.get("vcpu0_sleeps_per_s"), Some(3.0));
    }
}
