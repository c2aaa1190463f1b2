//! What a policy says about single flows: compare, hold, let go, or leave some bytes out.
//!
//! Invariant: the first rule that matches decides; a flow that none matches is compared. A flow's
//! rule is looked up once, when the flow is first seen.
//!
//! Does not read files: the shell makes [`Rule`]s of whatever it is configured with.

use alloc::vec::Vec;
use core::net::IpAddr;

use crate::flow::{FlowKey, Protocol};
use crate::span::Span;

/// Which protocols a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP.
    Icmp,
    /// ICMPv6, neighbour discovery included.
    Icmpv6,
    /// ARP.
    Arp,
    /// Another IP protocol, by its number.
    Ip(u8),
    /// Another EtherType.
    Ether(u16),
}

impl PolicyProtocol {
    fn matches(self, protocol: Protocol) -> bool {
        match self {
            Self::Tcp => protocol == Protocol::Tcp,
            Self::Udp => protocol == Protocol::Udp,
            Self::Icmp => protocol == Protocol::Icmp,
            Self::Icmpv6 => protocol == Protocol::Icmpv6,
            Self::Arp => protocol == Protocol::Arp,
            Self::Ip(number) => protocol == Protocol::Ip(number),
            Self::Ether(ethertype) => protocol == Protocol::Ether(ethertype),
        }
    }
}

/// An address range: the first `bits` bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    address: IpAddr,
    bits: u8,
}

impl Prefix {
    /// `None` when `bits` is more than the address has.
    pub fn new(address: IpAddr, bits: u8) -> Option<Self> {
        let most = if address.is_ipv4() { 32 } else { 128 };
        (bits <= most).then_some(Self { address, bits })
    }

    /// Whether the range holds `address`; one of the other family never.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let differing = a.to_bits() ^ b.to_bits();
                differing.leading_zeros() >= u32::from(self.bits)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let differing = a.to_bits() ^ b.to_bits();
                differing.leading_zeros() >= u32::from(self.bits)
            }
            _ => false,
        }
    }
}

/// Who sent a flow's first frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opener {
    /// The other end: the guest serves.
    Peer,
    /// The guest.
    Guest,
}

/// What is done with a flow's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PolicyAction {
    /// The rule for everything else.
    #[default]
    Compare,
    /// It leaves by checkpoints only.
    Hold,
    /// It leaves without the SVM's word, as long as the heartbeat is fresh: this flow is not
    /// protected.
    Release,
    /// Compared, but these bytes count as equal whatever they are. For TCP they count from the
    /// start of the guest's byte stream, however long that is (nothing is left out of a connection
    /// whose start was not seen), for everything else from the start of the payload. Fragments are
    /// compared whole.
    IgnoreBytes {
        /// The first byte.
        from: u32,
        /// The byte after the last; `u32::MAX` means all that follows.
        end: u32,
    },
}

impl PolicyAction {
    pub(crate) fn ignored(self) -> Option<Span> {
        match self {
            Self::IgnoreBytes { from, end } => Some(Span::new(from, end)),
            _ => None,
        }
    }
}

/// One line of a policy: what is not given matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rule {
    /// What is carried.
    pub protocol: Option<PolicyProtocol>,
    /// The guest's address.
    pub guest: Option<Prefix>,
    /// The other end's address.
    pub peer: Option<Prefix>,
    /// The guest's port, first to last.
    pub guest_ports: Option<(u16, u16)>,
    /// The other end's port, first to last.
    pub peer_ports: Option<(u16, u16)>,
    /// Who opened the flow: who sent its SYN, or its first datagram. A TCP flow that was met half
    /// way, or forgotten in between, has no direction.
    pub direction: Option<Opener>,
    /// What is done.
    pub action: PolicyAction,
}

impl Rule {
    fn matches(&self, key: &FlowKey, opener: Option<Opener>) -> bool {
        let port_is_in = |range: Option<(u16, u16)>, port: u16| {
            let has_ports = matches!(key.protocol(), Protocol::Tcp | Protocol::Udp);
            range.is_none_or(|(first, last)| has_ports && (first..=last).contains(&port))
        };
        let address_is_in = |prefix: &Option<Prefix>, address: IpAddr| {
            prefix.is_none_or(|prefix| key.has_addresses() && prefix.contains(address))
        };
        self.protocol.is_none_or(|p| p.matches(key.protocol()))
            && (self.direction.is_none() || self.direction == opener)
            && port_is_in(self.guest_ports, key.guest_port())
            && port_is_in(self.peer_ports, key.peer_port())
            && address_is_in(&self.guest, key.guest())
            && address_is_in(&self.peer, key.peer())
    }
}

/// An ordered list of rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<Rule>,
}

impl Policy {
    /// The first rule that matches decides.
    pub fn new(rules: Vec<Rule>) -> Self {
        Self { rules }
    }

    /// The number of the rule that decides, which a flow keeps; one past the last for none.
    pub(crate) fn rule_number(&self, key: &FlowKey, opener: Option<Opener>) -> u16 {
        let number = self.rules.iter().position(|rule| rule.matches(key, opener));
        number
            .unwrap_or(self.rules.len())
            .min(usize::from(u16::MAX)) as u16
    }

    pub(crate) fn action_of(&self, rule_number: u16) -> PolicyAction {
        let rule = self.rules.get(usize::from(rule_number));
        rule.map_or(PolicyAction::Compare, |rule| rule.action)
    }

    /// Without rules, everything is compared.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// What is done with the flow. A rule that names a direction is not for a flow of which nobody
    /// knows who opened it.
    pub fn action(&self, key: &FlowKey, opener: impl Into<Option<Opener>>) -> PolicyAction {
        let opener = opener.into();
        let rule = self.rules.iter().find(|rule| rule.matches(key, opener));
        rule.map_or(PolicyAction::Compare, |rule| rule.action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> FlowKey {
        let (guest, peer) = ("10.1.2.3".parse().unwrap(), "192.168.7.9".parse().unwrap());
        FlowKey::new(Protocol::Tcp, [0; 2], guest, peer).with_ports(80, 40_000)
    }

    fn prefix(address: &str, bits: u8) -> Option<Prefix> {
        Prefix::new(address.parse().unwrap(), bits)
    }

    #[test]
    fn each_field_narrows_a_rule_down() {
        let all = Rule {
            protocol: Some(PolicyProtocol::Tcp),
            guest: prefix("10.0.0.0", 8),
            peer: prefix("192.168.7.0", 24),
            guest_ports: Some((80, 90)),
            peer_ports: Some((40_000, 40_000)),
            direction: Some(Opener::Peer),
            action: PolicyAction::Hold,
        };
        let decide = |rule: Rule| Policy::new(Vec::from([rule])).action(&key(), Opener::Peer);
        assert_eq!(decide(all), PolicyAction::Hold);
        let others = [
            Rule {
                protocol: Some(PolicyProtocol::Udp),
                ..all
            },
            Rule {
                guest: prefix("11.0.0.0", 8),
                ..all
            },
            Rule {
                peer: prefix("fd00::", 0),
                ..all
            },
            Rule {
                guest_ports: Some((81, 90)),
                ..all
            },
            Rule {
                peer_ports: Some((0, 39_999)),
                ..all
            },
            Rule {
                direction: Some(Opener::Guest),
                ..all
            },
        ];
        for other in others {
            assert_eq!(decide(other), PolicyAction::Compare, "{other:?}");
        }
    }

    #[test]
    fn a_rule_with_a_direction_is_not_for_a_flow_that_was_met_half_way() {
        let inbound = Rule {
            direction: Some(Opener::Peer),
            action: PolicyAction::Release,
            ..Rule::default()
        };
        let policy = Policy::new(Vec::from([inbound]));
        assert_eq!(policy.action(&key(), Opener::Peer), PolicyAction::Release);
        assert_eq!(policy.action(&key(), None), PolicyAction::Compare);
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let hold = Rule {
            action: PolicyAction::Hold,
            ..Rule::default()
        };
        let release = Rule {
            action: PolicyAction::Release,
            ..Rule::default()
        };
        let policy = Policy::new(Vec::from([release, hold]));
        assert_eq!(policy.action(&key(), Opener::Guest), PolicyAction::Release);
        assert_eq!(
            Policy::default().action(&key(), Opener::Guest),
            PolicyAction::Compare
        );
    }

    #[test]
    fn a_prefix_is_no_longer_than_its_address() {
        assert_eq!(prefix("10.0.0.0", 33), None);
        assert_eq!(prefix("fd00::", 129), None);
        let everything = prefix("0.0.0.0", 0).unwrap();
        assert!(everything.contains("255.0.0.1".parse().unwrap()));
        assert!(!everything.contains("::1".parse().unwrap()));
    }

    #[test]
    fn ports_and_addresses_match_only_flows_that_have_them() {
        let arp = FlowKey::bare(Protocol::Ether(0x88cc), [0; 2]);
        let anywhere = Rule {
            guest: prefix("0.0.0.0", 0),
            ..Rule::default()
        };
        let any_port = Rule {
            guest_ports: Some((0, u16::MAX)),
            ..Rule::default()
        };
        for rule in [anywhere, any_port] {
            let rule = Rule {
                action: PolicyAction::Hold,
                ..rule
            };
            let policy = Policy::new(Vec::from([rule]));
            assert_eq!(policy.action(&arp, Opener::Guest), PolicyAction::Compare);
        }
    }
}
