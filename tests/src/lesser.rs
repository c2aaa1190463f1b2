//! Kernels and accounts that give less than this machine does: without AF_XDP, or with little memory that may be locked.
//!
//! Invariants: what is taken away is taken from the processes that a test starts, never from the machine; nothing of it
//! outlives the test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;

/// What may be locked into memory: not as much as any queue's frames.
pub const LOCKED_BYTES: u32 = 64 << 10;

/// What [`with_little_locked_memory`] needs beside the command.
pub const PROGRAMS: [&str; 2] = ["prlimit", "setpriv"];

/// Runs `body` in a thread to which, and to whose children, this kernel has no AF_XDP.
pub fn without_af_xdp<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let lesser = scope.spawn(|| {
            forbid_af_xdp();
            body()
        });
        lesser.join().expect("the test's part on a lesser kernel")
    })
}

/// `socket(AF_XDP, ..)` fails as in a kernel without CONFIG_XDP_SOCKETS. For good, for this thread and its children.
fn forbid_af_xdp() {
    /// Of `struct seccomp_data`: the first argument's lower half.
    const ARGUMENT_AT: u32 = 16;
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let give = libc::BPF_RET | libc::BPF_K;
    let refusal = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
    let filter = [
        (load, 0, 0),
        (equal, libc::SYS_socket as u32, 3),
        (load, ARGUMENT_AT, 0),
        (equal, libc::AF_XDP as u32, 1),
        (give, refusal, 0),
        (give, libc::SECCOMP_RET_ALLOW, 0),
    ]
    .map(|(code, k, jf)| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    });
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: numbers only.
    let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the kernel reads the program, which lives on this stack.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
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
