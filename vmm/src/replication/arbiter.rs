//! The `file` arbiter: a compare-and-swap on a generation file under an fcntl lock, durable (rule 18).
//!
//! Invariants: the record is replaced whole (write, fsync, rename, fsync of the folder) while an exclusive lock on
//! `FILE.lock` is held; an answer that could not be made durable is no answer.
//!
//! Does not decide anything: [`Record::decide`] does. Works for two processes on one host and for a shared
//! file system with coherent POSIX locks; two hosts without one need another arbiter.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use colo_control::{Cas, Record, Reply, Standing};
use serde::{Deserialize, Serialize};

/// How long to wait for the lock before the arbiter counts as unavailable.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

/// Why the arbiter's file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// The specification has no known scheme.
    #[error("arbiter {0:?}: write \"file:/path/to/generation\"")]
    Scheme(String),
    /// An operation on the file failed.
    #[error("arbiter file {}: cannot {what}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is not a record.
    #[error("arbiter file {}: {reason}; restore it or, if no host runs the VM, remove it", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Somebody keeps the lock.
    #[error("arbiter file {}: locked by another process for over {LOCK_TIMEOUT:?}", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
}

/// An arbiter in a file.
#[derive(Debug, Clone)]
pub struct FileArbiter {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    generation: u64,
    holder: String,
    standing: String,
    session: Option<u64>,
}

impl FileArbiter {
    /// From a specification as in the configuration, `file:PATH`.
    pub fn from_spec(spec: &str) -> Result<Self, ArbiterError> {
        match spec.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(Self {
                path: PathBuf::from(path),
            }),
            _ => Err(ArbiterError::Scheme(spec.to_owned())),
        }
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The record; `None` if there has never been one.
    pub fn read(&self) -> Result<Option<Record>, ArbiterError> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(self.io("read", e)),
        };
        let malformed = |reason: String| ArbiterError::Malformed {
            path: self.path.clone(),
            reason,
        };
        let stored: Stored = toml::from_str(&text).map_err(|e| malformed(e.to_string()))?;
        let standing = match (stored.standing.as_str(), stored.session) {
            ("alone", _) => Standing::Alone,
            ("off", _) => Standing::Off,
            ("paired", Some(session)) => Standing::Paired { session },
            (other, _) => return Err(malformed(format!("unknown standing {other:?}"))),
        };
        Ok(Some(Record {
            generation: stored.generation,
            holder: stored.holder,
            standing,
        }))
    }

    /// Makes the question and the change, if any, in one step.
    pub fn ask(&self, cas: &Cas) -> Reply {
        match self.try_ask(cas) {
            Ok(reply) => reply,
            Err(e) => Reply::Unavailable(e.to_string()),
        }
    }

    /// Takes the VM for `holder`, which earlier versions called `before`, at start. Without a record, or where `holder`
    /// has it or the VM was shut down, that raises the generation; `Err(record)` inside when another host has it.
    pub fn claim(
        &self,
        holder: &str,
        before: &str,
    ) -> Result<Result<Record, Record>, ArbiterError> {
        let _lock = self.lock()?;
        let generation = match self.read()? {
            None => 0,
            Some(r) if [holder, before].contains(&&*r.holder) || r.standing == Standing::Off => {
                r.generation
            }
            Some(r) => return Ok(Err(r)),
        };
        let record = Record {
            generation: generation + 1,
            holder: holder.to_owned(),
            standing: Standing::Alone,
        };
        self.write(&record)?;
        Ok(Ok(record))
    }

    fn try_ask(&self, cas: &Cas) -> Result<Reply, ArbiterError> {
        let _lock = self.lock()?;
        let Some(record) = self.read()? else {
            return Err(ArbiterError::Malformed {
                path: self.path.clone(),
                reason: "the record is gone".to_owned(),
            });
        };
        Ok(match record.decide(cas) {
            Ok(new) => {
                if new != record {
                    self.write(&new)?;
                }
                Reply::Won(new)
            }
            Err(present) => Reply::Lost(present),
        })
    }

    fn write(&self, record: &Record) -> Result<(), ArbiterError> {
        let (standing, session) = match record.standing {
            Standing::Alone => ("alone", None),
            Standing::Off => ("off", None),
            Standing::Paired { session } => ("paired", Some(session)),
        };
        let stored = Stored {
            generation: record.generation,
            holder: record.holder.clone(),
            standing: standing.to_owned(),
            session,
        };
        let text = toml::to_string(&stored).map_err(|e| ArbiterError::Malformed {
            path: self.path.clone(),
            reason: e.to_string(),
        })?;
        self.replace(text.as_bytes())
            .map_err(|e| self.io("write", e))
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let new = beside(&self.path, ".new");
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    pub(super) fn lock(&self) -> Result<File, ArbiterError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(beside(&self.path, ".lock"))
            .map_err(|e| self.io("open the lock of", e))?;
        let start = Instant::now();
        loop {
            match try_lock(&file) {
                Ok(true) => return Ok(file),
                Ok(false) if start.elapsed() > LOCK_TIMEOUT => {
                    return Err(ArbiterError::Locked {
                        path: self.path.clone(),
                    });
                }
                Ok(false) => std::thread::sleep(Duration::from_millis(1)),
                Err(e) => return Err(self.io("lock", e)),
            }
        }
    }

    fn io(&self, what: &'static str, source: io::Error) -> ArbiterError {
        ArbiterError::Io {
            path: self.path.clone(),
            what,
            source,
        }
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// An open-file-description lock: it belongs to `file`, so that two arbiters of one process exclude each other too.
fn try_lock(file: &File) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the whole call; `lock` is a valid flock the kernel only reads.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(true);
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::EACCES | libc::EAGAIN) => Ok(false),
        _ => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_control::Expect;

    fn arbiter() -> (tempfile::TempDir, FileArbiter) {
        let dir = tempfile::tempdir().unwrap();
        let spec = format!("file:{}", dir.path().join("generation").display());
        let arbiter = FileArbiter::from_spec(&spec).unwrap();
        (dir, arbiter)
    }

    #[test]
    fn rule_18_of_many_concurrent_proposals_exactly_one_wins_each_generation() {
        let (_dir, arbiter) = arbiter();
        let mut record = arbiter.claim("a", "").unwrap().unwrap();
        for _ in 0..20 {
            let swap = |holder: &str| Cas::Swap {
                expect: Expect::Exactly(record.clone()),
                holder: holder.to_owned(),
                standing: Standing::Alone,
            };
            let threads: Vec<_> = ["a", "b", "c", "d"]
                .into_iter()
                .map(|holder| (arbiter.clone(), swap(holder)))
                .map(|(arbiter, cas)| std::thread::spawn(move || arbiter.ask(&cas)))
                .collect();
            let replies: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            let won: Vec<_> = replies
                .iter()
                .filter(|r| matches!(r, Reply::Won(_)))
                .collect();
            assert_eq!(won.len(), 1, "{replies:?}");
            let present = arbiter.read().unwrap().unwrap();
            assert_eq!(won[0], &Reply::Won(present.clone()));
            assert_eq!(present.generation, record.generation + 1);
            record = present;
        }
    }

    #[test]
    fn rule_18_no_answer_is_no_change() {
        let (dir, arbiter) = arbiter();
        let record = arbiter.claim("a", "").unwrap().unwrap();
        let cas = Cas::Confirm(record);
        std::fs::write(dir.path().join("generation"), "generation = what").unwrap();
        assert!(matches!(arbiter.ask(&cas), Reply::Unavailable(m) if m.contains("generation")));
        drop(dir);
        assert!(matches!(arbiter.ask(&cas), Reply::Unavailable(_)));
    }

    #[test]
    fn a_returning_primary_does_not_take_what_another_host_holds() {
        let (_dir, arbiter) = arbiter();
        arbiter.claim("a", "").unwrap().unwrap();
        assert_eq!(arbiter.claim("b", "").unwrap().unwrap_err().holder, "a");
        assert_eq!(arbiter.claim("a", "").unwrap().unwrap().generation, 2);
        // A record of before hosts had longer names.
        assert_eq!(arbiter.claim("a on b", "a").unwrap().unwrap().generation, 3);
        assert_eq!(
            arbiter.claim("a on c", "a").unwrap().unwrap_err().holder,
            "a on b"
        );
    }

    #[test]
    fn a_specification_without_scheme_is_refused() {
        let e = FileArbiter::from_spec("/tmp/x").unwrap_err();
        assert!(e.to_string().contains("file:"), "{e}");
    }
}
