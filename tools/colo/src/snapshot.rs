//! `colo snapshot`: asks a running machine to write itself to a file, or checks such a file.
//!
//! Does not write the file; the machine's process does, with its rights.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use colo_vmm::config::Config;
use colo_vmm::requests::ask_for_snapshot;
use colo_vmm::snapshot::{Snapshot, SnapshotReport};
use tracing::error;

use crate::BAD_CONFIGURATION;

/// What is wanted.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// The file; one that is there is replaced when the new one is whole
    file: PathBuf,
    /// Status socket of the running machine
    #[arg(
        long,
        value_name = "SOCKET",
        required_unless_present_any = ["config", "verify"],
        conflicts_with_all = ["config", "verify"]
    )]
    socket: Option<PathBuf>,
    /// Its configuration file, which names the socket
    #[arg(long, value_name = "CONFIG", conflicts_with = "verify")]
    config: Option<PathBuf>,
    /// Take none: read the file and check every byte of it
    #[arg(long)]
    verify: bool,
    /// Print what it cost for programs
    #[arg(long, conflicts_with = "verify")]
    json: bool,
}

/// Takes or checks a snapshot.
pub(crate) fn run(arguments: &SnapshotArgs) -> ExitCode {
    if arguments.verify {
        return verify(&arguments.file);
    }
    let socket = match socket(arguments) {
        Ok(socket) => socket,
        Err(reason) => {
            error!("{reason}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    // The machine may run in another directory.
    let file = match std::path::absolute(&arguments.file) {
        Ok(file) => file,
        Err(e) => {
            error!("{}: {e}", arguments.file.display());
            return ExitCode::FAILURE;
        }
    };
    match ask_for_snapshot::<SnapshotReport>(&socket, &file) {
        Ok(report) => {
            tell(&file, &report, arguments.json);
            ExitCode::SUCCESS
        }
        Err(e) => {
            error!("no snapshot: {e}");
            ExitCode::FAILURE
        }
    }
}

fn socket(arguments: &SnapshotArgs) -> Result<PathBuf, String> {
    if let Some(socket) = &arguments.socket {
        return Ok(socket.clone());
    }
    let path = arguments.config.as_deref().unwrap_or(Path::new(""));
    let config = Config::read(path).map_err(|e| e.to_string())?;
    let socket = config.host.status;
    socket.ok_or_else(|| {
        let path = path.display();
        format!("{path}: host.status is not set, so the machine cannot be asked")
    })
}

fn tell(file: &Path, report: &SnapshotReport, json: bool) {
    if json {
        println!("{}", serde_json::json!(report));
        return;
    }
    println!(
        "{}: {} of {} pages, the others hold zeroes; the guest stood still for {} us, all took {} us",
        file.display(),
        report.stored_pages,
        report.pages,
        report.pause_us,
        report.total_us
    );
}

fn verify(file: &Path) -> ExitCode {
    match Snapshot::open(file).and_then(|snapshot| snapshot.verify().map(|()| snapshot.pages())) {
        Ok((pages, stored)) => {
            println!(
                "{}: whole, {stored} of {pages} pages, the others hold zeroes",
                file.display()
            );
            ExitCode::SUCCESS
        }
        Err(e) => {
            error!("{e}");
            ExitCode::FAILURE
        }
    }
}
