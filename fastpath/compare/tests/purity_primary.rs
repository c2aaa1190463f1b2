//! The primary path takes all its memory in `new`: an allocator that counts watches every call,
//! through everything that two guests, a client, a secondary and a shell may do.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod fixed;

use std::collections::{HashMap, VecDeque};

use colo_compare::testing::{Segment, Side, digest_key, digested, echo, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use colo_compare::{
    ANNOUNCEMENT_MAX, Action, Cause, Direction, Frames, Limits, Policy, PolicyAction, PrimaryPath,
    PrimaryStats, Right, Rule, SecondaryPath, Token, wire,
};
use fixed::{Dice, Pool, allocations, pure};

const SLOTS: u32 = 64;

/// So small that everything gets full and late: `is_tight` soon, otherwise sometimes.
fn limits(is_tight: bool) -> Limits {
    let (few, many, soon_us) = if is_tight {
        (5, 8, 3_000)
    } else {
        (12, 12, 10_000)
    };
    Limits {
        max_flows: few,
        max_translations: INHERITED as usize,
        max_held_frames: many,
        max_svm_frames: few,
        max_history_bytes: 60,
        max_unacked_inputs: 6,
        compare_deadline_us: soon_us,
        ack_deadline_us: soon_us,
        lag_deadline_us: soon_us + 1_000,
        extra_deadline_us: soon_us,
        flow_idle_s: 2,
        time_wait_s: 1,
        hash_seed: 0x5eed,
        ..Limits::default()
    }
}

/// Guest ports of flows with a rule.
const HELD_PORT: u16 = 81;
const RELEASED_PORT: u16 = 82;
const IGNORED_PORT: u16 = 83;

fn policy() -> Policy {
    let rule = |port, action| Rule {
        guest_ports: Some((port, port)),
        action,
        ..Rule::default()
    };
    let all = PolicyAction::IgnoreBytes {
        from: 0,
        end: u32::MAX,
    };
    Policy::new(vec![
        rule(HELD_PORT, PolicyAction::Hold),
        rule(RELEASED_PORT, PolicyAction::Release),
        rule(IGNORED_PORT, all),
    ])
}

/// How the SVM's version of a message relates to the PVM's; the first byte of a payload names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Equal = 1,
    /// In two segments where the PVM sends one.
    Split,
    /// In one segment where the PVM sends two.
    Joined,
    /// Sent twice.
    Repeated,
    /// Other bytes, where a policy leaves them out.
    Ignored,
    /// Fragments, cut alike and not.
    CutAlike,
    CutOtherwise,
    /// It must not leave by a match.
    Differs,
}

const WAYS: usize = 9;

/// A message as each guest sends it.
struct Message {
    pvm: Vec<Vec<u8>>,
    svm: Vec<Vec<u8>>,
}

impl Message {
    fn same(frame: Vec<u8>) -> Self {
        Self {
            pvm: vec![frame.clone()],
            svm: vec![frame],
        }
    }

    fn pair(pvm: Vec<u8>, svm: Vec<u8>) -> Self {
        Self {
            pvm: vec![pvm],
            svm: vec![svm],
        }
    }
}

/// Connections; more than there are places for flows.
const CONNECTIONS: u64 = 24;
/// Those that the path has inherited.
const INHERITED: u64 = 4;

/// One connection's numbers, as the guest counts.
#[derive(Clone, Copy, Default)]
struct Connection {
    isn: u32,
    sent: u32,
    /// What the client's numbers are ahead.
    offset: u32,
}

fn first_isn(c: u64) -> u32 {
    u32::MAX - 30 + c as u32
}

/// A translation of the first connections: half of them known, half still to be learnt.
const OFFSET: u32 = 5000;

fn side(c: u64) -> Side {
    [Side::V4, Side::V6][(c % 2) as usize]
}

fn guest_port(c: u64) -> u16 {
    match c {
        9 | 10 => HELD_PORT,
        11 | 12 => RELEASED_PORT,
        13..=16 => IGNORED_PORT,
        _ => 80,
    }
}

fn segment(c: u64) -> Segment {
    let segment = Segment::new(side(c)).ports(guest_port(c), 40_000 + c as u16);
    segment.ack(c as u32 + 1)
}

/// The record of a host that took over with open connections.
fn inherited_record() -> Vec<u8> {
    let mut pool = Pool::new(SLOTS);
    let mut record = Vec::new();
    PrimaryPath::new(limits(false)).export_client_xlate(&mut record);
    let mut secondary = SecondaryPath::new(limits(false));
    secondary
        .commit(0, &mut pool, 1, Vec::new(), &record)
        .unwrap();
    let mut input_seq = 0;
    let mut mirror = |secondary: &mut SecondaryPath, pool: &mut Pool, bytes: &[u8]| {
        input_seq += 1;
        let token = pool.insert(bytes).unwrap();
        let epoch = secondary.epoch();
        secondary
            .handle_mirror(0, pool, epoch, input_seq, token)
            .unwrap();
        while let Some(token) = secondary.poll_deliver(0, pool) {
            pool.release(token);
        }
    };
    for c in 0..INHERITED {
        let client = segment(c).to_guest();
        let syn = client.clone().flags(SYN).seq(c as u32).bytes();
        mirror(&mut secondary, &mut pool, &syn);
        let syn_ack = segment(c).flags(SYN | ACK).seq(first_isn(c)).bytes();
        let token = pool.insert(&syn_ack).unwrap();
        secondary.handle_guest_tx(0, &mut pool, token);
        if c < INHERITED / 2 {
            let pvm_isn = first_isn(c).wrapping_add(OFFSET);
            let ack = client.seq(c as u32 + 1).ack(pvm_isn.wrapping_add(1));
            mirror(&mut secondary, &mut pool, &ack.bytes());
        }
    }
    let primary = secondary.take_over(0, &mut pool);
    record.clear();
    primary.export_client_xlate(&mut record);
    primary.close(&mut pool);
    record
}

/// What is watched and cannot be read off the path's own counters.
#[derive(Debug, Default)]
struct Tally {
    matched: [u64; WAYS],
    cuts: u64,
    pending: u64,
    commits: u64,
    aborts: u64,
    commits_mute: u64,
    unmutes: u64,
    alone: u64,
    pairs: u64,
    pairs_again: u64,
    imports: u64,
    announcements: u64,
    reports: u64,
    without_room: u64,
    without_nic_room: u64,
    early_output: u64,
    retransmissions: u64,
}

/// Two guests, a client, a secondary and a shell that do at random what they may do.
struct Life {
    pool: Pool,
    path: PrimaryPath,
    dice: Dice,
    now_us: u64,
    has_policy: bool,
    connections: [Connection; CONNECTIONS as usize],
    messages: u16,
    to_pvm: VecDeque<Vec<u8>>,
    to_svm: VecDeque<Vec<u8>>,
    recent: VecDeque<Vec<u8>>,
    svm_seq: u64,
    input_seq: u64,
    is_paired: bool,
    is_mute: bool,
    in_flight: Option<u64>,
    record: Option<Vec<u8>>,
    export: Vec<u8>,
    /// What was sent as a digest, and what the path has asked for of it.
    digested: HashMap<u64, (u64, Vec<u8>)>,
    asked: Vec<u64>,
    tally: Tally,
}

impl Life {
    fn new(seed: u64, limits: Limits, has_policy: bool, record: Option<Vec<u8>>) -> Self {
        let policy = if has_policy {
            policy()
        } else {
            Policy::default()
        };
        let mut path = PrimaryPath::with_policy(limits, policy);
        path.set_digest_key(Some(digest_key()));
        let mut life = Self {
            pool: Pool::new(SLOTS),
            path,
            dice: Dice(seed),
            now_us: 1_000_000,
            has_policy,
            connections: [Connection::default(); CONNECTIONS as usize],
            messages: 0,
            to_pvm: VecDeque::new(),
            to_svm: VecDeque::new(),
            recent: VecDeque::new(),
            svm_seq: 0,
            input_seq: 0,
            is_paired: false,
            is_mute: false,
            in_flight: None,
            record,
            export: Vec::with_capacity(limits.xlate_record_max()),
            digested: HashMap::new(),
            asked: Vec::new(),
            tally: Tally::default(),
        };
        life.inherit();
        life
    }

    fn below(&mut self, n: u64) -> u64 {
        self.dice.below(n)
    }

    /// Runs a call of the path, which must not ask for memory, and does what the path wants.
    fn call<T>(
        &mut self,
        name: &str,
        task: impl FnOnce(&mut PrimaryPath, &mut Pool, u64) -> T,
    ) -> T {
        let (path, pool, now_us) = (&mut self.path, &mut self.pool, self.now_us);
        let result = pure(name, || task(path, pool, now_us));
        self.act();
        result
    }

    fn act(&mut self) {
        while let Some(action) = pure("poll_action", || self.path.poll_action()) {
            match action {
                Action::Release { token, right, .. } => {
                    if right == Right::Match
                        && let Some(way) = self.way_of(&token)
                    {
                        self.tally.matched[way] += 1;
                    }
                    self.pool.release(token);
                }
                Action::Mirror {
                    input_seq, token, ..
                } => {
                    self.input_seq = input_seq;
                    self.pool.release(token);
                }
                Action::SvmReleased { .. } => self.tally.reports += 1,
                Action::PendingReleased { .. } | Action::Checkpoint(_) => {}
                Action::Fetch { svm_seq } => self.asked.push(svm_seq),
            }
        }
    }

    fn way_of(&self, token: &Token) -> Option<usize> {
        let bytes = self.pool.bytes(token);
        let packet = wire::parse(bytes, bytes.len(), Direction::FromGuest);
        if let Some(fragment) = packet.fragment {
            let ways = [Way::CutAlike, Way::CutOtherwise];
            return Some(ways[fragment.id as usize % 2] as usize);
        }
        let at = packet.tcp?.payload_at;
        bytes.get(usize::from(at)).map(|way| usize::from(*way))
    }

    /// A new life with the connections of an old one.
    fn inherit(&mut self) {
        for c in 0..CONNECTIONS {
            let is_known = self.record.is_some() && c < INHERITED / 2;
            self.connections[c as usize] = Connection {
                isn: first_isn(c),
                sent: 0,
                offset: if is_known { OFFSET } else { 0 },
            };
        }
        if let Some(record) = self.record.clone() {
            let import = |path: &mut PrimaryPath, _: &mut Pool, now_us| {
                path.import_client_xlate(now_us, &record)
            };
            self.call("import_client_xlate", import).unwrap();
            self.tally.imports += 1;
        }
    }

    /// Mostly one of those that are always busy.
    fn connection(&mut self) -> u64 {
        const BUSY: [u64; 6] = [0, 2, 13, 14, 17, 20];
        let any = self.below(CONNECTIONS);
        match self.below(4) {
            0 => any,
            _ => BUSY[any as usize % BUSY.len()],
        }
    }

    fn message(&mut self) -> Message {
        let c = self.connection();
        let port = 40_000 + c as u16;
        self.messages = self.messages.wrapping_add(1);
        let n = self.messages.to_be_bytes();
        match self.below(40) {
            0 | 1 => self.opening(c),
            2..=22 => self.stream(c),
            23 => {
                let fin = self.next(c, 1).flags(FIN | ACK);
                Message::same(fin.bytes())
            }
            24 => {
                let reset = self.next(c, 0).flags(RST | ACK).bytes();
                match self.below(3) {
                    0 => Message::same(reset),
                    1 => Message {
                        svm: Vec::new(),
                        ..Message::same(reset)
                    },
                    _ => Message::pair(reset, self.next(c, 0).payload(&[9; 4]).bytes()),
                }
            }
            25..=28 => Message::same(udp(side(c), false, 80, port, &n)),
            29 => {
                let [a, b] = [&n[..], &[9, 9, 9]].map(|p| udp(side(c), false, 80, port, p));
                Message::pair(a, b)
            }
            30..=32 => self.fragments(side(c)),
            33 => arp(),
            34 => {
                // Each guest picks its own port.
                let [a, b] = [5000, 6000].map(|p| udp(side(c), false, p + c as u16, 53, b"?"));
                Message::pair(a, b)
            }
            35 => Message {
                svm: Vec::new(),
                ..Message::same(vec![0xff; 12])
            },
            36 => {
                let [a, b] = [64, 63].map(|ttl| ip_frame(side(c), false, 132, ttl, 0, &n));
                Message::pair(a, b)
            }
            37 => Message::same(echo(side(c), false, port, &n)),
            _ => Message {
                svm: Vec::new(),
                ..Message::same(self.next(c, 0).bytes())
            },
        }
    }

    /// The connection's next segment, which takes `len` numbers.
    fn next(&mut self, c: u64, len: u32) -> Segment {
        let connection = &mut self.connections[c as usize];
        let seq = connection.isn.wrapping_add(1 + connection.sent);
        connection.sent += len;
        segment(c).seq(seq)
    }

    /// A new connection between the same ports, which the guest accepts.
    fn opening(&mut self, c: u64) -> Message {
        let connection = &mut self.connections[c as usize];
        let isn = connection.isn.wrapping_add(1_000_003);
        *connection = Connection {
            isn,
            ..Connection::default()
        };
        let syn_ack = segment(c).flags(SYN | ACK).seq(isn);
        let mss: &[u8] = if self.below(5) == 0 {
            &[2, 4, 5, 0xb4]
        } else {
            &[]
        };
        let other = syn_ack.clone().seq(isn.wrapping_add(77)).option(mss);
        let syn = segment(c).to_guest().flags(SYN).seq(isn ^ 0x5555);
        self.client_sends(&syn.bytes());
        Message::pair(syn_ack.bytes(), other.bytes())
    }

    fn stream(&mut self, c: u64) -> Message {
        let way = if self.has_policy && guest_port(c) == IGNORED_PORT {
            Way::Ignored
        } else {
            let ways = [Way::Equal, Way::Split, Way::Joined, Way::Repeated];
            let at = self.below(24) as usize;
            ways.get(at % 8).copied().unwrap_or(match at {
                23 => Way::Differs,
                _ => Way::Equal,
            })
        };
        let n = self.messages as u8;
        let payload = [way as u8, c as u8, n, 4, 5, 6, 7, 8, 9, 10];
        let first = self.next(c, 10);
        let whole = first.clone().payload(&payload).bytes();
        let seq = self.connections[c as usize].isn.wrapping_add(1);
        let seq = seq.wrapping_add(self.connections[c as usize].sent);
        let pvm = vec![whole.clone()];
        let svm = match way {
            Way::Split => {
                let rest = segment(c).seq(seq.wrapping_sub(6));
                let rest = rest.payload(&payload[4..]).bytes();
                vec![first.payload(&payload[..4]).bytes(), rest]
            }
            Way::Joined => {
                let rest = self.next(c, 10).payload(&payload).bytes();
                let both = first.payload(&payload.repeat(2)).bytes();
                return Message {
                    pvm: vec![whole, rest],
                    svm: vec![both],
                };
            }
            Way::Repeated => vec![whole.clone(), whole],
            Way::Ignored => vec![first.payload(&[n; 10]).bytes()],
            Way::Differs => match self.below(4) {
                0 => vec![first.payload(&payload[..9]).flags(ACK | FIN).bytes()],
                1 => vec![first.payload(&payload).ttl(63).bytes()],
                2 => Vec::new(),
                _ => vec![first.payload(&[n; 10]).bytes()],
            },
            _ => vec![whole],
        };
        Message { pvm, svm }
    }

    fn fragments(&mut self, side: Side) -> Message {
        let is_cut_otherwise = self.below(2) == 0;
        let id = self.messages << 1 | u16::from(is_cut_otherwise);
        let [high, low] = self.messages.to_be_bytes();
        let bytes: Vec<u8> = [0, 7, 0, 7, 0, 60, high, low]
            .into_iter()
            .chain(8..60)
            .collect();
        let cut = |id: u16, cuts: &[usize]| {
            let ends = cuts.iter().skip(1).copied().chain([8]);
            let pieces = cuts.iter().copied().zip(ends);
            pieces.map(|at| fragment(side, id, &bytes, at)).collect()
        };
        let other: &[usize] = if is_cut_otherwise {
            &[0, 2, 5]
        } else {
            &[0, 3]
        };
        Message {
            pvm: cut(id, &[0, 3]),
            svm: cut(id ^ 0x100, other),
        }
    }

    fn produce(&mut self) {
        if self.to_pvm.len() < 16 && self.to_svm.len() < 24 {
            let Message { pvm, svm } = self.message();
            self.to_pvm.extend(pvm);
            self.to_svm.extend(svm);
        }
    }

    fn pvm_sends(&mut self) {
        if !self.path.room() {
            self.tally.without_room += 1;
            return;
        }
        let Some(bytes) = self.to_pvm.pop_front() else {
            return;
        };
        let token = self.pool.insert(&bytes).unwrap();
        self.call("handle_guest_tx", |path, pool, now_us| {
            path.handle_guest_tx(now_us, pool, token);
        });
        self.recent.push_back(bytes);
        if self.recent.len() > 8 {
            self.recent.pop_front();
        }
    }

    fn pvm_repeats(&mut self) {
        let at = self.below(8) as usize;
        if let Some(bytes) = self.recent.get(at).cloned() {
            self.to_pvm.push_front(bytes);
            self.tally.retransmissions += 1;
        }
    }

    /// Bytes that the path asked for, of what it has released meanwhile too.
    fn svm_answers(&mut self) -> bool {
        let Some((svm_seq, epoch, bytes)) = self.asked.pop().and_then(|svm_seq| {
            let (epoch, bytes) = self.digested.remove(&svm_seq)?;
            Some((svm_seq, epoch, bytes))
        }) else {
            return false;
        };
        let token = self.pool.insert(&bytes).unwrap();
        self.call("handle_svm_output", |path, pool, now_us| {
            path.handle_svm_output(now_us, pool, epoch, svm_seq, token);
        });
        true
    }

    fn svm_sends(&mut self) {
        if self.below(2) == 0 && self.svm_answers() {
            return;
        }
        // Late, and out of order.
        let at = self.below(4) as usize;
        let Some(bytes) = self.to_svm.remove(at) else {
            return;
        };
        let now = self.path.epoch();
        let epoch = match self.below(50) {
            0 => now - 1,
            1 => now + 3,
            _ => now - u64::from(self.in_flight.is_some() && self.below(2) == 0),
        };
        self.tally.early_output += u64::from(self.in_flight.is_some() && epoch == now);
        self.svm_seq += 1;
        let svm_seq = self.svm_seq;
        if self.below(2) == 0
            && let Some((headers, n, digest)) = digested(&bytes, &digest_key())
        {
            let token = self.pool.insert(headers).unwrap();
            self.digested.insert(svm_seq, (epoch, bytes.clone()));
            self.call("handle_svm_digest", |path, pool, now_us| {
                path.handle_svm_digest(now_us, pool, epoch, svm_seq, token, n, digest);
            });
            return;
        }
        let token = self.pool.insert(&bytes).unwrap();
        self.call("handle_svm_output", |path, pool, now_us| {
            path.handle_svm_output(now_us, pool, epoch, svm_seq, token);
        });
    }

    fn input(&mut self) {
        let c = self.connection();
        let Connection { isn, sent, offset } = self.connections[c as usize];
        let acked = self.below(u64::from(sent) + 1) as u32;
        let ack = isn.wrapping_add(1 + acked).wrapping_add(offset);
        let client = segment(c).to_guest().seq(c as u32 + 1).ack(ack);
        let bytes = match self.below(20) {
            0 => client.flags(FIN | ACK).bytes(),
            1 => client.flags(RST).bytes(),
            2 => client.sack(&[(ack, ack.wrapping_add(10))]).bytes(),
            3..=5 => udp(side(c), true, 80, 40_000 + c as u16, b"question"),
            6 => vec![0xfe; 20],
            7 => {
                // Too long for the path: quotes what the guest sent.
                let mut message = Vec::from([3, 4, 0, 0, 0, 0, 5, 0]);
                message.extend_from_slice(&segment(c & !1).seq(ack).bytes()[14..42]);
                ip_frame(Side::V4, true, 1, 64, 0, &message)
            }
            8..=11 => client.payload(b"request").bytes(),
            _ => client.bytes(),
        };
        self.client_sends(&bytes);
    }

    fn client_sends(&mut self, bytes: &[u8]) {
        if !self.path.nic_room() {
            self.tally.without_nic_room += 1;
            return;
        }
        let token = self.pool.insert(bytes).unwrap();
        let token = self.call("handle_nic", |path, pool, now_us| {
            path.handle_nic(now_us, pool, token)
        });
        if self.below(10) == 0 {
            // The guest's ring is full.
            self.pool.release(token);
            return;
        }
        self.call("handle_delivered", |path, pool, now_us| {
            path.handle_delivered(now_us, pool, token);
        });
    }

    fn ack_input(&mut self) {
        let up_to = self.input_seq.saturating_sub(self.below(3));
        self.call("handle_input_ack", |path, pool, now_us| {
            path.handle_input_ack(now_us, pool, up_to);
        });
    }

    fn lease(&mut self) {
        let until_us = self.now_us + self.below(20_000);
        self.call("set_lease", |path, pool, now_us| {
            path.set_lease(now_us, pool, until_us);
        });
    }

    fn time_passes(&mut self) {
        self.now_us += match self.below(40) {
            0 => 3_000_000,
            1 | 2 => 20_000,
            _ => 1_000,
        };
        self.call("handle_timeout", |path, pool, now_us| {
            path.handle_timeout(now_us, pool);
        });
    }

    fn caught_up(&mut self) {
        let epoch = self.path.epoch() - u64::from(self.below(4) == 0);
        self.call("caught_up", |path, _, now_us| path.caught_up(now_us, epoch));
    }

    fn checkpoint(&mut self) {
        let Some(epoch) = self.in_flight else {
            if self.is_paired && self.below(2) == 0 {
                let epoch = self.call("cut", |path, _, now_us| path.cut(now_us));
                self.in_flight = Some(epoch.unwrap());
                let pending = self.call("pending", |path, _, _| path.pending().count());
                self.tally.pending += pending as u64;
                self.tally.cuts += 1;
            }
            return;
        };
        self.in_flight = None;
        // The SVM goes on as the PVM is; but some of what it sent is still on its way.
        if self.below(8) > 0 {
            self.to_svm.clear();
            self.to_pvm.clear();
        }
        let ended = if self.below(8) == 0 {
            self.tally.aborts += 1;
            self.call("abort", |path, pool, now_us| {
                path.abort(now_us, pool, epoch)
            })
        } else {
            self.tally.commits += 1;
            self.tally.commits_mute += u64::from(self.is_mute);
            self.call("commit", |path, pool, now_us| {
                path.commit(now_us, pool, epoch)
            })
        };
        ended.unwrap();
    }

    fn mute_or_unmute(&mut self) {
        if !self.is_mute {
            self.is_mute = self.below(4) == 0;
            if self.is_mute {
                self.call("mute", |path, _, _| path.mute());
            }
        } else {
            self.call("unmute", |path, pool, now_us| path.unmute(now_us, pool));
            self.is_mute = false;
            self.tally.unmutes += 1;
        }
    }

    fn change_roles(&mut self) {
        if !self.is_paired {
            if self.below(4) == 0 {
                self.inherit();
            }
            let epoch = self.call("pair", |path, _, now_us| path.pair(now_us));
            (self.in_flight, self.input_seq) = (Some(epoch.unwrap()), 0);
            self.is_paired = true;
            self.tally.pairs += 1;
        } else if self.below(12) == 0 {
            self.call("go_alone", |path, pool, now_us| path.go_alone(now_us, pool));
            (self.is_paired, self.is_mute, self.in_flight) = (false, false, None);
            self.tally.alone += 1;
        } else if self.below(6) == 0 && self.in_flight.is_none() {
            let epoch = self.call("pair_again", |path, pool, now_us| {
                path.pair_again(now_us, pool)
            });
            (self.in_flight, self.input_seq) = (Some(epoch.unwrap()), 0);
            self.tally.pairs_again += 1;
        }
    }

    fn announce(&mut self) {
        self.call("set_guest_mac", |path, _, _| {
            path.set_guest_mac([2, 0, 0, 0, 0, 1]);
            path.announce();
        });
        let mut frame = [0; ANNOUNCEMENT_MAX];
        while let Some(len) = self.call("poll_announcement", |path, _, now_us| {
            path.poll_announcement(now_us, &mut frame)
        }) {
            assert!(len >= 60);
            self.tally.announcements += 1;
        }
    }

    fn look(&mut self) {
        self.export.clear();
        let mut export = std::mem::take(&mut self.export);
        self.call("export_client_xlate", |path, _, _| {
            path.export_client_xlate(&mut export);
            assert_eq!(export.len(), path.xlate_record_len());
        });
        self.export = export;
        self.call("next_deadline", |path, _, _| path.next_deadline());
        let token = self.call("poll_deliver", |path, pool, now_us| {
            path.poll_deliver(now_us, pool)
        });
        assert_eq!(token, None);
    }

    fn step(&mut self) {
        self.now_us += self.below(60);
        match self.below(100) {
            0..=11 => self.produce(),
            12..=33 => self.pvm_sends(),
            34..=60 => self.svm_sends(),
            61..=66 => self.input(),
            67..=76 => self.ack_input(),
            77..=81 => self.lease(),
            82..=84 => self.time_passes(),
            85..=88 => self.caught_up(),
            89..=93 => self.checkpoint(),
            94 => self.mute_or_unmute(),
            95 => self.change_roles(),
            96 => self.pvm_repeats(),
            97 => self.announce(),
            _ => self.look(),
        }
    }

    /// Ends; every slot must have come back.
    fn close(mut self) -> (PrimaryStats, Tally) {
        let stats = *self.path.stats();
        let (path, pool) = (self.path, &mut self.pool);
        path.close(pool);
        assert_eq!(pool.used(), 0, "a slot leaked");
        (stats, self.tally)
    }
}

fn arp() -> Message {
    let mut frame = vec![0xff; 12];
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.resize(60, 1);
    Message {
        pvm: Vec::new(),
        svm: vec![frame],
    }
}

/// Bytes `from..end` of a packet, in units of 8.
fn fragment(side: Side, id: u16, bytes: &[u8], (from, end): (usize, usize)) -> Vec<u8> {
    let more = end * 8 < bytes.len();
    let bytes = &bytes[from * 8..(end * 8).min(bytes.len())];
    match side {
        Side::V4 => {
            let mut frame = ip_frame(side, false, 0, 64, id, bytes);
            let place = u16::from(more) << 13 | from as u16;
            frame[20..22].copy_from_slice(&place.to_be_bytes());
            frame
        }
        Side::V6 => {
            let place = (from as u16) << 3 | u16::from(more);
            let mut header = vec![17, 0];
            header.extend_from_slice(&place.to_be_bytes());
            header.extend_from_slice(&u32::from(id).to_be_bytes());
            header.extend_from_slice(bytes);
            ip_frame(side, false, 44, 64, 0, &header)
        }
    }
}

/// What all lives together have seen, by name.
fn seen(all: &[(PrimaryStats, Tally)]) -> Vec<(String, u64)> {
    let mut seen: Vec<(String, u64)> = Vec::new();
    let mut note = |name: &str, count: &dyn Fn(&(PrimaryStats, Tally)) -> u64| {
        seen.push((name.into(), all.iter().map(count).sum()));
    };
    note("released_by_match", &|(s, _)| s.released_data_by_match);
    note("released_by_checkpoint", &|(s, _)| s.released_by_checkpoint);
    note("released_free", &|(s, _)| s.released_free);
    note("released_by_policy", &|(s, _)| s.released_by_policy);
    note("released_alone", &|(s, _)| s.released_alone);
    note("mirrored", &|(s, _)| s.mirrored);
    note("digests", &|(s, _)| s.digests);
    note("fetched", &|(s, _)| s.fetched);
    note("svm_stale", &|(s, _)| s.svm_stale);
    note("svm_overflow", &|(s, _)| s.svm_overflow);
    note("svm_surplus", &|(s, _)| s.svm_surplus);
    note("history_dropped", &|(s, _)| s.history_dropped);
    note("flows_evicted", &|(s, _)| s.flows_evicted);
    note("flows_expired", &|(s, _)| s.flows_expired);
    note("stripped", &|(s, _)| s.stripped);
    note("pending", &|(_, t)| t.pending);
    note("cuts", &|(_, t)| t.cuts);
    note("commits", &|(_, t)| t.commits);
    note("commits_mute", &|(_, t)| t.commits_mute);
    note("aborts", &|(_, t)| t.aborts);
    note("unmutes", &|(_, t)| t.unmutes);
    note("alone", &|(_, t)| t.alone);
    note("pairs", &|(_, t)| t.pairs);
    note("pairs_again", &|(_, t)| t.pairs_again);
    note("imports", &|(_, t)| t.imports);
    note("announcements", &|(_, t)| t.announcements);
    note("reports", &|(_, t)| t.reports);
    note("without_room", &|(_, t)| t.without_room);
    note("without_nic_room", &|(_, t)| t.without_nic_room);
    note("early_output", &|(_, t)| t.early_output);
    note("retransmissions", &|(_, t)| t.retransmissions);
    let ways = [
        Way::Equal,
        Way::Split,
        Way::Joined,
        Way::Repeated,
        Way::Ignored,
        Way::CutAlike,
        Way::CutOtherwise,
    ];
    for way in ways {
        note(&format!("{way:?}"), &|(_, t)| t.matched[way as usize]);
    }
    for cause in Cause::ALL {
        // The secondary's own.
        if cause != Cause::InputOverflow {
            note(cause.name(), &|(s, _)| {
                s.divergences[cause.index()] + s.requests[cause.index()]
            });
        }
    }
    seen
}

#[test]
fn a_primary_path_takes_no_memory_after_new() {
    let (_, count) = allocations(|| PrimaryPath::new(limits(false)));
    assert!(count > 0, "what is taken is noticed");
    let record = inherited_record();
    let mut all = Vec::new();
    for seed in 0..8 {
        // With rules or translations other ways are gone than without.
        let [has_policy, is_translating, is_tight] = [0, 1, 2].map(|bit| seed >> bit & 1 == 1);
        let record = is_translating.then(|| record.clone());
        let mut life = Life::new(seed, limits(is_tight), has_policy, record);
        (0..60_000).for_each(|_| life.step());
        all.push(life.close());
    }
    let seen = seen(&all);
    for (name, count) in seen {
        assert!(count >= 5, "{name}: only {count} times");
    }
    let differing: u64 = all
        .iter()
        .map(|(_, t)| t.matched[Way::Differs as usize])
        .sum();
    assert_eq!(differing, 0, "what differs left by a match");
}
