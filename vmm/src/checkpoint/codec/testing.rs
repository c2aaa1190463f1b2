//! Pages for the tests of this module.

use proptest::prelude::*;

use super::Page;
use crate::checkpoint::pages::PAGE_BYTES;

/// Fills `out` with bytes that look random (xorshift64*).
pub(crate) fn fill(seed: u64, out: &mut [u8]) {
    let mut state = seed | 1;
    for byte in out {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        *byte = (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8;
    }
}

/// A page that looks random.
pub(crate) fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    fill(seed, &mut page);
    page
}

/// Zeros, noise, text-like repetition, or single bytes in zeros.
pub(crate) fn any_page() -> impl Strategy<Value = Page> {
    prop_oneof![
        Just([0; PAGE_BYTES]),
        any::<u64>().prop_map(noise),
        (1usize..97).prop_map(|period| std::array::from_fn(|n| (n % period) as u8)),
        proptest::collection::vec((0..PAGE_BYTES, any::<u8>()), 0..20).prop_map(|writes| {
            let mut page = [0; PAGE_BYTES];
            writes.into_iter().for_each(|(at, byte)| page[at] = byte);
            page
        }),
    ]
}

/// A page and a later state of it: a few runs of bytes were written, or all of it.
pub(crate) fn changed_page() -> impl Strategy<Value = (Page, Page)> {
    let runs = proptest::collection::vec((0..PAGE_BYTES, 1usize..80, any::<u64>()), 0..12);
    prop_oneof![
        4 => (any_page(), runs).prop_map(|(base, runs)| {
            let mut page = base;
            for (at, len, seed) in runs {
                let end = (at + len).min(PAGE_BYTES);
                fill(seed, &mut page[at..end]);
            }
            (base, page)
        }),
        1 => (any_page(), any_page()),
        // Every n-th byte: the most runs that there can be.
        1 => (any_page(), 1usize..12).prop_map(|(base, step)| {
            let mut page = base;
            page.iter_mut().step_by(step).for_each(|byte| *byte ^= 1);
            (base, page)
        }),
    ]
}
