//! What it takes to know which pages a guest has written, by KVM's dirty bitmap and by its dirty ring, for guests with little
//! and with much memory: reading the log while the guest stands still, and what logging costs the guest while it runs.
//!
//! Invariants: each mechanism meets the same guest, which writes one page after the other; a log is read twice in each
//! pause, so that the second reading finds what a checkpoint that has copied its pages early finds, a few pages.
//!
//! Does not have a pair: `sync` shows the whole pause of one.

use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use colo_vmm::checkpoint::pages::PageBitmap;
use serde::Serialize;
use serde_json::json;

use crate::figures::{Range, table};
use crate::place::{BenchError, Outcome};
use crate::stabilise_guest::{Guest, failed};

/// What a guest writes while pages are copied: what is left to the pause.
const LATE_PAGES: u64 = 10;
/// Fewer than these are written before anybody has looked.
const TIMED_PAGES_MIN: u64 = 10_000;

/// What KVM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tracking {
    /// As the machine chooses.
    Auto,
    /// The bitmap.
    Bitmap,
    /// The ring.
    Ring,
}

impl Tracking {
    /// As the configuration has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Bitmap => "bitmap",
            Self::Ring => "ring",
        }
    }
}

/// Options of `tracking`.
#[derive(Debug, Args)]
pub(crate) struct TrackingArgs {
    /// Sizes of the guests
    #[arg(long, value_delimiter = ',', default_value = "512,1024,2048,4096,12288",
        value_parser = clap::value_parser!(u64).range(512..=1_048_576))]
    ram_mib: Vec<u64>,
    /// How many pages the guest writes between two readings
    #[arg(long, value_delimiter = ',', default_value = "100,10000,100000",
        value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pages: Vec<u64>,
    /// What logs them
    #[arg(long, value_delimiter = ',', default_value = "bitmap,ring")]
    tracking: Vec<Tracking>,
    /// How often each is measured
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repeat: u32,
}

/// One mechanism, one size of memory, one number of pages.
#[derive(Debug, Serialize)]
struct Row {
    ram_mib: u64,
    tracking: Tracking,
    /// What it turned out to be.
    mechanism: String,
    pages: u64,
    /// Reading a log that has them all.
    collect_us: Range,
    /// A log that has a few.
    late_us: Range,
    /// What each page takes the guest that it writes after the log was read, beside that without logging.
    write_ns: Option<Range>,
    plain_write_ns: Option<Range>,
    /// Times that the guest stopped for a full ring, for each time that it wrote all pages.
    ring_full: f64,
}

/// Runs the benchmark.
pub(crate) fn run(args: &TrackingArgs) -> Result<Outcome, BenchError> {
    let mut rows = Vec::new();
    for &ram_mib in &args.ram_mib {
        for &tracking in &args.tracking {
            let guest = Guest::start(ram_mib, tracking.name())?;
            for &pages in &args.pages {
                eprintln!("{ram_mib} MiB, {}, {pages} pages", tracking.name());
                rows.push(measure(args.repeat, &guest, (ram_mib, tracking), pages)?);
            }
        }
    }
    Ok(Outcome {
        text: text(&rows),
        json: json!(rows),
        clean: true,
    })
}

fn measure(
    repeat: u32,
    guest: &Guest,
    (ram_mib, tracking): (u64, Tracking),
    pages: u64,
) -> Result<Row, BenchError> {
    let machine = &guest.machine;
    let mut set = PageBitmap::new(machine.ram().page_count());
    let log = |on| {
        let switched = machine.set_dirty_logging(on);
        switched.map_err(|e| failed("be logged", e))
    };
    let mut plain = Vec::new();
    guest.aim(pages, 0)?;
    for _ in 0..repeat {
        plain.push(write_ns(guest, pages)?);
    }
    log(true)?;
    let (mut full, mut late, mut write) = (Vec::new(), Vec::new(), Vec::new());
    let mut stops = 0;
    // The first round is the first after logging began.
    for round in 0..=repeat {
        guest.pause()?;
        take(guest, &mut set)?;
        guest.aim(pages, 0)?;
        let before = machine.dirty_stats().ring_full;
        guest.run()?;
        let ns = write_ns(guest, pages)?;
        stops += machine.dirty_stats().ring_full - before;
        guest.pause()?;
        let all_us = take(guest, &mut set)?;
        // It looks at its orders when it has been through those before.
        guest.aim(LATE_PAGES.min(pages), 0)?;
        guest.run()?;
        guest.wait_rounds(2)?;
        guest.pause()?;
        take(guest, &mut set)?;
        guest.run()?;
        guest.wait_rounds(2)?;
        guest.pause()?;
        let late_us = take(guest, &mut set)?;
        guest.run()?;
        if round > 0 {
            write.push(ns);
            full.push(all_us);
            late.push(late_us);
        }
    }
    log(false)?;
    Ok(Row {
        ram_mib,
        tracking,
        mechanism: format!("{:?}", machine.dirty_stats().mechanism).to_lowercase(),
        pages,
        collect_us: Range::of(full),
        late_us: Range::of(late),
        write_ns: (pages >= TIMED_PAGES_MIN).then(|| Range::of(write)),
        plain_write_ns: (pages >= TIMED_PAGES_MIN).then(|| Range::of(plain)),
        ring_full: stops as f64 / f64::from(repeat + 1),
    })
}

/// Of a page, while the guest goes through all of them once.
fn write_ns(guest: &Guest, pages: u64) -> Result<f64, BenchError> {
    let (begun, before) = (Instant::now(), guest.written()?);
    guest.wait_written(before + pages)?;
    Ok(nanoseconds(begun.elapsed()) / pages as f64)
}

fn take(guest: &Guest, set: &mut PageBitmap) -> Result<f64, BenchError> {
    set.clear();
    let begun = Instant::now();
    let taken = guest.machine.take_dirty(set);
    let us = nanoseconds(begun.elapsed()) / 1e3;
    taken.map_err(|e| failed("be logged", e))?;
    Ok(us)
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

fn median(range: Option<Range>) -> String {
    range.map_or_else(String::new, |range| format!("{:.0}", range.median))
}

fn text(rows: &[Row]) -> String {
    let header = [
        "RAM MiB",
        "log",
        "pages",
        "collect us",
        "max",
        "late us",
        "max",
        "write ns/page",
        "without",
        "ring full",
    ];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        cells.push(vec![
            row.ram_mib.to_string(),
            row.mechanism.clone(),
            row.pages.to_string(),
            format!("{:.1}", row.collect_us.median),
            format!("{:.1}", row.collect_us.max),
            format!("{:.1}", row.late_us.median),
            format!("{:.1}", row.late_us.max),
            median(row.write_ns),
            median(row.plain_write_ns),
            format!("{:.1}", row.ring_full),
        ]);
    }
    format!(
        "\nReading the log while the guest stands still (late: {LATE_PAGES} pages, as after a copy before the pause), and what \
         each page takes the guest; medians.\n\n{}",
        table(&cells)
    )
}
