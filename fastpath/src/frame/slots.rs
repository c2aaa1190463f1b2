//! The memory of the frame slots, and what is known of each slot.
//!
//! Invariants: a slot's bytes are touched only through its token, or by the kernel while it is lent;
//! the ranges handed out lie inside the slot. This is the one module of the frames with unsafe code.
//!
//! Does not know who owns which slot.

use std::cell::Cell;
use std::io;
use std::sync::Arc;

use crate::ring::{Area, GuestRam, Segment};

use super::HEADROOM;

/// Most pieces that a frame lies in.
pub const PIECES_MAX: usize = 1 + SEGMENTS_MAX;
/// Most buffers of a guest's chain that may hold the rest of a frame in place.
const SEGMENTS_MAX: usize = 4;
/// No slot has this number.
pub(super) const NO_SLOT: u32 = u32::MAX;

/// A buffer of the guest that a frame lies in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// Which life of the queue it belongs to.
    pub life: u32,
    /// Head of its descriptor chain.
    pub head: u16,
    /// How many of the queue's descriptors the chain takes.
    pub descriptors: u16,
}

/// Why payload was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyCause {
    /// The frame is short.
    Small,
    /// Scattered over too many buffers.
    Scattered,
    /// Too many of the guest's buffers are in use already.
    Pressure,
    /// Compared otherwise than as a whole with its counterpart.
    Compared,
    /// Compared by its digest, with a counterpart that is not here.
    Digested,
    /// Undecided when the guest's state was captured, or when a divergence was pending.
    Undecided,
    /// The role works on copies (the secondary).
    Role,
    /// The NIC takes frames in one piece only.
    Gathered,
    /// Read as a whole.
    Read,
    /// Another shard's: the copy goes to its owner.
    Crossing,
}

/// What of a frame still lies in the guest. Cells, so that it is written where it stays, field by field: what was just
/// written in small parts and is then copied in large ones has to wait for all of them.
#[derive(Debug, Default)]
pub(super) struct Place {
    buffer: Cell<Buffer>,
    segments: [Cell<Segment>; SEGMENTS_MAX],
    count: Cell<u32>,
}

impl Place {
    /// Whether a frame of so many pieces can stay.
    pub(super) fn takes(rest: &[Segment]) -> bool {
        rest.len() <= SEGMENTS_MAX
    }

    #[inline]
    pub(super) fn set(&self, buffer: Buffer, rest: &[Segment]) {
        assert!(Self::takes(rest), "{} pieces in a place", rest.len());
        self.buffer.set(buffer);
        for (to, segment) in self.segments.iter().zip(rest) {
            to.set(*segment);
        }
        self.count.set(rest.len() as u32);
    }

    pub(super) fn buffer(&self) -> Buffer {
        self.buffer.get()
    }

    #[inline]
    pub(super) fn rest(&self) -> impl ExactSizeIterator<Item = Segment> {
        let segments = &self.segments[..self.count.get() as usize];
        segments.iter().map(Cell::get)
    }
}

/// What is known of a slot, in one cache line. Cells, because a comparison, which only reads, may settle a frame.
#[derive(Debug)]
pub(super) struct Slot {
    start: Cell<u32>,
    /// Length of the frame; the first `held` bytes are in the slot.
    len: Cell<u32>,
    held: Cell<u32>,
    /// Frames that leave with this slot's bytes, its own included.
    shares: Cell<u32>,
    /// The slot whose payload this frame leaves with, and where that begins.
    twin: Cell<u32>,
    twin_at: Cell<u32>,
    in_place: Cell<bool>,
    /// The NIC may still read it.
    with_nic: Cell<bool>,
    /// The sum of the payload from `twin_at` on, when it was compared where it lies.
    sum: Cell<Option<u16>>,
    /// When the frame entered the stage that it is in; 0: not known.
    stamp_ns: Cell<u64>,
}

const _: () = assert!(size_of::<Slot>() <= 64);

impl Default for Slot {
    fn default() -> Self {
        Self {
            start: Cell::new(0),
            len: Cell::new(0),
            held: Cell::new(0),
            shares: Cell::new(0),
            twin: Cell::new(NO_SLOT),
            twin_at: Cell::new(0),
            in_place: Cell::new(false),
            with_nic: Cell::new(false),
            sum: Cell::new(None),
            stamp_ns: Cell::new(0),
        }
    }
}

impl Slot {
    #[inline]
    pub(super) fn own(&self, start: usize, len: usize) {
        self.start.set(start as u32);
        self.len.set(len as u32);
        self.held.set(len as u32);
        self.shares.set(1);
        self.with_nic.set(false);
        self.sum.set(None);
        self.stamp_ns.set(0);
    }

    pub(super) fn stamp(&self, now_ns: u64) {
        self.stamp_ns.set(now_ns);
    }

    pub(super) fn stamped_ns(&self) -> u64 {
        self.stamp_ns.get()
    }

    #[inline]
    pub(super) fn place_rest(&self, rest: &[Segment]) {
        let bytes: u32 = rest.iter().map(|segment| segment.len).sum();
        self.len.set(self.held.get() + bytes);
        self.in_place.set(true);
    }

    pub(super) fn strip_front(&self, n: usize) {
        let n = (n as u32).min(self.held.get());
        self.start.set(self.start.get() + n);
        self.len.set(self.len.get() - n);
        self.held.set(self.held.get() - n);
    }

    #[inline]
    pub(super) fn start(&self) -> usize {
        self.start.get() as usize
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len.get() as usize
    }

    #[inline]
    pub(super) fn held(&self) -> usize {
        self.held.get() as usize
    }

    /// The whole frame lies in the slot now.
    pub(super) fn hold_all(&self) {
        self.held.set(self.len.get());
    }

    /// Whether the rest of the frame still lies in the guest.
    #[inline]
    pub(super) fn is_in_place(&self) -> bool {
        self.in_place.get()
    }

    pub(super) fn set_with_nic(&self, is_there: bool) {
        self.with_nic.set(is_there);
    }

    /// Whether the NIC may still read a part of it in the guest.
    pub(super) fn is_read_in_place(&self) -> bool {
        self.in_place.get() && self.with_nic.get()
    }

    /// It does not any more. Whether it did.
    #[inline]
    pub(super) fn leave_place(&self) -> bool {
        self.in_place.replace(false)
    }

    /// The slot that the payload is taken from, and where it begins there.
    pub(super) fn twin(&self) -> Option<(u32, usize)> {
        let is_whole = self.held.get() == self.len.get();
        (!is_whole && self.twin.get() != NO_SLOT)
            .then(|| (self.twin.get(), self.twin_at.get() as usize))
    }

    pub(super) fn set_twin(&self, slot: u32, at: usize) {
        self.twin.set(slot);
        self.twin_at.set(at as u32);
    }

    /// The payload was compared in place, begins at `at` and has this sum.
    pub(super) fn set_sum(&self, at: usize, sum: u16) {
        self.sum.set(Some(sum));
        self.twin_at.set(at as u32);
    }

    /// Where the payload begins and what its sum was when it was compared in place. It counts for
    /// a later copy as well: that may be of other bytes.
    pub(super) fn sum(&self) -> Option<(usize, u16)> {
        Some((self.twin_at.get() as usize, self.sum.get()?))
    }

    /// Forgets the twin, used or not. Gives its slot.
    #[inline]
    pub(super) fn take_twin(&self) -> Option<u32> {
        let slot = self.twin.replace(NO_SLOT);
        (slot != NO_SLOT).then_some(slot)
    }

    pub(super) fn share(&self) {
        self.shares.set(self.shares.get() + 1);
    }

    pub(super) fn is_shared(&self) -> bool {
        self.shares.get() > 1
    }

    /// One use less. Whether it was the last.
    #[inline]
    pub(super) fn unshare(&self) -> bool {
        debug_assert!(self.shares.get() > 0, "a slot was freed twice");
        self.shares.set(self.shares.get() - 1);
        self.shares.get() == 0
    }
}

/// The slots' bytes.
#[derive(Debug)]
pub(super) struct SlotMemory {
    area: Arc<Area>,
    at: usize,
    slots: usize,
    slot_bytes: usize,
}

impl SlotMemory {
    pub(super) fn map(area: Arc<Area>, slots: u32, slot_bytes: usize) -> io::Result<Self> {
        assert!(slot_bytes > HEADROOM, "slots without room for a frame");
        let slots = slots as usize;
        let at = area.map_anonymous((slots * slot_bytes).max(1))?;
        Ok(Self {
            area,
            at,
            slots,
            slot_bytes,
        })
    }

    pub(super) fn area(&self) -> &Arc<Area> {
        &self.area
    }

    pub(super) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    pub(super) fn offset_of(&self, slot: u32) -> usize {
        self.at + slot as usize * self.slot_bytes
    }

    pub(super) fn slot_at(&self, offset: usize) -> Option<(u32, usize)> {
        let within = offset.checked_sub(self.at)?;
        let slot = within / self.slot_bytes;
        (slot < self.slots).then_some((slot as u32, within % self.slot_bytes))
    }

    #[inline]
    fn address(&self, slot: u32, start: usize, len: usize) -> *mut u8 {
        assert!((slot as usize) < self.slots && start + len <= self.slot_bytes);
        let at = self.offset_of(slot) + start;
        self.area.base().wrapping_add(at)
    }

    #[inline]
    pub(super) fn bytes(&self, slot: u32, start: usize, len: usize) -> &[u8] {
        let address = self.address(slot, start, len);
        // SAFETY: the range lies in the slot (checked) and the slot in the mapped area, which `self`
        // keeps. Its token's holder is who asks; the kernel only reads it, unless it is lent, and
        // then there is no token. `overwrite` writes only where no slice was given out.
        unsafe { std::slice::from_raw_parts(address, len) }
    }

    #[inline]
    pub(super) fn bytes_mut(&mut self, slot: u32, start: usize, len: usize) -> &mut [u8] {
        let address = self.address(slot, start, len);
        // SAFETY: as in `bytes`; `&mut self` excludes every other slice.
        unsafe { std::slice::from_raw_parts_mut(address, len) }
    }

    /// Writes behind what a slot holds so far, which is where no slice of it can be.
    pub(super) fn append(&self, slot: u32, start: usize, bytes: &[u8]) {
        let address = self.address(slot, start, bytes.len());
        // SAFETY: the range lies in the slot (checked), and nothing refers to it: slices cover what
        // is held (`FramePool::host_bytes`), and this is behind that. `bytes` is another slot's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address, bytes.len()) };
    }

    /// Reads a segment of the guest behind what a slot holds so far. Bytes that are not in RAM are zeroes.
    pub(super) fn append_guest(&self, slot: u32, start: usize, guest: &GuestRam, segment: Segment) {
        let out = self.behind(slot, start, segment);
        if guest.read(segment.gpa, out).is_err() {
            out.fill(0);
        }
    }

    /// The same; whether what was read is `bytes`, which lie in another slot and are as long.
    pub(super) fn append_guest_if(
        &self,
        slot: u32,
        start: usize,
        (guest, segment): (&GuestRam, Segment),
        bytes: &[u8],
    ) -> bool {
        let out = self.behind(slot, start, segment);
        let same = guest.copy_and_compare(segment.gpa, bytes, out);
        same.unwrap_or_else(|_| {
            out.fill(0);
            bytes == &*out
        })
    }

    /// Room for a segment behind what a slot holds so far.
    #[expect(clippy::mut_from_ref, reason = "see SAFETY")]
    fn behind(&self, slot: u32, start: usize, segment: Segment) -> &mut [u8] {
        let n = segment.len as usize;
        let address = self.address(slot, start, n);
        // SAFETY: as in `append`: nothing refers to this part of the slot, and its callers keep no slice of it.
        unsafe { std::slice::from_raw_parts_mut(address, n) }
    }
}
