//! The device side of a split virtqueue (virtio 1.3 section 2.7).
//!
//! Invariants: indices and descriptors are read once into host memory and judged there; a chain
//! has at most as many descriptors as its table; a buffer handed out lies in RAM; used entries are
//! in memory before the used index. Whatever the guest writes, the answer is a [`RingError`].
//!
//! Does not touch payload, and does not decide when to sleep.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::hint::prefetch;

use super::error::RingError;
use super::memory::GuestRam;
use super::split::{DESCRIPTOR_BYTES, Descriptor, SplitRing};

/// The largest queue that a device offers.
pub const QUEUE_SIZE_MAX: u16 = 256;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// How many chains ahead descriptors are fetched.
const DESCRIPTORS_AHEAD: u16 = 16;
/// How many chains ahead the start of a buffer is fetched.
const BUFFERS_AHEAD: u16 = 8;
/// How much of it: all of a frame of the usual MTU.
const BYTES_AHEAD: usize = 1536;
const CACHE_LINE_BYTES: usize = 64;

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
    /// What was negotiated of the device type's own features, bits 0 to 23 (virtio 1.3 section 6).
    pub device_features: u64,
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    descriptors: u16,
    segments: Vec<Segment>,
    readable: usize,
}

impl Default for Chain {
    fn default() -> Self {
        let segments = Vec::with_capacity(usize::from(QUEUE_SIZE_MAX));
        Self {
            head: 0,
            descriptors: 0,
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

    /// How many entries of the queue's table it takes: one, if it is indirect.
    pub fn descriptors(&self) -> u16 {
        self.descriptors
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

/// A live queue.
#[derive(Debug)]
pub struct Virtqueue {
    ring: SplitRing,
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
        Ok(Self {
            ring: SplitRing::new(ram, &state)?,
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
    #[inline]
    pub fn has_available(&mut self) -> Result<bool, RingError> {
        if self.avail_seen == self.state.next_avail {
            self.look_at_avail()?;
        }
        Ok(self.avail_seen != self.state.next_avail)
    }

    /// Takes the next chain; `false` when there is none.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        self.pop_and_fetch(chain, BYTES_AHEAD)
    }

    /// The same for who reads no more than the first `bytes` of a buffer: no more is fetched ahead.
    #[inline]
    pub fn pop_and_fetch(&mut self, chain: &mut Chain, bytes: usize) -> Result<bool, RingError> {
        if !self.has_available()? {
            return Ok(false);
        }
        self.fetch_ahead(bytes);
        let head = self.ring.avail_entry(self.state.next_avail);
        self.walk(head, chain)?;
        self.state.next_avail = self.state.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// The chain `n` behind the front, of those that are known to wait, if it is one buffer for the device to
    /// read. `None` says nothing about it: [`Virtqueue::pop`] does.
    #[inline(always)]
    pub fn peek_lone(&self, n: u16) -> Option<(u16, Segment)> {
        let waiting = self.avail_seen.wrapping_sub(self.state.next_avail);
        if n >= waiting {
            return None;
        }
        let head = self.ring.avail_entry(self.state.next_avail.wrapping_add(n));
        let Descriptor {
            addr, len, flags, ..
        } = self.ring.descriptor(head)?;
        (flags == 0 && len > 0).then_some((head, Segment { gpa: addr, len }))
    }

    /// Takes the chain at the front, which [`Virtqueue::peek_lone`] has shown, and hands it back.
    #[inline(always)]
    pub fn pass_lone(&mut self, head: u16) -> Result<(), RingError> {
        self.take_lone();
        self.complete(head, 0)
    }

    /// Takes the chain at the front, which [`Virtqueue::peek_lone`] has shown. It is handed back later.
    #[inline(always)]
    pub fn take_lone(&mut self) {
        debug_assert_ne!(self.avail_seen, self.state.next_avail, "nothing waits");
        self.state.next_avail = self.state.next_avail.wrapping_add(1);
    }

    /// Puts the chain of the last [`Virtqueue::pop`] back, unread.
    pub fn undo_pop(&mut self) {
        self.state.next_avail = self.state.next_avail.wrapping_sub(1);
    }

    /// Puts the chains of the last `count` pops back, unread.
    pub fn undo_pops(&mut self, count: u16) {
        self.state.next_avail = self.state.next_avail.wrapping_sub(count);
    }

    /// Entries of the queue.
    pub fn size(&self) -> u16 {
        self.state.size
    }

    /// What was negotiated of the device type's own features.
    pub fn device_features(&self) -> u64 {
        self.state.device_features
    }

    /// Hands a chain back, with `written` bytes in its writable part. The guest sees it after
    /// [`Virtqueue::publish`].
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let index = self.state.next_used.wrapping_add(self.unpublished);
        self.ring.write_used(index, head, written);
        self.unpublished += 1;
        if self.unpublished >= self.state.size {
            self.publish_index();
        }
        Ok(())
    }

    /// Makes the next `count` completions become visible together.
    pub fn make_room(&mut self, count: u16) {
        if u32::from(self.unpublished) + u32::from(count) > u32::from(self.state.size) {
            self.publish_index();
        }
    }

    /// Shows the guest what was completed. Gives whether it wants to be called for it (virtio 1.3
    /// section 2.7.7.2).
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.unpublished > 0 {
            self.publish_index();
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
            return Ok(event_passed(self.ring.used_event(), new, old));
        }
        Ok(self.ring.avail_flags() & AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the guest not to ring while the device polls. With `EVENT_IDX` there is nothing to do:
    /// avail_event stays behind.
    pub fn disable_notifications(&mut self) -> Result<(), RingError> {
        if !self.state.event_idx {
            self.ring.write_used_flags(USED_F_NO_NOTIFY);
        }
        Ok(())
    }

    /// Asks the guest to ring for a chain behind those that are there, which do not suffice. Gives whether one
    /// came before the guest could see that: then the device must not sleep.
    pub fn notify_of_more(&mut self) -> Result<bool, RingError> {
        self.look_at_avail()?;
        let seen = self.avail_seen;
        if self.state.event_idx {
            self.ring.write_avail_event(seen);
        } else {
            self.ring.write_used_flags(0);
        }
        // As in `enable_notifications`.
        fence(Ordering::SeqCst);
        self.look_at_avail()?;
        Ok(self.avail_seen != seen)
    }

    /// Asks the guest to ring for the next chain. Gives whether chains came before it could see
    /// that: then the device must not sleep.
    pub fn enable_notifications(&mut self) -> Result<bool, RingError> {
        if self.state.event_idx {
            self.ring.write_avail_event(self.state.next_avail);
        } else {
            self.ring.write_used_flags(0);
        }
        // The wish must be visible before the available index is read again.
        fence(Ordering::SeqCst);
        self.look_at_avail()?;
        Ok(self.avail_seen != self.state.next_avail)
    }

    #[inline]
    fn publish_index(&mut self) {
        self.state.next_used = self.state.next_used.wrapping_add(self.unpublished);
        self.unpublished = 0;
        self.ring.publish_used(self.state.next_used);
    }

    fn look_at_avail(&mut self) -> Result<(), RingError> {
        let avail = self.ring.avail_idx();
        let (next, size) = (self.state.next_avail, self.state.size);
        if avail.wrapping_sub(next) > size {
            return Err(RingError::AvailJump { avail, next, size });
        }
        self.avail_seen = avail;
        Ok(())
    }

    /// Asks for what later pops will read: the descriptor of a chain some way ahead and the buffer of
    /// one nearer. The guest's core has written both, so each is a trip to its cache.
    #[inline]
    fn fetch_ahead(&self, bytes: usize) {
        let waiting = self.avail_seen.wrapping_sub(self.state.next_avail);
        if waiting > DESCRIPTORS_AHEAD {
            let ahead = self.state.next_avail.wrapping_add(DESCRIPTORS_AHEAD);
            prefetch(self.ring.descriptor_address(self.ring.avail_entry(ahead)));
        }
        if waiting > BUFFERS_AHEAD {
            let ahead = self.state.next_avail.wrapping_add(BUFFERS_AHEAD);
            // Read for a hint only; what is used is read again when its turn comes.
            if let Some(descriptor) = self.ring.descriptor(self.ring.avail_entry(ahead))
                && let Ok(at) = self.ring.ram().host_range(descriptor.addr, 1)
            {
                let len = (descriptor.len as usize).min(bytes);
                for line in (0..len).step_by(CACHE_LINE_BYTES) {
                    prefetch(at.wrapping_add(line));
                }
            }
        }
    }

    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.head = head;
        chain.segments.clear();
        chain.readable = 0;
        let first = self.table_entry(head)?;
        if first.flags & DESC_F_INDIRECT != 0 {
            chain.descriptors = 1;
            return self.walk_indirect(&first, chain);
        }
        self.walk_table(self.state.size, first, chain, |next| self.table_entry(next))?;
        // No more than the table has entries, each for one.
        chain.descriptors = chain.segments.len() as u16;
        Ok(())
    }

    fn walk_indirect(&self, table: &Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let entries = u64::from(table.len) / DESCRIPTOR_BYTES;
        let whole = u64::from(table.len).is_multiple_of(DESCRIPTOR_BYTES);
        let fits = (1..=u64::from(self.state.size)).contains(&entries);
        if !self.state.indirect || !whole || !fits || table.flags & DESC_F_NEXT != 0 {
            return Err(RingError::BadIndirect(table.len));
        }
        if !self.ring.ram().contains(table.addr, u64::from(table.len)) {
            return Err(RingError::OutsideRam {
                gpa: table.addr,
                len: table.len,
            });
        }
        let entries = entries as u16;
        let entry = |index| self.indirect_entry(table.addr, index, entries);
        self.walk_table(entries, entry(0)?, chain, entry)
    }

    #[inline]
    fn walk_table(
        &self,
        entries: u16,
        first: Descriptor,
        chain: &mut Chain,
        entry: impl Fn(u16) -> Result<Descriptor, RingError>,
    ) -> Result<(), RingError> {
        let mut descriptor = first;
        for _ in 0..entries {
            self.push_buffer(&descriptor, chain)?;
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            descriptor = entry(descriptor.next)?;
        }
        Err(RingError::Loop)
    }

    #[inline]
    fn push_buffer(&self, descriptor: &Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let (gpa, len) = (descriptor.addr, descriptor.len);
        if descriptor.flags & DESC_F_INDIRECT != 0 {
            return Err(RingError::BadIndirect(len));
        }
        if len == 0 {
            return Err(RingError::ZeroLength);
        }
        if !self.ring.ram().contains(gpa, u64::from(len)) {
            return Err(RingError::OutsideRam { gpa, len });
        }
        chain.push(Segment { gpa, len }, descriptor.flags & DESC_F_WRITE != 0)
    }

    #[inline]
    fn table_entry(&self, index: u16) -> Result<Descriptor, RingError> {
        let size = self.state.size;
        let found = self.ring.descriptor(index);
        found.ok_or(RingError::BadDescriptor { index, size })
    }

    fn indirect_entry(&self, table: u64, index: u16, size: u16) -> Result<Descriptor, RingError> {
        if index >= size {
            return Err(RingError::BadDescriptor { index, size });
        }
        // Nothing says that an indirect table is aligned.
        let mut halves = [[0; 8]; 2];
        let at = table + DESCRIPTOR_BYTES * u64::from(index);
        self.ring.ram().read(at, halves.as_flattened_mut())?;
        let [addr, rest] = halves.map(u64::from_ne_bytes);
        Ok(Descriptor::from_halves(addr, rest))
    }
}

/// Whether moving an index from `old` to `new` passed `event` (`vring_need_event`).
fn event_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "virtqueue_tests.rs"]
mod tests;
