//! Page sets as runs, each of which one call protects or one copy takes.
//!
//! Invariant: the runs of a set are disjoint, rising, and cover the set.

use std::ops::Range;

use crate::checkpoint::pages::PageBitmap;

/// Pages outside of the set that a run may take in, where a second call would cost more than they do.
const GAP_MAX: usize = 8;

/// Calls `each` with the runs of `set` in order. A gap of a few pages is taken in, unless `busy` has one of them: a page
/// that the guest writes often would fault for nothing.
pub(super) fn each_run(set: &PageBitmap, busy: &PageBitmap, each: impl FnMut(Range<usize>)) {
    walk(set.set_words(), |gap| joins(gap, busy), each);
}

/// Calls `each` with the runs of some words of a set, given in order with their places, without any gap.
pub(super) fn each_exact(
    words: impl IntoIterator<Item = (usize, u64)>,
    each: impl FnMut(Range<usize>),
) {
    walk(words.into_iter(), |gap| gap.is_empty(), each);
}

fn walk(
    words: impl Iterator<Item = (usize, u64)>,
    joins: impl Fn(Range<usize>) -> bool,
    mut each: impl FnMut(Range<usize>),
) {
    let mut open: Option<Range<usize>> = None;
    for (at, word) in words {
        let mut rest = word;
        while rest != 0 {
            let start = rest.trailing_zeros();
            let len = (rest >> start).trailing_ones();
            rest &= u64::MAX.checked_shl(start + len).unwrap_or(0);
            let first = at * 64 + start as usize;
            let run = first..first + len as usize;
            match &mut open {
                Some(last) if joins(last.end..run.start) => last.end = run.end,
                _ => {
                    if let Some(last) = open.replace(run) {
                        each(last);
                    }
                }
            }
        }
    }
    if let Some(last) = open {
        each(last);
    }
}

fn joins(mut gap: Range<usize>, busy: &PageBitmap) -> bool {
    let is_busy = |page: usize| busy.word(page / 64) & 1 << (page % 64) != 0;
    gap.len() <= GAP_MAX && !gap.any(is_busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_of(words: &[u64]) -> PageBitmap {
        let mut set = PageBitmap::new(words.len() * 64);
        set.words_mut().copy_from_slice(words);
        set
    }

    fn runs(set: &[u64], busy: &[u64]) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        each_run(&set_of(set), &set_of(busy), |run| {
            found.push((run.start, run.end))
        });
        found
    }

    #[test]
    fn runs_cross_words_and_small_gaps() {
        assert_eq!(runs(&[0, 0], &[]), []);
        assert_eq!(runs(&[u64::MAX, u64::MAX, 1], &[]), [(0, 129)]);
        assert_eq!(runs(&[1 << 63, 1 << 7], &[]), [(63, 72)]);
        assert_eq!(runs(&[1 << 63, 1 << 9], &[]), [(63, 64), (73, 74)]);
        let split = [(0, 1), (3, 4)];
        assert_eq!(runs(&[0b1001], &[0b0100]), split, "a busy page in the gap");
        assert_eq!(
            runs(&[0b1001], &[0b1001]),
            [(0, 4)],
            "busy ends are its own"
        );
        let apart = [(0, 6), (63, 64)];
        assert_eq!(runs(&[1 | 1 << 5 | 1 << 63], &[]), apart, "a large gap");
    }
}
