//! A checkpoint on the secondary before its commit point: pages and records, received, decoded and checked.
//!
//! A page that travels whole stays where it was received ([`Landing`]); it is checked there, and copied for the first time
//! when it is written to the guest. What has to be made (deltas, LZ4), and what found no room to land in, gets memory from
//! the same place.
//!
//! Invariants: memory is proportional to the checkpoint and bounded; nothing here touches the guest, whose stopped memory
//! is only read as the base of deltas; the first thing that is wrong refuses the checkpoint (rule 13).
//!
//! Does not know what is in a state record.

use colo_fastpath::ring::{GuestRam, MemoryError};
use serde::Serialize;

use super::channel::{Landing, LandingError, Landings, Whole};
use super::codec::record::{ApplyError, ChunkError};
use super::codec::{Decoder, Kind, Page, PageKey, Record};
use super::pages::{PAGE_BYTES, PageBitmap};
use super::states::{State, StateAssembly, StateError};

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
    #[error(transparent)]
    NoMemory(LandingError),
    /// A page that is staged lies nowhere.
    #[error("page {number} was staged and is gone; this is an error of colo's")]
    Lost {
        /// Which.
        number: u64,
    },
    /// A base could not be read.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

impl From<LandingError> for StagingError {
    fn from(e: LandingError) -> Self {
        match e {
            LandingError::Full { limit_pages } => Self::TooLarge {
                limit_mib: (limit_pages * PAGE_BYTES) >> 20,
            },
            e @ LandingError::NoMemory { .. } => Self::NoMemory(e),
        }
    }
}

/// How pages of checkpoints came to be staged; for the status of a secondary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct StagedPages {
    /// Where they were received.
    pub in_place: u64,
    /// Copied from a receive buffer: the sender does not send them apart, or there was no room where they land.
    pub copied: u64,
    /// Made of a delta or of compressed bytes.
    pub made: u64,
    /// Zeros, which take no memory.
    pub zero: u64,
}

/// Where a staged page is.
#[derive(Debug, Clone, Copy)]
enum Place {
    Zeros,
    /// A page of what landed.
    Landed(u32, u32),
    /// A page that was made or copied.
    Made(u32),
}

/// The checkpoint that comes in.
#[derive(Debug)]
pub struct Staging {
    landings: Landings,
    /// What came behind the records of chunks.
    landed: Vec<Landing>,
    /// Single pages.
    made: Vec<Landing>,
    /// Page numbers, in the order they came.
    pages: Vec<(u64, Place)>,
    seen: PageBitmap,
    states: StateAssembly,
    page_count: u64,
    base: Box<Page>,
    counters: StagedPages,
}

impl Staging {
    /// For a guest of so many pages; at most `limit_mib` of pages are staged.
    pub fn new(page_count: usize, limit_mib: usize) -> Self {
        Self {
            landings: Landings::new((limit_mib << 20) / PAGE_BYTES),
            landed: Vec::new(),
            made: Vec::new(),
            pages: Vec::new(),
            seen: PageBitmap::new(page_count),
            states: StateAssembly::default(),
            page_count: page_count as u64,
            base: Box::new([0; PAGE_BYTES]),
            counters: StagedPages::default(),
        }
    }

    /// Where pages may land that are to be staged.
    pub fn landings(&self) -> Landings {
        self.landings.clone()
    }

    /// How pages were staged so far.
    pub fn counters(&self) -> StagedPages {
        self.counters
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for (number, _) in self.pages.drain(..) {
            self.seen.remove(number as usize / 64, 1 << (number % 64));
        }
        self.landed.clear();
        self.made.clear();
        self.landings.rest();
        self.states = StateAssembly::default();
    }

    /// Takes a part of a state record.
    pub fn add_state(&mut self, part: &[u8]) -> Result<(), StagingError> {
        Ok(self.states.add(part)?)
    }

    /// Takes a chunk of pages, and those of them that came behind it. `ram` is that of the stopped SVM, `key` the session's.
    pub fn add_pages(
        &mut self,
        (chunk, whole): (&[u8], Whole<'_>),
        ram: &GuestRam,
        key: &PageKey,
    ) -> Result<(), StagingError> {
        let landing = self.landed.len() as u32;
        let mut places = match &whole {
            // The n-th whole page lies n-th: the decoder takes them from there alone, in order.
            Whole::Landed(_) => Some((0..).map(|page| Place::Landed(landing, page))),
            Whole::Passing(_) => None,
        };
        let mut added = Ok(());
        for record in Decoder::with_bulk(chunk, &whole, self.page_count)? {
            added = record.map_err(StagingError::from).and_then(|record| {
                let places = places.as_mut().filter(|_| record.kind.is_whole());
                self.add_page(&record, places.and_then(Iterator::next), ram, key)
            });
            if added.is_err() {
                break;
            }
        }
        if let Whole::Landed(landing) = whole {
            self.landed.push(landing);
        }
        added
    }

    /// `place` is where the page lies already, if it does.
    fn add_page(
        &mut self,
        record: &Record<'_>,
        place: Option<Place>,
        ram: &GuestRam,
        key: &PageKey,
    ) -> Result<(), StagingError> {
        let number = record.number;
        if record.digest.is_none() && record.kind != Kind::Zero {
            return Err(StagingError::NoDigest { number });
        }
        // Below the guest's number of pages, says the decoder.
        let (word, bit) = (number as usize / 64, 1 << (number % 64));
        if self.seen.word(word) & bit != 0 {
            return Err(StagingError::Twice { number });
        }
        if record.needs_base() {
            ram.copy_page_out(number as usize, &mut self.base)?;
        }
        let place = match (record.kind, place) {
            (Kind::Zero, _) => Place::Zeros,
            (_, Some(place)) => {
                record.check(&self.base, key)?;
                place
            }
            (_, None) => self.make(record, key)?,
        };
        let counter = match place {
            Place::Zeros => &mut self.counters.zero,
            Place::Landed(..) => &mut self.counters.in_place,
            Place::Made(_) if record.kind.is_whole() => &mut self.counters.copied,
            Place::Made(_) => &mut self.counters.made,
        };
        *counter += 1;
        self.seen.add(word, bit);
        self.pages.push((number, place));
        Ok(())
    }

    /// The page in memory of its own.
    fn make(&mut self, record: &Record<'_>, key: &PageKey) -> Result<Place, StagingError> {
        let mut landing = self.landings.take(PAGE_BYTES)?;
        let number = record.number;
        let page = landing.first_chunk_mut();
        let page = page.ok_or(StagingError::Lost { number })?;
        record.apply(&self.base, page, Some(key))?;
        self.made.push(landing);
        Ok(Place::Made(self.made.len() as u32 - 1))
    }

    /// Whether a page is among them.
    pub fn has(&self, number: u64) -> bool {
        self.seen.word(number as usize / 64) >> (number % 64) & 1 == 1
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
    pub fn write_pages(&self, ram: &GuestRam) -> Result<(), StagingError> {
        const ZEROS: Page = [0; PAGE_BYTES];
        for &(number, place) in &self.pages {
            let landing = match place {
                Place::Zeros => None,
                Place::Landed(landing, page) => Some((self.landed.get(landing as usize), page)),
                Place::Made(index) => Some((self.made.get(index as usize), 0)),
            };
            let page = match landing {
                None => &ZEROS,
                Some((landing, page)) => landing
                    .and_then(|landing| landing.get(page as usize * PAGE_BYTES..)?.first_chunk())
                    .ok_or(StagingError::Lost { number })?,
            };
            ram.write_page(number as usize, page)?;
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
            let (word, bit) = (record.number as usize / 64, 1 << (record.number % 64));
            if record.kind == Kind::Zero && self.written.word(word) & bit == 0 {
                continue;
            }
            self.written.add(word, bit);
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
            staging
                .add_pages((&bytes, Whole::Passing(&[])), &ram, &key)
                .unwrap();
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
        staging
            .add_pages((&bytes, Whole::Passing(&[])), &ram, &key)
            .unwrap();
        staging.write_pages(&ram).unwrap();
        let mut page = [0; PAGE_BYTES];
        ram.copy_page_out(7, &mut page).unwrap();
        assert_eq!(page, [0; PAGE_BYTES]);
        ram.copy_page_out(5, &mut page).unwrap();
        assert_eq!(page, filled(5));
    }

    /// A chunk with whole pages apart, as it lands.
    fn landed(
        staging: &Staging,
        pages: &[(u64, Payload<'_>)],
        digest_of: &dyn Fn(u64) -> PageDigest,
    ) -> (Vec<u8>, Landing) {
        let mut bytes = vec![0; 1 << 20];
        let mut encoder = Encoder::apart(&mut bytes).unwrap();
        let mut bulk = Vec::new();
        for (number, payload) in pages {
            encoder.push(*number, payload, digest_of(*number)).unwrap();
            if payload.kind().is_whole() {
                bulk.extend_from_slice(payload.data());
            }
        }
        let length = encoder.finish();
        bytes.truncate(length);
        let mut landing = staging.landings().take(bulk.len()).unwrap();
        landing.copy_from_slice(&bulk);
        (bytes, landing)
    }

    #[test]
    fn what_has_landed_is_checked_and_kept_there_beside_what_is_made() {
        let (ram, key) = (ram(), key());
        let right = |n| key.of(&filled(n));
        let base = filled(3);
        ram.write_page(8, &base).unwrap();
        let changed = {
            let mut page = base;
            page[100] ^= 0xff;
            page
        };
        let mut delta = vec![0; PAGE_BYTES];
        let length = super::super::codec::delta::encode(&base, &changed, &mut delta).unwrap();
        let digest_of = |n| if n == 8 { key.of(&changed) } else { right(n) };
        let mut staging = Staging::new(PAGES, 1);
        for first in [5, 105] {
            let (one, two, same) = (filled(first), filled(first + 4), filled(first + 5));
            ram.write_page(first as usize + 5, &same).unwrap();
            let mut pages = vec![
                (first, Payload::Raw(&one)),
                (first + 1, Payload::Zero),
                (first + 4, Payload::Raw(&two)),
                (first + 5, Payload::Same(&same)),
            ];
            if first == 5 {
                pages.insert(2, (8, Payload::Delta(&delta[..length])));
            }
            let (chunk, landing) = landed(&staging, &pages, &digest_of);
            let whole = Whole::Landed(landing);
            staging.add_pages((&chunk, whole), &ram, &key).unwrap();
        }
        let expected = StagedPages {
            in_place: 6,
            copied: 0,
            made: 1,
            zero: 2,
        };
        assert_eq!(staging.counters(), expected);
        staging.write_pages(&ram).unwrap();
        let read = |number| {
            let mut page = [0; PAGE_BYTES];
            ram.copy_page_out(number, &mut page).unwrap();
            page
        };
        for number in [5, 9, 10, 105, 109, 110] {
            assert_eq!(read(number), filled(number as u64), "{number}");
        }
        assert_eq!((read(8), read(6)), (changed, [0; PAGE_BYTES]));

        // Memory goes back when the checkpoint is over, and not before.
        assert!(staging.landings().take(250 * PAGE_BYTES).is_err());
        staging.clear();
        assert!(staging.landings().take(256 * PAGE_BYTES).is_ok());
    }

    #[test]
    fn rule_13_what_has_landed_damaged_refuses_the_checkpoint() {
        let (ram, key) = (ram(), key());
        let pages = [filled(5), filled(6), filled(7)];
        let payloads = [
            (5, Payload::Raw(&pages[0])),
            (6, Payload::Same(&pages[1])),
            (7, Payload::Raw(&pages[2])),
        ];
        let right = |n| key.of(&filled(n));
        ram.write_page(6, &pages[1]).unwrap();
        let mut staging = Staging::new(PAGES, 1);
        for at in [0, 4095, 4096, 8191, 8192, 12287] {
            let (chunk, mut landing) = landed(&staging, &payloads, &right);
            landing[at] ^= 1;
            let refused = staging.add_pages((&chunk, Whole::Landed(landing)), &ram, &key);
            assert!(matches!(refused, Err(StagingError::Apply(_))), "{at}");
            staging.clear();
        }
        // Too few or too many pages behind the records.
        for bytes in [2 * PAGE_BYTES, 4 * PAGE_BYTES] {
            let (chunk, _) = landed(&staging, &payloads, &right);
            let mut landing = staging.landings().take(bytes).unwrap();
            let length = bytes.min(3 * PAGE_BYTES);
            landing[..length].copy_from_slice(&pages.concat()[..length]);
            let refused = staging.add_pages((&chunk, Whole::Landed(landing)), &ram, &key);
            assert!(matches!(refused, Err(StagingError::Chunk(_))), "{bytes}");
            staging.clear();
        }
        let (chunk, landing) = landed(&staging, &payloads, &right);
        staging
            .add_pages((&chunk, Whole::Landed(landing)), &ram, &key)
            .unwrap();
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
        staging
            .add_pages((&twice, Whole::Passing(&[])), &ram, &key)
            .unwrap();
        let refused = staging
            .add_pages((&twice, Whole::Passing(&[])), &ram, &key)
            .unwrap_err();
        assert!(matches!(refused, StagingError::Twice { number: 5 }));

        let wrong = chunk(&[(6, raw)], &right);
        let refused = staging
            .add_pages((&wrong, Whole::Passing(&[])), &ram, &key)
            .unwrap_err();
        assert!(matches!(refused, StagingError::Apply(_)), "{refused}");

        let mut apart = vec![0; 8192];
        let mut encoder = Encoder::apart(&mut apart).unwrap();
        encoder.push(8, &raw, right(5)).unwrap();
        let length = encoder.finish();
        let mut damaged = page;
        damaged[4000] ^= 1;
        let refused = staging.add_pages((&apart[..length], Whole::Passing(&damaged)), &ram, &key);
        assert!(
            matches!(refused, Err(StagingError::Apply(_))),
            "rule 13: {refused:?}"
        );
        staging
            .add_pages((&apart[..length], Whole::Passing(&page)), &ram, &key)
            .unwrap();

        let mut bare = vec![0; 8192];
        let mut encoder = Encoder::new(&mut bare, false).unwrap();
        encoder.push(9, &raw, PageDigest::default()).unwrap();
        let length = encoder.finish();
        let refused = staging.add_pages((&bare[..length], Whole::Passing(&[])), &ram, &key);
        assert!(
            matches!(refused, Err(StagingError::NoDigest { number: 9 })),
            "rule 13: {refused:?}"
        );

        let beyond = chunk(&[(PAGES as u64, raw)], &|_| right(5));
        let refused = staging
            .add_pages((&beyond, Whole::Passing(&[])), &ram, &key)
            .unwrap_err();
        assert!(matches!(refused, StagingError::Chunk(_)), "{refused}");

        let contents: Vec<_> = (0..400).map(filled).collect();
        let many: Vec<_> = contents
            .iter()
            .enumerate()
            .map(|(n, page)| (n as u64, Payload::Raw(page)))
            .collect();
        let mut small = Staging::new(PAGES, 1);
        let refused = small.add_pages((&chunk(&many, &right), Whole::Passing(&[])), &ram, &key);
        let refused = refused.unwrap_err();
        assert!(refused.to_string().contains("checkpoint.stage_mib = 1"));
    }
}
