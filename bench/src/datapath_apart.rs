//! How far apart two processors are: what a cache line takes from one to the other and back.
//!
//! Invariants: two pinned threads write a line each in turn and do nothing else; the figure is the median of short
//! runs.
//!
//! In a virtual machine this is not a constant: the host moves its processors between cores that share a cache and
//! cores that do not. What two threads say to each other in memory costs several times as much then.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use core_affinity::CoreId;

use crate::figures::Range;

const RUNS: u32 = 40;
const ROUND_TRIPS: u32 = 500;

/// A word that has its cache line, and the one that is fetched with it, for itself.
#[repr(align(128))]
struct Line(AtomicU32);

/// Nanoseconds of a round trip between two CPUs that nothing else runs on.
pub(crate) fn round_trip_ns(cpus: [usize; 2]) -> io::Result<f64> {
    let [there, back] = [0; 2].map(|n| Line(AtomicU32::new(n)));
    let pinned = |id| core_affinity::set_for_current(CoreId { id });
    let last = RUNS * ROUND_TRIPS;
    let runs = thread::scope(|scope| {
        scope.spawn(|| {
            pinned(cpus[1]);
            for n in 1..=last {
                wait_for(&there, n);
                back.0.store(n, Ordering::Release);
            }
        });
        let ask = scope.spawn(|| {
            pinned(cpus[0]);
            let runs = (0..RUNS).map(|run| {
                let begun = Instant::now();
                for n in 1..=ROUND_TRIPS {
                    there.0.store(run * ROUND_TRIPS + n, Ordering::Release);
                    wait_for(&back, run * ROUND_TRIPS + n);
                }
                begun.elapsed().as_nanos() as f64 / f64::from(ROUND_TRIPS)
            });
            runs.collect::<Vec<f64>>()
        });
        ask.join()
    });
    let panicked = |_| io::Error::other("a thread of the measurement has panicked");
    Ok(Range::of(runs.map_err(panicked)?).median)
}

/// Lets others run now and then: there may be one processor only.
fn wait_for(line: &Line, wanted: u32) {
    let mut looks = 0_u32;
    while line.0.load(Ordering::Acquire) != wanted {
        looks += 1;
        match looks.is_multiple_of(1000) {
            true => thread::yield_now(),
            false => std::hint::spin_loop(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_answered() {
        assert!(round_trip_ns([0, 1]).unwrap() > 0.0);
    }
}
