//! What a checkpoint costs, for several amounts of dirty memory of which several shares are the same on both guests,
//! beside a plain memcpy of as many pages and bare streams over the same link; if asked for, also when the guest has
//! left the memory alone for a while, so that pages have travelled ahead of the checkpoint.
//!
//! Invariants: each row meets a fresh pair and counts the checkpoints it asked for, one at a time; the memcpy runs in
//! this process when the pair is gone, the bare streams before it comes.
//!
//! Does not measure what the secondary does behind the commit.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Args;
use colo_lab::pair::{Pair, Settings};
use serde::Serialize;
use serde_json::{Value, json};

use crate::checkpoint_aims::{Aims, Measured};
use crate::checkpoint_client::GuestClient;
use crate::checkpoint_link::RawLink;
use crate::figures::{Range, percentile, table};
use crate::place::{BenchError, Outcome, Place};
use crate::transfer::Way;

const PAGE_BYTES: usize = 4096;
const MIB: usize = 1 << 20;
/// How often the memcpy is repeated; its median counts.
const COPIES: usize = 31;
/// Time until the status tells of a checkpoint whose output has left.
const STATUS_MAX: Duration = Duration::from_secs(10);
/// Both guests write a large set in their own time: that must not count as a divergence.
const DEADLINE_MS: u64 = 5_000;

/// Options of `checkpoint`.
#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// How many checkpoints are measured for each row
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// How many pages the guests dirty before each
    #[arg(long, value_delimiter = ',', default_value = "100,1000,10000,100000",
        value_parser = clap::value_parser!(u32).range(1..=2_000_000))]
    pages: Vec<u32>,
    /// How many of a hundred pages are the same on both guests
    #[arg(long, value_delimiter = ',', default_value = "0,50,75,95",
        value_parser = clap::value_parser!(u32).range(0..=100))]
    same: Vec<u32>,
    /// How long the memory is left alone before each
    #[arg(long, value_delimiter = ',', default_value = "0",
        value_parser = clap::value_parser!(u32).range(0..=60_000))]
    rest_ms: Vec<u32>,
    /// Measures the bare streams once more while the pair is up and idle: with its program for packets on the link
    #[arg(long)]
    in_use: bool,
    /// Further lines for both configuration files
    #[arg(long, default_value = "")]
    extra: String,
}

/// One number of pages with one share and one rest.
#[derive(Debug, Serialize)]
struct Row {
    pages: u32,
    same_pct: u32,
    rest_ms: u32,
    pause_us_p50: f64,
    pause_us_p99: f64,
    stolen_us_p50: f64,
    hold_us_p50: f64,
    commit_us_p50: f64,
    /// Median of the bytes on the page channel, those of the digests that came the other way included.
    bytes_sent: f64,
    /// Median of the latter alone.
    digest_bytes: f64,
    /// Median of the bytes that had travelled ahead, which are not among those.
    ahead_bytes: f64,
    /// Median of the sums of both, by that of the dirty bytes.
    sent_of_dirty: f64,
    /// Median of the pages that the pause captured: the dirty ones without those that had.
    captured_pages: f64,
    /// Of as many pages as that, the median.
    memcpy_us: f64,
    /// The transfer's rate, the median.
    link_bytes_per_s: f64,
    /// The better bare stream's over the same link: iperf3's, or that of io_uring's best way.
    raw_link_bytes_per_s: f64,
    raw_iperf3_bytes_per_s: f64,
    raw_uring_bytes_per_s: f64,
    raw_uring_way: Way,
    /// Of bursts of as many bytes as the pages have, by a bare io_uring after a rest.
    raw_burst_bytes_per_s: f64,
    /// The better bare stream's while the pair is up and idle, if that was asked for.
    in_use_link_bytes_per_s: Option<f64>,
    /// And that of bursts.
    in_use_burst_bytes_per_s: Option<f64>,
    aims: Aims,
    /// The figures that these judge.
    #[serde(skip)]
    measured: Measured,
    /// What each checkpoint tells of itself.
    checkpoints: Vec<Value>,
}

/// Runs the benchmark.
pub(crate) fn run(args: &CheckpointArgs, place: &Place) -> Result<Outcome, BenchError> {
    let mut rows = Vec::new();
    for &pages in &args.pages {
        for &same_pct in &args.same {
            for &rest_ms in &args.rest_ms {
                eprintln!("{pages} pages, {same_pct} % the same, {rest_ms} ms of rest");
                let set = Set {
                    pages,
                    same_pct,
                    rest_ms,
                };
                rows.push(measure(args, place, set)?);
            }
        }
    }
    Ok(Outcome {
        text: text(&rows),
        json: json!(rows),
        clean: true,
    })
}

/// What the guest writes before a checkpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Set {
    pub(crate) pages: u32,
    pub(crate) same_pct: u32,
    pub(crate) rest_ms: u32,
}

fn measure(args: &CheckpointArgs, place: &Place, set: Set) -> Result<Row, BenchError> {
    let dir = place.scratch()?;
    let settings = settings(args, place, set.pages);
    let topology = settings
        .topology()
        .map_err(colo_lab::pair::PairError::from)?;
    let burst_bytes = set.pages as usize * PAGE_BYTES;
    let raw = RawLink::measure(&topology, dir.path(), burst_bytes)?;
    let mut pair = Pair::start_in(topology, &settings, dir.path())?;
    let in_use = || RawLink::measure(&pair.topology, dir.path(), burst_bytes);
    let in_use = args.in_use.then(in_use).transpose()?;
    let (checkpoints, holds) = checkpoints(args.count, &mut pair, set)?;
    drop(pair);
    let of = |key: &str| {
        checkpoints
            .iter()
            .map(move |c| number(c, key))
            .collect::<Vec<_>>()
    };
    let median = |key: &str| percentile(of(key), 50);
    let rates = checkpoints.iter().filter_map(|checkpoint| {
        let us = number(checkpoint, "transfer_us");
        (us > 0.0).then(|| number(checkpoint, "sent_bytes") / us * 1e6)
    });
    let captured = checkpoints
        .iter()
        .map(|c| number(c, "dirty_pages") - number(c, "ahead_pages"));
    let captured_pages = percentile(captured, 50);
    let ram_bytes = settings.ram_mib as usize * MIB;
    let (link_bytes_per_s, raw_link_bytes_per_s) = (percentile(rates, 50), raw.best_bytes_per_s());
    let measured = Measured {
        same_pct: set.same_pct,
        memcpy_us: memcpy_us(captured_pages as usize, ram_bytes).median,
        pause_us: median("pause_us"),
        stolen_us: median("stolen_us"),
        sent_of_dirty: sent_of_dirty(&checkpoints),
        link_of_raw: link_bytes_per_s / raw_link_bytes_per_s,
        link_of_burst: link_bytes_per_s / raw.burst_bytes_per_s,
    };
    Ok(Row {
        pages: set.pages,
        same_pct: set.same_pct,
        rest_ms: set.rest_ms,
        pause_us_p50: measured.pause_us,
        pause_us_p99: percentile(of("pause_us"), 99),
        stolen_us_p50: measured.stolen_us,
        hold_us_p50: percentile(holds, 50),
        commit_us_p50: median("commit_us"),
        bytes_sent: percentile(checkpoints.iter().map(channel_bytes), 50),
        digest_bytes: median("digest_bytes"),
        ahead_bytes: percentile(checkpoints.iter().map(ahead_bytes), 50),
        sent_of_dirty: measured.sent_of_dirty,
        captured_pages,
        memcpy_us: measured.memcpy_us,
        link_bytes_per_s,
        raw_link_bytes_per_s,
        raw_iperf3_bytes_per_s: raw.iperf3_bytes_per_s,
        raw_uring_bytes_per_s: raw.uring_bytes_per_s,
        raw_uring_way: raw.uring_way,
        raw_burst_bytes_per_s: raw.burst_bytes_per_s,
        in_use_link_bytes_per_s: in_use.map(|link| link.best_bytes_per_s()),
        in_use_burst_bytes_per_s: in_use.map(|link| link.burst_bytes_per_s),
        aims: Aims::of(&measured),
        measured,
        checkpoints,
    })
}

fn settings(args: &CheckpointArgs, place: &Place, pages: u32) -> Settings {
    let mut settings = place.settings();
    // The demo guest gives written pages somewhat less than half of its memory.
    let mib = pages.div_ceil(256) as f64;
    settings.ram_mib = ((mib + 38.0) * 2.4) as u32 + 64;
    settings.compare_deadline_ms = DEADLINE_MS;
    settings.primary_extra = args.extra.clone();
    settings.secondary_extra = args.extra.clone();
    settings
}

/// Has checkpoints taken, one after the other. Gives what each tells of itself, and how long its output was held as
/// the client sees it, in microseconds. The first one, in which the guest first touches the memory, is left out.
pub(crate) fn checkpoints(
    count: u32,
    pair: &mut Pair,
    set: Set,
) -> Result<(Vec<Value>, Vec<f64>), BenchError> {
    let failed = |what: &str| BenchError::io(what.to_owned());
    let client = &pair.topology.client;
    let connected = client
        .run(GuestClient::connect)
        .map_err(colo_lab::pair::PairError::from)?;
    let mut guest = connected.map_err(failed("connect to the guest"))?;
    let (mut all, mut holds) = (Vec::new(), Vec::new());
    for round in 0..=count {
        guest
            .dirty(set.pages, set.same_pct)
            .map_err(failed("dirty memory"))?;
        std::thread::sleep(Duration::from_millis(set.rest_ms.into()));
        let before = taken(&pair.primary.status().map_err(failed("read the status"))?);
        let held = guest.diverge().map_err(failed("get a random number"))?;
        let told = |status: &Value| {
            taken(status) > before && status["last_checkpoint"]["commit_us"].is_u64()
        };
        let status = pair
            .primary
            .wait_status("through with its checkpoint", STATUS_MAX, told)?;
        if status["protected"] != true {
            return Err(BenchError::Unprotected(status));
        }
        if round > 0 {
            all.push(status["last_checkpoint"].clone());
            holds.push(held.as_secs_f64() * 1e6);
        }
    }
    Ok((all, holds))
}

fn taken(status: &Value) -> u64 {
    status["checkpoints"].as_u64().unwrap_or(0)
}

fn number(checkpoint: &Value, key: &str) -> f64 {
    checkpoint[key].as_f64().unwrap_or(0.0)
}

/// What a checkpoint took of the page channel, both ways.
fn channel_bytes(checkpoint: &Value) -> f64 {
    number(checkpoint, "sent_bytes") + number(checkpoint, "digest_bytes")
}

/// What had gone before it.
fn ahead_bytes(checkpoint: &Value) -> f64 {
    number(&checkpoint["ahead"], "sent_bytes")
}

fn dirty_bytes(checkpoint: &Value) -> f64 {
    number(checkpoint, "dirty_pages") * PAGE_BYTES as f64
}

/// All that travelled because of these checkpoints, by what was dirty.
fn sent_of_dirty(checkpoints: &[Value]) -> f64 {
    let all = checkpoints
        .iter()
        .map(|c| channel_bytes(c) + ahead_bytes(c));
    let dirty = percentile(checkpoints.iter().map(dirty_bytes), 50);
    percentile(all, 50) / dirty.max(PAGE_BYTES as f64)
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

fn text(rows: &[Row]) -> String {
    format!(
        "\nCheckpoints on divergence, one at a time; medians. Raw is the better of iperf3 and io_uring.\n\n{}\n\
         Aims. The limit of pause and stolen time is 2 x memcpy + 300 us; what went ahead counts as sent.\n\n{}\n\
         Steps of these on the primary, us; choosing is what is left of the transfer. again: pages copied early and written \
         again before the pause.\n\n{}",
        table(&figures(rows)),
        table(&aims(rows)),
        table(&steps(rows)),
    )
}

/// What was measured.
fn figures(rows: &[Row]) -> Vec<Vec<String>> {
    let header = [
        "pages",
        "same %",
        "rest ms",
        "dirty",
        "captured",
        "pause p50/p99 us",
        "stolen us",
        "memcpy us",
        "hold us",
        "commit us",
        "ahead MB",
        "sent MB",
        "of dirty",
        "link MB/s",
        "iperf3 MB/s",
        "io_uring MB/s",
        "of raw",
        "burst MB/s",
        "in use MB/s, burst",
    ];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        let dirty = percentile(row.checkpoints.iter().map(dirty_bytes), 50);
        let megabytes = |bytes: f64| format!("{:.1}", bytes / 1e6);
        let of_raw = row.measured.link_of_raw * 100.0;
        let in_use = row
            .in_use_link_bytes_per_s
            .zip(row.in_use_burst_bytes_per_s);
        let in_use = in_use.map_or("-".to_owned(), |(stream, burst)| {
            format!("{}, {}", megabytes(stream), megabytes(burst))
        });
        cells.push(vec![
            row.pages.to_string(),
            row.same_pct.to_string(),
            row.rest_ms.to_string(),
            format!("{:.0}", dirty / PAGE_BYTES as f64),
            format!("{:.0}", row.captured_pages),
            format!("{:.0}/{:.0}", row.pause_us_p50, row.pause_us_p99),
            format!("{:.0}", row.stolen_us_p50),
            format!("{:.0}", row.memcpy_us),
            format!("{:.0}", row.hold_us_p50),
            format!("{:.0}", row.commit_us_p50),
            megabytes(row.ahead_bytes),
            megabytes(row.bytes_sent),
            format!("{:.3}", row.sent_of_dirty),
            megabytes(row.link_bytes_per_s),
            megabytes(row.raw_iperf3_bytes_per_s),
            megabytes(row.raw_uring_bytes_per_s),
            format!("{of_raw:.0} %"),
            megabytes(row.raw_burst_bytes_per_s),
            in_use,
        ]);
    }
    cells
}

/// What of it there are aims for.
fn aims(rows: &[Row]) -> Vec<Vec<String>> {
    let set = ["pages", "same %", "rest ms"].map(str::to_owned);
    let mut cells = vec![set.into_iter().chain(Aims::header()).collect::<Vec<_>>()];
    for row in rows {
        let set = [row.pages, row.same_pct, row.rest_ms].map(|number| number.to_string());
        let told = row.aims.cells(&row.measured);
        cells.push(set.into_iter().chain(told).collect());
    }
    cells
}

/// Where the time goes.
fn steps(rows: &[Row]) -> Vec<Vec<String>> {
    let keys = [
        ("svm stop", "svm_stop_us"),
        ("early", "early_us"),
        ("quiesce", "quiesce_us"),
        ("state", "state_us"),
        ("collect", "collect_us"),
        ("stabilise", "stabilise_us"),
        ("resume", "resume_us"),
        ("begin", "begin_us"),
        ("hand over", "hand_over_us"),
        ("digest wait", "digest_wait_us"),
        ("transfer", "transfer_us"),
        ("commit", "commit_us"),
        ("again", "again_pages"),
    ];
    let mut header = vec!["pages".to_owned(), "same %".to_owned()];
    header.extend(keys.map(|(name, _)| name.to_owned()));
    header.push("choose".to_owned());
    let mut cells = vec![header];
    for row in rows {
        let mut line = vec![row.pages.to_string(), row.same_pct.to_string()];
        let median = |figure: &dyn Fn(&Value) -> f64| {
            let figures = row.checkpoints.iter().map(figure);
            format!("{:.0}", percentile(figures, 50))
        };
        line.extend(keys.map(|(_, key)| median(&|checkpoint| number(checkpoint, key))));
        line.push(median(&choosing_us));
        cells.push(line);
    }
    cells
}

/// What a transfer took besides calls of the kernel and waiting: how each page travels.
fn choosing_us(checkpoint: &Value) -> f64 {
    let parts = ["begin_us", "hand_over_us", "digest_wait_us"];
    let parts: f64 = parts.map(|key| number(checkpoint, key)).iter().sum();
    number(checkpoint, "transfer_us") - parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_count_as_bytes_of_their_checkpoint() {
        let checkpoint = json!({"sent_bytes": 1000, "digest_bytes": 160});
        assert_eq!(channel_bytes(&checkpoint), 1160.0);
    }

    #[test]
    fn what_went_ahead_of_a_checkpoint_was_sent_for_it() {
        let checkpoint = json!({
            "sent_bytes": 4000, "digest_bytes": 96, "dirty_pages": 8, "ahead": {"sent_bytes": 4096}
        });
        assert_eq!(ahead_bytes(&checkpoint), 4096.0);
        assert_eq!(sent_of_dirty(&[checkpoint]), 0.25);
        assert_eq!(sent_of_dirty(&[]), 0.0);
    }

    #[test]
    fn choosing_is_what_is_left_of_a_transfer() {
        let checkpoint = json!({
            "transfer_us": 100, "begin_us": 20, "hand_over_us": 30, "digest_wait_us": 5, "quiesce_us": 7
        });
        assert_eq!(choosing_us(&checkpoint), 45.0);
    }

    #[test]
    fn a_memcpy_takes_time_whatever_the_number_of_pages() {
        for pages in [0, 1, 100, 256, 1000] {
            let range = memcpy_us(pages, MIB);
            assert!(range.min > 0.0 && range.min <= range.median && range.median <= range.max);
        }
    }
}
