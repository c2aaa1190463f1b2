//! What it takes from a guest to keep its dirty pages as they are while it runs on: copied, write-protected, or both,
//! beside a plain memcpy of as many pages.
//!
//! Invariants: all mechanisms meet the same guest, one after the other in each repetition, with its dirty log on and read as
//! a capture reads it; what is read is consumed as a sender would, by one pass and one copy; what the guest gets done is
//! counted over a time that is the same for all mechanisms, so the faults of the log count as well, also those of pages
//! that are written again after they were copied early.
//!
//! `stolen_us` is the engine's own count and misses how long a fault waits for a thread to take it up; `lost_us` is what
//! the guest did not get done, which misses nothing but is within some milliseconds of noise on a busy host. Where they
//! disagree, believe `lost_us`, beside that of `none`: a capture that keeps nothing, so stops the guest and reads its log.
//!
//! Does not measure what a lost large mapping or a flushed TLB costs the guest later.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Args;
use colo_vmm::checkpoint::codec::PageKey;
use colo_vmm::checkpoint::codec::digest::KEY_BYTES;
use colo_vmm::checkpoint::pages::PageBitmap;
use colo_vmm::checkpoint::stabilise::{Mechanism, StabilisePolicy, Stabiliser, StableCost};
use serde::Serialize;
use serde_json::json;

use crate::figures::{Range, table};
use crate::place::{BenchError, Outcome};
use crate::stabilise_guest::{BASE, Guest, failed};

const PAGE_BYTES: usize = 4096;
/// Pages that are copied before the pause have to be asked for, as a capture does.
const WAYS: [(&str, Way); 6] = [
    ("none", Way::Nothing),
    ("copy", Way::InPause(StabilisePolicy::Copy)),
    ("early copy", Way::Early(StabilisePolicy::Copy)),
    ("protect", Way::InPause(StabilisePolicy::Protect)),
    ("mixed", Way::InPause(StabilisePolicy::Mixed)),
    ("auto", Way::Early(StabilisePolicy::Auto)),
];
/// The guest writes no page of the set; one in some 100 us; as fast as it can.
const RATES: [(&str, Option<u64>); 3] = [("none", None), ("slow", Some(150_000)), (FAST, Some(0))];
const FAST: &str = "fast";
/// Between two captures.
const INTERVAL: Duration = Duration::from_millis(20);
/// The guest's work is counted over this many times the longest capture of the first round,
const WINDOW: f64 = 1.2;
/// but that of a guest which writes as fast as it can for so long a page at least: it meets a fault of the log at each, and
/// only a time that outlasts these can tell what else was lost. Others have no use for more, which would only add noise.
const WINDOW_PAGE: Duration = Duration::from_micros(8);
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

/// How a set is kept.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Not at all.
    Nothing,
    /// From the pause on.
    InPause(StabilisePolicy),
    /// As a capture does, which copies before the pause where the policy has it.
    Early(StabilisePolicy),
}

/// One mechanism at one size and write rate.
#[derive(Debug, Serialize)]
struct Row {
    pages: u64,
    writes: &'static str,
    policy: &'static str,
    memcpy_us: Range,
    pause_us: Range,
    stolen_us: Range,
    /// What the guest itself lost, by the pages it did not write: independent of what is counted above.
    lost_us: Range,
    /// In this time.
    window_us: f64,
    faults: Range,
    /// Copied before the pause, and of these written again before it.
    early_pages: Range,
    again_pages: Range,
    read_us: Range,
    /// How often `auto` did what.
    copies: usize,
    protects: usize,
    mixed: usize,
}

/// Runs the benchmark.
pub(crate) fn run(args: &StabiliseArgs) -> Result<Outcome, BenchError> {
    let most = args.pages.iter().copied().max().unwrap_or(1);
    let ram_mib = most * 4 / 1024 + 64;
    let guest = Guest::start(ram_mib, "auto")?;
    let machine = &guest.machine;
    let ram = machine.ram().clone();
    let arena_pages = ram.page_count() as u32;
    let view = machine.guest_view().cloned();
    let mut stabiliser =
        Stabiliser::new(ram, view, arena_pages).map_err(|e| failed("be captured", e))?;
    // As for a secondary: any key will do.
    stabiliser.digest_with(PageKey::new([7; KEY_BYTES]));
    let logging = machine.set_dirty_logging(true);
    logging.map_err(|e| failed("be logged", e))?;
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
    let text = text(&rows);
    Ok(Outcome {
        text,
        json: json!({
            "benchmark": "stabilise", "ram_mib": ram_mib, "rows": rows,
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
        set.add(page as usize / 64, 1 << (page % 64));
    }
    set
}

/// One capture.
#[derive(Debug)]
struct Sample {
    cost: Option<StableCost>,
    /// From its begin to its end.
    took: Duration,
    lost_us: f64,
    early_pages: u64,
    again_pages: u64,
}

fn measure(
    args: &StabiliseArgs,
    guest: &Guest,
    stabiliser: &mut Stabiliser,
    pages: u64,
    writes: &'static str,
) -> Result<Vec<Row>, BenchError> {
    let union = set(guest, pages);
    let mut samples: [Vec<Sample>; WAYS.len()] = Default::default();
    let mut memcpy = Vec::new();
    let mut buffer = vec![1_u8; pages as usize * PAGE_BYTES];
    let mut window = Duration::ZERO;
    // The first round warms the arena, and tells how long captures take.
    for round in 0..=args.repeat {
        memcpy.push(plain_copy(guest, &mut buffer)?);
        let mut longest = Duration::ZERO;
        for ((_, way), samples) in WAYS.into_iter().zip(&mut samples) {
            if writes == FAST {
                // Through with the faults that the capture before has left: its rate is to be that without any.
                guest.wait_rounds(2)?;
            }
            let sample = sample(guest, stabiliser, &union, way, window)?;
            longest = longest.max(sample.took);
            if round > 0 {
                samples.push(sample);
            }
        }
        if round == 0 {
            window = longest.mul_f64(WINDOW);
            if writes == FAST {
                window = window.max(WINDOW_PAGE.saturating_mul(pages as u32));
            }
        }
    }
    let rows = WAYS.iter().zip(&samples).map(|(&(policy, _), samples)| {
        let of = |figure: fn(&StableCost) -> u64| {
            let costs = samples.iter().filter_map(|sample| sample.cost.as_ref());
            Range::of(costs.map(|cost| figure(cost) as f64))
        };
        let count = |wanted| {
            let costs = samples.iter().filter_map(|sample| sample.cost.as_ref());
            costs.filter(|cost| cost.mechanism == wanted).count()
        };
        let each = |figure: fn(&Sample) -> f64| Range::of(samples.iter().map(figure));
        Row {
            pages,
            writes,
            policy,
            memcpy_us: Range::of(memcpy.iter().skip(1).copied()),
            pause_us: of(|c| c.pause_us),
            stolen_us: of(StableCost::stolen_us),
            lost_us: each(|sample| sample.lost_us),
            window_us: window.as_secs_f64() * 1e6,
            faults: of(|c| c.faults),
            early_pages: each(|sample| sample.early_pages as f64),
            again_pages: each(|sample| sample.again_pages as f64),
            read_us: of(|c| c.read_us),
            copies: count(Mechanism::Copy),
            protects: count(Mechanism::Protect),
            mixed: count(Mechanism::Mixed),
        }
    });
    Ok(rows.collect())
}

/// A capture, and what the guest lost by it in the window.
fn sample(
    guest: &Guest,
    stabiliser: &mut Stabiliser,
    union: &PageBitmap,
    way: Way,
    window: Duration,
) -> Result<Sample, BenchError> {
    let per_us = pages_per_us(guest)?;
    let again = stabiliser.snapshot().early_again_pages;
    let (begun, before) = (Instant::now(), guest.written()?);
    let (early_pages, cost) = capture(guest, stabiliser, union, way)?;
    let took = begun.elapsed();
    std::thread::sleep(window.saturating_sub(took));
    let (us, written) = (begun.elapsed().as_secs_f64() * 1e6, guest.written()?);
    Ok(Sample {
        cost,
        took,
        lost_us: us - (written - before) as f64 / per_us,
        early_pages,
        again_pages: stabiliser.snapshot().early_again_pages - again,
    })
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

/// Gives how many pages were copied before the pause, and what the capture cost if there was one.
fn capture(
    guest: &Guest,
    stabiliser: &mut Stabiliser,
    union: &PageBitmap,
    way: Way,
) -> Result<(u64, Option<StableCost>), BenchError> {
    let mut written = PageBitmap::new(guest.machine.ram().page_count());
    let mut early_pages = 0;
    if let Way::Early(policy) = way
        && stabiliser.wants_early(policy, union.count() as u64)
    {
        look(guest, &mut written)?;
        early_pages = stabiliser.copy_early(union);
        written.clear();
    }
    guest.pause()?;
    look(guest, &mut written)?;
    let stable = match way {
        Way::Nothing => None,
        Way::InPause(policy) => Some(stabiliser.take(union, policy)),
        Way::Early(policy) => Some(stabiliser.take_since(union, &written, policy)),
    };
    let before = guest.written()?;
    guest.run()?;
    // `run` only asks for it: without this a small capture is read before the guest has moved.
    let asked = Instant::now();
    while guest.written()? == before && asked.elapsed() < STARTED_MAX {
        std::thread::yield_now();
    }
    let Some(stable) = stable else {
        return Ok((0, None));
    };
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
    Ok((early_pages, Some(stable.finish())))
}

fn look(guest: &Guest, written: &mut PageBitmap) -> Result<(), BenchError> {
    let taken = guest.machine.take_dirty(written);
    taken.map_err(|e| failed("be logged", e))
}

fn text(rows: &[Row]) -> String {
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
        "early",
        "again",
        "read us",
        "copy/prot/mix",
    ];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    let number = |value: f64| format!("{value:.0}");
    for row in rows {
        cells.push(vec![
            row.pages.to_string(),
            row.writes.to_owned(),
            row.policy.to_owned(),
            number(row.memcpy_us.median),
            number(row.pause_us.median),
            number(row.stolen_us.median),
            number(row.stolen_us.max),
            number(row.lost_us.median),
            number(row.faults.median),
            number(row.early_pages.median),
            number(row.again_pages.median),
            number(row.read_us.median),
            format!("{}/{}/{}", row.copies, row.protects, row.mixed),
        ]);
    }
    format!(
        "\nKeeping pages in a row while the guest runs on; medians. stolen us misses waits for a thread, lost us does not.\n\n{}",
        table(&cells)
    )
}
