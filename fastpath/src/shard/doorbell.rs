//! How a worker that sleeps is woken by another that has something for it.
//!
//! Invariants: who is about to sleep says so, then looks once more; who has put something where the
//! other looks executes a fence, then looks whether the other sleeps. One of them sees the other, so no
//! wake-up is lost. To one that is awake ringing costs a load.
//!
//! Does not sleep itself: the eventfd is one of those that the worker waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use vmm_sys_util::eventfd::EventFd;

/// The doorbell of one worker.
#[derive(Debug)]
pub(crate) struct Doorbell {
    asleep: AtomicBool,
    wake: Arc<EventFd>,
}

impl Doorbell {
    /// A doorbell that makes `wake` readable.
    pub(crate) fn new(wake: Arc<EventFd>) -> Self {
        Self {
            asleep: AtomicBool::new(false),
            wake,
        }
    }

    /// Its owner is about to sleep. What it looks at afterwards decides whether it may.
    pub(crate) fn lie_down(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        // Pairs with the fence that precedes `ring`.
        fence(Ordering::SeqCst);
    }

    /// Its owner is awake.
    pub(crate) fn get_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Wakes the owner if it sleeps. The caller has executed a sequentially consistent fence since it
    /// put in what the owner is woken for.
    pub(crate) fn ring(&self) {
        // One ring wakes; the others need no system call.
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            self.ring_anyway();
        }
    }

    /// Wakes the owner whether it sleeps or not.
    pub(crate) fn ring_anyway(&self) {
        // Only a full counter is refused, and that is readable.
        let _ = self.wake.write(1);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::ring::spsc::{Receiver, Sender, lane};

    const FRAMES: u64 = 200_000;

    fn wait(wake: &EventFd) {
        let mut fd = libc::pollfd {
            fd: wake.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // A lost wake-up shows here, as an end of the time that no machine needs.
        // SAFETY: one pollfd on this stack.
        let ready = unsafe { libc::poll(&raw mut fd, 1, 60_000) };
        assert_eq!(ready, 1, "a wake-up was lost");
        let _ = wake.read();
    }

    /// Sleeps whenever the ring is full.
    fn produce(mut to: Sender, own: &Doorbell, other: &Doorbell, wake: &EventFd) {
        for n in 0..FRAMES {
            while !to.push(n as u32, n, &n.to_le_bytes()) {
                own.lie_down();
                if !to.is_fed() {
                    wait(wake);
                }
                own.get_up();
            }
            fence(Ordering::SeqCst);
            other.ring();
        }
    }

    /// Sleeps whenever the ring is empty.
    fn consume(mut from: Receiver, own: &Doorbell, other: &Doorbell, wake: &EventFd) {
        let mut n = 0;
        while n < FRAMES {
            from.refresh();
            let Some(entry) = from.front() else {
                own.lie_down();
                from.refresh();
                if from.is_empty() {
                    wait(wake);
                }
                own.get_up();
                continue;
            };
            assert_eq!((entry.word, entry.stamp_ns), (n as u32, n));
            assert_eq!(entry.frame, n.to_le_bytes());
            from.pop();
            n += 1;
            fence(Ordering::SeqCst);
            if from.take_starved() {
                other.ring();
            }
        }
    }

    #[test]
    fn two_that_sleep_whenever_they_can_lose_no_wake_up() {
        // The smaller the ring the more often each of them sleeps.
        for entries in [1, 2, 16] {
            let wakes = [(); 2].map(|()| Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")));
            let [near, far] = [0, 1].map(|n| Doorbell::new(wakes[n].clone()));
            let (to, from) = lane(entries, 8);
            std::thread::scope(|scope| {
                scope.spawn(|| produce(to, &near, &far, &wakes[0]));
                scope.spawn(|| consume(from, &far, &near, &wakes[1]));
            });
        }
    }
}
