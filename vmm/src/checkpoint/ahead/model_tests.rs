//! Both ends against each other, over lives of random writes, rounds, chunks, checkpoints, aborts and damage: what the
//! secondary holds after a commit is what the primary had when it captured.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use colo_fastpath::ring::{GuestRam, Pages};
use proptest::prelude::*;

use super::AheadSettings;
use super::area::Area;
use super::primary::Ahead;
use super::wire::NameList;
use crate::checkpoint::codec::{Page, PageKey};
use crate::checkpoint::pages::{PAGE_BYTES, PageBitmap};

const PAGES: usize = 40;
/// The area is smaller than the guest.
const AREA_MIB: usize = 1;

#[derive(Debug, Clone)]
enum Step {
    /// The PVM writes to a page; 0 makes it zeros.
    Write(usize, u8),
    /// The SVM does.
    SvmWrite(usize, u8),
    Round,
    /// What is known of a page's past is this, right or wrong.
    Rumour(usize, bool),
    /// A chunk is made; while it is copied the guest writes to its first page. Or the link damages it.
    Chunk(Option<u8>, bool),
    Checkpoint(Fate),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Committed,
    /// Given up before anything of it was sent.
    Unsent,
    /// Refused or discarded when all was there.
    Discarded,
}

fn any_step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    let write = prop_oneof![Just(None), any::<u8>().prop_map(Some)];
    let fate = prop_oneof![
        4 => Just(Fate::Committed),
        1 => Just(Fate::Unsent),
        1 => Just(Fate::Discarded),
    ];
    prop_oneof![
        8 => (page.clone(), 0u8..4).prop_map(|(page, byte)| Step::Write(page, byte)),
        2 => (page.clone(), 0u8..4).prop_map(|(page, byte)| Step::SvmWrite(page, byte)),
        2 => (page, any::<bool>()).prop_map(|(page, is_equal)| Step::Rumour(page, is_equal)),
        4 => Just(Step::Round),
        6 => (write, prop::bool::weighted(0.1)).prop_map(|(write, damaged)| Step::Chunk(write, damaged)),
        2 => fate.prop_map(Step::Checkpoint),
    ]
}

/// Memory with a dirty log.
struct Guest {
    ram: GuestRam,
    dirty: PageBitmap,
}

impl Guest {
    fn new() -> Self {
        Self {
            ram: GuestRam::new((PAGES * PAGE_BYTES) as u64, Pages::Small).unwrap(),
            dirty: PageBitmap::new(PAGES),
        }
    }

    fn write(&mut self, page: usize, byte: u8) {
        self.ram.write_page(page, &[byte; PAGE_BYTES]).unwrap();
        self.dirty.add(page / 64, 1 << (page % 64));
    }

    fn page(&self, page: usize) -> Page {
        let mut bytes = [0; PAGE_BYTES];
        self.ram.copy_page_out(page, &mut bytes).unwrap();
        bytes
    }

    fn take(&mut self, set: &mut PageBitmap) {
        set.merge(&self.dirty);
        self.dirty.clear();
    }
}

struct Life {
    key: PageKey,
    pvm: Guest,
    svm: Guest,
    ahead: Ahead,
    area: Area,
    owed: PageBitmap,
    now: Instant,
    limit_pages: usize,
    /// A chunk was lost in this fill.
    is_damaged: bool,
    used: u64,
}

impl Life {
    fn new(limit_pages: usize) -> Self {
        let settings = AheadSettings {
            interval: Duration::from_millis(1),
            mib_per_s: 1,
        };
        let mut ahead = Ahead::new(PAGES, AREA_MIB, settings).unwrap();
        ahead.limit_to(limit_pages);
        let now = Instant::now();
        ahead.rest(now);
        Self {
            key: PageKey::new([5; 16]),
            pvm: Guest::new(),
            svm: Guest::new(),
            ahead,
            area: Area::new(PAGES, AREA_MIB),
            owed: PageBitmap::new(PAGES),
            now,
            limit_pages,
            is_damaged: false,
            used: 0,
        }
    }

    fn chunk(&mut self, write: Option<u8>, is_damaged: bool) {
        let mut buffer = vec![0; 128 << 10];
        let pvm = &mut self.pvm;
        let mut write = write;
        let read = |number: u64, page: &mut Page| {
            *page = pvm.page(number as usize);
            if let Some(byte) = write.take() {
                // In the middle of the copy.
                page[..PAGE_BYTES / 2].fill(byte);
                pvm.write(number as usize, byte);
            }
            Ok::<_, Infallible>(())
        };
        let filled = self.ahead.fill_chunk(&mut buffer, &self.key, read).unwrap();
        if filled.pages == 0 {
            return;
        }
        if is_damaged {
            self.is_damaged = true;
            return;
        }
        let chunk = &buffer[..filled.length];
        self.area.take(chunk, &self.key).unwrap();
        // Unless a word about what is to be forgotten was lost.
        assert!(self.is_damaged || self.area.held_pages() <= self.limit_pages);
    }

    /// One checkpoint, as the capture, the outbound end and the stage make it.
    fn checkpoint(&mut self, fate: Fate) {
        let mut in_flight = PageBitmap::new(PAGES);
        self.pvm.take(&mut in_flight);
        self.ahead.captured(&in_flight);
        in_flight.merge(&self.owed);
        in_flight.merge(&self.svm.dirty);
        self.owed.clear();
        let image: Vec<Page> = (0..PAGES).map(|page| self.pvm.page(page)).collect();
        let kept: Vec<u64> = self.ahead.to_keep(&in_flight).iter().collect();
        let mut names = NameList::new(1 << 16);
        let mut named = 0;
        let (relied_on, history) = self.ahead.relied_on();
        for (number, digest) in relied_on {
            assert_eq!(
                digest,
                self.key.of(&image[number as usize]),
                "page {number}"
            );
            let is_equal = self.key.of(&self.svm.page(number as usize)) == digest;
            history.learn(number, is_equal);
            if !is_equal {
                names.push(number as u32, digest);
                named += 1;
            }
        }
        for &number in &kept {
            let is_equal = self.svm.page(number as usize) == image[number as usize];
            self.ahead.learn(number, is_equal);
        }
        let mut is_committed = fate == Fate::Committed;
        if fate != Fate::Unsent {
            self.area.begin();
            let accepted = self.area.name(names.finish(), &self.key);
            assert!(
                accepted.is_ok() || self.is_damaged,
                "refused without a reason: {accepted:?}"
            );
            is_committed &= accepted.is_ok();
        }
        if is_committed {
            for number in kept {
                let page = &image[number as usize];
                self.svm.ram.write_page(number as usize, page).unwrap();
            }
            self.area.write_named(&self.svm.ram).unwrap();
            self.area.clear();
            self.svm.dirty.clear();
            for (page, expected) in image.iter().enumerate() {
                assert!(self.svm.page(page) == *expected, "page {page}");
            }
            self.used += named;
        } else {
            self.owed.merge(&in_flight);
        }
        self.ahead.rest(self.now);
        self.is_damaged = false;
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(page, byte) => self.pvm.write(page, byte),
            Step::SvmWrite(page, byte) => self.svm.write(page, byte),
            Step::Round => {
                let pvm = &mut self.pvm;
                let take = |set: &mut PageBitmap| {
                    pvm.take(set);
                    Ok::<_, Infallible>(())
                };
                self.ahead.round(&mut self.owed, self.now, take).unwrap();
            }
            Step::Rumour(page, is_equal) => self.ahead.learn(page as u64, is_equal),
            Step::Chunk(write, is_damaged) => self.chunk(write, is_damaged),
            Step::Checkpoint(fate) => self.checkpoint(fate),
        }
    }
}

proptest! {
    #[test]
    fn rules_13_and_14_a_commit_gives_the_captured_image_whatever_was_sent_ahead(
        limit_pages in 1usize..=PAGES,
        steps in proptest::collection::vec(any_step(), 0..150),
    ) {
        let mut life = Life::new(limit_pages);
        for step in steps {
            life.step(step);
        }
        life.checkpoint(Fate::Committed);
        // One that was refused is followed by one that names nothing from before.
        life.checkpoint(Fate::Committed);
    }
}

#[test]
fn a_set_that_was_left_alone_is_all_named() {
    let mut life = Life::new(PAGES);
    for page in 0..PAGES {
        life.pvm.write(page, page as u8);
    }
    life.step(Step::Round);
    life.step(Step::Round);
    for _ in 0..PAGES {
        life.step(Step::Chunk(None, false));
    }
    life.checkpoint(Fate::Committed);
    // Page 0 was zeros before.
    assert_eq!(life.used, PAGES as u64 - 1);
    assert_eq!(life.area.counters().used_pages, life.used);
}
