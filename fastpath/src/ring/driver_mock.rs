//! The driver's side of a split virtqueue, for tests and benches.
//!
//! Invariants: it writes through [`GuestRam`], never around it; descriptors are given out in a ring
//! and not before their chain came back.
//!
//! Does not negotiate: the caller fills in the [`QueueState`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::error::MemoryError;
use super::memory::GuestRam;
use super::virtqueue::{QueueState, Segment};

/// Bytes of guest memory that a mock queue of 256 entries takes at its base.
pub const QUEUE_BYTES: u64 = 0x3000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// What came back from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub written: u32,
}

/// A queue as a driver sees it.
#[derive(Debug)]
pub struct DriverMock {
    ram: Arc<GuestRam>,
    state: QueueState,
    free: VecDeque<u16>,
    lengths: Vec<u16>,
    avail_idx: u16,
    used_seen: u16,
}

impl DriverMock {
    /// Lays out an empty queue of `size` entries at `base` (4 KiB aligned).
    pub fn new(ram: Arc<GuestRam>, base: u64, size: u16, event_idx: bool) -> Self {
        let state = QueueState {
            size,
            ready: true,
            event_idx,
            indirect: true,
            descriptors: base,
            avail: base + 0x1000,
            used: base + 0x2000,
            ..QueueState::default()
        };
        let free = (0..size).collect();
        Self {
            ram,
            state,
            free,
            lengths: vec![0; size.into()],
            avail_idx: 0,
            used_seen: 0,
        }
    }

    /// Goes on in memory that has the same contents.
    pub fn move_to(&mut self, ram: Arc<GuestRam>) {
        self.ram = ram;
    }

    /// What the device needs to know.
    pub fn queue_state(&self) -> QueueState {
        self.state
    }

    /// Writes one raw descriptor.
    pub fn write_descriptor(
        &self,
        index: u16,
        buffer: Segment,
        flags: u16,
        next: u16,
    ) -> Result<(), MemoryError> {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&buffer.gpa.to_le_bytes());
        raw[8..12].copy_from_slice(&buffer.len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.ram
            .write(self.state.descriptors + 16 * u64::from(index), &raw)
    }

    /// Offers a chain: `readable` buffers, then `writable` ones. Gives its head, or `None` when too
    /// few descriptors are free.
    pub fn offer(
        &mut self,
        readable: &[Segment],
        writable: &[Segment],
    ) -> Result<Option<u16>, MemoryError> {
        let count = readable.len() + writable.len();
        if count == 0 || count > self.free.len() {
            return Ok(None);
        }
        let indices: Vec<u16> = self.free.drain(..count).collect();
        for (at, buffer) in readable.iter().chain(writable).enumerate() {
            let next = indices.get(at + 1).copied();
            let mut flags = if at >= readable.len() { WRITE } else { 0 };
            flags |= if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(indices[at], *buffer, flags, next.unwrap_or(0))?;
        }
        self.lengths[usize::from(indices[0])] = count as u16;
        self.offer_head(indices[0])?;
        Ok(Some(indices[0]))
    }

    /// Makes a head available, whatever its descriptor says.
    pub fn offer_head(&mut self, head: u16) -> Result<(), MemoryError> {
        let slot = u64::from(self.avail_idx & (self.state.size - 1));
        self.ram
            .store_u16(self.state.avail + 4 + 2 * slot, head, Ordering::Relaxed)?;
        self.set_avail_idx(self.avail_idx.wrapping_add(1))
    }

    /// Writes the available index, whatever is behind it.
    pub fn set_avail_idx(&mut self, index: u16) -> Result<(), MemoryError> {
        self.avail_idx = index;
        self.ram
            .store_u16(self.state.avail + 2, index, Ordering::Release)
    }

    /// Takes the next used chain.
    pub fn take_used(&mut self) -> Result<Option<Used>, MemoryError> {
        if self.ram.load_u16(self.state.used + 2, Ordering::Acquire)? == self.used_seen {
            return Ok(None);
        }
        let slot = u64::from(self.used_seen & (self.state.size - 1));
        let mut raw = [0; 8];
        self.ram.read(self.state.used + 4 + 8 * slot, &mut raw)?;
        self.used_seen = self.used_seen.wrapping_add(1);
        let [h0, h1, _, _, w0, w1, w2, w3] = raw;
        let used = Used {
            head: u16::from_le_bytes([h0, h1]),
            written: u32::from_le_bytes([w0, w1, w2, w3]),
        };
        self.recycle(used.head)?;
        Ok(Some(used))
    }

    /// Asks to be called when the device has used `index` chains.
    pub fn set_used_event(&self, index: u16) -> Result<(), MemoryError> {
        let gpa = self.state.avail + 4 + 2 * u64::from(self.state.size);
        self.ram.store_u16(gpa, index, Ordering::SeqCst)
    }

    /// Chains available at which the device wants to be notified.
    pub fn avail_event(&self) -> Result<u16, MemoryError> {
        self.ram.load_u16(
            self.state.used + 4 + 8 * u64::from(self.state.size),
            Ordering::SeqCst,
        )
    }

    /// The flags word of the used ring.
    pub fn used_flags(&self) -> Result<u16, MemoryError> {
        self.ram.load_u16(self.state.used, Ordering::SeqCst)
    }

    fn recycle(&mut self, head: u16) -> Result<(), MemoryError> {
        let count = std::mem::take(&mut self.lengths[usize::from(head)]);
        let mut index = head;
        for _ in 0..count {
            self.free.push_back(index);
            let gpa = self.state.descriptors + 16 * u64::from(index) + 14;
            index = self.ram.load_u16(gpa, Ordering::Relaxed)?;
        }
        Ok(())
    }
}
