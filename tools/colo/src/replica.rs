//! `colo primary` and `colo secondary`: one host of a pair.
//!
//! Exit codes besides those of every command: 3 another host holds the virtual machine now; 4 the two hosts cannot be
//! a pair.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use colo_vmm::config::Config;
use colo_vmm::replication::{End, ReplicaError, StopRequest, run_primary, run_secondary};
use tracing::{error, info, warn};

use crate::run::{RunError, guest_image};
use crate::stop::catch_signals;

/// Exit code of a host that lost the virtual machine to another.
const DEPOSED: u8 = 3;
/// Exit code of hosts that do not fit together.
const REFUSED: u8 = 4;

/// Which part this host takes at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Primary,
    Secondary,
}

/// Runs this host's part until it ends.
pub(crate) fn run(path: &Path, part: Part) -> ExitCode {
    match try_run(path, part) {
        Ok(End::Stopped) => {
            info!("stopped");
            ExitCode::SUCCESS
        }
        Ok(End::Deposed(record)) => {
            warn!(
                "host {} holds the VM now, generation {}",
                record.holder, record.generation
            );
            ExitCode::from(DEPOSED)
        }
        Ok(End::Refused(reason)) => {
            error!("the hosts cannot be a pair: {reason}");
            ExitCode::from(REFUSED)
        }
        Ok(End::Failed(reason)) => {
            error!("{reason}");
            ExitCode::FAILURE
        }
        Err(e) => {
            error!("{e}");
            e.exit_code()
        }
    }
}

fn try_run(path: &Path, part: Part) -> Result<End, RunError> {
    let config = Config::read(path)?;
    if config.replication.is_none() {
        let (path, source) = (path.to_owned(), ReplicaError::NotConfigured);
        return Err(RunError::NotReplicated { path, source });
    }
    let image = guest_image(&config)?;
    let stop = catch_signals()?;
    let stop = Arc::new(StopRequest {
        flag: stop.flag,
        wake: stop.wake,
    });
    Ok(match part {
        Part::Primary => run_primary(&config, &image, stop)?,
        Part::Secondary => run_secondary(&config, &stop)?,
    })
}
