//! How much of the time a vCPU may run: short slices in the guest, and standing still between them.
//!
//! Invariants: a vCPU that may run all the time pays one comparison per entry, no timer and no look at a clock
//! (invariant 8); over any while longer than a slice the guest has its share at most; a guest that sleeps by itself stands
//! still already, and is made to stand only for the rest.
//!
//! Does not decide the share, and does not wait: the vCPU's thread does, so that it hears orders meanwhile.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::SIGRTMIN;

/// A slice and the standing behind it last so long together,
const PERIOD: Duration = Duration::from_millis(10);
/// but a slice is never shorter than this: each costs two switches.
const SLICE_MIN: Duration = Duration::from_millis(1);
/// A vCPU that stands still counts its time so often at least.
const STAND_MAX: Duration = Duration::from_millis(20);
/// A tick that came between the look at the orders and the entry into the guest is followed by another.
const TICK_AGAIN: Duration = Duration::from_millis(1);

/// The share of one vCPU, owned by its thread.
#[derive(Debug)]
pub(super) struct Duty {
    run_pct: u8,
    /// Time in the guest that has not been stood for yet.
    owed: Duration,
    /// A slice is over: the vCPU stands until nothing is owed.
    stands: bool,
    timer: Option<SliceTimer>,
    stood: Arc<AtomicU64>,
}

impl Duty {
    /// All of the time. `stood` counts the microseconds that the vCPU is kept standing.
    pub(super) fn new(stood: Arc<AtomicU64>) -> Self {
        Self {
            run_pct: 100,
            owed: Duration::ZERO,
            stands: false,
            timer: None,
            stood,
        }
    }

    /// Another share, in percent; on the vCPU's own thread.
    pub(super) fn set(&mut self, run_pct: u8) {
        self.run_pct = run_pct.min(100);
        (self.owed, self.stands) = (Duration::ZERO, false);
        match self.run_pct {
            0 | 100 => self.timer = None,
            _ if self.timer.is_none() => {
                let timer = SliceTimer::new();
                self.timer = timer
                    .inspect_err(|e| tracing::warn!("no timer to slow the guest down with: {e}"))
                    .ok();
            }
            _ => {}
        }
    }

    /// Whether there is a share below all of the time.
    #[inline]
    pub(super) fn is_limited(&self) -> bool {
        self.run_pct < 100
    }

    /// How long the vCPU has to stand now, in portions: to be asked again after each. `None`: it may run.
    pub(super) fn must_stand(&self) -> Option<Duration> {
        match self.run_pct {
            100 => None,
            0 => Some(STAND_MAX),
            run_pct => {
                let left = self
                    .owed
                    .mul_f64(f64::from(100 - run_pct) / f64::from(run_pct));
                let stands = self.stands && !left.is_zero();
                stands.then(|| left.min(STAND_MAX))
            }
        }
    }

    /// The vCPU was kept standing for so long.
    pub(super) fn stood(&mut self, time: Duration) {
        self.stood
            .fetch_add(time.as_micros() as u64, Ordering::Relaxed);
        self.rested(time);
    }

    /// The guest did not run for so long, for whatever reason.
    pub(super) fn rested(&mut self, time: Duration) {
        if (1..100).contains(&self.run_pct) {
            let paid = time.mul_f64(f64::from(self.run_pct) / f64::from(100 - self.run_pct));
            self.owed = self.owed.saturating_sub(paid);
            // Less than a clock shows.
            if self.owed < Duration::from_micros(1) {
                (self.owed, self.stands) = (Duration::ZERO, false);
            }
        }
    }

    /// The guest ran for so long.
    fn ran(&mut self, time: Duration) {
        if self.run_pct > 0 {
            self.owed += time;
            self.stands |= self.owed >= self.slice();
        }
    }

    /// The vCPU is about to enter the guest: a tick will end the slice.
    #[inline]
    pub(super) fn enter(&self) -> Option<Instant> {
        self.is_limited().then(|| self.enter_limited())
    }

    #[cold]
    fn enter_limited(&self) -> Instant {
        let left = self.slice().saturating_sub(self.owed);
        if let Some(timer) = &self.timer {
            timer.arm(left.max(Duration::from_micros(1)));
        }
        Instant::now()
    }

    /// It is back.
    #[inline]
    pub(super) fn leave(&mut self, entered: Option<Instant>) {
        if let Some(entered) = entered {
            if let Some(timer) = &self.timer {
                timer.arm(Duration::ZERO);
            }
            self.ran(entered.elapsed());
        }
    }

    fn slice(&self) -> Duration {
        (PERIOD * u32::from(self.run_pct) / 100).max(SLICE_MIN)
    }
}

/// Sends the signal that brings a vCPU back to the thread that made it.
#[derive(Debug)]
struct SliceTimer(libc::timer_t);

// SAFETY: a timer's id may be used by any thread of the process.
unsafe impl Send for SliceTimer {}

impl SliceTimer {
    fn new() -> io::Result<Self> {
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: the structure is plain data for which zeros are valid; the kernel reads it and writes the id, both on
        // this stack. The thread that is signalled is this one, which drops the timer before it ends.
        let made = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = SIGRTMIN();
            event.sigev_notify_thread_id = libc::gettid();
            libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer)
        };
        match made {
            0 => Ok(Self(timer)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The first tick comes after so long, further ones until it is armed again; zero: none.
    fn arm(&self, first: Duration) {
        let spec = |time: Duration| libc::timespec {
            tv_sec: time.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(time.subsec_nanos()),
        };
        let times = libc::itimerspec {
            it_interval: spec(TICK_AGAIN),
            it_value: spec(first),
        };
        // SAFETY: the timer lives as long as `self`; the times are on this stack.
        unsafe { libc::timer_settime(self.0, 0, &raw const times, std::ptr::null_mut()) };
    }
}

impl Drop for SliceTimer {
    fn drop(&mut self) {
        // SAFETY: made in `new`, deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn duty(run_pct: u8) -> (Duty, Arc<AtomicU64>) {
        let stood = Arc::new(AtomicU64::new(0));
        let mut duty = Duty::new(stood.clone());
        duty.set(run_pct);
        (duty, stood)
    }

    const MS: Duration = Duration::from_millis(1);

    /// A guest that never sleeps: runs whenever it may, in pieces of `piece`, and stands when it must.
    fn lives(duty: &mut Duty, piece: Duration) -> (Duration, Duration) {
        let (mut ran, mut stood) = (Duration::ZERO, Duration::ZERO);
        while ran + stood < 10_000 * MS {
            match duty.must_stand() {
                Some(time) => {
                    duty.stood(time);
                    stood += time;
                }
                None => {
                    duty.ran(piece);
                    ran += piece;
                }
            }
        }
        (ran, stood)
    }

    #[test]
    fn a_busy_guest_has_its_share_of_the_time_whatever_it_does_in_between() {
        for run_pct in [1, 2, 5, 10, 20, 30, 50, 70, 99] {
            for piece in [Duration::from_micros(30), MS, 3 * MS] {
                let (mut duty, counted) = duty(run_pct);
                let (ran, stood) = lives(&mut duty, piece);
                let share = ran.as_secs_f64() / (ran + stood).as_secs_f64() * 100.0;
                let expected = f64::from(run_pct);
                assert!(
                    (share - expected).abs() < expected * 0.05,
                    "{share} for {run_pct}"
                );
                let counted = Duration::from_micros(counted.load(Ordering::Relaxed));
                assert!(stood - counted < 100 * MS, "{counted:?} of {stood:?}");
            }
        }
    }

    #[test]
    fn slices_are_short() {
        for run_pct in [1, 10, 50, 99] {
            let (mut duty, _) = duty(run_pct);
            duty.ran(PERIOD);
            let mut stood = Duration::ZERO;
            while let Some(time) = duty.must_stand() {
                duty.stood(time);
                stood += time;
            }
            assert!(stood <= PERIOD * 100 / u32::from(run_pct), "{stood:?}");
            assert!(duty.slice() <= PERIOD);
        }
    }

    #[test]
    fn a_guest_that_sleeps_long_enough_is_never_made_to_stand() {
        let (mut duty, _) = duty(20);
        for _ in 0..1000 {
            duty.ran(MS);
            assert_eq!(duty.must_stand(), None);
            duty.rested(4 * MS);
        }
    }

    #[test]
    fn a_share_of_nothing_stands_until_told_otherwise_and_all_of_it_never() {
        let (mut duty, _) = duty(0);
        for _ in 0..1000 {
            assert_eq!(duty.must_stand(), Some(STAND_MAX));
            duty.stood(STAND_MAX);
        }
        duty.set(100);
        duty.ran(1000 * MS);
        assert_eq!(duty.must_stand(), None);
        assert_eq!(duty.enter(), None, "no look at a clock");
    }
}
