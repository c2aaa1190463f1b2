//! A program's place on an interface: a BPF link.
//!
//! Invariants: dropping an [`XdpLink`] takes the program off at once, also while a process that was
//! just forked still holds a copy of the descriptor; the end of the process does it too.
//!
//! Made by system calls, because the loader's own links only close their descriptors. Does not
//! choose a mode.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::settings::AttachMode;

// Of `enum bpf_cmd` and `enum bpf_attach_type` of `linux/bpf.h`, and of `linux/if_link.h`.
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// A program on an interface.
#[derive(Debug)]
pub(super) struct XdpLink(OwnedFd);

impl XdpLink {
    pub(super) fn attach(
        program: BorrowedFd<'_>,
        interface_index: u32,
        mode: AttachMode,
    ) -> io::Result<Self> {
        let flags = match mode {
            AttachMode::Driver => XDP_FLAGS_DRV_MODE,
            AttachMode::Generic => XDP_FLAGS_SKB_MODE,
        };
        let program = program.as_raw_fd() as u32;
        let fd = bpf(BPF_LINK_CREATE, [program, interface_index, BPF_XDP, flags])?;
        // SAFETY: `fd` was just made by the kernel and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

impl Drop for XdpLink {
    fn drop(&mut self) {
        // Fails only when the interface is gone, and the program with it.
        let _ = bpf(BPF_LINK_DETACH, [self.0.as_raw_fd() as u32, 0, 0, 0]);
    }
}

/// The system call with the first words of `union bpf_attr`; the kernel takes the others as zero.
fn bpf(command: libc::c_int, words: [u32; 4]) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads `size_of_val(&words)` bytes of an array on this stack; no word is an
    // address for the commands used here.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, words.as_ptr(), size_of_val(&words)) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer as libc::c_int)
}
