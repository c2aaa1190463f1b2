//! What copies, calls and faults cost on this host, on scratch memory.
//!
//! Does not know what KVM adds for a running guest: the model learns that.

use std::io;
use std::time::{Duration, Instant};

use colo_fastpath::ring::{GuestRam, Pages};

use super::arena::Arena;
use super::model::Model;
use super::uffd::Uffd;
use crate::checkpoint::pages::PAGE_BYTES;

const SCRATCH_PAGES: usize = 1024;
/// Calls of one page each, and faults, that are timed.
const CALLS: usize = 64;
const FAULTS: usize = 16;

#[derive(Debug)]
pub(super) struct Measured {
    pub(super) model: Model,
    /// Part of a fault that the thread which answers it does not see.
    pub(super) wake_ns: u64,
}

pub(super) fn measure(arena: &Arena) -> io::Result<Measured> {
    let bytes = (SCRATCH_PAGES * PAGE_BYTES) as u64;
    let scratch = GuestRam::new(bytes, Pages::Small).map_err(io::Error::other)?;
    for page in 0..SCRATCH_PAGES {
        touch(&scratch, page);
    }
    let copy_page_ns = copy_page_ns(&scratch, arena);
    let mut measured = Measured {
        model: Model {
            copy_page_ns,
            protect_call_ns: 0.0,
            protect_page_ns: 0.0,
            fault_ns: 0.0,
            // What is done with a page besides copying it is learnt.
            read_page_ns: 4.0 * copy_page_ns,
            fault_ratio: 1.0,
        },
        wake_ns: 0,
    };
    if let Ok(uffd) = Uffd::new(scratch.host_address(), bytes) {
        protection(&scratch, &uffd, &mut measured)?;
    }
    Ok(measured)
}

fn copy_page_ns(scratch: &GuestRam, arena: &Arena) -> f64 {
    let Some(mut slots) = arena.take(SCRATCH_PAGES as u32, 0) else {
        return 500.0;
    };
    let out = arena.bytes_mut(&mut slots);
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let begun = Instant::now();
        if let Ok(view) = scratch.view(0, out.len() as u32) {
            view.copy_to(0, out);
        }
        best = best.min(begun.elapsed());
    }
    arena.reset();
    best.as_nanos() as f64 / SCRATCH_PAGES as f64
}

fn protection(scratch: &GuestRam, uffd: &Uffd, measured: &mut Measured) -> io::Result<()> {
    let begun = Instant::now();
    uffd.protect(0, SCRATCH_PAGES)?;
    let all_ns = begun.elapsed().as_nanos() as f64;
    uffd.release(0, SCRATCH_PAGES)?;
    let begun = Instant::now();
    for page in 0..CALLS {
        uffd.protect(2 * page, 1)?;
    }
    let calls_ns = begun.elapsed().as_nanos() as f64 / CALLS as f64;
    uffd.release(0, SCRATCH_PAGES)?;
    let page_ns = all_ns / SCRATCH_PAGES as f64;
    let model = &mut measured.model;
    model.protect_page_ns = page_ns;
    model.protect_call_ns = (calls_ns - page_ns).max(0.0);
    let fault_ns = fault_ns(scratch, uffd)?;
    model.fault_ns = fault_ns + model.copy_page_ns;
    measured.wake_ns = (fault_ns - calls_ns).max(0.0) as u64;
    Ok(())
}

/// The middle of some faults that another thread answers by a release.
fn fault_ns(scratch: &GuestRam, uffd: &Uffd) -> io::Result<f64> {
    uffd.protect(0, FAULTS)?;
    let mut times: Vec<Duration> = std::thread::scope(|scope| {
        scope.spawn(|| answer(uffd));
        let one = |page| {
            let begun = Instant::now();
            touch(scratch, page);
            begun.elapsed()
        };
        (0..FAULTS).map(one).collect()
    });
    times.sort_unstable();
    Ok(times[FAULTS / 2].as_nanos() as f64)
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
