//! Digests of captured pages, computed on another core ahead of the thread that sends them.
//!
//! Batches are claimed by whoever comes first, so the sender never waits for a thread that does not run: what is not there
//! when it is needed the sender computes itself, and claims some batches beyond, so that the two do not run side by side.
//!
//! Invariants: a digest is read only after its batch was published; when [`Digester::end`] returns, this thread reads no
//! captured page any more; it stays so little ahead that a page is still in a cache when it is sent; where there is one core,
//! there is no thread.
//!
//! Does not decide what becomes of a page.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle, Thread};

use super::channel::Keeper;
use super::codec::digest::{DIGEST_BYTES, KEY_BYTES};
use super::codec::{PageDigest, PageKey};
use super::pages::PAGE_BYTES;

/// Pages that are claimed together.
const BATCH_PAGES: u32 = 32;
/// Batches that a sender claims when it has caught up.
const OVERTAKEN: u32 = 4;
/// The thread rests when it is so many batches ahead (8 MiB), and goes on at half of that.
const AHEAD_MAX: u32 = 64;
/// Below so many pages waking the thread costs more than it saves.
const PAGES_MIN: u32 = 256;

/// One capture's digests.
#[derive(Debug)]
struct Run {
    keeper: Arc<dyn Keeper>,
    slots: Range<u32>,
    /// The first batch that nobody has claimed.
    next: AtomicU32,
    /// The batch that the sender is at.
    needed: AtomicU32,
    /// By batch.
    published: Box<[AtomicBool]>,
    /// By page.
    digests: Box<[[AtomicU64; 2]]>,
    over: AtomicBool,
    /// The thread reads no page any more.
    left: AtomicBool,
    sender: Thread,
}

/// The thread, if there is one, with what it does at present.
#[derive(Debug)]
pub struct Digester {
    runs: Option<Sender<Arc<Run>>>,
    thread: Option<JoinHandle<()>>,
    run: Option<Arc<Run>>,
    /// The batch that the sender is in, and whether its digests are there.
    at: Option<(u32, bool)>,
    found: u64,
}

impl Digester {
    /// With a session's key. Without a second core or a thread, every digest is the sender's to compute.
    pub fn new(key: [u8; KEY_BYTES]) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let (runs, orders) = channel();
        let work = move || digest_all(&PageKey::new(key), &orders);
        let builder = thread::Builder::new().name("digests".to_owned());
        let thread = (cores > 1).then(|| builder.spawn(work).ok()).flatten();
        Self {
            runs: thread.is_some().then_some(runs),
            thread,
            run: None,
            at: None,
            found: 0,
        }
    }

    /// Starts on the pages in these slots, which stay as they are until [`Self::end`].
    pub fn begin(&mut self, keeper: &Arc<dyn Keeper>, slots: Range<u32>) {
        self.end();
        let (pages, batches) = (slots.len(), slots.len().div_ceil(BATCH_PAGES as usize));
        let Some(runs) = self.runs.as_ref().filter(|_| pages >= PAGES_MIN as usize) else {
            return;
        };
        let run = Arc::new(Run {
            keeper: keeper.clone(),
            slots,
            // The sender begins at once, too.
            next: AtomicU32::new(OVERTAKEN),
            needed: AtomicU32::new(0),
            published: (0..batches).map(|_| AtomicBool::new(false)).collect(),
            digests: (0..pages).map(|_| Default::default()).collect(),
            over: AtomicBool::new(false),
            left: AtomicBool::new(false),
            sender: thread::current(),
        });
        if runs.send(run.clone()).is_ok() {
            self.run = Some(run);
        }
    }

    /// The digest of the page in a slot, if it is there. Slots that it was begun with are to be asked for in rising order.
    pub fn digest(&mut self, slot: u32) -> Option<PageDigest> {
        let run = self.run.as_ref().filter(|run| run.slots.contains(&slot))?;
        let page = slot.checked_sub(run.slots.start)?;
        let batch = page / BATCH_PAGES;
        let is_there = match self.at {
            Some((at, is_there)) if at == batch => is_there,
            _ => {
                let is_there = run.reach(batch, self.thread.as_ref());
                self.at = Some((batch, is_there));
                is_there
            }
        };
        let words = run.digests.get(page as usize).filter(|_| is_there)?;
        self.found += 1;
        Some(number(words))
    }

    /// Digests that were there when they were needed.
    pub fn found(&self) -> u64 {
        self.found
    }

    /// The pages may change when this returns.
    pub fn end(&mut self) {
        self.at = None;
        let Some(run) = self.run.take() else { return };
        run.over.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        while !run.left.load(Ordering::Acquire) {
            thread::park();
        }
    }
}

impl Drop for Digester {
    fn drop(&mut self) {
        self.end();
        self.runs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Run {
    /// The sender is at a batch: whether it is published.
    fn reach(&self, batch: u32, thread: Option<&JoinHandle<()>>) -> bool {
        self.needed.store(batch, Ordering::Release);
        let ahead = self.next.load(Ordering::Relaxed).saturating_sub(batch);
        if ahead <= AHEAD_MAX / 2
            && let Some(thread) = thread
        {
            thread.thread().unpark();
        }
        let published = self.published.get(batch as usize);
        if published.is_some_and(|published| published.load(Ordering::Acquire)) {
            return true;
        }
        // Nobody's or just begun. A batch that the thread has in hand is computed twice rather than waited for.
        self.next.fetch_max(batch + OVERTAKEN, Ordering::Relaxed);
        false
    }

    /// Everything until the sender is through or ends it.
    fn work(&self, key: &PageKey) {
        while !self.over.load(Ordering::Acquire) {
            let needed = self.needed.load(Ordering::Acquire);
            let next = self.next.load(Ordering::Relaxed);
            if next as usize >= self.published.len() {
                return;
            }
            if next.saturating_sub(needed) >= AHEAD_MAX {
                thread::park();
                continue;
            }
            let batch = self.next.fetch_add(1, Ordering::Relaxed);
            self.batch(batch, key);
        }
    }

    fn batch(&self, batch: u32, key: &PageKey) {
        let first = batch as usize * BATCH_PAGES as usize;
        let Some(digests) = self.digests.get(first..) else {
            return;
        };
        let from = self.slots.start + first as u32;
        let to = from.saturating_add(BATCH_PAGES).min(self.slots.end);
        let (pages, _) = self.keeper.bytes(from..to).as_chunks::<PAGE_BYTES>();
        for (page, words) in pages.iter().zip(digests) {
            let bytes = key.of(page).to_bytes();
            let (halves, _) = bytes.as_chunks::<{ DIGEST_BYTES / 2 }>();
            for (word, half) in words.iter().zip(halves) {
                word.store(u64::from_le_bytes(*half), Ordering::Relaxed);
            }
        }
        if let Some(published) = self.published.get(batch as usize) {
            published.store(true, Ordering::Release);
        }
    }
}

fn number(words: &[AtomicU64; 2]) -> PageDigest {
    let [low, high] = words.each_ref().map(|word| word.load(Ordering::Relaxed));
    PageDigest::from_bytes((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}

fn digest_all(key: &PageKey, orders: &Receiver<Arc<Run>>) {
    while let Ok(run) = orders.recv() {
        run.work(key);
        run.left.store(true, Ordering::Release);
        run.sender.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::super::codec::Page;
    use super::*;

    const KEY: [u8; KEY_BYTES] = [5; KEY_BYTES];

    #[derive(Debug)]
    struct Slots(Vec<Page>);

    // SAFETY: the vector is never changed.
    unsafe impl Keeper for Slots {
        fn bytes(&self, slots: Range<u32>) -> &[u8] {
            self.0[slots.start as usize..slots.end as usize].as_flattened()
        }
    }

    fn slots(count: usize) -> Arc<Slots> {
        let page = |n: usize| {
            let mut page = [n as u8; PAGE_BYTES];
            page[..8].copy_from_slice(&n.to_le_bytes());
            page
        };
        Arc::new(Slots((0..count).map(page).collect()))
    }

    #[test]
    fn digests_are_those_of_their_pages_or_not_there_and_nobody_reads_behind_the_end() {
        let memory = slots(3007);
        let key = PageKey::new(KEY);
        let mut digester = Digester::new(KEY);
        for (from, to) in [(7, 3007), (0, 300), (0, 10), (5, 2500)] {
            let keeper: Arc<dyn Keeper> = memory.clone();
            digester.begin(&keeper, from..to);
            for slot in from..to {
                if let Some(digest) = digester.digest(slot) {
                    assert_eq!(digest, key.of(&memory.0[slot as usize]), "{slot}");
                }
            }
            digester.end();
            drop(keeper);
            assert!(digester.run.is_none());
        }
        // Whatever the thread still holds of a run goes without another look at the pages.
        drop(digester);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn a_sender_that_waits_finds_what_is_ahead() {
        let memory = slots(1000);
        let mut digester = Digester::new(KEY);
        if digester.thread.is_none() {
            return;
        }
        let keeper: Arc<dyn Keeper> = memory.clone();
        digester.begin(&keeper, 0..1000);
        let run = digester.run.clone().unwrap();
        let last = run.published.len() - 1;
        while !run.published[last].load(Ordering::Acquire) {
            thread::yield_now();
        }
        let there = (0..1000).filter(|&slot| digester.digest(slot).is_some());
        // All but what is left to the sender from the start.
        assert_eq!(there.count() as u32, 1000 - OVERTAKEN * BATCH_PAGES);
        assert_eq!(digester.found(), 1000 - u64::from(OVERTAKEN * BATCH_PAGES));
    }
}
