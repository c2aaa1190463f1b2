//! How each page of a checkpoint travels, if at all.
//!
//! ```text
//! zeros?  -> the SVM has zeros: dropped, else a flag
//! digest  -> the SVM has the same, by its digest, or not dirty there and the last commit had the same: dropped
//! base known to both sides -> delta, where small enough
//! link is the bottleneck   -> LZ4, where small enough
//! raw
//! ```
//!
//! Invariants: a page is dropped or sent as a delta only on what is known of the SVM's page: its digest, or that it was
//! not written since the commit that the base is of (then the base *is* the SVM's page). Nothing is concluded from a digest
//! that has not come.
//!
//! Does not do input or output, and does not look into the cache: the caller says what is known.

use super::compress::Lz4;
use super::counters::PageCounters;
use super::payoff::Payoff;
use super::zero::is_zero;
use super::{Kind, Page, PageDigest, PageKey, Payload, SvmPage, delta};
use crate::checkpoint::pages::PAGE_BYTES;

/// A delta or a compressed page that is longer goes raw: it would save little and cost the other side time.
pub const SMALL_MAX_BYTES: usize = PAGE_BYTES * 3 / 4;
/// What is smaller is no reason to send a page before it is needed.
const CHEAP_MAX_BYTES: usize = PAGE_BYTES / 8;
/// What it takes to keep a page for the next checkpoint, about: a copy into memory that is in no cache.
const KEEPING_NS: u64 = 300;
/// A delta takes about as long as a few readings of the clock.
const DELTA_TIMED_ONE_IN: u32 = 8;

/// A page as of the last committed checkpoint, from [`super::PageCache`].
#[derive(Debug, Clone, Copy)]
pub struct Base<'a> {
    /// Its bytes.
    pub page: &'a Page,
    /// Their digest.
    pub digest: PageDigest,
}

/// What is known of a page besides its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The SVM's.
    pub svm: SvmPage,
    /// The last commit's.
    pub base: Option<Base<'a>>,
}

impl<'a> Known<'a> {
    /// What the SVM's page has for a digest, if that is known.
    fn svm_digest(&self) -> Option<PageDigest> {
        match self.svm {
            SvmPage::Dirty(digest) => Some(digest),
            SvmPage::Clean => self.base.map(|base| base.digest),
            SvmPage::Pending => None,
        }
    }

    /// The base, if the SVM's page has these bytes.
    fn common_base(&self) -> Option<&'a Page> {
        let base = self.base?;
        (self.svm_digest() == Some(base.digest)).then_some(base.page)
    }
}

/// The state of the link to the secondary.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// What it carries, as measured.
    pub bytes_per_s: u64,
    /// Send buffers wait for the link rather than the link for pages: compression may pay.
    pub is_bottleneck: bool,
}

/// What becomes of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice<'a> {
    /// Dropped: the SVM has the same.
    Equal {
        /// Of the page.
        digest: PageDigest,
    },
    /// Goes into a record.
    Send {
        /// How.
        payload: Payload<'a>,
        /// Of the page.
        digest: PageDigest,
    },
}

impl Choice<'_> {
    /// What has to travel is nothing, or little beside a page. One that is sent only to prove something counts as nothing.
    pub fn is_cheap(&self) -> bool {
        match self {
            Self::Equal { .. } => true,
            Self::Send { payload, .. } => {
                payload.kind() == Kind::Same || payload.data().len() <= CHEAP_MAX_BYTES
            }
        }
    }
}

/// Decides about pages; has all the memory that this takes.
#[derive(Debug)]
pub struct Chooser {
    key: PageKey,
    /// One in so many equal pages is sent to be compared; 0: none.
    verify_one_in: u32,
    equal_since_proof: u32,
    shrinker: Shrinker,
    /// What pages of the last commit are good for. Where both VMs write to the same pages, the SVM has none of them any more.
    bases: Payoff,
    /// The SVM has written nothing: each of them is good.
    svm_is_clean: bool,
    counters: PageCounters,
}

impl Chooser {
    /// With a session's key. One in `verify_one_in` equal pages is sent all the same and compared there (verifying mode); 0:
    /// none, 1: all.
    pub fn new(key: PageKey, verify_one_in: u32) -> Self {
        Self {
            key,
            verify_one_in,
            equal_since_proof: 0,
            shrinker: Shrinker::new(),
            bases: Payoff::new(1),
            svm_is_clean: false,
            counters: PageCounters::default(),
        }
    }

    /// A checkpoint begins. `svm_is_clean`: the SVM has written nothing since the last one.
    pub fn begin(&mut self, svm_is_clean: bool) {
        self.svm_is_clean = svm_is_clean;
    }

    /// The session's key.
    pub fn key(&self) -> &PageKey {
        &self.key
    }

    /// False while deltas rest, or bases were of no use. They would then serve only to find pages equal that the SVM did not
    /// write, and a caller may save the copies into the cache.
    pub fn wants_bases(&self) -> bool {
        let are_good = self.svm_is_clean || !self.bases.is_resting();
        are_good && !self.shrinker.delta_payoff.is_resting()
    }

    /// What was decided so far.
    pub fn counters(&self) -> PageCounters {
        PageCounters {
            delta_attempts: self.shrinker.delta_payoff.counter(),
            lz4_attempts: self.shrinker.lz4_payoff.counter(),
            base_attempts: self.bases.counter(),
            ..self.counters
        }
    }

    /// Decides about a page. `now_ns` reads a clock that only goes forward.
    pub fn choose<'a>(
        &'a mut self,
        page: &'a Page,
        known: &Known<'_>,
        link: Link,
        now_ns: impl FnMut() -> u64,
    ) -> Choice<'a> {
        let digest = match is_zero(page) {
            true => self.key.of_zeros(),
            false => self.key.of(page),
        };
        self.choose_digested((page, digest), known, link, now_ns)
    }

    /// The same about a page of which somebody has computed the digest.
    pub fn choose_digested<'a>(
        &'a mut self,
        (page, digest): (&'a Page, PageDigest),
        known: &Known<'_>,
        link: Link,
        mut now_ns: impl FnMut() -> u64,
    ) -> Choice<'a> {
        self.counters.late_digests += u64::from(known.svm == SvmPage::Pending);
        let is_zero = digest == self.key.of_zeros();
        let is_equal = known.svm_digest() == Some(digest);
        let by_base = is_equal && known.svm == SvmPage::Clean;
        // While deltas rest, nothing is tried with a base.
        let is_tried = self.bases.allows() && known.base.is_some() && self.wants_bases();
        if is_equal && !self.has_to_prove() {
            if is_tried {
                let saved = by_base.then_some(PAGE_BYTES);
                self.bases.note(link.bytes_per_s, KEEPING_NS, saved);
            }
            self.counters.equal += 1;
            return Choice::Equal { digest };
        }
        let payload = match (is_equal, is_zero) {
            (true, _) => Payload::Same(page),
            (false, true) => Payload::Zero,
            (false, false) => {
                let base = known.common_base();
                self.shrinker.shrink(page, base, link, &mut now_ns)
            }
        };
        let (kind, bytes) = (payload.kind(), payload.data().len());
        if is_tried {
            let saved = match kind {
                Kind::Delta => Some(PAGE_BYTES - bytes),
                Kind::Same if by_base => Some(PAGE_BYTES),
                _ => None,
            };
            self.bases.note(link.bytes_per_s, KEEPING_NS, saved);
        }
        self.counters.count(kind, bytes);
        Choice::Send { payload, digest }
    }

    fn has_to_prove(&mut self) -> bool {
        self.equal_since_proof += 1;
        let has_to = self.equal_since_proof == self.verify_one_in;
        if has_to || self.verify_one_in == 0 {
            self.equal_since_proof = 0;
        }
        has_to
    }
}

/// Makes pages smaller where that pays.
#[derive(Debug)]
struct Shrinker {
    delta: Box<[u8; SMALL_MAX_BYTES]>,
    delta_payoff: Payoff,
    lz4: Lz4,
    lz4_payoff: Payoff,
}

impl Shrinker {
    fn new() -> Self {
        Self {
            delta: Box::new([0; _]),
            delta_payoff: Payoff::new(DELTA_TIMED_ONE_IN),
            lz4: Lz4::new(),
            lz4_payoff: Payoff::new(1),
        }
    }

    fn shrink<'a>(
        &'a mut self,
        page: &'a Page,
        base: Option<&Page>,
        link: Link,
        now_ns: &mut impl FnMut() -> u64,
    ) -> Payload<'a> {
        // A rest ends by pages that have no base as well: without attempts nobody keeps bases.
        let is_allowed = self.delta_payoff.allows();
        if let Some(base) = base.filter(|_| is_allowed) {
            let room = &mut self.delta[..];
            let bytes = self
                .delta_payoff
                .attempt(link.bytes_per_s, now_ns, move || {
                    let len = delta::encode(base, page, room)?;
                    Some(&room[..len])
                });
            if let Some(bytes) = bytes {
                return Payload::Delta(bytes);
            }
        }
        if link.is_bottleneck && self.lz4_payoff.allows() {
            let lz4 = &mut self.lz4;
            let bytes = self.lz4_payoff.attempt(link.bytes_per_s, now_ns, move || {
                lz4.compress(page, SMALL_MAX_BYTES)
            });
            if let Some(bytes) = bytes {
                return Payload::Lz4(bytes);
            }
        }
        Payload::Raw(page)
    }
}

#[cfg(test)]
mod tests {
    use super::super::PageCache;
    use super::super::payoff::REST_MIN_PAGES;
    use super::super::testing::noise;
    use super::*;

    const IDLE: Link = Link {
        bytes_per_s: 1_000_000_000,
        is_bottleneck: false,
    };
    const BUSY: Link = Link {
        is_bottleneck: true,
        ..IDLE
    };
    const ZEROS: Page = [0; PAGE_BYTES];
    const TEXT: Page = [b'x'; PAGE_BYTES];

    fn key() -> PageKey {
        PageKey::new([7; 16])
    }

    fn chooser() -> Chooser {
        Chooser::new(key(), 0)
    }

    fn base(page: &Page) -> Option<Base<'_>> {
        let digest = key().of(page);
        Some(Base { page, digest })
    }

    /// What is chosen on a free processor.
    fn kind(chooser: &mut Chooser, page: &Page, known: Known<'_>, link: Link) -> Option<Kind> {
        match chooser.choose(page, &known, link, || 0) {
            Choice::Equal { digest } => {
                assert_eq!(digest, key().of(page));
                None
            }
            Choice::Send { payload, digest } => {
                assert_eq!(digest, key().of(page));
                Some(payload.kind())
            }
        }
    }

    fn nudged(page: &Page) -> Page {
        let mut page = *page;
        page[100] ^= 1;
        page
    }

    #[test]
    fn what_the_svm_has_is_dropped() {
        let mut chooser = chooser();
        for page in [noise(1), ZEROS] {
            let svm = SvmPage::Dirty(key().of(&page));
            let by_digest = Known { svm, base: None };
            assert_eq!(kind(&mut chooser, &page, by_digest, BUSY), None);
            let by_commit = Known {
                svm: SvmPage::Clean,
                base: base(&page),
            };
            assert_eq!(kind(&mut chooser, &page, by_commit, BUSY), None);
        }
        assert_eq!(chooser.counters().equal, 4);
        assert_eq!(chooser.counters().bytes_before(), 4 * 4096);
        assert_eq!(chooser.counters().bytes_after(), 0);
    }

    #[test]
    fn a_base_counts_only_while_the_svm_has_it() {
        let old = noise(1);
        let page = nudged(&old);
        let other = SvmPage::Dirty(key().of(&noise(2)));
        let same = SvmPage::Dirty(key().of(&old));
        let cases = [
            (SvmPage::Clean, Kind::Delta),
            (same, Kind::Delta),
            (other, Kind::Raw),
            (SvmPage::Pending, Kind::Raw),
        ];
        let mut chooser = chooser();
        for (svm, expected) in cases {
            let base = base(&old);
            let chosen = kind(&mut chooser, &page, Known { svm, base }, IDLE);
            assert_eq!(chosen, Some(expected), "{svm:?}");
            // The page of the last commit says nothing of what the SVM has written over it.
            let chosen = kind(&mut chooser, &old, Known { svm, base }, IDLE);
            let dropped = svm == SvmPage::Clean || svm == same;
            assert_eq!(chosen.is_none(), dropped, "{svm:?}");
        }
        assert_eq!(chooser.counters().late_digests, 2);
    }

    #[test]
    fn zeros_are_a_flag_and_only_a_busy_link_compresses() {
        let mut chooser = chooser();
        let known = Known {
            svm: SvmPage::Clean,
            base: None,
        };
        assert_eq!(kind(&mut chooser, &ZEROS, known, BUSY), Some(Kind::Zero));
        assert_eq!(kind(&mut chooser, &TEXT, known, IDLE), Some(Kind::Raw));
        assert_eq!(kind(&mut chooser, &TEXT, known, BUSY), Some(Kind::Lz4));
        assert_eq!(kind(&mut chooser, &noise(1), known, BUSY), Some(Kind::Raw));
        let base = base(&ZEROS);
        let known = Known { base, ..known };
        assert_eq!(kind(&mut chooser, &TEXT, known, BUSY), Some(Kind::Lz4));
        let counters = chooser.counters();
        assert_eq!(counters.bytes_before(), 5 * 4096);
        let lz4 = counters.by_kind(Kind::Lz4);
        assert_eq!(lz4.pages, 2);
        assert_eq!(counters.bytes_after(), 2 * 4096 + lz4.bytes);
        assert_eq!(counters.delta_attempts.refused, 1);
        assert_eq!(counters.lz4_attempts.refused, 1);
    }

    #[test]
    fn cheap_is_what_is_dropped_or_nearly_so() {
        let (old, mut chooser) = (noise(1), chooser());
        let svm = SvmPage::Clean;
        let mut is_cheap = |page: &Page, base, link| {
            let known = Known { svm, base };
            chooser.choose(page, &known, link, || 0).is_cheap()
        };
        let mut half = old;
        half[..2048].copy_from_slice(&noise(2)[..2048]);
        assert!(is_cheap(&old, base(&old), IDLE), "equal");
        assert!(is_cheap(&nudged(&old), base(&old), IDLE), "a small delta");
        assert!(is_cheap(&ZEROS, None, IDLE), "a flag");
        assert!(is_cheap(&TEXT, None, BUSY), "compressed to next to nothing");
        assert!(!is_cheap(&half, base(&old), IDLE), "a large delta");
        assert!(!is_cheap(&old, None, IDLE), "all of it");
        let mut proving = Chooser::new(key(), 1);
        let known = Known {
            svm,
            base: base(&old),
        };
        let proof = proving.choose(&old, &known, IDLE, || 0);
        assert!(matches!(proof, Choice::Send { .. }) && proof.is_cheap());
    }

    #[test]
    fn what_does_not_pay_rests() {
        let mut chooser = chooser();
        let mut now_ns = 0;
        let old = noise(1);
        let page = nudged(&old);
        let known = Known {
            svm: SvmPage::Clean,
            base: base(&old),
        };
        let mut kinds = Vec::new();
        for _ in 0..100 {
            // Each look at the clock finds it 10 us later, and the link carries a page in 4.
            let slow = || {
                now_ns += 10_000;
                now_ns
            };
            match chooser.choose(&page, &known, IDLE, slow) {
                Choice::Send { payload, .. } => kinds.push(payload.kind()),
                Choice::Equal { .. } => panic!("dropped"),
            }
        }
        assert!(kinds[..64].iter().all(|&kind| kind == Kind::Delta));
        assert!(kinds[64..].iter().all(|&kind| kind == Kind::Raw));
        assert!(!chooser.wants_bases());
        assert_eq!(chooser.counters().delta_attempts.rested, 36);
    }

    /// One checkpoint after the other of the same few pages, each changed a little. The sender keeps a page as a base while
    /// deltas are wanted, and gives the older base up otherwise. Gives the deltas of each checkpoint.
    fn deltas(chooser: &mut Chooser, cache: &mut PageCache, checkpoints: u8, ns: u64) -> Vec<u32> {
        let mut now_ns = 0;
        let one = |seed| {
            let mut deltas = 0;
            for number in 0..8 {
                let mut page = noise(number);
                page[..8].fill(seed);
                let known = Known {
                    svm: SvmPage::Clean,
                    base: cache.get(number),
                };
                let clock = || {
                    now_ns += ns;
                    now_ns
                };
                let choice = chooser.choose(&page, &known, IDLE, clock);
                let Choice::Send { payload, digest } = choice else {
                    panic!("dropped")
                };
                deltas += u32::from(payload.kind() == Kind::Delta);
                match chooser.wants_bases() {
                    true => drop(cache.insert(number, &page, digest)),
                    false => cache.supersede(number),
                }
            }
            cache.commit();
            deltas
        };
        (0..checkpoints).map(one).collect()
    }

    #[test]
    fn deltas_that_rested_come_back_though_no_base_was_kept_meanwhile() {
        let (mut chooser, mut cache) = (chooser(), PageCache::new(1, 8));
        // Slow until they rest.
        let slow = deltas(&mut chooser, &mut cache, 9, 10_000);
        assert_eq!(slow, [0, 8, 8, 8, 8, 8, 8, 8, 8]);
        assert!(!chooser.wants_bases());
        let fast = deltas(&mut chooser, &mut cache, 100, 0);
        let rest = REST_MIN_PAGES as usize / 8;
        assert!(fast[..rest].iter().all(|&deltas| deltas == 0), "{fast:?}");
        // One checkpoint without bases, or with few, and all is as before.
        assert!(
            fast[rest + 1..].iter().all(|&deltas| deltas == 8),
            "{fast:?}"
        );
    }

    #[test]
    fn bases_that_the_svm_has_written_over_are_not_kept_for_long() {
        let (mut chooser, mut cache) = (chooser(), PageCache::new(1, 8));
        // Both VMs write to the same pages, and not the same.
        let mut differ = |chooser: &mut Chooser| {
            let mut kept = 0;
            chooser.begin(false);
            for number in 0..8 {
                let page = noise(number);
                let svm = SvmPage::Dirty(key().of(&noise(100 + number)));
                let base = cache.get(number);
                let chosen = kind(chooser, &page, Known { svm, base }, IDLE);
                assert_eq!(chosen, Some(Kind::Raw));
                kept += u32::from(chooser.wants_bases());
                match chooser.wants_bases() {
                    true => drop(cache.insert(number, &page, key().of(&page))),
                    false => cache.supersede(number),
                }
            }
            cache.commit();
            kept
        };
        let kept: Vec<_> = (0..100).map(|_| differ(&mut chooser)).collect();
        // The first has none to find, the next eight are a window, the rest is the first of rests.
        assert!(kept[..8].iter().all(|&kept| kept == 8), "{kept:?}");
        let rest = 9 + REST_MIN_PAGES as usize / 8;
        assert!(kept[9..rest - 1].iter().all(|&kept| kept == 0), "{kept:?}");
        assert!(kept[rest..rest + 8].iter().all(|&kept| kept == 8));
        assert!(!chooser.wants_bases());
        let counter = chooser.counters().base_attempts;
        assert_eq!(counter.rests, 2);
        assert_eq!((counter.tried, counter.refused), (128, 128));
        // An SVM that stands still has all of them, whatever was before.
        chooser.begin(true);
        assert!(chooser.wants_bases());
        let found = deltas(&mut chooser, &mut cache, 3, 0);
        assert_eq!(found, [0, 8, 8]);
        chooser.begin(false);
        assert!(!chooser.wants_bases(), "not for those that it writes");
    }

    #[test]
    fn the_verifying_mode_sends_some_equal_pages() {
        let page = noise(1);
        let svm = SvmPage::Dirty(key().of(&page));
        let known = Known { svm, base: None };
        let proofs = |one_in| {
            let mut chooser = Chooser::new(key(), one_in);
            let kinds: Vec<_> = (0..6)
                .map(|_| kind(&mut chooser, &page, known, IDLE))
                .collect();
            kinds.iter().filter(|&&k| k == Some(Kind::Same)).count()
        };
        assert_eq!([0, 1, 2, 3].map(proofs), [0, 6, 3, 2]);
    }
}
