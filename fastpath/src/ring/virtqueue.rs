//! The device side of a split virtqueue (virtio 1.3 section 2.7).
//!
//! Invariants: indices and descriptors are read once into host memory and judged there; a chain
//! has at most as many descriptors as its table; a buffer handed out lies in RAM; used entries are
//! in memory before the used index. Whatever the guest writes, the answer is a [`RingError`].
//!
//! Does not touch payload, and does not decide when to sleep.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::error::RingError;
use super::memory::GuestRam;

/// The largest queue that a device offers.
pub const QUEUE_SIZE_MAX: u16 = 256;

const DESCRIPTOR_BYTES: u64 = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// All that a queue is: where it lies, what was negotiated, how far it has come. Part of the
/// device record; at a packet boundary `next_avail` of an idle queue equals the used index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Entries; a power of two.
    pub size: u16,
    /// The guest has enabled it.
    pub ready: bool,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available (driver) ring.
    pub avail: u64,
    /// Guest physical address of the used (device) ring.
    pub used: u64,
    /// Available entries taken so far, modulo 2^16.
    pub next_avail: u16,
    /// Used entries published so far, modulo 2^16.
    pub next_used: u16,
    /// Used index at the last decision about a call.
    pub called_at: u16,
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes, at least 1.
    pub len: u32,
}

/// A descriptor chain in host memory: readable buffers first. Reused from pop to pop.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
}

impl Default for Chain {
    fn default() -> Self {
        let segments = Vec::with_capacity(usize::from(QUEUE_SIZE_MAX));
        Self {
            head: 0,
            segments,
            readable: 0,
        }
    }
}

impl Chain {
    /// The number that the guest knows the chain by.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers the device may read.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// Buffers the device may write.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Total bytes of some segments.
    pub fn bytes_of(segments: &[Segment]) -> u64 {
        segments.iter().map(|segment| u64::from(segment.len)).sum()
    }

    fn push(&mut self, segment: Segment, writable: bool) -> Result<(), RingError> {
        if !writable && self.readable < self.segments.len() {
            return Err(RingError::Order);
        }
        self.segments.push(segment);
        if !writable {
            self.readable = self.segments.len();
        }
        Ok(())
    }
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A live queue.
#[derive(Debug)]
pub struct Virtqueue {
    ram: Arc<GuestRam>,
    state: QueueState,
    avail_seen: u16,
    unpublished: u16,
}

impl Virtqueue {
    /// Takes over a queue where `state` says it is.
    pub fn new(ram: Arc<GuestRam>, state: QueueState) -> Result<Self, RingError> {
        let size = state.size;
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(RingError::BadSize(size));
        }
        let entries = u64::from(size);
        let parts = [
            (
                "descriptor table",
                state.descriptors,
                DESCRIPTOR_BYTES * entries,
                16,
            ),
            ("available ring", state.avail, 6 + 2 * entries, 2),
            ("used ring", state.used, 6 + 8 * entries, 4),
        ];
        for (part, gpa, bytes, align) in parts {
            if !gpa.is_multiple_of(align) || !ram.contains(gpa, bytes) {
                return Err(RingError::BadLayout { part, gpa });
            }
        }
        Ok(Self {
            ram,
            avail_seen: state.next_avail,
            unpublished: 0,
            state,
        })
    }

    /// Where the queue stands. Only meaningful after [`Virtqueue::publish`].
    pub fn state(&self) -> QueueState {
        debug_assert_eq!(self.unpublished, 0, "used entries were not published");
        self.state
    }

    /// Whether a chain is waiting.
    pub fn has_available(&mut self) -> Result<bool, RingError> {
        if self.avail_seen == self.state.next_avail {
            self.look_at_avail()?;
        }
        Ok(self.avail_seen != self.state.next_avail)
    }

    /// Takes the next chain; `false` when there is none.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if !self.has_available()? {
            return Ok(false);
        }
        let slot = u64::from(self.state.next_avail & (self.state.size - 1));
        let head = self
            .ram
            .load_u16(self.state.avail + 4 + 2 * slot, Ordering::Relaxed)?;
        self.walk(head, chain)?;
        self.state.next_avail = self.state.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Puts the chain of the last [`Virtqueue::pop`] back, unread.
    pub fn undo_pop(&mut self) {
        self.state.next_avail = self.state.next_avail.wrapping_sub(1);
    }

    /// Hands a chain back, with `written` bytes in its writable part. The guest sees it after
    /// [`Virtqueue::publish`].
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let index = self.state.next_used.wrapping_add(self.unpublished);
        let slot = u64::from(index & (self.state.size - 1));
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        self.ram.write(self.state.used + 4 + 8 * slot, &entry)?;
        self.unpublished += 1;
        if self.unpublished >= self.state.size {
            self.publish_index()?;
        }
        Ok(())
    }

    /// Shows the guest what was completed. Gives whether it wants to be called for it (virtio 1.3
    /// section 2.7.7.2).
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.unpublished > 0 {
            self.publish_index()?;
        }
        if self.state.called_at == self.state.next_used {
            return Ok(false);
        }
        let (old, new) = (self.state.called_at, self.state.next_used);
        self.state.called_at = new;
        // The used index must be visible before used_event is read: the guest writes used_event,
        // then looks at the used index again.
        fence(Ordering::SeqCst);
        if self.state.event_idx {
            let used_event = self
                .ram
                .load_u16(self.used_event_gpa(), Ordering::Relaxed)?;
            return Ok(event_passed(used_event, new, old));
        }
        let flags = self.ram.load_u16(self.state.avail, Ordering::Relaxed)?;
        Ok(flags & AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the guest not to ring while the device polls. With `EVENT_IDX` there is nothing to do:
    /// avail_event stays behind.
    pub fn disable_notifications(&mut self) -> Result<(), RingError> {
        if !self.state.event_idx {
            self.ram
                .store_u16(self.state.used, USED_F_NO_NOTIFY, Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// Asks the guest to ring for the next chain. Gives whether chains came before it could see
    /// that: then the device must not sleep.
    pub fn enable_notifications(&mut self) -> Result<bool, RingError> {
        if self.state.event_idx {
            let gpa = self.state.used + 4 + 8 * u64::from(self.state.size);
            self.ram
                .store_u16(gpa, self.state.next_avail, Ordering::Relaxed)?;
        } else {
            self.ram.store_u16(self.state.used, 0, Ordering::Relaxed)?;
        }
        // The wish must be visible before the available index is read again.
        fence(Ordering::SeqCst);
        self.look_at_avail()?;
        Ok(self.avail_seen != self.state.next_avail)
    }

    fn publish_index(&mut self) -> Result<(), RingError> {
        self.state.next_used = self.state.next_used.wrapping_add(self.unpublished);
        self.unpublished = 0;
        // Release: the entries come first.
        self.ram
            .store_u16(self.state.used + 2, self.state.next_used, Ordering::Release)?;
        Ok(())
    }

    fn used_event_gpa(&self) -> u64 {
        self.state.avail + 4 + 2 * u64::from(self.state.size)
    }

    fn look_at_avail(&mut self) -> Result<(), RingError> {
        // Acquire: entries and descriptors are read after the index that covers them.
        let avail = self.ram.load_u16(self.state.avail + 2, Ordering::Acquire)?;
        let (next, size) = (self.state.next_avail, self.state.size);
        if avail.wrapping_sub(next) > size {
            return Err(RingError::AvailJump { avail, next, size });
        }
        self.avail_seen = avail;
        Ok(())
    }

    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.head = head;
        chain.segments.clear();
        chain.readable = 0;
        let first = self.descriptor(self.state.descriptors, head, self.state.size)?;
        if first.flags & DESC_F_INDIRECT != 0 {
            return self.walk_indirect(&first, chain);
        }
        self.walk_table(self.state.descriptors, self.state.size, first, chain)
    }

    fn walk_indirect(&self, table: &Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let entries = u64::from(table.len) / DESCRIPTOR_BYTES;
        let whole = u64::from(table.len).is_multiple_of(DESCRIPTOR_BYTES);
        let fits = (1..=u64::from(self.state.size)).contains(&entries);
        if !self.state.indirect || !whole || !fits || table.flags & DESC_F_NEXT != 0 {
            return Err(RingError::BadIndirect(table.len));
        }
        if !self.ram.contains(table.addr, u64::from(table.len)) {
            return Err(RingError::OutsideRam {
                gpa: table.addr,
                len: table.len,
            });
        }
        let entries = entries as u16;
        let first = self.descriptor(table.addr, 0, entries)?;
        self.walk_table(table.addr, entries, first, chain)
    }

    fn walk_table(
        &self,
        table: u64,
        entries: u16,
        first: Descriptor,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let mut descriptor = first;
        for _ in 0..entries {
            self.push_buffer(&descriptor, chain)?;
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            descriptor = self.descriptor(table, descriptor.next, entries)?;
        }
        Err(RingError::Loop)
    }

    fn push_buffer(&self, descriptor: &Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let (gpa, len) = (descriptor.addr, descriptor.len);
        if descriptor.flags & DESC_F_INDIRECT != 0 {
            return Err(RingError::BadIndirect(len));
        }
        if len == 0 {
            return Err(RingError::ZeroLength);
        }
        if !self.ram.contains(gpa, u64::from(len)) {
            return Err(RingError::OutsideRam { gpa, len });
        }
        chain.push(Segment { gpa, len }, descriptor.flags & DESC_F_WRITE != 0)
    }

    fn descriptor(&self, table: u64, index: u16, size: u16) -> Result<Descriptor, RingError> {
        if index >= size {
            return Err(RingError::BadDescriptor { index, size });
        }
        let mut raw = [0; 16];
        self.ram
            .read(table + DESCRIPTOR_BYTES * u64::from(index), &mut raw)?;
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = raw;
        Ok(Descriptor {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// Whether moving an index from `old` to `new` passed `event` (`vring_need_event`).
fn event_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "virtqueue_tests.rs"]
mod tests;
