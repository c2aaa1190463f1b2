//! What part of a fault at a protected page the thread that answers it does not see, on scratch memory.
//!
//! Does not know what KVM adds for a running guest.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use colo_fastpath::ring::{GuestRam, Pages};

use super::uffd::Uffd;
use crate::checkpoint::pages::PAGE_BYTES;

const SCRATCH_PAGES: usize = 128;
/// Calls of one page each, and faults, that are timed.
const CALLS: usize = 64;
const FAULTS: usize = 16;

/// Waking up, twice; 0 where pages cannot be protected.
pub(super) fn wake_ns() -> io::Result<u64> {
    let bytes = (SCRATCH_PAGES * PAGE_BYTES) as u64;
    let scratch = GuestRam::new(bytes, Pages::Small).map_err(io::Error::other)?;
    for page in 0..SCRATCH_PAGES {
        touch(&scratch, page);
    }
    let Ok(uffd) = Uffd::new(scratch.host_address(), bytes) else {
        return Ok(0);
    };
    let begun = Instant::now();
    for page in 0..CALLS {
        uffd.protect(2 * page, 1)?;
    }
    let call_ns = begun.elapsed().as_nanos() as u64 / CALLS as u64;
    uffd.release(0, SCRATCH_PAGES)?;
    Ok(fault_ns(&scratch, &uffd)?.saturating_sub(call_ns))
}

/// The middle of some faults that another thread answers by a release.
fn fault_ns(scratch: &GuestRam, uffd: &Uffd) -> io::Result<u64> {
    uffd.protect(0, FAULTS)?;
    let times: io::Result<Vec<Duration>> = thread::scope(|scope| {
        let answering = thread::Builder::new().name("page-faults".to_owned());
        answering.spawn_scoped(scope, || answer(uffd))?;
        let one = |page| {
            let begun = Instant::now();
            touch(scratch, page);
            begun.elapsed()
        };
        Ok((0..FAULTS).map(one).collect())
    });
    let mut times = times?;
    times.sort_unstable();
    Ok(times[FAULTS / 2].as_nanos() as u64)
}

fn answer(uffd: &Uffd) {
    let mut answered = 0;
    while answered < FAULTS {
        let mut poll = libc::pollfd {
            fd: uffd.descriptor(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd on this stack.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
        while let Some(page) = uffd.next_fault() {
            answered += 1;
            if uffd.release(page, 1).is_err() {
                // The other thread would wait for ever.
                return uffd.unregister();
            }
        }
    }
}

fn touch(scratch: &GuestRam, page: usize) {
    // Inside, so it is not refused.
    let _ = scratch.write((page * PAGE_BYTES) as u64, &[1]);
}
