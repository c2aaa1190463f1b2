//! `colo run`: one virtual machine, not replicated.
//!
//! Invariants: dirty logging stays off, there is no comparator, and besides this thread only those
//! of the vCPUs and the worker exist.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use colo_fastpath::nic::Filter;
use colo_vmm::config::{Config, ConfigError, Kernel};
use colo_vmm::machine::{BootError, Machine, MachineError, VmExit};
use colo_vmm::nic::{self, NicError};
use colo_vmm::replication::ReplicaError;
use colo_vmm::status::{MachineStatus, StatusError, StatusSocket};
use tracing::{error, info};

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
            Self::Machine(MachineError::Boot { source, .. }) if image(source) => {
                ExitCode::from(BAD_CONFIGURATION)
            }
            Self::NotReplicated { .. } => ExitCode::from(BAD_CONFIGURATION),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Runs the machine of a configuration file until it ends.
pub(crate) fn run(path: &Path) -> ExitCode {
    match try_run(path) {
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

fn try_run(path: &Path) -> Result<VmExit, RunError> {
    let config = Config::read(path)?;
    let image = guest_image(&config)?;
    let stop = catch_signals()?;
    let status = config
        .host
        .status
        .as_deref()
        .map(StatusSocket::bind)
        .transpose()?;
    let nic = nic::open(&config.net, Filter::Guest(config.net.mac))?;
    let carrier = nic.describe();
    let (machine, events) = Machine::create_stopped(&config, vec![nic], Box::new(io::stdout()))?;
    machine.load(&image)?;
    drop(image);
    let started = Instant::now();
    machine.resume_vcpus()?;
    info!("{} runs on {carrier}", config.vm.name);

    let document = || {
        let status = MachineStatus::of(&machine, &config.vm.name, "solo", "running", started);
        serde_json::to_value(status).unwrap_or_default()
    };
    loop {
        wait(&stop, events.wake_fd().as_raw_fd(), status.as_ref())?;
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
    }
}

/// Reads or finds the guest's image.
pub(crate) fn guest_image(config: &Config) -> Result<Vec<u8>, RunError> {
    match config.vm.kernel() {
        Kernel::File(path) => Ok(config.vm.read_kernel(&path)?),
        Kernel::Builtin(name) if name == "demo" => Ok(colo_guest_image::ELF.to_vec()),
        Kernel::Builtin(name) => Err(RunError::NoSuchImage(name)),
    }
}

/// Until a signal, an event of the guest, or a status client. Without a guest, `events` is negative.
pub(crate) fn wait(stop: &Stop, events: i32, status: Option<&StatusSocket>) -> io::Result<()> {
    let status = status.map_or(-1, StatusSocket::poll_fd);
    let mut fds = [stop.poll_fd(), events, status].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: three pollfds on this stack; a negative descriptor is skipped.
    let answer = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    match io::Error::last_os_error() {
        e if answer < 0 && e.kind() != io::ErrorKind::Interrupted => Err(e),
        _ => Ok(()),
    }
}
