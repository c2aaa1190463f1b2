//! What one wake-up of a thread costs on this machine: the floor of whatever is passed on by threads that sleep.
//!
//! Invariants: two threads wake each other through eventfds and do nothing else; a wake-up is half of a round trip.
//!
//! Does not say what a wake-up costs on a machine that has other things to do.

use std::io;
use std::thread;
use std::time::Instant;

use core_affinity::CoreId;
use vmm_sys_util::eventfd::EventFd;

use crate::datapath_client::Echoes;
use crate::datapath_row::Figures;

const ROUND_TRIPS: usize = 2000;

/// `wakeup_p50_us`: by a thread on another processor, whose own is idle meanwhile; `switch_p50_us`: by one on the same
/// processor. What cannot be pinned is left out.
pub(crate) fn measure() -> io::Result<Figures> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let mut figures = Figures::default();
    if let [first, second, ..] = cores[..] {
        figures = figures.with("wakeup_p50_us", round_trip_us(first, second)? / 2.0);
    }
    if let [first, ..] = cores[..] {
        figures = figures.with("switch_p50_us", round_trip_us(first, first)? / 2.0);
    }
    Ok(figures)
}

fn round_trip_us(asking: CoreId, answering: CoreId) -> io::Result<f64> {
    let [there, back] = [EventFd::new(0)?, EventFd::new(0)?];
    thread::scope(|scope| {
        let answer = scope.spawn(|| -> io::Result<()> {
            core_affinity::set_for_current(answering);
            for _ in 0..ROUND_TRIPS {
                there.read()?;
                back.write(1)?;
            }
            Ok(())
        });
        // In a thread of its own, so that nobody else stays pinned.
        let ask = scope.spawn(|| -> io::Result<Echoes> {
            core_affinity::set_for_current(asking);
            let mut echoes = Echoes::new();
            for _ in 0..ROUND_TRIPS {
                let begun = Instant::now();
                there.write(1)?;
                back.read()?;
                echoes.count(begun.elapsed().as_nanos() as u64);
            }
            Ok(echoes)
        });
        let panicked = |_| io::Error::other("a thread of the measurement has panicked");
        let echoes = ask.join().map_err(panicked)??;
        answer.join().map_err(panicked)??;
        Ok(echoes.us(0.5))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wake_up_is_answered() {
        let figures = measure().unwrap();
        if core_affinity::get_core_ids().is_some() {
            assert!(figures.get("switch_p50_us").is_some_and(|us| us > 0.0));
        }
    }
}
