//! The place where a system test works: its turn, a scratch directory, the `colo` binary.
//!
//! Invariants: one test at a time holds a [`Bench`], among all processes of this user; the binary is as new as
//! its sources.

use std::env;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use colo_lab::pair::Settings;
use tempfile::TempDir;

/// Set to a path, it is used instead of the binary of this workspace.
const BINARY_VARIABLE: &str = "COLO_BIN";

/// A test's turn.
#[derive(Debug)]
pub struct Bench {
    dir: TempDir,
    colo: PathBuf,
    _turn: File,
}

impl Bench {
    /// Waits for the turn. `None`, with the reason on standard output, on a machine without one of the
    /// programs, without KVM or without root.
    pub fn new(programs: &[&str]) -> Option<Self> {
        if let Some(why) = missing(programs) {
            println!("SKIPPED: {why}");
            return None;
        }
        let turn = take_turn().expect("lock a file in the temporary directory");
        let dir = tempfile::tempdir().expect("make a temporary directory");
        Some(Self {
            dir,
            colo: colo().to_owned(),
            _turn: turn,
        })
    }

    /// A directory that goes away with the test.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The `colo` binary.
    pub fn colo(&self) -> &Path {
        &self.colo
    }

    /// The usual settings of a guest or pair. Every checkpoint is audited: each test of a pair is one of rule 16.
    pub fn settings(&self) -> Settings {
        Settings {
            audit_every: 1,
            ..Settings::new(&self.colo)
        }
    }
}

/// The `colo` binary of this workspace and profile, built if it is not up to date.
pub fn colo() -> &'static Path {
    static COLO: OnceLock<PathBuf> = OnceLock::new();
    COLO.get_or_init(|| match env::var_os(BINARY_VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => build().expect("find where this test was built"),
    })
}

/// The test is `TARGET/PROFILE/deps/NAME`; the binary is `TARGET/PROFILE/colo`.
fn build() -> io::Result<PathBuf> {
    let this = env::current_exe()?;
    let folder = this.parent().and_then(Path::parent);
    let folder = folder.ok_or_else(|| io::Error::other("not in a target directory"))?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--locked", "--package", "colo"]);
    command
        .arg("--target-dir")
        .arg(folder.parent().unwrap_or(folder));
    if folder.ends_with("release") {
        command.arg("--release");
    }
    let status = command.current_dir(env!("CARGO_MANIFEST_DIR")).status()?;
    assert!(status.success(), "cargo build --package colo: {status}");
    Ok(folder.join("colo"))
}

/// Why a system test cannot run here.
fn missing(programs: &[&str]) -> Option<String> {
    // SAFETY: no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        return Some("needs root".to_owned());
    }
    for device in ["/dev/kvm", "/dev/net/tun"] {
        if let Err(error) = OpenOptions::new().read(true).write(true).open(device) {
            return Some(format!("cannot open {device}: {error}"));
        }
    }
    let missing = programs.iter().find(|program| !installed(program));
    missing.map(|program| format!("{program} is not installed"))
}

/// A program is in the search path.
pub fn installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

fn take_turn() -> io::Result<File> {
    let path = env::temp_dir().join("colo-system-tests.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    // SAFETY: the descriptor is open; the call has no memory effects.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } == 0 {
        Ok(file)
    } else {
        Err(io::Error::last_os_error())
    }
}
