//! The frames in flight on this host: a fixed number of slots, owned through linear tokens.
//!
//! Invariants: nothing allocates after [`FramePool::new`]; a slot is either free, or owned by exactly
//! one [`Token`], or lent to the NIC's rings; the number of slots bounds every queue of frames. A
//! frame of the guest may be *in place*: its first [`HEADER_MAX`](colo_compare::HEADER_MAX) bytes are a host copy, the rest
//! still lies in the guest's buffer, which is the guest's again only when the frame is released,
//! copied (*settled*) or matched. A frame that was matched leaves with the bytes it was compared
//! with (its *twin's*), so what a guest writes after the comparison is never sent (invariant 7).
//! Of a frame that nobody looks at all bytes may stay in the guest ([`FramePool::keep_whole`]).
//!
//! Does not know queues; it hands back the numbers of the guest's buffers.

pub(crate) mod checksum;
mod in_place;
mod leaving;
mod matching;
mod slots;

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use colo_compare::{Frames, Token};

use crate::hint::prefetch;
use crate::ring::{Area, GuestRam};
use crate::stats::WorkerStats;

use slots::{Place, Slot, SlotMemory};

pub use leaving::{Piece, Pieces};
pub use slots::{Buffer, CopyCause, PIECES_MAX};

/// Bytes in front of the payload of the largest frame: Ethernet and two VLAN tags.
pub const LINK_HEADER_MAX: usize = 14 + 8;

/// Bytes kept free in front of a frame, for a longer header of another frame (its twin's).
pub const HEADROOM: usize = 64;

/// Frames up to this length are copied at once: that costs less than keeping the guest's buffer.
pub const IN_PLACE_MIN: usize = 512;

const CACHE_LINE_BYTES: usize = 64;
/// Of a frame that is read from its begin to its end.
const FETCHED_LINES: usize = 8;

/// Slot size that holds every frame of an MTU, with what a NIC or link puts before it.
pub const fn slot_bytes_for(mtu: u16) -> usize {
    // The kernel leaves 256 bytes before what it receives (XDP_PACKET_HEADROOM).
    let need = mtu as usize + LINK_HEADER_MAX + 256 + HEADROOM;
    if need <= 2048 {
        2048
    } else {
        need.next_power_of_two()
    }
}

/// With which bytes a frame leaves that was compared where it lay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TxMode {
    /// With those of its counterpart, which the guest cannot reach.
    #[default]
    Twin,
    /// With its own, in place, under a checksum of what was compared (rule 10).
    InPlace,
    /// With its own, copied before the comparison.
    Exact,
}

/// The slots and who owns them.
#[derive(Debug)]
pub struct FramePool {
    memory: SlotMemory,
    slots: Box<[Slot]>,
    /// Where the frames are that are in place.
    places: Box<[Place]>,
    free: Vec<u32>,
    /// Where in-place frames lie; one guest at a time.
    guest: Option<Arc<GuestRam>>,
    /// The guest's buffers that are its own again.
    returned: RefCell<Vec<Buffer>>,
    in_place: Cell<u32>,
    descriptors_in_place: Cell<u32>,
    tx: TxMode,
    stats: Arc<WorkerStats>,
}

impl FramePool {
    /// Makes `slots` slots for frames of up to `slot_bytes` bytes, in memory of its own.
    pub fn new(slots: u32, slot_bytes: usize) -> Self {
        let bytes = slots as usize * (slot_bytes + HEADROOM);
        let area = Area::reserve(bytes.max(1)).expect("no address space for frames");
        Self::in_area(Arc::new(area), slots, slot_bytes + HEADROOM, Arc::default())
            .expect("no memory for frames")
    }

    /// Makes slots of `slot_bytes` (headroom included) behind what `area` holds already.
    pub fn in_area(
        area: Arc<Area>,
        slots: u32,
        slot_bytes: usize,
        stats: Arc<WorkerStats>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            memory: SlotMemory::map(area, slots, slot_bytes)?,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            places: (0..slots).map(|_| Place::default()).collect(),
            free: (0..slots).rev().collect(),
            guest: None,
            returned: RefCell::new(Vec::with_capacity(slots as usize)),
            in_place: Cell::new(0),
            descriptors_in_place: Cell::new(0),
            tx: TxMode::default(),
            stats,
        })
    }

    /// Names the memory that in-place frames lie in from now on. No frame is in place.
    pub fn set_guest(&mut self, guest: Arc<GuestRam>) {
        assert_eq!(self.in_place.get(), 0, "frames lie in another guest");
        self.guest = Some(guest);
    }

    /// Forgets that memory. No frame is in place.
    pub fn forget_guest(&mut self) {
        assert_eq!(self.in_place.get(), 0, "frames lie in the guest");
        self.guest = None;
    }

    /// Chooses with which bytes compared frames leave.
    pub fn set_tx(&mut self, tx: TxMode) {
        self.tx = tx;
    }

    /// With which bytes they do.
    pub fn tx(&self) -> TxMode {
        self.tx
    }

    /// The range of addresses that the slots lie in.
    pub fn area(&self) -> &Arc<Area> {
        self.memory.area()
    }

    /// Longest frame.
    pub fn frame_bytes_max(&self) -> usize {
        self.memory.slot_bytes() - HEADROOM
    }

    /// Size of a slot, headroom included.
    pub fn slot_bytes(&self) -> usize {
        self.memory.slot_bytes()
    }

    /// Slots nobody owns.
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Takes a slot and lets `fill` write it. `fill` gives the frame's length (at most the slot's)
    /// or `None` to give the slot back. `None` as well when no slot is free.
    pub fn fill(&mut self, fill: impl FnOnce(&mut [u8]) -> Option<usize>) -> Option<Token> {
        let slot = self.free.pop()?;
        match fill(
            self.memory
                .bytes_mut(slot, HEADROOM, self.frame_bytes_max()),
        ) {
            Some(len) => {
                assert!(
                    len <= self.frame_bytes_max(),
                    "frame of {len} bytes in a shorter slot"
                );
                self.slots[slot as usize].own(HEADROOM, len);
                Some(Token::new(slot))
            }
            None => {
                self.free.push(slot);
                None
            }
        }
    }

    /// A frame with these bytes; `None` when no slot is free or the frame is too long.
    pub fn from_bytes(&mut self, bytes: &[u8]) -> Option<Token> {
        self.fill(|slot| {
            slot.get_mut(..bytes.len())?.copy_from_slice(bytes);
            Some(bytes.len())
        })
    }

    /// A slot for the kernel to receive into, by number and its first byte counted from the area's
    /// base; it comes back by [`FramePool::adopt`] or [`FramePool::give_back`].
    pub fn lend(&mut self) -> Option<(u32, usize)> {
        let slot = self.free.pop()?;
        Some((slot, self.memory.offset_of(slot)))
    }

    /// Where the slots lie in the area: the first byte's offset, and how many bytes they are.
    pub fn slots_place(&self) -> (usize, usize) {
        let bytes = self.slots.len() * self.memory.slot_bytes();
        (self.memory.offset_of(0), bytes)
    }

    /// The lent slot that an offset into the area lies in, and how far in.
    pub fn slot_at(&self, offset: usize) -> Option<(u32, usize)> {
        self.memory.slot_at(offset)
    }

    /// A frame that lies `start` bytes into a lent slot. `None` gives the slot back: the range is
    /// not inside it.
    pub fn adopt(&mut self, slot: u32, start: usize, len: usize) -> Option<Token> {
        if start
            .checked_add(len)
            .is_none_or(|end| end > self.memory.slot_bytes())
        {
            self.give_back(slot);
            return None;
        }
        self.slots[slot as usize].own(start, len);
        Some(Token::new(slot))
    }

    /// Takes a lent slot back, unused.
    pub fn give_back(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Makes the frame begin `n` bytes later: what is cut off was a header of the carrier.
    pub fn strip_front(&mut self, token: &Token, n: usize) {
        self.slots[token.slot() as usize].strip_front(n);
    }

    /// The frame is about to be read: asks for what of it the processor does not go on to fetch by itself.
    #[inline]
    pub(crate) fn fetch(&self, token: &Token) {
        let bytes = self.host_bytes(token.slot());
        for line in bytes.chunks(CACHE_LINE_BYTES).take(FETCHED_LINES) {
            prefetch(line.as_ptr());
        }
    }

    /// Notes when the frame entered the stage that it is in.
    pub fn stamp(&self, token: &Token, now_ns: u64) {
        self.slots[token.slot() as usize].stamp(now_ns);
    }

    /// When that was; 0 if nobody noted it.
    pub fn stamped_ns(&self, token: &Token) -> u64 {
        self.slots[token.slot() as usize].stamped_ns()
    }

    /// Puts the bytes of `more` behind those of a frame that lies in its slot, and releases `more`;
    /// `false` when there is no room for them.
    pub fn append(&mut self, token: &Token, more: Token) -> bool {
        let slot = token.slot();
        let (start, len) = {
            let state = &self.slots[slot as usize];
            (state.start(), state.held())
        };
        let bytes = self.host_bytes(more.slot());
        let fits = start + len + bytes.len() <= self.memory.slot_bytes();
        if fits {
            self.memory.append(slot, start + len, bytes);
            self.slots[slot as usize].own(start, len + bytes.len());
        }
        self.release(more);
        fits
    }

    /// The whole frame; one that is in place is settled for it.
    #[inline]
    pub fn bytes(&self, token: &Token) -> &[u8] {
        self.settle(token.slot(), CopyCause::Read);
        self.host_bytes(token.slot())
    }

    /// What of a frame lies in its own slot.
    #[inline]
    fn host_bytes(&self, slot: u32) -> &[u8] {
        let state = &self.slots[slot as usize];
        self.memory.bytes(slot, state.start(), state.held())
    }

    fn free_if_unused(&mut self, slot: u32) {
        if self.slots[slot as usize].unshare() {
            self.drop_place(slot);
            self.free.push(slot);
            if let Some(twin) = self.slots[slot as usize].take_twin() {
                self.free_if_unused(twin);
            }
        }
    }
}

#[cfg(test)]
#[path = "frame/tests.rs"]
mod tests;
