//! Memory that pages are received into and stay in: whoever gets a chunk gets the memory that its pages came into.
//!
//! A [`Landing`] is a run of pages; all runs come from the blocks of one [`Landings`], which is shared by those who receive
//! and those who need pages for other reasons, so that one limit holds for both.
//!
//! Behind the pages of a block each stream has a page of its own, for what comes before and behind its pages: the kernel
//! receives into one registered buffer at a time ([`pinned`](super::pinned)).
//!
//! Invariants: runs do not overlap, and a block is used again only when all of its runs are gone; what is taken is never
//! more than the limit; a run inside an operation is held by `operations` and can't be reached.
//!
//! Does not look at the bytes.

use std::cell::{Cell, RefCell};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

use super::memory::{Mapping, PAGE_BYTES};
use super::settings::STREAMS_MAX;

/// Pages of a block: as many as the largest chunk has.
pub(super) const BLOCK_PAGES: usize = 1024;
/// Pages of a block, and those of the streams behind them.
pub(super) const BLOCK_PAGES_ALL: usize = BLOCK_PAGES + STREAMS_MAX;
/// Blocks that are kept for the next checkpoint without being used.
const SPARE_BLOCKS: usize = 16;
/// Blocks beyond that which one checkpoint gives back: the system takes its time for that.
const GIVEN_BACK: usize = 4;

/// Why there is no memory to land in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LandingError {
    /// More than may be taken.
    #[error("{limit_pages} pages may be staged, and are")]
    Full {
        /// The limit.
        limit_pages: usize,
    },
    /// The host has none.
    #[error("no memory to stage {pages} pages; free some on this host")]
    NoMemory {
        /// Taken so far.
        pages: usize,
    },
}

/// Where landings come from; clones give of the same.
#[derive(Debug, Clone)]
pub struct Landings(Rc<RefCell<Blocks>>);

#[derive(Debug)]
struct Blocks {
    blocks: Vec<Rc<Mapping>>,
    /// The block that is given from, and how many of its pages are gone.
    current: Option<(usize, usize)>,
    /// Blocks that were given from since the last rest.
    reached: usize,
    /// Pages of all landings that there are.
    taken: Rc<Cell<usize>>,
    limit_pages: usize,
}

/// A run of pages, with exclusive access to it. It goes back where it came from when it is dropped.
#[derive(Debug)]
pub struct Landing {
    at: NonNull<u8>,
    bytes: usize,
    pages: usize,
    /// Keeps it mapped, and the block out of use.
    block: Option<Rc<Mapping>>,
    taken: Rc<Cell<usize>>,
}

impl Landings {
    /// At most so many pages at once.
    pub fn new(limit_pages: usize) -> Self {
        Self(Rc::new(RefCell::new(Blocks {
            blocks: Vec::new(),
            current: None,
            reached: 0,
            taken: Rc::default(),
            limit_pages,
        })))
    }

    /// Memory for so many bytes, from a page's beginning on; what is in it is of no meaning.
    pub fn take(&self, bytes: usize) -> Result<Landing, LandingError> {
        self.0.borrow_mut().take(bytes)
    }

    /// Whoever landed before is done: small checkpoints use the same memory again, and some of what a large one took goes
    /// back to the system.
    pub fn rest(&self) {
        self.0.borrow_mut().rest();
    }
}

impl Blocks {
    fn take(&mut self, bytes: usize) -> Result<Landing, LandingError> {
        let (taken, pages) = (self.taken.get(), bytes.div_ceil(PAGE_BYTES));
        let limit_pages = self.limit_pages;
        if pages > BLOCK_PAGES || taken + pages > limit_pages {
            return Err(LandingError::Full { limit_pages });
        }
        let (index, used) = match self.current {
            Some((index, used)) if used + pages <= BLOCK_PAGES => (index, used),
            _ => {
                let index = self.unused_block();
                (
                    index.map_err(|_| LandingError::NoMemory { pages: taken })?,
                    0,
                )
            }
        };
        self.current = Some((index, used + pages));
        self.reached = self.reached.max(index + 1);
        self.taken.set(taken + pages);
        let block = &self.blocks[index];
        Ok(Landing {
            at: block.page(used),
            bytes,
            pages,
            block: Some(block.clone()),
            taken: self.taken.clone(),
        })
    }

    /// The first that nobody has a run of.
    fn unused_block(&mut self) -> std::io::Result<usize> {
        let unused = |block| Rc::strong_count(block) == 1;
        if let Some(index) = self.blocks.iter().position(unused) {
            return Ok(index);
        }
        let (pages, tail) = (BLOCK_PAGES * PAGE_BYTES, STREAMS_MAX * PAGE_BYTES);
        self.blocks.push(Rc::new(Mapping::with_tail(pages, tail)?));
        Ok(self.blocks.len() - 1)
    }

    /// Once more without anything taken in between changes nothing.
    fn rest(&mut self) {
        if self.reached == 0 {
            return;
        }
        let wanted = self.reached + SPARE_BLOCKS;
        let kept = self.blocks.len().saturating_sub(GIVEN_BACK).max(wanted);
        self.blocks.truncate(kept);
        self.current = None;
        self.reached = 0;
    }
}

impl Landing {
    /// What it is a part of.
    pub(super) fn block(&self) -> Option<&Rc<Mapping>> {
        self.block.as_ref()
    }

    /// The page of a stream in the same block; it is for the one receive that the stream has under way.
    pub(super) fn aside(&self, stream: usize) -> Option<NonNull<u8>> {
        let block = self.block.as_ref().filter(|_| stream < STREAMS_MAX)?;
        Some(block.page(BLOCK_PAGES + stream))
    }

    /// The kernel may still write to it: it stays mapped for ever.
    pub(super) fn leak(mut self) {
        std::mem::forget(self.block.take());
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.taken.set(self.taken.get().saturating_sub(self.pages));
    }
}

impl Deref for Landing {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `take` gave these pages of a block that is mapped as long as `block` lives to this landing alone; the kernel
        // has no operation on them, for then `operations` would hold it.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Landing {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }
}

impl PartialEq for Landing {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Landing {}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks_of(landings: &Landings) -> usize {
        landings.0.borrow().blocks.len()
    }

    #[test]
    fn runs_do_not_overlap_and_memory_is_used_again_only_when_they_are_gone() {
        let landings = Landings::new(usize::MAX);
        let lengths = [1, 4096, 5000, 63 * 4096, 1023 * 4096, 8, 1024 * 4096];
        let mut runs: Vec<_> = lengths.iter().map(|&n| landings.take(n).unwrap()).collect();
        for (run, value) in runs.iter_mut().zip(1..) {
            assert_eq!(run.as_ptr() as usize % PAGE_BYTES, 0);
            run.fill(value);
        }
        // What goes makes room for nobody while others have runs of the block.
        drop(runs.remove(1));
        landings.rest();
        let mut next = landings.take(1000 * 4096).unwrap();
        next.fill(99);
        for (run, (length, value)) in runs.iter().zip([(1, 1), (5000, 3), (63 * 4096, 4)]) {
            assert_eq!(run.len(), length);
            assert!(run.iter().all(|&byte| byte == value), "{value}");
        }
        let before = blocks_of(&landings);
        drop((runs, next));
        landings.rest();
        let all: Vec<_> = (0..before)
            .map(|_| landings.take(1024 * 4096).unwrap())
            .collect();
        assert_eq!(blocks_of(&landings), before);
        drop(landings);
        assert!(all.iter().any(|run| run[0] == 99), "still mapped");
    }

    #[test]
    fn invariant_6_no_more_is_taken_than_may_be() {
        let landings = Landings::new(10);
        let first = landings.clone().take(9 * 4096).unwrap();
        let full = LandingError::Full { limit_pages: 10 };
        assert_eq!(landings.take(4097).unwrap_err(), full);
        let second = landings.take(4096).unwrap();
        assert_eq!(landings.take(1).unwrap_err(), full);
        drop(first);
        assert_eq!(landings.take(9 * 4096).unwrap().len(), 9 * 4096);
        drop(second);
        let unlimited = Landings::new(usize::MAX);
        assert!(unlimited.take(1025 * 4096).is_err(), "no block holds it");
    }

    #[test]
    fn memory_stays_for_the_next_checkpoint_and_goes_slowly() {
        let landings = Landings::new(usize::MAX);
        let whole = || landings.take(BLOCK_PAGES * PAGE_BYTES).unwrap();
        drop((0..SPARE_BLOCKS + 10).map(|_| whole()).collect::<Vec<_>>());
        landings.rest();
        landings.rest();
        assert_eq!(blocks_of(&landings), SPARE_BLOCKS + 10);
        for kept in [6, 2, 0, 0] {
            drop(whole());
            landings.rest();
            landings.rest();
            let spare = SPARE_BLOCKS + 1;
            assert_eq!(blocks_of(&landings), (SPARE_BLOCKS + kept).max(spare));
        }
    }
}
