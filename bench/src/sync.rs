//! What the size of a guest's memory costs a pair: the time of a full synchronisation, and the pause of checkpoints of the
//! same number of pages afterwards, for idle guests of several sizes, untouched and with much of their memory in use.
//!
//! Invariants: each row meets a fresh pair; a row with much memory in use has it in use before the secondary that is
//! measured starts; checkpoints are asked for one at a time.
//!
//! Does not put load on the guest during the synchronisation.

use std::time::{Duration, Instant};

use clap::Args;
use colo_lab::pair::{Pair, PairError};
use colo_lab::topology::Host;
use serde::Serialize;
use serde_json::{Value, json};

use crate::checkpoint::{Set, checkpoints};
use crate::checkpoint_client::GuestClient;
use crate::figures::{percentile, table};
use crate::place::{BenchError, Outcome, Place};
use crate::tracking::Tracking;

const PAGE_BYTES: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Both guests write a large set in their own time: that must not count as a divergence.
const DEADLINE_MS: u64 = 5_000;
/// The demo guest gives written pages somewhat less than half of its memory.
const TOUCHED_PCT: u64 = 40;

/// Options of `sync`.
#[derive(Debug, Args)]
pub(crate) struct SyncArgs {
    /// Sizes of the guests
    #[arg(long, value_delimiter = ',', default_value = "1024,4096,12288",
        value_parser = clap::value_parser!(u32).range(64..=1_048_576))]
    ram_mib: Vec<u32>,
    /// Of how many pages the checkpoints are
    #[arg(long, value_delimiter = ',', default_value = "100,10000",
        value_parser = clap::value_parser!(u32).range(1..=2_000_000))]
    pages: Vec<u32>,
    /// How many checkpoints of each size are measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// The most that a guest touches, so that both and the pages under way fit into this machine
    #[arg(long, default_value_t = 4096)]
    touch_mib_max: u32,
    /// What logs the pages that guests write
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    tracking: Vec<Tracking>,
    /// Further lines of `[checkpoint]` for both configuration files
    #[arg(long, default_value = "")]
    extra: String,
}

/// One size, untouched or touched.
#[derive(Debug, Serialize)]
struct Row {
    ram_mib: u32,
    /// How written pages were to be logged,
    tracking: Tracking,
    /// and how the primary logged them.
    mechanism: String,
    /// How much the guest was asked to write before.
    touched_mib: u64,
    /// What its memory takes on the primary's host, before and after.
    used_mib: u64,
    used_after_mib: u64,
    /// From the start of the secondary until the primary said that it is protected.
    sync_ms: f64,
    /// From its welcome, as the primary says.
    welcome_to_protected_ms: f64,
    rounds: u64,
    pages_sent: u64,
    checkpoints: Vec<Pause>,
}

/// Checkpoints of one size; medians where nothing else is said.
#[derive(Debug, Serialize)]
struct Pause {
    pages: u32,
    dirty_pages: f64,
    pause_us_p50: f64,
    pause_us_p99: f64,
    quiesce_us_p50: f64,
    state_us_p50: f64,
    collect_us_p50: f64,
    stabilise_us_p50: f64,
    commit_us_p50: f64,
}

/// Runs the benchmark.
pub(crate) fn run(args: &SyncArgs, place: &Place) -> Result<Outcome, BenchError> {
    let mut rows = Vec::new();
    for &ram_mib in &args.ram_mib {
        let most = u64::from(ram_mib) * TOUCHED_PCT / 100;
        let most = most.min(args.touch_mib_max.into());
        // With nothing to touch these are the same.
        let touched = [0, most].into_iter().take(1 + usize::from(most > 0));
        for touched_mib in touched {
            for &tracking in &args.tracking {
                let name = tracking.name();
                eprintln!("{ram_mib} MiB, {touched_mib} of them written, {name}");
                rows.push(measure(args, place, (ram_mib, tracking), touched_mib)?);
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
    args: &SyncArgs,
    place: &Place,
    (ram_mib, tracking): (u32, Tracking),
    touched_mib: u64,
) -> Result<Row, BenchError> {
    let dir = place.scratch()?;
    let mut settings = place.settings();
    settings.ram_mib = ram_mib;
    settings.compare_deadline_ms = DEADLINE_MS;
    let (dirty, extra) = (tracking.name(), &args.extra);
    settings.primary_extra = format!("[checkpoint]\ndirty = \"{dirty}\"\n{extra}");
    settings.secondary_extra = settings.primary_extra.clone();
    let mut pair = Pair::start(&settings, dir.path())?;
    pair.secondary.kill()?;
    pair.wait_alone(Host::A)?;
    if touched_mib > 0 {
        touch(&pair, (touched_mib * MIB / PAGE_BYTES) as u32)?;
    }
    let used = used_mib(&pair)?;
    let begun = Instant::now();
    pair.restart(Host::B, "secondary")?;
    let status = pair.wait_protected(Host::A)?;
    let sync = begun.elapsed();
    let used_after_mib = used_mib(&pair)?;
    let mut pauses = Vec::new();
    for &pages in &args.pages {
        let set = Set {
            pages,
            same_pct: 50,
            rest_ms: 0,
        };
        let (told, _) = checkpoints(args.count, &mut pair, set)?;
        pauses.push(pause(pages, &told));
    }
    let number = |key: &str| status[key].as_u64().unwrap_or(0);
    Ok(Row {
        ram_mib,
        tracking,
        mechanism: mechanism(&status),
        touched_mib,
        used_mib: used,
        used_after_mib,
        sync_ms: milliseconds(sync),
        welcome_to_protected_ms: number("sync_us") as f64 / 1e3,
        rounds: number("sync_rounds"),
        pages_sent: number("sync_pages"),
        checkpoints: pauses,
    })
}

/// What logs written pages, as a host says.
fn mechanism(status: &Value) -> String {
    let told = status["dirty_log"]["mechanism"].as_str();
    told.unwrap_or("not told").to_owned()
}

/// Has the guest write so many pages.
fn touch(pair: &Pair, pages: u32) -> Result<(), BenchError> {
    let failed = |what: &str| BenchError::io(what.to_owned());
    let connected = pair.topology.client.run(GuestClient::connect);
    let connected = connected.map_err(PairError::from)?;
    let mut guest = connected.map_err(failed("connect to the guest"))?;
    guest.dirty(pages, 100).map_err(failed("write to memory"))
}

fn used_mib(pair: &Pair) -> Result<u64, BenchError> {
    let bytes = pair.primary.memory_file_bytes("colo-guest-ram");
    let failed = BenchError::io("look at the guest's memory");
    Ok(bytes.map_err(failed)? / MIB)
}

fn pause(pages: u32, told: &[Value]) -> Pause {
    let at = |key: &str, percent: usize| {
        let values = told.iter().map(|c| c[key].as_f64().unwrap_or(0.0));
        percentile(values, percent)
    };
    Pause {
        pages,
        dirty_pages: at("dirty_pages", 50),
        pause_us_p50: at("pause_us", 50),
        pause_us_p99: at("pause_us", 99),
        quiesce_us_p50: at("quiesce_us", 50),
        state_us_p50: at("state_us", 50),
        collect_us_p50: at("collect_us", 50),
        stabilise_us_p50: at("stabilise_us", 50),
        commit_us_p50: at("commit_us", 50),
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn text(rows: &[Row]) -> String {
    let header = [
        "RAM MiB", "written", "in use", "sync ms", "of it", "rounds", "sent MB",
    ];
    let mut syncs = vec![header.map(str::to_owned).to_vec()];
    let header = [
        "RAM MiB",
        "in use",
        "log",
        "pages",
        "dirty",
        "pause p50/p99 us",
        "quiesce",
        "state",
        "collect",
        "stabilise",
        "commit us",
    ];
    let mut pauses = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        syncs.push(vec![
            row.ram_mib.to_string(),
            row.touched_mib.to_string(),
            format!("{} -> {}", row.used_mib, row.used_after_mib),
            format!("{:.0}", row.sync_ms),
            format!("{:.0}", row.welcome_to_protected_ms),
            row.rounds.to_string(),
            format!("{:.1}", (row.pages_sent * PAGE_BYTES) as f64 / 1e6),
        ]);
        for pause in &row.checkpoints {
            pauses.push(vec![
                row.ram_mib.to_string(),
                row.used_mib.to_string(),
                row.mechanism.clone(),
                pause.pages.to_string(),
                format!("{:.0}", pause.dirty_pages),
                format!("{:.0}/{:.0}", pause.pause_us_p50, pause.pause_us_p99),
                format!("{:.0}", pause.quiesce_us_p50),
                format!("{:.0}", pause.state_us_p50),
                format!("{:.0}", pause.collect_us_p50),
                format!("{:.0}", pause.stabilise_us_p50),
                format!("{:.0}", pause.commit_us_p50),
            ]);
        }
    }
    format!(
        "\nSynchronisation, from the start of the secondary (of it: from its welcome):\n\n{}\n\
         Checkpoints on divergence afterwards, one at a time; medians:\n\n{}",
        table(&syncs),
        table(&pauses),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_what_logged_the_pages_and_not_what_was_asked_for() {
        let status = json!({ "dirty_log": { "mechanism": "plain_bitmap" } });
        let pause = Pause {
            pages: 100,
            dirty_pages: 100.0,
            pause_us_p50: 1.0,
            pause_us_p99: 1.0,
            quiesce_us_p50: 1.0,
            state_us_p50: 1.0,
            collect_us_p50: 1.0,
            stabilise_us_p50: 1.0,
            commit_us_p50: 1.0,
        };
        let row = Row {
            ram_mib: 64,
            tracking: Tracking::Auto,
            mechanism: mechanism(&status),
            touched_mib: 0,
            used_mib: 1,
            used_after_mib: 1,
            sync_ms: 1.0,
            welcome_to_protected_ms: 1.0,
            rounds: 1,
            pages_sent: 1,
            checkpoints: vec![pause],
        };
        let text = text(&[row]);
        assert!(text.contains("plain_bitmap"), "{text}");
        assert!(!text.contains("auto"), "{text}");
        assert_eq!(mechanism(&json!({})), "not told");
    }
}
