//! `colo compare`: two guests' output through the comparator.
//!
//! Exit codes: 0 they sent the same; 1 they diverged; 2 the input or the command line is wrong.

use std::process::ExitCode;

use clap::Args;
use colo_compare::Policy;
use tracing::error;

use crate::BAD_CONFIGURATION;
use crate::compare_sockets::{self, SocketsArgs};

/// What `colo compare` takes.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    sockets: SocketsArgs,
    /// How late the secondary's equal frame may be
    #[arg(long, value_name = "N")]
    deadline_ms: Option<u64>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Compares.
pub(crate) fn run(args: CompareArgs) -> ExitCode {
    let policy = Policy::default();
    match compare_sockets::run(args.sockets, policy, args.deadline_ms, args.json) {
        Ok(Some(true)) => ExitCode::SUCCESS,
        Ok(Some(false)) => ExitCode::FAILURE,
        Ok(None) => {
            error!("nothing to compare: give --sockets");
            ExitCode::from(BAD_CONFIGURATION)
        }
        Err(e) => {
            error!("{e}");
            ExitCode::from(BAD_CONFIGURATION)
        }
    }
}
