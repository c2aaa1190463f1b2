//! Copies of pages into host memory, by one thread or two.
//!
//! Invariant: a digest is that of the copy, whatever the guest writes to its page meanwhile.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::runs;
use super::shared::Shared;
use crate::checkpoint::codec::{PageDigest, PageKey};
use crate::checkpoint::pages::{PAGE_BYTES, PageBitmap};

/// A set this large is copied by two threads.
const PARALLEL_PAGES: usize = 8192;

/// Where copies go.
#[derive(Debug, Default)]
pub(super) struct Room<'a> {
    pages: &'a mut [u8],
    /// As many digests as pages, where they are wanted.
    digests: Option<(&'a PageKey, &'a mut [PageDigest])>,
}

impl<'a> Room<'a> {
    /// For copies alone.
    pub(super) fn of(pages: &'a mut [u8]) -> Self {
        Self {
            pages,
            digests: None,
        }
    }

    /// For as many digests as there is room for pages, too.
    pub(super) fn with_digests(self, key: &'a PageKey, digests: &'a mut [PageDigest]) -> Self {
        Self {
            digests: Some((key, digests)),
            ..self
        }
    }

    /// The first pages, and the others.
    fn split_at(self, pages: usize) -> (Self, Self) {
        let (low, high) = self.pages.split_at_mut(pages * PAGE_BYTES);
        let (mut low, mut high) = (Self::of(low), Self::of(high));
        if let Some((key, digests)) = self.digests {
            let (below, above) = digests.split_at_mut(pages);
            (low.digests, high.digests) = (Some((key, below)), Some((key, above)));
        }
        (low, high)
    }

    /// Copies pages in a row.
    fn fill(self, shared: &Shared, first: usize) {
        let Some((key, digests)) = self.digests else {
            return shared.copy(first, self.pages);
        };
        let (pages, _) = self.pages.as_chunks_mut::<PAGE_BYTES>();
        for (n, (page, digest)) in pages.iter_mut().zip(digests).enumerate() {
            shared.copy(first + n, page);
            *digest = key.of(page);
        }
    }
}

/// Copies the pages of a set into room for exactly these.
pub(super) fn copy_all(shared: &Shared, set: &PageBitmap, room: Room<'_>) {
    if room.pages.len() / PAGE_BYTES < PARALLEL_PAGES {
        return copy_words(shared, set.set_words(), room);
    }
    // In a pause the vCPUs stand still, so there is a core for a second thread; before one it is over sooner.
    copy_by_two(shared, set, room, thread::Builder::new());
}

/// The same by this thread and another one, or by this one alone where there are no more, whatever limits its host has.
pub(super) fn copy_by_two(
    shared: &Shared,
    set: &PageBitmap,
    room: Room<'_>,
    other: thread::Builder,
) {
    let pages = room.pages.len() / PAGE_BYTES;
    let (mut half, mut below) = (0, 0);
    for (at, word) in set.set_words() {
        if below >= pages / 2 {
            break;
        }
        (half, below) = (at + 1, below + word.count_ones() as usize);
    }
    let (low, high) = room.split_at(below);
    let upper = || set.set_words().skip_while(|&(at, _)| at < half);
    // Whoever comes first copies it: a thread that was not made drops what it was to do.
    let high = Mutex::new(Some(high));
    let copy_high = || {
        let high = high.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(high) = high {
            copy_words(shared, upper(), high);
        }
    };
    thread::scope(|scope| {
        let spawned = other.spawn_scoped(scope, copy_high);
        let lower = set.set_words().take_while(|&(at, _)| at < half);
        copy_words(shared, lower, low);
        if let Err(e) = spawned {
            if shared.counts.alone.fetch_add(1, Ordering::Relaxed) == 0 {
                tracing::warn!("no second thread to copy captured pages with: {e}");
            }
            copy_high();
        }
    });
}

/// Copies the pages of some words of a set.
fn copy_words(shared: &Shared, words: impl Iterator<Item = (usize, u64)>, mut room: Room<'_>) {
    runs::each_exact(words, |run| {
        let (part, rest) = std::mem::take(&mut room).split_at(run.len());
        part.fill(shared, run.start);
        room = rest;
    });
}
