//! The frames in flight on this host: a fixed number of slots, owned through linear tokens.
//!
//! Invariants: nothing allocates after [`FramePool::new`]; a slot is either free, or owned by exactly
//! one [`Token`], or lent to the NIC's rings; the number of slots bounds every queue of frames. A
//! frame of the guest may be *in place*: its first [`HEADER_MAX`] bytes are a host copy, the rest
//! still lies in the guest's buffer, which is the guest's again only when the frame is released,
//! copied (*settled*) or matched. A frame that was matched leaves with the bytes it was compared
//! with (its *twin's*), so what a guest writes after the comparison is never sent (invariant 7).
//! Of a frame that nobody looks at all bytes may stay in the guest ([`FramePool::keep_whole`]).
//!
//! Does not know queues; it hands back the numbers of the guest's buffers.

pub(crate) mod checksum;
mod slots;

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use colo_compare::{DigestKey, Frames, HEADER_MAX, Token};

use crate::hint::prefetch;
use crate::ring::{Area, GuestRam, Segment, fold};
use crate::stats::WorkerStats;

use slots::{Place, Slot, SlotMemory};

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

/// A piece of a frame in this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub address: *const u8,
    /// Length in bytes.
    pub len: usize,
}

/// A frame in one piece or a few, in order.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    list: [Piece; PIECES_MAX],
    count: usize,
}

impl Pieces {
    fn none() -> Self {
        let nothing = Piece {
            address: std::ptr::null(),
            len: 0,
        };
        Self {
            list: [nothing; PIECES_MAX],
            count: 0,
        }
    }

    fn one(piece: Piece) -> Self {
        let list = [piece; PIECES_MAX];
        Self { list, count: 1 }
    }

    fn push(&mut self, piece: Piece) {
        self.list[self.count] = piece;
        self.count += 1;
    }

    /// The pieces.
    pub fn as_slice(&self) -> &[Piece] {
        &self.list[..self.count]
    }
}

/// The slots and who owns them.
#[derive(Debug)]
pub struct FramePool {
    memory: SlotMemory,
    slots: Box<[Slot]>,
    /// Where the frames are that are in place.
    places: Box<[Cell<Place>]>,
    free: Vec<u32>,
    /// Where in-place frames lie; one guest at a time.
    guest: Option<Arc<GuestRam>>,
    /// The guest's buffers that are its own again.
    returned: RefCell<Vec<Buffer>>,
    in_place: Cell<u32>,
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
            places: (0..slots).map(|_| Cell::default()).collect(),
            free: (0..slots).rev().collect(),
            guest: None,
            returned: RefCell::new(Vec::with_capacity(slots as usize)),
            in_place: Cell::new(0),
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

    /// Frames whose payload lies in the guest.
    pub fn in_place(&self) -> usize {
        self.in_place.get() as usize
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

    /// A frame of the guest that stays where it is: `head` is written by `fill` into host memory (at
    /// least [`HEADER_MAX`] bytes of it, given back as its length), the rest lies in `rest`, in
    /// order. The buffer comes back through [`FramePool::take_returned`].
    pub fn keep_in_place(
        &mut self,
        buffer: Buffer,
        rest: &[Segment],
        fill: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Option<Token> {
        let place = Place::new(buffer, rest)?;
        let token = self.fill(fill)?;
        let slot = &self.slots[token.slot() as usize];
        slot.place_rest(&place);
        self.places[token.slot() as usize].set(place);
        self.in_place.set(self.in_place.get() + 1);
        Some(token)
    }

    /// A frame of the guest that stays where it is with its header, in one piece: for who neither looks at it
    /// nor changes it, since the guest may write all of it until it has left. [`Frames::header`] shows nothing
    /// of it, [`FramePool::glance`] what is there at the moment. The buffer comes back as that of a frame in place.
    pub fn keep_whole(&mut self, buffer: Buffer, frame: Segment) -> Option<Token> {
        if frame.len as usize > self.frame_bytes_max() {
            return None;
        }
        self.keep_in_place(buffer, &[frame], |_| Some(0))
    }

    /// The frame's first bytes and its length. If none are held, they are copied to `first` as the guest has
    /// them now: good for a guess, and for what harms only the guest when it is wrong.
    pub fn glance<'a>(
        &'a self,
        token: &Token,
        first: &'a mut [u8; HEADER_MAX],
    ) -> (&'a [u8], usize) {
        let len = self.len(token);
        if let (Some(place), Some(guest), 0) = (
            self.place_of(token.slot()),
            &self.guest,
            self.slots[token.slot() as usize].held(),
        ) && let [frame] = *place.rest()
        {
            let first = &mut first[..len.min(HEADER_MAX)];
            // In RAM when the buffer was taken.
            if guest.read(frame.gpa, first).is_ok() {
                return (first, len);
            }
        }
        self.view(token)
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

    /// Whether the checksum of a frame of `len` bytes with this header can bind its payload, from `at` on, to what
    /// was compared ([`FramePool::bind`]).
    pub(crate) fn can_bind(header: &[u8], len: usize, at: usize) -> bool {
        at <= header.len().min(HEADER_MAX) && checksum::applies(header, len, at)
    }

    /// The payload of a frame that is in place, from `at` on, was compared and has this sum: it leaves under a
    /// checksum made of that (rule 10).
    pub(crate) fn bind(&self, token: &Token, at: usize, sum: u16) {
        self.slots[token.slot() as usize].set_sum(at, sum);
    }

    /// Copies the payload of a frame that is in place into its slot.
    pub fn settle_frame(&self, token: &Token, cause: CopyCause) {
        self.settle(token.slot(), cause);
    }

    /// Settles every frame but those that the NIC has: it goes on reading what it was given, so the guest must not have
    /// that back.
    pub fn settle_all(&self, cause: CopyCause) {
        self.settle_where(cause, |slot| slot.is_in_place() && !slot.is_read_in_place());
    }

    /// Settles what the NIC has, too; how many frames that were. The guest can change what of them has not left.
    pub fn settle_unsent(&self, cause: CopyCause) -> u64 {
        self.settle_where(cause, Slot::is_read_in_place)
    }

    fn settle_where(&self, cause: CopyCause, is_meant: impl Fn(&Slot) -> bool) -> u64 {
        let mut settled = 0;
        if self.in_place.get() > 0 {
            for slot in 0..self.slots.len() as u32 {
                if is_meant(&self.slots[slot as usize]) {
                    self.settle(slot, cause);
                    settled += 1;
                }
            }
        }
        settled
    }

    /// The NIC gets it, or has given it back.
    pub fn set_with_nic(&self, token: &Token, is_there: bool) {
        self.slots[token.slot() as usize].set_with_nic(is_there);
    }

    /// Whether the NIC has a frame that lies in the guest.
    pub fn is_read_in_place(&self) -> bool {
        self.in_place.get() > 0 && self.slots.iter().any(Slot::is_read_in_place)
    }

    /// The guest's buffers that came back since the last call.
    pub fn take_returned(&mut self, out: &mut Vec<Buffer>) {
        out.append(self.returned.get_mut());
    }

    /// Where the bytes lie that are to be sent. The addresses are valid until the frame is
    /// released.
    pub fn pieces(&mut self, token: &Token) -> Pieces {
        if let Some((twin, at)) = self.slots[token.slot() as usize].twin() {
            return Pieces::one(self.join_twin(token.slot(), twin, at));
        }
        self.seal(token);
        let held = self.host_bytes(token.slot());
        let mut pieces = match held {
            [] => Pieces::none(),
            _ => Pieces::one(Piece {
                address: held.as_ptr(),
                len: held.len(),
            }),
        };
        if let (Some(place), Some(guest)) = (self.place_of(token.slot()), &self.guest) {
            for segment in place.rest() {
                let len = segment.len as usize;
                // In RAM when the buffer was taken, and RAM does not shrink.
                if let Ok(address) = guest.host_range(segment.gpa, len) {
                    pieces.push(Piece { address, len });
                }
            }
        }
        pieces
    }

    /// The bytes that are to be sent, in one piece: copied together if they lie apart.
    pub fn in_one_piece(&mut self, token: &Token) -> &[u8] {
        if let Some((twin, at)) = self.slots[token.slot() as usize].twin() {
            self.join_twin(token.slot(), twin, at);
            return self.host_bytes(twin);
        }
        self.seal(token);
        self.settle(token.slot(), CopyCause::Gathered);
        self.host_bytes(token.slot())
    }

    /// Payload that was not copied so far.
    pub fn in_place_bytes(&self, token: &Token) -> usize {
        let state = &self.slots[token.slot() as usize];
        state.len() - state.held()
    }

    /// Binds payload that leaves from the guest's memory to what was compared: its checksum goes into
    /// the header (rule 10).
    fn seal(&mut self, token: &Token) {
        let slot = token.slot();
        let state = &self.slots[slot as usize];
        if let Some((at, sum)) = state.sum() {
            let (start, held, len) = (state.start(), state.held(), state.len());
            let header = self.memory.bytes_mut(slot, start, held.min(at));
            checksum::write(header, len, at, sum);
        }
    }

    /// Puts the header of `slot` before the payload of its twin, which begins at the same place.
    fn join_twin(&mut self, slot: u32, twin: u32, at: usize) -> Piece {
        let mut header = [0; HEADER_MAX];
        let at = at.min(HEADER_MAX);
        header[..at].copy_from_slice(&self.host_bytes(slot)[..at]);
        let start = self.slots[twin as usize].start();
        let front = self.memory.bytes_mut(twin, start, at);
        front.copy_from_slice(&header[..at]);
        let frame = self.host_bytes(twin);
        Piece {
            address: frame.as_ptr(),
            len: frame.len(),
        }
    }

    #[inline]
    fn settle(&self, slot: u32, cause: CopyCause) {
        let state = &self.slots[slot as usize];
        if state.held() < state.len() {
            self.copy_rest(slot, cause);
        }
    }

    #[cold]
    fn copy_rest(&self, slot: u32, cause: CopyCause) {
        let state = &self.slots[slot as usize];
        let (held, len) = (state.held(), state.len());
        let mut at = state.start() + held;
        if let Some((twin, _)) = state.twin() {
            // What is held was compared as well; only the rest is missing.
            self.memory.append(slot, at, &self.host_bytes(twin)[held..]);
        } else if let (Some(place), Some(guest)) = (self.place_of(slot), &self.guest) {
            for segment in place.rest() {
                self.memory.append_guest(slot, at, guest, *segment);
                at += segment.len as usize;
            }
        }
        state.hold_all();
        self.drop_place(slot);
        self.stats.count_copied(cause, (len - held) as u64);
    }

    /// Where the rest of a frame lies that is in place.
    fn place_of(&self, slot: u32) -> Option<Place> {
        let is_there = self.slots[slot as usize].is_in_place();
        is_there.then(|| self.places[slot as usize].get())
    }

    fn drop_place(&self, slot: u32) {
        if self.slots[slot as usize].leave_place() {
            let place = self.places[slot as usize].get();
            self.in_place.set(self.in_place.get() - 1);
            self.returned.borrow_mut().push(place.buffer());
        }
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

    /// Makes `svm` the twin of `pvm` if that is in place and the layouts agree.
    fn pair(&self, pvm: u32, at: usize, svm: u32, svm_at: usize, n: usize) {
        let (a, b) = (&self.slots[pvm as usize], &self.slots[svm as usize]);
        let whole = a.is_in_place() && at == svm_at && at <= a.held().min(HEADER_MAX);
        let ends = at + n == a.len() && svm_at + n == b.held() && b.held() == b.len();
        // A slot that is on its way already must not get another header.
        if whole && ends && !b.is_shared() {
            a.set_twin(svm, at);
            b.share();
            self.drop_place(pvm);
        }
    }

    /// Compares as [`FramePool::equals_in_place`] does and keeps the sum of what it compared.
    fn sum_in_place(&self, pvm: u32, at: usize, svm: &[u8]) -> Option<bool> {
        let state = &self.slots[pvm as usize];
        let (place, guest) = (self.place_of(pvm)?, self.guest.as_ref()?);
        let held = self.host_bytes(pvm);
        let fits = at <= held.len().min(HEADER_MAX) && state.len() - at == svm.len();
        if !fits || !checksum::applies(held, state.len(), at) {
            return None;
        }
        let (front, mut rest) = svm.split_at(held.len() - at);
        if held[at..] != *front {
            return Some(false);
        }
        let mut sum = checksum::words(front);
        let mut done = front.len();
        for segment in place.rest() {
            let (bytes, behind) = rest.split_at(segment.len as usize);
            let Some(part) = guest.equals_and_sum(segment.gpa, bytes).ok()? else {
                return Some(false);
            };
            // At an odd place the halves of the words are exchanged.
            let part = if done % 2 == 1 {
                part.swap_bytes()
            } else {
                part
            };
            sum += u64::from(part);
            done += bytes.len();
            rest = behind;
        }
        state.set_sum(at, fold(sum));
        Some(true)
    }

    /// Settles the frame and compares it in the same pass: what is compared is what was copied.
    fn copy_in_pass(&self, pvm: u32, at: usize, svm: &[u8]) -> Option<bool> {
        let state = &self.slots[pvm as usize];
        let (place, guest) = (self.place_of(pvm)?, self.guest.as_ref()?);
        let held = self.host_bytes(pvm);
        if at > held.len() || state.len() - at != svm.len() {
            return None;
        }
        let (front, mut rest) = svm.split_at(held.len() - at);
        let mut is_same = held[at..] == *front;
        let (mut to, copied) = (state.start() + held.len(), rest.len() as u64);
        for segment in place.rest() {
            let (bytes, behind) = rest.split_at(segment.len as usize);
            is_same &= self
                .memory
                .append_guest_if(pvm, to, (guest, *segment), bytes);
            to += bytes.len();
            rest = behind;
        }
        state.hold_all();
        self.drop_place(pvm);
        self.stats.count_copied(CopyCause::Compared, copied);
        Some(is_same)
    }

    /// Compares what lies in the guest with host bytes: whole segments, in order.
    fn equals_in_place(&self, pvm: u32, at: usize, svm: &[u8]) -> Option<bool> {
        let state = &self.slots[pvm as usize];
        let (place, guest) = (self.place_of(pvm)?, self.guest.as_ref()?);
        let held = self.host_bytes(pvm);
        if at > held.len() || state.len() - at != svm.len() {
            return None;
        }
        let (front, mut rest) = svm.split_at(held.len() - at);
        if held[at..] != *front {
            return Some(false);
        }
        for segment in place.rest() {
            let (bytes, behind) = rest.split_at(segment.len as usize);
            if !guest.equals(segment.gpa, bytes).ok()? {
                return Some(false);
            }
            rest = behind;
        }
        Some(true)
    }
}

impl Frames for FramePool {
    #[inline]
    fn len(&self, token: &Token) -> usize {
        self.slots[token.slot() as usize].len()
    }

    #[inline]
    fn header(&self, token: &Token) -> &[u8] {
        let bytes = self.host_bytes(token.slot());
        &bytes[..bytes.len().min(HEADER_MAX)]
    }

    #[inline]
    fn view(&self, token: &Token) -> (&[u8], usize) {
        (self.header(token), self.len(token))
    }

    fn header_mut(&mut self, token: &Token) -> &mut [u8] {
        let state = &self.slots[token.slot() as usize];
        let len = state.held().min(HEADER_MAX);
        self.memory.bytes_mut(token.slot(), state.start(), len)
    }

    #[inline]
    fn first_difference(
        &self,
        a: &Token,
        a_at: usize,
        b: &Token,
        b_at: usize,
        n: usize,
    ) -> Option<usize> {
        self.settle(a.slot(), CopyCause::Compared);
        self.settle(b.slot(), CopyCause::Compared);
        let a = &self.host_bytes(a.slot())[a_at..a_at + n];
        let b = &self.host_bytes(b.slot())[b_at..b_at + n];
        // memcmp first: equality is the common case and is the fast one.
        if a == b { None } else { position(a, b) }
    }

    #[inline]
    fn match_payload(
        &self,
        pvm: &Token,
        pvm_at: usize,
        svm: &Token,
        svm_at: usize,
        n: usize,
    ) -> bool {
        let state = &self.slots[pvm.slot() as usize];
        let other = &self.slots[svm.slot() as usize];
        if state.held() == state.len() || other.held() < other.len() {
            return self.first_difference(pvm, pvm_at, svm, svm_at, n).is_none();
        }
        let bytes = &self.host_bytes(svm.slot())[svm_at..svm_at + n];
        let matched = match self.tx {
            TxMode::InPlace => self.sum_in_place(pvm.slot(), pvm_at, bytes),
            TxMode::Exact => self.copy_in_pass(pvm.slot(), pvm_at, bytes),
            TxMode::Twin => self.equals_in_place(pvm.slot(), pvm_at, bytes),
        };
        match matched {
            Some(true) if self.tx == TxMode::Twin => {
                self.pair(pvm.slot(), pvm_at, svm.slot(), svm_at, n);
                // Layouts that do not fit: bind the bytes by a copy, and compare that.
                !state.is_in_place() || self.first_difference(pvm, pvm_at, svm, svm_at, n).is_none()
            }
            Some(matched) => matched,
            None => self.first_difference(pvm, pvm_at, svm, svm_at, n).is_none(),
        }
    }

    fn copy_out(&self, token: &Token, at: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.bytes(token)[at..at + out.len()]);
    }

    fn digest(&self, token: &Token, at: usize, n: usize, key: &DigestKey) -> u128 {
        // There are no bytes to leave with but the frame's own.
        self.settle(token.slot(), CopyCause::Digested);
        key.of(&self.host_bytes(token.slot())[at..at + n])
    }

    fn duplicate(&mut self, token: &Token) -> Option<Token> {
        self.settle(token.slot(), CopyCause::Read);
        let slot = self.free.pop()?;
        let state = &self.slots[token.slot() as usize];
        let (start, len) = (state.start(), state.len());
        // The new slot holds nothing yet.
        self.memory
            .append(slot, start, self.host_bytes(token.slot()));
        self.slots[slot as usize].own(start, len);
        Some(Token::new(slot))
    }

    fn release(&mut self, token: Token) {
        self.free_if_unused(token.slot());
    }

    #[inline]
    fn prefetch(&self, address: *const u8) {
        prefetch(address);
    }
}

#[cold]
fn position(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

#[cfg(test)]
#[path = "frame/tests.rs"]
mod tests;
