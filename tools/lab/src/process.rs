//! A child process with its output in a file and, for `colo`, a status document to wait on.
//!
//! Invariants: the child dies with the value (SIGKILL) and with the thread that started it; signals go to
//! this child's process id only, and never after it was waited for.
//!
//! Does not interpret status documents beyond what callers ask of them.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How often conditions are looked at.
const POLL: Duration = Duration::from_millis(10);
/// Longest wait for one status answer.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// Lines of log that errors carry.
const TAIL_LINES: usize = 15;

/// What can go wrong with a child.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("cannot start {name}: {source}")]
    Start {
        /// Name of the child.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// A signal or wait failed.
    #[error("{name}: {what}: {source}")]
    Control {
        /// Name of the child.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It ended while something was expected of it.
    #[error("{name} ended ({status}) before it was {awaited}; its log ends with:\n{tail}")]
    Ended {
        /// Name of the child.
        name: String,
        /// How it ended.
        status: ExitStatus,
        /// What was waited for.
        awaited: String,
        /// End of its log.
        tail: String,
    },
    /// A condition did not come true in time.
    #[error(
        "{name} was not {awaited} after {seconds} s; status: {last}; its log ends with:\n{tail}"
    )]
    Timeout {
        /// Name of the child.
        name: String,
        /// What was waited for.
        awaited: String,
        /// How long.
        seconds: u64,
        /// Last status document or error.
        last: String,
        /// End of its log.
        tail: String,
    },
}

/// A running (or ended) child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    status_socket: Option<PathBuf>,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with its output in `DIR/NAME.log`.
    pub fn spawn(name: &str, mut command: Command, dir: &Path) -> Result<Self, ProcessError> {
        let start = |source| ProcessError::Start {
            name: name.to_owned(),
            source,
        };
        let log = dir.join(format!("{name}.log"));
        let out = File::create(&log).map_err(start)?;
        let err = out.try_clone().map_err(start)?;
        command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0);
        // SAFETY: between fork and exec only `prctl` is called, which is async-signal-safe.
        unsafe { command.pre_exec(die_with_parent) };
        let child = command.spawn().map_err(start)?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
            status_socket: None,
            ended: None,
        })
    }

    /// Says where its status document can be read.
    pub fn with_status(mut self, socket: &Path) -> Self {
        self.status_socket = Some(socket.to_owned());
        self
    }

    /// Where its status document can be read, if it has one.
    pub fn status_socket(&self) -> Option<&Path> {
        self.status_socket.as_deref()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Bytes of memory in its memory files whose name contains this; 0 without any.
    pub fn memory_file_bytes(&self, name: &str) -> io::Result<u64> {
        let folder = std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?;
        let is_it = |path: &PathBuf| {
            let file = std::fs::read_link(path);
            file.is_ok_and(|file| file.to_string_lossy().contains(name))
        };
        let mut paths = folder.flatten().map(|entry| entry.path());
        // Descriptors that were copied are of the same file.
        match paths.find(is_it) {
            Some(path) => Ok(std::fs::metadata(path)?.blocks() * 512),
            None => Ok(0),
        }
    }

    /// Its name, as in its log file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its whole output so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The last lines of its output.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    /// Reads its status document once.
    pub fn status(&self) -> Result<Value, io::Error> {
        match &self.status_socket {
            Some(socket) => read_status(socket),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "no status socket configured",
            )),
        }
    }

    /// Waits until its status document fulfils `condition`, and gives that document.
    pub fn wait_status(
        &mut self,
        awaited: &str,
        timeout: Duration,
        mut condition: impl FnMut(&Value) -> bool,
    ) -> Result<Value, ProcessError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.poll_exit()? {
                return Err(self.ended(status, awaited));
            }
            let last = match self.status() {
                Ok(document) if condition(&document) => return Ok(document),
                Ok(document) => document.to_string(),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= deadline {
                return Err(self.timeout(awaited, timeout, last));
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until it has ended by itself.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<ExitStatus, ProcessError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.poll_exit()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(self.timeout("ended", timeout, "still running".to_owned()));
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until it stands still after a SIGSTOP that it raised itself.
    pub fn wait_frozen(&mut self, timeout: Duration) -> Result<(), ProcessError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.poll_exit()? {
                return Err(self.ended(status, "stopped"));
            }
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()));
            // The state follows the command name, which ends with the last parenthesis.
            let state = stat.ok().and_then(|stat| {
                let after = stat.rsplit_once(')')?.1.to_owned();
                after.trim_start().chars().next()
            });
            if state == Some('T') {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.timeout("stopped", timeout, format!("state {state:?}")));
            }
            thread::sleep(POLL);
        }
    }

    /// How it ended, if it did.
    pub fn poll_exit(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        if self.ended.is_none() {
            self.ended = self
                .child
                .try_wait()
                .map_err(|source| self.control("wait", source))?;
        }
        Ok(self.ended)
    }

    /// SIGKILL, as a host that loses power, and waits for its end.
    pub fn kill(&mut self) -> Result<ExitStatus, ProcessError> {
        self.signal(libc::SIGKILL)?;
        let status = self
            .child
            .wait()
            .map_err(|source| self.control("wait", source))?;
        self.ended = Some(status);
        Ok(status)
    }

    /// SIGSTOP: the process stands still until [`Self::resume`].
    pub fn freeze(&mut self) -> Result<(), ProcessError> {
        self.signal(libc::SIGSTOP)
    }

    /// SIGCONT.
    pub fn resume(&mut self) -> Result<(), ProcessError> {
        self.signal(libc::SIGCONT)
    }

    /// SIGTERM, a request for an orderly end.
    pub fn terminate(&mut self) -> Result<(), ProcessError> {
        self.signal(libc::SIGTERM)
    }

    fn signal(&mut self, signal: i32) -> Result<(), ProcessError> {
        if self.poll_exit()?.is_some() {
            return Ok(());
        }
        let pid = i32::try_from(self.child.id())
            .map_err(|_| self.control("signal", io::Error::from_raw_os_error(libc::ESRCH)))?;
        // SAFETY: plain system call; the child was not waited for, so the id is still its own.
        if unsafe { libc::kill(pid, signal) } == 0 {
            Ok(())
        } else {
            Err(self.control("signal", io::Error::last_os_error()))
        }
    }

    fn control(&self, what: &'static str, source: io::Error) -> ProcessError {
        ProcessError::Control {
            name: self.name.clone(),
            what,
            source,
        }
    }

    /// The error for an end that came before something else.
    pub fn ended(&self, status: ExitStatus, awaited: &str) -> ProcessError {
        ProcessError::Ended {
            name: self.name.clone(),
            status,
            awaited: awaited.to_owned(),
            tail: self.log_tail(),
        }
    }

    fn timeout(&self, awaited: &str, timeout: Duration, last: String) -> ProcessError {
        ProcessError::Timeout {
            name: self.name.clone(),
            awaited: awaited.to_owned(),
            seconds: timeout.as_secs(),
            last,
            tail: self.log_tail(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended and was waited for.
        self.kill().ok();
    }
}

/// Reads one status document from a status socket: connect, read to the end, parse.
pub fn read_status(socket: &Path) -> io::Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(STATUS_TIMEOUT))?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    serde_json::from_slice(&text).map_err(io::Error::other)
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: plain system call with constant arguments.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (tempfile::TempDir, Process) {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let process = Process::spawn("shell", command, dir.path()).unwrap();
        (dir, process)
    }

    #[test]
    fn output_is_kept_and_the_end_is_seen() {
        let (_dir, mut process) = shell("echo one; echo two >&2; exit 3");
        let status = process.wait_exit(Duration::from_secs(10)).unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(process.log(), "one\ntwo\n");
    }

    #[test]
    fn waiting_for_the_status_of_an_ended_process_shows_its_log() {
        let (dir, process) = shell("echo cannot open tap0; exit 1");
        let mut process = process.with_status(&dir.path().join("none.sock"));
        let error = process
            .wait_status("ready", Duration::from_secs(10), |_| true)
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("before it was ready") && text.contains("tap0"),
            "{text}"
        );
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let (_dir, process) = shell("sleep 1000");
        let proc_entry = PathBuf::from(format!("/proc/{}", process.pid()));
        assert!(proc_entry.exists());
        drop(process);
        assert!(!proc_entry.exists());
    }
}
