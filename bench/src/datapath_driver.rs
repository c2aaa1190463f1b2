//! A driver without a guest: what comes in its receive queue goes out by its transmit queue, in the
//! same buffer.
//!
//! Invariants: buffer n belongs to descriptor n of both queues and is in one of them, or in the hands of
//! the device; descriptors of guest_rx are written once.
//!
//! Looks at no frame.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use colo_fastpath::ring::{GuestRam, MemoryError, QUEUE_SIZE_MAX, QueueState};
use colo_fastpath::worker::PortState;

/// Guest memory that the queues and buffers need.
pub(crate) const RAM_BYTES: u64 = BUFFERS_AT + BUFFER_BYTES * QUEUE_SIZE_MAX as u64;

const QUEUES_AT: [u64; 2] = [0x4000, 0x8000];
const BUFFERS_AT: u64 = 0x10000;
const BUFFER_BYTES: u64 = 2048;
const DESCRIPTOR_WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;

/// Both queues.
#[derive(Debug)]
pub(crate) struct Forwarder {
    guest_rx: Ring,
    guest_tx: Ring,
    /// Frames that the device has taken and given back.
    pub(crate) sent: u64,
}

impl Forwarder {
    /// Lays the queues out and offers all buffers.
    pub(crate) fn new(ram: &Arc<GuestRam>) -> Result<Self, MemoryError> {
        let [guest_rx, guest_tx] = QUEUES_AT.map(|at| Ring::new(ram.clone(), at));
        let mut new = Self {
            guest_rx,
            guest_tx,
            sent: 0,
        };
        for ring in [&new.guest_rx, &new.guest_tx] {
            ring.ram
                .store_u16(ring.state.avail, NO_INTERRUPT, Ordering::Relaxed)?;
        }
        for id in 0..QUEUE_SIZE_MAX {
            new.guest_rx
                .describe(id, BUFFER_BYTES as u32, DESCRIPTOR_WRITE)?;
            new.guest_rx.offer(id)?;
        }
        new.guest_rx.publish()?;
        Ok(new)
    }

    /// What the device needs to know.
    pub(crate) fn queue_states(&self) -> PortState {
        [self.guest_rx.state, self.guest_tx.state]
    }

    /// Moves all that the device has brought, and gives whether that was anything.
    pub(crate) fn turn(&mut self) -> Result<bool, MemoryError> {
        let mut moved = false;
        while let Some((id, written)) = self.guest_rx.take_used()? {
            self.guest_tx.describe(id, written, 0)?;
            self.guest_tx.offer(id)?;
            moved = true;
        }
        while let Some((id, _)) = self.guest_tx.take_used()? {
            self.guest_rx.offer(id)?;
            self.sent += 1;
            moved = true;
        }
        if moved {
            self.guest_tx.publish()?;
            self.guest_rx.publish()?;
        }
        Ok(moved)
    }
}

/// A split queue, driver's side (virtio 1.3, section 2.7), whose chains are single buffers.
#[derive(Debug)]
struct Ring {
    ram: Arc<GuestRam>,
    state: QueueState,
    avail_idx: u16,
    used_idx: u16,
}

impl Ring {
    fn new(ram: Arc<GuestRam>, at: u64) -> Self {
        let state = QueueState {
            size: QUEUE_SIZE_MAX,
            ready: true,
            descriptors: at,
            avail: at + 0x1000,
            used: at + 0x2000,
            ..QueueState::default()
        };
        Self {
            ram,
            state,
            avail_idx: 0,
            used_idx: 0,
        }
    }

    fn describe(&self, id: u16, bytes: u32, flags: u16) -> Result<(), MemoryError> {
        let mut descriptor = [0; 16];
        let buffer = BUFFERS_AT + BUFFER_BYTES * u64::from(id);
        descriptor[..8].copy_from_slice(&buffer.to_le_bytes());
        descriptor[8..12].copy_from_slice(&bytes.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        self.ram
            .write(self.state.descriptors + 16 * u64::from(id), &descriptor)
    }

    fn offer(&mut self, id: u16) -> Result<(), MemoryError> {
        let slot = u64::from(self.avail_idx % self.state.size);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.ram
            .store_u16(self.state.avail + 4 + 2 * slot, id, Ordering::Relaxed)
    }

    fn publish(&self) -> Result<(), MemoryError> {
        self.ram
            .store_u16(self.state.avail + 2, self.avail_idx, Ordering::Release)
    }

    /// The descriptor that came back, and how much was written to its buffer.
    fn take_used(&mut self) -> Result<Option<(u16, u32)>, MemoryError> {
        if self.ram.load_u16(self.state.used + 2, Ordering::Acquire)? == self.used_idx {
            return Ok(None);
        }
        let slot = u64::from(self.used_idx % self.state.size);
        let mut element = [0; 8];
        self.ram
            .read(self.state.used + 4 + 8 * slot, &mut element)?;
        self.used_idx = self.used_idx.wrapping_add(1);
        let [i0, i1, _, _, w0, w1, w2, w3] = element;
        let written = u32::from_le_bytes([w0, w1, w2, w3]);
        Ok(Some((u16::from_le_bytes([i0, i1]), written)))
    }
}
