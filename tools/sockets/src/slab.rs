//! Frames that stay where the socket put them: two regions of blocks, one for each input, and slots
//! that say where in a block a frame lies.
//!
//! Invariants: nothing allocates after [`Slab::new`]; neither input can take the other's room; a
//! block is used again only when no frame, no unwritten output and no reader is in it. A slot of
//! length 0 is free.
//!
//! Does not know the socket protocol: what stands before a frame and leaves with it is its *lead*.

use std::ops::Range;

use colo_compare::{Frames, HEADER_MAX, Token, first_difference};

use crate::hint::prefetch;

/// Bytes of a block: what one read can give at most.
pub(crate) const BLOCK_BYTES: usize = 256 << 10;
const BLOCK_SHIFT: u32 = BLOCK_BYTES.trailing_zeros();
/// Blocks of one input: 16 MiB, of which only what is used is ever touched.
const BLOCKS: usize = 64;
/// Frames of one input.
pub(crate) const SLOTS: usize = 8192;

/// Which guest a frame comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Primary,
    Secondary,
}

/// The number of a block.
pub(crate) type BlockId = u32;

/// No slot.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    start: u32,
    len: u32,
    lead: u32,
    /// Of a free slot: the next free one.
    next: u32,
}

impl Slot {
    /// Lead and frame.
    fn range(self) -> Range<usize> {
        (self.start - self.lead) as usize..(self.start + self.len) as usize
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Frames that have a slot.
    frames: u32,
    /// Whoever reads into it, and unwritten output.
    pins: u32,
}

#[derive(Debug)]
struct Region {
    free_slot: u32,
    free_slots: usize,
    free_blocks: Vec<BlockId>,
    /// Never given out: compaction needs somewhere to copy to.
    reserve: BlockId,
}

impl Region {
    fn new(side: Side) -> Self {
        let first = |each: usize| (side as usize * each) as u32;
        let upwards = |each: usize| first(each)..first(each) + each as u32;
        Self {
            free_slot: first(SLOTS),
            free_slots: SLOTS,
            free_blocks: upwards(BLOCKS).skip(1).rev().collect(),
            reserve: first(BLOCKS),
        }
    }
}

/// All frames that are neither unread nor written.
#[derive(Debug)]
pub(crate) struct Slab {
    bytes: Box<[u8]>,
    /// Arrays, because their lengths are powers of two: an index that is masked needs no check.
    slots: Box<[Slot; 2 * SLOTS]>,
    blocks: [Block; 2 * BLOCKS],
    regions: [Region; 2],
}

#[inline(always)]
fn slot_at(token: &Token) -> usize {
    token.slot() as usize % (2 * SLOTS)
}

#[inline(always)]
fn block_of(at: usize) -> usize {
    (at >> BLOCK_SHIFT) % (2 * BLOCKS)
}

impl Slab {
    pub(crate) fn new() -> Self {
        let slot = |at: u32| Slot {
            next: if (at + 1).is_multiple_of(SLOTS as u32) {
                NONE
            } else {
                at + 1
            },
            ..Slot::default()
        };
        Self {
            bytes: vec![0; 2 * BLOCKS * BLOCK_BYTES].into_boxed_slice(),
            slots: Box::new(std::array::from_fn(|at| slot(at as u32))),
            blocks: [Block::default(); 2 * BLOCKS],
            regions: [Region::new(Side::Primary), Region::new(Side::Secondary)],
        }
    }

    /// Where a block's bytes are.
    pub(crate) fn block_range(block: BlockId) -> Range<usize> {
        let start = block as usize * BLOCK_BYTES;
        start..start + BLOCK_BYTES
    }

    /// The block in which a byte lies.
    #[inline(always)]
    pub(crate) fn block_of(at: usize) -> BlockId {
        block_of(at) as BlockId
    }

    /// An empty block to read into; `None` when everything is in use. Ends with [`Slab::unpin`].
    pub(crate) fn take_block(&mut self, side: Side) -> Option<BlockId> {
        if self.regions[side as usize].free_blocks.is_empty() {
            self.compact(side);
        }
        let block = self.regions[side as usize].free_blocks.pop()?;
        self.blocks[block as usize % (2 * BLOCKS)].pins = 1;
        Some(block)
    }

    /// Whether nothing is in the block but the reader's own pin.
    pub(crate) fn is_empty_but_for_reader(&self, block: BlockId) -> bool {
        let Block { frames, pins } = self.blocks[block as usize % (2 * BLOCKS)];
        frames == 0 && pins == 1
    }

    #[inline]
    pub(crate) fn pin(&mut self, block: BlockId) {
        self.blocks[block as usize % (2 * BLOCKS)].pins += 1;
    }

    #[inline]
    pub(crate) fn unpin(&mut self, block: BlockId) {
        let at = block as usize % (2 * BLOCKS);
        self.blocks[at].pins -= 1;
        if self.blocks[at].frames == 0 && self.blocks[at].pins == 0 {
            self.reuse(block);
        }
    }

    #[cold]
    fn reuse(&mut self, block: BlockId) {
        let region = &mut self.regions[block as usize / BLOCKS];
        region.free_blocks.push(block);
    }

    #[inline(always)]
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    pub(crate) fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.bytes[range]
    }

    pub(crate) fn copy_within(&mut self, from: Range<usize>, to: usize) {
        self.bytes.copy_within(from, to);
    }

    /// How many more frames of this side there may be.
    pub(crate) fn free_slots(&self, side: Side) -> usize {
        self.regions[side as usize].free_slots
    }

    /// Makes a frame of bytes that lie in a block, `lead` bytes before it included in `range`.
    /// `None` when the side has no free slot.
    #[inline]
    pub(crate) fn insert(&mut self, side: Side, range: Range<usize>, lead: usize) -> Option<Token> {
        let region = &mut self.regions[side as usize];
        let number = region.free_slot;
        if number == NONE {
            return None;
        }
        let slot = &mut self.slots[number as usize % (2 * SLOTS)];
        region.free_slot = slot.next;
        region.free_slots -= 1;
        slot.start = (range.start + lead) as u32;
        slot.len = (range.end - range.start - lead) as u32;
        slot.lead = lead as u32;
        self.blocks[block_of(range.start)].frames += 1;
        Some(Token::new(number))
    }

    /// Ends the frame and gives its bytes, lead included. They stay until their block, which is
    /// pinned once for this, is unpinned.
    #[inline]
    pub(crate) fn take_out(&mut self, token: Token) -> (BlockId, Range<usize>) {
        let range = self.slots[slot_at(&token)].range();
        let block = block_of(range.start) as BlockId;
        self.pin(block);
        self.free(token);
        (block, range)
    }

    #[inline]
    fn free(&mut self, token: Token) {
        let slot = &mut self.slots[slot_at(&token)];
        debug_assert_ne!(slot.len, 0, "slot {} freed twice", token.slot());
        let region = &mut self.regions[(token.slot() as usize / SLOTS) & 1];
        slot.len = 0;
        slot.next = region.free_slot;
        region.free_slot = token.slot();
        region.free_slots += 1;
        let at = block_of(slot.start as usize);
        self.blocks[at].frames -= 1;
        if self.blocks[at].frames == 0 && self.blocks[at].pins == 0 {
            self.reuse(at as BlockId);
        }
    }

    fn slots_of(side: Side) -> Range<usize> {
        let first = side as usize * SLOTS;
        first..first + SLOTS
    }

    /// Moves the frames of sparsely used blocks together, so that few frames that wait for long do
    /// not keep many blocks from being used again.
    fn compact(&mut self, side: Side) {
        let Some(mut emptied) = self.sparse_blocks(side) else {
            return;
        };
        let target = self.regions[side as usize].reserve;
        let mut to = Self::block_range(target).start;
        for at in Self::slots_of(side) {
            let slot = self.slots[at];
            let from = slot.range();
            let block = from.start >> BLOCK_SHIFT;
            if slot.len == 0 || !emptied[block % BLOCKS] {
                continue;
            }
            self.bytes.copy_within(from.clone(), to);
            self.slots[at].start = to as u32 + slot.lead;
            to += from.len();
            self.blocks[block].frames -= 1;
            self.blocks[target as usize].frames += 1;
        }
        let first = side as usize * BLOCKS;
        let region = &mut self.regions[side as usize];
        if let Some(at) = emptied.iter().position(|emptied| *emptied) {
            region.reserve = (first + at) as BlockId;
            emptied[at] = false;
        }
        let free = emptied.iter().enumerate().filter(|(_, emptied)| **emptied);
        region
            .free_blocks
            .extend(free.map(|(at, _)| (first + at) as BlockId));
    }

    /// The blocks, by their number within the side, whose frames fit together in one. `None` when
    /// moving them would gain nothing.
    fn sparse_blocks(&self, side: Side) -> Option<[bool; BLOCKS]> {
        let mut used = [0usize; BLOCKS];
        for slot in &self.slots[Self::slots_of(side)] {
            if slot.len != 0 {
                used[(slot.start >> BLOCK_SHIFT) as usize % BLOCKS] += slot.range().len();
            }
        }
        let mut order: [usize; BLOCKS] = std::array::from_fn(|at| at);
        order.sort_unstable_by_key(|at| used[*at]);
        let (mut chosen, mut count, mut bytes) = ([false; BLOCKS], 0, 0);
        for at in order {
            let block = self.blocks[side as usize * BLOCKS + at];
            if block.frames == 0 || block.pins > 0 {
                continue;
            }
            bytes += used[at];
            if bytes > BLOCK_BYTES {
                break;
            }
            chosen[at] = true;
            count += 1;
        }
        (count >= 2).then_some(chosen)
    }

    #[inline]
    fn frame(&self, token: &Token) -> Range<usize> {
        let Slot { start, len, .. } = self.slots[slot_at(token)];
        start as usize..(start + len) as usize
    }

    #[inline]
    fn part(&self, token: &Token, at: usize, n: usize) -> &[u8] {
        &self.bytes[self.frame(token)][at..at + n]
    }
}

impl Frames for Slab {
    #[inline]
    fn len(&self, token: &Token) -> usize {
        self.slots[slot_at(token)].len as usize
    }

    #[inline]
    fn header(&self, token: &Token) -> &[u8] {
        let frame = self.frame(token);
        &self.bytes[frame.start..frame.end.min(frame.start + HEADER_MAX)]
    }

    #[inline]
    fn view(&self, token: &Token) -> (&[u8], usize) {
        let frame = &self.bytes[self.frame(token)];
        (&frame[..frame.len().min(HEADER_MAX)], frame.len())
    }

    #[inline]
    fn header_mut(&mut self, token: &Token) -> &mut [u8] {
        let frame = self.frame(token);
        &mut self.bytes[frame.start..frame.end.min(frame.start + HEADER_MAX)]
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
        let (a, b) = (self.part(a, a_at, n), self.part(b, b_at, n));
        first_difference(a, b)
    }

    fn copy_out(&self, token: &Token, at: usize, out: &mut [u8]) {
        out.copy_from_slice(self.part(token, at, out.len()));
    }

    /// Only input is ever kept twice, and a stand-in sees none.
    fn duplicate(&mut self, _token: &Token) -> Option<Token> {
        None
    }

    #[inline]
    fn release(&mut self, token: Token) {
        self.free(token);
    }

    #[inline]
    fn prefetch(&self, address: *const u8) {
        prefetch(address);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const LEAD: usize = 4;

    /// Puts a frame at the beginning of an own block.
    fn alone_in_a_block(slab: &mut Slab, side: Side, bytes: &[u8]) -> Option<Token> {
        let block = slab.take_block(side)?;
        let start = Slab::block_range(block).start;
        let range = start..start + LEAD + bytes.len();
        slab.bytes_mut(range.clone())[LEAD..].copy_from_slice(bytes);
        let token = slab.insert(side, range, LEAD);
        slab.unpin(block);
        token
    }

    fn bytes_of(slab: &Slab, token: &Token) -> Vec<u8> {
        let mut bytes = vec![0; slab.len(token)];
        slab.copy_out(token, 0, &mut bytes);
        bytes
    }

    fn is_as_new(slab: &Slab) -> bool {
        let is_free =
            |region: &Region| region.free_slots == SLOTS && region.free_blocks.len() == BLOCKS - 1;
        slab.regions.iter().all(is_free)
    }

    #[test]
    fn few_frames_in_many_blocks_are_moved_together() {
        let mut slab = Slab::new();
        let mut tokens = VecDeque::new();
        for n in 0..3 * BLOCKS {
            let bytes = [n as u8; 100];
            let token = alone_in_a_block(&mut slab, Side::Primary, &bytes).expect("a block");
            tokens.push_back((token, bytes));
        }
        for (token, bytes) in tokens {
            assert_eq!(bytes_of(&slab, &token), bytes);
            slab.release(token);
        }
        assert!(is_as_new(&slab));
    }

    #[test]
    fn full_blocks_are_not_moved_and_the_other_side_has_its_own() {
        let mut slab = Slab::new();
        let bytes = vec![1; BLOCK_BYTES - LEAD];
        let mut tokens = Vec::new();
        while let Some(token) = alone_in_a_block(&mut slab, Side::Secondary, &bytes) {
            tokens.push(token);
        }
        assert_eq!(tokens.len(), BLOCKS - 1);
        let other = alone_in_a_block(&mut slab, Side::Primary, &bytes).expect("its own block");
        slab.release(other);
        tokens.into_iter().for_each(|token| slab.release(token));
        assert!(is_as_new(&slab));
    }

    #[test]
    fn unwritten_output_stays_where_it_is() {
        let mut slab = Slab::new();
        let first = alone_in_a_block(&mut slab, Side::Primary, b"first").expect("a block");
        let (block, range) = slab.take_out(first);
        let mut tokens = Vec::new();
        for _ in 0..2 * BLOCKS {
            tokens.extend(alone_in_a_block(&mut slab, Side::Primary, b"other"));
        }
        assert_eq!(&slab.bytes(range)[LEAD..], b"first");
        slab.unpin(block);
        tokens.into_iter().for_each(|token| slab.release(token));
        assert!(is_as_new(&slab));
    }

    #[test]
    fn slots_run_out_before_anything_is_lost() {
        let mut slab = Slab::new();
        let block = slab.take_block(Side::Primary).expect("a block");
        let range = Slab::block_range(block);
        let insert = |slab: &mut Slab| slab.insert(Side::Primary, range.start..range.start + 5, 4);
        let tokens: Vec<_> = (0..SLOTS).map_while(|_| insert(&mut slab)).collect();
        assert_eq!(tokens.len(), SLOTS);
        assert_eq!(insert(&mut slab), None);
        tokens.into_iter().for_each(|token| slab.release(token));
        slab.unpin(block);
        assert!(is_as_new(&slab));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn frames_keep_their_bytes_however_long_they_stay(
            lengths in proptest::collection::vec(1usize..BLOCK_BYTES - LEAD, 300),
            keeps in proptest::collection::vec(any::<prop::sample::Index>(), 300),
        ) {
            let mut slab = Slab::new();
            let mut live: Vec<(Token, u8, usize)> = Vec::new();
            for (n, (len, gone)) in lengths.into_iter().zip(keeps).enumerate() {
                let fill = n as u8;
                // Many short ones, so that some blocks are sparse.
                let len = if n % 3 == 0 { len } else { len % 64 + 1 };
                match alone_in_a_block(&mut slab, Side::Primary, &vec![fill; len]) {
                    Some(token) => live.push((token, fill, len)),
                    None => prop_assert!(live.len() > BLOCKS / 2, "{} frames fill everything", live.len()),
                }
                if n % 4 == 3 || live.len() > 60 {
                    let (token, fill, len) = live.swap_remove(gone.index(live.len()));
                    prop_assert_eq!(bytes_of(&slab, &token), vec![fill; len]);
                    slab.release(token);
                }
            }
            for (token, fill, len) in live {
                prop_assert_eq!(bytes_of(&slab, &token), vec![fill; len]);
                slab.release(token);
            }
            prop_assert!(is_as_new(&slab));
        }
    }
}
