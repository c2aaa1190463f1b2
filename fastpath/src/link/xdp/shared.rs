//! The link's AF_XDP sockets on the memory of the worker's frame pool: what they receive becomes a token where it lies.
//!
//! Invariants: what the pool has lent is in the table; a slot that becomes a frame is exchanged for a free one, so that the
//! port never has less to receive into; a slot that a NIC may still write goes back to the pool only when the kernel has let go
//! of it. A pool of other memory than the sockets were bound with lends nothing.
//!
//! Does not read what was received.

use std::io;

use colo_compare::Token;

use super::chunks::{Chunks, PoolMemory};
use super::open::{
    FILL_CHUNKS, FILL_CHUNKS_MIN, Memory, bind_all, bind_options, bind_patiently, payload_max,
};
use super::{SEND_CHUNKS, XdpPort, XdpPortError};
use crate::frame::FramePool;
use crate::link::port::Slot;
use crate::link::reliable::RECEIVE_WINDOW;
use crate::ring::xsk::{CopyMode, Interface, XskError};

/// Of the pool's slots, the link borrows one in so many at most to receive into, and to send from.
const RECEIVE_SHARE: usize = 8;
const SEND_SHARE: usize = 32;
/// As long as fewer than one in so many are free, it borrows none.
const SPARE_SHARE: usize = 16;

/// What the pool has lent.
#[derive(Debug)]
pub(super) struct Loan {
    pool: PoolMemory,
    /// By slot: whether it is the port's now.
    lent: Box<[bool]>,
    /// Slots to receive into and to send from, wanted and borrowed.
    receiving: (usize, usize),
    sending: (usize, usize),
}

impl Loan {
    /// Whether the slot is the port's.
    pub(super) fn has(&self, slot: u32) -> bool {
        self.lent.get(slot as usize).is_some_and(|lent| *lent)
    }

    /// Whether there are slots to send from, here or in the kernel.
    pub(super) fn can_send(&self) -> bool {
        self.sending.1 > 0
    }

    fn wants(&self) -> bool {
        self.receiving.1 < self.receiving.0 || self.sending.1 < self.sending.0
    }
}

/// Binds the sockets to the memory of a pool.
pub(super) fn open(
    pool: &PoolMemory,
    interface: &Interface,
    queues: &[u32],
) -> Result<Memory, XdpPortError> {
    let slots = pool.slots();
    let receiving = (RECEIVE_WINDOW + FILL_CHUNKS).min(slots / RECEIVE_SHARE);
    let sending = SEND_CHUNKS.min(slots / SEND_SHARE);
    let fill_target = receiving / 2 / queues.len().max(1);
    if fill_target < FILL_CHUNKS_MIN {
        let queues = queues.len() as u32;
        return Err(XdpPortError::FewSlots { slots, queues });
    }
    let chunk_bytes = pool.chunk_bytes().ok_or(XdpPortError::SmallSlots)?;
    let chunks = Chunks::of_pool(pool, chunk_bytes);
    let sockets = bind_all(&chunks, interface, queues)?;
    Ok(Memory {
        chunks,
        sockets,
        count: slots,
        payload_max: payload_max(chunk_bytes),
        fill_target,
        free: Vec::with_capacity(receiving),
        sendable: Vec::with_capacity(sending).into(),
        loan: Some(Loan {
            pool: pool.clone(),
            lent: vec![false; slots].into_boxed_slice(),
            receiving: (receiving, 0),
            sending: (sending, 0),
        }),
    })
}

impl XdpPort {
    pub(super) fn borrow_from(&mut self, frames: &mut FramePool) {
        let Some(loan) = &mut self.loan else { return };
        if !loan.wants() || !loan.pool.is_of(frames) {
            return;
        }
        let spare = loan.pool.slots() / SPARE_SHARE;
        while loan.wants() && frames.free_slots() > spare {
            let Some((slot, _)) = frames.lend() else {
                break;
            };
            loan.lent[slot as usize] = true;
            if loan.sending.1 < loan.sending.0 {
                loan.sending.1 += 1;
                self.sendable.push_back(slot);
            } else {
                loan.receiving.1 += 1;
                self.free.push(slot);
            }
        }
        self.refill();
    }

    pub(super) fn adopt_into(
        &mut self,
        slot: Slot,
        start: usize,
        len: usize,
        frames: &mut FramePool,
    ) -> Result<Token, Slot> {
        let Some(loan) = &mut self.loan else {
            return Err(slot);
        };
        let (offset, received) = self.places[slot.0 as usize];
        let within = (offset - self.chunks.offset_of(slot.0 as usize)) as usize + start;
        let inside = start + len <= received && within + len <= frames.slot_bytes();
        let Some((fresh, _)) = inside.then(|| frames.lend()).flatten() else {
            return Err(slot);
        };
        loan.lent[fresh as usize] = true;
        self.free.push(fresh);
        loan.lent[slot.0 as usize] = false;
        frames.adopt(slot.0, within, len).ok_or(slot)
    }

    pub(super) fn leave_pool(&mut self, frames: &mut FramePool) {
        let Some(loan) = self.loan.take() else { return };
        let writes_itself = self.queues.iter().any(|queue| queue.socket.is_zero_copy());
        let numbers = self.queues.iter().map(|queue| queue.socket.queue());
        let queues: Vec<u32> = numbers.collect();
        let interface = self.queues.first().map(|q| q.socket.interface().clone());
        // In copy mode the kernel writes nothing any more once a socket is closed.
        self.queues.clear();
        self.sendable.clear();
        self.free.clear();
        if let (true, Some(interface)) = (writes_itself, interface)
            && !has_let_go(&interface, &queues).unwrap_or(false)
        {
            let name = interface.name();
            tracing::warn!(
                "packet channel: {name} is still in use by the kernel; the frame slots it may write to are given up"
            );
            return;
        }
        for (slot, lent) in (0..).zip(&loan.lent) {
            if *lent {
                frames.give_back(slot);
            }
        }
    }
}

/// Whether the kernel has let go of all queues, so that a NIC no longer writes to the memory of sockets that were closed.
fn has_let_go(interface: &Interface, queues: &[u32]) -> io::Result<bool> {
    let chunks = Chunks::new(1, 4096)?;
    let options = bind_options(CopyMode::Copy);
    for queue in queues {
        let umem = chunks.umem().map_err(io::Error::other)?;
        let bound = bind_patiently(&umem, interface, *queue, &options);
        if matches!(bound, Err(XskError::Busy { .. })) {
            return Ok(false);
        }
    }
    Ok(true)
}
