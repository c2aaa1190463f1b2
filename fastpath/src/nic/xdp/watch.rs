//! A thread that watches an interface: does it exist, has it a link, how many queues, which
//! addresses.
//!
//! Invariants: the thread that moves packets pays one load a batch for it; nothing is reported
//! twice. Links and addresses are reported at once (rtnetlink), the rest within a second.
//!
//! Does not decide what follows from it.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::nic::rtnetlink::Rtnetlink;
use crate::ring::xsk::Interface;

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
    /// Looks now.
    pub(super) fn of(name: &str) -> Self {
        let Ok(interface) = Interface::find(name) else {
            return Self::default();
        };
        Self {
            index: Some(interface.index()),
            has_link: interface.has_link().unwrap_or(false),
            rx_queues: interface.rx_queues().unwrap_or(0),
            addresses: interface.addresses().unwrap_or_default(),
        }
    }
}

#[derive(Debug)]
struct Shared {
    changed: AtomicBool,
    seen: Mutex<Seen>,
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
        let shared = Arc::new(Shared {
            changed: AtomicBool::new(false),
            seen: Mutex::new(seen),
            wake: EventFd::new(EFD_NONBLOCK)?,
        });
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
        if !self.shared.changed.load(Ordering::Relaxed) {
            return None;
        }
        let _ = self.shared.wake.read();
        let seen = self.shared.lock();
        self.shared.changed.store(false, Ordering::Relaxed);
        Some(seen.clone())
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
    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        // Nothing is left half done under this lock.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
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
        let now = Seen::of(&self.name);
        let mut seen = self.shared.lock();
        if *seen != now {
            *seen = now;
            self.shared.changed.store(true, Ordering::Relaxed);
            let _ = self.shared.wake.write(1);
        }
    }
}
