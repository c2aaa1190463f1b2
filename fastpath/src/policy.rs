//! The policy file: rules for single flows, in TOML.
//!
//! ```toml
//! [[rule]]                  # the first rule that matches a flow decides; none: compare
//! protocol = "udp"          # tcp udp icmp icmpv6 arp, ip:132, ether:0x88cc
//! guest = "10.0.0.0/8"      # the guest's address or prefix
//! peer = "10.1.2.3"         # the other end's
//! guest_port = 123          # a port, or a range: "1000-2000"
//! peer_port = "32768-60999"
//! direction = "inbound"     # opened by the other end; or "outbound", by the guest
//! action = "ignore-bytes"   # or compare, hold, release
//! bytes = "40..48"          # of ignore-bytes: from the first to before the last; "40..": all from there
//! ```
//!
//! Invariants: every field but `action` may be left out and then matches everything; unknown keys are errors;
//! every error names the file, and the number of the rule and the field where there are any.
//!
//! Does not decide anything: `colo_compare::Policy` does.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use colo_compare::{Opener, Policy, PolicyAction, PolicyProtocol, Prefix, Rule};
use serde::Deserialize;
use toml::{Table, Value};

/// A flow remembers its rule's number in 16 bits.
const RULES_MAX: usize = 65_535;

/// A policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("{}: {source}; name an existing, readable policy file", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or not a list of rules.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why, with line and column.
        source: Box<toml::de::Error>,
    },
    /// A field of a rule that cannot be.
    #[error("{}: rule {rule}: {field} = {value}: {advice}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Which rule, from 1.
        rule: usize,
        /// Which field.
        field: String,
        /// What it says.
        value: String,
        /// What to do.
        advice: &'static str,
    },
    /// A rule that lacks a field.
    #[error("{}: rule {rule}: {field} is missing: {advice}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// Which rule, from 1.
        rule: usize,
        /// Which field.
        field: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// More rules than can be told apart.
    #[error("{}: {found} rules, at most {RULES_MAX}; use prefixes and ranges", path.display())]
    TooMany {
        /// The file.
        path: PathBuf,
        /// How many.
        found: usize,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    rule: Vec<Table>,
}

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The rules.
    pub policy: Policy,
    /// Names them, for two hosts to compare: how many, and a checksum over them. Comments, blank lines and the order of
    /// a rule's fields do not count.
    pub fingerprint: String,
}

/// Reads and checks a file, once: the rules are those that the name is of.
pub fn read(path: &Path) -> Result<Named, PolicyError> {
    let text = std::fs::read_to_string(path).map_err(|source| PolicyError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse(path, &text)
}

fn fingerprint(file: &File) -> String {
    let mut sum = crc32fast::Hasher::new();
    for rule in &file.rule {
        // A table is in the order of its keys.
        sum.update(rule.to_string().as_bytes());
        sum.update(b"\0");
    }
    format!("{} rules, {:08x}", file.rule.len(), sum.finalize())
}

/// Checks the text of a file; `path` is for errors.
pub fn parse(path: &Path, text: &str) -> Result<Named, PolicyError> {
    let file: File = toml::from_str(text).map_err(|source| PolicyError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let found = file.rule.len();
    if found > RULES_MAX {
        let path = path.to_owned();
        return Err(PolicyError::TooMany { path, found });
    }
    let rules = file.rule.iter().enumerate().map(|(n, fields)| {
        let reader = Reader {
            path,
            rule: n + 1,
            fields,
        };
        reader.rule()
    });
    Ok(Named {
        policy: Policy::new(rules.collect::<Result<_, _>>()?),
        fingerprint: fingerprint(&file),
    })
}

/// One rule.
struct Reader<'a> {
    path: &'a Path,
    rule: usize,
    fields: &'a Table,
}

const KNOWN: [&str; 8] = [
    "protocol",
    "guest",
    "peer",
    "guest_port",
    "peer_port",
    "direction",
    "action",
    "bytes",
];

impl Reader<'_> {
    fn rule(&self) -> Result<Rule, PolicyError> {
        let unknown = |name: &&String| !KNOWN.contains(&name.as_str());
        if let Some(name) = self.fields.keys().find(unknown) {
            let advice = "there is no such field; a rule has protocol, guest, peer, guest_port, \
                          peer_port, direction, action and bytes";
            return Err(self.wrong(name, advice));
        }
        let rule = Rule {
            protocol: self.field("protocol", PROTOCOLS, protocol)?,
            guest: self.field("guest", PREFIXES, prefix)?,
            peer: self.field("peer", PREFIXES, prefix)?,
            guest_ports: self.field("guest_port", PORTS, ports)?,
            peer_ports: self.field("peer_port", PORTS, ports)?,
            direction: self.field("direction", "write \"inbound\" or \"outbound\"", direction)?,
            action: self.action()?,
        };
        self.check(&rule)?;
        Ok(rule)
    }

    fn field<T>(
        &self,
        name: &str,
        advice: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, PolicyError> {
        let Some(value) = self.fields.get(name) else {
            return Ok(None);
        };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.wrong(name, advice)),
        }
    }

    fn action(&self) -> Result<PolicyAction, PolicyError> {
        let advice = "write \"compare\", \"hold\", \"release\" or \"ignore-bytes\"";
        let name = |value: &Value| value.as_str().map(str::to_owned);
        let action = match self.field("action", advice, name)?.as_deref() {
            Some("compare") => PolicyAction::Compare,
            Some("hold") => PolicyAction::Hold,
            Some("release") => PolicyAction::Release,
            Some("ignore-bytes") => return self.ignored(),
            Some(_) => return Err(self.wrong("action", advice)),
            None => return Err(self.missing("action", advice)),
        };
        match self.fields.contains_key("bytes") {
            false => Ok(action),
            true => Err(self.wrong("bytes", "only for action = \"ignore-bytes\"")),
        }
    }

    fn ignored(&self) -> Result<PolicyAction, PolicyError> {
        let advice = "write \"40..48\" (the last one not included) or \"40..\"";
        match self.field("bytes", advice, bytes)? {
            Some((from, end)) => Ok(PolicyAction::IgnoreBytes { from, end }),
            None => Err(self.missing("bytes", advice)),
        }
    }

    /// Fields that exclude each other make a rule that never matches.
    fn check(&self, rule: &Rule) -> Result<(), PolicyError> {
        let has_ports = rule
            .protocol
            .is_none_or(|p| matches!(p, PolicyProtocol::Tcp | PolicyProtocol::Udp));
        for (name, ports) in [
            ("guest_port", rule.guest_ports),
            ("peer_port", rule.peer_ports),
        ] {
            if ports.is_some() && !has_ports {
                return Err(self.wrong(name, "this protocol has no ports; leave it out"));
            }
        }
        let family = |name: &str| {
            let text = self.fields.get(name).and_then(Value::as_str);
            text.map(|text| text.contains(':'))
        };
        let (guest, peer) = (family("guest"), family("peer"));
        if guest.zip(peer).is_some_and(|(guest, peer)| guest != peer) {
            let advice = "guest and peer are of different families; no flow has both";
            return Err(self.wrong("peer", advice));
        }
        Ok(())
    }

    fn wrong(&self, field: &str, advice: &'static str) -> PolicyError {
        let value = self.fields.get(field).map(Value::to_string);
        PolicyError::Field {
            path: self.path.to_owned(),
            rule: self.rule,
            field: field.to_owned(),
            value: value.unwrap_or_default(),
            advice,
        }
    }

    fn missing(&self, field: &'static str, advice: &'static str) -> PolicyError {
        PolicyError::Missing {
            path: self.path.to_owned(),
            rule: self.rule,
            field,
            advice,
        }
    }
}

const PROTOCOLS: &str = "write \"tcp\", \"udp\", \"icmp\", \"icmpv6\", \"arp\", \"ip:NUMBER\" or \
                         \"ether:0xNUMBER\"";
const PREFIXES: &str = "write an address like \"10.0.0.1\" or a prefix like \"fd00::/16\"";
const PORTS: &str = "write a port, 0 to 65535, or a range like \"1000-2000\"";

fn protocol(value: &Value) -> Option<PolicyProtocol> {
    let text = value.as_str()?;
    Some(match text {
        "tcp" => PolicyProtocol::Tcp,
        "udp" => PolicyProtocol::Udp,
        "icmp" => PolicyProtocol::Icmp,
        "icmpv6" => PolicyProtocol::Icmpv6,
        "arp" => PolicyProtocol::Arp,
        _ => return numbered_protocol(text),
    })
}

/// What has a name of its own goes by it, so that the rule matches.
fn numbered_protocol(text: &str) -> Option<PolicyProtocol> {
    if let Some(number) = text.strip_prefix("ip:") {
        return Some(match number.parse().ok()? {
            6 => PolicyProtocol::Tcp,
            17 => PolicyProtocol::Udp,
            1 => PolicyProtocol::Icmp,
            58 => PolicyProtocol::Icmpv6,
            other => PolicyProtocol::Ip(other),
        });
    }
    let digits = text.strip_prefix("ether:0x")?;
    match u16::from_str_radix(digits, 16).ok()? {
        0x0806 => Some(PolicyProtocol::Arp),
        // IP has rules by protocol, address and port.
        0x0800 | 0x86dd => None,
        other => Some(PolicyProtocol::Ether(other)),
    }
}

fn prefix(value: &Value) -> Option<Prefix> {
    let text = value.as_str()?;
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) => (address, Some(number::<u8>(bits)?)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let all = if address.is_ipv4() { 32 } else { 128 };
    Prefix::new(address, bits.unwrap_or(all))
}

fn ports(value: &Value) -> Option<(u16, u16)> {
    if let Some(port) = value.as_integer() {
        let port = u16::try_from(port).ok()?;
        return Some((port, port));
    }
    let text = value.as_str()?;
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some((first, last))
}

fn direction(value: &Value) -> Option<Opener> {
    match value.as_str()? {
        "inbound" => Some(Opener::Peer),
        "outbound" => Some(Opener::Guest),
        _ => None,
    }
}

fn bytes(value: &Value) -> Option<(u32, u32)> {
    let (from, end) = value.as_str()?.split_once("..")?;
    let from = number(from)?;
    let end = if end.is_empty() {
        u32::MAX
    } else {
        number(end)?
    };
    (from < end).then_some((from, end))
}

/// Digits only: no sign, no blanks.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Result<Policy, String> {
        let said = parse(Path::new("flows.toml"), text);
        said.map(|said| said.policy)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn every_field_is_read() {
        let policy = rules(
            "[[rule]]\nprotocol = \"udp\"\nguest = \"10.0.0.0/8\"\npeer = \"192.168.7.9\"\n\
             guest_port = 123\npeer_port = \"1000-2000\"\ndirection = \"inbound\"\n\
             action = \"ignore-bytes\"\nbytes = \"40..48\"\n\
             [[rule]]\nprotocol = \"ip:132\"\ndirection = \"outbound\"\naction = \"hold\"\n\
             [[rule]]\nprotocol = \"ether:0x88cc\"\naction = \"release\"\n\
             [[rule]]\npeer = \"fd00::/16\"\naction = \"compare\"\n\
             [[rule]]\nprotocol = \"ip:6\"\nguest_port = \"80\"\naction = \"ignore-bytes\"\n\
             bytes = \"0..\"\n",
        );
        let prefix = |address: &str, bits| Prefix::new(address.parse().unwrap(), bits);
        let action = |action| Rule {
            action,
            ..Rule::default()
        };
        let expected = Policy::new(vec![
            Rule {
                protocol: Some(PolicyProtocol::Udp),
                guest: prefix("10.0.0.0", 8),
                peer: prefix("192.168.7.9", 32),
                guest_ports: Some((123, 123)),
                peer_ports: Some((1000, 2000)),
                direction: Some(Opener::Peer),
                action: PolicyAction::IgnoreBytes { from: 40, end: 48 },
            },
            Rule {
                protocol: Some(PolicyProtocol::Ip(132)),
                direction: Some(Opener::Guest),
                ..action(PolicyAction::Hold)
            },
            Rule {
                protocol: Some(PolicyProtocol::Ether(0x88cc)),
                ..action(PolicyAction::Release)
            },
            Rule {
                peer: prefix("fd00::", 16),
                ..action(PolicyAction::Compare)
            },
            Rule {
                protocol: Some(PolicyProtocol::Tcp),
                guest_ports: Some((80, 80)),
                ..action(PolicyAction::IgnoreBytes {
                    from: 0,
                    end: u32::MAX,
                })
            },
        ]);
        assert_eq!(policy, Ok(expected));
        assert_eq!(rules(""), Ok(Policy::default()));
    }

    #[test]
    fn one_read_gives_the_rules_and_what_names_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let said = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            read(file.path()).unwrap()
        };
        let one = said("[[rule]]\naction = \"hold\"\nguest_port = 9\n");
        let same = said("# why\n[[rule]]\n\nguest_port = 9\naction = \"hold\"\n");
        let other = said("[[rule]]\naction = \"release\"\nguest_port = 9\n");
        assert_eq!(one, same);
        assert!(one.fingerprint.starts_with("1 rules, "), "{one:?}");
        assert_ne!(one.policy, other.policy);
        assert_ne!(one.fingerprint, other.fingerprint);
    }

    #[test]
    fn the_example_in_the_manual_is_a_policy() {
        let manual = include_str!("../../README.md");
        let from = manual.find("[[rule]]").expect("an example");
        let example = &manual[from..];
        let end = example.find("```").expect("the end of the example");
        let policy = rules(&example[..end]).unwrap();
        assert_ne!(policy, Policy::default());
    }

    #[test]
    fn what_cannot_be_is_refused_by_rule_and_field() {
        let cases = [
            ("protocol", "\"sctp\""),
            ("protocol", "6"),
            ("protocol", "\"ip:256\""),
            ("protocol", "\"ether:0x0800\""),
            ("guest", "\"10.0.0.0/33\""),
            ("guest", "\"10.0.0.0/+8\""),
            ("guest", "\"somewhere\""),
            ("peer", "\"fd00::/129\""),
            ("peer", "10"),
            ("guest_port", "65536"),
            ("guest_port", "-1"),
            ("guest_port", "\"20-10\""),
            ("peer_port", "\"http\""),
            ("peer_port", "\"\""),
            ("direction", "\"in\""),
            ("bytes", "\"0..4\""),
            ("port", "80"),
        ];
        for (field, value) in cases {
            let good = "[[rule]]\naction = \"hold\"\n";
            let text = format!("{good}[[rule]]\naction = \"hold\"\n{field} = {value}\n");
            let error = rules(&text).unwrap_err();
            let place = format!("flows.toml: rule 2: {field} = {value}: ");
            assert!(error.starts_with(&place), "{error}");
        }
        for bytes in ["", "4", "8..8", "9..8", "..8", "-1..8", "0..4294967296"] {
            let text = format!("[[rule]]\naction = \"ignore-bytes\"\nbytes = \"{bytes}\"\n");
            let error = rules(&text).unwrap_err();
            assert!(error.contains("rule 1: bytes = "), "{error}");
        }
        for (text, place) in [
            ("[[rule]]\n", "rule 1: action is missing"),
            (
                "[[rule]]\naction = \"ignore-bytes\"\n",
                "rule 1: bytes is missing",
            ),
            ("[[rule]]\naction = \"drop\"\n", "rule 1: action = \"drop\""),
            ("[[rules]]\naction = \"hold\"\n", "rules"),
            ("rule = 3\n", "flows.toml: "),
            ("[[rule]\n", "line 1"),
        ] {
            let error = rules(text).unwrap_err();
            assert!(
                error.contains(place) && error.starts_with("flows.toml"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_rule_that_can_never_match_is_refused() {
        for (text, field) in [
            ("protocol = \"icmp\"\nguest_port = 1\n", "guest_port"),
            ("protocol = \"arp\"\npeer_port = 1\n", "peer_port"),
            ("guest = \"10.0.0.1\"\npeer = \"fd00::1\"\n", "peer"),
        ] {
            let error = rules(&format!("[[rule]]\naction = \"hold\"\n{text}")).unwrap_err();
            assert!(error.contains(&format!("rule 1: {field} = ")), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = read(Path::new("no-such-policy.toml")).unwrap_err();
        assert!(
            error.to_string().starts_with("no-such-policy.toml: "),
            "{error}"
        );
    }
}
