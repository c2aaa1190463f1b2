//! Bytes of a chunk that lie outside its buffer: captured pages, which leave from where they were captured.
//!
//! Invariants: whoever owns the memory is kept alive until the kernel is done with it; memory that is the same place
//! for place gets one entry, however many pages it has.
//!
//! Does not look at the bytes: what they are is checked by digests of their own, not by the chunk's checksum.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Memory that bytes of a chunk may lie in.
///
/// # Safety
/// As long as the value lives, `bytes` gives the same memory for the same range, mapped. While a channel has a range
/// under way nobody writes there: see [`settle`](super::PageChannel::settle).
pub unsafe trait Keeper: fmt::Debug + Send + Sync {
    /// The bytes of these slots; empty for slots that there are not.
    fn bytes(&self, slots: Range<u32>) -> &[u8];
}

/// The part of a chunk behind its buffer.
#[derive(Debug, Default)]
pub(super) struct Bulk {
    keeper: Option<Arc<dyn Keeper>>,
    runs: Vec<Range<u32>>,
    length: usize,
}

impl Bulk {
    /// Slots behind those that it has.
    pub(super) fn push(&mut self, slot: u32, bytes: usize) {
        self.length += bytes;
        match self.runs.last_mut() {
            Some(run) if run.end == slot => run.end += 1,
            _ => self.runs.push(slot..slot + 1),
        }
    }

    /// Whose slots they are.
    pub(super) fn keep(&mut self, keeper: Arc<dyn Keeper>) {
        self.keeper = Some(keeper);
    }

    /// How many bytes there are.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Lets the memory go.
    pub(super) fn clear(&mut self) {
        self.keeper = None;
        self.runs.clear();
        self.length = 0;
    }

    /// The memory, run by run.
    pub(super) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let keeper = self.keeper.as_deref();
        let bytes =
            move |run: &Range<u32>| keeper.map_or(&[][..], |keeper| keeper.bytes(run.clone()));
        self.runs.iter().map(bytes)
    }
}

/// Entries that the kernel takes at once (UIO_MAXIOV); what is beyond is left for another send.
const VECTORS_MAX: usize = 1024;

/// What is left of `parts` behind the first `sent` bytes, as the kernel takes it.
pub(super) fn vectors<'a>(
    parts: impl Iterator<Item = &'a [u8]>,
    mut sent: usize,
    out: &mut Vec<libc::iovec>,
) {
    out.clear();
    for part in parts {
        let rest = part.get(sent..).unwrap_or_default();
        sent = sent.saturating_sub(part.len());
        if !rest.is_empty() && out.len() < VECTORS_MAX {
            out.push(libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Slots(Vec<u8>);

    // SAFETY: the vector is never changed.
    unsafe impl Keeper for Slots {
        fn bytes(&self, slots: Range<u32>) -> &[u8] {
            self.0
                .get(slots.start as usize * 4..slots.end as usize * 4)
                .unwrap_or_default()
        }
    }

    #[test]
    fn slots_in_a_row_are_one_part_and_what_was_sent_is_left_out() {
        let mut bulk = Bulk::default();
        bulk.keep(Arc::new(Slots((0..40).collect())));
        for slot in [2, 3, 4, 7, 1] {
            bulk.push(slot, 4);
        }
        let parts: Vec<_> = bulk.parts().map(<[u8]>::to_vec).collect();
        let expected = [
            (8..20).collect::<Vec<u8>>(),
            vec![28, 29, 30, 31],
            vec![4, 5, 6, 7],
        ];
        assert_eq!((parts.as_slice(), bulk.length()), (&expected[..], 20));
        let mut left = Vec::new();
        for (sent, lengths) in [
            (0, vec![12, 4, 4]),
            (5, vec![7, 4, 4]),
            (12, vec![4, 4]),
            (18, vec![2]),
            (20, vec![]),
        ] {
            vectors(bulk.parts(), sent, &mut left);
            let got: Vec<_> = left.iter().map(|part| part.iov_len).collect();
            assert_eq!(got, lengths, "{sent} sent");
        }
        bulk.clear();
        assert_eq!((bulk.parts().count(), bulk.length()), (0, 0));
    }
}
