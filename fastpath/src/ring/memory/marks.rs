//! Which pages the host has written to: a bit for each, and one more for each block of words that has any, so that a small
//! set of a large guest costs what is in it (the guest stands still while it is taken).
//!
//! Invariant: what was marked before [`HostMarks::take`] begins is given by it or by the next.

use std::sync::atomic::{AtomicU64, Ordering};

/// Words that have one mark together.
const BLOCK_WORDS: usize = 64;

#[derive(Debug)]
pub(super) struct HostMarks {
    /// Bit `n % 64` of word `n / 64` is page `n`.
    words: Box<[AtomicU64]>,
    /// Bit `n % 64` of word `n / 64` is block `n`. One that is clear says that its block has no page.
    blocks: Box<[AtomicU64]>,
}

impl HostMarks {
    pub(super) fn new(pages: usize) -> Self {
        let zeros = |words: usize| (0..words).map(|_| AtomicU64::new(0)).collect();
        let words = pages.div_ceil(64);
        Self {
            words: zeros(words),
            blocks: zeros(words.div_ceil(64 * BLOCK_WORDS)),
        }
    }

    /// Words of a bitmap with one bit a page.
    pub(super) fn words(&self) -> usize {
        self.words.len()
    }

    pub(super) fn add(&self, page: usize) {
        // The page before its block, and none of both later than a look at the block: so whoever takes the blocks and
        // then the pages misses none that was marked before.
        self.words[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
        let block = page / 64 / BLOCK_WORDS;
        let (blocks, bit) = (&self.blocks[block / 64], 1 << (block % 64));
        if blocks.load(Ordering::SeqCst) & bit == 0 {
            blocks.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Gives the words that are not 0 with their places, rising, and forgets them.
    pub(super) fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (at, blocks) in self.blocks.iter().enumerate() {
            if blocks.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut rest = blocks.swap(0, Ordering::SeqCst);
            while rest != 0 {
                let first = (at * 64 + rest.trailing_zeros() as usize) * BLOCK_WORDS;
                rest &= rest - 1;
                let end = self.words.len().min(first + BLOCK_WORDS);
                for (at, word) in (first..).zip(&self.words[first..end]) {
                    if word.load(Ordering::SeqCst) != 0 {
                        each(at, word.swap(0, Ordering::SeqCst));
                    }
                }
            }
        }
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        for word in self.words.iter().chain(&self.blocks) {
            word.store(0, Ordering::Relaxed);
        }
    }
}
