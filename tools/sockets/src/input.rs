//! One input with what the engine knows about it: whether to read, and what is on its way to the comparator.
//!
//! Invariants: one read a call; where there was no room to read into, it is not tried again before there is some.

use colo_compare::Token;

use crate::address::Socket;
use crate::error::SocketsError;
use crate::intake::{Filled, Intake, Taken};
use crate::slab::{Side, Slab};

/// Frames of each input that are given to the comparator at once.
pub(crate) const BATCH: usize = 64;

/// One input and what is known about it.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) intake: Intake,
    side: Side,
    /// There may be something to read.
    pub(crate) ready: bool,
    /// Frames on their way to the comparator.
    pub(crate) batch: Vec<Token>,
    /// There may be whole frames that the comparator cannot take at present.
    pub(crate) backlog: bool,
    /// There was no block to read into, with so many slots free.
    starved: Option<usize>,
}

impl Input {
    pub(crate) fn new(socket: Socket, side: Side, vnet_hdr: bool, slab: &mut Slab) -> Self {
        Self {
            intake: Intake::new(socket, side, vnet_hdr, slab),
            side,
            ready: true,
            batch: Vec::with_capacity(BATCH),
            backlog: false,
            starved: None,
        }
    }

    /// Whether a read is of use.
    pub(crate) fn wants_reading(&self, slab: &Slab) -> bool {
        let starved = self.starved == Some(slab.free_slots(self.side));
        !self.intake.has_ended() && !self.backlog && !starved
    }

    /// Reads once, if there may be something. Gives whether there was.
    pub(crate) fn read(&mut self, slab: &mut Slab) -> Result<bool, SocketsError> {
        if !self.ready || !self.wants_reading(slab) {
            return Ok(false);
        }
        let before = self.intake.unparsed();
        let filled = self.intake.fill(slab)?;
        let is_starved = filled == Filled::NoRoom;
        self.starved = is_starved.then(|| slab.free_slots(self.side));
        self.ready = matches!(filled, Filled::Full | Filled::NoRoom);
        Ok(self.intake.unparsed() > before)
    }

    /// Cuts up to `most` frames off, but no more than `room`.
    pub(crate) fn take(
        &mut self,
        most: usize,
        room: usize,
        slab: &mut Slab,
    ) -> Result<(), SocketsError> {
        let taken = self.intake.take(most.min(room), &mut self.batch, slab)?;
        self.backlog = room == 0 || taken == Taken::NoSlot;
        Ok(())
    }
}
