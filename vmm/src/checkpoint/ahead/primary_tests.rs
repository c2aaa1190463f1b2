use std::convert::Infallible;

use super::super::wire::AheadChunk;
use super::*;
use crate::checkpoint::codec::Decoder;

const PAGES: usize = 1024;
const SETTINGS: AheadSettings = AheadSettings {
    interval: Duration::from_millis(100),
    mib_per_s: 0,
};

/// An [`Ahead`] with a clock and what is owed.
struct Bench {
    ahead: Ahead,
    owed: PageBitmap,
    now: Instant,
}

impl Bench {
    fn new(limit_pages: usize) -> Self {
        let mut ahead = Ahead::new(PAGES, 1, SETTINGS).unwrap();
        ahead.limit_pages = limit_pages;
        let now = Instant::now();
        ahead.rest(now);
        Self {
            ahead,
            owed: PageBitmap::new(PAGES),
            now,
        }
    }

    /// The next round, in which these pages were written. Gives how long after the one before.
    fn round(&mut self, written: &[u64]) -> Duration {
        let at = self.ahead.round_at.unwrap();
        let waited = at - self.now;
        self.now = at;
        assert!(self.ahead.is_round_due(at));
        let set = set_of(written);
        let take = |bitmap: &mut PageBitmap| {
            bitmap.merge(&set);
            Ok::<_, Infallible>(())
        };
        self.ahead.round(&mut self.owed, at, take).unwrap();
        waited
    }

    /// Sends all that is due. Gives what was sent and what was to be forgotten.
    fn send(&mut self) -> (Vec<u64>, Vec<u32>) {
        let key = PageKey::new([1; 16]);
        let mut buffer = vec![0; 128 << 10];
        let (mut sent, mut forgotten) = (Vec::new(), Vec::new());
        loop {
            let read = |number: u64, page: &mut Page| {
                page.fill(number as u8);
                Ok::<_, Infallible>(())
            };
            let filled = self.ahead.fill_chunk(&mut buffer, &key, read).unwrap();
            if filled.pages == 0 {
                return (sent, forgotten);
            }
            assert!(filled.pages as usize <= CHUNK_PAGES && filled.length > HEAD_BYTES);
            let chunk = AheadChunk::from_bytes(&buffer[..filled.length]).unwrap();
            forgotten.extend(chunk.forget());
            let records = Decoder::new(chunk.records, PAGES as u64).unwrap();
            sent.extend(records.map(|record| record.unwrap().number));
        }
    }

    fn sent(&self) -> Vec<u64> {
        self.ahead.sent().iter().collect()
    }
}

fn set_of(pages: &[u64]) -> PageBitmap {
    let mut set = PageBitmap::new(PAGES);
    for page in pages {
        set.add(*page as usize / 64, 1 << (page % 64));
    }
    set
}

#[test]
fn a_page_goes_once_it_was_left_alone_for_a_round() {
    let mut b = Bench::new(PAGES);
    b.round(&[1, 2, 3]);
    assert!(b.send().0.is_empty(), "nothing is known of them yet");
    b.round(&[2, 700]);
    assert_eq!(b.send().0, [1, 3]);
    // Hot as long as each round writes it.
    b.round(&[2]);
    assert_eq!(b.send().0, [700]);
    b.round(&[]);
    assert_eq!(b.send().0, [2]);
    assert_eq!(b.sent(), [1, 2, 3, 700]);
    b.round(&[]);
    assert!(b.send().0.is_empty(), "each goes once");
    assert_eq!(b.owed, set_of(&[1, 2, 3, 700]));
}

#[test]
fn what_is_written_again_is_not_relied_on_and_goes_again() {
    let mut b = Bench::new(PAGES);
    b.round(&[1, 2, 3]);
    b.round(&[]);
    b.send();
    b.round(&[2]);
    assert_eq!(b.sent(), [1, 3]);
    b.round(&[]);
    assert!(b.send().0.is_empty(), "it was sent too soon before");
    b.round(&[]);
    assert_eq!(b.send().0, [2]);
    let union = set_of(&[1, 2, 3, 4, 5]);
    b.ahead.captured(&set_of(&[3, 4]));
    assert_eq!(b.sent(), [1, 2]);
    assert_eq!(*b.ahead.to_keep(&union), set_of(&[3, 4, 5]));
    let counters = b.ahead.take_counters();
    assert_eq!((counters.sent_pages, counters.wasted_pages), (4, 2));
    assert_eq!(b.ahead.take_counters(), AheadCounters::default());
}

#[test]
fn what_the_svm_had_in_the_last_checkpoint_is_held_back_and_counted() {
    let mut b = Bench::new(PAGES);
    let set: Vec<u64> = (0..100).collect();
    let is_cheap = |page: &u64| !page.is_multiple_of(4);
    let mut sent = Vec::new();
    for _ in 0..3 {
        b.round(&set);
        b.round(&[]);
        sent.push(b.send().0.len());
        b.ahead.captured(&PageBitmap::new(PAGES));
        for page in &set {
            b.ahead.learn(*page, is_cheap(page));
        }
        b.owed.clear();
        b.ahead.rest(b.now);
    }
    assert_eq!(sent, [100, 25, 25]);
    assert_eq!(b.ahead.take_counters().held_back_pages, 150);
}

#[test]
fn rule_14_nothing_is_sent_during_a_checkpoint_nor_relied_on_after_it() {
    let mut b = Bench::new(PAGES);
    b.round(&[1, 2]);
    b.round(&[]);
    b.ahead.captured(&PageBitmap::new(PAGES));
    assert_eq!(b.ahead.next_at(), None);
    assert!(b.send().0.is_empty());
    let fill = b.ahead.fill;
    b.ahead.rest(b.now);
    assert!(b.sent().is_empty() && b.ahead.fill == fill + 1);
    // Aborted: what is owed still goes, in a fill of its own.
    b.round(&[]);
    assert_eq!(b.send().0, [1, 2]);
}

#[test]
fn invariant_6_the_area_is_never_overfilled_and_gives_stale_pages_up_first() {
    let mut b = Bench::new(4);
    b.round(&[1, 2, 3, 4, 5, 6]);
    b.round(&[]);
    assert_eq!(b.send(), (vec![1, 2, 3, 4], vec![]));
    assert_eq!(b.ahead.take_counters().refused_pages, 2);
    assert_eq!(
        b.ahead.next_at(),
        b.ahead.round_at,
        "nothing is left to try"
    );
    b.round(&[2, 3]);
    // Both are stale: 5 and 6 take their places. In the round after there is none for 2 and 3.
    assert_eq!(b.send(), (vec![5, 6], vec![2, 3]));
    b.round(&[]);
    b.round(&[]);
    assert_eq!(b.send(), (vec![], vec![]));
    assert_eq!(b.ahead.take_counters().refused_pages, 2);
    assert_eq!(b.sent(), [1, 4, 5, 6]);
    // One that is written gives its place up at once, or keeps it when it is due itself.
    b.round(&[5]);
    assert_eq!(b.send(), (vec![2], vec![5]));
    b.round(&[6]);
    b.round(&[]);
    b.round(&[]);
    assert_eq!(b.send(), (vec![6], vec![]));
}

#[test]
fn invariant_8_rounds_become_rare_where_they_find_nothing_or_cost_much() {
    let mut b = Bench::new(PAGES);
    let ms = Duration::from_millis;
    let hot: Vec<u64> = (0..10).collect();
    assert_eq!(b.round(&hot), ms(100));
    let waits: Vec<_> = (0..6).map(|_| b.round(&hot)).collect();
    assert_eq!(waits[..4], [ms(100), ms(200), ms(400), ms(800)]);
    assert_eq!(waits[4..], [ms(1000); 2]);
    // Something new: back to the usual pace.
    b.round(&[600]);
    assert_eq!(b.round(&[]), ms(100));
    let many: Vec<u64> = (0..1000).collect();
    b.round(&many);
    b.round(&many);
    assert_eq!(
        b.round(&many),
        ms(400),
        "a hundred times 1000 faults of 4 us"
    );
}

#[test]
fn the_link_is_shared() {
    let mut b = Bench::new(PAGES);
    assert_eq!(b.ahead.bytes_per_s(400 << 20), 100 << 20);
    b.round(&[1]);
    b.round(&[]);
    assert_eq!(b.ahead.next_at(), Some(b.now));
    b.ahead.chunk_sent(64 << 10, 64 << 20, b.now);
    let apart = b.ahead.next_at().unwrap() - b.now;
    assert_eq!(apart.as_micros(), 976);
    b.ahead.settings.mib_per_s = 3;
    assert_eq!(b.ahead.bytes_per_s(400 << 20), 3 << 20);
    assert!(Ahead::new(PAGES, 0, SETTINGS).is_none());
}

#[test]
fn a_log_that_fails_loses_no_page() {
    let mut b = Bench::new(PAGES);
    let take = |set: &mut PageBitmap| {
        set.add(0, 2);
        Err("no log")
    };
    assert!(b.ahead.round(&mut b.owed, b.now, take).is_err());
    assert_eq!(b.owed, set_of(&[1]));
}
