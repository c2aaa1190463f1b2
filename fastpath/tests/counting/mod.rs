//! What workers ask of the system: memory, by a counting allocator, and system calls, by the kernel's tracepoint.
//!
//! Invariant: one test counts at a time ([`turn`]): the allocator counts for all workers together.

#![allow(clippy::disallowed_types, reason = "of tests that wait for each other")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use colo_fastpath::worker::WorkerHandle;
use perf_event::events::Tracepoint;
use perf_event::{Builder, Counter};

const TRACEFS: &str = "/sys/kernel/tracing";

thread_local! {
    static IS_WORKER: Cell<bool> = const { Cell::new(false) };
}
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Counts what the workers' threads take.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if IS_WORKER.with(Cell::get) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer comes from `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static TURN: Mutex<()> = Mutex::new(());

/// For who counts.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of the event "a system call begins".
fn system_call_event() -> Option<u64> {
    let file = format!("{TRACEFS}/events/raw_syscalls/sys_enter/id");
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Whether system calls can be counted here; says so if not.
pub fn can_count() -> bool {
    let found = system_call_event().is_some();
    if !found {
        println!("SKIPPED: no tracefs at {TRACEFS}; `mount -t tracefs nodev {TRACEFS}` as root");
    }
    found
}

/// Allocations of all counted workers so far.
pub fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// The allocator counts for this worker from now on; gives a counter of its system calls, not enabled yet.
pub fn count(worker: &WorkerHandle) -> Counter {
    Builder::new(Tracepoint::with_id(system_call_event().unwrap()))
        .observe_pid(set_counting(worker, true))
        .include_kernel()
        .build()
        .unwrap()
}

/// The allocator no longer counts for this worker.
pub fn stop_counting(worker: &WorkerHandle) {
    set_counting(worker, false);
}

/// Gives the number that the kernel gives the worker's thread.
fn set_counting(worker: &WorkerHandle, counts: bool) -> i32 {
    let tid = worker.execute(move |_, _| {
        IS_WORKER.with(|worker| worker.set(counts));
        // SAFETY: the call has no arguments and cannot fail.
        unsafe { libc::gettid() }
    });
    tid.unwrap()
}
