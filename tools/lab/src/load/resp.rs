//! RESP (the redis protocol) against the demo guest's key-value store, checked against a model.
//!
//! Invariants: keys and sets belong to one conversation, so the model is exact; it changes in the order of
//! the answers; a write with unknown outcome (its connection died) leaves both values possible until a read
//! decides. Only `hits` is shared, and watched as a [`Rising`](super::facts::Rising) counter.
//!
//! Does not use expiry or lists: redis-benchmark covers those.

use std::collections::{HashSet, VecDeque};

use super::conversation::{Broken, Conversation, Kind};
use super::facts::Facts;
use super::random::Random;
use super::reply::{Reply, parse};

/// Keys of one conversation.
const KEYS: usize = 200;
/// Members that its set may have.
const MEMBERS_MAX: usize = 64;
/// Requests in one write, now and then.
const BURST: usize = 8;
/// Requests in one write of an audit.
const AUDIT_BURST: usize = 16;

#[derive(Debug, Clone, Copy)]
enum Expect {
    Set { key: usize, version: u32 },
    Get { key: usize },
    Own,
    Hits { floor: u64 },
    HitsRead { floor: u64, quiet: bool },
    Add { member: u32 },
    Pop,
    Members,
    Time { floor_us: u64 },
    AnyKey,
}

#[derive(Debug, Clone, Default)]
struct Slot {
    /// Last acknowledged version; 0 is absence.
    version: u32,
    /// Versions whose writes have an unknown outcome.
    perhaps: Vec<u32>,
}

/// One RESP connection and what it stored.
#[derive(Debug)]
pub(crate) struct Resp {
    number: u64,
    random: Random,
    outstanding: VecDeque<Expect>,
    buffer: Vec<u8>,
    keys: Vec<Slot>,
    last_version: u32,
    own: u64,
    own_perhaps: u64,
    members: HashSet<u32>,
    popped: HashSet<u32>,
    next_member: u32,
    members_unsure: bool,
    audit_next: usize,
}

impl Resp {
    pub(crate) fn new(number: u64, seed: u64) -> Self {
        Self {
            number,
            random: Random::new(seed),
            outstanding: VecDeque::new(),
            buffer: Vec::new(),
            keys: vec![Slot::default(); KEYS],
            last_version: 0,
            own: 0,
            own_perhaps: 0,
            members: HashSet::new(),
            popped: HashSet::new(),
            next_member: 0,
            members_unsure: false,
            audit_next: usize::MAX,
        }
    }

    fn key(&self, facts: &Facts, key: usize) -> String {
        format!("lab:{}:{}:{key}", facts.tag, self.number)
    }

    /// The value of a version: its name, padded to a length that depends on it.
    fn value(&self, key: usize, version: u32) -> String {
        let mut value = format!("{}/{key}/{version}/", self.number);
        let padding = (version as usize * 37 + key * 11) % 700;
        value.extend(std::iter::repeat_n('v', padding));
        value
    }

    fn choose(&mut self, facts: &Facts) -> Expect {
        let key = self.random.below(KEYS as u64) as usize;
        match self
            .random
            .below(if facts.deterministic { 80 } else { 100 })
        {
            0..35 => {
                self.last_version += 1;
                Expect::Set {
                    key,
                    version: self.last_version,
                }
            }
            35..70 => Expect::Get { key },
            70..80 => Expect::Own,
            80..86 => Expect::Hits {
                floor: facts.hits.floor(),
            },
            86..91 if self.members.len() < MEMBERS_MAX => {
                self.next_member += 1;
                Expect::Add {
                    member: self.next_member,
                }
            }
            86..95 => Expect::Pop,
            95..98 => Expect::Time {
                floor_us: facts.clock_us,
            },
            _ => Expect::AnyKey,
        }
    }

    fn push(&mut self, facts: &Facts, expect: Expect, out: &mut Vec<u8>) {
        let prefix = format!("lab:{}", facts.tag);
        let own = self.number;
        match expect {
            Expect::Set { key, version } => {
                command(
                    out,
                    &["SET", &self.key(facts, key), &self.value(key, version)],
                );
            }
            Expect::Get { key } => command(out, &["GET", &self.key(facts, key)]),
            Expect::Own => command(out, &["INCR", &format!("{prefix}:{own}:own")]),
            Expect::Hits { .. } => command(out, &["INCR", &format!("{prefix}:hits")]),
            Expect::HitsRead { .. } => command(out, &["GET", &format!("{prefix}:hits")]),
            Expect::Add { member } => {
                command(
                    out,
                    &[
                        "SADD",
                        &format!("{prefix}:{own}:set"),
                        &format!("m{member}"),
                    ],
                );
            }
            Expect::Pop => command(out, &["SPOP", &format!("{prefix}:{own}:set")]),
            Expect::Members => command(out, &["SMEMBERS", &format!("{prefix}:{own}:set")]),
            Expect::Time { .. } => command(out, &["TIME"]),
            Expect::AnyKey => command(out, &["RANDOMKEY"]),
        }
        self.outstanding.push_back(expect);
    }

    fn judge(&mut self, facts: &mut Facts, expect: Expect, reply: &Reply) -> Result<(), String> {
        match expect {
            Expect::Set { key, version } => {
                want(reply, *reply == Reply::Simple(b"OK".to_vec()))?;
                self.keys[key] = Slot {
                    version,
                    perhaps: Vec::new(),
                };
                Ok(())
            }
            Expect::Get { key } => self.judge_get(key, reply),
            Expect::Own => self.judge_own(reply),
            Expect::Hits { floor } => facts.hits.raised(floor, integer(reply)?),
            Expect::HitsRead { floor, quiet } => {
                let value = bulk(reply)?.map_or(Ok(0), digits)?;
                facts.hits.read(floor, value)?;
                if quiet {
                    facts.hits.settled(value)
                } else {
                    Ok(())
                }
            }
            Expect::Add { member } => {
                want(reply, *reply == Reply::Integer(1))?;
                self.members.insert(member);
                Ok(())
            }
            Expect::Pop => self.judge_pop(reply),
            Expect::Members => self.judge_members(reply),
            Expect::Time { floor_us } => facts.time_told(floor_us, time_us(reply)?),
            Expect::AnyKey => bulk(reply).map(|_| ()),
        }
    }

    fn judge_get(&mut self, key: usize, reply: &Reply) -> Result<(), String> {
        let got = bulk(reply)?;
        let slot = &self.keys[key];
        let candidates = std::iter::once(slot.version).chain(slot.perhaps.iter().copied());
        let found = candidates.into_iter().find(|&version| match got {
            None => version == 0,
            Some(bytes) => version > 0 && bytes == self.value(key, version).as_bytes(),
        });
        let Some(version) = found else {
            let start = got.map(|bytes| &bytes[..bytes.len().min(24)]);
            let shown = start.map_or("absent".into(), String::from_utf8_lossy);
            return Err(format!(
                "key {key} is {shown}, not version {}",
                slot.version
            ));
        };
        self.keys[key] = Slot {
            version,
            perhaps: Vec::new(),
        };
        Ok(())
    }

    fn judge_own(&mut self, reply: &Reply) -> Result<(), String> {
        let (value, least) = (integer(reply)?, self.own + 1);
        let most = least + self.own_perhaps;
        self.own = value;
        self.own_perhaps = 0;
        if (least..=most).contains(&value) {
            return Ok(());
        }
        Err(format!("own counter is {value}, not {least} (to {most})"))
    }

    fn judge_pop(&mut self, reply: &Reply) -> Result<(), String> {
        let Some(bytes) = bulk(reply)? else {
            return want(reply, self.members.is_empty() || self.members_unsure);
        };
        let member = member_number(bytes)?;
        let was_member = self.members.remove(&member);
        if !self.popped.insert(member) {
            return Err(format!("member {member} was popped twice"));
        }
        want(reply, was_member || self.members_unsure)
    }

    fn judge_members(&mut self, reply: &Reply) -> Result<(), String> {
        let Reply::Array(Some(items)) = reply else {
            return want(reply, false);
        };
        let mut seen = HashSet::new();
        for item in items {
            let member = member_number(bulk(item)?.unwrap_or_default())?;
            if self.popped.contains(&member) {
                return Err(format!("popped member {member} is back"));
            }
            if !seen.insert(member) {
                return Err(format!("member {member} is listed twice"));
            }
        }
        if !self.members_unsure && seen != self.members {
            return Err(format!(
                "set has {} members, not {}",
                seen.len(),
                self.members.len()
            ));
        }
        self.members = seen;
        self.members_unsure = false;
        Ok(())
    }
}

impl Conversation for Resp {
    fn kind(&self) -> Kind {
        Kind::Resp
    }

    fn ask(&mut self, facts: &mut Facts, out: &mut Vec<u8>) -> usize {
        let burst = if self.random.below(20) == 0 { BURST } else { 1 };
        for _ in 0..burst {
            let expect = self.choose(facts);
            self.push(facts, expect, out);
        }
        burst
    }

    fn begin_audit(&mut self) {
        self.audit_next = 0;
    }

    fn audit(&mut self, facts: &mut Facts, out: &mut Vec<u8>) -> usize {
        if self.audit_next > KEYS {
            return 0;
        }
        let end = (self.audit_next + AUDIT_BURST).min(KEYS);
        for key in self.audit_next..end {
            self.push(facts, Expect::Get { key }, out);
        }
        self.audit_next = end;
        if end == KEYS {
            self.audit_next = KEYS + 1;
            self.push(facts, Expect::Own, out);
            if !facts.deterministic {
                self.push(facts, Expect::Members, out);
                let (floor, quiet) = (facts.hits.floor(), facts.quiet);
                self.push(facts, Expect::HitsRead { floor, quiet }, out);
            }
        }
        self.outstanding.len()
    }

    fn hear(&mut self, facts: &mut Facts, bytes: &[u8]) -> Result<usize, Broken> {
        self.buffer.extend(bytes);
        let mut at = 0;
        let mut answers = 0;
        while at < self.buffer.len() {
            let parsed = parse(&self.buffer[at..]);
            let Some((reply, used)) = parsed.map_err(|what| {
                Broken(format!(
                    "resp {}: {what}; expected {:?}",
                    self.number, self.outstanding
                ))
            })?
            else {
                break;
            };
            at += used;
            let Some(expect) = self.outstanding.pop_front() else {
                return Err(Broken(format!(
                    "resp {}: {reply:?} answers nothing",
                    self.number
                )));
            };
            let verdict = self.judge(facts, expect, &reply);
            facts
                .judge(verdict.map_err(|what| format!("resp {}: {expect:?}: {what}", self.number)));
            answers += 1;
        }
        self.buffer.drain(..at);
        Ok(answers)
    }

    fn hang_up(&mut self, facts: &mut Facts) {
        self.buffer.clear();
        for expect in std::mem::take(&mut self.outstanding) {
            match expect {
                Expect::Set { key, version } => self.keys[key].perhaps.push(version),
                Expect::Own => self.own_perhaps += 1,
                Expect::Hits { .. } => facts.hits.lost(),
                Expect::Add { .. } | Expect::Pop => self.members_unsure = true,
                _ => {}
            }
        }
    }
}

fn command(out: &mut Vec<u8>, parts: &[&str]) {
    out.extend(format!("*{}\r\n", parts.len()).as_bytes());
    for part in parts {
        out.extend(format!("${}\r\n{part}\r\n", part.len()).as_bytes());
    }
}

fn want(reply: &Reply, holds: bool) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(format!("unexpected answer {reply:?}"))
    }
}

fn integer(reply: &Reply) -> Result<u64, String> {
    match reply {
        Reply::Integer(value) if *value >= 0 => Ok(value.unsigned_abs()),
        _ => Err(format!("{reply:?} is no count")),
    }
}

fn bulk(reply: &Reply) -> Result<Option<&[u8]>, String> {
    match reply {
        Reply::Bulk(bytes) => Ok(bytes.as_deref()),
        _ => Err(format!("{reply:?} is no string")),
    }
}

fn digits(bytes: &[u8]) -> Result<u64, String> {
    let text = String::from_utf8_lossy(bytes);
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn member_number(bytes: &[u8]) -> Result<u32, String> {
    let text = String::from_utf8_lossy(bytes);
    let number = text
        .strip_prefix('m')
        .and_then(|number| number.parse().ok());
    number.ok_or_else(|| format!("{text:?} was never added"))
}

fn time_us(reply: &Reply) -> Result<u64, String> {
    match reply {
        Reply::Array(Some(parts)) if parts.len() == 2 => {
            let part = |at: usize| digits(bulk(&parts[at])?.unwrap_or_default());
            Ok(part(0)? * 1_000_000 + part(1)?)
        }
        _ => Err(format!("{reply:?} is no time")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts::new("t".to_owned(), false)
    }

    fn hear(resp: &mut Resp, facts: &mut Facts, expect: Expect, bytes: &[u8]) -> u64 {
        resp.push(facts, expect, &mut Vec::new());
        assert_eq!(resp.hear(facts, bytes).unwrap(), 1);
        facts.wrong_count()
    }

    fn stored(resp: &Resp, key: usize, version: u32) -> Vec<u8> {
        let value = resp.value(key, version);
        format!("${}\r\n{value}\r\n", value.len()).into_bytes()
    }

    #[test]
    fn a_lost_acknowledged_write_is_wrong() {
        let (mut facts, mut resp) = (facts(), Resp::new(3, 1));
        assert_eq!(
            hear(
                &mut resp,
                &mut facts,
                Expect::Set { key: 1, version: 1 },
                b"+OK\r\n"
            ),
            0
        );
        assert_eq!(
            hear(
                &mut resp,
                &mut facts,
                Expect::Set { key: 1, version: 2 },
                b"+OK\r\n"
            ),
            0
        );
        let (old, new) = (stored(&resp, 1, 1), stored(&resp, 1, 2));
        assert_eq!(hear(&mut resp, &mut facts, Expect::Get { key: 1 }, &new), 0);
        assert_eq!(hear(&mut resp, &mut facts, Expect::Get { key: 1 }, &old), 1);
        assert_eq!(
            hear(&mut resp, &mut facts, Expect::Get { key: 1 }, b"$-1\r\n"),
            2
        );
    }

    #[test]
    fn an_unacknowledged_write_may_have_happened_or_not() {
        for happened in [0, 5] {
            let (mut facts, mut resp) = (facts(), Resp::new(3, 1));
            resp.push(&facts, Expect::Set { key: 2, version: 5 }, &mut Vec::new());
            resp.hang_up(&mut facts);
            let answer = if happened == 0 {
                b"$-1\r\n".to_vec()
            } else {
                stored(&resp, 2, happened)
            };
            assert_eq!(
                hear(&mut resp, &mut facts, Expect::Get { key: 2 }, &answer),
                0
            );
            // The read decided: the other outcome is wrong from now on.
            let other = if happened == 5 {
                b"$-1\r\n".to_vec()
            } else {
                stored(&resp, 2, 5)
            };
            assert_eq!(
                hear(&mut resp, &mut facts, Expect::Get { key: 2 }, &other),
                1
            );
        }
    }

    #[test]
    fn a_popped_member_may_not_return() {
        let (mut facts, mut resp) = (facts(), Resp::new(3, 1));
        hear(&mut resp, &mut facts, Expect::Add { member: 1 }, b":1\r\n");
        hear(&mut resp, &mut facts, Expect::Add { member: 2 }, b":1\r\n");
        assert_eq!(hear(&mut resp, &mut facts, Expect::Pop, b"$2\r\nm1\r\n"), 0);
        assert_eq!(
            hear(
                &mut resp,
                &mut facts,
                Expect::Members,
                b"*1\r\n$2\r\nm2\r\n"
            ),
            0
        );
        assert_eq!(hear(&mut resp, &mut facts, Expect::Pop, b"$2\r\nm1\r\n"), 1);
        assert_eq!(
            hear(
                &mut resp,
                &mut facts,
                Expect::Members,
                b"*1\r\n$2\r\nm1\r\n"
            ),
            2
        );
        assert_eq!(hear(&mut resp, &mut facts, Expect::Pop, b"$-1\r\n"), 3);
    }

    #[test]
    fn counters_and_time_are_followed() {
        let (mut facts, mut resp) = (facts(), Resp::new(3, 1));
        assert_eq!(hear(&mut resp, &mut facts, Expect::Own, b":1\r\n"), 0);
        assert_eq!(hear(&mut resp, &mut facts, Expect::Own, b":1\r\n"), 1);
        let time = Expect::Time { floor_us: 0 };
        assert_eq!(
            hear(&mut resp, &mut facts, time, b"*2\r\n$1\r\n1\r\n$1\r\n1\r\n"),
            2
        );
        assert_eq!(hear(&mut resp, &mut facts, Expect::Own, b"-ERR no\r\n"), 3);
    }

    #[test]
    fn an_audit_asks_for_every_key() {
        let (mut facts, mut resp) = (facts(), Resp::new(3, 1));
        resp.begin_audit();
        let mut out = Vec::new();
        let mut asked = 0;
        loop {
            resp.outstanding.clear();
            match resp.audit(&mut facts, &mut out) {
                0 => break,
                count => asked += count,
            }
        }
        assert_eq!(asked, KEYS + 3);
    }
}
