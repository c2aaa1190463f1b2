//! A thread that watches an interface: does it exist, has it a link, how many queues, which
//! addresses.
//!
//! Invariants: the thread that moves packets pays one load a batch for it; nothing is reported
//! twice, and nothing that could not be read. Links and addresses are reported at once (rtnetlink), the rest within a second.
//!
//! Does not decide what follows from it.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::lock::Lock;
use crate::nic::rtnetlink::Rtnetlink;
use crate::ring::xsk::{Interface, InterfaceError};

/// What rtnetlink does not tell, the number of queues, is looked at this often.
const LOOK_MS: libc::c_int = 1000;

/// What there is to know of an interface at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Its index; `None`: there is no such interface.
    pub(super) index: Option<u32>,
    pub(super) has_link: bool,
    pub(super) rx_queues: u32,
    pub(super) addresses: Vec<IpAddr>,
}

impl Seen {
    /// Looks now. An error: it exists, but does not tell all. That is no news of it: what cannot be read is not 0.
    pub(super) fn of(name: &str) -> Result<Self, InterfaceError> {
        let interface = match Interface::find(name) {
            Ok(interface) => interface,
            Err(InterfaceError::Missing(_)) => return Ok(Self::default()),
            Err(e) => return Err(e),
        };
        Ok(Self {
            index: Some(interface.index()),
            has_link: interface.has_link()?,
            rx_queues: interface.rx_queues()?,
            addresses: interface.addresses()?,
        })
    }
}

#[derive(Debug)]
struct Shared {
    changed: AtomicBool,
    seen: Lock<Seen>,
    wake: EventFd,
}

/// The watching thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    stop: EventFd,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    /// Watches `name` in the network namespace of the caller. What differs from `seen` is a change.
    pub(super) fn start(name: &str, seen: Seen) -> io::Result<Self> {
        let netlink = Rtnetlink::open(true)?;
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared::new(seen)?);
        let watcher = Watcher {
            name: name.to_owned(),
            netlink,
            stop: stop.try_clone()?,
            shared: shared.clone(),
        };
        let thread = thread::Builder::new()
            .name(format!("watch-{name}"))
            .spawn(move || watcher.run())?;
        Ok(Self {
            shared,
            stop,
            thread: Some(thread),
        })
    }

    /// What is there now, if that has changed since the last call.
    pub(super) fn changed(&self) -> Option<Seen> {
        self.shared.take()
    }

    /// Readable when something has changed.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.shared.wake.as_raw_fd()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// For an interface that is known to be as `seen`.
    fn new(seen: Seen) -> io::Result<Self> {
        Ok(Self {
            changed: AtomicBool::new(false),
            seen: Lock::new(seen),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// It is like that now.
    fn report(&self, now: Seen) {
        let mut seen = self.seen.lock();
        if *seen != now {
            *seen = now;
            self.changed.store(true, Ordering::Relaxed);
            let _ = self.wake.write(1);
        }
    }

    /// What was reported since the last call.
    fn take(&self) -> Option<Seen> {
        self.take_with(|| {})
    }

    /// The same; something may happen `meanwhile`.
    fn take_with(&self, meanwhile: impl FnOnce()) -> Option<Seen> {
        if !self.changed.load(Ordering::Relaxed) {
            return None;
        }
        meanwhile();
        let seen = self.seen.lock();
        // Under the lock, under which it was written: who has taken a report is not woken for it any more.
        let _ = self.wake.read();
        self.changed.store(false, Ordering::Relaxed);
        Some(seen.clone())
    }
}

struct Watcher {
    name: String,
    netlink: Rtnetlink,
    stop: EventFd,
    shared: Arc<Shared>,
}

impl Watcher {
    fn run(self) {
        loop {
            self.look();
            let mut fds = [self.netlink.poll_fd(), self.stop.as_raw_fd()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: two pollfds on this stack.
            unsafe { libc::poll(fds.as_mut_ptr(), 2, LOOK_MS) };
            if fds[1].revents != 0 {
                return;
            }
            self.netlink.drain();
        }
    }

    /// Looks after the messages are drained, so that none is missed.
    fn look(&self) {
        match Seen::of(&self.name) {
            Ok(seen) => self.shared.report(seen),
            // Once more within a second; one that has gone meanwhile is missing then.
            Err(e) => tracing::debug!("{e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nic::testing::{in_namespace, ip, is_readable, make_veth};
    use colo_lab::seccomp::refuse_call;

    /// Who sleeps with a descriptor that stays readable does not sleep.
    #[test]
    fn a_report_that_was_taken_wakes_nobody_any_more() {
        let shared = Shared::new(Seen::default()).unwrap();
        let with = |rx_queues: u32| Seen {
            rx_queues,
            ..Seen::default()
        };
        let is_woken = || is_readable(shared.wake.as_raw_fd());
        assert_eq!((shared.take(), is_woken()), (None, false));
        shared.report(with(1));
        assert!(is_woken());
        // Another one is made while it is taken.
        let taken = shared.take_with(|| shared.report(with(2)));
        assert_eq!((taken, is_woken()), (Some(with(2)), false));
        assert_eq!(shared.take(), None);
        shared.report(with(2));
        assert_eq!((shared.take(), is_woken()), (None, false), "no news");
    }

    /// A NIC that is in use has no fewer queues, and no less of a link, because nobody says how many for a moment.
    #[test]
    fn what_cannot_be_read_is_no_news() {
        for asked in [libc::SIOCETHTOOL as u32, libc::SIOCGIFFLAGS as u32] {
            in_namespace(move || {
                make_veth(1, 1500);
                let seen = Seen::of("a0").unwrap();
                assert_eq!(seen.rx_queues, 1);
                let shared = Arc::new(Shared::new(seen).unwrap());
                let watcher = Watcher {
                    name: "a0".to_owned(),
                    netlink: Rtnetlink::open(true).unwrap(),
                    stop: EventFd::new(EFD_NONBLOCK).unwrap(),
                    shared: shared.clone(),
                };
                refuse_call(libc::SYS_ioctl, 1, asked, libc::ENOMEM).unwrap();
                watcher.look();
                assert_eq!(shared.take(), None);
                // One that is not there has none.
                ip("link del a1");
                watcher.look();
                assert_eq!(shared.take(), Some(Seen::default()));
            });
        }
    }
}
