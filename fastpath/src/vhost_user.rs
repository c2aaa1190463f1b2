//! A guest behind a vhost-user socket: another VMM, or a program with a virtio driver of its own.
//!
//! Invariants: the worker thread alone touches rings and payload, this module only says where they
//! are; a front-end that breaks the protocol or dies loses its connection and its rings, nothing
//! else; the next one finds the socket as the first did.
//!
//! A front-end shares its memory by file descriptor and is trusted not to truncate the files while
//! they are in use. What its driver writes into rings is not trusted (see `ring`).

mod device;
mod line;
mod server;
mod table;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::ring::GuestRam;
use crate::worker::{PortState, WorkerGone, WorkerHandle};

pub use server::{SocketError, VhostUserServer};
pub use table::TableError;

crate::counters! {
    /// What happened on a vhost-user socket.
    VhostUserStats => VhostUserSnapshot {
        /// Front-ends that connected.
        connections,
        /// Front-ends that left, died or were sent away.
        disconnections,
        /// Requests answered.
        requests,
        /// Requests that cost their front-end the connection.
        refused,
        /// Times both rings went into service.
        starts,
        /// Times they were taken out of service.
        stops,
    }
}

/// Both rings of a front-end, and the memory they lie in: guest_rx, then guest_tx.
#[derive(Debug)]
pub struct GuestRings {
    /// Memory of the guest.
    pub ram: Arc<GuestRam>,
    /// Where the rings are and how far they have come.
    pub queues: PortState,
    /// Made readable by the guest's notifications; a ring without one is polled.
    pub kicks: [Option<EventFd>; 2],
    /// Written to call the guest.
    pub calls: [Option<EventFd>; 2],
    /// Written when a ring turns out to be broken.
    pub errors: [Option<EventFd>; 2],
}

/// Who serves the rings.
pub trait GuestSide: Send + 'static {
    /// Takes the rings into service.
    fn attach(&mut self, rings: GuestRings) -> Result<(), WorkerGone>;

    /// Lets go of rings and memory; returns when that is done. Gives how far the rings had come,
    /// `None` when they were broken.
    fn detach(&mut self) -> Result<Option<PortState>, WorkerGone>;
}

impl GuestSide for WorkerHandle {
    fn attach(&mut self, rings: GuestRings) -> Result<(), WorkerGone> {
        self.attach_guest(rings)
    }

    fn detach(&mut self) -> Result<Option<PortState>, WorkerGone> {
        self.detach_guest()
    }
}

#[cfg(test)]
mod tests;
