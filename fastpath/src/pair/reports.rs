//! What the secondary is to hear of the output that has left (rule 9).
//!
//! Invariants: nothing is told of a frame before the NIC has it, nor later because of frames behind it; what is told
//! keeps its order.

use std::collections::VecDeque;

use super::delayed::Delayed;
use crate::link::{PacketLink, PacketMsg};

/// Bytes of sequence numbers per message.
const BYTES_MAX: usize = 32 << 10;

/// Output that was released and is not reported.
#[derive(Debug)]
pub(super) struct Reports {
    /// Frames that were released so far, and that have left.
    released: u64,
    left: u64,
    /// Output of the SVM, by its number, each with the frames that have to leave before it is reported.
    waiting: VecDeque<(u64, u64)>,
    /// The same for the pending output of a checkpoint, by its epoch.
    waiting_pending: Option<(u64, u64)>,
    /// Left: numbers as they are sent.
    seqs: Vec<u8>,
    pending: Option<u64>,
    delay: Delayed,
}

impl Reports {
    /// Takes memory for so many frames.
    pub(super) fn new(frames: usize) -> Self {
        Self {
            released: 0,
            left: 0,
            waiting: VecDeque::with_capacity(frames),
            waiting_pending: None,
            // All of them may leave at once: when the NIC has room again, or muteness ends.
            seqs: Vec::with_capacity(frames * size_of::<u64>()),
            pending: None,
            delay: Delayed::default(),
        }
    }

    /// A frame is released.
    pub(super) fn frame_released(&mut self) {
        self.released += 1;
    }

    /// The NIC has taken the next frame that was released.
    pub(super) fn frame_left(&mut self) {
        self.left += 1;
    }

    /// The SVM's output of this number stood for what has been released so far.
    pub(super) fn note(&mut self, svm_seq: u64) {
        self.waiting.push_back((self.released, svm_seq));
    }

    /// The pending output of the checkpoint of this epoch is among what has been released so far.
    pub(super) fn note_pending(&mut self, epoch: u64) {
        self.waiting_pending = Some((self.released, epoch));
    }

    /// When [`Self::send`] has something to say at the latest.
    pub(super) fn due_us(&self) -> Option<u64> {
        self.delay.due_us()
    }

    /// Says what has left: with a message that goes out anyhow (`speaks`), else after a while.
    pub(super) fn send(&mut self, now_us: u64, speaks: bool, link: Option<&mut PacketLink>) {
        self.collect();
        if self.seqs.is_empty() && self.pending.is_none() {
            return;
        }
        self.delay.note(now_us, (self.seqs.len() / 8) as u64);
        if !speaks && self.pending.is_none() && !self.delay.is_due(now_us) {
            return;
        }
        self.delay.clear();
        let pending = self.pending.take();
        if let Some(link) = link {
            for seqs in self.seqs.chunks(BYTES_MAX) {
                link.push(&PacketMsg::Released { seqs });
            }
            if let Some(epoch) = pending {
                link.push(&PacketMsg::PendingReleased { epoch });
            }
        }
        self.seqs.clear();
    }

    fn collect(&mut self) {
        let left = self.left;
        while let Some((_, svm_seq)) = self.waiting.front().filter(|(at, _)| *at <= left) {
            self.seqs.extend_from_slice(&svm_seq.to_le_bytes());
            self.waiting.pop_front();
        }
        if let Some((_, epoch)) = self.waiting_pending.take_if(|(at, _)| *at <= left) {
            self.pending = Some(epoch);
        }
    }

    /// Forgets what was to be said: the next secondary has not sent it.
    pub(super) fn forget(&mut self) {
        self.waiting.clear();
        self.waiting_pending = None;
        self.seqs.clear();
        self.pending = None;
        self.delay.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_memory_is_taken_when_all_that_waited_leaves_at_once() {
        const FRAMES: u64 = 10_000;
        let mut reports = Reports::new(FRAMES as usize);
        let capacities = |reports: &Reports| (reports.waiting.capacity(), reports.seqs.capacity());
        let before = capacities(&reports);
        for seq in 0..FRAMES {
            reports.frame_released();
            reports.note(seq);
        }
        (0..FRAMES).for_each(|_| reports.frame_left());
        reports.collect();
        assert_eq!(reports.seqs.len() as u64, 8 * FRAMES);
        assert_eq!(capacities(&reports), before);
    }
}
