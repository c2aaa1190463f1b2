//! `colo compare`: two guests' output through the comparator, from captures or from sockets.
//!
//! Exit codes: 0 they sent the same; 1 they diverged; 2 the input or the command line is wrong.

mod captures;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use colo_compare::Policy;
use colo_fastpath::policy::{self, PolicyError};
use colo_replay::DEADLINE_MS_MAX;
use tracing::error;

use crate::BAD_CONFIGURATION;
use crate::compare_sockets::{self, SocketsArgs};
use captures::CaptureArgs;

/// What `colo compare` takes.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    captures: CaptureArgs,
    #[command(flatten)]
    sockets: SocketsArgs,
    /// Rules for single flows
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// How late the secondary's equal frame may be [default: 20; with --sockets: 200]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=DEADLINE_MS_MAX))]
    deadline_ms: Option<u64>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Compares.
pub(crate) fn run(args: CompareArgs) -> ExitCode {
    let policy = match read_policy(args.policy) {
        Ok(policy) => policy,
        Err(e) => {
            error!("--policy: {e}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    let (deadline_ms, json) = (args.deadline_ms, args.json);
    let is_same = match args.captures.files() {
        Some(files) => captures::run(&files, args.captures, policy, deadline_ms, json),
        None => match compare_sockets::run(args.sockets, policy, deadline_ms, json) {
            Ok(is_same) => is_same,
            Err(e) => {
                error!("{e}");
                None
            }
        },
    };
    match is_same {
        Some(true) => ExitCode::SUCCESS,
        Some(false) => ExitCode::FAILURE,
        None => ExitCode::from(BAD_CONFIGURATION),
    }
}

fn read_policy(file: Option<PathBuf>) -> Result<Policy, PolicyError> {
    file.map_or(
        Ok(Policy::default()),
        |file| Ok(policy::read(&file)?.policy),
    )
}
