//! A worker that polls beside another thread that polls.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::nic::Sink;
use crate::processor;

/// Never finds anything, and never sleeps for long.
struct Restless {
    passes_on: bool,
}

impl Role for Restless {
    fn name(&self) -> &'static str {
        "restless"
    }
    fn step(&mut self, _edge: &mut Edge, _now_us: u64) -> bool {
        false
    }
    fn deadline_us(&self) -> Option<u64> {
        Some(0)
    }
    fn passes_on(&self) -> bool {
        self.passes_on
    }
}

fn restless(passes_on: bool) -> WorkerHandle {
    let config = WorkerConfig {
        name: "restless".into(),
        poll: PollMode::Adaptive,
        cpu: None,
        frame_slots: 32,
        tx: TxMode::default(),
        stages: false,
    };
    let worker = spawn_unattached(config, Box::new(Sink::new(1500))).unwrap();
    worker.set_role(Box::new(Restless { passes_on })).unwrap();
    worker
}

/// Puts the calling thread on a processor, from which the kernel may take it again.
fn come_to(cpu: usize) {
    let allowed = processor::allowed().unwrap();
    assert!(core_affinity::set_for_current(core_affinity::CoreId {
        id: cpu
    }));
    processor::allow(&allowed).unwrap();
}

/// Ends the other thread, however the test ends.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn of_two_that_poll_on_one_processor_one_moves() {
    let cpus = core_affinity::get_core_ids().unwrap();
    let [cpu, _, ..] = cpus[..] else {
        println!("SKIPPED: two processors are needed, for one to be left");
        return;
    };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = End(&done);
        scope.spawn(|| {
            assert!(core_affinity::set_for_current(cpu));
            while !done.load(Ordering::Relaxed) {
                thread::yield_now();
            }
        });
        let worker = restless(true);
        while worker.stats().moves == 0 {
            // The kernel may have been faster.
            worker.execute(move |_, _| come_to(cpu.id)).unwrap();
            let looks = worker.stats().looks_around + 100;
            while worker.stats().moves == 0 && worker.stats().looks_around < looks {
                thread::yield_now();
            }
        }
        worker.stop();
    });
}

#[test]
fn who_passes_nothing_on_stays_with_whom_it_works_for() {
    let worker = restless(false);
    while worker.stats().yields < 1000 {
        thread::yield_now();
    }
    let stats = worker.stats();
    worker.stop();
    assert_eq!((stats.looks_around, stats.moves), (0, 0));
}
