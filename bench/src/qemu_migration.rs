//! `qemu-migration`: QEMU's own live migration of a guest with a known dirty set, beside our checkpoints of as many
//! pages over the same kind of link.
//!
//! Invariants: each migration has fresh machines, and meets a guest that writes all pages of its set much faster than
//! QEMU sends them, so that the whole set is dirty when it stops; how many pages travelled then is in the row.
//!
//! Does not compare the two guests' speed: QEMU's runs by software emulation, which its RAM path does not see.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::{Args, Parser};
use colo_lab::topology::{Host, Topology};
use serde::Serialize;
use serde_json::{Value, json};

use crate::checkpoint::{self, CheckpointArgs};
use crate::figures::{percentile, table};
use crate::place::{BenchError, Outcome, Place};
use crate::qemu_guest;
use crate::qemu_machine::QemuMachine;

const PORT: u16 = 7656;
/// More than any link has, in bytes a second: QEMU is not to hold back.
const UNLIMITED: u64 = 1 << 40;
/// As long as this is the limit, a guest that goes on writing keeps QEMU from stopping it.
const DOWNTIME_SHORT_MS: u64 = 1;
/// QEMU's largest limit: it stops the guest at once.
const DOWNTIME_ANY_MS: u64 = 2_000_000;
/// Passes over the memory after which QEMU may stop the guest: it has sent everything, and only dirty pages since.
const PASSES: u64 = 4;
/// A page in QEMU's stream: contents, offset and flags.
const STREAM_PAGE_BYTES: f64 = 4104.0;
const MIGRATION_MAX: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(2);

/// Options of `qemu-migration`.
#[derive(Debug, Args)]
pub(crate) struct QemuMigrationArgs {
    /// How many pages are dirty
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,100000",
        value_parser = clap::value_parser!(u32).range(1..=500_000))]
    pages: Vec<u32>,
    /// How many migrations, and how many checkpoints, are measured for each row
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// How many of a hundred pages are the same on both guests, in our rows
    #[arg(long, value_delimiter = ',', default_value = "0,75",
        value_parser = clap::value_parser!(u32).range(0..=100))]
    same: Vec<u32>,
    /// Also with so many of QEMU's multifd channels; 0: not
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=16))]
    multifd: u32,
}

/// One migration.
#[derive(Debug, Clone, Serialize)]
struct Migration {
    /// From the stop of the source to the start of the destination, by the time stamps of QEMU's events.
    pause_us: u64,
    /// As QEMU says it.
    downtime_ms: u64,
    /// In the pause; QEMU does not count multifd's by phase.
    bytes_sent: Option<u64>,
    /// Before it.
    precopy_bytes: u64,
    passes: u64,
    total_ms: u64,
}

/// Migrations of one number of pages.
#[derive(Debug, Serialize)]
struct Row {
    kind: &'static str,
    pages: u32,
    ram_mib: u32,
    pause_us_p50: f64,
    pause_us_max: f64,
    downtime_ms_p50: f64,
    bytes_sent: Option<f64>,
    pages_sent: Option<f64>,
    precopy_bytes: f64,
    total_ms_p50: f64,
    migrations: Vec<Migration>,
}

/// Runs the benchmark.
pub(crate) fn run(args: &QemuMigrationArgs, place: &Place) -> Result<Outcome, BenchError> {
    let mut rows: Vec<Value> = Vec::new();
    for &pages in &args.pages {
        eprintln!("{pages} pages, QEMU");
        rows.push(json!(migrations(args, place, pages, 0)?));
        if args.multifd > 0 {
            eprintln!("{pages} pages, QEMU with {} multifd channels", args.multifd);
            rows.push(json!(migrations(args, place, pages, args.multifd)?));
        }
        rows.extend(checkpoints(args, place, pages)?);
    }
    Ok(Outcome {
        text: text(&rows),
        json: json!(rows),
        clean: true,
    })
}

fn migrations(
    args: &QemuMigrationArgs,
    place: &Place,
    pages: u32,
    multifd: u32,
) -> Result<Row, BenchError> {
    let topology = Topology::new()?;
    let mut migrations = Vec::new();
    for _ in 0..args.count {
        let dir = place.scratch()?;
        migrations.push(migrate(&topology, dir.path(), pages, multifd)?);
    }
    let of = |value: fn(&Migration) -> u64| migrations.iter().map(move |m| value(m) as f64);
    let median = |value: fn(&Migration) -> u64| percentile(of(value), 50);
    let sent = migrations.iter().filter_map(|m| m.bytes_sent);
    let sent: Vec<f64> = sent.map(|bytes| bytes as f64).collect();
    let bytes_sent = (!sent.is_empty()).then(|| percentile(sent, 50));
    Ok(Row {
        kind: if multifd > 0 { "qemu-multifd" } else { "qemu" },
        pages,
        ram_mib: qemu_guest::ram_mib(pages),
        pause_us_p50: median(|m| m.pause_us),
        pause_us_max: percentile(of(|m| m.pause_us), 100),
        downtime_ms_p50: median(|m| m.downtime_ms),
        bytes_sent,
        pages_sent: bytes_sent.map(|bytes| (bytes / STREAM_PAGE_BYTES).floor()),
        precopy_bytes: median(|m| m.precopy_bytes),
        total_ms_p50: median(|m| m.total_ms),
        migrations,
    })
}

/// One migration, from host a to host b.
fn migrate(
    topology: &Topology,
    dir: &Path,
    pages: u32,
    multifd: u32,
) -> Result<Migration, BenchError> {
    let kernel = dir.join("guest");
    let written = std::fs::write(&kernel, qemu_guest::image(pages));
    written.map_err(BenchError::io("write the guest's image"))?;
    let start = |name, host, arguments: &[&str]| {
        let ram_mib = qemu_guest::ram_mib(pages);
        QemuMachine::start(name, topology.host(host), dir, &kernel, ram_mib, arguments)
    };
    let mut destination = start("qemu-b", Host::B, &["-incoming", "defer"])?;
    let mut source = start("qemu-a", Host::A, &[])?;
    for machine in [&mut source, &mut destination] {
        prepare(machine, multifd)?;
    }
    wait_for_guest(&mut source, pages)?;
    let uri = format!("tcp:{}:{PORT}", Host::B.link_address());
    destination.command("migrate-incoming", &json!({ "uri": uri }))?;
    source.command("migrate", &json!({ "uri": uri }))?;
    let told = follow(&mut source)?;
    let stopped = source.wait_event("stop", |event| event.name == "STOP")?;
    let resumed = destination.wait_event("start", |event| event.name == "RESUME")?;
    let ram = |key: &str| told["ram"][key].as_u64().unwrap_or(0);
    Ok(Migration {
        pause_us: resumed.at_us.saturating_sub(stopped.at_us),
        downtime_ms: told["downtime"].as_u64().unwrap_or(0),
        bytes_sent: (multifd == 0).then(|| ram("downtime-bytes")),
        precopy_bytes: ram("precopy-bytes"),
        passes: ram("dirty-sync-count"),
        total_ms: told["total-time"].as_u64().unwrap_or(0),
    })
}

fn prepare(machine: &mut QemuMachine, multifd: u32) -> Result<(), BenchError> {
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = [
        capability("events", true),
        capability("multifd", multifd > 0),
    ];
    machine.command(
        "migrate-set-capabilities",
        &json!({ "capabilities": capabilities }),
    )?;
    let parameters = json!({
        "max-bandwidth": UNLIMITED,
        "downtime-limit": DOWNTIME_SHORT_MS,
        "multifd-channels": multifd.max(1),
    });
    machine.command("migrate-set-parameters", &parameters)?;
    Ok(())
}

/// Waits until the guest has written the last page of its set.
fn wait_for_guest(machine: &mut QemuMachine, pages: u32) -> Result<(), BenchError> {
    let last = qemu_guest::FIRST_BYTE + (pages - 1) * 4096;
    let look = json!({ "command-line": format!("xp /1wx {last:#x}") });
    let begun = Instant::now();
    while begun.elapsed() < MIGRATION_MAX {
        let shown = machine.command("human-monitor-command", &look)?;
        let word = shown.as_str().and_then(|text| text.split_once(": 0x"));
        if word.is_some_and(|(_, word)| word.trim().bytes().any(|digit| digit != b'0')) {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
    Err(BenchError::Guest {
        what: "write its pages",
        why: "its last page is still empty".to_owned(),
    })
}

/// Lets the guest be stopped once QEMU has sent everything and goes over dirty pages. Gives what QEMU tells of the
/// migration.
fn follow(source: &mut QemuMachine) -> Result<Value, BenchError> {
    let begun = Instant::now();
    let mut held_back = true;
    while begun.elapsed() < MIGRATION_MAX {
        let told = source.command("query-migrate", &json!({}))?;
        match told["status"].as_str() {
            // The times are there a moment after the state.
            Some("completed") if told["total-time"].as_u64() > Some(0) => return Ok(told),
            Some("failed" | "cancelled") => {
                return Err(BenchError::Failed(format!("QEMU's migration: {told}")));
            }
            _ => {}
        }
        if held_back && told["ram"]["dirty-sync-count"].as_u64() >= Some(PASSES) {
            let any = json!({ "downtime-limit": DOWNTIME_ANY_MS });
            source.command("migrate-set-parameters", &any)?;
            held_back = false;
        }
        std::thread::sleep(POLL);
    }
    Err(BenchError::Failed(
        "QEMU's migration does not end".to_owned(),
    ))
}

/// `checkpoint` as a command of its own, so that its options keep their defaults.
#[derive(Debug, Parser)]
struct CheckpointCommand {
    #[command(flatten)]
    args: CheckpointArgs,
}

fn checkpoints(
    args: &QemuMigrationArgs,
    place: &Place,
    pages: u32,
) -> Result<Vec<Value>, BenchError> {
    let same: Vec<String> = args.same.iter().map(u32::to_string).collect();
    let line = [
        "checkpoint".to_owned(),
        format!("--pages={pages}"),
        format!("--same={}", same.join(",")),
        format!("--count={}", args.count),
    ];
    let command = CheckpointCommand::try_parse_from(line)
        .map_err(|error| BenchError::Failed(error.to_string()))?;
    let mut outcome = checkpoint::run(&command.args, place)?;
    let mut rows = outcome.json.as_array_mut().map(std::mem::take);
    for row in rows.iter_mut().flatten() {
        row["kind"] = json!("colo");
    }
    Ok(rows.unwrap_or_default())
}

fn text(rows: &[Value]) -> String {
    let header = [
        "pages",
        "what",
        "pause us",
        "commit us",
        "sent MB",
        "sent pages",
    ];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        let shown = |key: &str, unit: f64, decimals: usize| match row[key].as_f64() {
            Some(value) => format!("{:.decimals$}", value / unit),
            None => "-".to_owned(),
        };
        let kind = row["kind"].as_str().unwrap_or_default();
        let what = match row["same_pct"].as_u64() {
            Some(same) => format!("{kind}, {same} % the same"),
            None => kind.to_owned(),
        };
        cells.push(vec![
            row["pages"].to_string(),
            what,
            shown("pause_us_p50", 1.0, 0),
            shown("commit_us_p50", 1.0, 0),
            shown("bytes_sent", 1e6, 1),
            shown("pages_sent", 1.0, 0),
        ]);
    }
    format!(
        "\nMedians. In QEMU's pause all pages travel; ours ends when they are captured, and the commit is when they \
         have arrived.\n\n{}",
        table(&cells)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_checkpoint_are_known() {
        let line = ["checkpoint", "--pages=1000", "--same=0,75", "--count=3"];
        CheckpointCommand::try_parse_from(line).unwrap();
    }

    #[test]
    fn the_report_has_a_line_for_each_row() {
        let rows = [
            json!({"kind": "qemu", "pages": 1000, "pause_us_p50": 11_778.0, "bytes_sent": 4_104_007.0,
                "pages_sent": 1000.0}),
            json!({"kind": "colo", "pages": 1000, "same_pct": 75, "pause_us_p50": 700.0, "commit_us_p50": 2_000.0,
                "bytes_sent": 1_000_000.0}),
        ];
        let text = text(&rows);
        for part in ["11778", "4.1", "colo, 75 % the same", "2000"] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
