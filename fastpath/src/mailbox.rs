//! Events from one thread to another that waits with `poll`: a channel and an eventfd.
//!
//! Invariants: the descriptor is readable whenever an event may be waiting; sending never blocks.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The sending side; cheap to clone.
#[derive(Debug)]
pub struct Post<T> {
    sender: Sender<T>,
    wake: Arc<EventFd>,
}

impl<T> Clone for Post<T> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            wake: self.wake.clone(),
        }
    }
}

impl<T> Post<T> {
    /// Sends an event; one to a thread that has ended is of no use to anybody and is dropped.
    pub fn send(&self, event: T) {
        if self.sender.send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// The receiving side.
#[derive(Debug)]
pub struct Mailbox<T> {
    receiver: Receiver<T>,
    wake: Arc<EventFd>,
}

impl<T> Mailbox<T> {
    /// Both ends.
    pub fn new() -> io::Result<(Post<T>, Self)> {
        let (sender, receiver) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok((
            Post {
                sender,
                wake: wake.clone(),
            },
            Self { receiver, wake },
        ))
    }

    /// Becomes readable when an event is sent.
    pub fn poll_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// The next event, if there is one.
    pub fn try_next(&self) -> Option<T> {
        if let Ok(event) = self.receiver.try_recv() {
            return Some(event);
        }
        // Cleared only when empty, then looked at once more, so that no event is slept over.
        let _ = self.wake.read();
        self.receiver.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable<T>(mailbox: &Mailbox<T>) -> bool {
        let mut fd = libc::pollfd {
            fd: mailbox.poll_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd, no wait.
        unsafe { libc::poll(&mut fd, 1, 0) == 1 }
    }

    #[test]
    fn the_descriptor_tells_of_every_event() {
        let (post, mailbox) = Mailbox::new().unwrap();
        assert!(!readable(&mailbox));
        post.send(1);
        post.clone().send(2);
        assert!(readable(&mailbox));
        assert_eq!(
            (mailbox.try_next(), mailbox.try_next(), mailbox.try_next()),
            (Some(1), Some(2), None)
        );
        assert!(!readable(&mailbox));
        post.send(3);
        assert!(readable(&mailbox));
    }
}
