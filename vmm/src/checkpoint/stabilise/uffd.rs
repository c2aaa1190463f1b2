//! userfaultfd in write-protect mode over one mapping (`Documentation/admin-guide/mm/userfaultfd.rst`).
//!
//! Invariants: only pages of the registered range are ever protected; closing the descriptor, or
//! [`Uffd::unregister`], releases every page and wakes every waiter.
//!
//! Does not know what pages mean.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Why pages cannot be protected.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Neither the system call nor the device is allowed.
    #[error(
        "userfaultfd is not permitted ({0}): it needs CAP_SYS_PTRACE, vm.unprivileged_userfaultfd = 1 or access to \
         /dev/userfaultfd, and a seccomp filter that lets it pass"
    )]
    NotPermitted(io::Error),
    /// The kernel has no userfaultfd, or not for shared memory.
    #[error(
        "the kernel cannot write-protect shared memory with userfaultfd ({0}): it needs Linux 5.19"
    )]
    Lacks(io::Error),
    /// The mapping cannot be registered.
    #[error("the guest's mapping cannot be registered with userfaultfd: {0}")]
    Register(io::Error),
}

const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;

// _IOWR(0xaa, 0x3f, struct uffdio_api) and so on, linux/userfaultfd.h
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

const PAGE_BYTES: u64 = 4096;
/// Bytes of a `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;

/// Pages of a mapping that can be write-protected.
#[derive(Debug)]
pub(super) struct Uffd {
    fd: OwnedFd,
    base: u64,
    bytes: u64,
}

impl Uffd {
    /// For `bytes` of shared memory mapped at `base`. The caller keeps the mapping until after this is dropped.
    pub(super) fn new(base: u64, bytes: u64) -> Result<Self, UffdError> {
        let uffd = Self {
            fd: open()?,
            base,
            bytes,
        };
        let mut api = [
            UFFD_API,
            FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM,
            0,
        ];
        uffd.call(UFFDIO_API, &mut api).map_err(UffdError::Lacks)?;
        let mut range = [base, bytes, REGISTER_MODE_WP, 0];
        uffd.call(UFFDIO_REGISTER, &mut range)
            .map_err(UffdError::Register)?;
        Ok(uffd)
    }

    /// Readable when a thread waits at a protected page.
    pub(super) fn descriptor(&self) -> libc::c_int {
        self.fd.as_raw_fd()
    }

    /// Protects pages of the mapping.
    pub(super) fn protect(&self, first: usize, count: usize) -> io::Result<()> {
        self.set(first, count, WRITEPROTECT_MODE_WP)
    }

    /// Releases pages and wakes who waits for them.
    pub(super) fn release(&self, first: usize, count: usize) -> io::Result<()> {
        self.set(first, count, 0)
    }

    fn set(&self, first: usize, count: usize, mode: u64) -> io::Result<()> {
        let (at, len) = (first as u64 * PAGE_BYTES, count as u64 * PAGE_BYTES);
        if at > self.bytes || len > self.bytes - at {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            let mut range = [self.base + at, len, mode];
            match self.call(UFFDIO_WRITEPROTECT, &mut range) {
                // The address space is changing just now.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                outcome => return outcome,
            }
        }
    }

    /// Gives the mapping up: all pages are released.
    pub(super) fn unregister(&self) {
        let mut range = [self.base, self.bytes];
        if let Err(e) = self.call(UFFDIO_UNREGISTER, &mut range) {
            tracing::error!("pages of the guest stay write-protected: {e}");
        }
    }

    /// The page that a thread waits for, if one does.
    pub(super) fn next_fault(&self) -> Option<usize> {
        let mut message = [0_u64; MESSAGE_BYTES / 8];
        loop {
            // SAFETY: the buffer is a whole message long.
            let n = unsafe {
                libc::read(
                    self.fd.as_raw_fd(),
                    message.as_mut_ptr().cast(),
                    MESSAGE_BYTES,
                )
            };
            if n != MESSAGE_BYTES as isize {
                return None;
            }
            let [event, ..] = message[0].to_le_bytes();
            let at = message[2].wrapping_sub(self.base);
            if event == EVENT_PAGEFAULT && at < self.bytes {
                return Some((at / PAGE_BYTES) as usize);
            }
        }
    }

    fn call(&self, request: libc::c_ulong, argument: &mut [u64]) -> io::Result<()> {
        // SAFETY: each request is given as many words as its structure has, and the kernel changes page tables, not
        // contents: no memory of ours is written but `argument`.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// With faults of the kernel included: KVM's are. By system call, else by device.
fn open() -> Result<OwnedFd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes flags only and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as libc::c_int;
    if fd >= 0 {
        // SAFETY: just made by the kernel, and nobody else owns it.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let refused = io::Error::last_os_error();
    if refused.raw_os_error() == Some(libc::ENOSYS) {
        return Err(UffdError::Lacks(refused));
    }
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    let Ok(device) = device else {
        return Err(UffdError::NotPermitted(refused));
    };
    // SAFETY: the request takes flags only and returns a new descriptor or -1.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if fd < 0 {
        return Err(UffdError::NotPermitted(io::Error::last_os_error()));
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
