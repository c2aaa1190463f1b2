//! The one clock of the shell: `CLOCK_BOOTTIME` in microseconds, equal in all threads.
//!
//! Monotonic, and it goes on while the host is suspended: a lease or a deadline must not outlive a time in which
//! nobody was awake (rule 18).
//!
//! Cores take its value as an argument; they never read it themselves.

use std::time::Duration;

/// Microseconds since an arbitrary point before the host started this process.
pub fn now_us() -> u64 {
    boot_time().as_micros() as u64
}

/// The same in nanoseconds, for measurements.
pub fn now_ns() -> u64 {
    boot_time().as_nanos() as u64
}

/// Since an arbitrary point before the host started this process.
fn boot_time() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec that lives on this stack; the clock always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    let boot = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
    #[cfg(test)]
    let boot = boot + SKIPPED.get();
    boot
}

#[cfg(test)]
thread_local! {
    static SKIPPED: std::cell::Cell<Duration> = const { std::cell::Cell::new(Duration::ZERO) };
}

/// For tests: so much time has passed, for the calling thread.
#[cfg(test)]
pub(crate) fn skip_us(us: u64) {
    SKIPPED.set(SKIPPED.get() + Duration::from_micros(us));
}
