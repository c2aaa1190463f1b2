//! What pages held at the last committed checkpoint: the bases of deltas.
//!
//! Invariants: it never has more than its number of slots; what a checkpoint puts in is not seen before
//! [`PageCache::commit`] and gone after [`PageCache::abort`] (rule 14); after a commit it has nothing of a page that
//! this checkpoint changed without putting it in.
//!
//! Memory is one allocation for the pages, which the system gives page by page as they are used, and 4 bytes for each page of
//! the guest.
//!
//! Does not know what the SVM has written since: [`super::choose::Known`] does.

use super::choose::Base;
use super::{Page, PageDigest};
use crate::checkpoint::pages::PAGE_BYTES;

/// No slot.
const NONE: u32 = u32::MAX;
const MIB: usize = 1 << 20;

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// A page of the last commit.
    Committed,
    /// The same, changed by the checkpoint in flight.
    Superseded,
    /// A page of the checkpoint in flight.
    Pending,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    state: State,
    /// Looked up or put in since the clock's hand came by.
    is_recent: bool,
    /// It is among [`PageCache::touched`].
    is_touched: bool,
    /// Of a committed page that the checkpoint in flight has put in again: where. Of a free one: the next that is free.
    next: u32,
    page: u32,
    digest: PageDigest,
}

/// What was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct CacheCounters {
    /// Lookups that found a page.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Pages put in.
    pub inserted: u64,
    /// Pages that went for others.
    pub evicted: u64,
    /// Pages not put in, because all slots had pages of the same checkpoint.
    pub refused: u64,
}

/// The cache.
#[derive(Debug)]
pub struct PageCache {
    /// Slot after slot.
    bytes: Vec<u8>,
    slots: Vec<Slot>,
    /// For each page of the guest the slot of the last commit, or else of the checkpoint in flight. Stored plus 1, so that fresh
    /// memory means none.
    index: Vec<u32>,
    free: u32,
    hand: u32,
    /// How many slots are neither free nor pending.
    evictable: usize,
    /// Slots that the checkpoint in flight has made pending or superseded, each once.
    touched: Vec<u32>,
    counters: CacheCounters,
}

impl PageCache {
    /// At most `mib` MiB of pages, of a guest of `pages` pages. 0: nothing is ever found.
    pub fn new(mib: usize, pages: usize) -> Self {
        Self::with_slots(mib * (MIB / PAGE_BYTES), pages)
    }

    fn with_slots(slots: usize, pages: usize) -> Self {
        // Every page may be in it as of the last commit and of the checkpoint in flight.
        let slots = slots.min(2 * pages).min(NONE as usize - 1);
        let empty = |n: usize| Slot {
            state: State::Free,
            is_recent: false,
            is_touched: false,
            next: if n + 1 < slots { n as u32 + 1 } else { NONE },
            page: 0,
            digest: PageDigest::default(),
        };
        Self {
            bytes: vec![0; slots * PAGE_BYTES],
            slots: (0..slots).map(empty).collect(),
            index: vec![0; pages],
            free: if slots > 0 { 0 } else { NONE },
            hand: 0,
            evictable: 0,
            touched: Vec::with_capacity(slots),
            counters: CacheCounters::default(),
        }
    }

    /// The page as of the last commit.
    pub fn get(&mut self, number: u64) -> Option<Base<'_>> {
        let slot = self.committed(number);
        let Some(slot) = slot else {
            self.counters.misses += 1;
            return None;
        };
        self.counters.hits += 1;
        let found = &mut self.slots[slot as usize];
        found.is_recent = true;
        let digest = found.digest;
        self.page(slot).map(|page| Base { page, digest })
    }

    /// The checkpoint in flight has this page with these bytes; they replace the page's at the commit. False if there is no
    /// room, or no such page; then the page is not found after the commit.
    pub fn insert(&mut self, number: u64, page: &Page, digest: PageDigest) -> bool {
        self.supersede_committed(number);
        let Some(slot) = self.pending_slot(number) else {
            self.counters.refused += 1;
            return false;
        };
        self.counters.inserted += 1;
        let entry = &mut self.slots[slot as usize];
        entry.is_recent = true;
        entry.digest = digest;
        let at = slot as usize * PAGE_BYTES;
        self.bytes[at..at + PAGE_BYTES].copy_from_slice(page);
        true
    }

    /// The checkpoint in flight changes this page, and its new bytes are not put in: not found after the commit.
    pub fn supersede(&mut self, number: u64) {
        self.supersede_committed(number);
        if let Some(slot) = self.pending(number) {
            self.release(slot);
        }
    }

    /// The checkpoint in flight is committed.
    pub fn commit(&mut self) {
        self.settle(State::Superseded);
    }

    /// It is not, and the SVM goes on from the last commit.
    pub fn abort(&mut self) {
        self.settle(State::Pending);
    }

    /// Forgets all: another secondary, another key.
    pub fn clear(&mut self) {
        for slot in 0..self.slots.len() as u32 {
            if self.slots[slot as usize].state != State::Free {
                self.release(slot);
            }
            self.slots[slot as usize].is_touched = false;
        }
        self.touched.clear();
    }

    /// What was counted.
    pub fn counters(&self) -> CacheCounters {
        self.counters
    }

    /// How many pages it can have.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    fn page(&self, slot: u32) -> Option<&Page> {
        let at = slot as usize * PAGE_BYTES;
        self.bytes.get(at..)?.first_chunk()
    }

    /// The first slot that has to do with a page.
    fn head(&self, number: u64) -> Option<u32> {
        let index = usize::try_from(number).ok()?;
        self.index.get(index)?.checked_sub(1)
    }

    fn committed(&self, number: u64) -> Option<u32> {
        let head = self.head(number)?;
        (self.slots[head as usize].state != State::Pending).then_some(head)
    }

    fn pending(&self, number: u64) -> Option<u32> {
        let head = self.head(number)?;
        let slot = self.slots[head as usize];
        match slot.state {
            State::Pending => Some(head),
            _ => (slot.next != NONE).then_some(slot.next),
        }
    }

    fn supersede_committed(&mut self, number: u64) {
        if let Some(slot) = self.committed(number) {
            self.slots[slot as usize].state = State::Superseded;
            self.touch(slot);
        }
    }

    fn touch(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        if !entry.is_touched {
            entry.is_touched = true;
            self.touched.push(slot);
        }
    }

    /// The slot for what the checkpoint in flight has of a page, whose committed slot is superseded if there is one.
    fn pending_slot(&mut self, number: u64) -> Option<u32> {
        let page = u32::try_from(number).ok()?;
        let index = page as usize;
        if index >= self.index.len() {
            return None;
        }
        if let Some(slot) = self.pending(number) {
            return Some(slot);
        }
        let slot = self.take_free()?;
        self.slots[slot as usize] = Slot {
            state: State::Pending,
            next: NONE,
            page,
            ..self.slots[slot as usize]
        };
        self.touch(slot);
        // Only now: making room may have taken the page's own committed slot.
        match self.head(number) {
            Some(head) => self.slots[head as usize].next = slot,
            None => self.index[index] = slot + 1,
        }
        Some(slot)
    }

    fn take_free(&mut self) -> Option<u32> {
        if self.free == NONE {
            self.evict()?;
        }
        let slot = self.free;
        self.free = self.slots[slot as usize].next;
        Some(slot)
    }

    /// Frees the first slot from the clock's hand on that was not used since the hand came by.
    fn evict(&mut self) -> Option<()> {
        if self.evictable == 0 {
            return None;
        }
        for _ in 0..2 * self.slots.len() {
            let slot = self.hand;
            self.hand = (slot + 1) % self.slots.len() as u32;
            let entry = &mut self.slots[slot as usize];
            match entry.state {
                State::Committed if entry.is_recent => entry.is_recent = false,
                State::Committed | State::Superseded => {
                    self.release(slot);
                    self.counters.evicted += 1;
                    return Some(());
                }
                State::Pending | State::Free => {}
            }
        }
        None
    }

    /// Frees a slot, which leaves the page to its pending one if there is one.
    fn release(&mut self, slot: u32) {
        let Slot {
            page, next, state, ..
        } = self.slots[slot as usize];
        self.evictable -= usize::from(state != State::Pending);
        match self.head(page.into()) {
            Some(head) if head != slot => self.slots[head as usize].next = NONE,
            _ => self.index[page as usize] = if next == NONE { 0 } else { next + 1 },
        }
        let entry = &mut self.slots[slot as usize];
        entry.state = State::Free;
        entry.next = self.free;
        self.free = slot;
    }

    /// Ends a checkpoint: slots in the state `gone` are freed, other touched ones are committed.
    fn settle(&mut self, gone: State) {
        while let Some(slot) = self.touched.pop() {
            self.slots[slot as usize].is_touched = false;
            let state = self.slots[slot as usize].state;
            if state == gone {
                self.release(slot);
            } else if state != State::Free {
                self.evictable += usize::from(state == State::Pending);
                self.slots[slot as usize].state = State::Committed;
                self.slots[slot as usize].next = NONE;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::PageKey;
    use super::*;
    use proptest::prelude::*;

    const PAGES: usize = 6;

    #[derive(Debug, Clone)]
    enum Step {
        Get(u64),
        Insert(u64, u8),
        Supersede(u64),
        Commit,
        Abort,
        Clear,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let number = 0..PAGES as u64 + 1;
        prop_oneof![
            4 => number.clone().prop_map(Step::Get),
            8 => (number.clone(), any::<u8>()).prop_map(|(n, byte)| Step::Insert(n, byte)),
            2 => number.prop_map(Step::Supersede),
            2 => Just(Step::Commit),
            1 => Just(Step::Abort),
            1 => Just(Step::Clear),
        ]
    }

    fn digest(byte: u8) -> PageDigest {
        PageDigest::from_bytes([byte; 16])
    }

    /// A cache of any size.
    #[derive(Default)]
    struct Model {
        committed: HashMap<u64, u8>,
        in_flight: HashMap<u64, Option<u8>>,
    }

    fn check(cache: &PageCache) {
        let count = |state| cache.slots.iter().filter(|s| s.state == state).count();
        let some = |slot: u32| (slot != NONE).then_some(slot);
        let free = std::iter::successors(some(cache.free), |&slot| {
            some(cache.slots[slot as usize].next)
        });
        let free = free.count();
        assert_eq!(free, count(State::Free));
        assert_eq!(
            cache.evictable,
            count(State::Committed) + count(State::Superseded)
        );
        assert!(cache.touched.len() <= cache.slots.len());
    }

    proptest! {
        #[test]
        fn rule_14_nothing_but_the_last_commit_is_found(
            slots in 0usize..=2 * PAGES,
            steps in proptest::collection::vec(any_step(), 0..80),
        ) {
            let mut cache = PageCache::with_slots(slots, PAGES);
            let mut model = Model::default();
            for step in steps {
                match step {
                    Step::Get(number) => {
                        let found = cache.get(number).map(|base| {
                            assert_eq!(base.digest, digest(base.page[0]));
                            base.page[0]
                        });
                        let expected = model.committed.get(&number).copied();
                        // What is missing may have gone for others, unless there is room for all.
                        if found.is_some() || slots == 2 * PAGES {
                            prop_assert_eq!(found, expected);
                        }
                    }
                    Step::Insert(number, byte) => {
                        let is_in = cache.insert(number, &[byte; PAGE_BYTES], digest(byte));
                        model.in_flight.insert(number, is_in.then_some(byte));
                        let fits = slots == 2 * PAGES && number < PAGES as u64;
                        prop_assert!(is_in || !fits);
                        prop_assert!(!is_in || (slots > 0 && number < PAGES as u64));
                    }
                    Step::Supersede(number) => {
                        cache.supersede(number);
                        model.in_flight.insert(number, None);
                    }
                    Step::Commit => {
                        cache.commit();
                        for (number, byte) in model.in_flight.drain() {
                            match byte {
                                Some(byte) => model.committed.insert(number, byte),
                                None => model.committed.remove(&number),
                            };
                        }
                    }
                    Step::Abort => {
                        cache.abort();
                        model.in_flight.clear();
                    }
                    Step::Clear => {
                        cache.clear();
                        model = Model::default();
                    }
                }
                check(&cache);
            }
        }
    }

    #[test]
    fn what_is_used_stays() {
        let mut cache = PageCache::with_slots(4, 100);
        let put = |cache: &mut PageCache, number| cache.insert(number, &[1; PAGE_BYTES], digest(1));
        for number in 0..4 {
            assert!(put(&mut cache, number));
        }
        cache.commit();
        // The first to come finds all of them recent, clears that and takes the first.
        assert!(put(&mut cache, 10));
        cache.commit();
        for number in 11..13 {
            assert!(cache.get(3).is_some());
            assert!(put(&mut cache, number));
            cache.commit();
        }
        assert!(cache.get(3).is_some());
        assert!([0, 1, 2].iter().all(|&n| cache.get(n).is_none()));
        assert_eq!(cache.counters().evicted, 3);
    }

    #[test]
    fn a_checkpoint_larger_than_the_cache_takes_it_all_and_loses_the_rest() {
        let mut cache = PageCache::new(1, 1000);
        assert_eq!(cache.capacity(), 256);
        let key = PageKey::new([1; 16]);
        for number in 0..300u64 {
            let page = [number as u8; PAGE_BYTES];
            assert_eq!(cache.insert(number, &page, key.of(&page)), number < 256);
        }
        assert_eq!(cache.counters().refused, 44);
        cache.commit();
        let found = cache.get(7).map(|base| base.digest);
        assert_eq!(found, Some(key.of(&[7; PAGE_BYTES])));
        assert!(cache.get(256).is_none() && cache.get(u64::MAX).is_none());
        let counters = cache.counters();
        assert_eq!((counters.hits, counters.misses), (1, 2));
    }
}
