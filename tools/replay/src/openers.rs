//! Flows that the guests open from ports of their own choice (rule 2).
//!
//! Two guests pick different ports for the same purpose. The comparator finds that once, as a
//! divergence of cause `outbound_tuple`; then the SVM is a copy of the PVM and uses its port. The
//! SVM's capture goes on with the SVM's own, so it is renamed here.
//!
//! Invariant: bounded; the oldest names and candidates go first.

use std::collections::{HashMap, VecDeque};

use colo_compare::FlowKey;

use crate::Side;

/// Flows of one side that may be the counterparts of others.
const CANDIDATES_MAX: usize = 256;
/// Flows that are renamed.
const NAMES_MAX: usize = 16_384;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Openers {
    candidates: VecDeque<(Side, FlowKey)>,
    /// By the SVM's flow, the PVM's.
    names: HashMap<FlowKey, FlowKey>,
    order: VecDeque<FlowKey>,
}

impl Openers {
    /// The guest opens a flow.
    pub(crate) fn opens(&mut self, side: Side, key: FlowKey) {
        if self.candidates.contains(&(side, key)) {
            return;
        }
        if self.candidates.len() == CANDIDATES_MAX {
            self.candidates.pop_front();
        }
        self.candidates.push_back((side, key));
    }

    /// What the PVM calls a flow of the SVM.
    pub(crate) fn name(&self, key: FlowKey) -> FlowKey {
        self.names.get(&key).copied().unwrap_or(key)
    }

    /// The comparator found that `key`, of either side, has another port on the other side. Gives
    /// the SVM's and the PVM's flow, which are one from now on.
    pub(crate) fn join(&mut self, key: FlowKey) -> Option<(FlowKey, FlowKey)> {
        let end = |key: &FlowKey| key.with_ports(0, key.peer_port());
        let find = |side: Side| {
            let mut candidates = self.candidates.iter();
            let exact = candidates
                .clone()
                .any(|candidate| *candidate == (side, key));
            match exact {
                true => Some(key),
                false => candidates
                    .find(|(of, other)| *of == side && end(other) == end(&key))
                    .map(|(_, other)| *other),
            }
        };
        let (svm, pvm) = (find(Side::Secondary)?, find(Side::Primary)?);
        if svm == pvm {
            return None;
        }
        self.candidates
            .retain(|(side, key)| *key != if *side == Side::Primary { pvm } else { svm });
        if self.order.len() == NAMES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.names.remove(&oldest);
        }
        self.order.push_back(svm);
        self.names.insert(svm, pvm);
        Some((svm, pvm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_compare::Protocol;

    fn key(port: u16, peer_port: u16) -> FlowKey {
        let (guest, peer) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        FlowKey::new(Protocol::Udp, [0; 2], guest, peer).with_ports(port, peer_port)
    }

    #[test]
    fn flows_to_the_same_end_are_joined_in_order() {
        let mut openers = Openers::default();
        for (pvm, svm) in [(1000, 2000), (1001, 2001)] {
            openers.opens(Side::Primary, key(pvm, 53));
            openers.opens(Side::Secondary, key(svm, 53));
        }
        openers.opens(Side::Secondary, key(3000, 54));
        assert_eq!(
            openers.join(key(1000, 53)),
            Some((key(2000, 53), key(1000, 53)))
        );
        assert_eq!(
            openers.join(key(2001, 53)),
            Some((key(2001, 53), key(1001, 53)))
        );
        assert_eq!(openers.join(key(3000, 54)), None);
        assert_eq!(openers.name(key(2000, 53)), key(1000, 53));
        assert_eq!(openers.name(key(2002, 53)), key(2002, 53));
    }

    #[test]
    fn the_oldest_go_first() {
        let mut openers = Openers::default();
        for n in 0..2 * NAMES_MAX as u32 {
            let (pvm, svm) = (
                key((n % 30_000) as u16, 53),
                key(40_000 + (n % 20_000) as u16, 53),
            );
            openers.opens(Side::Primary, pvm);
            openers.opens(Side::Secondary, svm);
            openers.join(pvm);
        }
        assert!(openers.names.len() <= NAMES_MAX && openers.candidates.len() <= CANDIDATES_MAX);
    }
}
