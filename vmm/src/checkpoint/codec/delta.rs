//! A page as its difference from a base page that the other side has, too.
//!
//! Format: runs, each of two LEB128 numbers and bytes: how many bytes since the end of the run before are as in the base,
//! how many follow, those bytes of the new page. What comes behind the last run is as in the base. Bytes that are equal on
//! both sides of a short gap travel with it, because the head of another run is no shorter.
//!
//! Invariants: a decoder takes what an encoder of any version makes as long as runs are not empty, do not touch and do not
//! leave the page; it refuses all else. A delta never has more bytes than the room it was given.
//!
//! Does not know whether the base is the right one: the digest of the result tells (`Record::apply`).

use super::Page;
use crate::checkpoint::pages::PAGE_BYTES;

/// Bytes compared in one go to find what differs: the page has as many blocks as a word has bits.
const BLOCK_BYTES: usize = PAGE_BYTES / 64;
const WORD_BYTES: usize = 8;
/// So many equal bytes between two runs are sent with them.
const GAP_MAX_BYTES: usize = 4;

/// A delta that is no delta of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It ends in a run.
    #[error("page delta is cut off at its byte {at}; the checkpoint has to be sent again")]
    Cut {
        /// Where in the delta.
        at: usize,
    },
    /// A run is empty, touches the one before or leaves the page.
    #[error(
        "page delta has an impossible run at its byte {at}; the checkpoint has to be sent again"
    )]
    Run {
        /// Where in the delta.
        at: usize,
    },
}

/// Writes the delta of `page` against `base` into `out` and gives its length; `None` if it needs more room.
pub fn encode(base: &Page, page: &Page, out: &mut [u8]) -> Option<usize> {
    let mut writer = Writer {
        page,
        out,
        len: 0,
        run_end: 0,
    };
    let mut open: Option<(usize, usize)> = None;
    let mut blocks = differing_blocks(base, page);
    while blocks != 0 {
        let block = blocks.trailing_zeros() as usize * BLOCK_BYTES;
        blocks &= blocks - 1;
        for at in (block..block + BLOCK_BYTES).step_by(WORD_BYTES) {
            let bits = word(base, at) ^ word(page, at);
            if bits == 0 {
                continue;
            }
            let start = at + bits.trailing_zeros() as usize / 8;
            let end = at + WORD_BYTES - bits.leading_zeros() as usize / 8;
            open = match open {
                Some((first, last)) if start - last <= GAP_MAX_BYTES => Some((first, end)),
                Some((first, last)) => {
                    writer.run(first, last)?;
                    Some((start, end))
                }
                None => Some((start, end)),
            };
        }
    }
    if let Some((first, last)) = open {
        writer.run(first, last)?;
    }
    Some(writer.len)
}

/// Makes the page of its base and delta. After an error `out` holds anything.
pub fn decode(base: &Page, delta: &[u8], out: &mut Page) -> Result<(), DeltaError> {
    *out = *base;
    let (mut at, mut page_at) = (0, 0);
    while at < delta.len() {
        let head = at;
        let skip = number(delta, &mut at)?;
        let len = number(delta, &mut at)?;
        let impossible = DeltaError::Run { at: head };
        if len == 0 || (skip == 0 && head != 0) {
            return Err(impossible);
        }
        let start = page_at + skip;
        let run = out.get_mut(start..start + len).ok_or(impossible)?;
        let bytes = delta.get(at..at + len).ok_or(DeltaError::Cut { at })?;
        run.copy_from_slice(bytes);
        at += len;
        page_at = start + len;
    }
    Ok(())
}

/// One bit for each block.
fn differing_blocks(base: &Page, page: &Page) -> u64 {
    let (base, _) = base.as_chunks::<BLOCK_BYTES>();
    let (page, _) = page.as_chunks::<BLOCK_BYTES>();
    let mut differing = 0;
    for (n, (base, page)) in base.iter().zip(page).enumerate() {
        let bits = (0..BLOCK_BYTES)
            .step_by(WORD_BYTES)
            .fold(0, |or, at| or | (word(base, at) ^ word(page, at)));
        differing |= u64::from(bits != 0) << n;
    }
    differing
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.get(at..at + WORD_BYTES).and_then(|b| b.first_chunk());
    bytes.map_or(0, |b: &[u8; WORD_BYTES]| u64::from_le_bytes(*b))
}

struct Writer<'a> {
    page: &'a Page,
    out: &'a mut [u8],
    len: usize,
    run_end: usize,
}

impl Writer<'_> {
    fn run(&mut self, first: usize, last: usize) -> Option<()> {
        self.number(first - self.run_end)?;
        self.number(last - first)?;
        let bytes = &self.page[first..last];
        let room = self.out.get_mut(self.len..self.len + bytes.len())?;
        room.copy_from_slice(bytes);
        self.len += bytes.len();
        self.run_end = last;
        Some(())
    }

    /// LEB128 of a number up to the size of a page, in one or two bytes.
    fn number(&mut self, value: usize) -> Option<()> {
        let more = value >= 0x80;
        *self.out.get_mut(self.len)? = value as u8 & 0x7f | u8::from(more) << 7;
        self.len += 1;
        if more {
            *self.out.get_mut(self.len)? = (value >> 7) as u8;
            self.len += 1;
        }
        Some(())
    }
}

fn number(delta: &[u8], at: &mut usize) -> Result<usize, DeltaError> {
    let mut byte = || {
        let byte = delta.get(*at).copied();
        *at += 1;
        byte.map(usize::from)
            .ok_or(DeltaError::Cut { at: delta.len() })
    };
    let low = byte()?;
    if low < 0x80 {
        return Ok(low);
    }
    let high = byte()?;
    // A third byte or one that stands for nothing: no number inside a page.
    if high == 0 || high >= 0x80 {
        return Err(DeltaError::Run { at: *at - 2 });
    }
    Ok(low & 0x7f | high << 7)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{any_page, changed_page, noise};
    use super::*;
    use proptest::prelude::*;

    fn delta(base: &Page, page: &Page) -> Vec<u8> {
        let mut out = vec![0; 2 * PAGE_BYTES];
        let len = encode(base, page, &mut out).unwrap();
        out.truncate(len);
        out
    }

    #[test]
    fn equal_pages_have_an_empty_delta() {
        assert!(delta(&noise(1), &noise(1)).is_empty());
    }

    #[test]
    fn a_changed_counter_costs_its_bytes_and_a_head() {
        let base = noise(1);
        let mut page = base;
        page[1000] ^= 1;
        page[1001] ^= 1;
        assert_eq!(delta(&base, &page).len(), 2 + 1 + 2);
        page[4095] ^= 1;
        assert_eq!(delta(&base, &page).len(), 5 + 2 + 1 + 1);
        page[0] ^= 1;
        assert_eq!(delta(&base, &page)[..2], [0, 1]);
    }

    #[test]
    fn impossible_runs_are_refused() {
        let base = noise(1);
        let mut out = [0; PAGE_BYTES];
        let mut refused = |delta: &[u8]| decode(&base, delta, &mut out).unwrap_err();
        let run = |at| DeltaError::Run { at };
        assert_eq!(refused(&[5, 0]), run(0), "empty");
        assert_eq!(refused(&[5, 1, 7, 0, 1, 7]), run(3), "touching");
        assert_eq!(refused(&[0xff, 0x1f, 2, 1, 1]), run(0), "past the end");
        assert_eq!(refused(&[0x80, 0x80, 1]), run(0), "no such number");
        assert_eq!(refused(&[0x80, 0]), run(0), "overlong");
        assert_eq!(refused(&[5]), DeltaError::Cut { at: 1 });
        assert_eq!(refused(&[5, 3, 1, 1]), DeltaError::Cut { at: 2 });
    }

    proptest! {
        #[test]
        fn a_page_comes_back((base, page) in changed_page()) {
            let mut out = noise(2);
            decode(&base, &delta(&base, &page), &mut out).unwrap();
            prop_assert_eq!(out, page);
        }

        #[test]
        fn too_little_room_gives_none_and_enough_gives_all((base, page) in changed_page(), cut: prop::sample::Index) {
            let whole = delta(&base, &page);
            let mut exact = vec![0; whole.len()];
            prop_assert_eq!(encode(&base, &page, &mut exact), Some(whole.len()));
            prop_assert_eq!(&exact, &whole);
            if !whole.is_empty() {
                let mut less = vec![0; cut.index(whole.len())];
                prop_assert_eq!(encode(&base, &page, &mut less), None);
            }
        }

        #[test]
        fn a_cut_delta_is_refused_or_ends_between_runs((base, page) in changed_page(), cut: prop::sample::Index) {
            let whole = delta(&base, &page);
            let mut out = [0; PAGE_BYTES];
            if !whole.is_empty() {
                let cut = cut.index(whole.len());
                if decode(&base, &whole[..cut], &mut out).is_ok() {
                    prop_assert_ne!(out, page);
                }
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(base in any_page(), bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut out = [0; PAGE_BYTES];
            let _ = decode(&base, &bytes, &mut out);
        }
    }
}
