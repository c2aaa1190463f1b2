//! The status socket: who connects gets one JSON document.
//!
//! Invariants: a client that does not read cannot hold anything up; a stale socket file of a dead
//! process is replaced, one in use is an error.
//!
//! Does not know what is in the document besides the parts every machine has.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use colo_fastpath::stages::{StageReport, Stages};
use colo_fastpath::stats::WorkerSnapshot;
use colo_fastpath::worker::NicReport;
use serde::Serialize;

use crate::devices::net::ControlSnapshot;
use crate::machine::{ExitSnapshot, Machine};

/// A document larger than the socket's buffer is cut off rather than waited for.
const WRITE_TIMEOUT: Duration = Duration::from_millis(100);

/// The status socket could not be made or asked.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// Somebody answers there.
    #[error("host.status: {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("host.status: {} exists and is not a socket; remove it", .0.display())]
    NotASocket(PathBuf),
    /// A call failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What every running machine reports.
#[derive(Clone, Debug, Serialize)]
pub struct MachineStatus {
    /// `vm.name`
    pub name: String,
    /// `solo`, `primary`, `secondary`, ...
    pub role: String,
    /// `running`, `paused`, or how it ended.
    pub guest: String,
    /// Since this process made the machine.
    pub uptime_s: f64,
    /// One per vCPU.
    pub exits: Vec<ExitSnapshot>,
    /// The packet workers, all shards together.
    pub worker: WorkerSnapshot,
    /// Each of them, if there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<WorkerSnapshot>,
    /// How much of the guest's payload left from where it lay; null before any did.
    pub tx_in_place_pct: Option<f64>,
    /// The network device's control queue.
    pub control: ControlSnapshot,
    /// The NIC; absent once the worker has ended.
    pub nic: Option<NicReport>,
    /// Times of its stages, with `host.stages`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageReport>,
}

impl MachineStatus {
    /// Reads a machine's counters.
    pub fn of(machine: &Machine, name: &str, role: &str, guest: &str, started: Instant) -> Self {
        let mut nic = None;
        let mut stages: Option<Stages> = None;
        let mut worker = WorkerSnapshot::default();
        let mut workers = Vec::new();
        for one in machine.workers() {
            let counted = one.stats();
            worker.add(&counted);
            workers.push(counted);
            let Ok((end, timed)) =
                one.execute(|edge, _| (edge.nic_report(), edge.stages().cloned()))
            else {
                continue;
            };
            match &mut nic {
                None => nic = Some(end),
                Some(nic) => nic.add(&end),
            }
            match (&mut stages, timed) {
                (Some(stages), Some(timed)) => stages.add(&timed),
                (None, timed) => stages = timed,
                (Some(_), None) => {}
            }
        }
        if workers.len() == 1 {
            workers.clear();
        }
        Self {
            name: name.to_owned(),
            role: role.to_owned(),
            guest: guest.to_owned(),
            uptime_s: started.elapsed().as_secs_f64(),
            exits: machine.exits(),
            tx_in_place_pct: worker.tx_in_place_pct(),
            worker,
            workers,
            control: machine.control(),
            nic,
            stages: stages.map_or_else(Vec::new, |stages| stages.report()),
        }
    }
}

/// A listening status socket. Its file goes away with it.
#[derive(Debug)]
pub struct StatusSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl StatusSocket {
    /// Listens at `path`.
    pub fn bind(path: &Path) -> Result<Self, StatusError> {
        let listener = bind_socket(path)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Readable when [`StatusSocket::answer`] has something to do.
    pub fn poll_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// Gives `document` to everybody who waits.
    pub fn answer(&self, document: impl Fn() -> serde_json::Value) {
        while let Ok((mut client, _)) = self.listener.accept() {
            let text = format!("{:#}\n", document());
            // A client that left or does not read is its own problem.
            let _ = client.set_write_timeout(Some(WRITE_TIMEOUT));
            let _ = client.write_all(text.as_bytes());
        }
    }
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens at `path`, in place of a dead process, without waiting for clients.
pub(crate) fn bind_socket(path: &Path) -> Result<UnixListener, StatusError> {
    let failed = |source| StatusError::Io {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(StatusError::NotASocket(path.to_owned()));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(StatusError::InUse(path.to_owned()));
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Asks the process behind a status socket.
pub fn ask(path: &Path) -> Result<serde_json::Value, StatusError> {
    let failed = |source| StatusError::Io {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    stream.read_to_string(&mut text).map_err(failed)?;
    serde_json::from_str(&text).map_err(|e| failed(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_connects_gets_the_document_and_stale_files_are_replaced() {
        let path = std::env::temp_dir().join(format!("colo-status-{}.sock", std::process::id()));
        let socket = StatusSocket::bind(&path).unwrap();
        let asked = std::thread::spawn({
            let path = path.clone();
            move || ask(&path).unwrap()
        });
        while !asked.is_finished() {
            socket.answer(|| serde_json::json!({ "role": "solo" }));
        }
        assert_eq!(asked.join().unwrap()["role"], "solo");
        assert!(matches!(
            StatusSocket::bind(&path),
            Err(StatusError::InUse(_))
        ));
        drop(socket);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        drop(StatusSocket::bind(&path).unwrap());
        std::fs::write(&path, "").unwrap();
        let refused = StatusSocket::bind(&path).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(refused, StatusError::NotASocket(_)));
        assert!(ask(&path).is_err());
    }
}
