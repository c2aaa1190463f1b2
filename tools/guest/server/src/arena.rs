//! Memory that clients have written on purpose: so many pages, the same or different on two guests.
//!
//! Invariants: which pages are written, and the contents of those that are to be the same, depend only
//! on the requests so far; memory is bounded by the limit given at the start.
//!
//! Does not free anything: a request reuses the pages of those before it.

use crate::hash::scramble;
use alloc::vec::Vec;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Spreads the pages that are to be the same evenly over a hundred; prime to 100.
const SPREAD: usize = 37;

#[derive(Clone)]
#[repr(align(4096))]
struct Page([u8; PAGE_BYTES]);

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dirty {
    /// How many pages are written.
    pub pages: usize,
    /// So many in a hundred get the same contents on both guests.
    pub same_pct: usize,
    /// So many bytes of each are changed.
    pub bytes: usize,
}

/// The pages.
pub(crate) struct Arena {
    pages: Vec<Page>,
    pages_max: usize,
    round: u64,
}

impl Arena {
    /// An empty one that grows to so many bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            pages: Vec::new(),
            pages_max: bytes_max / PAGE_BYTES,
            round: 0,
        }
    }

    /// Changes every page that is asked for; `false` if there is no memory for so many.
    pub fn write(&mut self, dirty: Dirty, mut entropy: impl FnMut() -> u64) -> bool {
        if dirty.pages > self.pages_max {
            return false;
        }
        if let Some(more) = dirty.pages.checked_sub(self.pages.len()) {
            if self.pages.try_reserve_exact(more).is_err() {
                return false;
            }
            self.pages.resize(dirty.pages, Page([0; PAGE_BYTES]));
        }
        self.round += 1;
        let own = scramble(entropy());
        let words = dirty.bytes.clamp(1, PAGE_BYTES).div_ceil(8);
        for (n, page) in self.pages[..dirty.pages].iter_mut().enumerate() {
            let is_same = n * SPREAD % 100 < dirty.same_pct;
            let mut word = scramble(self.round << 32 | n as u64) ^ if is_same { 0 } else { own };
            for place in page.0.chunks_exact_mut(8).take(words) {
                // Never what it was, and not to be compressed.
                word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(arena: &Arena) -> Vec<[u8; PAGE_BYTES]> {
        arena.pages.iter().map(|page| page.0).collect()
    }

    #[test]
    fn as_many_pages_as_asked_for_are_the_same_on_two_guests() {
        let (mut one, mut other) = (Arena::new(4 << 20), Arena::new(4 << 20));
        for same_pct in [0, 50, 75, 100] {
            let before = contents(&one);
            let dirty = Dirty {
                pages: 1000,
                same_pct,
                bytes: 64,
            };
            assert!(one.write(dirty, || 1) && other.write(dirty, || 2));
            let (ours, theirs) = (contents(&one), contents(&other));
            let same = ours.iter().zip(&theirs).filter(|(a, b)| a == b).count();
            assert_eq!(same, same_pct * 10);
            let unchanged = before.iter().zip(&ours).filter(|(a, b)| a == b).count();
            assert_eq!(unchanged, 0);
            assert!(ours.iter().all(|page| page[64..] == [0; PAGE_BYTES - 64]));
        }
    }

    #[test]
    fn more_than_the_limit_is_refused_and_changes_nothing() {
        let mut arena = Arena::new(10 * PAGE_BYTES);
        let dirty = |pages| Dirty {
            pages,
            same_pct: 100,
            bytes: PAGE_BYTES,
        };
        assert!(!arena.write(dirty(11), || 1));
        assert!(arena.pages.is_empty());
        assert!(arena.write(dirty(10), || 1));
        let whole = contents(&arena);
        assert!(whole.iter().all(|page| page[PAGE_BYTES - 8..] != [0; 8]));
    }
}
