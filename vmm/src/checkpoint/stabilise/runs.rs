//! Page sets as runs: how many calls it takes to protect one.
//!
//! Invariant: the runs of a set are disjoint, rising, and cover the set.

use std::ops::Range;

use super::model::Runs;
use crate::checkpoint::pages::set_words;

/// Pages outside of the set that a run may take in, where a second call would cost more than they do.
const GAP_MAX: usize = 8;

/// Calls `each` with the runs of `set` in order. A gap of a few pages is taken in, unless `busy` has one of them: a page
/// that the guest writes often would fault for nothing.
pub(super) fn each_run(set: &[u64], busy: &[u64], each: impl FnMut(Range<usize>)) {
    walk(set_words(set), |gap| joins(gap, busy), each);
}

/// Calls `each` with the runs of `set` in order, without any gap.
pub(super) fn each_exact(set: &[u64], each: impl FnMut(Range<usize>)) {
    walk(set_words(set), |gap| gap.is_empty(), each);
}

/// What it takes to protect `set`.
pub(super) fn count(set: &[u64], busy: &[u64]) -> Runs {
    count_words(set_words(set), busy)
}

/// What it takes to protect two sets at once.
pub(super) fn count_both(one: &[u64], other: &[u64], busy: &[u64]) -> Runs {
    let words = one.iter().zip(other).map(|(a, b)| a | b);
    count_words(words.enumerate(), busy)
}

fn count_words(words: impl Iterator<Item = (usize, u64)>, busy: &[u64]) -> Runs {
    let mut runs = Runs::default();
    walk(
        words,
        |gap| joins(gap, busy),
        |run| {
            runs.calls += 1;
            runs.pages += run.len() as u64;
        },
    );
    runs
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

fn joins(mut gap: Range<usize>, busy: &[u64]) -> bool {
    let is_busy = |page: usize| {
        busy.get(page / 64)
            .is_some_and(|word| word & 1 << (page % 64) != 0)
    };
    gap.len() <= GAP_MAX && !gap.any(is_busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(set: &[u64], busy: &[u64]) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        each_run(set, busy, |run| found.push((run.start, run.end)));
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
        let Runs { calls, pages } = count(&[1 | 1 << 5 | 1 << 63], &[]);
        assert_eq!((calls, pages), (2, 7));
    }
}
