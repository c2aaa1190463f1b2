//! Kernels and accounts that give less than this machine does: without AF_XDP, or with little memory that may be locked.
//!
//! Invariants: what is taken away is taken from the processes that a test starts, never from the machine; nothing of it
//! outlives the test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use colo_lab::seccomp::refuse_call;
use libc::{AF_XDP, EAFNOSUPPORT, SYS_socket};

/// What may be locked into memory: not as much as any queue's frames.
pub const LOCKED_BYTES: u32 = 64 << 10;

/// What [`with_little_locked_memory`] needs beside the command.
pub const PROGRAMS: [&str; 2] = ["prlimit", "setpriv"];

/// Runs `body` in a thread to which, and to whose children, this kernel has no AF_XDP.
pub fn without_af_xdp<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let lesser = scope.spawn(|| {
            // As in a kernel without CONFIG_XDP_SOCKETS.
            let refused = refuse_call(SYS_socket, 0, AF_XDP as u32, EAFNOSUPPORT);
            refused.expect("a filter of system calls");
            body()
        });
        lesser.join().expect("the test's part on a lesser kernel")
    })
}

/// A command in `dir` that is `colo`, but may lock [`LOCKED_BYTES`] only, whoever starts it.
pub fn with_little_locked_memory(colo: &Path, dir: &Path) -> std::io::Result<PathBuf> {
    let file = dir.join("colo-with-little-locked-memory");
    let text = format!(
        "#!/bin/sh\n\
         exec prlimit --memlock={LOCKED_BYTES}:{LOCKED_BYTES} \
         setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock '{}' \"$@\"\n",
        colo.display()
    );
    fs::write(&file, text)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    Ok(file)
}
