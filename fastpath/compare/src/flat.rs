//! A hash table of flows with all its memory taken at the start: open addressing over an index of
//! 8-byte buckets, entries in slots that do not move.
//!
//! Invariants: never more than `limit` entries; the index is at most four fifths full, half where
//! `limit` is a power of two, and a probe begins with a group of buckets in one cache line; an entry
//! keeps its slot number until it is removed; nothing allocates after `new`. The hash is keyed,
//! because clients choose addresses and ports.

use core::hint::select_unpredictable;

use alloc::vec;
use alloc::vec::Vec;

use crate::flow::FlowKey;

/// The number of a slot.
pub(crate) type Slot = u32;

const EMPTY: u64 = 0;
/// Bytes of a cache line.
const LINE_BYTES: usize = 64;
/// Buckets of a group, which are looked at together; they lie in one cache line.
const GROUP: usize = 4;
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// A key's hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hash(u64);

#[derive(Debug)]
struct Entry<V> {
    key: FlowKey,
    value: Option<V>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct FlatTable<V> {
    /// Upper half: of the hash; lower half: slot number + 1; 0 where nothing is.
    index: Vec<u64>,
    /// The first group of the index begins here, where a cache line can.
    skip: usize,
    mask: usize,
    entries: Vec<Entry<V>>,
    free: Vec<Slot>,
    limit: usize,
    seed: u64,
}

impl<V> FlatTable<V> {
    /// What one entry takes beside its buckets in the index.
    #[cfg(test)]
    pub(crate) const ENTRY_BYTES: usize = size_of::<Entry<V>>();

    /// Room for `limit` entries, less than 2^31.
    pub(crate) fn new(limit: usize, seed: u64) -> Self {
        let buckets = (limit.max(4) * 5).div_ceil(4).next_power_of_two();
        let index = vec![EMPTY; buckets + GROUP - 1];
        let skip = index.as_ptr().addr().wrapping_neg() / size_of::<u64>() % GROUP;
        Self {
            index,
            skip,
            mask: buckets - 1,
            entries: Vec::with_capacity(limit),
            free: Vec::with_capacity(limit),
            limit,
            seed,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Slot numbers are below this.
    pub(crate) fn slots(&self) -> usize {
        self.entries.len()
    }

    /// Folded multiplications (128-bit product, halves combined) over the key's six words.
    #[inline]
    pub(crate) fn hash(&self, key: &FlowKey) -> Hash {
        const fn fold(a: u64, b: u64) -> u64 {
            let product = a as u128 * b as u128;
            product as u64 ^ (product >> 64) as u64
        }
        let [a, b, c, d, e, f] = *key.words();
        // What a peer chooses of one factor, it does not choose twice: the upper halves are those
        // of IPv6 addresses, and the other word of each pair is the guest's or constant.
        let first = fold(b ^ self.seed, d ^ MULTIPLIER);
        let second = fold(
            e ^ a.rotate_left(32) ^ MULTIPLIER,
            f ^ c ^ self.seed.rotate_left(32),
        );
        Hash(fold(first ^ second.rotate_left(21) ^ self.seed, MULTIPLIER))
    }

    #[inline]
    fn tag(hash: Hash) -> u64 {
        hash.0 & 0xffff_ffff_0000_0000
    }

    /// Where the group of a hash begins, from 0.
    #[inline]
    fn start(&self, hash: Hash) -> usize {
        hash.0 as usize & self.mask & !(GROUP - 1)
    }

    fn bucket(&self, at: usize) -> u64 {
        self.index[self.skip + at]
    }

    fn put(&mut self, at: usize, bucket: u64) {
        self.index[self.skip + at] = bucket;
    }

    /// The bucket after this one.
    fn after(&self, at: usize) -> usize {
        (at + 1) & self.mask
    }

    /// Start and bytes of the index and of the entries.
    pub(crate) fn memory(&self) -> [(*const u8, usize); 2] {
        let (index, entries) = (self.index.as_slice(), &self.entries);
        [
            (index.as_ptr().cast(), size_of_val(index)),
            (
                entries.as_ptr().cast(),
                entries.capacity() * size_of::<Entry<V>>(),
            ),
        ]
    }

    /// Where the bucket of a hash lies, to be fetched ahead.
    pub(crate) fn bucket_address(&self, hash: Hash) -> *const u8 {
        (&raw const self.index[self.skip + self.start(hash)]).cast()
    }

    /// The cache lines of the entry that a hash most likely means, to be fetched ahead.
    #[inline]
    pub(crate) fn entry_lines(&self, hash: Hash) -> impl Iterator<Item = *const u8> {
        let entry = self.entries.get(self.near_slot(hash) as usize);
        entry.into_iter().flat_map(|entry| {
            let start = (&raw const *entry).cast::<u8>();
            let in_line = start.addr() % LINE_BYTES;
            (0..in_line + size_of::<Entry<V>>())
                .step_by(LINE_BYTES)
                .map(move |at| start.wrapping_sub(in_line).wrapping_add(at))
        })
    }

    #[inline(never)]
    fn find(&self, hash: Hash, key: &FlowKey) -> Option<(usize, Slot)> {
        let mut at = self.start(hash);
        loop {
            let bucket = self.bucket(at);
            if bucket == EMPTY {
                return None;
            }
            if bucket & 0xffff_ffff_0000_0000 == Self::tag(hash) {
                let slot = bucket as u32 - 1;
                if self.entries[slot as usize].key == *key {
                    return Some((at, slot));
                }
            }
            at = self.after(at);
        }
    }

    #[inline]
    pub(crate) fn slot_of(&self, hash: Hash, key: &FlowKey) -> Option<Slot> {
        let near = self.near_slot(hash);
        match self.entries.get(near as usize) {
            Some(entry) if entry.key == *key && entry.value.is_some() => Some(near),
            _ => self.find(hash, key).map(|(_, slot)| slot),
        }
    }

    /// The slot that one of the first buckets gives for the hash; without a branch that depends on
    /// which, because that cannot be foretold. Whether the key is there is still to be seen.
    #[inline]
    fn near_slot(&self, hash: Hash) -> Slot {
        let start = self.skip + self.start(hash);
        let near = self.index.get(start..start + GROUP);
        let Some([a, b, c, d]) = near.and_then(|near| near.first_chunk()) else {
            return Slot::MAX;
        };
        // When two are alike, what comes out is neither.
        let if_like = |bucket: &u64| {
            let is_like = (bucket ^ hash.0) >> 32 == 0;
            select_unpredictable(is_like, *bucket as u32, EMPTY as u32)
        };
        (if_like(a) | if_like(b) | if_like(c) | if_like(d)).wrapping_sub(1)
    }

    /// What the first look at the index finds; `None` says nothing about the key.
    #[inline(always)]
    pub(crate) fn near_mut(&mut self, hash: Hash, key: &FlowKey) -> Option<(Slot, &mut V)> {
        let near = self.near_slot(hash);
        let entry = self.entries.get_mut(near as usize)?;
        let value = entry.value.as_mut()?;
        (entry.key == *key).then_some((near, value))
    }

    pub(crate) fn get(&self, key: &FlowKey) -> Option<&V> {
        self.at(self.slot_of(self.hash(key), key)?)
    }

    pub(crate) fn get_mut(&mut self, key: &FlowKey) -> Option<&mut V> {
        let slot = self.slot_of(self.hash(key), key)?;
        self.at_mut(slot)
    }

    pub(crate) fn key_at(&self, slot: Slot) -> FlowKey {
        self.entries[slot as usize].key
    }

    #[inline]
    pub(crate) fn at(&self, slot: Slot) -> Option<&V> {
        self.entries.get(slot as usize)?.value.as_ref()
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, slot: Slot) -> Option<&mut V> {
        self.entries.get_mut(slot as usize)?.value.as_mut()
    }

    #[inline]
    pub(crate) fn entry_mut(&mut self, slot: Slot) -> Option<(&FlowKey, &mut V)> {
        let entry = self.entries.get_mut(slot as usize)?;
        Some((&entry.key, entry.value.as_mut()?))
    }

    /// Puts a key in that is not there yet; gives the value back when the table is full.
    pub(crate) fn insert(&mut self, hash: Hash, key: FlowKey, value: V) -> Result<Slot, V> {
        debug_assert!(self.find(hash, &key).is_none(), "{key} is there already");
        if self.is_full() {
            return Err(value);
        }
        let entry = Entry {
            key,
            value: Some(value),
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.entries[slot as usize] = entry;
                slot
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as Slot
            }
        };
        let mut at = self.start(hash);
        while self.bucket(at) != EMPTY {
            at = self.after(at);
        }
        self.put(at, Self::tag(hash) | u64::from(slot + 1));
        Ok(slot)
    }

    /// The value's place, made with `make` when the key is new; `None` when the table is full.
    pub(crate) fn get_or_insert_with(
        &mut self,
        key: FlowKey,
        make: impl FnOnce() -> V,
    ) -> Option<&mut V> {
        let hash = self.hash(&key);
        let slot = match self.slot_of(hash, &key) {
            Some(slot) => slot,
            None => self.insert(hash, key, make()).ok()?,
        };
        self.at_mut(slot)
    }

    pub(crate) fn remove(&mut self, key: &FlowKey) -> Option<V> {
        let (at, slot) = self.find(self.hash(key), key)?;
        self.close_gap(at);
        self.free.push(slot);
        self.entries[slot as usize].value.take()
    }

    /// Linear probing without tombstones: what comes after the gap moves up, unless it would then
    /// lie before its own start.
    fn close_gap(&mut self, mut gap: usize) {
        let mask = self.mask;
        let mut at = gap;
        loop {
            at = self.after(at);
            let bucket = self.bucket(at);
            if bucket == EMPTY {
                break;
            }
            let key = self.entries[(bucket as u32 - 1) as usize].key;
            let start = self.start(self.hash(&key));
            if at.wrapping_sub(start) & mask >= at.wrapping_sub(gap) & mask {
                self.put(gap, bucket);
                gap = at;
            }
        }
        self.put(gap, EMPTY);
    }

    /// Forgets everything; the memory stays. Costs as much as there are entries, not as there is
    /// room for.
    pub(crate) fn clear(&mut self) {
        if self.len() > self.mask / 64 {
            self.index.fill(EMPTY);
        } else {
            self.clear_clusters();
        }
        self.entries.clear();
        self.free.clear();
    }

    /// Every entry lies in the run of full buckets that begins at its start, and each run is
    /// emptied to its end.
    fn clear_clusters(&mut self) {
        for slot in 0..self.entries.len() {
            let entry = &self.entries[slot];
            if entry.value.is_none() {
                continue;
            }
            let mut at = self.start(self.hash(&entry.key));
            while self.bucket(at) != EMPTY {
                self.put(at, EMPTY);
                at = self.after(at);
            }
        }
    }

    /// In the order of their slots.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&FlowKey, &V)> {
        let entries = self.entries.iter();
        entries.filter_map(|entry| Some((&entry.key, entry.value.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Protocol;
    use alloc::collections::BTreeMap;
    use proptest::prelude::*;

    fn key(n: u16) -> FlowKey {
        FlowKey::bare(Protocol::Udp, [0; 2]).with_ports(n, 9)
    }

    proptest! {
        #[test]
        fn it_is_a_map(operations in proptest::collection::vec((any::<bool>(), 0u16..40), 1..400)) {
            const LIMIT: usize = 16;
            // A table this small has clusters and wraps around all the time.
            let mut table = FlatTable::new(LIMIT, 7);
            let mut model = BTreeMap::new();
            for (n, (is_insert, name)) in operations.into_iter().enumerate() {
                let key = key(name);
                if is_insert {
                    let is_full = model.len() >= LIMIT && !model.contains_key(&key);
                    let made = table.get_or_insert_with(key, || n).copied();
                    prop_assert_eq!(made.is_none(), is_full);
                    if !is_full {
                        prop_assert_eq!(made, Some(*model.entry(key).or_insert(n)));
                    }
                } else {
                    prop_assert_eq!(table.remove(&key), model.remove(&key));
                }
                prop_assert_eq!(table.len(), model.len());
                for name in 0..40 {
                    let key = self::key(name);
                    prop_assert_eq!(table.get(&key), model.get(&key));
                }
            }
            let mut all: Vec<_> = table.iter().map(|(k, v)| (*k, *v)).collect();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(model));
            table.clear();
            prop_assert_eq!(table.len(), 0);
            prop_assert!((0..40).all(|name| table.get(&key(name)).is_none()));
        }

        #[test]
        fn a_table_with_few_entries_is_cleared_whole(names in proptest::collection::vec(0u16..9, 0..9)) {
            // The index as after a limit of 8, so that the few lie in clusters; its fill is avoided.
            let mut table = FlatTable::new(8, 3);
            for name in &names {
                table.get_or_insert_with(key(*name), || ());
            }
            table.clear_clusters();
            prop_assert!(table.index.iter().all(|bucket| *bucket == EMPTY));
        }
    }

    #[test]
    fn slots_stay_where_they_are() {
        let mut table = FlatTable::new(8, 1);
        let hash = |table: &FlatTable<u16>, n| table.hash(&key(n));
        let slots: Vec<_> = (0..8)
            .map(|n| table.insert(hash(&table, n), key(n), n).unwrap())
            .collect();
        assert_eq!(table.insert(hash(&table, 8), key(8), 8), Err(8), "full");
        for n in [1, 3, 5] {
            table.remove(&key(n));
        }
        for n in [0u16, 2, 4, 6, 7] {
            assert_eq!(table.at(slots[usize::from(n)]), Some(&n));
            assert_eq!(
                table.slot_of(hash(&table, n), &key(n)),
                Some(slots[usize::from(n)])
            );
        }
    }

    #[test]
    fn another_seed_is_another_order() {
        let starts = |seed| {
            let table = FlatTable::<()>::new(1024, seed);
            (0..64)
                .map(move |n| table.hash(&key(n)).0)
                .collect::<Vec<_>>()
        };
        assert!(starts(1).iter().zip(starts(2)).all(|(a, b)| *a != b));
    }
}
