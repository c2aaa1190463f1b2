//! A pause goes before everything else until all stand still: who takes it, and the vCPUs that it waits for, get a processor
//! at once.
//!
//! Each hand-over between threads waits for a processor, which on a busy host is most of a pause: Linux lets whoever runs
//! use up its slice. Only who has CAP_SYS_NICE may ask for that; without it a pause takes what the scheduler makes of it, and
//! is counted.
//!
//! Invariants: when [`Urgency`] is gone the policies are what they were; a thread with a policy that somebody has chosen
//! keeps it.
//!
//! Does not touch workers: their slices are short already.

use std::os::unix::thread::{JoinHandleExt, RawPthread};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::Machine;

/// The least of the real-time priorities is above all usual threads.
const PRIORITY: libc::c_int = 1;

/// Lets the calling thread and a machine's vCPUs go before others, until it is dropped by the same thread.
#[derive(Debug)]
pub struct Urgency<'a> {
    machine: &'a Machine,
    own: Raised,
}

/// Counts pauses that went before nobody, because this process may not ask for it.
#[derive(Debug, Default)]
pub(super) struct Unhurried(AtomicU64);

impl Unhurried {
    fn count(&self) {
        if self.0.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(
                "pauses take as long as the scheduler lets them: a real-time priority was refused; give this process \
                 CAP_SYS_NICE (AmbientCapabilities= in its unit)"
            );
        }
    }
}

impl Machine {
    /// How many pauses waited for their processors like everybody, because this process has no CAP_SYS_NICE.
    pub fn unhurried_pauses(&self) -> u64 {
        self.unhurried.0.load(Ordering::Relaxed)
    }

    /// Before a pause; it ends when everybody stands still. What comes then is not waited for, but can take long, and a thread
    /// that waits behind a real-time one may be the one that says this host lives.
    pub fn hurry(&self) -> Urgency<'_> {
        let own = Raised::default();
        match own.raise(own_thread()) {
            Some(true) => self.vcpus.iter().for_each(|vcpu| vcpu.hurry(true)),
            Some(false) => self.unhurried.count(),
            None => {}
        }
        Urgency { machine: self, own }
    }
}

impl Drop for Urgency<'_> {
    fn drop(&mut self) {
        // This thread last: before, nobody takes its processor.
        self.machine.vcpus.iter().for_each(|vcpu| vcpu.hurry(false));
        self.own.lower(own_thread());
    }
}

/// Whether a thread goes before others by our will.
#[derive(Debug, Default)]
pub(super) struct Raised(AtomicBool);

impl Raised {
    /// For a thread that nobody joins during the call.
    pub(super) fn of(&self, thread: &JoinHandle<()>, on: bool) {
        if on {
            self.raise(thread.as_pthread_t());
        } else {
            self.lower(thread.as_pthread_t());
        }
    }

    /// Whether it was allowed; `None` if somebody has chosen the thread's policy.
    fn raise(&self, thread: RawPthread) -> Option<bool> {
        let is_usual = policy(thread) == Some(libc::SCHED_OTHER);
        let raised = is_usual.then(|| set(thread, libc::SCHED_FIFO, PRIORITY));
        self.0.store(raised == Some(true), Ordering::Relaxed);
        raised
    }

    fn lower(&self, thread: RawPthread) {
        if self.0.swap(false, Ordering::Relaxed) && !set(thread, libc::SCHED_OTHER, 0) {
            tracing::warn!("a thread of this machine keeps a real-time policy after a pause");
        }
    }
}

fn own_thread() -> RawPthread {
    // SAFETY: no arguments, no memory.
    unsafe { libc::pthread_self() }
}

fn policy(thread: RawPthread) -> Option<libc::c_int> {
    let (mut policy, mut parameters) = (0, libc::sched_param { sched_priority: 0 });
    // SAFETY: the thread was not joined, says the caller; both places live through the call.
    let failed =
        unsafe { libc::pthread_getschedparam(thread, &raw mut policy, &raw mut parameters) };
    (failed == 0).then_some(policy)
}

fn set(thread: RawPthread, policy: libc::c_int, priority: libc::c_int) -> bool {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: as above.
    unsafe { libc::pthread_setschedparam(thread, policy, &raw const parameters) == 0 }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::checkpoint::guests::{Guest, ON_ORDER};

    /// The calling thread has no CAP_SYS_NICE from here on.
    fn give_up_cap_sys_nice() {
        const VERSION_3: u32 = 0x2008_0522;
        const CAP_SYS_NICE: u32 = 23;
        let header = [VERSION_3, 0];
        // Effective, permitted and inheritable ones, 32 each, twice.
        let mut sets = [0_u32; 6];
        // SAFETY: a header of two words and room for two times three, as version 3 has them; 0 is the calling thread.
        let read = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
        assert_eq!(read, 0);
        sets[0] &= !(1 << CAP_SYS_NICE);
        // SAFETY: the same; only this thread has less afterwards.
        let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
        assert_eq!(set, 0);
    }

    #[test]
    fn a_pause_that_may_not_hurry_is_counted() {
        let guest = Guest::start(ON_ORDER, 64, "");
        let machine = &guest.machine;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                give_up_cap_sys_nice();
                for pauses in 1..4 {
                    drop(machine.hurry());
                    assert_eq!(machine.unhurried_pauses(), pauses);
                }
            });
        });
        let own = Raised::default();
        let may = own.raise(own_thread()) == Some(true);
        own.lower(own_thread());
        drop(machine.hurry());
        assert_eq!(machine.unhurried_pauses(), 3 + u64::from(!may));
    }

    #[test]
    fn a_thread_goes_before_others_and_back_unless_somebody_chose_its_policy() {
        let (end, ended) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let _ = ended.recv();
        });
        let of = || policy(thread.as_pthread_t());
        let raised = Raised::default();
        raised.of(&thread, true);
        // Without the privilege nothing happens.
        let may = of() == Some(libc::SCHED_FIFO);
        assert!(may || of() == Some(libc::SCHED_OTHER));
        raised.of(&thread, false);
        assert_eq!(of(), Some(libc::SCHED_OTHER));
        raised.of(&thread, false);
        assert_eq!(of(), Some(libc::SCHED_OTHER));
        if may {
            assert!(set(thread.as_pthread_t(), libc::SCHED_RR, 1));
            raised.of(&thread, true);
            assert_eq!(of(), Some(libc::SCHED_RR));
            raised.of(&thread, false);
            assert_eq!(of(), Some(libc::SCHED_RR));
        }
        drop(end);
        thread.join().unwrap();
    }
}
