//! A checkpoint on the secondary before its commit point: pages and records, received, decoded and checked.
//!
//! Invariants: memory is proportional to the checkpoint and bounded; nothing here touches the guest, whose stopped memory
//! is only read as the base of deltas; the first thing that is wrong refuses the checkpoint (rule 13).
//!
//! Does not know what is in a state record.

use colo_fastpath::ring::{GuestRam, MemoryError};
use memmap2::{Advice, MmapMut};

use super::codec::record::{ApplyError, ChunkError};
use super::codec::{Decoder, Kind, Page, PageKey, Record};
use super::pages::{PAGE_BYTES, PageBitmap};
use super::states::{State, StateAssembly, StateError};

/// Pages of a block of staging memory: as large as a large page, of which the system gives one at a time.
const BLOCK_PAGES: usize = 512;
/// Blocks that are kept for the next checkpoint without being used.
const SPARE_BLOCKS: usize = 32;
/// Blocks beyond that which one checkpoint gives back: the system takes its time for that.
const GIVEN_BACK: usize = 8;

/// Why a checkpoint is refused while it comes in.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// A chunk of pages is none.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// A record makes no page.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// A state record is none.
    #[error(transparent)]
    State(#[from] StateError),
    /// A page came twice.
    #[error("page {number} came twice in one checkpoint")]
    Twice {
        /// Which.
        number: u64,
    },
    /// Nothing says what a page is to be.
    #[error("page {number} came without its digest; the checkpoint has to be sent again")]
    NoDigest {
        /// Which.
        number: u64,
    },
    /// More than may be staged.
    #[error("checkpoint.stage_mib = {limit_mib}: the checkpoint is larger; raise it")]
    TooLarge {
        /// The limit.
        limit_mib: usize,
    },
    /// The host has none.
    #[error("no memory to stage {pages} pages; free some on this host")]
    NoMemory {
        /// So far.
        pages: usize,
    },
    /// A base could not be read.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

/// Memory for pages, in blocks.
#[derive(Debug)]
struct Blocks {
    blocks: Vec<MmapMut>,
    used_pages: usize,
    pages_max: usize,
}

impl Blocks {
    fn next(&mut self) -> Result<&mut Page, StagingError> {
        if self.used_pages >= self.pages_max {
            let limit_mib = (self.pages_max * PAGE_BYTES) >> 20;
            return Err(StagingError::TooLarge { limit_mib });
        }
        if self.used_pages == self.blocks.len() * BLOCK_PAGES {
            let pages = self.used_pages;
            let block = MmapMut::map_anon(BLOCK_PAGES * PAGE_BYTES);
            let block = block.map_err(|_| StagingError::NoMemory { pages })?;
            // Small pages do as well, only slower.
            let _ = block.advise(Advice::HugePage);
            self.blocks.push(block);
        }
        let at = self.used_pages;
        self.used_pages += 1;
        let block = &mut self.blocks[at / BLOCK_PAGES];
        let page = block[at % BLOCK_PAGES * PAGE_BYTES..].first_chunk_mut();
        page.ok_or(StagingError::NoMemory { pages: at })
    }

    fn get(&self, at: usize) -> Option<&Page> {
        let block = self.blocks.get(at / BLOCK_PAGES)?;
        block[at % BLOCK_PAGES * PAGE_BYTES..].first_chunk()
    }

    /// Forgetting nothing changes nothing: a checkpoint is forgotten when it is over and once more before the next.
    fn clear(&mut self) {
        if self.used_pages == 0 {
            return;
        }
        let wanted = self.used_pages.div_ceil(BLOCK_PAGES) + SPARE_BLOCKS;
        let kept = self.blocks.len().saturating_sub(GIVEN_BACK).max(wanted);
        self.blocks.truncate(kept);
        self.used_pages = 0;
    }
}

/// The checkpoint that comes in. Its memory is used again for the next one.
#[derive(Debug)]
pub struct Staging {
    blocks: Blocks,
    /// Page numbers, in the order they came; zero pages have no memory.
    pages: Vec<(u64, Option<u32>)>,
    seen: PageBitmap,
    states: StateAssembly,
    page_count: u64,
    base: Box<Page>,
}

impl Staging {
    /// For a guest of so many pages; at most `limit_mib` of pages are staged.
    pub fn new(page_count: usize, limit_mib: usize) -> Self {
        Self {
            blocks: Blocks {
                blocks: Vec::new(),
                used_pages: 0,
                pages_max: (limit_mib << 20) / PAGE_BYTES,
            },
            pages: Vec::new(),
            seen: PageBitmap::new(page_count),
            states: StateAssembly::default(),
            page_count: page_count as u64,
            base: Box::new([0; PAGE_BYTES]),
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for (number, _) in self.pages.drain(..) {
            self.seen.words[number as usize / 64] &= !(1 << (number % 64));
        }
        self.blocks.clear();
        self.states = StateAssembly::default();
    }

    /// Takes a part of a state record.
    pub fn add_state(&mut self, part: &[u8]) -> Result<(), StagingError> {
        Ok(self.states.add(part)?)
    }

    /// Takes a chunk of pages, and those of them that came behind it. `ram` is that of the stopped SVM, `key` the session's.
    pub fn add_pages(
        &mut self,
        (chunk, bulk): (&[u8], &[u8]),
        ram: &GuestRam,
        key: &PageKey,
    ) -> Result<(), StagingError> {
        for record in Decoder::with_bulk(chunk, bulk, self.page_count)? {
            self.add_page(&record?, ram, key)?;
        }
        Ok(())
    }

    fn add_page(
        &mut self,
        record: &Record<'_>,
        ram: &GuestRam,
        key: &PageKey,
    ) -> Result<(), StagingError> {
        let number = record.number;
        if record.digest.is_none() && record.kind != Kind::Zero {
            return Err(StagingError::NoDigest { number });
        }
        // Below the guest's number of pages, says the decoder.
        let word = &mut self.seen.words[number as usize / 64];
        if *word >> (number % 64) & 1 == 1 {
            return Err(StagingError::Twice { number });
        }
        let slot = match record.kind {
            Kind::Zero => None,
            _ => Some(self.blocks.used_pages as u32),
        };
        if slot.is_some() {
            if record.needs_base() {
                ram.copy_page_out(number as usize, &mut self.base)?;
            }
            record.apply(&self.base, self.blocks.next()?, Some(key))?;
        }
        *word |= 1 << (number % 64);
        self.pages.push((number, slot));
        Ok(())
    }

    /// Whether a page is among them.
    pub fn has(&self, number: u64) -> bool {
        let word = self.seen.words.get(number as usize / 64);
        word.is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    /// How many pages there are.
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// The records, once; the pages stay.
    pub fn take_states(&mut self) -> Result<Vec<State>, StagingError> {
        Ok(std::mem::take(&mut self.states).finish()?)
    }

    /// Puts the pages into guest memory.
    pub fn write_pages(&self, ram: &GuestRam) -> Result<(), MemoryError> {
        const ZEROS: Page = [0; PAGE_BYTES];
        for &(number, slot) in &self.pages {
            let page = slot.and_then(|slot| self.blocks.get(slot as usize));
            ram.write_page(number as usize, page.unwrap_or(&ZEROS))?;
        }
        Ok(())
    }
}

/// The memory of a machine that has never run, while live pages come in.
#[derive(Debug)]
pub struct LiveMemory {
    /// Pages that are not the zeros they were made of.
    written: PageBitmap,
}

impl LiveMemory {
    /// For a guest of so many pages.
    pub fn new(page_count: usize) -> Self {
        Self {
            written: PageBitmap::new(page_count),
        }
    }

    /// Puts live pages into memory. Zeros that are there already are not written: that would take memory.
    pub fn write(&mut self, ram: &GuestRam, chunk: &[u8]) -> Result<(), StagingError> {
        let nothing = [0; PAGE_BYTES];
        let mut page = [0; PAGE_BYTES];
        for record in Decoder::new(chunk, ram.page_count() as u64)? {
            let record = record?;
            let word = &mut self.written.words[record.number as usize / 64];
            let bit = 1 << (record.number % 64);
            if record.kind == Kind::Zero && *word & bit == 0 {
                continue;
            }
            *word |= bit;
            record.apply(&nothing, &mut page, None)?;
            ram.write_page(record.number as usize, &page)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::codec::{Encoder, PageDigest, Payload};
    use super::*;
    use colo_fastpath::ring::Pages;

    const PAGES: usize = 600;

    fn key() -> PageKey {
        PageKey::new([3; 16])
    }

    fn ram() -> GuestRam {
        GuestRam::new((PAGES * PAGE_BYTES) as u64, Pages::Small).unwrap()
    }

    fn chunk(pages: &[(u64, Payload<'_>)], digest_of: &dyn Fn(u64) -> PageDigest) -> Vec<u8> {
        let mut buffer = vec![0; 8 << 20];
        let mut encoder = Encoder::new(&mut buffer, true).unwrap();
        for (number, payload) in pages {
            encoder.push(*number, payload, digest_of(*number)).unwrap();
        }
        let length = encoder.finish();
        buffer.truncate(length);
        buffer
    }

    fn filled(number: u64) -> Page {
        [number as u8 | 1; PAGE_BYTES]
    }

    #[test]
    fn rule_13_pages_reach_the_guest_only_when_they_are_written() {
        let (ram, key) = (ram(), key());
        ram.write_page(7, &[9; PAGE_BYTES]).unwrap();
        let mut staging = Staging::new(PAGES, 64);
        for _ in 0..2 {
            let contents: Vec<_> = (0..PAGES as u64).map(filled).collect();
            let mut pages: Vec<_> = contents
                .iter()
                .enumerate()
                .map(|(n, page)| (n as u64, Payload::Raw(page)))
                .collect();
            pages[7].1 = Payload::Zero;
            let bytes = chunk(&pages, &|n| key.of(&filled(n)));
            staging.add_pages((&bytes, &[]), &ram, &key).unwrap();
            let mut page = [0; PAGE_BYTES];
            ram.copy_page_out(7, &mut page).unwrap();
            assert_eq!(page, [9; PAGE_BYTES]);
            assert_eq!(staging.page_count(), PAGES);
            staging.clear();
            assert_eq!(staging.page_count(), 0);
        }
        let bytes = chunk(&[(5, Payload::Raw(&filled(5))), (7, Payload::Zero)], &|n| {
            key.of(&filled(n))
        });
        staging.add_pages((&bytes, &[]), &ram, &key).unwrap();
        staging.write_pages(&ram).unwrap();
        let mut page = [0; PAGE_BYTES];
        ram.copy_page_out(7, &mut page).unwrap();
        assert_eq!(page, [0; PAGE_BYTES]);
        ram.copy_page_out(5, &mut page).unwrap();
        assert_eq!(page, filled(5));
    }

    #[test]
    fn memory_stays_for_the_next_checkpoint_and_goes_slowly() {
        let mut blocks = Blocks {
            blocks: Vec::new(),
            used_pages: 0,
            pages_max: usize::MAX,
        };
        for _ in 0..(SPARE_BLOCKS + 20) * BLOCK_PAGES {
            blocks.next().unwrap();
        }
        blocks.clear();
        blocks.clear();
        assert_eq!(blocks.blocks.len(), SPARE_BLOCKS + 20);
        for kept in [12, 4, 0, 0] {
            blocks.next().unwrap();
            blocks.clear();
            blocks.clear();
            let spare = SPARE_BLOCKS + 1;
            assert_eq!(blocks.blocks.len(), (SPARE_BLOCKS + kept).max(spare));
        }
    }

    #[test]
    fn live_pages_are_written_and_become_zero_again() {
        let (ram, any) = (ram(), |_| PageDigest::default());
        let mut live = LiveMemory::new(PAGES);
        let mut page = [1; PAGE_BYTES];
        for payload in [Payload::Zero, Payload::Raw(&filled(5)), Payload::Zero] {
            live.write(&ram, &chunk(&[(5, payload)], &any)).unwrap();
            ram.copy_page_out(5, &mut page).unwrap();
            let expected = match payload {
                Payload::Raw(page) => *page,
                _ => [0; PAGE_BYTES],
            };
            assert_eq!(page, expected);
        }
        let beyond = chunk(&[(PAGES as u64, Payload::Zero)], &any);
        assert!(live.write(&ram, &beyond).is_err());
    }

    #[test]
    fn what_is_wrong_refuses_the_checkpoint() {
        let (ram, key) = (ram(), key());
        let right = |n| key.of(&filled(n));
        let page = filled(5);
        let raw = Payload::Raw(&page);

        let mut staging = Staging::new(PAGES, 64);
        let twice = chunk(&[(5, raw)], &right);
        staging.add_pages((&twice, &[]), &ram, &key).unwrap();
        let refused = staging.add_pages((&twice, &[]), &ram, &key).unwrap_err();
        assert!(matches!(refused, StagingError::Twice { number: 5 }));

        let wrong = chunk(&[(6, raw)], &right);
        let refused = staging.add_pages((&wrong, &[]), &ram, &key).unwrap_err();
        assert!(matches!(refused, StagingError::Apply(_)), "{refused}");

        let mut apart = vec![0; 8192];
        let mut encoder = Encoder::apart(&mut apart).unwrap();
        encoder.push(8, &raw, right(5)).unwrap();
        let length = encoder.finish();
        let mut damaged = page;
        damaged[4000] ^= 1;
        let refused = staging.add_pages((&apart[..length], &damaged), &ram, &key);
        assert!(
            matches!(refused, Err(StagingError::Apply(_))),
            "rule 13: {refused:?}"
        );
        staging
            .add_pages((&apart[..length], &page), &ram, &key)
            .unwrap();

        let mut bare = vec![0; 8192];
        let mut encoder = Encoder::new(&mut bare, false).unwrap();
        encoder.push(9, &raw, PageDigest::default()).unwrap();
        let length = encoder.finish();
        let refused = staging.add_pages((&bare[..length], &[]), &ram, &key);
        assert!(
            matches!(refused, Err(StagingError::NoDigest { number: 9 })),
            "rule 13: {refused:?}"
        );

        let beyond = chunk(&[(PAGES as u64, raw)], &|_| right(5));
        let refused = staging.add_pages((&beyond, &[]), &ram, &key).unwrap_err();
        assert!(matches!(refused, StagingError::Chunk(_)), "{refused}");

        let contents: Vec<_> = (0..400).map(filled).collect();
        let many: Vec<_> = contents
            .iter()
            .enumerate()
            .map(|(n, page)| (n as u64, Payload::Raw(page)))
            .collect();
        let mut small = Staging::new(PAGES, 1);
        let refused = small.add_pages((&chunk(&many, &right), &[]), &ram, &key);
        let refused = refused.unwrap_err();
        assert!(refused.to_string().contains("checkpoint.stage_mib = 1"));
    }
}
