//! How long a vCPU that was woken waits for a processor, and whether it is to look for another one.
//!
//! Linux leaves a thread that wakes often where it ran last, and on a virtual machine takes a processor that is halted for
//! one that it does not have: two guests that are woken at the same time can run one after the other for long, while
//! another processor idles.
//!
//! Invariants: a vCPU whose waits are as short as waking an idle processor never moves; where moving did not help it is tried
//! half as often each time, down to once in [`TRIES_MAX`] judgements.
//!
//! Does not move anybody.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// One in so many sleeps is looked at, which takes two reads.
const SLEEPS: u32 = 8;
/// A wait that is longer is for somebody else. To wake a halted processor was seen to take 21.
const LONG_NS: u64 = 25_000;
/// Waits that are judged together, and how many of them have to be long: of two guests on one processor each is the second
/// now and then.
const WAITS: u32 = 16;
const LONG_WAITS: u32 = 4;
/// Judgements in a row that make it move.
const TRIES_MIN: u32 = 1;
const TRIES_MAX: u32 = 1 << 8;

/// The waits of one thread, which owns it.
#[derive(Debug)]
pub(super) struct Waits {
    /// The kernel's figures of the thread.
    schedstat: Option<File>,
    sleeps: u32,
    /// What the kernel said before the present sleep, if it is looked at.
    before_ns: Option<u64>,
    waits: u32,
    long: u32,
    tries: u32,
    patience: u32,
}

impl Waits {
    /// Of nobody: no wait is ever too long.
    pub(super) fn none() -> Self {
        Self {
            schedstat: None,
            sleeps: 0,
            before_ns: None,
            waits: 0,
            long: 0,
            tries: 0,
            patience: TRIES_MIN,
        }
    }

    /// Of the calling thread, where the kernel tells.
    pub(super) fn of_this_thread() -> Self {
        Self {
            schedstat: File::open("/proc/thread-self/schedstat").ok(),
            ..Self::none()
        }
    }

    /// The thread is about to sleep.
    pub(super) fn lie_down(&mut self) {
        self.sleeps = (self.sleeps + 1) % SLEEPS;
        self.before_ns = match self.sleeps {
            0 => self.schedstat.as_ref().and_then(waited_ns),
            _ => None,
        };
    }

    /// It was woken and runs again. Gives whether it is to move.
    pub(super) fn get_up(&mut self) -> bool {
        let Some(before_ns) = self.before_ns.take() else {
            return false;
        };
        let now_ns = self.schedstat.as_ref().and_then(waited_ns);
        now_ns.is_some_and(|now_ns| self.waited(now_ns.saturating_sub(before_ns)))
    }

    fn waited(&mut self, ns: u64) -> bool {
        self.waits += 1;
        self.long += u32::from(ns > LONG_NS);
        if self.waits < WAITS {
            return false;
        }
        let is_crowded = self.long >= LONG_WAITS;
        (self.waits, self.long) = (0, 0);
        if !is_crowded {
            (self.tries, self.patience) = (0, TRIES_MIN);
            return false;
        }
        self.tries += 1;
        if self.tries < self.patience {
            return false;
        }
        self.tries = 0;
        self.patience = (self.patience * 2).min(TRIES_MAX);
        true
    }
}

/// The second figure: nanoseconds for which the thread wanted to run and did not.
fn waited_ns(schedstat: &File) -> Option<u64> {
    let mut text = [0; 80];
    let len = schedstat.read_at(&mut text, 0).ok()?;
    let text = str::from_utf8(&text[..len]).ok()?;
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: [u32; 0] = [];

    /// So many judgements, with as many long waits each; which of them say that it is to move.
    fn moves(waits: &mut Waits, judgements: u32, long: u32) -> Vec<u32> {
        let judged = (1..=judgements).filter(|_| {
            let each = (0..WAITS).map(|n| LONG_NS + u64::from(n < long));
            // The last of them decides.
            each.map(|ns| waits.waited(ns))
                .fold(false, |any, moved| any | moved)
        });
        judged.collect()
    }

    #[test]
    fn who_often_waits_moves_and_is_more_patient_each_time() {
        let mut waits = Waits::none();
        assert_eq!(moves(&mut waits, 7, LONG_WAITS), [1, 3, 7]);
        assert_eq!(moves(&mut waits, 1, 0), NEVER, "it helped");
        assert_eq!(moves(&mut waits, 1, WAITS), [1]);
        assert_eq!(moves(&mut waits, 100, LONG_WAITS - 1), NEVER);
        moves(&mut waits, 1000, WAITS);
        assert_eq!(moves(&mut waits, 2 * TRIES_MAX, WAITS).len(), 2);
    }

    #[test]
    fn one_in_so_many_sleeps_is_looked_at() {
        let mut waits = Waits::of_this_thread();
        let told = waits
            .schedstat
            .as_ref()
            .is_some_and(|file| waited_ns(file).is_some());
        for _ in 0..SLEEPS {
            waits.lie_down();
            waits.get_up();
        }
        assert_eq!(waits.waits, u32::from(told));
        let mut mute = Waits::none();
        for _ in 0..SLEEPS * WAITS {
            mute.lie_down();
            assert!(!mute.get_up());
        }
        assert_eq!(mute.waits, 0);
    }
}
