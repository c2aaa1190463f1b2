//! What is counted for each flow, and how the SVM's part of it maps to the PVM's.
//!
//! Invariant: at most [`FLOWS_MAX`] flows are told apart; beyond that the longest silent ones are
//! added up in one row, those that wait for something or have diverged last.

use std::collections::{HashMap, VecDeque};

use colo_compare::wire::tcp::{ACK, SYN};
use colo_compare::wire::{Packet, Tcp};
use colo_compare::{FlowKey, Opener};

use crate::capture::Record;
use crate::report::{FlowRow, Traffic};
use crate::stream::Stream;

/// Flows that are told apart at the same time.
pub const FLOWS_MAX: usize = 262_144;
/// Datagrams of a flow whose counterpart may come after the checkpoint that let them leave.
const COVERED_MAX: usize = 64;

/// One flow.
#[derive(Debug, Default)]
pub(crate) struct Flow<'a> {
    /// Order of appearance.
    serial: u64,
    last_us: u64,
    /// Unknown until the first frame, and perhaps afterwards.
    opener: Option<Option<Opener>>,
    pub(crate) row: FlowRow,
    /// PVM frames that the comparator holds.
    pub(crate) waiting: u64,
    pub(crate) stream: Stream<'a>,
    /// When either side sent the last segment that is compared.
    pub(crate) segment_us: u64,
    /// Datagrams of the PVM that left by a checkpoint before the SVM had sent its own.
    covered: VecDeque<(u64, &'a [u8])>,
}

impl<'a> Flow<'a> {
    /// A frame of the primary's capture. The first one tells who opened the flow, as it does to the
    /// comparator: a TCP flow that the capture has from the middle on has no opener.
    pub(crate) fn note_opener(&mut self, tcp: Option<&Tcp>, sender: Opener) {
        let other = match sender {
            Opener::Guest => Opener::Peer,
            Opener::Peer => Opener::Guest,
        };
        self.opener.get_or_insert(match tcp {
            None => Some(sender),
            Some(tcp) if !tcp.has(SYN) => None,
            Some(tcp) if tcp.has(ACK) => Some(other),
            Some(_) => Some(sender),
        });
    }

    /// Who opened the flow, where that is known.
    pub(crate) fn opener(&self) -> Option<Opener> {
        self.opener.flatten()
    }

    /// The PVM's datagram has left by a checkpoint.
    pub(crate) fn cover(&mut self, now_us: u64, body: &'a [u8]) {
        if self.covered.len() == COVERED_MAX {
            self.covered.pop_front();
        }
        self.covered.push_back((now_us, body));
    }

    /// Whether the SVM's datagram is the counterpart of one that has left by a checkpoint. Those
    /// from before `since_us` are forgotten.
    pub(crate) fn take_covered(&mut self, body: &[u8], since_us: u64) -> bool {
        self.covered.retain(|(at_us, _)| *at_us >= since_us);
        let at = self.covered.iter().position(|(_, other)| *other == body);
        at.and_then(|at| self.covered.remove(at)).is_some()
    }

    /// Takes the oldest datagram that has no counterpart yet out of the list, if there is one.
    pub(crate) fn forget_covered(&mut self) -> bool {
        self.covered.pop_front().is_some()
    }
}

/// What of a frame makes it the same datagram as another one of its flow: addresses are in the
/// flow's key, the rest of the network header and the checksum need not be equal.
pub(crate) fn body<'a>(record: &Record<'a>, packet: &Packet) -> &'a [u8] {
    use colo_compare::Protocol::{Icmp, Icmpv6, Udp};
    let skipped = match packet.key.protocol() {
        // Ports and length; type, code and checksum.
        Udp => 8,
        Icmp | Icmpv6 => 4,
        _ => 0,
    };
    let end = usize::from(packet.end);
    let at = (usize::from(packet.l4) + skipped).min(end);
    &record.frame[at..end]
}

/// All flows.
#[derive(Debug, Default)]
pub(crate) struct Flows<'a> {
    flows: HashMap<FlowKey, Flow<'a>>,
    /// Serial of the next one.
    next: u64,
    /// Flows that are not told apart any more.
    forgotten: u64,
    /// The sum of those that were forgotten.
    others: FlowRow,
}

impl<'a> Flows<'a> {
    /// The flow, made if it is new.
    pub(crate) fn of(&mut self, now_us: u64, key: FlowKey) -> &mut Flow<'a> {
        if !self.flows.contains_key(&key) {
            if self.flows.len() >= FLOWS_MAX {
                self.make_room();
            }
            self.next += 1;
        }
        let serial = self.next;
        let flow = self.flows.entry(key).or_insert_with(|| Flow {
            serial,
            row: FlowRow::named(key.to_string()),
            ..Flow::default()
        });
        flow.last_us = now_us;
        flow
    }

    /// The flow, if it is known.
    pub(crate) fn get(&mut self, key: &FlowKey) -> Option<&mut Flow<'a>> {
        self.flows.get_mut(key)
    }

    /// Adds an eighth of the flows up in one row.
    fn make_room(&mut self) {
        let order = |flow: &Flow<'_>| (flow.row.divergences > 0, flow.waiting > 0, flow.last_us);
        let mut by_age: Vec<_> = self
            .flows
            .iter()
            .map(|(key, flow)| (order(flow), *key))
            .collect();
        by_age.sort_unstable();
        for (_, key) in &by_age[..FLOWS_MAX / 8] {
            if let Some(flow) = self.flows.remove(key)
                && flow.row.has_output()
            {
                self.others.add(&flow.row);
                self.forgotten += 1;
            }
        }
    }

    /// All that are known, in order of appearance.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (FlowKey, &mut Flow<'a>)> {
        let mut all: Vec<_> = self.flows.iter_mut().map(|(k, f)| (*k, f)).collect();
        all.sort_unstable_by_key(|(_, flow)| flow.serial);
        all.into_iter()
    }

    /// Rows of the flows in which a guest has sent something, in order of appearance, and the sum
    /// and number of those that have no row.
    pub(crate) fn into_rows(self) -> (Vec<FlowRow>, Option<(u64, FlowRow)>) {
        let mut flows: Vec<_> = self.flows.into_values().collect();
        flows.sort_unstable_by_key(|flow| flow.serial);
        let rows = flows.into_iter().map(|flow| flow.row);
        let others = FlowRow {
            flow: format!("{} others", self.forgotten),
            ..self.others
        };
        let rows = rows.filter(FlowRow::has_output).collect();
        (
            rows,
            (self.forgotten > 0).then_some((self.forgotten, others)),
        )
    }
}

impl Traffic {
    /// Counts a frame.
    pub(crate) fn count(&mut self, record: &Record<'_>) {
        self.packets += 1;
        self.bytes += record.frame.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_compare::Protocol;

    #[test]
    fn flows_beyond_the_limit_are_added_up_the_silent_ones_first() {
        let key = |n: u32| {
            let peer = std::net::Ipv4Addr::from_bits(n).into();
            let guest = std::net::Ipv4Addr::LOCALHOST.into();
            FlowKey::new(Protocol::Udp, [0; 2], guest, peer).with_ports(53, 9)
        };
        let mut flows = Flows::default();
        let count = FLOWS_MAX as u32 + 10;
        for n in 0..count {
            let flow = flows.of(u64::from(n), key(n));
            flow.row.primary.packets += 1;
            // The first one waits for something.
            flow.waiting = u64::from(n == 0);
        }
        assert!(flows.get(&key(0)).is_some() && flows.get(&key(1)).is_none());
        assert!(flows.get(&key(count - 1)).is_some());
        let (rows, others) = flows.into_rows();
        let (forgotten, others) = others.unwrap();
        assert_eq!(rows.len() as u64 + forgotten, u64::from(count));
        assert_eq!(others.primary.packets, forgotten);
        assert_eq!(rows[0].flow, key(0).to_string());
    }

    #[test]
    fn a_datagram_that_left_by_a_checkpoint_has_one_counterpart_for_a_while() {
        let mut flow = Flow::default();
        flow.cover(100, b"one");
        flow.cover(200, b"two");
        assert!(flow.take_covered(b"two", 100));
        assert!(!flow.take_covered(b"two", 100));
        assert!(!flow.take_covered(b"one", 101), "it is too old");
        assert!(!flow.forget_covered());
    }
}
