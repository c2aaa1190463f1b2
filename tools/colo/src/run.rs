//! `colo run`: one virtual machine, not replicated.
//!
//! Invariants: dirty logging stays off, there is no comparator, and besides this thread only those
//! of the vCPUs and the worker exist.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use colo_fastpath::nic::{Filter, Nic};
use colo_vmm::config::{Config, ConfigError, Kernel};
use colo_vmm::machine::{BootError, Events, Machine, MachineError, VmExit};
use colo_vmm::nic::{self, NicError};
use colo_vmm::replication::ReplicaError;
use colo_vmm::requests::RequestSocket;
use colo_vmm::snapshot::{self, Snapshot, SnapshotError, Watch};
use colo_vmm::status::{MachineStatus, StatusError, StatusSocket};
use tracing::{error, info, warn};

use crate::BAD_CONFIGURATION;
use crate::stop::{Stop, catch_signals};

/// A machine could not be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("vm.kernel = builtin:{0}: there is no such image; builtin:demo is the only one")]
    NoSuchImage(String),
    #[error(transparent)]
    Nic(#[from] NicError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Status(#[from] StatusError),
    #[error("{}: {source}", path.display())]
    NotReplicated { path: PathBuf, source: ReplicaError },
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("waiting failed: {0}")]
    Wait(#[from] io::Error),
}

impl RunError {
    /// 2 for what the configuration says, 1 for what happened.
    pub(crate) fn exit_code(&self) -> ExitCode {
        let image = |e: &BootError| !matches!(e, BootError::Memory(_));
        match self {
            Self::Config(_) | Self::NoSuchImage(_) => ExitCode::from(BAD_CONFIGURATION),
            Self::Nic(e) | Self::Replica(ReplicaError::Nic(e)) if e.is_configuration() => {
                ExitCode::from(BAD_CONFIGURATION)
            }
            Self::Machine(MachineError::Boot { source, .. })
            | Self::Replica(ReplicaError::Machine(MachineError::Boot { source, .. }))
                if image(source) =>
            {
                ExitCode::from(BAD_CONFIGURATION)
            }
            Self::NotReplicated { .. } | Self::Snapshot(SnapshotError::Geometry { .. }) => {
                ExitCode::from(BAD_CONFIGURATION)
            }
            _ => ExitCode::FAILURE,
        }
    }
}

/// Where a machine starts from, if not from its kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Restore<'a> {
    pub(crate) snapshot: &'a Path,
    /// Read all pages before the machine starts.
    pub(crate) verify: bool,
}

/// Runs the machine of a configuration file until it ends.
pub(crate) fn run(path: &Path, restore: Option<Restore<'_>>) -> ExitCode {
    match try_run(path, restore) {
        Ok(VmExit::PowerOff | VmExit::Stopped) => ExitCode::SUCCESS,
        Ok(fault) => {
            error!("{fault}");
            ExitCode::FAILURE
        }
        Err(e) => {
            error!("{e}");
            e.exit_code()
        }
    }
}

fn try_run(path: &Path, restore: Option<Restore<'_>>) -> Result<VmExit, RunError> {
    let config = Config::read(path)?;
    let snapshot = restore.map(|from| open(from, &config)).transpose()?;
    let stop = catch_signals()?;
    let status = config
        .host
        .status
        .as_deref()
        .map(|path| Ok::<_, StatusError>((StatusSocket::bind(path)?, RequestSocket::bind(path)?)))
        .transpose()?;
    let (status, requests) = status.unzip();
    let (machine, events, carrier) = match &snapshot {
        Some(snapshot) => restored(&config, snapshot)?,
        None => booted(&config)?,
    };
    let source = snapshot.map(Snapshot::into_watch);
    check(source.as_ref())?;
    let started = Instant::now();
    machine.resume_vcpus()?;
    info!("{} runs on {carrier}", config.vm.name);

    let document = || {
        let status = MachineStatus::of(&machine, &config.vm.name, "solo", "running", started);
        serde_json::to_value(status).unwrap_or_default()
    };
    loop {
        let request_fd = requests.as_ref().map_or(-1, RequestSocket::poll_fd);
        let event_fd = events.wake_fd().as_raw_fd();
        let source_fd = source.as_ref().map_or(-1, Watch::poll_fd);
        wait(&stop, [event_fd, request_fd, source_fd], status.as_ref())?;
        // A guest whose pages are gone ends as well, and this says why.
        check(source.as_ref())?;
        if let Some(event) = events.next() {
            info!("{}: {}", config.vm.name, event.exit);
            return Ok(event.exit);
        }
        if stop.is_asked() {
            info!("{}: stopped by a signal", config.vm.name);
            return Ok(VmExit::Stopped);
        }
        if let Some(status) = &status {
            status.answer(document);
        }
        while let Some(request) = requests.as_ref().and_then(RequestSocket::next) {
            snapshot::serve(request, &machine, &config);
        }
    }
}

/// That the file in which a restored machine's memory is was left alone.
fn check(source: Option<&Watch>) -> Result<(), SnapshotError> {
    source.map_or(Ok(()), Watch::check)
}

/// A snapshot that belongs to this configuration.
fn open(from: Restore<'_>, config: &Config) -> Result<Snapshot, RunError> {
    let snapshot = Snapshot::open(from.snapshot)?;
    snapshot.check_geometry(config, config.host.shards)?;
    if let Some(warning) = ignored(config) {
        warn!("{warning}");
    }
    if from.verify {
        snapshot.verify()?;
    }
    Ok(snapshot)
}

/// What the configuration asks for and a restore does not give.
fn ignored(config: &Config) -> Option<&'static str> {
    config.vm.hugepages.then_some(
        "vm.hugepages = true is ignored by a restore: pages come from the snapshot, 4 KiB each, as the guest touches them; \
         start without --restore to have RAM in pages of 2 MiB",
    )
}

/// A machine in front of its kernel's first instruction.
fn booted(config: &Config) -> Result<(Machine, Events, String), RunError> {
    let image = guest_image(config)?;
    let (nics, carrier) = ends(config)?;
    let (machine, events) = Machine::create_stopped(config, nics, Box::new(io::stdout()))?;
    machine.load(&image)?;
    Ok((machine, events, carrier))
}

/// A machine where a snapshot left it.
fn restored(config: &Config, snapshot: &Snapshot) -> Result<(Machine, Events, String), RunError> {
    let (nics, carrier) = ends(config)?;
    let console = Box::new(io::stdout());
    let (machine, events) = Machine::create_around(snapshot.ram()?, config, nics, console)?;
    snapshot.apply(&machine)?;
    Ok((machine, events, carrier))
}

/// The ends of the NIC, one for each shard, and how it works.
fn ends(config: &Config) -> Result<(Vec<Box<dyn Nic>>, String), RunError> {
    let filter = Filter::Guest(config.net.mac);
    let nics = nic::open(&config.net, filter, config.host.shards)?;
    let carrier = nics.first().map_or_else(String::new, |nic| nic.describe());
    Ok((nics, carrier))
}

/// Reads or finds the guest's image.
pub(crate) fn guest_image(config: &Config) -> Result<Vec<u8>, RunError> {
    match config.vm.kernel() {
        Kernel::File(path) => Ok(config.vm.read_kernel(&path)?),
        Kernel::Builtin(name) if name == "demo" => Ok(colo_guest_image::ELF.to_vec()),
        Kernel::Builtin(name) => Err(RunError::NoSuchImage(name)),
    }
}

/// Until a signal, a status client, or one of `others`, which are skipped if negative.
pub(crate) fn wait(stop: &Stop, others: [i32; 3], status: Option<&StatusSocket>) -> io::Result<()> {
    let status = status.map_or(-1, StatusSocket::poll_fd);
    let [first, second, third] = others;
    let mut fds = [stop.poll_fd(), first, second, third, status].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: five pollfds on this stack; a negative descriptor is skipped.
    let answer = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    match io::Error::last_os_error() {
        e if answer < 0 && e.kind() != io::ErrorKind::Interrupted => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_that_cannot_have_huge_pages_says_so_by_the_name_of_the_field() {
        let config = |more: &str| {
            let text = format!(
                "[vm]\nname = \"test\"\nkernel = \"none\"\nram_mib = 64\n{more}\n\
                 [net]\ntap = \"none\"\nmac = \"52:54:00:c0:10:01\"\n"
            );
            Config::parse(Path::new("test.toml"), &text).unwrap()
        };
        let told = ignored(&config("hugepages = true"));
        assert!(told.is_some_and(|told| told.contains("vm.hugepages")));
        assert_eq!(ignored(&config("hugepages = false")), None);
        assert_eq!(ignored(&config("")), None);
    }
}
