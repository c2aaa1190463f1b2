//! A pause goes before everything else until all stand still: who takes it, and the vCPUs that it waits for, get a processor
//! at once.
//!
//! Each hand-over between threads waits for a processor, which on a busy host is most of a pause: Linux lets whoever runs
//! use up its slice. Only who has CAP_SYS_NICE may ask for that; without it a pause takes what the scheduler makes of it.
//!
//! Invariants: when [`Urgency`] is gone the policies are what they were; a thread with a policy that somebody has chosen
//! keeps it.
//!
//! Does not touch workers: their slices are short already.

use std::os::unix::thread::{JoinHandleExt, RawPthread};
use std::sync::atomic::{AtomicBool, Ordering};
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

impl Machine {
    /// Before a pause; it ends when everybody stands still. What comes then is not waited for, but can take long, and a thread
    /// that waits behind a real-time one may be the one that says this host lives.
    pub fn hurry(&self) -> Urgency<'_> {
        let own = Raised::default();
        if own.raise(own_thread()) {
            self.vcpus.iter().for_each(|vcpu| vcpu.hurry(true));
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

    /// False if it was not done.
    fn raise(&self, thread: RawPthread) -> bool {
        let raised =
            policy(thread) == Some(libc::SCHED_OTHER) && set(thread, libc::SCHED_FIFO, PRIORITY);
        self.0.store(raised, Ordering::Relaxed);
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
