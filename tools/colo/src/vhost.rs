//! `colo vhost`: a NIC for a guest behind a vhost-user socket, which another VMM or DPDK runs.
//!
//! Invariants: besides this thread there are only the worker and the one that reads the socket; a
//! front-end may come and go as often as it likes.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use colo_fastpath::net_offer::NetOffer;
use colo_fastpath::nic::Filter;
use colo_fastpath::vhost_user::{SocketError, VhostUserServer};
use colo_fastpath::worker::{WorkerConfig, WorkerHandle, spawn_unattached};
use colo_vmm::config::{ConfigError, VhostConfig};
use colo_vmm::nic::{self, NicError};
use colo_vmm::status::{StatusError, StatusSocket};
use serde_json::{Value, json};
use tracing::{error, info};

use crate::BAD_CONFIGURATION;
use crate::run::wait;
use crate::stop::catch_signals;

/// A port could not be served.
#[derive(Debug, thiserror::Error)]
enum VhostError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Nic(#[from] NicError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Status(#[from] StatusError),
    #[error("the packet worker could not be started: {0}")]
    Worker(io::Error),
    #[error("waiting failed: {0}")]
    Wait(#[from] io::Error),
}

/// Serves the socket of a configuration file until a signal comes.
pub(crate) fn run(path: &Path) -> ExitCode {
    match try_run(path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e}");
            ExitCode::from(e.exit_code())
        }
    }
}

impl VhostError {
    /// As that of every command: 2 for what the configuration says, 1 for what happened.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => BAD_CONFIGURATION,
            Self::Nic(e) if e.is_configuration() => BAD_CONFIGURATION,
            _ => 1,
        }
    }
}

fn try_run(path: &Path) -> Result<(), VhostError> {
    let config = VhostConfig::read(path)?;
    let stop = catch_signals()?;
    let status = config.host.status.as_deref().map(StatusSocket::bind);
    let status = status.transpose()?;
    let net = &config.net;
    let nic = nic::open_one(net, Filter::Guest(net.mac))?;
    let carrier = nic.describe();
    let worker_config = WorkerConfig {
        name: "worker".into(),
        poll: config.host.poll,
        cpu: config.host.cpu_of(0),
        frame_slots: config.host.frame_slots,
        tx: config.host.tx,
        stages: config.host.stages,
    };
    let worker = spawn_unattached(worker_config, nic).map_err(VhostError::Worker)?;
    let offer = NetOffer {
        guest_checksum: net.guest_checksum,
        ..NetOffer::new(net.mac, net.mtu)
    };
    let server = VhostUserServer::bind(&config.socket(), worker.clone(), offer)?;
    let started = Instant::now();
    info!("{} is served on {carrier}", config.socket().display());
    while !stop.is_asked() {
        wait(&stop, [-1; 3], status.as_ref())?;
        if let Some(status) = &status {
            status.answer(|| document(&config, &server, &worker, started));
        }
    }
    info!("stopped by a signal");
    drop(server);
    worker.stop();
    Ok(())
}

fn document(
    config: &VhostConfig,
    server: &VhostUserServer,
    worker: &WorkerHandle,
    started: Instant,
) -> Value {
    let guest = if server.is_connected() {
        "connected"
    } else {
        "absent"
    };
    let told = worker.execute(|edge, _| {
        let stages = edge.stages().map(|stages| stages.report());
        (edge.nic_report(), stages)
    });
    let (nic, stages) = told.ok().unzip();
    let counted = worker.stats();
    json!({
        "name": config.socket().display().to_string(),
        "role": "vhost-user",
        "guest": guest,
        "uptime_s": started.elapsed().as_secs_f64(),
        "vhost_user": server.stats(),
        "worker": counted,
        "tx_in_place_pct": counted.tx_in_place_pct(),
        "nic": nic,
        "stages": stages.flatten(),
    })
}

#[cfg(test)]
mod tests {
    use colo_fastpath::nic::TapError;

    use super::*;

    #[test]
    fn a_name_that_no_device_can_have_is_the_configuration_s_fault() {
        let named = NicError::Tap(TapError::BadName("a/b".to_owned()));
        assert_eq!(VhostError::from(named).exit_code(), 2);
        let worker = VhostError::Worker(io::ErrorKind::OutOfMemory.into());
        assert_eq!(worker.exit_code(), 1);
    }
}
