//! Input that is kept until the guest's own ACK covers it, and delivered again until then (rule 5).
//!
//! Invariants: a kept frame leaves only when covered, when its connection is reset, or when the
//! caller says that a commit includes it; per connection, frames are delivered again in the order
//! of their sequence numbers, by turns with what the peer said last and as they came; nothing
//! allocates after `new`, and what finds no room is given back; no call looks at other connections
//! than its own, but for `clear`, `hurry` and `inbound`.

mod last_heard;

use crate::flat::{FlatTable, Slot};
use crate::flow::{Direction, FlowKey};
use crate::frames::{Frames, Token};
use crate::list::{Ends, Lists, NIL};
use crate::seq;
use crate::wire::{self, Tcp};
use crate::xlate::Offsets;
use last_heard::LastHeard;

/// Frames of one connection that are delivered again at a time.
const BURST: u8 = 8;
/// Most doublings of the wait.
const MAX_BACKOFF: u8 = 5;
/// Waits of one length end in the order in which they began, so there is a queue for each length,
/// and one for what is due at once.
const QUEUES: usize = MAX_BACKOFF as usize + 2;
const AT_ONCE: u8 = 0;
const FIRST_WAIT: u8 = 1;

/// Sequence numbers further apart than any window (RFC 7323 section 2.3) are not of one stream:
/// one of them was made up.
const WINDOW_MAX: u32 = 1 << 30;
/// A segment further away from the last that is kept tells nothing: whoever makes one up without having seen the stream
/// has to guess its numbers as well as for the guest.
const NEAR: u32 = 1 << 18;
/// Most frames that are stepped over, in search of a place or of what is covered.
const MAX_STEPS: usize = 64;

#[derive(Debug)]
struct Kept {
    end: u32,
    token: Token,
}

#[derive(Debug)]
struct KeptFlow {
    /// By `end`, as far as the numbers are of one stream.
    frames: Ends,
    /// Where a burst goes on.
    next: u32,
    /// Frames of the burst so far.
    burst: u8,
    /// The next burst is of frames as they came: the guest may not have sent yet what the peer acknowledged since.
    as_they_came: bool,
    heard: Option<LastHeard>,
    tries: u8,
    /// The queue in which it waits, and its node there.
    queue: u8,
    node: u32,
    due_us: u64,
}

/// The kept frames of all connections.
#[derive(Debug)]
pub(crate) struct Retain {
    limit: usize,
    kept: Lists<Kept>,
    /// Each has at least one frame, so there are never more of them than of frames.
    flows: FlatTable<KeptFlow>,
    waiting: Lists<Slot>,
    queues: [Ends; QUEUES],
}

impl Default for Retain {
    /// Keeps nothing.
    fn default() -> Self {
        Self::new(0, 0)
    }
}

impl Retain {
    /// Room for `limit` frames.
    pub(crate) fn new(limit: usize, seed: u64) -> Self {
        Self {
            limit,
            kept: Lists::with_capacity(limit),
            flows: FlatTable::new(limit, seed),
            waiting: Lists::with_capacity(limit),
            queues: [Ends::EMPTY; QUEUES],
        }
    }

    /// How many frames are kept.
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }

    /// Nothing more can be kept.
    pub(crate) fn is_full(&self) -> bool {
        self.kept.len() >= self.limit
    }

    /// Keeps a frame with this segment until an ACK of its end covers it, and gives a copy to be delivered. The frame
    /// comes back when there is no room for it, or no slot for the copy.
    pub(crate) fn keep<F: Frames + ?Sized>(
        &mut self,
        frames: &mut F,
        key: FlowKey,
        tcp: &Tcp,
        token: Token,
        due_us: u64,
    ) -> Result<Token, Token> {
        if self.is_full() {
            return Err(token);
        }
        let Some(copy) = frames.duplicate(&token) else {
            return Err(token);
        };
        let slot = self.place(key, due_us);
        let Some(flow) = slot.and_then(|slot| self.flows.at_mut(slot)) else {
            frames.release(copy);
            return Err(token);
        };
        flow.hear(&self.kept, frames.header(&token), tcp);
        let end = tcp.end();
        let prev = place_of(&self.kept, &flow.frames, end);
        let kept = Kept { end, token };
        self.kept.insert_after(&mut flow.frames, prev, kept);
        Ok(copy)
    }

    fn place(&mut self, key: FlowKey, due_us: u64) -> Option<Slot> {
        let hash = self.flows.hash(&key);
        if let Some(slot) = self.flows.slot_of(hash, &key) {
            return Some(slot);
        }
        let flow = KeptFlow {
            frames: Ends::EMPTY,
            next: NIL,
            burst: 0,
            as_they_came: false,
            heard: None,
            tries: 0,
            queue: FIRST_WAIT,
            node: NIL,
            due_us,
        };
        let slot = self.flows.insert(hash, key, flow).ok()?;
        let queue = &mut self.queues[usize::from(FIRST_WAIT)];
        let node = self.waiting.push_back(queue, slot);
        self.flows.at_mut(slot)?.node = node;
        Some(slot)
    }

    fn slot_of(&self, key: &FlowKey) -> Option<Slot> {
        self.flows.slot_of(self.flows.hash(key), key)
    }

    /// Takes note of a segment from the peer that is not kept: what is delivered again says what it says.
    pub(crate) fn heard(&mut self, key: &FlowKey, header: &[u8], tcp: &Tcp) {
        // Most of the time nothing is, and no key is looked up.
        if self.kept.len() == 0 {
            return;
        }
        let slot = self.slot_of(key);
        if let Some(flow) = slot.and_then(|slot| self.flows.at_mut(slot)) {
            flow.hear(&self.kept, header, tcp);
        }
    }

    /// The caller puts all [`Retain::tokens`] through these translations.
    pub(crate) fn inbound(&mut self, offsets_of: impl Fn(&FlowKey) -> Offsets) {
        for slot in 0..self.flows.slots() as Slot {
            if let Some((key, flow)) = self.flows.entry_mut(slot)
                && let Some(heard) = &mut flow.heard
            {
                heard.inbound(offsets_of(key));
            }
        }
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
        let slot = self.slot_of(key);
        let Some(flow) = slot.and_then(|slot| self.flows.at_mut(slot)) else {
            return;
        };
        let before = self.kept.len();
        take_covered(&mut self.kept, &mut flow.frames, ack, frames);
        if flow.frames.is_empty() {
            self.end_flow(key);
        } else if self.kept.len() < before {
            // A guest that came to life again gets the rest without waiting.
            let (queue, due_us) = match flow.tries {
                0 => (FIRST_WAIT, now_us + wait_us),
                _ => (AT_ONCE, now_us),
            };
            (flow.tries, flow.burst, flow.as_they_came) = (0, 0, false);
            self.reschedule(slot, queue, due_us);
        }
    }

    fn reschedule(&mut self, slot: Option<Slot>, queue: u8, due_us: u64) {
        let Some(slot) = slot else { return };
        let Some(flow) = self.flows.at_mut(slot) else {
            return;
        };
        let from = &mut self.queues[usize::from(flow.queue)];
        self.waiting.remove(from, flow.node);
        let to = &mut self.queues[usize::from(queue)];
        flow.node = self.waiting.push_back(to, slot);
        (flow.queue, flow.due_us) = (queue, due_us);
    }

    fn end_flow(&mut self, key: &FlowKey) -> Option<KeptFlow> {
        let flow = self.flows.remove(key)?;
        let queue = &mut self.queues[usize::from(flow.queue)];
        self.waiting.remove(queue, flow.node);
        Some(flow)
    }

    /// The connection was reset, or begins anew.
    pub(crate) fn forget<F: Frames + ?Sized>(&mut self, key: &FlowKey, frames: &mut F) {
        if let Some(mut flow) = self.end_flow(key) {
            while let Some(kept) = self.kept.pop_front(&mut flow.frames) {
                frames.release(kept.token);
            }
        }
    }

    /// The peer reset the connection with this sequence number. Guests believe it only right after
    /// what they have received (RFC 5961 section 3.2), so anybody's who does not know that number
    /// changes nothing (rule 5).
    pub(crate) fn reset<F: Frames + ?Sized>(&mut self, key: &FlowKey, seq: u32, frames: &mut F) {
        let flow = self.slot_of(key).and_then(|slot| self.flows.at(slot));
        let last = flow.and_then(|flow| self.kept.get(flow.frames.tail));
        if last.is_some_and(|kept| kept.end == seq) {
            self.forget(key, frames);
        }
    }

    /// A commit includes everything. Gives how many frames that were.
    pub(crate) fn clear<F: Frames + ?Sized>(&mut self, frames: &mut F) -> usize {
        let dropped = self.kept.len();
        for node in 0..self.kept.nodes() {
            if let Some(kept) = self.kept.take(node) {
                frames.release(kept.token);
            }
        }
        self.kept.clear();
        self.flows.clear();
        self.waiting.clear();
        self.queues = [Ends::EMPTY; QUEUES];
        dropped
    }

    /// A copy of the next frame that is due for delivery again.
    pub(crate) fn poll_due<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        wait_us: u64,
        frames: &mut F,
    ) -> Option<Token> {
        let (_, slot) = self.first_due().filter(|(due_us, _)| *due_us <= now_us)?;
        let flow = self.flows.at_mut(slot)?;
        let node = if flow.burst == 0 {
            flow.frames.head
        } else {
            flow.next
        };
        let copy = frames.duplicate(&self.kept.get(node)?.token)?;
        if let Some(heard) = flow.heard.filter(|_| !flow.as_they_came) {
            let (header, len) = (frames.header(&copy), frames.len(&copy));
            let packet = wire::parse(header, len, Direction::ToGuest);
            if let Some(mut tcp) = packet.tcp {
                heard.renew(frames.header_mut(&copy), &mut tcp);
            }
        }
        (flow.next, flow.burst) = (self.kept.next(node), flow.burst + 1);
        if flow.next == NIL || flow.burst == BURST {
            (flow.burst, flow.as_they_came) = (0, !flow.as_they_came);
            flow.tries = (flow.tries + 1).min(MAX_BACKOFF);
            let (queue, wait_us) = (FIRST_WAIT + flow.tries, wait_us << flow.tries);
            self.reschedule(Some(slot), queue, now_us + wait_us);
        }
        Some(copy)
    }

    /// The flow that is due first, and when.
    fn first_due(&self) -> Option<(u64, Slot)> {
        let heads = self
            .queues
            .iter()
            .filter_map(|queue| self.waiting.get(queue.head));
        heads
            .filter_map(|slot| Some((self.flows.at(*slot)?.due_us, *slot)))
            .min()
    }

    /// When [`Retain::poll_due`] has something next.
    pub(crate) fn next_due_us(&self) -> Option<u64> {
        self.first_due().map(|(due_us, _)| due_us)
    }

    /// Makes everything due at once (the peer that fed the guest is gone).
    pub(crate) fn hurry(&mut self, now_us: u64) {
        for slot in 0..self.flows.slots() as Slot {
            self.reschedule(Some(slot), AT_ONCE, now_us);
        }
    }

    /// Every kept frame.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = &Token> {
        let kept = (0..self.kept.nodes()).filter_map(|node| self.kept.get(node));
        kept.map(|kept| &kept.token)
    }
}

impl KeptFlow {
    /// Takes note of what a segment tells, unless it is far from what is kept, or was overtaken by a newer one.
    fn hear(&mut self, kept: &Lists<Kept>, header: &[u8], tcp: &Tcp) {
        let is_far = |last: &Kept| last.end.wrapping_sub(tcp.seq).wrapping_add(NEAR) > 2 * NEAR;
        if kept.get(self.frames.tail).is_some_and(is_far) {
            return;
        }
        let overtaken = |new: &LastHeard| self.heard.is_some_and(|last| new.is_before(&last));
        if let Some(heard) = LastHeard::of(header, tcp).filter(|new| !overtaken(new)) {
            self.heard = Some(heard);
        }
    }
}

/// After which of a flow's frames one with this end belongs. Nearly always the last one.
fn place_of(kept: &Lists<Kept>, frames: &Ends, end: u32) -> u32 {
    let mut prev = frames.tail;
    for _ in 0..MAX_STEPS {
        match kept.get(prev) {
            Some(other) if other.end != end && other.end.wrapping_sub(end) <= WINDOW_MAX => {
                prev = kept.prev(prev);
            }
            _ => break,
        }
    }
    prev
}

/// Gives back what an ACK covers: the first frames, but for those with made-up numbers.
fn take_covered<F: Frames + ?Sized>(
    kept: &mut Lists<Kept>,
    flow_frames: &mut Ends,
    ack: u32,
    frames: &mut F,
) {
    let (mut at, mut steps) = (flow_frames.head, 0);
    while let Some(end) = kept.get(at).map(|kept| kept.end) {
        let next = kept.next(at);
        if seq::le(end, ack) {
            let covered = kept.remove(flow_frames, at);
            covered
                .into_iter()
                .for_each(|kept| frames.release(kept.token));
        } else if end.wrapping_sub(ack) <= WINDOW_MAX || steps == MAX_STEPS {
            break;
        } else {
            steps += 1;
        }
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Protocol;
    use crate::testing::{Segment, Side, VecFrames};
    use alloc::vec::Vec;
    use proptest::prelude::*;

    const WAIT_US: u64 = 50;

    fn key(port: u16) -> FlowKey {
        FlowKey::bare(Protocol::Tcp, [0; 2]).with_ports(port, 9)
    }

    /// A segment without an ACK, so that nobody looks into the frame for what the peer says.
    fn until(end: u32) -> Tcp {
        let bytes = Segment::new(Side::V4).flags(0).seq(end).bytes();
        let packet = wire::parse(&bytes, bytes.len(), Direction::ToGuest);
        packet.tcp.expect("TCP")
    }

    /// Keeps a frame that holds its own end.
    fn keep(retain: &mut Retain, frames: &mut VecFrames, port: u16, end: u32, due_us: u64) -> bool {
        let token = frames.insert(&end.to_be_bytes()).unwrap();
        match retain.keep(frames, key(port), &until(end), token, due_us) {
            Ok(copy) => {
                frames.release(copy);
                true
            }
            Err(token) => {
                frames.release(token);
                false
            }
        }
    }

    fn due(retain: &mut Retain, frames: &mut VecFrames, now_us: u64) -> Option<u32> {
        let copy = retain.poll_due(now_us, WAIT_US, frames)?;
        Some(u32::from_be_bytes(frames.take(copy).try_into().unwrap()))
    }

    #[test]
    fn rule_5_kept_until_covered_and_delivered_again() {
        let mut frames = VecFrames::new(16);
        let mut retain = Retain::new(8, 0);
        for end in [u32::MAX, 10, 20] {
            assert!(keep(&mut retain, &mut frames, 1, end, 50));
        }
        assert_eq!(due(&mut retain, &mut frames, 49), None);
        for end in [u32::MAX, 10, 20] {
            assert_eq!(due(&mut retain, &mut frames, 50), Some(end));
        }
        assert_eq!(due(&mut retain, &mut frames, 60), None);
        assert_eq!(retain.next_due_us(), Some(150));
        retain.covered(60, 50, &key(1), 10, &mut frames);
        assert_eq!((retain.len(), frames.used()), (1, 1));
        assert_eq!(
            retain.next_due_us(),
            Some(60),
            "progress after a stall hurries the rest"
        );
        retain.covered(61, 50, &key(1), 20, &mut frames);
        assert_eq!(
            (retain.len(), frames.used(), retain.next_due_us()),
            (0, 0, None)
        );
    }

    #[test]
    fn a_full_store_gives_the_frame_back() {
        let mut frames = VecFrames::new(16);
        let mut retain = Retain::new(2, 0);
        assert!(keep(&mut retain, &mut frames, 1, 10, 50));
        assert!(keep(&mut retain, &mut frames, 2, 10, 50));
        assert!(retain.is_full() && !keep(&mut retain, &mut frames, 1, 20, 50));
        retain.forget(&key(2), &mut frames);
        assert!(keep(&mut retain, &mut frames, 1, 20, 50));
        let token = frames.insert(&[0; 4]).unwrap();
        retain.forget(&key(1), &mut frames);
        let mut none_free = VecFrames::new(1);
        let only = none_free.insert(&[0; 4]).unwrap();
        let refused = retain.keep(&mut none_free, key(3), &until(1), only, 50);
        assert_eq!((refused.is_err(), retain.len()), (true, 0));
        frames.release(token);
        assert_eq!((frames.used(), retain.next_due_us()), (0, None));
    }

    #[test]
    fn what_comes_out_of_order_is_ordered() {
        let mut frames = VecFrames::new(16);
        let mut retain = Retain::new(8, 0);
        for end in [20, 40, 10, 30, 30] {
            keep(&mut retain, &mut frames, 1, end, 50);
        }
        for end in [10, 20, 30, 30, 40] {
            assert_eq!(due(&mut retain, &mut frames, 50), Some(end));
        }
        retain.covered(60, 50, &key(1), 30, &mut frames);
        assert_eq!(retain.len(), 1);
        retain.clear(&mut frames);
        assert_eq!(frames.used(), 0);
    }

    #[test]
    fn a_made_up_number_does_not_stand_before_what_is_covered() {
        let mut frames = VecFrames::new(16);
        let mut retain = Retain::new(8, 0);
        let made_up = 1005 + (1 << 31);
        for end in [made_up, 1000, 2000, made_up + 1, 3000] {
            keep(&mut retain, &mut frames, 1, end, 50);
        }
        retain.covered(1, 50, &key(1), 1500, &mut frames);
        assert_eq!(retain.len(), 4);
        retain.covered(1, 50, &key(1), 3000, &mut frames);
        assert_eq!(retain.len(), 2);
        retain.forget(&key(1), &mut frames);
        assert_eq!(frames.used(), 0);
    }

    #[test]
    fn connections_take_turns_by_when_they_are_due_and_bursts_are_short() {
        let mut frames = VecFrames::new(64);
        let mut retain = Retain::new(64, 0);
        (0..20).for_each(|n| assert!(keep(&mut retain, &mut frames, 1, 100 + n, 50)));
        keep(&mut retain, &mut frames, 2, 7, 51);
        let first: Vec<_> = core::iter::from_fn(|| due(&mut retain, &mut frames, 60)).collect();
        assert_eq!(first, [100, 101, 102, 103, 104, 105, 106, 107, 7]);
        assert_eq!(retain.next_due_us(), Some(60 + 2 * WAIT_US));
        let mut now_us = 60;
        for doublings in [1, 2, 3, 4, 5, 5] {
            assert_eq!(retain.next_due_us(), Some(now_us + (WAIT_US << doublings)));
            now_us += WAIT_US << doublings;
            assert_eq!(due(&mut retain, &mut frames, now_us - 1), None);
            while due(&mut retain, &mut frames, now_us).is_some() {}
        }
        retain.hurry(now_us + 1);
        assert_eq!(retain.next_due_us(), Some(now_us + 1));
        assert_eq!(retain.tokens().count(), 21);
        assert_eq!(retain.clear(&mut frames), 21);
        assert_eq!((frames.used(), retain.next_due_us()), (0, None));
    }

    proptest! {
        /// Against lists that are searched from end to end.
        #[test]
        fn due_times_and_coverage_are_those_of_plain_lists(
            steps in proptest::collection::vec((0u8..5, 0u16..4, 0u32..40), 1..200),
        ) {
            let mut frames = VecFrames::new(1000);
            let mut retain = Retain::new(300, 5);
            // Port: (ends, due, tries).
            let mut model = alloc::collections::BTreeMap::<u16, (Vec<u32>, u64, u32)>::new();
            let mut now_us = 0;
            for (step, port, n) in steps {
                now_us += u64::from(n);
                match step {
                    0 | 1 => {
                        keep(&mut retain, &mut frames, port, n, now_us + WAIT_US);
                        let flow = model.entry(port).or_insert((Vec::new(), now_us + WAIT_US, 0));
                        flow.0.push(n);
                    }
                    2 => {
                        retain.covered(now_us, WAIT_US, &key(port), n, &mut frames);
                        if let Some((ends, due_us, tries)) = model.get_mut(&port) {
                            let before = ends.len();
                            ends.retain(|end| *end > n);
                            if ends.is_empty() {
                                model.remove(&port);
                            } else if ends.len() < before {
                                *due_us = if *tries == 0 { now_us + WAIT_US } else { now_us };
                                *tries = 0;
                            }
                        }
                    }
                    3 => {
                        retain.forget(&key(port), &mut frames);
                        model.remove(&port);
                    }
                    _ => {
                        let mut given: Vec<_> =
                            core::iter::from_fn(|| due(&mut retain, &mut frames, now_us)).collect();
                        let mut expected = Vec::new();
                        for (ends, due_us, tries) in model.values_mut() {
                            if *due_us <= now_us {
                                ends.sort_unstable();
                                expected.extend(ends.iter().take(BURST.into()));
                                *tries = (*tries + 1).min(MAX_BACKOFF.into());
                                *due_us = now_us + (WAIT_US << *tries);
                            }
                        }
                        given.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(given, expected);
                    }
                }
                let kept: usize = model.values().map(|flow| flow.0.len()).sum();
                prop_assert_eq!((retain.len(), frames.used()), (kept, kept));
                prop_assert_eq!(retain.next_due_us(), model.values().map(|flow| flow.1).min());
            }
            retain.clear(&mut frames);
            prop_assert_eq!(frames.used(), 0);
        }
    }
}
