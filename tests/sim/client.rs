//! The clients: TCP connections and datagrams that check every answer against all that any client was told before.
//!
//! Invariants: what a client got it never forgets ([`Oracle`]); a connection that breaks, an answer that contradicts
//! an earlier one, a byte out of place is a violation. They know nothing of hosts, epochs or checkpoints.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use colo_compare::testing::{Side, checksums_are_right, echo, udp};
use colo_compare::wire::tcp::{ACK, SYN};
use colo_compare::{Direction, Protocol, wire};

use crate::guest::{PORT, body, sum};
use crate::prng::Prng;
use crate::tcp::{End, Seg, State};

const DATAGRAM_RETRY_US: u64 = 150_000;

/// What the outside world was told.
#[derive(Debug, Default)]
pub struct Oracle {
    tokens: BTreeSet<u64>,
    /// What the guest said on connections that it opened.
    heard: BTreeSet<u64>,
    /// Values of the shared counter and the request that got each.
    shared: BTreeMap<u64, u64>,
    /// Contradictions, with the time left to the caller.
    pub violations: Vec<String>,
    /// Answers checked.
    pub answers: u64,
}

impl Oracle {
    fn floor(&self) -> u64 {
        self.shared.last_key_value().map_or(0, |(value, _)| *value)
    }

    fn shared(&mut self, request: u64, value: u64, floor: u64) {
        if value <= floor {
            self.fail(format!(
                "the shared counter went back: {value} after {floor}"
            ));
        }
        if *self.shared.entry(value).or_insert(request) != request {
            self.fail(format!("the shared counter gave {value} twice"));
        }
    }

    fn fail(&mut self, text: String) {
        self.violations.push(format!("output commit: {text}"));
    }
}

#[derive(Debug)]
enum Expect {
    Bytes(Vec<u8>),
    Shared {
        request: u64,
        floor: u64,
    },
    Token,
    Time,
    /// Something that was heard on a connection that the guest opened.
    Heard,
}

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct Plan {
    pub connections: u64,
    pub requests: u64,
    pub depth: usize,
    pub think_us: u64,
    /// Share of requests whose answers differ between the VMs, per mille.
    pub divergent: u64,
    /// Share of the others that send much and get little, per mille.
    pub uploads: u64,
    /// Connections that end with a reset, per mille.
    pub resets: u64,
    /// Connections that use the port of the one before, per mille.
    pub same_ports: u64,
    /// Requests that make the guest open a connection, per mille.
    pub outbound: u64,
    pub largest: u64,
}

/// Opens connections one after the other.
#[derive(Debug)]
pub struct TcpClient {
    id: u64,
    side: Side,
    plan: Plan,
    chance: Prng,
    end: Option<End>,
    /// Closed connections, which still answer repeated FINs.
    lingering: Vec<End>,
    /// Opened by the guest.
    served: Vec<End>,
    opened: u64,
    port: u16,
    asked: u64,
    requests: u64,
    expected: VecDeque<Expect>,
    next_us: u64,
    counter: u64,
    value: u64,
    /// All done.
    pub finished: bool,
}

impl TcpClient {
    pub fn new(id: u64, plan: Plan, mut chance: Prng) -> Self {
        let side = if chance.chance(300) {
            Side::V6
        } else {
            Side::V4
        };
        let next_us = chance.below(100_000);
        Self {
            id,
            side,
            plan,
            chance,
            end: None,
            lingering: Vec::new(),
            served: Vec::new(),
            opened: 0,
            port: 0,
            asked: 0,
            requests: 0,
            expected: VecDeque::new(),
            next_us,
            counter: 0,
            value: 0,
            finished: false,
        }
    }

    /// Whether frames to this port are its own.
    pub fn owns(&self, port: u16) -> bool {
        u64::from(port) / 100 == 100 + self.id
    }

    /// When it wants to run.
    pub fn deadline(&self) -> Option<u64> {
        let end = self.end.as_ref();
        let wants = !self.finished && end.is_none_or(|e| !e.is_closing());
        let most = if self.asked < self.plan.requests {
            self.plan.depth
        } else {
            1
        };
        let wants = wants && self.expected.len() < most;
        let think = wants.then_some(self.next_us);
        let others = self.lingering.iter().chain(&self.served);
        let ends = others.chain(end).filter_map(End::deadline);
        ends.chain(think).min()
    }

    /// Runs.
    pub fn wake(&mut self, now: u64, oracle: &mut Oracle, out: &mut Vec<Vec<u8>>) {
        if self.next_us <= now && !self.finished {
            self.act(now, oracle);
        }
        let others = self.lingering.iter_mut().chain(&mut self.served);
        for end in self.end.iter_mut().chain(others) {
            end.poll(now, &mut self.chance, out);
        }
        let is_over = |end: &End| end.is_finished() || end.state == State::Reset;
        if self.end.as_ref().is_some_and(is_over) {
            self.lingering.extend(self.end.take());
            self.finished = self.opened == self.plan.connections;
            self.next_us = now + self.chance.below(self.plan.think_us);
        }
    }

    fn act(&mut self, now: u64, oracle: &Oracle) {
        let Some(end) = &mut self.end else {
            self.opened += 1;
            self.asked = 0;
            if self.port == 0 || !self.chance.chance(self.plan.same_ports) {
                self.port = (10_000 + self.id * 100 + self.opened) as u16;
            }
            self.lingering.retain(|end| end.peer_port != self.port);
            let (ports, use_ts) = ((PORT, self.port), self.chance.chance(600));
            let end = End::connect(false, self.side, ports, use_ts, &mut self.chance);
            self.end = Some(end);
            self.next_us = now + self.chance.below(self.plan.think_us);
            return;
        };
        if end.is_closing() || self.expected.len() >= self.plan.depth {
            return;
        }
        if self.asked == self.plan.requests {
            if self.expected.is_empty() && self.chance.chance(self.plan.resets) {
                end.abort();
            } else if self.expected.is_empty() {
                end.close();
            }
            return;
        }
        self.asked += 1;
        self.next_us = now + self.chance.below(self.plan.think_us);
        self.request(oracle);
    }

    fn request(&mut self, oracle: &Oracle) {
        self.requests += 1;
        let request = self.id << 32 | self.requests;
        let (text, expect) = if self.chance.chance(self.plan.divergent) {
            self.divergent(request, oracle)
        } else {
            self.deterministic()
        };
        if let Some(end) = &mut self.end {
            end.send(&text);
        }
        self.expected.push_back(expect);
    }

    fn divergent(&mut self, request: u64, oracle: &Oracle) -> (Vec<u8>, Expect) {
        if self.chance.chance(self.plan.outbound) {
            let (port, fixed) = (10_000 + self.id * 100 + 99, self.chance.below(2));
            return (format!("O {port} {fixed}\n").into_bytes(), Expect::Heard);
        }
        match self.chance.below(3) {
            0 => (b"T\n".to_vec(), Expect::Token),
            1 => (
                b"X\n".to_vec(),
                Expect::Shared {
                    request,
                    floor: oracle.floor(),
                },
            ),
            _ => (b"N\n".to_vec(), Expect::Time),
        }
        .pipe_token(&mut self.chance, oracle)
    }

    fn deterministic(&mut self) -> (Vec<u8>, Expect) {
        let (id, chance) = (self.id, &mut self.chance);
        if chance.chance(self.plan.uploads) {
            let bytes = body(chance.next(), chance.below(self.plan.largest) as usize);
            let mut text = format!("P {}\n", bytes.len()).into_bytes();
            text.extend(&bytes);
            return (
                text,
                Expect::Bytes(format!("P {}\n", sum(&bytes)).into_bytes()),
            );
        }
        match chance.below(5) {
            0 => {
                self.counter += 1;
                (format!("C {id}\n"), format!("C {}\n", self.counter))
            }
            1 => {
                self.value = chance.next();
                (format!("S {id} {}\n", self.value), "S 1\n".into())
            }
            2 => (format!("G {id}\n"), format!("G {}\n", self.value)),
            _ => {
                let n = chance.below(self.plan.largest);
                let mut answer = format!("E {n}\n").into_bytes();
                answer.extend(body(id, n as usize));
                return (format!("E {n} {id}\n").into_bytes(), Expect::Bytes(answer));
            }
        }
        .both()
    }

    /// Takes a frame for one of its ports.
    pub fn receive(&mut self, now: u64, frame: &[u8], oracle: &mut Oracle) {
        let Some(seg) = Seg::read(frame, Direction::FromGuest) else {
            return;
        };
        if seg.peer_port % 100 == 99 {
            self.serve(now, &seg, oracle);
            return;
        }
        if let Some(end) = self
            .lingering
            .iter_mut()
            .find(|e| e.peer_port == seg.peer_port)
        {
            end.handle(now, &seg);
            return;
        }
        let Some(end) = &mut self.end else { return };
        end.handle(now, &seg);
        if let Some(text) = end.complaint.take() {
            oracle.fail(format!("client {}: {text}", self.id));
        }
        if end.state == State::Reset {
            oracle.fail(format!(
                "client {}: connection {} was reset",
                self.id, self.opened
            ));
            self.finished = true;
            self.end = None;
            return;
        }
        let mut inbox = std::mem::take(&mut end.inbox);
        while let Some(n) = self.check(&inbox, oracle) {
            inbox.drain(..n);
            if self.expected.is_empty() {
                self.next_us = self.next_us.max(now);
            }
        }
        if self.expected.is_empty() && !inbox.is_empty() {
            oracle.fail(format!(
                "client {}: {} bytes that nobody asked for",
                self.id,
                inbox.len()
            ));
            inbox.clear();
        }
        let Some(end) = &mut self.end else { return };
        end.inbox = inbox;
        if end.peer_closed && !end.is_closing() {
            oracle.fail(format!(
                "client {}: the server closed in mid-connection",
                self.id
            ));
            end.close();
        }
    }

    /// A connection that the guest opens: repeats what it says.
    fn serve(&mut self, now: u64, seg: &Seg, oracle: &mut Oracle) {
        let same =
            |end: &&mut End| end.guest_port == seg.guest_port && end.peer_port == seg.peer_port;
        let is_syn = seg.header.has(SYN) && !seg.header.has(ACK);
        match self.served.iter_mut().find(same) {
            Some(end) if is_syn && (end.is_finished() || end.state == State::Reset) => {
                *end = End::accept(false, seg, &mut self.chance);
            }
            Some(end) => {
                end.handle(now, seg);
                let inbox = std::mem::take(&mut end.inbox);
                let (said, rest) = split_line(inbox);
                end.inbox = rest;
                if let Some(said) = said {
                    oracle.heard.extend(said.trim_end().parse::<u64>());
                    end.send(said.as_bytes());
                }
                if end.peer_closed {
                    end.close();
                }
            }
            None if is_syn => self.served.push(End::accept(false, seg, &mut self.chance)),
            None => {}
        }
    }

    /// Checks the first answer in `inbox`; gives its length once it is whole.
    fn check(&mut self, inbox: &[u8], oracle: &mut Oracle) -> Option<usize> {
        let expect = self.expected.front()?;
        let n = match expect {
            Expect::Bytes(bytes) => {
                let n = bytes.len().min(inbox.len());
                if let Some(at) = (0..n).find(|&i| bytes[i] != inbox[i]) {
                    let shown = String::from_utf8_lossy(&inbox[..n.min(30)]).into_owned();
                    oracle.fail(format!(
                        "client {}: wrong byte {at} of {} at request {}: {shown:?}, expected {:?}",
                        self.id,
                        bytes.len(),
                        self.requests,
                        String::from_utf8_lossy(&bytes[..bytes.len().min(30)]),
                    ));
                    return self.give_up(inbox.len());
                }
                if n < bytes.len() {
                    return None;
                }
                n
            }
            _ => inbox.iter().position(|b| *b == b'\n')? + 1,
        };
        if !matches!(expect, Expect::Bytes(_)) {
            let text = String::from_utf8_lossy(&inbox[..n]).into_owned();
            let value = text.trim_end().get(2..).and_then(|v| v.parse().ok());
            let verb = text.bytes().next().unwrap_or(0);
            match (verb, expect, value) {
                (b'X', Expect::Shared { request, floor }, Some(v)) => {
                    oracle.shared(*request, v, *floor);
                }
                (b'T', Expect::Token, Some(token)) => {
                    if !oracle.tokens.insert(token) {
                        oracle.fail(format!("token {token} was given out twice"));
                    }
                }
                (b'N', Expect::Time, Some(_)) => {}
                (b'O', Expect::Heard, Some(v)) if oracle.heard.contains(&v) => {}
                _ => {
                    oracle.fail(format!("client {}: {text:?} is no answer", self.id));
                    return self.give_up(inbox.len());
                }
            }
        }
        oracle.answers += 1;
        self.expected.pop_front();
        Some(n)
    }

    fn give_up(&mut self, n: usize) -> Option<usize> {
        self.expected.clear();
        self.finished = true;
        Some(n)
    }
}

fn split_line(bytes: Vec<u8>) -> (Option<String>, Vec<u8>) {
    match bytes.iter().position(|b| *b == b'\n') {
        Some(at) => {
            let line = String::from_utf8_lossy(&bytes[..=at]).into_owned();
            (Some(line), bytes[at + 1..].to_vec())
        }
        None => (None, bytes),
    }
}

trait PipeToken {
    /// Sometimes asks for a token that somebody was given instead.
    fn pipe_token(self, chance: &mut Prng, oracle: &Oracle) -> (Vec<u8>, Expect);
}

impl PipeToken for (Vec<u8>, Expect) {
    fn pipe_token(self, chance: &mut Prng, oracle: &Oracle) -> (Vec<u8>, Expect) {
        match some_token(chance, oracle) {
            Some(token) if chance.chance(400) => (
                format!("V {token}\n").into_bytes(),
                Expect::Bytes(b"V 1\n".to_vec()),
            ),
            _ => self,
        }
    }
}

fn some_token(chance: &mut Prng, oracle: &Oracle) -> Option<u64> {
    let n = chance.below(oracle.tokens.len() as u64) as usize;
    oracle.tokens.iter().nth(n).copied()
}

trait Both {
    fn both(self) -> (Vec<u8>, Expect);
}

impl Both for (String, String) {
    fn both(self) -> (Vec<u8>, Expect) {
        (self.0.into_bytes(), Expect::Bytes(self.1.into_bytes()))
    }
}

#[derive(Debug)]
struct Asked {
    text: String,
    floor: u64,
    retry_us: u64,
}

/// Sends datagrams and pings, repeats those that stay unanswered.
#[derive(Debug)]
pub struct DatagramClient {
    side: Side,
    port: u16,
    chance: Prng,
    open: BTreeMap<u64, Asked>,
    next_id: u64,
    left: u64,
    next_us: u64,
    gap_us: u64,
    ping_id: u16,
    pings: BTreeSet<u16>,
    divergent: u64,
}

impl DatagramClient {
    pub fn new(id: u64, count: u64, divergent: u64, mut chance: Prng) -> Self {
        Self {
            side: if chance.chance(500) {
                Side::V6
            } else {
                Side::V4
            },
            port: (50_000 + id) as u16,
            next_id: id << 32,
            open: BTreeMap::new(),
            left: count,
            next_us: chance.below(50_000),
            gap_us: 2_000 + chance.below(60_000),
            ping_id: (id * 1000) as u16,
            pings: BTreeSet::new(),
            divergent,
            chance,
        }
    }

    /// Whether frames to this port are its own.
    pub fn owns(&self, port: u16) -> bool {
        port == self.port
    }

    /// All asked and answered.
    pub fn finished(&self) -> bool {
        self.left == 0 && self.open.is_empty()
    }

    /// When it wants to run.
    pub fn deadline(&self) -> Option<u64> {
        let retry = self.open.values().map(|a| a.retry_us).min();
        let next = (self.left > 0).then_some(self.next_us);
        [retry, next].into_iter().flatten().min()
    }

    /// Runs.
    pub fn wake(&mut self, now: u64, oracle: &Oracle, out: &mut Vec<Vec<u8>>) {
        if self.left > 0 && self.next_us <= now {
            self.left -= 1;
            self.next_us = now + self.chance.below(self.gap_us);
            if self.chance.chance(200) {
                self.ping_id += 1;
                self.pings.insert(self.ping_id);
                out.push(echo(self.side, true, self.ping_id, b"are you there?"));
            }
            self.next_id += 1;
            let request = self.pick(oracle);
            let text = format!("{} {request}", self.next_id);
            let floor = oracle.floor();
            self.open.insert(
                self.next_id,
                Asked {
                    text,
                    floor,
                    retry_us: now,
                },
            );
        }
        for asked in self.open.values_mut().filter(|a| a.retry_us <= now) {
            asked.retry_us = now + DATAGRAM_RETRY_US;
            out.push(udp(self.side, true, PORT, self.port, asked.text.as_bytes()));
        }
    }

    fn pick(&mut self, oracle: &Oracle) -> String {
        if !self.chance.chance(self.divergent) {
            return format!("G {}", 1_000_000 + self.next_id);
        }
        match (self.chance.below(4), some_token(&mut self.chance, oracle)) {
            (0, Some(token)) => format!("V {token}"),
            (1, _) => "T".into(),
            (2, _) => "X".into(),
            _ => "N".into(),
        }
    }

    /// Takes a frame for its port.
    pub fn receive(&mut self, frame: &[u8], oracle: &mut Oracle) {
        let packet = wire::parse(frame, frame.len(), Direction::FromGuest);
        let at = usize::from(packet.l4) + 8;
        let text = String::from_utf8_lossy(&frame[at..usize::from(packet.end)]).into_owned();
        let words: Vec<&str> = text.split(' ').collect();
        let number = |n: usize| words.get(n).and_then(|w: &&str| w.parse::<u64>().ok());
        let (Some(id), Some(verb), Some(value)) = (number(0), words.get(1), number(2)) else {
            oracle.fail(format!("datagram {text:?} is no answer"));
            return;
        };
        // Also of one that is answered already: it may not contradict.
        let asked = self.open.remove(&id);
        match *verb {
            "X" => oracle.shared(id, value, asked.as_ref().map_or(0, |a| a.floor)),
            "T" => {
                oracle.tokens.insert(value);
            }
            "V" if value != 1 => oracle.fail(format!("datagram {text:?}: the token is forgotten")),
            "G" if value != 0 => oracle.fail(format!("datagram {text:?}: nobody stored that")),
            _ => {}
        }
        oracle.answers += 1;
    }

    /// Takes an echo reply.
    pub fn pong(&mut self, id: u16) {
        self.pings.remove(&id);
    }
}

/// Which port or echo identifier of a client a frame from the guest is for; complains about damaged frames.
pub fn addressee(frame: &[u8], oracle: &mut Oracle) -> Option<(Protocol, u16)> {
    let packet = wire::parse(frame, frame.len(), Direction::FromGuest);
    match packet.key.protocol() {
        p @ (Protocol::Tcp | Protocol::Udp | Protocol::Icmp | Protocol::Icmpv6) => {
            if !checksums_are_right(frame) {
                oracle.fail(format!("a frame of {} with a wrong checksum", packet.key));
            }
            Some((p, packet.key.peer_port()))
        }
        _ => None,
    }
}
