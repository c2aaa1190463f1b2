//! `colo-bench`: one benchmark per claim, with its baseline measured in the same run.
//!
//! Invariants: every guest is started for its measurement and gone after it; a figure is printed only
//! when the run that it describes went to its end.
//!
//! Does not judge figures: it exits with 1 only when something failed, was lost or was wrong.

mod checkpoint;
mod checkpoint_client;
mod checkpoint_link;
mod clients;
mod compare;
mod compare_core;
mod compare_floor;
mod compare_instructions;
mod compare_load;
mod compare_path;
mod compare_row;
mod datapath;
mod datapath_apart;
mod datapath_bare;
mod datapath_client;
mod datapath_cpu;
mod datapath_driver;
mod datapath_echo;
mod datapath_forward;
mod datapath_idle;
mod datapath_latency;
mod datapath_row;
mod datapath_udp;
mod datapath_vhost;
mod datapath_wakeup;
mod failover;
mod figures;
mod modes;
mod modes_load;
mod modes_plot;
mod pages;
mod place;
mod qemu_guest;
mod qemu_machine;
mod qemu_migration;
mod service;
mod stabilise;
mod stabilise_guest;
mod sync;
mod tracking;
mod transfer;
mod transfer_uring;
mod transfer_ways;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use place::{BenchError, Place};

/// Benchmarks of colo, one per claim.
#[derive(Debug, Parser)]
#[command(name = "colo-bench", version, about)]
struct Arguments {
    /// The colo binary [default: the one beside this binary]
    #[arg(long, global = true, value_name = "PATH")]
    colo: Option<PathBuf>,
    /// Write everything that was measured to a file
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Debug, Subcommand)]
enum Benchmark {
    /// What replication costs a service: redis-benchmark and wrk, `colo run` against a pair
    Service(service::ServiceArgs),
    /// COLO against Remus mode with several intervals, against a guest that is not replicated; draws a picture
    Modes(modes::ModesArgs),
    /// How long a service is away when its primary is killed, and what it loses
    Failover(failover::FailoverArgs),
    /// What a checkpoint costs, beside a memcpy of as many pages and a bare stream over the link
    Checkpoint(checkpoint::CheckpointArgs),
    /// QEMU's migration of a guest with a known dirty set, beside a checkpoint of as many pages
    QemuMigration(qemu_migration::QemuMigrationArgs),
    /// What it costs to find out how a page of a checkpoint travels, beside a memcpy of it
    Pages(pages::PagesArgs),
    /// What it takes to know which pages were written, by KVM's dirty bitmap and ring, with little and much memory
    Tracking(tracking::TrackingArgs),
    /// What it takes to keep dirty pages while the guest runs on: copies, write protection, beside a memcpy
    Stabilise(stabilise::StabiliseArgs),
    /// What a comparison costs, beside a memcmp and QEMU's comparator
    Compare(compare::CompareArgs),
    /// How fast packets go through the fast path, beside what others do with them
    Datapath(datapath::DatapathArgs),
    /// What the size of a guest's memory costs: the time of a synchronisation, and the pause of checkpoints after it
    Sync(sync::SyncArgs),
    /// How fast checkpoints go through the page channel, beside bare streams
    Transfer(transfer::TransferArgs),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("colo-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Gives whether nothing was lost or wrong.
fn run(arguments: &Arguments) -> Result<bool, BenchError> {
    let place = Place::new(arguments.colo.as_deref())?;
    println!("{}", place.machine_text());
    let outcome = match &arguments.benchmark {
        Benchmark::Service(args) => service::run(args, &place)?,
        Benchmark::Modes(args) => modes::run(args, &place)?,
        Benchmark::Failover(args) => failover::run(args, &place)?,
        Benchmark::Checkpoint(args) => checkpoint::run(args, &place)?,
        Benchmark::QemuMigration(args) => qemu_migration::run(args, &place)?,
        Benchmark::Pages(args) => pages::run(args)?,
        Benchmark::Tracking(args) => tracking::run(args)?,
        Benchmark::Stabilise(args) => stabilise::run(args)?,
        Benchmark::Compare(args) => compare::run(args, &place)?,
        Benchmark::Datapath(args) => datapath::run(args, &place)?,
        Benchmark::Sync(args) => sync::run(args, &place)?,
        Benchmark::Transfer(args) => transfer::run(args)?,
    };
    print!("{}", outcome.text);
    if let Some(file) = &arguments.json {
        place.write_json(file, outcome.json)?;
    }
    Ok(outcome.clean)
}
