//! How long a checkpoint stops the guest, for several amounts of dirty memory, beside a plain memcpy of as
//! many pages.
//!
//! Invariants: each amount meets a fresh pair, since its distributions count from pairing on; the memcpy
//! runs in this process when the pair is gone.
//!
//! Does not measure the transfer apart from the commit, nor the final apply on the secondary.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Args;
use colo_lab::pair::Pair;
use serde::Serialize;
use serde_json::{Value, json};

use crate::clients::start_redis_benchmark;
use crate::figures::{Range, table};
use crate::place::{BenchError, Outcome, Place};

const PAGE_BYTES: usize = 4096;
const MIB: usize = 1 << 20;
/// How often the memcpy is repeated; its median counts.
const COPIES: usize = 31;
/// Time for each checkpoint, besides the interval, after which the benchmark gives up.
const CHECKPOINT_MAX: Duration = Duration::from_millis(500);

/// Options of `checkpoint`.
#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// How many checkpoints are measured for each number of keys
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    count: u64,
    /// Time between checkpoints
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    interval_ms: u64,
    /// How many keys the load sets; 0 for a guest without load
    #[arg(long, value_delimiter = ',', default_value = "0,100,1000,10000")]
    keys: Vec<u32>,
    /// Size of each value
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    value_bytes: u32,
}

/// One number of keys.
#[derive(Debug, Serialize)]
struct Row {
    keys: u32,
    /// Of as many pages as the median checkpoint had.
    memcpy_us: Range,
    /// The primary's.
    status: Value,
}

impl Row {
    fn number(&self, key: &str, part: &str) -> u64 {
        self.status[key][part].as_u64().unwrap_or(0)
    }

    fn spread(&self, key: &str) -> String {
        let [p50, p99, max] = ["p50", "p99", "max"].map(|part| self.number(key, part));
        format!("{p50}/{p99}/{max}")
    }

    /// How many times the median of the memcpy the median of something takes; a dash where the memcpy is
    /// too short to tell.
    fn ratio(&self, key: &str) -> String {
        if self.memcpy_us.median < 1.0 {
            return "-".to_owned();
        }
        let ratio = self.number(key, "p50") as f64 / self.memcpy_us.median;
        format!("{ratio:.1}")
    }
}

/// Runs the benchmark.
pub(crate) fn run(args: &CheckpointArgs, place: &Place) -> Result<Outcome, BenchError> {
    let mut rows = Vec::new();
    for &keys in &args.keys {
        eprintln!("{keys} keys");
        rows.push(measure(args, place, keys)?);
    }
    Ok(Outcome {
        text: text(&rows, args),
        json: json!({
            "benchmark": "checkpoint", "interval_ms": args.interval_ms,
            "value_bytes": args.value_bytes, "rows": rows,
        }),
        clean: true,
    })
}

fn measure(args: &CheckpointArgs, place: &Place, keys: u32) -> Result<Row, BenchError> {
    let dir = place.scratch()?;
    let mut settings = place.settings();
    settings.checkpoint_interval_ms = args.interval_ms;
    let mut pair = Pair::start(&settings, dir.path())?;
    let load_args = format!(
        "-t set -r {keys} -d {} -c 16 -P 16 -n 1000000000 --csv",
        args.value_bytes
    );
    let load = match keys {
        0 => None,
        _ => Some(start_redis_benchmark(
            &pair.topology.client,
            dir.path(),
            &load_args,
        )?),
    };
    let each = Duration::from_millis(args.interval_ms) + CHECKPOINT_MAX;
    let timeout = each * u32::try_from(args.count).unwrap_or(u32::MAX);
    let enough = |status: &Value| status["checkpoints"].as_u64() >= Some(args.count);
    let status = pair
        .primary
        .wait_status("through with its checkpoints", timeout, enough)?;
    if let Some(mut load) = load
        && let Some(ended) = load.poll_exit()?
    {
        return Err(load.ended(ended, "to be stopped").into());
    }
    if status["protected"] != true {
        return Err(BenchError::Unprotected(status));
    }
    drop(pair);
    let pages = status["dirty_pages"]["p50"].as_u64().unwrap_or(0);
    let ram_bytes = settings.ram_mib as usize * MIB;
    Ok(Row {
        keys,
        memcpy_us: memcpy_us(usize::try_from(pages).unwrap_or(0), ram_bytes),
        status,
    })
}

/// Copies pages spread evenly over memory as large as the guest's into a buffer; both are as warm as
/// the caches allow, so this is the best case.
fn memcpy_us(pages: usize, ram_bytes: usize) -> Range {
    let ram_pages = ram_bytes / PAGE_BYTES;
    let pages = pages.clamp(1, ram_pages);
    let source = vec![1_u8; ram_pages * PAGE_BYTES];
    let mut copy = vec![2_u8; pages * PAGE_BYTES];
    let stride = ram_pages / pages;
    let once = |_| {
        let begun = Instant::now();
        for (index, to) in copy.chunks_exact_mut(PAGE_BYTES).enumerate() {
            let from = index * stride * PAGE_BYTES;
            to.copy_from_slice(&source[from..from + PAGE_BYTES]);
        }
        black_box(&mut copy);
        begun.elapsed().as_secs_f64() * 1e6
    };
    Range::of((0..COPIES).map(once))
}

fn text(rows: &[Row], args: &CheckpointArgs) -> String {
    let header = [
        "keys",
        "count",
        "dirty pages",
        "pause us",
        "commit us",
        "hold us",
        "quiesce",
        "state",
        "copy",
        "memcpy us",
        "pause/memcpy",
        "copy/memcpy",
    ];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        let p50 = |key| row.number(key, "p50").to_string();
        cells.push(vec![
            row.keys.to_string(),
            row.status["checkpoints"].to_string(),
            row.spread("dirty_pages"),
            row.spread("checkpoint_pause_us"),
            row.spread("commit_us"),
            row.spread("hold_us"),
            p50("quiesce_us"),
            p50("state_us"),
            p50("copy_us"),
            format!("{:.1}", row.memcpy_us.median),
            row.ratio("checkpoint_pause_us"),
            row.ratio("copy_us"),
        ]);
    }
    format!(
        "\nA checkpoint every {} ms while values of {} bytes are set; p50/p99/max or p50, in us.\n\n{}",
        args.interval_ms,
        args.value_bytes,
        table(&cells),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memcpy_takes_time_whatever_the_number_of_pages() {
        for pages in [0, 1, 100, 256, 1000] {
            let range = memcpy_us(pages, MIB);
            assert!(range.min > 0.0 && range.min <= range.median && range.median <= range.max);
        }
    }

    #[test]
    fn ratios_are_those_of_the_medians() {
        let mut row = Row {
            keys: 1,
            memcpy_us: Range {
                median: 20.0,
                ..Range::default()
            },
            status: json!({"copy_us": {"p50": 50, "p99": 60, "max": 70}}),
        };
        assert_eq!(row.spread("copy_us"), "50/60/70");
        assert_eq!(
            (row.ratio("copy_us").as_str(), row.ratio("x").as_str()),
            ("2.5", "0.0")
        );
        row.memcpy_us.median = 0.1;
        assert_eq!(row.ratio("copy_us"), "-");
    }
}
