//! Frames whose payload stays in the guest's buffers, until they are released, settled or matched.
//!
//! Invariants: a buffer comes back exactly once ([`FramePool::take_returned`]); a frame that the NIC reads in place is
//! settled only by who has taken it from the NIC, or knows that it will not be sent as it was
//! ([`FramePool::settle_unsent`]).
//!
//! Does not compare, and does not know what is sent of them.

use colo_compare::{Frames, HEADER_MAX, Token};

use crate::ring::Segment;

use super::FramePool;
use super::slots::{Buffer, CopyCause, Place, Slot};

impl FramePool {
    /// A frame of the guest that stays where it is: `head` is written by `fill` into host memory (at
    /// least [`HEADER_MAX`] bytes of it, given back as its length), the rest lies in `rest`, in
    /// order. The buffer comes back through [`FramePool::take_returned`].
    #[inline]
    pub fn keep_in_place(
        &mut self,
        buffer: Buffer,
        rest: &[Segment],
        fill: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Option<Token> {
        if !Place::takes(rest) {
            return None;
        }
        let token = self.fill(fill)?;
        self.slots[token.slot() as usize].place_rest(rest);
        self.places[token.slot() as usize].set(buffer, rest);
        self.in_place.set(self.in_place.get() + 1);
        let descriptors = self.descriptors_in_place.get() + u32::from(buffer.descriptors);
        self.descriptors_in_place.set(descriptors);
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
        ) && let Some(frame) = place.rest().next()
            && place.rest().len() == 1
        {
            let first = &mut first[..len.min(HEADER_MAX)];
            // In RAM when the buffer was taken.
            if guest.read(frame.gpa, first).is_ok() {
                return (first, len);
            }
        }
        self.view(token)
    }

    /// Frames whose payload lies in the guest.
    pub fn in_place(&self) -> usize {
        self.in_place.get() as usize
    }

    /// Descriptors of the guest's that these frames keep.
    pub fn descriptors_in_place(&self) -> usize {
        self.descriptors_in_place.get() as usize
    }

    /// Payload that was not copied so far.
    pub fn in_place_bytes(&self, token: &Token) -> usize {
        let state = &self.slots[token.slot() as usize];
        state.len() - state.held()
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

    #[inline]
    pub(super) fn settle(&self, slot: u32, cause: CopyCause) {
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
                self.memory.append_guest(slot, at, guest, segment);
                at += segment.len as usize;
            }
        }
        state.hold_all();
        self.drop_place(slot);
        self.stats.count_copied(cause, (len - held) as u64);
    }

    /// Where the rest of a frame lies that is in place.
    pub(super) fn place_of(&self, slot: u32) -> Option<&Place> {
        let is_there = self.slots[slot as usize].is_in_place();
        is_there.then(|| &self.places[slot as usize])
    }

    pub(super) fn drop_place(&self, slot: u32) {
        if self.slots[slot as usize].leave_place() {
            self.in_place.set(self.in_place.get() - 1);
            let buffer = self.places[slot as usize].buffer();
            let descriptors = self.descriptors_in_place.get() - u32::from(buffer.descriptors);
            self.descriptors_in_place.set(descriptors);
            self.returned.borrow_mut().push(buffer);
        }
    }
}
