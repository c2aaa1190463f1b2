//! Frames as the packet cores see them: looked at, compared where they lie, digested, released.
//!
//! Invariant: when a comparison in place says that payload is the same, then what leaves is what was compared, whatever
//! the guest writes afterwards: the twin's bytes, a copy made in the same pass, or bytes under a checksum of what was read
//! (invariant 7, rule 10). Where none of these can be, the frame is settled first and the copy is compared.
//!
//! Does not know flows or verdicts.

use colo_compare::wire::checksum::OnesSum;
use colo_compare::{DigestKey, Frames, HEADER_MAX, Token, first_difference};

use crate::hint::prefetch;
use crate::ring::{GuestRam, Segment};

use super::slots::{CopyCause, Place};
use super::{FramePool, TxMode};

/// A frame in place beside the host bytes that its payload is to equal, which are as long.
struct Beside<'a> {
    guest: &'a GuestRam,
    /// What of the payload the slot holds, and the bytes for it.
    held: (&'a [u8], &'a [u8]),
    place: &'a Place,
    /// The bytes for what lies in the guest.
    rest: &'a [u8],
}

impl<'a> Beside<'a> {
    fn is_held_same(&self) -> bool {
        self.held.0 == self.held.1
    }

    /// What lies in the guest, segment by segment, each with its bytes.
    fn segments(&self) -> impl Iterator<Item = (Segment, &'a [u8])> {
        let mut rest = self.rest;
        self.place.rest().map(move |segment| {
            let (bytes, behind) = rest.split_at(segment.len as usize);
            rest = behind;
            (segment, bytes)
        })
    }
}

impl FramePool {
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

    /// Lays the payload of a frame in place, from `at` on, beside `svm`; `None` when that cannot be done.
    #[inline]
    fn beside<'a>(&'a self, pvm: u32, at: usize, svm: &'a [u8]) -> Option<Beside<'a>> {
        let (place, guest) = (self.place_of(pvm)?, self.guest.as_deref()?);
        let held = self.host_bytes(pvm).get(at..)?;
        if self.slots[pvm as usize].len() - at != svm.len() {
            return None;
        }
        let (front, rest) = svm.split_at(held.len());
        Some(Beside {
            guest,
            held: (held, front),
            place,
            rest,
        })
    }

    /// Compares what lies in the guest with host bytes: whole segments, in order.
    fn equals_in_place(&self, pvm: u32, at: usize, svm: &[u8]) -> Option<bool> {
        let both = self.beside(pvm, at, svm)?;
        let mut is_same = both.is_held_same();
        for (segment, bytes) in both.segments() {
            is_same = is_same && both.guest.equals(segment.gpa, bytes).ok()?;
        }
        Some(is_same)
    }

    /// The same, and keeps the sum of what it compared.
    fn sum_in_place(&self, pvm: u32, at: usize, svm: &[u8]) -> Option<bool> {
        let state = &self.slots[pvm as usize];
        let fits = Self::can_bind(self.host_bytes(pvm), state.len(), at);
        let both = self.beside(pvm, at, svm).filter(|_| fits)?;
        if !both.is_held_same() {
            return Some(false);
        }
        let mut sum = OnesSum::default();
        sum.add(both.held.0);
        for (segment, bytes) in both.segments() {
            let Some(part) = both.guest.equals_and_sum(segment.gpa, bytes).ok()? else {
                return Some(false);
            };
            sum.add_sum(part, bytes.len());
        }
        state.set_sum(at, sum.word());
        Some(true)
    }

    /// Settles the frame and compares it in the same pass: what is compared is what was copied.
    fn copy_in_pass(&self, pvm: u32, at: usize, svm: &[u8]) -> Option<bool> {
        let state = &self.slots[pvm as usize];
        let both = self.beside(pvm, at, svm)?;
        let mut is_same = both.is_held_same();
        let mut to = state.start() + state.held();
        for (segment, bytes) in both.segments() {
            let source = (both.guest, segment);
            is_same &= self.memory.append_guest_if(pvm, to, source, bytes);
            to += bytes.len();
        }
        state.hold_all();
        self.drop_place(pvm);
        let copied = both.rest.len() as u64;
        self.stats.count_copied(CopyCause::Compared, copied);
        Some(is_same)
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
        first_difference(a, b)
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
