//! Network namespaces: make one, run a command or a thread inside it, remove it.
//!
//! Invariants: a [`Netns`] removes its name when dropped; a thread that entered a namespace never leaves
//! it again (it ends there), so no caller's thread changes namespace.
//!
//! Does not configure interfaces beyond passing batches to the `ip` command.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

/// Where the `ip` command keeps named namespaces.
pub const NETNS_DIR: &str = "/run/netns";

/// What can go wrong when the network is built.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The `ip` command is not installed.
    #[error("cannot run `{program}`: {source}; install the Debian package `{package}`")]
    MissingProgram {
        /// The program.
        program: &'static str,
        /// The package that has it.
        package: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Namespaces need root.
    #[error("network namespaces need root (effective user id is {uid}); run with sudo")]
    NotRoot {
        /// Effective user id.
        uid: u32,
    },
    /// `ip` refused.
    #[error("`{command}` failed: {stderr}")]
    Refused {
        /// The command or batch.
        command: String,
        /// What it wrote to its standard error.
        stderr: String,
    },
    /// An operation on a namespace file or thread failed.
    #[error("network namespace {name}: {what}: {source}")]
    Namespace {
        /// Name of the namespace.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A file or socket operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

/// A named network namespace, removed on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
}

impl Netns {
    /// Makes a namespace with its loopback interface up.
    pub fn create(name: &str) -> Result<Self, NetError> {
        require_root()?;
        ip(&["netns", "add", name])?;
        let opened = File::open(format!("{NETNS_DIR}/{name}"));
        let file = match opened {
            Ok(file) => Arc::new(file),
            Err(source) => {
                // The name exists already; do not leave it behind.
                ip(&["netns", "del", name]).ok();
                let name = name.to_owned();
                return Err(NetError::Namespace {
                    name,
                    what: "open",
                    source,
                });
            }
        };
        let netns = Self {
            name: name.to_owned(),
            file,
        };
        netns.batch("link set lo up\n")?;
        Ok(netns)
    }

    /// The name under which `ip netns exec` finds it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs lines of `ip` commands (without the leading `ip`) inside.
    pub fn batch(&self, lines: &str) -> Result<(), NetError> {
        ip_batch(&["-n", &self.name], lines)
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        let enter = move || set_netns(file.as_raw_fd());
        // SAFETY: between fork and exec only `setns` is called, which is async-signal-safe; the closure
        // owns a reference to the file, so the descriptor is open.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Starts a thread that runs `body` inside; sockets that it opens belong to this namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        thread_name: &str,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<Result<T, NetError>>, NetError> {
        let file = Arc::clone(&self.file);
        let name = self.name.clone();
        thread::Builder::new()
            .name(thread_name.to_owned())
            .spawn(move || {
                set_netns(file.as_raw_fd()).map_err(|source| NetError::Namespace {
                    name,
                    what: "enter",
                    source,
                })?;
                Ok(body())
            })
            .map_err(|source| self.error("start a thread", source))
    }

    /// Runs `body` inside, in a thread of its own, and waits for it.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                set_netns(self.file.as_raw_fd()).map_err(|source| self.error("enter", source))?;
                Ok(body())
            });
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes one kernel setting under `/proc/sys/net`, as seen inside.
    pub fn set_sysctl(&self, path: &str, value: &str) -> Result<(), NetError> {
        let full = format!("/proc/sys/net/{path}");
        self.run(|| std::fs::write(&full, value))?
            .map_err(|source| NetError::Io {
                what: format!("write {value} to {full}"),
                source,
            })
    }

    fn error(&self, what: &'static str, source: io::Error) -> NetError {
        NetError::Namespace {
            name: self.name.clone(),
            what,
            source,
        }
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; `sweep` finds the name later.
        ip(&["netns", "del", &self.name]).ok();
    }
}

/// Runs `ip` with these arguments.
pub(crate) fn ip(args: &[&str]) -> Result<(), NetError> {
    let output = Command::new("ip")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(no_ip)?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetError::Refused {
        command: format!("ip {}", args.join(" ")),
        stderr,
    })
}

/// Runs a batch of lines through `ip PREFIX -batch -`.
pub(crate) fn ip_batch(prefix: &[&str], lines: &str) -> Result<(), NetError> {
    let mut child = Command::new("ip")
        .args(prefix)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(no_ip)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(lines.as_bytes())
            .map_err(|source| NetError::Io {
                what: "write to ip".to_owned(),
                source,
            })?;
    }
    let output = child.wait_with_output().map_err(|source| NetError::Io {
        what: "wait for ip".to_owned(),
        source,
    })?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetError::Refused {
        command: format!("ip {} -batch:\n{lines}", prefix.join(" ")),
        stderr,
    })
}

fn no_ip(source: io::Error) -> NetError {
    NetError::MissingProgram {
        program: "ip",
        package: "iproute2",
        source,
    }
}

fn require_root() -> Result<(), NetError> {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let uid = unsafe { libc::geteuid() };
    if uid == 0 {
        Ok(())
    } else {
        Err(NetError::NotRoot { uid })
    }
}

fn set_netns(fd: RawFd) -> io::Result<()> {
    // SAFETY: `fd` is an open namespace file (the callers hold it); the call changes this thread only.
    if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
