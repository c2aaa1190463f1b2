//! The loads of `modes`: wrk, redis-benchmark, wrk beside requests whose answers differ, and the checked load.
//!
//! Invariants: every load is a closed loop over the same number of connections and lasts about the same time, however
//! slow the guest; one that met an error or a wrong answer gives no figure.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use colo_lab::load::{self, LoadConfig};
use colo_lab::netns::Netns;

use crate::checkpoint_client::GuestClient;
use crate::clients::{self, Measurement};
use crate::place::BenchError;

/// Requests that show how many fit into the time, for each connection and request under way.
const PROBE_REQUESTS: u32 = 10;
/// redis-benchmark's own overhead shows below that.
const REQUESTS_MIN: u32 = 500;
const SEED: u64 = 5;

/// A load.
#[derive(Debug)]
pub(crate) struct Load {
    /// On the command line.
    pub(crate) key: &'static str,
    /// In reports.
    pub(crate) name: &'static str,
    what: What,
}

#[derive(Debug)]
enum What {
    /// One page, with so many requests a second beside it that are answered differently by the two guests.
    Page { path: &'static str, diverging: u32 },
    /// One command with so many requests under way in each connection.
    Command { name: &'static str, pipeline: u32 },
    /// HTTP, RESP and echo, each answer checked, some diverging.
    Checked,
}

const fn page(key: &'static str, name: &'static str, path: &'static str, diverging: u32) -> Load {
    let what = What::Page { path, diverging };
    Load { key, name, what }
}

const fn command(
    key: &'static str,
    title: &'static str,
    name: &'static str,
    pipeline: u32,
) -> Load {
    let what = What::Command { name, pipeline };
    Load {
        key,
        name: title,
        what,
    }
}

/// All of them, in the order in which they run.
pub(crate) const LOADS: [Load; 9] = [
    page("page", "page", "/", 0),
    page("page64k", "page 64 KiB", "/bytes/65536", 0),
    command("get1", "GET -P 1", "get", 1),
    command("set1", "SET -P 1", "set", 1),
    command("get16", "GET -P 16", "get", 16),
    command("set16", "SET -P 16", "set", 16),
    page("diverging10", "page, 10 div/s", "/", 10),
    page("diverging100", "page, 100 div/s", "/", 100),
    Load {
        key: "checked",
        name: "checked",
        what: What::Checked,
    },
];

/// Where and how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoadOptions<'a> {
    pub(crate) client: &'a Netns,
    pub(crate) dir: &'a Path,
    pub(crate) connections: u32,
    pub(crate) seconds: u32,
}

impl Load {
    /// What comes before: how many requests will fit, in the case of redis-benchmark, which cannot be given a time.
    pub(crate) fn prepare(&self, options: &LoadOptions<'_>) -> Result<u32, BenchError> {
        let What::Command { name, pipeline } = self.what else {
            return Ok(0);
        };
        let requests = options.connections * pipeline * PROBE_REQUESTS;
        let found = redis(options, name, pipeline, requests)?;
        let fitting = found.per_second * f64::from(options.seconds);
        Ok((fitting as u32).max(REQUESTS_MIN))
    }

    /// Runs it, and calls `at_end` when no more requests are made; `requests` is what [`Self::prepare`] gave.
    pub(crate) fn run<T>(
        &self,
        options: &LoadOptions<'_>,
        requests: u32,
        at_end: impl FnOnce() -> Result<T, BenchError>,
    ) -> Result<(Measurement, T), BenchError> {
        let measured = match self.what {
            What::Page { path, diverging: 0 } => wrk(options, path),
            What::Page { path, diverging } => beside_divergences(options, path, diverging),
            What::Command { name, pipeline } => redis(options, name, pipeline, requests),
            What::Checked => return checked(options, at_end),
        };
        Ok((measured?, at_end()?))
    }
}

fn wrk(options: &LoadOptions<'_>, path: &str) -> Result<Measurement, BenchError> {
    let LoadOptions { client, dir, .. } = *options;
    clients::wrk_over(client, dir, path, options.connections, options.seconds)
}

fn redis(
    options: &LoadOptions<'_>,
    name: &str,
    pipeline: u32,
    requests: u32,
) -> Result<Measurement, BenchError> {
    let args = format!(
        "-t {name} -c {} -n {requests} -P {pipeline} --csv",
        options.connections
    );
    clients::redis_command(options.client, options.dir, &args)
}

/// wrk, while one more client asks for random numbers at this rate, as long as it gets them in time.
fn beside_divergences(
    options: &LoadOptions<'_>,
    path: &str,
    per_second: u32,
) -> Result<Measurement, BenchError> {
    let ended = AtomicBool::new(false);
    let period = Duration::from_secs(1) / per_second;
    let diverge = || -> std::io::Result<()> {
        let mut guest = GuestClient::connect()?;
        let mut next = Instant::now();
        while !ended.load(Ordering::Relaxed) {
            guest.diverge()?;
            next = (next + period).max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        Ok(())
    };
    let (measured, diverged) = thread::scope(|scope| {
        let other = scope.spawn(|| options.client.run(diverge));
        let measured = wrk(options, path);
        ended.store(true, Ordering::Relaxed);
        let diverged = other.join();
        (measured, diverged)
    });
    let diverged = diverged.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    diverged.map_err(BenchError::io("ask for random numbers"))?;
    measured
}

/// The load of `colo demo`; nothing may be lost or wrong. It ends with questions for all that was acknowledged, which
/// are not measured.
fn checked<T>(
    options: &LoadOptions<'_>,
    at_end: impl FnOnce() -> Result<T, BenchError>,
) -> Result<(Measurement, T), BenchError> {
    let config = LoadConfig {
        probe_period: None,
        ..LoadConfig::new(options.connections as usize, SEED)
    };
    let begun = Instant::now();
    let load = load::Load::start(options.client, config)?;
    thread::sleep(Duration::from_secs(options.seconds.into()));
    let (answers, seconds) = (load.progress().responses, begun.elapsed().as_secs_f64());
    let counted = at_end();
    let report = load.finish()?;
    if report.client_errors + report.wrong_responses > 0 {
        return Err(BenchError::Failed(format!(
            "the checked load met {} errors and {} wrong answers: {}",
            report.client_errors,
            report.wrong_responses,
            report.notes.join("; ")
        )));
    }
    let measured = Measurement {
        name: "checked".to_owned(),
        per_second: answers as f64 / seconds,
        p50_us: report.latency_us.p50 as f64,
        p99_us: report.latency_us.p99 as f64,
    };
    Ok((measured, counted?))
}
