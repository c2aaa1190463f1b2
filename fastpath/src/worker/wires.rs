//! How a port reaches its guest and is reached by it.
//!
//! Invariants: the descriptors do not block.
//!
//! Does not know what is said over them.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::ring::{Call, GuestRam};

/// The wiring of a device whose guest has one doorbell.
#[derive(Debug)]
pub struct PortWiring {
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// The device's interrupt.
    pub call: Arc<Call>,
    /// Written when the guest notifies a queue. Non-blocking.
    pub kick: EventFd,
}

/// What a port is connected to.
#[derive(Debug)]
pub(super) struct Wires {
    pub(super) ram: Arc<GuestRam>,
    pub(super) call: Arc<Call>,
    kicks: Kicks,
}

#[derive(Debug)]
enum Kicks {
    Shared(EventFd),
    PerQueue([Option<EventFd>; 2]),
}

impl From<PortWiring> for Wires {
    fn from(wiring: PortWiring) -> Self {
        Self {
            ram: wiring.ram,
            call: wiring.call,
            kicks: Kicks::Shared(wiring.kick),
        }
    }
}

impl Wires {
    /// With a doorbell for each queue; a queue without one is polled.
    pub(super) fn per_queue(
        ram: Arc<GuestRam>,
        call: Arc<Call>,
        kicks: [Option<EventFd>; 2],
    ) -> Self {
        let kicks = Kicks::PerQueue(kicks);
        Self { ram, call, kicks }
    }

    /// Whether the guest rings for all its queues.
    pub(super) fn every_queue_rings(&self) -> bool {
        match &self.kicks {
            Kicks::Shared(_) => true,
            Kicks::PerQueue(kicks) => kicks.iter().all(Option::is_some),
        }
    }

    /// What the guest's notifications make readable.
    pub(super) fn kick_fds(&self) -> impl Iterator<Item = RawFd> {
        self.kicks().map(|kick| kick.as_raw_fd())
    }

    /// Forgets notifications that have arrived, and gives how many did.
    pub(super) fn drain_kicks(&self) -> io::Result<u64> {
        let mut count = 0;
        for kick in self.kicks() {
            match kick.read() {
                Ok(n) => count += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(count)
    }

    fn kicks(&self) -> impl Iterator<Item = &EventFd> {
        let (shared, per_queue) = match &self.kicks {
            Kicks::Shared(kick) => (Some(kick), None),
            Kicks::PerQueue(kicks) => (None, Some(kicks)),
        };
        let per_queue = per_queue.into_iter().flatten().flatten();
        shared.into_iter().chain(per_queue)
    }
}
