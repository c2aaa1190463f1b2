//! Two guests that do nearly the same, and what they say.
//!
//! Invariants: a guest is a value, so that a checkpoint is a copy; what a guest says follows from
//! its own state and the run's chance. Streams of both guests are equal but for twists.

use colo_compare::PolicyAction;
use colo_compare::testing::Side;

use crate::message::{Carried, FlowPlan, Kind, Message};
use crate::prng::Prng;

/// How the SVM's stream differs from a place on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Twist {
    Flip,
    Insert,
    Delete,
    /// It ends there.
    End,
}

/// One guest's end of one flow.
#[derive(Debug, Clone, Default)]
struct End {
    connection: u32,
    /// How many connections the peer has tried to open.
    attempt: u32,
    is_open: bool,
    /// The SVM opened it itself, with its own initial sequence number.
    is_own: bool,
    /// How far the stream has been sent.
    sent: i64,
    fin_sent: bool,
    is_reset: bool,
    twist: Option<(i64, Twist)>,
    options: u8,
    ttl: u8,
    /// How many datagrams have been sent.
    count: u64,
}

/// A guest.
#[derive(Debug, Clone)]
pub struct Guest {
    ends: Vec<End>,
    is_svm: bool,
    /// Both guests cut their streams in the same way, as equal machines mostly do.
    cuts_alike: bool,
}

/// The flows of a run.
pub fn plans(prng: &mut Prng) -> Vec<FlowPlan> {
    let mut plans = Vec::new();
    let isns = [u32::MAX - 100, 0x7fff_ff80, 0, 123_456_789];
    let has_rules = prng.chance(300);
    let tcp = 1 + prng.below(3);
    for n in 0..tcp {
        plans.push(FlowPlan {
            carried: Carried::Tcp,
            side: side(prng),
            tags: prng.below(3) as u16,
            guest_port: 80,
            peer_port: 40_000 + n as u16,
            policy: policy(prng, has_rules),
            isn: isns[prng.below(4) as usize].wrapping_add(prng.below(90) as u32),
            is_older: prng.chance(300),
            twin: None,
        });
    }
    let others = [
        Carried::Udp,
        Carried::Echo,
        Carried::Gre,
        Carried::Arp,
        Carried::Lldp,
    ];
    for (n, carried) in others.into_iter().enumerate() {
        if prng.chance(350) {
            plans.push(FlowPlan {
                carried,
                side: side(prng),
                tags: prng.below(3) as u16,
                guest_port: 53,
                peer_port: 5000 + n as u16,
                policy: if carried == Carried::Udp {
                    policy(prng, has_rules)
                } else {
                    PolicyAction::Compare
                },
                ..plans[0]
            });
        }
    }
    if prng.chance(200) {
        twins(prng, &mut plans);
    }
    plans
}

/// A connection that the guests open, each from one of two ports.
fn twins(prng: &mut Prng, plans: &mut Vec<FlowPlan>) {
    let at = plans.len();
    let plan = FlowPlan {
        carried: if prng.chance(500) {
            Carried::Tcp
        } else {
            Carried::Udp
        },
        side: side(prng),
        tags: 0,
        guest_port: 50_000,
        peer_port: 443,
        policy: PolicyAction::Compare,
        isn: 777,
        is_older: false,
        twin: Some(at + 1),
    };
    plans.push(plan);
    plans.push(FlowPlan {
        guest_port: 50_001,
        twin: Some(at),
        ..plan
    });
}

fn side(prng: &mut Prng) -> Side {
    if prng.chance(500) { Side::V4 } else { Side::V6 }
}

fn policy(prng: &mut Prng, has_rules: bool) -> PolicyAction {
    match prng.below(6) {
        _ if !has_rules => PolicyAction::Compare,
        0 => PolicyAction::Hold,
        1 => PolicyAction::Release,
        2 => PolicyAction::IgnoreBytes { from: 5, end: 40 },
        3 => PolicyAction::IgnoreBytes {
            from: 30,
            end: u32::MAX,
        },
        _ => PolicyAction::Compare,
    }
}

/// The byte at a place of the stream that both guests should send: few values, so that shifted
/// streams agree for a while.
fn content(flow: usize, connection: u32, at: i64) -> u8 {
    let mixed = (flow as u64 * 31 + u64::from(connection) * 17 + at as u64 / 2)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 62) as u8
}

fn length(flow: usize, connection: u32) -> i64 {
    60 + (flow as i64 * 37 + i64::from(connection) * 53) % 200
}

impl Guest {
    pub fn new(plans: &[FlowPlan], cuts_alike: bool) -> Self {
        let end = |plan: &FlowPlan| End {
            is_open: plan.is_older,
            ttl: 64,
            ..End::default()
        };
        Self {
            ends: plans.iter().map(end).collect(),
            is_svm: false,
            cuts_alike,
        }
    }

    /// The same guest on the other host.
    pub fn as_svm(&self) -> Self {
        let mut svm = self.clone();
        svm.is_svm = true;
        svm.ends.iter_mut().for_each(|end| end.is_own = false);
        svm
    }

    /// How far a flow's stream has been sent, and in which connection.
    pub fn sent(&self, flow: usize) -> (u32, i64) {
        (self.ends[flow].connection, self.ends[flow].sent)
    }

    /// Now and then the SVM begins to differ.
    pub fn twist(&mut self, prng: &mut Prng, flow: usize) {
        let end = &mut self.ends[flow];
        match prng.below(8) {
            0 => end.options = 1 + prng.below(2) as u8,
            1 => end.ttl = 63,
            n => {
                let twists = [Twist::Flip, Twist::Insert, Twist::Delete, Twist::End];
                // Only what has not been sent yet: a guest does not contradict itself.
                let at = end.sent + prng.below(60) as i64;
                end.twist = Some((at, twists[n as usize % 4]));
            }
        }
    }

    /// What the guest says next in a flow.
    pub fn say(&mut self, prng: &mut Prng, plans: &[FlowPlan], flow: usize) -> Option<Message> {
        let plan = &plans[flow];
        match plan.carried {
            Carried::Tcp if plan.twin.is_some() => Some(self.open(prng, plan, flow)),
            Carried::Tcp => self.speak(prng, plan, flow),
            Carried::Arp => {
                let mut message = self.datagram(prng, flow);
                // A request or an answer: nothing else varies.
                message.payload = vec![message.payload.first().map_or(0, |byte| byte & 1)];
                Some(message)
            }
            _ => Some(self.datagram(prng, flow)),
        }
    }

    fn message(&self, prng: &mut Prng, flow: usize) -> Message {
        let end = &self.ends[flow];
        Message {
            flow,
            kind: Kind::Data,
            connection: end.connection,
            attempt: end.attempt,
            at: end.sent,
            is_fin: false,
            own_isn: None,
            options: end.options,
            payload: Vec::new(),
            ttl: end.ttl,
            noise: prng.next() as u16,
        }
    }

    fn open(&mut self, prng: &mut Prng, plan: &FlowPlan, flow: usize) -> Message {
        let end = &mut self.ends[flow];
        *end = End {
            connection: end.connection + 1,
            attempt: end.attempt + 1,
            is_open: true,
            is_own: self.is_svm,
            options: end.options,
            ttl: end.ttl,
            twist: end.twist,
            ..End::default()
        };
        self.opening(prng, plan, flow)
    }

    fn refuse(&mut self, prng: &mut Prng, flow: usize) -> Message {
        self.ends[flow].attempt += 1;
        Message {
            kind: Kind::Reset,
            ..self.message(prng, flow)
        }
    }

    fn opening(&self, prng: &mut Prng, plan: &FlowPlan, flow: usize) -> Message {
        let connection = self.ends[flow].connection;
        let isn = plan.isn(connection);
        Message {
            kind: Kind::Open,
            at: 0,
            own_isn: self.ends[flow].is_own.then_some(isn ^ 0x0005_5555),
            ..self.message(prng, flow)
        }
    }

    fn speak(&mut self, prng: &mut Prng, plan: &FlowPlan, flow: usize) -> Option<Message> {
        let end = &self.ends[flow];
        let has_ended = end.fin_sent || end.is_reset;
        if !end.is_open || (has_ended && prng.chance(300)) {
            return Some(if prng.chance(60) {
                self.refuse(prng, flow)
            } else {
                self.open(prng, plan, flow)
            });
        }
        if end.is_reset {
            // Each segment that comes afterwards may be answered by one more reset.
            return prng.chance(200).then(|| Message {
                kind: Kind::Reset,
                ..self.message(prng, flow)
            });
        }
        match prng.below(100) {
            0 => Some(self.open(prng, plan, flow)),
            1 | 2 if end.connection > 0 && end.sent == 0 => Some(self.opening(prng, plan, flow)),
            3 => {
                self.ends[flow].is_reset = true;
                Some(Message {
                    kind: Kind::Reset,
                    ..self.message(prng, flow)
                })
            }
            4..=14 => Some(self.message(prng, flow)),
            _ => Some(self.data(prng, flow)),
        }
    }

    /// The next bytes, or some from before, or both.
    fn data(&mut self, prng: &mut Prng, flow: usize) -> Message {
        let (end, mut message) = (&self.ends[flow], self.message(prng, flow));
        let length = self.length(flow);
        let again = if self.cuts_alike { 5 } else { 30 };
        let from = match prng.below(100) {
            n if n >= again => end.sent,
            n if n % 5 == 0 => 0,
            _ => prng.below(end.sent as u64 + 1) as i64,
        };
        let step = if self.cuts_alike {
            (from * 7 + i64::from(end.connection)) % 30
        } else {
            prng.below(30) as i64
        };
        let to = (from + 1 + step).min(length);
        message.at = from;
        message.payload = (from..to).map(|at| self.byte(flow, at)).collect();
        message.is_fin = to == length && (from == length || self.cuts_alike || prng.chance(500));
        if !self.is_svm && from < end.sent && prng.chance(60) {
            // A guest whose memory of what it sent is bad.
            let at = prng.below(message.payload.len() as u64) as usize;
            message
                .payload
                .iter_mut()
                .skip(at)
                .take(1)
                .for_each(|byte| *byte ^= 2);
        }
        let end = &mut self.ends[flow];
        end.sent = end.sent.max(to);
        end.fin_sent |= message.is_fin;
        message
    }

    fn length(&self, flow: usize) -> i64 {
        let end = &self.ends[flow];
        let length = length(flow, end.connection);
        match end.twist {
            Some((at, _)) if at >= length => length,
            Some((at, Twist::End)) => at,
            Some((_, Twist::Insert)) => length + 1,
            Some((_, Twist::Delete)) => length - 1,
            _ => length,
        }
        .max(end.sent)
    }

    fn byte(&self, flow: usize, at: i64) -> u8 {
        let end = &self.ends[flow];
        let own = |at| content(flow, end.connection, at);
        match end.twist {
            Some((from, Twist::Flip)) if at == from => own(at) ^ 1,
            Some((from, Twist::Insert)) if at == from => 9,
            Some((from, Twist::Insert)) if at > from => own(at - 1),
            Some((from, Twist::Delete)) if at >= from => own(at + 1),
            _ => own(at),
        }
    }

    fn datagram(&mut self, prng: &mut Prng, flow: usize) -> Message {
        let count = self.ends[flow].count;
        self.ends[flow].count += 1;
        let mut message = self.message(prng, flow);
        message.payload = (0..1 + count % 5)
            .map(|n| content(flow, 0, (count + n) as i64))
            .collect();
        let end = &mut self.ends[flow];
        if let Some((_, twist)) = end.twist.take() {
            match twist {
                Twist::Flip => message.payload[0] ^= 1,
                Twist::Insert => message.payload.push(7),
                Twist::Delete => drop(message.payload.pop()),
                // One is left out.
                Twist::End => end.count += 1,
            }
        }
        message
    }
}
