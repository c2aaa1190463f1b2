//! The `colo` command.
//!
//! Exit codes: 0 the guest powered off or a signal asked for a clean stop; 1 something failed while
//! running; 2 the configuration or the command line is wrong.

mod compare;
mod compare_sockets;
mod demo;
mod replica;
mod run;
mod snapshot;
mod status;
mod stop;
mod vhost;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{self, ExitCode};

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Exit code for a wrong configuration, as clap uses it for a wrong command line.
const BAD_CONFIGURATION: u8 = 2;

/// Non-stop service for KVM guests by coarse-grained lock-stepping.
#[derive(Debug, Parser)]
#[command(name = "colo", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one virtual machine, not replicated
    Run {
        /// Configuration file
        config: PathBuf,
        /// Start where this snapshot left the machine, not with its kernel
        #[arg(long, value_name = "FILE")]
        restore: Option<PathBuf>,
        /// Read and check all pages of the snapshot first
        #[arg(long, requires = "restore")]
        verify: bool,
    },
    /// Write a running machine to a file, from which `colo run --restore` can start it
    Snapshot(snapshot::SnapshotArgs),
    /// Run a virtual machine that a secondary can join
    Primary {
        /// Configuration file
        config: PathBuf,
    },
    /// Join a running primary, follow it, and go on in its place when it is lost
    Secondary {
        /// Configuration file
        config: PathBuf,
    },
    /// Be the NIC of a guest that another program runs, behind a vhost-user socket
    Vhost {
        /// Configuration file
        config: PathBuf,
    },
    /// Show what a running machine is doing
    Status {
        /// Its status socket (host.status in its configuration)
        socket: PathBuf,
        /// Print the whole document
        #[arg(long)]
        json: bool,
        /// Write the times of the stages (host.stages) into this directory, as HdrHistogram files
        #[arg(long, value_name = "DIR", conflicts_with = "json")]
        hgrm: Option<PathBuf>,
    },
    /// Compare what two guests sent
    Compare(compare::CompareArgs),
    /// Measure: runs colo-bench, which is beside this program
    #[command(disable_help_flag = true)]
    Bench {
        /// What colo-bench is given
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Build a pair on this machine, load it, kill its primary, and report
    Demo(demo::DemoArgs),
}

fn main() -> ExitCode {
    log_to_stderr();
    match Arguments::parse().command {
        Command::Run {
            config,
            restore,
            verify,
        } => {
            let snapshot = restore.as_deref();
            run::run(
                &config,
                snapshot.map(|snapshot| run::Restore { snapshot, verify }),
            )
        }
        Command::Snapshot(arguments) => snapshot::run(&arguments),
        Command::Primary { config } => replica::run(&config, replica::Part::Primary),
        Command::Secondary { config } => replica::run(&config, replica::Part::Secondary),
        Command::Vhost { config } => vhost::run(&config),
        Command::Status { socket, json, hgrm } => status::show(&socket, json, hgrm.as_deref()),
        Command::Bench { arguments } => bench(&arguments),
        Command::Compare(arguments) => compare::run(arguments),
        Command::Demo(arguments) => demo::run(&arguments),
    }
}

/// Becomes colo-bench.
fn bench(arguments: &[OsString]) -> ExitCode {
    let program = match std::env::current_exe() {
        Ok(colo) => colo.with_file_name("colo-bench"),
        Err(error) => {
            eprintln!("colo: where this program is cannot be told: {error}");
            return ExitCode::FAILURE;
        }
    };
    let error = process::Command::new(&program).args(arguments).exec();
    let program = program.display();
    eprintln!("colo: {program}: {error}; build it with `cargo build --release -p colo-bench`");
    ExitCode::FAILURE
}

/// `COLO_LOG` chooses what is logged, in the syntax of `RUST_LOG`.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("COLO_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
