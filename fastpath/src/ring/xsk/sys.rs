//! The system calls of AF_XDP sockets, each with the types it takes.
//!
//! Invariants: no pointer outlives its call, except those of [`Mapping`], which unmaps itself.
//!
//! Does not know what the calls are for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use libc::{c_int, c_void, socklen_t};

/// Option values of which every bit pattern is valid: the structures of `linux/if_xdp.h`.
pub(super) trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for libc::xdp_umem_reg {}
impl Plain for libc::xdp_mmap_offsets {}
impl Plain for libc::xdp_statistics {}
impl Plain for libc::xdp_options {}

pub(super) fn open_socket() -> io::Result<OwnedFd> {
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: plain system call that gives a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_XDP, flags, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made by the kernel and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn set_option<T: Plain>(fd: BorrowedFd<'_>, name: c_int, value: &T) -> io::Result<()> {
    #[cfg(test)]
    seam::count(name);
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a value that is borrowed for the call.
    let answer = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            name,
            std::ptr::from_ref(value).cast::<c_void>(),
            size_of::<T>() as socklen_t,
        )
    };
    done(answer)
}

pub(super) fn option<T: Plain>(fd: BorrowedFd<'_>, name: c_int) -> io::Result<T> {
    // SAFETY: all zeroes is valid for every `Plain` type.
    let mut value: T = unsafe { std::mem::zeroed() };
    let mut len = size_of::<T>() as socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into a value that is borrowed for the call.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            name,
            (&raw mut value).cast::<c_void>(),
            &raw mut len,
        )
    };
    done(answer)?;
    Ok(value)
}

pub(super) fn bind(fd: BorrowedFd<'_>, address: &libc::sockaddr_xdp) -> io::Result<()> {
    #[cfg(test)]
    seam::may_bind(address)?;
    // SAFETY: the kernel reads an address of the given size that is borrowed for the call.
    let answer = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            std::ptr::from_ref(address).cast::<libc::sockaddr>(),
            size_of::<libc::sockaddr_xdp>() as socklen_t,
        )
    };
    done(answer)
}

/// Makes the kernel look at the tx ring.
pub(super) fn send_nothing(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no buffer and no address are given.
    let answer = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            std::ptr::null(),
            0,
            libc::MSG_DONTWAIT,
            std::ptr::null(),
            0,
        )
    };
    done(answer.min(0) as c_int)
}

/// Makes the kernel look at the fill ring.
pub(super) fn receive_nothing(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no buffer and no address are given.
    let answer = unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            0,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    done(answer.min(0) as c_int)
}

fn done(answer: c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Memory that a socket shares with the kernel.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to the thread that made it.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(super) fn new(fd: BorrowedFd<'_>, offset: libc::off_t, bytes: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses the place, so nothing that exists is replaced.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { base, bytes })
    }

    /// Where `count` values of type `T` at `offset` lie; `None` if they do not fit or are not
    /// aligned.
    pub(super) fn at<T>(&self, offset: u64, count: u32) -> Option<NonNull<T>> {
        let offset = usize::try_from(offset).ok()?;
        let bytes = size_of::<T>().checked_mul(count as usize)?;
        if offset.checked_add(bytes)? > self.bytes {
            return None;
        }
        // SAFETY: `offset` was just checked to lie within the mapping.
        let place = unsafe { self.base.add(offset) }.cast::<T>();
        place.is_aligned().then_some(place)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, and whoever has pointers into it owns `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast::<c_void>(), self.bytes) };
    }
}

/// What tests count and refuse of the calls of their thread.
#[cfg(test)]
pub(super) mod seam {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static REGISTRATIONS: Cell<u32> = const { Cell::new(0) };
        static REFUSAL: Cell<Option<i32>> = const { Cell::new(None) };
    }

    pub(super) fn count(option: libc::c_int) {
        if option == libc::XDP_UMEM_REG {
            REGISTRATIONS.set(REGISTRATIONS.get() + 1);
        }
    }

    pub(super) fn may_bind(address: &libc::sockaddr_xdp) -> io::Result<()> {
        match REFUSAL.get() {
            Some(errno) if address.sxdp_flags & libc::XDP_SHARED_UMEM != 0 => {
                Err(io::Error::from_raw_os_error(errno))
            }
            _ => Ok(()),
        }
    }

    /// How often this thread has registered memory (XDP_UMEM_REG), refused or not.
    pub(in crate::ring::xsk) fn registrations() -> u32 {
        REGISTRATIONS.get()
    }

    /// Nobody lends memory to this thread, or everybody does.
    pub(in crate::ring::xsk) fn refuse_sharing(errno: Option<i32>) {
        REFUSAL.set(errno);
    }
}
