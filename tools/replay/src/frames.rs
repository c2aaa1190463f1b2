//! The frames of two mapped captures, as the comparator sees them.
//!
//! Invariants: a slot is free or owned by exactly one token; the first [`HEADER_MAX`] bytes of a
//! frame are a copy in the slot, which may be rewritten, everything behind them is read from the
//! capture where it lies; slots are used again, so their number is that of the frames waiting.

use colo_compare::{Frames, HEADER_MAX, Token, first_difference};

use crate::capture::Record;

#[derive(Debug, Clone)]
struct Slot<'a> {
    record: Record<'a>,
    header: [u8; HEADER_MAX],
    used: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct MappedFrames<'a> {
    slots: Vec<Slot<'a>>,
    free: Vec<u32>,
}

impl<'a> MappedFrames<'a> {
    /// A frame of a capture.
    pub(crate) fn insert(&mut self, record: Record<'a>) -> Token {
        let mut header = [0; HEADER_MAX];
        let len = record.frame.len().min(HEADER_MAX);
        header[..len].copy_from_slice(&record.frame[..len]);
        self.fill(Slot {
            record,
            header,
            used: true,
        })
    }

    fn fill(&mut self, slot: Slot<'a>) -> Token {
        let number = self.free.pop().unwrap_or(self.slots.len() as u32);
        match self.slots.get_mut(number as usize) {
            Some(free) => *free = slot,
            None => self.slots.push(slot),
        }
        Token::new(number)
    }

    fn slot(&self, token: &Token) -> &Slot<'a> {
        let slot = &self.slots[token.slot() as usize];
        debug_assert!(slot.used, "slot {} was released before", token.slot());
        slot
    }

    /// What the capture has, whatever was rewritten in the header since.
    pub(crate) fn record(&self, token: &Token) -> Record<'a> {
        self.slot(token).record
    }

    /// Slots that are owned.
    #[cfg(test)]
    pub(crate) fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Bytes at `at` that lie in one piece: at least one, `n` at most.
    fn piece(&self, token: &Token, at: usize, n: usize) -> &[u8] {
        let slot = self.slot(token);
        match slot.header.get(at..) {
            Some(header) if !header.is_empty() => {
                let header = &header[..header.len().min(n)];
                // The header copy is longer than a short frame.
                &header[..header.len().min(slot.record.frame.len() - at)]
            }
            _ => &slot.record.frame[at..at + n],
        }
    }

    /// Calls `each` with consecutive pieces of `n` bytes at `at`, and where in them each begins.
    fn pieces(&self, token: &Token, at: usize, n: usize, mut each: impl FnMut(usize, &[u8])) {
        let mut done = 0;
        while done < n {
            let piece = self.piece(token, at + done, n - done);
            each(done, piece);
            done += piece.len();
        }
    }
}

impl Frames for MappedFrames<'_> {
    fn len(&self, token: &Token) -> usize {
        self.slot(token).record.frame.len()
    }

    fn header(&self, token: &Token) -> &[u8] {
        let slot = self.slot(token);
        &slot.header[..slot.record.frame.len().min(HEADER_MAX)]
    }

    fn header_mut(&mut self, token: &Token) -> &mut [u8] {
        let slot = &mut self.slots[token.slot() as usize];
        let len = slot.record.frame.len().min(HEADER_MAX);
        &mut slot.header[..len]
    }

    fn first_difference(
        &self,
        a: &Token,
        a_at: usize,
        b: &Token,
        b_at: usize,
        n: usize,
    ) -> Option<usize> {
        let mut done = 0;
        while done < n {
            let a = self.piece(a, a_at + done, n - done);
            let b = self.piece(b, b_at + done, n - done);
            let len = a.len().min(b.len());
            if let Some(at) = first_difference(&a[..len], &b[..len]) {
                return Some(done + at);
            }
            done += len;
        }
        None
    }

    fn copy_out(&self, token: &Token, at: usize, out: &mut [u8]) {
        self.pieces(token, at, out.len(), |from, piece| {
            out[from..from + piece.len()].copy_from_slice(piece);
        });
    }

    fn duplicate(&mut self, token: &Token) -> Option<Token> {
        let copy = self.slot(token).clone();
        Some(self.fill(copy))
    }

    fn release(&mut self, token: Token) {
        let slot = &mut self.slots[token.slot() as usize];
        assert!(slot.used, "slot {} released twice", token.slot());
        slot.used = false;
        self.free.push(token.slot());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_compare::testing::VecFrames;

    fn record(frame: &[u8]) -> Record<'_> {
        Record {
            number: 1,
            at_ns: 0,
            offset: 0,
            frame,
        }
    }

    /// The frames of the core's own tests say what is right.
    #[test]
    fn it_gives_what_frames_in_vectors_give() {
        let mut bytes: Vec<u8> = (0..700u32).map(|n| (n * 7 % 251) as u8).collect();
        let short = &bytes[..100].to_vec();
        let long = bytes.clone();
        bytes[600] ^= 1;
        let mut mapped = MappedFrames::default();
        let mut vectors = VecFrames::new(10);
        let all = [short, &long, &bytes];
        let a = all.map(|bytes| mapped.insert(record(bytes)));
        let b = all.map(|bytes| vectors.insert(bytes).unwrap());
        for (a, b) in a.iter().zip(&b) {
            mapped.header_mut(a)[60] = 9;
            vectors.header_mut(b)[60] = 9;
        }
        for at in [0, 59, 60, 61, 255, 256, 257, 599] {
            for n in [0, 1, 2, 3, 100] {
                for (i, j) in [(1, 1), (1, 2), (2, 1)] {
                    let (x, y) = (&a[i], &a[j]);
                    let expected = vectors.first_difference(&b[i], at, &b[j], at, n);
                    assert_eq!(mapped.first_difference(x, at, y, at, n), expected);
                    let shifted = vectors.first_difference(&b[i], at, &b[j], 100, n);
                    assert_eq!(mapped.first_difference(x, at, y, 100, n), shifted);
                }
                let (mut out, mut expected) = ([0; 100], [0; 100]);
                mapped.copy_out(&a[1], at, &mut out[..n]);
                vectors.copy_out(&b[1], at, &mut expected[..n]);
                assert_eq!(out, expected);
            }
        }
        assert_eq!(mapped.header(&a[0]), vectors.header(&b[0]));
        assert_eq!(mapped.len(&a[0]), 100);
        assert_eq!(
            mapped.record(&a[0]).frame,
            &short[..],
            "the capture is as it was"
        );
    }

    #[test]
    fn slots_are_used_again() {
        let bytes = [7; 300];
        let mut frames = MappedFrames::default();
        let first = frames.insert(record(&bytes));
        let second = frames.duplicate(&first).unwrap();
        frames.header_mut(&second)[0] = 1;
        assert_eq!(frames.first_difference(&first, 0, &second, 0, 300), Some(0));
        frames.release(first);
        let third = frames.insert(record(&bytes[..20]));
        assert_eq!((frames.slots.len(), frames.used()), (2, 2));
        assert_eq!(frames.header(&third).len(), 20);
        frames.release(second);
        frames.release(third);
        assert_eq!(frames.used(), 0);
    }
}
