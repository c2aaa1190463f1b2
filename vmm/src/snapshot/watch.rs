//! A snapshot file whose pages are somebody's memory: whether it is still what it was when it was opened.
//!
//! Invariants: a change by `write` or `truncate` after [`Watch::new`] is told by [`Watch::check`], whose descriptor wakes who
//! polls; a page that is gone or cannot be read ends the process with a text that names the file, not by a bare signal.
//!
//! Does not notice what another process writes through a mapping of its own, nor another host's changes to a file system
//! that they share: those are what `--verify` is for, as far as they come before the start.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::error::SnapshotError;

/// What the status of a process says that something failed while it ran.
const FAILED: libc::c_int = 1;

/// Looks after one file.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    file: File,
    /// Tells of changes; none where the system has no more of these.
    changes: Option<File>,
    bytes: u64,
}

impl Watch {
    /// From before anything of `file` is read on.
    pub(super) fn new(path: &Path, file: &File) -> io::Result<Self> {
        let changes = changes_of(file);
        let changes = changes
            .inspect_err(|e| tracing::warn!("{}: changes will not be noticed: {e}", path.display()))
            .ok();
        name_bus_errors(path);
        Ok(Self {
            path: path.to_owned(),
            file: file.try_clone()?,
            changes,
            bytes: file.metadata()?.len(),
        })
    }

    /// Becomes readable when the file is changed; -1 if nobody tells.
    pub fn poll_fd(&self) -> RawFd {
        self.changes.as_ref().map_or(-1, File::as_raw_fd)
    }

    /// Whether it is what it was. Once it is not, nobody knows what its pages are.
    pub fn check(&self) -> Result<(), SnapshotError> {
        // A cut is in the length before pages are gone, and told of afterwards.
        let is_cut = self.file.metadata().is_ok_and(|now| now.len() < self.bytes);
        let mut event = [0; 256];
        let is_told = self
            .changes
            .as_ref()
            .is_some_and(|mut changes| changes.read(&mut event).is_ok_and(|bytes| bytes > 0));
        match is_cut || is_told {
            true => Err(SnapshotError::Changed(self.path.clone())),
            false => Ok(()),
        }
    }
}

/// A descriptor that becomes readable when somebody writes to this very file or cuts it; whatever replaces it under its name is
/// another one.
fn changes_of(file: &File) -> io::Result<File> {
    // SAFETY: the call takes flags and gives a new descriptor or -1.
    let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made by the kernel and nobody else owns it.
    let changes = unsafe { File::from_raw_fd(fd) };
    let name = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    // SAFETY: the name is a C string that lives during the call.
    match unsafe { libc::inotify_add_watch(fd, name.as_ptr(), libc::IN_MODIFY) } {
        0.. => Ok(changes),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What is said when a page cannot be had: bytes that live for ever.
static LAST_WORDS: AtomicPtr<Vec<u8>> = AtomicPtr::new(std::ptr::null_mut());

/// From now on a page of a file that is not there any more ends this process with words about `path`.
fn name_bus_errors(path: &Path) {
    static CAUGHT: OnceLock<()> = OnceLock::new();
    let words = format!(
        "{}: a page of it cannot be read (SIGBUS): it was cut short, or its disk fails; the guest's memory is lost, \
         restore it from a whole copy\n",
        path.display()
    );
    // A process opens one snapshot, or a few.
    let words = Box::leak(Box::new(words.into_bytes()));
    LAST_WORDS.store(words, Ordering::Release);
    CAUGHT.get_or_init(|| {
        let handler = on_bus_error as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler makes two system calls and uses nothing that is not static.
        unsafe { libc::signal(libc::SIGBUS, handler) };
    });
}

extern "C" fn on_bus_error(_signal: libc::c_int) {
    // SAFETY: null, or words that are never freed or changed.
    if let Some(words) = unsafe { LAST_WORDS.load(Ordering::Acquire).as_ref() } {
        // SAFETY: the bytes live for ever.
        unsafe { libc::write(libc::STDERR_FILENO, words.as_ptr().cast(), words.len()) };
    }
    // SAFETY: ends the process; nothing of it is run or dropped any more.
    unsafe { libc::_exit(FAILED) };
}
