//! Whether a page is worth sending ahead, by what became of it before (sans-IO).
//!
//! Three things hold a page back that was left alone for a round: it was cheap in the last checkpoint that had it, for the SVM
//! had the same or nearly the same; it was written again after it had gone ahead, and has to be left alone for longer
//! now, twice as long each time; of the pages of its kind (never in a checkpoint before, or not cheap the last time) more
//! than half turned out cheap. A checkpoint decides about all its pages, whether they went ahead or not, so it shows what
//! should have gone: nothing is sent only to find out.
//!
//! Invariants: this decides what is sent and never what is relied on, so a guess that is wrong costs bytes or time and
//! changes no image (rules 13 and 14); between two checkpoints a page that is written again and again goes a limited number of
//! times, and then once in [`PATIENCE_MAX`] rounds at most.
//!
//! Does not know which pages are owed, nor what was sent.

use crate::checkpoint::pages::PageBitmap;

/// The longest time that a page has to be left alone is two to the power of this, in rounds.
const PATIENCE_MAX_LOG2: u8 = 7;
/// The same as a number of rounds.
pub const PATIENCE_MAX: u32 = 1 << PATIENCE_MAX_LOG2;

/// What became of the pages of a kind in checkpoints.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    dear: u64,
    cheap: u64,
}

impl Tally {
    fn count(&mut self, is_cheap: bool) {
        match is_cheap {
            true => self.cheap += 1,
            false => self.dear += 1,
        }
    }

    /// What is older counts half; a checkpoint without such pages says nothing.
    fn follow(&mut self, latest: Self) {
        if latest.dear + latest.cheap > 0 {
            self.dear = self.dear / 2 + latest.dear;
            self.cheap = self.cheap / 2 + latest.cheap;
        }
    }

    fn pays(self) -> bool {
        self.dear >= self.cheap
    }
}

/// What is known of the pages of a guest.
#[derive(Debug)]
pub struct History {
    /// In a checkpoint at least once,
    known: PageBitmap,
    /// and cheap the last time.
    cheap: PageBitmap,
    /// Owed, and not written for a round or more.
    left_alone: PageBitmap,
    /// Those that one round does not suffice for.
    patient: PageBitmap,
    /// For these, two to the power of this rounds do.
    patience_log2: Vec<u8>,
    /// For these, the last round whose log had them.
    written_in: Vec<u32>,
    round: u32,
    /// Of pages never in a checkpoint before, and of those that were not cheap.
    tallies: [Tally; 2],
    latest: [Tally; 2],
}

impl History {
    /// Of a guest of so many pages, of which nothing is known.
    pub fn new(pages: usize) -> Self {
        Self {
            known: PageBitmap::new(pages),
            cheap: PageBitmap::new(pages),
            left_alone: PageBitmap::new(pages),
            patient: PageBitmap::new(pages),
            patience_log2: vec![0; pages],
            written_in: vec![0; pages],
            round: 0,
            tallies: [Tally::default(); 2],
            latest: [Tally::default(); 2],
        }
    }

    /// A round has found these pages in the log.
    pub fn round(&mut self, written: &PageBitmap) {
        self.round = self.round.wrapping_add(1);
        self.written(written);
        for (at, word) in written.set_words() {
            for number in bits(at, word & self.patient.word(at)) {
                self.written_in[number] = self.round;
            }
        }
    }

    /// The log has these pages.
    pub fn written(&mut self, written: &PageBitmap) {
        for (at, word) in written.set_words() {
            self.left_alone.remove(at, word);
        }
    }

    /// These of one word were written after they had gone ahead.
    pub fn wasted(&mut self, at: usize, pages: u64) {
        self.patient.add(at, pages);
        for number in bits(at, pages) {
            let patience = &mut self.patience_log2[number];
            *patience = (*patience + 1).min(PATIENCE_MAX_LOG2);
            self.written_in[number] = self.round;
        }
    }

    /// Of one word these were left alone in this round. Gives those that are worth sending, and how many of the others are new
    /// among those held back.
    pub fn admit(&mut self, at: usize, pages: u64) -> (u64, u32) {
        let known = self.known.word(at);
        let [first, again] = self.tallies.map(|tally| match tally.pays() {
            true => u64::MAX,
            false => 0,
        });
        let mut admitted = pages & !self.cheap.word(at) & (known | first) & (!known | again);
        for number in bits(at, admitted & self.patient.word(at)) {
            let rounds = self.round.wrapping_sub(self.written_in[number]);
            if rounds < 1 << self.patience_log2[number] {
                admitted &= !(1 << (number % 64));
            }
        }
        let held_back = pages & !admitted & !self.left_alone.word(at);
        self.left_alone.add(at, pages);
        (admitted, held_back.count_ones())
    }

    /// A checkpoint has decided about a page: it is dropped or nearly so, or it has to travel.
    pub fn learn(&mut self, number: u64, is_cheap: bool) {
        let (at, bit) = (number as usize / 64, 1 << (number % 64));
        let was_known = self.known.word(at) & bit != 0;
        let was_cheap = self.cheap.word(at) & bit != 0;
        self.known.add(at, bit);
        match is_cheap {
            true => _ = self.cheap.add(at, bit),
            false => self.cheap.remove(at, bit),
        }
        if self.left_alone.word(at) & bit == 0 {
            return;
        }
        if !was_cheap {
            self.latest[usize::from(was_known)].count(is_cheap);
        }
        // It would have held, had it been sent.
        if self.patient.word(at) & bit != 0 {
            let patience = &mut self.patience_log2[number as usize];
            *patience -= 1;
            if *patience == 0 {
                self.patient.remove(at, bit);
            }
        }
    }

    /// A checkpoint has ended.
    pub fn rest(&mut self) {
        for (tally, latest) in self.tallies.iter_mut().zip(&mut self.latest) {
            tally.follow(std::mem::take(latest));
        }
        self.left_alone.clear();
    }
}

/// The pages of a word.
fn bits(at: usize, word: u64) -> impl Iterator<Item = usize> {
    let mut rest = word;
    std::iter::from_fn(move || {
        let bit = (rest != 0).then(|| rest.trailing_zeros() as usize)?;
        rest &= rest - 1;
        Some(at * 64 + bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 64;
    const ALL: u64 = u64::MAX;

    fn history() -> History {
        History::new(PAGES as usize)
    }

    /// A checkpoint of pages that were left alone; gives what would have gone ahead.
    fn of_word(pages: u64) -> PageBitmap {
        let mut set = PageBitmap::new(64);
        set.add(0, pages);
        set
    }

    fn checkpoint(h: &mut History, pages: u64, is_cheap: impl Fn(u64) -> bool) -> u64 {
        h.round(&of_word(pages));
        h.round(&of_word(0));
        let (admitted, _) = h.admit(0, pages);
        for number in bits(0, pages) {
            h.learn(number as u64, is_cheap(number as u64));
        }
        h.rest();
        admitted
    }

    #[test]
    fn a_page_that_the_svm_had_is_held_back_until_a_checkpoint_finds_it_to_differ() {
        let mut h = history();
        assert_eq!(
            checkpoint(&mut h, ALL, |n| n < 16),
            ALL,
            "nothing is known yet"
        );
        let differing = ALL << 16;
        assert_eq!(checkpoint(&mut h, ALL, |n| n < 16), differing);
        // Page 3 differs this time: it was held back, and goes from now on.
        assert_eq!(checkpoint(&mut h, ALL, |n| n < 16 && n != 3), differing);
        assert_eq!(checkpoint(&mut h, ALL, |n| n < 16 && n != 3), differing | 8);
    }

    #[test]
    fn three_quarters_equal_in_the_same_places_send_the_rest_ahead_and_no_more() {
        let mut h = history();
        let is_cheap = |n: u64| !n.is_multiple_of(4);
        checkpoint(&mut h, ALL, is_cheap);
        for _ in 0..3 {
            let ahead = checkpoint(&mut h, ALL, is_cheap);
            assert_eq!(ahead, 0x1111_1111_1111_1111);
        }
    }

    #[test]
    fn three_quarters_equal_in_changing_places_send_nothing_ahead() {
        let mut h = history();
        checkpoint(&mut h, ALL, |n| !n.is_multiple_of(4));
        let sent: u32 = (1..9)
            .map(|turn| checkpoint(&mut h, ALL, |n| !(n + turn).is_multiple_of(4)).count_ones())
            .sum();
        // Once, those that differed in the first.
        assert_eq!(sent, 16);
        // And when they differ again, the checkpoints alone show it.
        checkpoint(&mut h, ALL, |_| false);
        assert_eq!(checkpoint(&mut h, ALL, |_| false), ALL);
    }

    #[test]
    fn pages_that_come_for_the_first_time_are_judged_by_their_likes() {
        let mut h = history();
        assert_eq!(checkpoint(&mut h, 0xff, |_| true), 0xff);
        assert_eq!(
            checkpoint(&mut h, 0xff00, |_| true),
            0,
            "the first were equal"
        );
        assert_eq!(checkpoint(&mut h, 0xff_0000, |_| false), 0);
        // Of the latest more differ; what is older counts half.
        assert_eq!(checkpoint(&mut h, 0xff00_0000, |_| false), 0xff00_0000);
        // What was written until the last moment says nothing.
        let mut h = history();
        h.round(&of_word(0xff));
        (0..8).for_each(|n| h.learn(n, true));
        h.rest();
        assert_eq!(checkpoint(&mut h, 0xff00, |_| true), 0xff00);
    }

    /// One round; gives whether page 0 goes, and so is sent.
    fn goes(h: &mut History, is_sent: &mut bool, is_written: bool) -> bool {
        h.round(&of_word(u64::from(is_written)));
        if is_written {
            h.wasted(0, u64::from(std::mem::take(is_sent)));
            return false;
        }
        let (admitted, _) = h.admit(0, u64::from(!*is_sent));
        *is_sent |= admitted == 1;
        admitted == 1
    }

    #[test]
    fn what_is_written_again_after_it_went_has_to_be_left_alone_twice_as_long() {
        let mut h = history();
        let mut is_sent = false;
        for wait in [1, 2, 4, 8, 16, 32, 64, 128, 128] {
            goes(&mut h, &mut is_sent, true);
            let waited = (1..).find(|_| goes(&mut h, &mut is_sent, false));
            assert_eq!(waited, Some(wait));
        }
        // Written while it waits: that time counts from anew.
        goes(&mut h, &mut is_sent, true);
        assert!((1..PATIENCE_MAX).all(|_| !goes(&mut h, &mut is_sent, false)));
        goes(&mut h, &mut is_sent, true);
        assert!((1..PATIENCE_MAX).all(|_| !goes(&mut h, &mut is_sent, false)));
        assert!(goes(&mut h, &mut is_sent, false));
        // Each checkpoint that finds it left alone halves the wait, sent or not.
        for _ in 0..PATIENCE_MAX_LOG2 {
            assert_eq!(h.patient.words(), [1]);
            h.round(&of_word(1));
            h.round(&of_word(0));
            h.admit(0, 1);
            h.learn(0, false);
            h.rest();
        }
        assert_eq!(h.patient.words(), [0]);
    }

    #[test]
    fn a_page_that_is_written_all_the_time_goes_a_limited_number_of_times() {
        let mut h = history();
        let mut is_sent = false;
        // Written in every third round, for ten minutes of rounds.
        let sent = (0..6000_u32).filter(|n| goes(&mut h, &mut is_sent, n.is_multiple_of(3)));
        assert_eq!(sent.count(), 2, "after one round, after two, never again");
    }

    #[test]
    fn what_is_held_back_is_counted_once_while_it_is_left_alone() {
        let mut h = history();
        checkpoint(&mut h, 3, |_| true);
        h.round(&of_word(3));
        h.round(&of_word(0));
        assert_eq!(h.admit(0, 3), (0, 2));
        h.round(&of_word(0));
        assert_eq!(h.admit(0, 3), (0, 0));
        h.round(&of_word(1));
        assert_eq!(h.admit(0, 2), (0, 0));
        h.round(&of_word(0));
        assert_eq!(h.admit(0, 3), (0, 1));
    }
}
