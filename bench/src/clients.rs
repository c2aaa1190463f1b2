//! redis-benchmark and wrk: run in the client's namespace, their reports as measurements.
//!
//! Invariants: a client that ends with an error, or reports one, gives no measurement.

use std::path::Path;
use std::time::Duration;

use colo_lab::netns::Netns;
use colo_lab::process::{Process, ProcessError};
use colo_lab::topology::GUEST_V4;
use serde::Serialize;

use crate::place::BenchError;

/// Commands that redis-benchmark measures.
const COMMANDS: &str = "ping,set,get,incr,mset,lpush,rpush,lpop";
/// Lines of its report: PING is measured inline and as an array.
const COMMAND_LINES: usize = 9;
/// Longest time for one client.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(300);

/// One line of a client's report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Measurement {
    pub(crate) name: String,
    pub(crate) per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// All commands, with so many connections, requests per command, and requests under way per
/// connection.
pub(crate) fn redis_benchmark(
    client: &Netns,
    dir: &Path,
    requests: u32,
    pipeline: u32,
) -> Result<Vec<Measurement>, BenchError> {
    let args = format!("-t {COMMANDS} -c 32 -n {requests} -P {pipeline} --csv");
    let report = run(start_redis_benchmark(client, dir, &args)?)?;
    let found = parse_redis_csv(&report);
    if found.len() != COMMAND_LINES {
        return Err(BenchError::Unreadable {
            program: "redis-benchmark",
            what: "line for each command",
            output: report,
        });
    }
    let name = |name| format!("{name} -P {pipeline}");
    let named = found.into_iter().map(|m| Measurement {
        name: name(m.name),
        ..m
    });
    Ok(named.collect())
}

/// One command, with these arguments.
pub(crate) fn redis_command(
    client: &Netns,
    dir: &Path,
    args: &str,
) -> Result<Measurement, BenchError> {
    let report = run(start_redis_benchmark(client, dir, args)?)?;
    let found = parse_redis_csv(&report).pop();
    found.ok_or(BenchError::Unreadable {
        program: "redis-benchmark",
        what: "line for the command",
        output: report,
    })
}

/// Starts it with these arguments; it ends with the value.
pub(crate) fn start_redis_benchmark(
    client: &Netns,
    dir: &Path,
    args: &str,
) -> Result<Process, ProcessError> {
    let mut command = client.command("redis-benchmark");
    let host = GUEST_V4.to_string();
    command.args(["-h", &host]).args(args.split_whitespace());
    Process::spawn("redis-benchmark", command, dir)
}

/// One page over 16 connections.
pub(crate) fn wrk(
    client: &Netns,
    dir: &Path,
    path: &str,
    seconds: u32,
) -> Result<Measurement, BenchError> {
    wrk_over(client, dir, path, 16, seconds)
}

/// One page over so many connections.
pub(crate) fn wrk_over(
    client: &Netns,
    dir: &Path,
    path: &str,
    connections: u32,
    seconds: u32,
) -> Result<Measurement, BenchError> {
    let mut command = client.command("wrk");
    let args =
        format!("-t1 -c{connections} -d{seconds} --latency --timeout 10s http://{GUEST_V4}{path}");
    command.args(args.split_whitespace());
    let report = run(Process::spawn("wrk", command, dir)?)?;
    let found = parse_wrk(&report).ok_or(BenchError::Unreadable {
        program: "wrk",
        what: "clean result",
        output: report,
    })?;
    let name = format!("GET {path}");
    Ok(Measurement { name, ..found })
}

fn run(mut client: Process) -> Result<String, BenchError> {
    let status = client.wait_exit(CLIENT_TIMEOUT)?;
    if status.success() {
        Ok(client.log())
    } else {
        Err(client.ended(status, "through with its work").into())
    }
}

/// Lines of `redis-benchmark --csv`: name, requests a second, then latencies in milliseconds (average,
/// minimum, p50, p95, p99, maximum). Other lines are passed over.
fn parse_redis_csv(report: &str) -> Vec<Measurement> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split("\",\"").map(|f| f.trim_matches('"')).collect();
        let number = |index: usize| fields.get(index)?.parse::<f64>().ok();
        Some(Measurement {
            name: fields[0].to_owned(),
            per_second: number(1)?,
            p50_us: number(4)? * 1e3,
            p99_us: number(6)? * 1e3,
        })
    };
    report
        .lines()
        .filter_map(|text| line(text.trim()))
        .collect()
}

/// The report of `wrk --latency`; nothing if it counted errors.
fn parse_wrk(report: &str) -> Option<Measurement> {
    if ["Socket errors", "Non-2xx"]
        .iter()
        .any(|complaint| report.contains(complaint))
    {
        return None;
    }
    let after = |label: &str| {
        let mut lines = report.lines();
        lines.find_map(|line| line.trim().strip_prefix(label).map(str::trim))
    };
    Some(Measurement {
        name: String::new(),
        per_second: after("Requests/sec:")?.parse().ok()?,
        p50_us: wrk_time_us(after("50%")?)?,
        p99_us: wrk_time_us(after("99%")?)?,
    })
}

/// `12.34us`, `1.23ms`, `1.02s` or `1.00m`.
fn wrk_time_us(text: &str) -> Option<f64> {
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let factor = match &text[split..] {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        "m" => 60e6,
        _ => return None,
    };
    Some(text[..split].parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CSV: &str = "\
WARNING: Could not fetch server CONFIG
\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\
\"p99_latency_ms\",\"max_latency_ms\"
\"PING_INLINE\",\"52631.58\",\"0.310\",\"0.088\",\"0.303\",\"0.487\",\"0.695\",\"1.479\"
\"MSET (10 keys)\",\"10000.00\",\"2.5\",\"1\",\"2\",\"3\",\"4.5\",\"5\"
\"LPOP\",\"52631.58\",\"0.310\"
";

    const WRK: &str = "\
Running 5s test @ http://10.77.0.10/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   430.12us  99.00us   3.21ms   88.10%
    Req/Sec    36.54k     1.20k   38.00k    70.00%
  Latency Distribution
     50%  412.00us
     75%  466.00us
     90%  530.00us
     99%    1.25ms
  181818 requests in 5.00s, 30.00MB read
Requests/sec:  36363.60
Transfer/sec:      6.00MB
";

    #[test]
    fn redis_lines_are_read_by_their_columns_and_others_passed_over() {
        let found = parse_redis_csv(CSV);
        let measurement = |name: &str, per_second, p50_us, p99_us| Measurement {
            name: name.to_owned(),
            per_second,
            p50_us,
            p99_us,
        };
        assert_eq!(
            found,
            [
                measurement("PING_INLINE", 52_631.58, 303.0, 695.0),
                measurement("MSET (10 keys)", 10_000.0, 2_000.0, 4_500.0),
            ]
        );
        assert!(parse_redis_csv("").is_empty());
    }

    #[test]
    fn a_wrk_report_gives_rate_and_percentiles() {
        let found = parse_wrk(WRK).unwrap();
        let numbers = (found.per_second, found.p50_us, found.p99_us);
        assert_eq!(numbers, (36_363.6, 412.0, 1_250.0));
    }

    #[test]
    fn a_wrk_report_with_errors_or_without_a_part_gives_nothing() {
        for complaint in [
            "  Socket errors: connect 0, read 1",
            "  Non-2xx or 3xx responses: 2",
        ] {
            assert_eq!(parse_wrk(&format!("{WRK}{complaint}\n")), None);
        }
        for part in ["Requests/sec", "50%", "99%", "1.25ms"] {
            assert_eq!(parse_wrk(&WRK.replace(part, "")), None, "{part}");
        }
    }

    #[test]
    fn wrk_times_have_four_units() {
        let read = ["7us", "1.5ms", "2.00s", "1m", "3h", "ms", ""].map(wrk_time_us);
        let expected = [
            Some(7.0),
            Some(1_500.0),
            Some(2e6),
            Some(60e6),
            None,
            None,
            None,
        ];
        assert_eq!(read, expected);
    }
}
