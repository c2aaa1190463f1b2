//! Where the secondary keeps pages that have come ahead of a checkpoint.
//!
//! Invariants: nothing here touches the guest before [`Area::write_named`] (rule 13); a page is named only if the area has
//! exactly the bytes of that digest, which were checked when they came; memory is bounded by the limit, taken as pages
//! come and kept for the next ones.
//!
//! Does not decide what is sent or named.

use colo_fastpath::ring::{GuestRam, MemoryError};
use memmap2::MmapMut;
use serde::Serialize;

use super::wire::{AheadChunk, WireError, names};
use crate::checkpoint::codec::record::{ApplyError, ChunkError};
use crate::checkpoint::codec::{Decoder, Kind, Page, PageDigest, PageKey, Record};
use crate::checkpoint::pages::{PAGE_BYTES, PageBitmap};

/// In the index: the area has nothing of the page.
const ABSENT: u32 = 0;
/// In the index: zeros, which take no memory.
const ZEROS: u32 = 1;
/// In the index: the first slot; the others follow.
const FIRST_SLOT: u32 = 2;

/// Why a chunk or a name is refused.
#[derive(Debug, thiserror::Error)]
pub enum AreaError {
    /// Bytes that are none.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The records are none.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// A record makes no page.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// A record that needs the SVM's page, which changes.
    #[error("page {number} came ahead as {kind:?}, which needs a page of the stopped SVM")]
    Based {
        /// Which.
        number: u64,
        /// How.
        kind: Kind,
    },
    /// No room.
    #[error(
        "checkpoint.ahead_mib = {limit_mib}: page {number} came ahead of a checkpoint and does not fit; \
         set the same on both hosts"
    )]
    Full {
        /// Which.
        number: u64,
        /// The limit.
        limit_mib: usize,
    },
    /// The host has no memory.
    #[error("no memory for pages that come ahead of a checkpoint; free some on this host")]
    NoMemory,
    /// A checkpoint names a page again.
    #[error("page {number} is named twice in one checkpoint")]
    Twice {
        /// Which.
        number: u32,
    },
    /// A checkpoint names what is not there.
    #[error(
        "page {number} was not sent ahead as the checkpoint says; the checkpoint has to be taken again"
    )]
    Missing {
        /// Which.
        number: u32,
    },
}

/// What an area has had; for the status of a secondary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct AreaCounters {
    /// Pages that came ahead.
    pub received_pages: u64,
    /// Pages that a commit took from here.
    pub used_pages: u64,
    /// Chunks that were damaged, made no sense or did not fit.
    pub refused_chunks: u64,
}

/// The area.
#[derive(Debug)]
pub struct Area {
    page_count: u64,
    slots_max: usize,
    memory: Option<MmapMut>,
    /// Slots taken so far, given back or not.
    used: usize,
    free: Vec<u32>,
    /// Of what each slot holds.
    digests: Vec<PageDigest>,
    /// For each page of the guest.
    index: Vec<u32>,
    held: PageBitmap,
    fill: u64,
    /// What the checkpoint that comes in has named, in that order and as a set.
    named: Vec<u32>,
    is_named: PageBitmap,
    counters: AreaCounters,
}

impl Area {
    /// For a guest of so many pages; at most `limit_mib` of them are kept.
    pub fn new(page_count: usize, limit_mib: usize) -> Self {
        let slots_max = ((limit_mib << 20) / PAGE_BYTES).min(page_count);
        Self {
            page_count: page_count as u64,
            slots_max,
            memory: None,
            used: 0,
            free: Vec::new(),
            digests: Vec::new(),
            index: match slots_max {
                0 => Vec::new(),
                _ => vec![ABSENT; page_count],
            },
            held: PageBitmap::new(page_count),
            fill: 0,
            named: Vec::new(),
            is_named: PageBitmap::new(page_count),
            counters: AreaCounters::default(),
        }
    }

    /// Takes a chunk; after an error some of its pages may be missing, which a checkpoint that names them will notice.
    pub fn take(&mut self, bytes: &[u8], key: &PageKey) -> Result<(), AreaError> {
        let taken = self.try_take(bytes, key);
        self.counters.refused_chunks += u64::from(taken.is_err());
        taken
    }

    fn try_take(&mut self, bytes: &[u8], key: &PageKey) -> Result<(), AreaError> {
        let chunk = AheadChunk::from_bytes(bytes)?;
        if chunk.fill != self.fill {
            self.clear();
            self.fill = chunk.fill;
        }
        chunk.forget().for_each(|number| self.forget(number));
        for record in Decoder::new(chunk.records, self.page_count)? {
            let record = record?;
            let number = record.number;
            // Whatever was there is an older version.
            self.forget(number as u32);
            if record.needs_base() {
                let kind = record.kind;
                return Err(AreaError::Based { number, kind });
            }
            self.put(&record, key)?;
            self.counters.received_pages += 1;
        }
        Ok(())
    }

    /// A chunk was damaged on its way, or came at a wrong time.
    pub fn refuse_chunk(&mut self) {
        self.counters.refused_chunks += 1;
    }

    fn put(&mut self, record: &Record<'_>, key: &PageKey) -> Result<(), AreaError> {
        let number = record.number;
        let place = match record.kind {
            Kind::Zero => ZEROS,
            _ => {
                let slot = self.next_slot(number)?;
                let nothing = [0; PAGE_BYTES];
                let page = self.page_mut(slot).ok_or(AreaError::NoMemory)?;
                let made = record.apply(&nothing, page, Some(key));
                let digest = record.digest.filter(|_| made.is_ok());
                let Some(digest) = digest else {
                    self.free.push(slot);
                    return Ok(made?);
                };
                self.digests[slot as usize] = digest;
                FIRST_SLOT + slot
            }
        };
        // Below the guest's number of pages, says the decoder.
        if let Some(entry) = self.index.get_mut(number as usize) {
            *entry = place;
            self.held.add(number as usize / 64, 1 << (number % 64));
        }
        Ok(())
    }

    fn next_slot(&mut self, number: u64) -> Result<u32, AreaError> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        if self.used >= self.slots_max {
            let limit_mib = (self.slots_max * PAGE_BYTES) >> 20;
            return Err(AreaError::Full { number, limit_mib });
        }
        if self.memory.is_none() {
            // Only addresses: the system gives memory page by page as they are used.
            let memory = MmapMut::map_anon(self.slots_max * PAGE_BYTES);
            self.memory = Some(memory.map_err(|_| AreaError::NoMemory)?);
        }
        let slot = self.used;
        self.used += 1;
        if self.digests.len() < self.used {
            self.digests.push(PageDigest::default());
        }
        Ok(slot as u32)
    }

    fn page_mut(&mut self, slot: u32) -> Option<&mut Page> {
        let memory = self.memory.as_mut()?;
        memory
            .get_mut(slot as usize * PAGE_BYTES..)?
            .first_chunk_mut()
    }

    fn page(&self, slot: u32) -> Option<&Page> {
        let memory = self.memory.as_ref()?;
        memory.get(slot as usize * PAGE_BYTES..)?.first_chunk()
    }

    fn forget(&mut self, number: u32) {
        let Some(entry) = self.index.get_mut(number as usize) else {
            return;
        };
        let place = std::mem::replace(entry, ABSENT);
        self.held.remove(number as usize / 64, 1 << (number % 64));
        if let Some(slot) = place.checked_sub(FIRST_SLOT) {
            self.free.push(slot);
        }
    }

    /// Another checkpoint comes in: nothing is named yet.
    pub fn begin(&mut self) {
        for number in self.named.drain(..) {
            self.is_named.remove(number as usize / 64, u64::MAX);
        }
    }

    /// Takes the names of a checkpoint.
    pub fn name(&mut self, bytes: &[u8], key: &PageKey) -> Result<(), AreaError> {
        for (number, digest) in names(bytes)? {
            let found = match self.index.get(number as usize).copied() {
                None | Some(ABSENT) => None,
                Some(ZEROS) => Some(key.of_zeros()),
                Some(place) => self.digests.get((place - FIRST_SLOT) as usize).copied(),
            };
            if found != Some(digest) {
                return Err(AreaError::Missing { number });
            }
            // Of the guest's: it was found.
            let (word, bit) = (number as usize / 64, 1 << (number % 64));
            if self.is_named.add(word, bit) == 0 {
                return Err(AreaError::Twice { number });
            }
            self.named.push(number);
        }
        Ok(())
    }

    /// What the checkpoint that comes in has named so far.
    pub fn named(&self) -> &[u32] {
        &self.named
    }

    /// Puts the named pages into guest memory: the checkpoint is committed. What is left here is of no use afterwards.
    pub fn write_named(&mut self, ram: &GuestRam) -> Result<(), MemoryError> {
        const NOTHING: Page = [0; PAGE_BYTES];
        for &number in &self.named {
            let slot = self.index[number as usize].checked_sub(FIRST_SLOT);
            let page = slot.and_then(|slot| self.page(slot));
            ram.write_page(number as usize, page.unwrap_or(&NOTHING))?;
        }
        self.counters.used_pages += self.named.len() as u64;
        Ok(())
    }

    /// Forgets everything; the memory stays for what comes next.
    pub fn clear(&mut self) {
        self.begin();
        for number in self.held.iter() {
            self.index[number as usize] = ABSENT;
        }
        self.held.clear();
        self.free.clear();
        self.used = 0;
    }

    /// How many pages it has.
    pub fn held_pages(&self) -> usize {
        self.held.count()
    }

    /// What was counted.
    pub fn counters(&self) -> AreaCounters {
        self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{NameList, put_head};
    use super::*;
    use crate::checkpoint::codec::{Encoder, Payload};
    use colo_fastpath::ring::Pages;

    const PAGES: usize = 600;

    fn key() -> PageKey {
        PageKey::new([3; 16])
    }

    fn filled(byte: u8) -> Page {
        [byte; PAGE_BYTES]
    }

    fn chunk(fill: u64, forget: &[u32], pages: &[(u64, Payload<'_>)]) -> Vec<u8> {
        let mut bytes = vec![0; 4 << 20];
        let head = put_head(&mut bytes, fill, forget).unwrap();
        let mut encoder = Encoder::new(&mut bytes[head..], true).unwrap();
        for (number, payload) in pages {
            let digest = match payload {
                Payload::Raw(page) | Payload::Same(page) => key().of(page),
                _ => PageDigest::default(),
            };
            encoder.push(*number, payload, digest).unwrap();
        }
        let length = encoder.finish();
        bytes.truncate(head + length);
        bytes
    }

    fn list(names: &[(u32, PageDigest)]) -> Vec<u8> {
        let mut list = NameList::new(1 << 16);
        for &(number, digest) in names {
            list.push(number, digest);
        }
        list.finish().to_vec()
    }

    #[test]
    fn rule_13_the_newest_version_reaches_the_guest_and_only_at_the_commit() {
        let ram = GuestRam::new((PAGES * PAGE_BYTES) as u64, Pages::Small).unwrap();
        ram.write_page(7, &filled(9)).unwrap();
        let (key, mut area) = (key(), Area::new(PAGES, 1));
        let (one, two) = (filled(1), filled(2));
        let first = [(5, Payload::Raw(&one)), (7, Payload::Raw(&one))];
        area.take(&chunk(1, &[], &first), &key).unwrap();
        let second = [(5, Payload::Raw(&two)), (7, Payload::Zero)];
        area.take(&chunk(1, &[], &second), &key).unwrap();
        assert_eq!(area.held_pages(), 2);
        area.begin();
        let old = area.name(&list(&[(5, key.of(&one))]), &key).unwrap_err();
        assert!(
            matches!(old, AreaError::Missing { number: 5 }),
            "rule 13: an older version"
        );
        area.begin();
        area.name(&list(&[(5, key.of(&two)), (7, key.of_zeros())]), &key)
            .unwrap();
        let again = area.name(&list(&[(7, key.of_zeros())]), &key);
        assert!(matches!(again, Err(AreaError::Twice { number: 7 })));
        let read = |number| {
            let mut page = filled(0xaa);
            ram.copy_page_out(number, &mut page).unwrap();
            page
        };
        assert_eq!((read(5), read(7)), (filled(0), filled(9)));
        area.write_named(&ram).unwrap();
        assert_eq!((read(5), read(7)), (two, filled(0)));
        area.clear();
        let gone = area.name(&list(&[(5, key.of(&two))]), &key);
        assert!(matches!(gone, Err(AreaError::Missing { number: 5 })));
        // Another checkpoint may name it again.
        area.take(&chunk(2, &[], &second), &key).unwrap();
        area.name(&list(&[(7, key.of_zeros())]), &key).unwrap();
    }

    #[test]
    fn invariant_6_room_is_bounded_and_comes_back() {
        let (key, mut area) = (key(), Area::new(PAGES, 1));
        let page = filled(1);
        let many: Vec<_> = (0..256).map(|n| (n, Payload::Raw(&page))).collect();
        area.take(&chunk(1, &[], &many), &key).unwrap();
        let more = chunk(1, &[], &[(300, Payload::Raw(&page))]);
        let full = area.take(&more, &key).unwrap_err();
        assert!(full.to_string().contains("checkpoint.ahead_mib = 1"));
        // Replacing needs no room, nor does what takes the place of pages given up.
        area.take(&chunk(1, &[], &many[..9]), &key).unwrap();
        let instead = chunk(1, &[3, 599, u32::MAX], &[(300, Payload::Raw(&page))]);
        area.take(&instead, &key).unwrap();
        assert_eq!(area.held_pages(), 256);
        assert!(area.name(&list(&[(3, key.of(&page))]), &key).is_err());
        // Another fill begins with nothing.
        area.take(&chunk(2, &[], &many[..1]), &key).unwrap();
        assert_eq!(area.held_pages(), 1);
        let counters = area.counters();
        assert_eq!((counters.received_pages, counters.refused_chunks), (267, 1));
    }

    #[test]
    fn what_is_wrong_is_refused_and_never_named() {
        let (key, mut area) = (key(), Area::new(PAGES, 1));
        let (page, other) = (filled(1), filled(2));
        let mut wrong = chunk(1, &[], &[(5, Payload::Raw(&page))]);
        *wrong.last_mut().unwrap() ^= 1;
        assert!(matches!(
            area.take(&wrong, &key),
            Err(AreaError::Apply(ApplyError::Digest { number: 5 }))
        ));
        let based = chunk(1, &[], &[(5, Payload::Same(&page))]);
        assert!(matches!(
            area.take(&based, &key),
            Err(AreaError::Based { number: 5, .. })
        ));
        let beyond = chunk(1, &[], &[(PAGES as u64, Payload::Raw(&page))]);
        assert!(matches!(area.take(&beyond, &key), Err(AreaError::Chunk(_))));
        for number in [5, PAGES as u32, u32::MAX] {
            let named = area.name(&list(&[(number, key.of(&page))]), &key);
            assert!(matches!(named, Err(AreaError::Missing { .. })), "{number}");
        }
        // A damaged newer version takes the older one away.
        area.take(&chunk(1, &[], &[(5, Payload::Raw(&other))]), &key)
            .unwrap();
        assert!(area.take(&wrong, &key).is_err());
        assert!(area.name(&list(&[(5, key.of(&other))]), &key).is_err());
        assert_eq!(area.held_pages(), 0);
        // Without a limit there is nothing to hold them.
        let mut none = Area::new(PAGES, 0);
        assert!(matches!(
            none.take(&chunk(1, &[], &[(5, Payload::Raw(&page))]), &key),
            Err(AreaError::Full { number: 5, .. })
        ));
    }
}
