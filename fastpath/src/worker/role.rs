//! What a worker does with frames, as a policy that can be exchanged while it runs.
//!
//! Invariants: a role is called only at packet boundaries and never blocks; it owns the tokens it
//! keeps and gives them back in [`Role::leave`].
//!
//! The unreplicated role is here; those of a pair are built on the packet cores.

use std::any::Any;

use colo_compare::Token;

use super::edge::{Edge, Handed};
use super::port::Delivery;

/// Frames that one step moves at most in each direction.
pub const BATCH: usize = 64;

/// The policy of a worker.
pub trait Role: Any + Send {
    /// For logs and reports.
    fn name(&self) -> &'static str;

    /// The thread is awake: called before anything else is done, commands included, so that a role
    /// can notice that it was not for too long (rule 18).
    fn awake(&mut self, _now_us: u64) {}

    /// When [`Role::awake`] is to be called at the latest, quiesced or not.
    fn watch_us(&self) -> Option<u64> {
        None
    }

    /// Does one batch of work. Gives whether there was any: then it is called again at once.
    fn step(&mut self, edge: &mut Edge, now_us: u64) -> bool;

    /// When it wants to be called though nothing arrives.
    fn deadline_us(&self) -> Option<u64> {
        None
    }

    /// Whether a frame at the NIC is work for it at present.
    fn wants_nic_frames(&self, edge: &mut Edge) -> bool {
        edge.guest_has_room()
    }

    /// Whether a frame of the guest is work for it at present; without that the worker may sleep
    /// though the guest has output.
    fn wants_guest_frames(&self) -> bool {
        true
    }

    /// Whether the guest's queues may be touched at present; other workers' frames for the guest wait
    /// as long. If not, the worker writes nothing to the guest's memory.
    fn serves_guest(&self) -> bool {
        true
    }

    /// Whether frames may be let gather under a heavy load. Not where a frame passes several workers one after the other,
    /// each of which would wait.
    fn may_gather(&self, _edge: &Edge) -> bool {
        false
    }

    /// Whether a frame passes several workers one after the other, which poll for each other.
    fn passes_on(&self) -> bool {
        false
    }

    /// Whether the guest is shown the link of this host's NIC. The replica of a guest that runs elsewhere is not.
    fn shows_link(&self) -> bool {
        true
    }

    /// Adds descriptors that wake it. `revents` are not reported: it tries them in its next step.
    fn poll_fds(&self, _fds: &mut Vec<libc::pollfd>) {}

    /// A frame that [`Edge::guest_deliver`] handed to another worker: what became of it.
    fn delivered(&mut self, edge: &mut Edge, _now_us: u64, _delivery: Delivery, token: Token) {
        edge.release(token);
    }

    /// The epoch ends: takes what other workers have taken from the guest for this shard
    /// ([`Edge::guest_take_crossed`]), because the guest has the buffers back (rule 12).
    fn absorb(&mut self, _edge: &mut Edge, _now_us: u64) {}

    /// The worker stops here, at a packet boundary, until it resumes (rule 12).
    fn quiesce(&mut self, _edge: &mut Edge) {}

    /// The worker goes on.
    fn resume(&mut self, _edge: &mut Edge) {}

    /// Another role takes over: gives back all tokens.
    fn leave(&mut self, _edge: &mut Edge) {}
}

/// The role of a VM that is not replicated: everything goes through.
#[derive(Debug, Default)]
pub struct Solo {
    /// A frame that the NIC had no room for.
    unsent: Option<Token>,
}

impl Solo {
    fn nic_to_guest(&mut self, edge: &mut Edge) -> usize {
        let mut moved = 0;
        // Without room in the guest, frames are left in the NIC's queue.
        while moved < BATCH && edge.guest_has_room() {
            let Some(token) = edge.nic_receive() else {
                break;
            };
            // Lost as on a wire where the guest's buffers are of no use.
            if let Handed::Now(_, token) = edge.guest_deliver(token) {
                edge.release(token);
            }
            moved += 1;
        }
        moved
    }

    fn guest_to_nic(&mut self, edge: &mut Edge) -> usize {
        let mut moved = 0;
        while moved < BATCH {
            let next = self.unsent.take().or_else(|| edge.guest_take_unseen());
            let Some(token) = next else {
                break;
            };
            if let Err(token) = edge.nic_send(token) {
                self.unsent = Some(token);
                break;
            }
            moved += 1;
        }
        moved
    }
}

impl Role for Solo {
    fn name(&self) -> &'static str {
        "solo"
    }

    fn step(&mut self, edge: &mut Edge, _now_us: u64) -> bool {
        self.guest_to_nic(edge) + self.nic_to_guest(edge) > 0
    }

    fn wants_guest_frames(&self) -> bool {
        self.unsent.is_none()
    }

    fn may_gather(&self, edge: &Edge) -> bool {
        !edge.is_sharded()
    }

    fn leave(&mut self, edge: &mut Edge) {
        if let Some(token) = self.unsent.take() {
            edge.release(token);
        }
    }
}
