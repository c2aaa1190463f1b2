//! What it takes from a guest to keep its dirty pages as they are while it runs on: copied, write-protected, or both,
//! beside a plain memcpy of as many pages; and what it takes to collect the dirty set, by bitmap and by ring.
//!
//! Invariants: all mechanisms meet the same guest, one after the other in each repetition; what is read is consumed as
//! a sender would, by one pass and one copy.
//!
//! `stolen_us` is the engine's own count and misses how long a fault waits for a thread to take it up; `lost_us` is what
//! the guest did not get done, which misses nothing but is within some milliseconds of noise on a busy host. Where they
//! disagree, believe `lost_us`.
//!
//! Does not measure what a lost large mapping or a flushed TLB costs the guest later.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Args;
use colo_vmm::checkpoint::pages::PageBitmap;
use colo_vmm::checkpoint::stabilise::{Mechanism, StabilisePolicy, Stabiliser, StableCost};
use serde::Serialize;
use serde_json::json;

use crate::figures::{Range, table};
use crate::place::{BenchError, Outcome};
use crate::stabilise_guest::{BASE, Guest, failed};

const PAGE_BYTES: usize = 4096;
const POLICIES: [StabilisePolicy; 4] = [
    StabilisePolicy::Copy,
    StabilisePolicy::Protect,
    StabilisePolicy::Mixed,
    StabilisePolicy::Auto,
];
/// The guest writes no page of the set; one in some 100 us; as fast as it can.
const RATES: [(&str, Option<u64>); 3] =
    [("none", None), ("slow", Some(150_000)), ("fast", Some(0))];
/// Between two captures.
const INTERVAL: Duration = Duration::from_millis(20);
/// A guest whose first write is to a protected page shows no progress at once.
const STARTED_MAX: Duration = Duration::from_millis(5);

/// Options of `stabilise`.
#[derive(Debug, Args)]
pub(crate) struct StabiliseArgs {
    /// How many pages are captured
    #[arg(long, value_delimiter = ',', default_value = "100,1000,10000,100000",
        value_parser = clap::value_parser!(u64).range(1..=500_000))]
    pages: Vec<u64>,
    /// How often each is measured
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repeat: u32,
}

/// One mechanism at one size and write rate.
#[derive(Debug, Serialize)]
struct Row {
    pages: u64,
    writes: &'static str,
    policy: String,
    memcpy_us: Range,
    pause_us: Range,
    stolen_us: Range,
    /// What the guest itself lost, by the pages it did not write: independent of what is counted above.
    lost_us: Range,
    faults: Range,
    read_us: Range,
    /// How often `auto` did what.
    copies: usize,
    protects: usize,
    mixed: usize,
}

/// Collecting a dirty set in the pause.
#[derive(Debug, Serialize)]
struct Collection {
    pages: u64,
    mechanism: &'static str,
    collect_us: Range,
    /// Of an empty set.
    empty_us: Range,
    ring_full: u64,
}

/// Runs the benchmark.
pub(crate) fn run(args: &StabiliseArgs) -> Result<Outcome, BenchError> {
    let most = args.pages.iter().copied().max().unwrap_or(1);
    let ram_mib = most * 4 / 1024 + 64;
    let mut collections = collect(args, ram_mib, "bitmap")?;
    collections.extend(collect(args, ram_mib, "ring")?);
    let guest = Guest::start(ram_mib, "auto")?;
    let machine = &guest.machine;
    let ram = machine.ram().clone();
    let arena_pages = ram.page_count() as u32;
    let view = machine.guest_view().cloned();
    let mut stabiliser =
        Stabiliser::new(ram, view, arena_pages).map_err(|e| failed("be captured", e))?;
    let calibrated = stabiliser.model();
    let mut rows = Vec::new();
    for &pages in &args.pages {
        for (writes, pause) in RATES {
            eprintln!("{pages} pages, writes: {writes}");
            match pause {
                Some(pause) => guest.aim(pages, pause)?,
                None => guest.aim(1, 0)?,
            }
            rows.extend(measure(args, &guest, &mut stabiliser, pages, writes)?);
        }
    }
    let text = text(&rows, &collections);
    Ok(Outcome {
        text,
        json: json!({
            "benchmark": "stabilise", "ram_mib": ram_mib, "rows": rows, "collections": collections,
            "calibrated": calibrated, "learnt": stabiliser.model(),
            "unavailable": stabiliser.unavailable(),
        }),
        clean: true,
    })
}

fn set(guest: &Guest, pages: u64) -> PageBitmap {
    let mut set = PageBitmap::new(guest.machine.ram().page_count());
    // The first page is the one that a guest which writes nothing of the set writes.
    let first = BASE / PAGE_BYTES as u64 + 1;
    for page in first..first + pages {
        set.words[page as usize / 64] |= 1 << (page % 64);
    }
    set
}

fn measure(
    args: &StabiliseArgs,
    guest: &Guest,
    stabiliser: &mut Stabiliser,
    pages: u64,
    writes: &'static str,
) -> Result<Vec<Row>, BenchError> {
    let union = set(guest, pages);
    let mut costs: [Vec<StableCost>; 4] = Default::default();
    let mut lost: [Vec<f64>; 4] = Default::default();
    let mut memcpy = Vec::new();
    let mut buffer = vec![1_u8; pages as usize * PAGE_BYTES];
    // The first round warms the arena.
    for round in 0..=args.repeat {
        memcpy.push(plain_copy(guest, &mut buffer)?);
        for (policy, (costs, lost)) in POLICIES.into_iter().zip(costs.iter_mut().zip(&mut lost)) {
            let per_us = pages_per_us(guest)?;
            let (begun, before) = (Instant::now(), guest.written()?);
            let cost = capture(guest, stabiliser, &union, policy)?;
            let got_us = (guest.written()? - before) as f64 / per_us;
            if round > 0 {
                costs.push(cost);
                lost.push(begun.elapsed().as_secs_f64() * 1e6 - got_us);
            }
        }
    }
    let rows = POLICIES
        .into_iter()
        .zip(costs.iter().zip(&lost))
        .map(|(policy, (costs, lost))| {
            let of =
                |figure: fn(&StableCost) -> u64| Range::of(costs.iter().map(|c| figure(c) as f64));
            let count = |wanted| costs.iter().filter(|c| c.mechanism == wanted).count();
            Row {
                pages,
                writes,
                policy: format!("{policy:?}").to_lowercase(),
                memcpy_us: Range::of(memcpy.iter().skip(1).copied()),
                pause_us: of(|c| c.pause_us),
                stolen_us: of(StableCost::stolen_us),
                lost_us: Range::of(lost.iter().copied()),
                faults: of(|c| c.faults),
                read_us: of(|c| c.read_us),
                copies: count(Mechanism::Copy),
                protects: count(Mechanism::Protect),
                mixed: count(Mechanism::Mixed),
            }
        });
    Ok(rows.collect())
}

/// What the guest gets done while nobody disturbs it.
fn pages_per_us(guest: &Guest) -> Result<f64, BenchError> {
    let (begun, before) = (Instant::now(), guest.written()?);
    std::thread::sleep(INTERVAL);
    let written = guest.written()? - before;
    Ok(written.max(1) as f64 / (begun.elapsed().as_secs_f64() * 1e6))
}

/// The same pages with one memcpy into touched memory, while the guest stands still.
fn plain_copy(guest: &Guest, buffer: &mut [u8]) -> Result<f64, BenchError> {
    guest.pause()?;
    let begun = Instant::now();
    let read = guest.machine.ram().read(BASE + PAGE_BYTES as u64, buffer);
    let us = begun.elapsed().as_secs_f64() * 1e6;
    black_box(buffer);
    read.map_err(|e| failed("be read", e))?;
    guest.run()?;
    Ok(us)
}

fn capture(
    guest: &Guest,
    stabiliser: &mut Stabiliser,
    union: &PageBitmap,
    policy: StabilisePolicy,
) -> Result<StableCost, BenchError> {
    guest.pause()?;
    let stable = stabiliser.take(union, policy);
    let written = guest.written()?;
    guest.run()?;
    // `run` only asks for it: without this a small capture is read before the guest has moved.
    let asked = Instant::now();
    while guest.written()? == written && asked.elapsed() < STARTED_MAX {
        std::thread::yield_now();
    }
    let mut stable = stable.map_err(|e| failed("be captured", e))?;
    let mut send_buffer = [0; PAGE_BYTES];
    let mut sum = 0_u64;
    while let Some((number, page)) = stable.next_page().map_err(|e| failed("be read", e))? {
        let words = page.chunks_exact(8);
        sum = words.fold(sum ^ number, |sum, w| {
            sum ^ u64::from_le_bytes([w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]])
        });
        send_buffer.copy_from_slice(page);
        black_box(&mut send_buffer);
    }
    black_box(sum);
    Ok(stable.finish())
}

fn collect(
    args: &StabiliseArgs,
    ram_mib: u64,
    mechanism: &'static str,
) -> Result<Vec<Collection>, BenchError> {
    let guest = Guest::start(ram_mib, mechanism)?;
    let machine = &guest.machine;
    let logging = machine.set_dirty_logging(true);
    logging.map_err(|e| failed("be logged", e))?;
    let mut dirty = PageBitmap::new(machine.ram().page_count());
    let mut rows = Vec::new();
    for &pages in &args.pages {
        eprintln!("{mechanism}, {pages} pages");
        guest.aim(pages, 0)?;
        let (mut full, mut empty) = (Vec::new(), Vec::new());
        for _ in 0..args.repeat {
            guest.wait_rounds(2)?;
            guest.pause()?;
            for times in [&mut full, &mut empty] {
                dirty.clear();
                let begun = Instant::now();
                let taken = machine.take_dirty(&mut dirty.words);
                times.push(begun.elapsed().as_secs_f64() * 1e6);
                taken.map_err(|e| failed("be logged", e))?;
            }
            guest.run()?;
        }
        rows.push(Collection {
            pages,
            mechanism,
            collect_us: Range::of(full),
            empty_us: Range::of(empty),
            ring_full: machine.dirty_stats().ring_full,
        });
    }
    Ok(rows)
}

fn text(rows: &[Row], collections: &[Collection]) -> String {
    let header = [
        "pages",
        "writes",
        "policy",
        "memcpy us",
        "pause us",
        "stolen us",
        "max",
        "lost us",
        "faults",
        "read us",
        "copy/prot/mix",
    ];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    let number = |value: f64| format!("{value:.0}");
    for row in rows {
        cells.push(vec![
            row.pages.to_string(),
            row.writes.to_owned(),
            row.policy.clone(),
            number(row.memcpy_us.median),
            number(row.pause_us.median),
            number(row.stolen_us.median),
            number(row.stolen_us.max),
            number(row.lost_us.median),
            number(row.faults.median),
            number(row.read_us.median),
            format!("{}/{}/{}", row.copies, row.protects, row.mixed),
        ]);
    }
    let header = ["pages", "log", "collect us", "max", "empty us", "ring full"];
    let mut logs = vec![header.map(str::to_owned).to_vec()];
    for row in collections {
        logs.push(vec![
            row.pages.to_string(),
            row.mechanism.to_owned(),
            format!("{:.1}", row.collect_us.median),
            format!("{:.1}", row.collect_us.max),
            format!("{:.1}", row.empty_us.median),
            row.ring_full.to_string(),
        ]);
    }
    format!(
        "\nKeeping pages in a row while the guest runs on; medians. stolen us misses waits for a thread, lost us does not.\n\n{}\nCollecting the dirty set while the guest \
         stands still; medians.\n\n{}",
        table(&cells),
        table(&logs)
    )
}
