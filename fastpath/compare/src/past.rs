//! Short segments that have left, to be compared with retransmissions (rule 8): copied, one behind the other, for all
//! flows together.
//!
//! Invariants: the memory is taken at the start, and the oldest is overwritten when it is full; what is found belongs
//! to the flow, the connection and the epoch that it is looked for in. What the client has acknowledged is not taken
//! out: nobody looks below what a flow owes.
//!
//! Does not keep longer segments, which stay in their frames: to copy them takes longer than to keep a list.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::list::NIL;
use crate::table::FlowId;

/// Longest packet that is copied, headers included.
pub(crate) const SHORT_BYTES: usize = 160;
/// Flows whose numbers are equal in so many bits share a chain.
const CHAINS: usize = 1 << 10;

/// Where a segment's bytes lie in its stream, and whose they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Past {
    /// [`NIL`] when the flow has been forgotten.
    pub(crate) flow: FlowId,
    pub(crate) incarnation: u32,
    pub(crate) seq: u32,
    payload_at: u16,
    end: u16,
    /// The number of the segment before it in its chain.
    before: u32,
}

impl Past {
    pub(crate) fn payload_len(&self) -> u16 {
        self.end - self.payload_at
    }
}

/// A segment with its bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PastSegment<'a> {
    pub(crate) seq: u32,
    /// From the Ethernet header to the end of the packet.
    pub(crate) packet: &'a [u8],
    pub(crate) payload: &'a [u8],
}

/// See the module.
#[derive(Debug)]
pub(crate) struct PastLog {
    entries: Vec<Past>,
    bytes: Vec<u8>,
    /// The number of the latest segment in each chain.
    latest: Box<[u32; CHAINS]>,
    mask: u32,
    limit: u32,
    /// Numbers of the oldest segment and of the next one: they count up, and wrap.
    oldest: u32,
    next: u32,
}

impl PastLog {
    /// Room for `limit` segments.
    pub(crate) fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, 1 << 30);
        let places = limit.next_power_of_two();
        let none = Past {
            flow: NIL,
            incarnation: 0,
            seq: 0,
            payload_at: 0,
            end: 0,
            before: 0,
        };
        Self {
            entries: vec![none; places],
            bytes: vec![0; places * SHORT_BYTES],
            latest: Box::new([0; CHAINS]),
            mask: places as u32 - 1,
            limit: limit as u32,
            oldest: 0,
            next: 0,
        }
    }

    /// The oldest segment, which the next one overwrites when there is no room for another.
    #[inline(always)]
    pub(crate) fn overwritten(&self) -> Option<&Past> {
        let is_full = self.next.wrapping_sub(self.oldest) >= self.limit;
        self.entries
            .get((self.oldest & self.mask) as usize)
            .filter(|_| is_full)
    }

    /// Keeps a segment of up to [`SHORT_BYTES`] bytes.
    #[inline(always)]
    pub(crate) fn push(
        &mut self,
        (flow, incarnation, seq): (FlowId, u32, u32),
        packet: &[u8],
        payload_at: u16,
    ) {
        let number = self.next;
        if number.wrapping_sub(self.oldest) >= self.limit {
            self.oldest = self.oldest.wrapping_add(1);
        }
        let place = (number & self.mask) as usize;
        let latest = &mut self.latest[flow as usize % CHAINS];
        let before = core::mem::replace(latest, number);
        let from = place * SHORT_BYTES;
        let bytes = self.bytes.get_mut(from..from + packet.len());
        if let (Some(entry), Some(bytes)) = (self.entries.get_mut(place), bytes) {
            *entry = Past {
                flow,
                incarnation,
                seq,
                payload_at,
                end: packet.len() as u16,
                before,
            };
            bytes.copy_from_slice(packet);
        }
        self.next = number.wrapping_add(1);
    }

    /// The segments of a connection, the latest first.
    pub(crate) fn of(
        &self,
        flow: FlowId,
        incarnation: u32,
    ) -> impl Iterator<Item = PastSegment<'_>> {
        let chain = self.chain(flow).map(|place| (place, &self.entries[place]));
        let of_this =
            chain.filter(move |(_, past)| past.flow == flow && past.incarnation == incarnation);
        of_this.map(|(place, past)| {
            let packet = &self.bytes[place * SHORT_BYTES..][..past.end.into()];
            PastSegment {
                seq: past.seq,
                packet,
                payload: &packet[past.payload_at.into()..],
            }
        })
    }

    /// Places of the segments that share a flow's chain, the latest first.
    fn chain(&self, flow: FlowId) -> impl Iterator<Item = usize> {
        let mut at = self.latest[flow as usize % CHAINS];
        let mut bound = self.next;
        core::iter::from_fn(move || {
            // Each number is below the one before it and not below the oldest: what is not is overwritten.
            let is_there = at.wrapping_sub(self.oldest) < bound.wrapping_sub(self.oldest);
            if !is_there {
                return None;
            }
            bound = at;
            let place = (at & self.mask) as usize;
            at = self.entries[place].before;
            Some(place)
        })
    }

    /// The flow's number may name another one from now on.
    pub(crate) fn forget(&mut self, flow: FlowId) {
        let mut at = self.latest[flow as usize % CHAINS];
        let mut bound = self.next;
        while at.wrapping_sub(self.oldest) < bound.wrapping_sub(self.oldest) {
            bound = at;
            let entry = &mut self.entries[(at & self.mask) as usize];
            if entry.flow == flow {
                entry.flow = NIL;
            }
            at = entry.before;
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.oldest = self.next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::VecDeque;
    use proptest::prelude::*;

    proptest! {
        /// Against a list that is searched from end to end.
        #[test]
        fn what_is_found_is_what_is_in_a_plain_list(
            limit in 1usize..9,
            first in prop_oneof![Just(0u32), Just(u32::MAX - 10)],
            steps in proptest::collection::vec((0u8..10, 0u32..3, 0u32..2, 1usize..SHORT_BYTES), 1..60),
        ) {
            let mut log = PastLog::new(limit);
            (log.oldest, log.next) = (first, first);
            log.latest.fill(first.wrapping_sub(1));
            let mut model: VecDeque<(FlowId, u32, u32, Vec<u8>)> = VecDeque::new();
            for (n, (step, flow, incarnation, len)) in steps.into_iter().enumerate() {
                // Two of them share a chain.
                let flow = [1, 2, 1 + CHAINS as u32][flow as usize];
                match step {
                    0 => {
                        log.forget(flow);
                        model.iter_mut().filter(|(whose, ..)| *whose == flow).for_each(|past| past.0 = NIL);
                    }
                    1 if len < 20 => {
                        log.clear();
                        model.clear();
                    }
                    _ => {
                        let packet = vec![n as u8; len];
                        let oldest = (model.len() == limit).then(|| model.pop_front().unwrap());
                        let taken = log.overwritten().map(|past| (past.flow, past.seq));
                        prop_assert_eq!(taken, oldest.map(|(flow, _, seq, _)| (flow, seq)));
                        log.push((flow, incarnation, n as u32), &packet, len as u16 / 2);
                        model.push_back((flow, incarnation, n as u32, packet));
                    }
                }
                for (flow, incarnation) in [(1, 0), (1, 1), (2, 0), (1 + CHAINS as u32, 1)] {
                    let found: Vec<_> = log.of(flow, incarnation).map(|past| (past.seq, past.packet.to_vec())).collect();
                    let all = model.iter().rev().filter(|past| (past.0, past.1) == (flow, incarnation));
                    let expected: Vec<_> = all.map(|past| (past.2, past.3.clone())).collect();
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }
}
