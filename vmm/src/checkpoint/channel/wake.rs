//! Wakes the thread that owns a channel, from any other one.
//!
//! Invariants: a wake-up is never lost, several may become one; a channel that was shut down stays so.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// A handle of a channel for other threads; cheap to clone.
#[derive(Debug, Clone)]
pub struct Waker(Arc<State>);

#[derive(Debug)]
struct State {
    /// Blocking, so that the ring waits for it instead of failing.
    event: EventFd,
    shut_down: AtomicBool,
}

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(State {
            event: EventFd::new(EFD_CLOEXEC)?,
            shut_down: AtomicBool::new(false),
        })))
    }

    /// Lets the owner's [`poll`](super::PageChannel::poll) return [`Woken`](super::Event::Woken), now or the next time.
    pub fn wake(&self) {
        // It would fail (or block) after 2^64 - 2 wake-ups that nobody has read.
        let _ = self.0.event.write(1);
    }

    /// Ends the channel: whatever its owner waits for fails with [`ShutDown`](super::ChannelError::ShutDown).
    pub fn shut_down(&self) {
        // Release: what was written before is seen by the owner; pairs with Acquire in `is_shut_down`.
        self.0.shut_down.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn is_shut_down(&self) -> bool {
        self.0.shut_down.load(Ordering::Acquire)
    }
}

impl AsRawFd for Waker {
    fn as_raw_fd(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }
}
