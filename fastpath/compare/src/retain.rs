//! Input that is kept until the guest's own ACK covers it, and delivered again until then (rule 5).
//!
//! Invariants: a kept frame leaves only when covered, when its connection is reset, or when the
//! caller says that a commit includes it; per connection, frames are delivered again in order.

use alloc::collections::{BTreeMap, VecDeque};

use crate::flow::FlowKey;
use crate::frames::{Frames, Token};
use crate::seq;

/// Frames of one connection that are delivered again at a time.
const BURST: usize = 8;
/// Most doublings of the wait.
const MAX_BACKOFF: u32 = 5;

#[derive(Debug)]
struct Kept {
    end: u32,
    token: Token,
}

#[derive(Debug, Default)]
struct KeptFlow {
    frames: VecDeque<Kept>,
    due_us: u64,
    tries: u32,
    burst_at: usize,
}

/// The kept frames of all connections.
#[derive(Debug, Default)]
pub(crate) struct Retain {
    flows: BTreeMap<FlowKey, KeptFlow>,
    count: usize,
}

impl Retain {
    /// How many frames are kept.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Keeps a delivered frame that is covered by an ACK of `end`.
    pub(crate) fn keep(&mut self, key: FlowKey, end: u32, token: Token, due_us: u64) {
        let flow = self.flows.entry(key).or_default();
        if flow.frames.is_empty() {
            flow.due_us = due_us;
            flow.tries = 0;
            flow.burst_at = 0;
        }
        flow.frames.push_back(Kept { end, token });
        self.count += 1;
    }

    /// The guest acknowledged everything below `ack`.
    pub(crate) fn covered<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        wait_us: u64,
        key: &FlowKey,
        ack: u32,
        frames: &mut F,
    ) {
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        let before = flow.frames.len();
        let mut at = 0;
        while let Some(kept) = flow.frames.get(at) {
            if !seq::le(kept.end, ack) {
                at += 1;
            } else if let Some(kept) = flow.frames.remove(at) {
                frames.release(kept.token);
            }
        }
        let progress = before - flow.frames.len();
        self.count -= progress;
        if flow.frames.is_empty() {
            self.flows.remove(key);
        } else if progress > 0 {
            // A guest that came to life again gets the rest without waiting.
            flow.due_us = if flow.tries > 0 {
                now_us
            } else {
                now_us + wait_us
            };
            flow.tries = 0;
            flow.burst_at = 0;
        }
    }

    /// The connection was reset, or begins anew.
    pub(crate) fn forget<F: Frames + ?Sized>(&mut self, key: &FlowKey, frames: &mut F) {
        if let Some(flow) = self.flows.remove(key) {
            self.count -= flow.frames.len();
            flow.frames
                .into_iter()
                .for_each(|kept| frames.release(kept.token));
        }
    }

    /// A commit includes everything. Gives how many frames that were.
    pub(crate) fn clear<F: Frames + ?Sized>(&mut self, frames: &mut F) -> usize {
        let dropped = core::mem::take(&mut self.count);
        for flow in core::mem::take(&mut self.flows).into_values() {
            flow.frames
                .into_iter()
                .for_each(|kept| frames.release(kept.token));
        }
        dropped
    }

    /// A copy of the next frame that is due for delivery again.
    pub(crate) fn poll_due<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        wait_us: u64,
        frames: &mut F,
    ) -> Option<(FlowKey, Token)> {
        let (key, flow) = self
            .flows
            .iter_mut()
            .find(|(_, flow)| flow.due_us <= now_us)?;
        let kept = flow.frames.get(flow.burst_at)?;
        let copy = frames.duplicate(&kept.token)?;
        flow.burst_at += 1;
        if flow.burst_at >= flow.frames.len().min(BURST) {
            flow.burst_at = 0;
            flow.tries = (flow.tries + 1).min(MAX_BACKOFF);
            flow.due_us = now_us + (wait_us << flow.tries);
        }
        Some((*key, copy))
    }

    /// When [`Retain::poll_due`] has something next.
    pub(crate) fn next_due_us(&self) -> Option<u64> {
        self.flows.values().map(|flow| flow.due_us).min()
    }

    /// Makes everything due at once (the peer that fed the guest is gone).
    pub(crate) fn hurry(&mut self, now_us: u64) {
        self.flows
            .values_mut()
            .for_each(|flow| flow.due_us = now_us);
    }

    /// Every kept frame with its connection.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = (&FlowKey, &Token)> {
        self.flows
            .iter()
            .flat_map(|(key, flow)| flow.frames.iter().map(move |kept| (key, &kept.token)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Protocol;
    use crate::testing::VecFrames;

    #[test]
    fn rule_5_kept_until_covered_and_delivered_again() {
        let mut frames = VecFrames::new(16);
        let mut retain = Retain::default();
        let key = FlowKey::bare(Protocol::Tcp, [0; 2]);
        for (end, byte) in [(u32::MAX, 1u8), (10, 2), (20, 3)] {
            let token = frames.insert(&[byte; 20]).unwrap();
            retain.keep(key, end, token, 50);
        }
        assert!(retain.poll_due(49, 50, &mut frames).is_none());
        for byte in [1, 2, 3] {
            let (_, copy) = retain.poll_due(50, 50, &mut frames).unwrap();
            assert_eq!(frames.bytes(&copy)[0], byte);
            frames.release(copy);
        }
        assert!(retain.poll_due(60, 50, &mut frames).is_none());
        assert_eq!(retain.next_due_us(), Some(150));
        retain.covered(60, 50, &key, 10, &mut frames);
        assert_eq!((retain.len(), frames.used()), (1, 1));
        assert_eq!(
            retain.next_due_us(),
            Some(60),
            "progress after a stall hurries the rest"
        );
        retain.covered(61, 50, &key, 20, &mut frames);
        assert_eq!(
            (retain.len(), frames.used(), retain.next_due_us()),
            (0, 0, None)
        );
    }
}
