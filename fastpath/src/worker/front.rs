//! The frames at the front of a guest's transmit queue, looked at where they lie before they are taken.
//!
//! Invariants: only frames are shown that lie in one buffer in RAM, in the order of the queue; one that is not
//! passed stays in the queue as if nobody had looked, and is read anew when it is taken; what is shown may be
//! written by the guest at any time, so it is only ever copied or compared with host memory (invariant 7).
//!
//! Does not take what has to be refused, completed or gathered: [`GuestPort::take`](super::GuestPort::take) does.

use std::ops::RangeInclusive;

use crate::frame::{Buffer, CopyCause};
use crate::ring::{GuestBytes, GuestRam, Segment, Virtqueue};
use crate::stats::WorkerStats;

use super::offload::Request;
use super::port::NET_HEADER_BYTES;

/// Most frames that are looked at together: those of two guests, copied once, fit the nearest cache.
pub(crate) const FRONT_FRAMES: usize = 16;
/// Of each frame this much is asked for at once, of the next ones all.
const FIRST_LINES: usize = 2;
const ALL_LINES: usize = 24;
/// How many frames ahead all of a frame is asked for.
const FRAMES_AHEAD: usize = 2;

/// A frame in the guest's memory, with the device's header before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown<'a> {
    head: u16,
    gpa: u64,
    bytes: GuestBytes<'a>,
}

impl Shown<'_> {
    /// Length of the frame.
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - NET_HEADER_BYTES
    }

    /// Copies the frame's beginning; `out` is no longer than the frame.
    #[inline(always)]
    pub(crate) fn copy_to(&self, out: &mut [u8]) {
        self.bytes.copy_to(NET_HEADER_BYTES, out);
    }

    /// Whether the frame has these bytes from `at` on; they must not reach beyond its end.
    #[inline(always)]
    pub(crate) fn equals(&self, at: usize, bytes: &[u8]) -> bool {
        self.bytes.equal_at(NET_HEADER_BYTES + at, bytes)
    }

    /// The sum of the frame's bytes from `at` on, if `other`, which is as long, has the same (rule 10).
    #[inline(always)]
    pub(crate) fn equal_and_sum(&self, at: usize, other: &Shown<'_>) -> Option<u16> {
        let len = self.len() - at;
        self.bytes
            .equal_and_sum(NET_HEADER_BYTES + at, &other.bytes, len)
    }

    /// Where the frame lies from `at` on, which is before its end.
    pub(crate) fn behind(&self, at: usize) -> Segment {
        Segment {
            gpa: self.gpa + (NET_HEADER_BYTES + at) as u64,
            len: (self.len() - at) as u32,
        }
    }

    /// Whether the guest asks the device to do nothing but to send it.
    #[inline(always)]
    pub(crate) fn is_complete(&self) -> bool {
        let mut header = [0; NET_HEADER_BYTES];
        self.bytes.copy_to(0, &mut header);
        Request::of(&header, false) == Request::Nothing
    }
}

/// What is at the front of a queue.
#[derive(Debug)]
pub(crate) struct Front<'a> {
    queue: &'a mut Virtqueue,
    life: u32,
    stats: &'a WorkerStats,
    shown: [Option<Shown<'a>>; FRONT_FRAMES],
    passed: usize,
    passed_bytes: u64,
    /// Of these, those of frames that stay in the guest's buffers.
    kept_bytes: u64,
}

impl<'a> Front<'a> {
    /// Looks at up to [`FRONT_FRAMES`] frames of `length` bytes in a queue that lives its `life`.
    #[inline]
    pub(super) fn of(
        queue: &'a mut Virtqueue,
        life: u32,
        ram: &'a GuestRam,
        stats: &'a WorkerStats,
        length: RangeInclusive<usize>,
    ) -> Option<Self> {
        // A queue that makes no sense is noticed by who takes.
        if !queue.has_available().ok()? {
            return None;
        }
        let mut shown = [None; FRONT_FRAMES];
        for (n, place) in (0..).zip(shown.iter_mut()) {
            let Some((head, segment)) = queue.peek_lone(n) else {
                break;
            };
            let frame_bytes = (segment.len as usize).wrapping_sub(NET_HEADER_BYTES);
            let Ok(bytes) = ram.view(segment.gpa, segment.len) else {
                break;
            };
            if !length.contains(&frame_bytes) {
                break;
            }
            bytes.prefetch(FIRST_LINES);
            *place = Some(Shown {
                head,
                gpa: segment.gpa,
                bytes,
            });
        }
        Some(Self {
            queue,
            life,
            stats,
            shown,
            passed: 0,
            passed_bytes: 0,
            kept_bytes: 0,
        })
    }

    /// The next frame.
    #[inline(always)]
    pub(crate) fn next(&self) -> Option<Shown<'a>> {
        if let Some(Some(ahead)) = self.shown.get(self.passed + FRAMES_AHEAD) {
            ahead.bytes.prefetch(ALL_LINES);
        }
        *self.shown.get(self.passed)?
    }

    /// Gives the next frame's buffer back to the guest.
    #[inline(always)]
    pub(crate) fn pass(&mut self, frame: &Shown<'_>) {
        // What is in the used ring is told to the guest with the batch.
        let done = self.queue.pass_lone(frame.head);
        debug_assert!(done.is_ok());
        self.passed += 1;
        self.passed_bytes += frame.len() as u64;
    }

    /// Takes the next frame, which stays in the guest's buffer.
    #[inline(always)]
    pub(crate) fn keep(&mut self, frame: &Shown<'_>) {
        self.queue.take_lone();
        self.passed += 1;
        self.passed_bytes += frame.len() as u64;
        self.kept_bytes += frame.len() as u64;
    }

    /// The buffer of a frame that stays there.
    pub(crate) fn buffer_of(&self, frame: &Shown<'_>) -> Buffer {
        Buffer {
            life: self.life,
            head: frame.head,
            descriptors: 1,
        }
    }

    /// Descriptors of this queue that frames may keep; the others stay free for what the guest sends next.
    pub(crate) fn in_place_max(&self) -> usize {
        usize::from(self.queue.size() / 2)
    }

    /// Counts those that were passed as copied, but for those that stay.
    pub(crate) fn count_copied(&self) {
        let copied = self.passed_bytes - self.kept_bytes;
        self.stats.count_copied(CopyCause::Role, copied);
    }
}

impl Drop for Front<'_> {
    fn drop(&mut self) {
        self.stats.guest_tx_frames.add(self.passed as u64);
        self.stats.guest_tx_bytes.add(self.passed_bytes);
    }
}
