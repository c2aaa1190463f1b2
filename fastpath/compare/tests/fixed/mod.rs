//! What a test needs to see that a path takes no memory: an allocator that counts, frames in a slab,
//! and a generator of numbers.
#![allow(dead_code, missing_docs, reason = "each test file uses a part of it")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use colo_compare::{Frames, HEADER_MAX, Token};

thread_local! {
    static COUNTED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// The system's allocator; counts on threads that asked for it.
struct Counting;

fn note() {
    COUNTED.with(|counted| counted.set(counted.get().map(|n| n + 1)));
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer comes from `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note();
        // SAFETY: the pointer comes from `alloc` above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often `task` asked for memory.
pub fn allocations<T>(task: impl FnOnce() -> T) -> (T, u64) {
    COUNTED.with(|counted| counted.set(Some(0)));
    let result = task();
    let count = COUNTED.with(Cell::take);
    (result, count.unwrap())
}

/// Runs a call of the path, which must not ask for memory.
pub fn pure<T>(name: &str, task: impl FnOnce() -> T) -> T {
    let (result, count) = allocations(task);
    assert_eq!(count, 0, "{name} asked for memory");
    result
}

const SLOT_BYTES: usize = 256;

/// Frames in a slab.
pub struct Pool {
    slab: Vec<[u8; SLOT_BYTES]>,
    lengths: Vec<usize>,
    free: Vec<u32>,
    /// Hints that were given.
    pub prefetched: Cell<u64>,
}

impl Pool {
    pub fn new(slots: u32) -> Self {
        Self {
            slab: vec![[0; SLOT_BYTES]; slots as usize],
            lengths: vec![0; slots as usize],
            free: (0..slots).collect(),
            prefetched: Cell::new(0),
        }
    }

    /// Slots in use.
    pub fn used(&self) -> usize {
        self.slab.len() - self.free.len()
    }

    pub fn insert(&mut self, bytes: &[u8]) -> Option<Token> {
        let slot = self.free.pop()?;
        self.slab[slot as usize][..bytes.len()].copy_from_slice(bytes);
        self.lengths[slot as usize] = bytes.len();
        Some(Token::new(slot))
    }

    pub fn bytes(&self, token: &Token) -> &[u8] {
        &self.slab[token.slot() as usize][..self.len(token)]
    }
}

impl Frames for Pool {
    fn len(&self, token: &Token) -> usize {
        self.lengths[token.slot() as usize]
    }

    fn header(&self, token: &Token) -> &[u8] {
        &self.bytes(token)[..self.len(token).min(HEADER_MAX)]
    }

    fn header_mut(&mut self, token: &Token) -> &mut [u8] {
        let len = self.len(token).min(HEADER_MAX);
        &mut self.slab[token.slot() as usize][..len]
    }

    fn first_difference(
        &self,
        a: &Token,
        a_at: usize,
        b: &Token,
        b_at: usize,
        n: usize,
    ) -> Option<usize> {
        let (a, b) = (&self.bytes(a)[a_at..], &self.bytes(b)[b_at..]);
        (0..n).find(|at| a[*at] != b[*at])
    }

    fn copy_out(&self, token: &Token, at: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.bytes(token)[at..at + out.len()]);
    }

    fn duplicate(&mut self, token: &Token) -> Option<Token> {
        let slot = self.free.pop()?;
        self.slab[slot as usize] = self.slab[token.slot() as usize];
        self.lengths[slot as usize] = self.len(token);
        Some(Token::new(slot))
    }

    fn release(&mut self, token: Token) {
        self.free.push(token.slot());
    }

    fn prefetch(&self, _: *const u8) {
        self.prefetched.set(self.prefetched.get() + 1);
    }
}

/// SplitMix64.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % n
    }
}
