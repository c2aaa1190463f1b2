//! A frame of the PVM that has not left, and what is known of it.
//!
//! Does not know what it waits for: its flow does.

use crate::action::Right;
use crate::frames::Token;
use crate::wire::{Layout, Packet};

use super::{CLEARED, DEFERRED, FlowId};

/// A PVM frame that has not left.
#[derive(Debug)]
pub(crate) struct Held {
    /// Place in the production order of the whole VM.
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    pub(crate) token: Token,
    pub(crate) packet: Layout,
    /// The input that must be acknowledged before it leaves (rule 5).
    pub(crate) stamp: u64,
    pub(crate) at_us: u64,
    /// Its flow, [`DEFERRED`] or [`CLEARED`].
    pub(crate) flow: FlowId,
    /// TCP: which connection between these ports.
    pub(crate) incarnation: u32,
    /// TCP: its flow knows that the PVM has produced it.
    pub(crate) is_counted: bool,
    /// TCP: below it the bytes have been found equal.
    pub(crate) matched_to: Option<u32>,
    /// Why it may leave, when it only waits for the end of muteness.
    pub(crate) right: Right,
}

/// What is known of a PVM frame when it comes.
#[derive(Debug)]
pub(crate) struct Produced {
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    pub(crate) token: Token,
    pub(crate) stamp: u64,
    pub(crate) at_us: u64,
}

impl Produced {
    /// The frame before it has a flow.
    #[inline(always)]
    pub(crate) fn held(self, packet: &Packet) -> Held {
        Held {
            id: self.id,
            epoch: self.epoch,
            token: self.token,
            packet: packet.layout,
            stamp: self.stamp,
            at_us: self.at_us,
            flow: DEFERRED,
            incarnation: 0,
            is_counted: false,
            matched_to: None,
            right: Right::Alone,
        }
    }
}

impl Held {
    /// The frame before it had a flow.
    pub(crate) fn again(self) -> Produced {
        Produced {
            id: self.id,
            epoch: self.epoch,
            token: self.token,
            stamp: self.stamp,
            at_us: self.at_us,
        }
    }

    pub(crate) fn is_cleared(&self) -> bool {
        self.flow == CLEARED
    }
}
