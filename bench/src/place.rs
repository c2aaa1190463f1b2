//! Where a benchmark works: the `colo` binary, scratch directories, what kind of machine this is.
//!
//! Invariants: each guest or pair gets a directory of its own, so that no file of one is seen by another.

use std::path::{Path, PathBuf};
use std::thread;

use colo_lab::comparator::ComparatorError;
use colo_lab::netns::NetError;
use colo_lab::pair::{PairError, Settings};
use colo_lab::process::ProcessError;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error(transparent)]
    Pair(#[from] PairError),
    #[error(transparent)]
    Comparator(#[from] ComparatorError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("there is no {}; build it with `cargo build --release -p colo` or name it with --colo", .0.display())]
    NoColo(PathBuf),
    #[error("{what}: {source}")]
    Io {
        what: String,
        source: std::io::Error,
    },
    #[error("{program} gave no {what}; it said:\n{output}")]
    Unreadable {
        program: &'static str,
        what: &'static str,
        output: String,
    },
    #[error("colo compare --sockets asked for {requests} checkpoints though all frames were equal")]
    Compared { requests: u64 },
    #[error("the guest of the measurement cannot {what}: {why}")]
    Guest { what: &'static str, why: String },
    #[error("the measurement failed: {0}")]
    Failed(String),
    #[error("the pair lost its protection during the measurement; primary's status: {0}")]
    Unprotected(Value),
}

impl BenchError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// What a benchmark gives.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// For people.
    pub(crate) text: String,
    /// For programs: everything measured.
    pub(crate) json: Value,
    /// Nothing was lost or wrong.
    pub(crate) clean: bool,
}

/// The benchmark's surroundings.
#[derive(Debug)]
pub(crate) struct Place {
    colo: PathBuf,
    machine: Value,
}

impl Place {
    /// With the given binary, or the one beside this program.
    pub(crate) fn new(colo: Option<&Path>) -> Result<Self, BenchError> {
        let colo = match colo {
            Some(path) => path.to_owned(),
            None => std::env::current_exe()
                .map_err(BenchError::io("find this program"))?
                .with_file_name("colo"),
        };
        if !colo.is_file() {
            return Err(BenchError::NoColo(colo));
        }
        // Guests start in other namespaces but in this working directory.
        let what = format!("find {}", colo.display());
        let colo = colo.canonicalize().map_err(BenchError::io(what))?;
        let machine = json!({
            "cores": thread::available_parallelism().map_or(0, usize::from),
            "cpu": cpu_model(),
            "kernel": read_word("/proc/sys/kernel/osrelease", 0),
            "load_average": read_word("/proc/loadavg", 0),
        });
        Ok(Self { colo, machine })
    }

    /// The usual settings.
    pub(crate) fn settings(&self) -> Settings {
        Settings::new(&self.colo)
    }

    /// The binary under test.
    pub(crate) fn colo(&self) -> &Path {
        &self.colo
    }

    /// A new scratch directory.
    pub(crate) fn scratch(&self) -> Result<TempDir, BenchError> {
        tempfile::Builder::new()
            .prefix("colo-bench-")
            .tempdir()
            .map_err(BenchError::io("make a scratch directory"))
    }

    /// One line that belongs to every figure.
    pub(crate) fn machine_text(&self) -> String {
        let part = |key: &str| self.machine[key].as_str().unwrap_or("?").to_owned();
        format!(
            "{} cores ({}), Linux {}, load average {} at the start",
            self.machine["cores"],
            part("cpu"),
            part("kernel"),
            part("load_average"),
        )
    }

    /// Writes a benchmark's document, with the machine added: to each row of a list, which has no other place for it.
    pub(crate) fn write_json(&self, file: &Path, mut document: Value) -> Result<(), BenchError> {
        let parts = match &mut document {
            Value::Array(rows) => rows.as_mut_slice(),
            whole => std::slice::from_mut(whole),
        };
        for part in parts {
            if let Value::Object(fields) = part {
                fields.insert("machine".to_owned(), self.machine.clone());
            }
        }
        let what = format!("write {}", file.display());
        std::fs::write(file, format!("{document:#}\n")).map_err(BenchError::io(what))
    }
}

fn read_word(path: &str, index: usize) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.split_whitespace().nth(index).map(str::to_owned)
}

fn cpu_model() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
