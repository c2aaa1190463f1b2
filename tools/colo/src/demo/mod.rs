//! `colo demo`: a pair, a client that checks everything, a kill, and a report.
//!
//! Invariants: whatever was built is gone at the end, also after Ctrl-C; the exit status is 0 only when
//! nothing was lost or wrong and the pair did what the run was for.
//!
//! Does not reach into the pair: it starts this same binary as `colo primary` and `colo secondary`, reads
//! their status, and sends packets.

mod figures;
mod numbers;
mod outcome;
mod paint;
mod report;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use colo_lab::load::{Load, LoadConfig, LoadReport};
use colo_lab::pair::{Pair, PairError, Settings};
use colo_lab::process::Process;
use colo_lab::topology::{GUEST_V4, GUEST_V6, Host, Topology};
use serde_json::Value;

use crate::stop::{Stop, catch_signals};
use figures::Figures;
use outcome::Outcome;
use paint::Paint;

/// How often the demo looks at signals and, after the kill, for the takeover.
const TICK: Duration = Duration::from_millis(10);
/// How often the primary's status is read and a throughput sample is taken.
const SAMPLE: Duration = Duration::from_millis(200);

/// Options of `colo demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// How long clients make requests
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// How many connections they use
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=224))]
    clients: u64,
    /// Don't kill the primary
    #[arg(long)]
    no_failover: bool,
    /// Only make requests whose answers are the same on both guests
    #[arg(long)]
    no_divergence: bool,
    /// Write the figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave everything running afterwards, and say how to reach the guest
    #[arg(long)]
    keep: bool,
    /// Random choices of the clients follow from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Break the pair on purpose
    #[arg(long, hide = true, value_enum)]
    test_hook: Option<TestHook>,
}

/// Ways to break the pair, for tests of the demo itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TestHook {
    /// The comparator says "equal" to everything.
    AlwaysEqual,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error(transparent)]
    Pair(#[from] PairError),
    #[error(transparent)]
    Net(#[from] colo_lab::netns::NetError),
    #[error(transparent)]
    Process(#[from] colo_lab::process::ProcessError),
    #[error("{what}: {source}")]
    Io {
        what: String,
        source: std::io::Error,
    },
    #[error("interrupted")]
    Interrupted,
}

/// Runs the demo.
pub(crate) fn run(args: &DemoArgs) -> ExitCode {
    let paint = Paint::for_stdout();
    match demo(args, paint) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("\ncolo demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &DemoArgs, paint: Paint) -> Result<bool, DemoError> {
    let dir = tempfile::Builder::new()
        .prefix("colo-demo-")
        .tempdir()
        .map_err(|source| DemoError::Io {
            what: "make a scratch directory".to_owned(),
            source,
        })?;
    print!("{}", report::title(args, paint));
    let stop = catch_signals().map_err(|source| DemoError::Io {
        what: "catch signals".to_owned(),
        source,
    })?;
    let mut pair = start(args, dir.path(), paint)?;
    let outcome = drive(args, &mut pair, Watch::new(paint, args.seconds, &stop))?;
    print!("{}", report::text(&outcome, paint));
    let failures = outcome.failures();
    if !failures.is_empty() {
        show_logs(&pair, paint);
    }
    if let Some(file) = &args.json {
        let what = || format!("write {}", file.display());
        let json = figures::json(&outcome);
        std::fs::write(file, json).map_err(|source| DemoError::Io {
            what: what(),
            source,
        })?;
    }
    if args.keep {
        keep(&pair, &stop, paint);
    }
    Ok(failures.is_empty())
}

fn start(args: &DemoArgs, dir: &Path, paint: Paint) -> Result<Pair, DemoError> {
    let mut step = Step::begin("four network namespaces: client, switch, two hosts", paint);
    let topology = Topology::new()?;
    step.done();
    let own = std::env::current_exe().map_err(|source| DemoError::Io {
        what: "find this program".to_owned(),
        source,
    })?;
    let mut settings = Settings::new(own);
    settings.always_equal = args.test_hook == Some(TestHook::AlwaysEqual);
    step = Step::begin("two guests: booted, paired, protected", paint);
    let pair = Pair::start_in(topology, &settings, dir)?;
    step.done();
    Ok(pair)
}

/// Runs the load with the kill in its middle.
fn drive(args: &DemoArgs, pair: &mut Pair, mut watch: Watch) -> Result<Outcome, DemoError> {
    let mut config = LoadConfig::new(usize::try_from(args.clients).unwrap_or(1), args.seed);
    config.deterministic = args.no_divergence;
    let load = Load::start(&pair.topology.client, config)?;
    let whole = watch.whole;
    watch.begun = Instant::now();
    if args.no_failover {
        watch.until(whole, &load, pair)?;
    } else {
        watch.until(whole / 2, &load, pair)?;
        watch.read_primary(&pair.primary);
        load.mark_kill();
        pair.primary.kill()?;
        watch.killed();
        watch.until(whole, &load, pair)?;
    }
    let load = finish(load, watch.paint)?;
    let survivor = pair.process(watch.host()).status().unwrap_or(Value::Null);
    let primary = if args.no_failover {
        &survivor
    } else {
        &watch.primary
    };
    Ok(Outcome {
        load,
        figures: Figures::from_status(primary),
        survivor,
        failover: !args.no_failover,
        diverging: !args.no_divergence,
        takeover_ms: watch.takeover_ms,
        killed_at: watch.killed_at,
        samples: watch.samples,
        kill_sample: watch.kill_sample,
    })
}

fn finish(load: Load, paint: Paint) -> Result<LoadReport, DemoError> {
    let mut step = Step::begin("everything that was acknowledged, asked for again", paint);
    let report = load.finish()?;
    step.done();
    Ok(report)
}

/// Follows a load: status of the pair, throughput over time, a line on the terminal.
struct Watch<'a> {
    stop: &'a Stop,
    paint: Paint,
    begun: Instant,
    whole: Duration,
    /// The primary's last status before the kill.
    primary: Value,
    samples: Vec<u64>,
    answered: u64,
    kill_sample: Option<usize>,
    killed_at: Option<Duration>,
    takeover_ms: Option<f64>,
}

impl<'a> Watch<'a> {
    fn new(paint: Paint, seconds: u64, stop: &'a Stop) -> Self {
        Self {
            stop,
            paint,
            begun: Instant::now(),
            whole: Duration::from_secs(seconds),
            primary: Value::Null,
            samples: Vec::new(),
            answered: 0,
            kill_sample: None,
            killed_at: None,
            takeover_ms: None,
        }
    }

    /// The host that must be alive.
    fn host(&self) -> Host {
        if self.killed_at.is_none() {
            Host::A
        } else {
            Host::B
        }
    }

    fn killed(&mut self) {
        self.killed_at = Some(self.begun.elapsed());
        self.kill_sample = Some(self.samples.len());
    }

    /// Looks at the pair until `end` after the begin.
    fn until(&mut self, end: Duration, load: &Load, pair: &mut Pair) -> Result<(), DemoError> {
        while self.begun.elapsed() < end {
            let left = end.saturating_sub(self.begun.elapsed());
            thread::sleep(TICK.min(left));
            if self.stop.is_asked() {
                self.paint.clear_line();
                return Err(DemoError::Interrupted);
            }
            let process = pair.process(self.host());
            if let Some(status) = process.poll_exit()? {
                self.paint.clear_line();
                return Err(process.ended(status, "through with its work").into());
            }
            self.look_for_takeover(process);
            if self.begun.elapsed() >= SAMPLE * (self.samples.len() as u32 + 1) {
                self.sample(load, process);
            }
        }
        self.paint.clear_line();
        Ok(())
    }

    fn look_for_takeover(&mut self, survivor: &Process) {
        let Some(killed_at) = self.killed_at else {
            return;
        };
        let alone = |status: Value| status["state"] == "alone";
        if self.takeover_ms.is_none() && survivor.status().is_ok_and(alone) {
            let since = self.begun.elapsed().saturating_sub(killed_at);
            self.takeover_ms = Some(since.as_secs_f64() * 1e3);
        }
    }

    /// Keeps the last document that could be read.
    fn read_primary(&mut self, primary: &Process) {
        if let Ok(status) = primary.status() {
            self.primary = status;
        }
    }

    fn sample(&mut self, load: &Load, process: &Process) {
        let progress = load.progress();
        self.samples.push(progress.responses - self.answered);
        self.answered = progress.responses;
        if self.killed_at.is_none() {
            self.read_primary(process);
        }
        let line = report::progress(self.begun.elapsed(), self.whole, &self.samples, &progress);
        self.paint.show_line(&line);
    }
}

/// One line per thing that takes time.
struct Step {
    text: &'static str,
    paint: Paint,
    begun: Instant,
}

impl Step {
    fn begin(text: &'static str, paint: Paint) -> Self {
        paint.show_line(&format!("  … {text}"));
        Self {
            text,
            paint,
            begun: Instant::now(),
        }
    }

    fn done(&mut self) {
        self.paint.clear_line();
        let seconds = self.begun.elapsed().as_secs_f64();
        let (text, paint) = (self.text, self.paint);
        println!(
            "  {} {text:<62} {}",
            paint.good("✓"),
            paint.dim(&format!("{seconds:5.2} s"))
        );
        // Only the order of the output depends on it.
        std::io::stdout().flush().ok();
    }
}

fn show_logs(pair: &Pair, paint: Paint) {
    for process in [&pair.primary, &pair.secondary] {
        println!(
            "\n  {}",
            paint.dim(&format!("end of the log of {}:", process.name()))
        );
        for line in process.log_tail().lines() {
            println!("    {}", paint.dim(line));
        }
    }
}

fn keep(pair: &Pair, stop: &Stop, paint: Paint) {
    let client = pair.topology.client.name();
    let enter = format!("ip netns exec {client}");
    println!("  {}", paint.strong("The guest is still there"));
    println!("    {enter} curl http://{GUEST_V4}/counter");
    println!("    {enter} curl -g 'http://[{GUEST_V6}]/bytes/100'");
    println!("    {enter} redis-cli -h {GUEST_V4}");
    println!("  Ctrl-C ends it and removes the namespaces.");
    while !stop.is_asked() {
        thread::sleep(SAMPLE);
    }
}
