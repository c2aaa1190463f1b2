//! Pages ahead of checkpoints: what decides about them on the primary and what keeps them on the secondary are the real
//! parts; a page of the model travels as the bytes of its digest.
//!
//! Invariants: a round, a chunk and a capture come one after the other, as on the one thread in production; nothing of the
//! page channel is read between a whole stage and the word about it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::Duration;

use colo_fastpath::ring::{GuestRam, Pages};
use colo_vmm::checkpoint::ahead::AheadSettings;
use colo_vmm::checkpoint::ahead::area::Area;
use colo_vmm::checkpoint::ahead::primary::Ahead;
use colo_vmm::checkpoint::ahead::wire::NameList;
use colo_vmm::checkpoint::codec::{Page as Bytes, PageKey};
use colo_vmm::checkpoint::pages::{PAGE_BYTES, PageBitmap};

use super::*;
use crate::guest::Page;

/// Holds all pages of a guest.
const AREA_MIB: usize = 1;

/// The primary's end, for one secondary.
pub struct AheadSide {
    ahead: Ahead,
    /// Rises with each end of a checkpoint: steps that were planned before are not taken.
    turn: u64,
}

/// The secondary's end.
pub struct AreaSide {
    area: Area,
    /// What bytes stand for.
    pages: HashMap<u64, Rc<Page>>,
}

/// Pages on their way.
#[derive(Debug, Clone)]
pub struct AheadChunk {
    bytes: Rc<Vec<u8>>,
    pages: Rc<PageSet>,
}

impl AreaSide {
    pub fn new() -> Self {
        Self {
            area: Area::new(PAGES, AREA_MIB),
            pages: HashMap::new(),
        }
    }

    /// Nothing of it is of use.
    pub fn clear(&mut self) {
        self.area.clear();
        self.pages.clear();
    }

    fn take(&mut self, chunk: &AheadChunk, key: &PageKey) {
        let known = chunk.pages.iter();
        let known = known.map(|(_, page)| (page.digest(), page.clone()));
        self.pages.extend(known);
        // After an error a checkpoint that names the pages is refused.
        let _ = self.area.take(&chunk.bytes, key);
    }

    /// Puts the named pages into the guest's memory.
    fn write_named(&mut self, guest: &mut Guest) -> Result<u64, String> {
        let numbers = self.area.named().to_vec();
        if !numbers.is_empty() {
            let ram = GuestRam::new((PAGES * PAGE_BYTES) as u64, Pages::Small);
            let ram = ram.map_err(|e| e.to_string())?;
            let written = self.area.write_named(&ram);
            written.map_err(|e| e.to_string())?;
            for &number in &numbers {
                let mut bytes = [0; 8];
                let read = ram.read(u64::from(number) * PAGE_BYTES as u64, &mut bytes);
                read.map_err(|e| e.to_string())?;
                let page = self.pages.get(&u64::from_le_bytes(bytes));
                let page = page.ok_or_else(|| format!("page {number} is none that was sent"))?;
                guest.write_pages(&vec![(number as usize, page.clone())]);
            }
        }
        self.clear();
        Ok(numbers.len() as u64)
    }
}

fn bytes_of(page: &Page) -> Bytes {
    let mut bytes = [0; PAGE_BYTES];
    bytes[..8].copy_from_slice(&page.digest().to_le_bytes());
    bytes
}

fn set(pages: u64) -> PageBitmap {
    let mut set = PageBitmap::new(64);
    set.add(0, pages);
    set
}

fn key(link: usize) -> PageKey {
    PageKey::new([link as u8; 16])
}

impl Shell<'_> {
    fn instant(&self) -> std::time::Instant {
        self.world.began + Duration::from_micros(self.world.now)
    }

    /// A secondary has joined.
    pub(super) fn prepare_ahead(&mut self) {
        let settings = AheadSettings {
            interval: Duration::from_micros(self.world.plan.ahead_us),
            mib_per_s: self.world.plan.ahead_mib_per_s,
        };
        let area_mib = if self.world.plan.ahead_us > 0 {
            AREA_MIB
        } else {
            0
        };
        let ahead = Ahead::new(PAGES, area_mib, settings);
        if let Some(side) = self.primary() {
            side.ahead = ahead.map(|ahead| Box::new(AheadSide { ahead, turn: 0 }));
        }
    }

    /// A checkpoint has ended, whichever way.
    pub(super) fn rest_ahead(&mut self) {
        let now = self.instant();
        let Some(side) = self.primary().and_then(|side| side.ahead.as_mut()) else {
            return;
        };
        side.ahead.rest(now);
        side.turn += 1;
        let counted = side.ahead.take_counters();
        self.world.outcome.ahead_sent += counted.sent_pages;
        self.world.outcome.ahead_wasted += counted.wasted_pages;
        self.plan_ahead();
    }

    fn plan_ahead(&mut self) {
        let now = self.instant();
        let Some(side) = self.primary().and_then(|side| side.ahead.as_ref()) else {
            return;
        };
        let (turn, at) = (side.turn, side.ahead.next_at());
        let Some(at) = at else { return };
        let wait = at.saturating_duration_since(now).as_micros() as u64;
        let at = self.world.now + wait + 1 + self.below(100);
        let event = HostEvent::AheadStep(turn);
        self.world.host_event(at, self.host, self.p.inc, event);
    }

    pub(super) fn step_ahead(&mut self, turn: u64) {
        let now = self.instant();
        let stale = self.mutated(Mutation::StaleAhead);
        let p = &mut *self.p;
        let (Role::Primary(side), Some(guest), Some(link)) = (&mut p.role, &mut p.guest, p.link)
        else {
            return;
        };
        // Nothing is looked at without streams; those that come begin anew.
        let waits = p.streams.is_broken();
        let Some(ahead) = side
            .ahead
            .as_mut()
            .filter(|ahead| ahead.turn == turn && !waits)
        else {
            return;
        };
        if ahead.ahead.is_round_due(now) {
            let mut owed = set(side.carry);
            let written = std::mem::take(&mut guest.dirty);
            let noticed = match stale {
                true => written & !ahead.ahead.sent().word(0),
                false => written,
            };
            let take = |bitmap: &mut PageBitmap| {
                bitmap.add(0, noticed);
                Ok::<_, Infallible>(())
            };
            let _ = ahead.ahead.round(&mut owed, now, take);
            side.carry = owed.word(0) | written;
            return self.plan_ahead();
        }
        let mut pages = PageSet::new();
        let mut buffer = vec![0; self.world.plan.ahead_chunk_bytes];
        let read = |number: u64, out: &mut Bytes| {
            let page = guest.pages(1 << number);
            *out = bytes_of(&page[0].1);
            pages.extend(page);
            Ok::<_, Infallible>(())
        };
        let filled = ahead.ahead.fill_chunk(&mut buffer, &key(link), read);
        let length = filled.map_or(0, |filled| filled.length);
        if pages.is_empty() {
            return self.plan_ahead();
        }
        let rate = ahead.ahead.bytes_per_s(0);
        ahead.ahead.chunk_sent(length, rate, now);
        buffer.truncate(length);
        let chunk = AheadChunk {
            bytes: Rc::new(buffer),
            pages: Rc::new(pages),
        };
        self.trace(|| format!("sends ahead {:?}", chunk.numbers()));
        if self.send_pages(PageMsg::Ahead(chunk)) {
            self.plan_ahead();
            self.pass("ahead_sent");
        }
    }

    /// What of a capture has to be kept, and the names of what the secondary has.
    pub(super) fn cut_ahead(&mut self, union: u64, written: u64) -> (u64, Vec<u8>) {
        let stale = self.mutated(Mutation::StaleAhead);
        let rumours = self.world.hosts[self.host].chance.next();
        let Some(side) = self.primary().and_then(|side| side.ahead.as_mut()) else {
            return (union, Vec::new());
        };
        let ahead = &mut side.ahead;
        let noticed = match stale {
            true => written & !ahead.sent().word(0),
            false => written,
        };
        ahead.captured(&set(noticed));
        let mut names = NameList::new(1 << 16);
        let (relied_on, _) = ahead.relied_on();
        for (number, digest) in relied_on {
            names.push(number as u32, digest);
        }
        let kept = ahead.to_keep(&set(union)).word(0);
        // Whatever a checkpoint teaches about pages, right or wrong, no image depends on it.
        for number in set(union).iter() {
            ahead.learn(number, rumours & (1 << number) != 0);
        }
        (kept, names.finish().to_vec())
    }

    pub(super) fn receive_ahead(&mut self, link: usize, chunk: &AheadChunk) {
        self.pass("ahead_received");
        let is_damaged = self.failure(self.world.plan.stage_failures / 4);
        let Some(side) = self.secondary() else { return };
        // It comes behind the mark that ends what was given up.
        side.forget_arriving();
        match is_damaged {
            true => side.area.area.refuse_chunk(),
            false => side.area.take(chunk, &key(link)),
        }
    }

    /// A checkpoint is whole: whether everything that it names is there.
    pub(super) fn accepts_names(&mut self, image: &Image) -> bool {
        let Some(side) = self.secondary() else {
            return false;
        };
        let area = &mut side.area.area;
        area.begin();
        image.names.is_empty() || area.name(&image.names, &key(image.link)).is_ok()
    }

    /// The apply of a checkpoint comes to what had come ahead.
    pub(super) fn apply_named(&mut self) {
        let p = &mut *self.p;
        let (Role::Secondary(side), Some(guest)) = (&mut p.role, &mut p.guest) else {
            return;
        };
        match side.area.write_named(guest) {
            Ok(pages) => self.world.outcome.ahead_used += pages,
            Err(text) => self.fail("all or nothing", text),
        }
    }
}

impl AheadChunk {
    fn numbers(&self) -> Vec<usize> {
        self.pages.iter().map(|(number, _)| *number).collect()
    }
}
