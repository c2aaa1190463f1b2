//! What guests say, before it becomes bytes: the reference comparator reads this, the fast one
//! the frames that are made of it.
//!
//! Invariant: two flows never make frames with the same flow key.

use colo_compare::testing::{GUEST_MAC, PEER_MAC, Segment, Side, echo, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, ECE, FIN, RST, SYN};
use colo_compare::{PolicyAction, PolicyProtocol};

/// What a flow carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carried {
    Tcp,
    Udp,
    Echo,
    /// Another IP protocol.
    Gre,
    Arp,
    /// Another EtherType.
    Lldp,
}

/// One flow of a run.
#[derive(Debug, Clone, Copy)]
pub struct FlowPlan {
    pub carried: Carried,
    pub side: Side,
    /// How many VLAN tags.
    pub tags: u16,
    pub guest_port: u16,
    pub peer_port: u16,
    pub policy: PolicyAction,
    /// TCP: where streams begin.
    pub isn: u32,
    /// TCP: its first connection is older than the pair.
    pub is_older: bool,
    /// The guest opens it, and the SVM may do so from another port: the number of that flow.
    pub twin: Option<usize>,
}

impl FlowPlan {
    /// The initial sequence number of the PVM in the n-th connection.
    pub fn isn(&self, connection: u32) -> u32 {
        self.isn.wrapping_add(connection.wrapping_mul(70_001))
    }

    pub fn policy_protocol(&self) -> Option<PolicyProtocol> {
        match self.carried {
            Carried::Tcp => Some(PolicyProtocol::Tcp),
            Carried::Udp => Some(PolicyProtocol::Udp),
            _ => None,
        }
    }
}

/// What kind of TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// SYN-ACK, or SYN where the guest opens the connection.
    Open,
    Data,
    Reset,
}

/// One message of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub flow: usize,
    /// TCP only, from here on.
    pub kind: Kind,
    /// Which connection between these ports.
    pub connection: u32,
    /// Place of the first payload byte in the guest's stream, from 0.
    pub at: i64,
    pub is_fin: bool,
    /// The initial sequence number of whoever opens; otherwise the numbers are the PVM's.
    pub own_isn: Option<u32>,
    /// Which of the peer's SYNs it acknowledges; a refused one begins no connection.
    pub attempt: u32,
    /// 1 varies the options that bind the connection, 2 the flags of its SYN.
    pub options: u8,
    /// Payload, of datagrams too.
    pub payload: Vec<u8>,
    /// Part of the headers that counts.
    pub ttl: u8,
    /// Parts of the headers that do not count: identification, window, time.
    pub noise: u16,
}

impl Message {
    /// The place after everything that it carries, FIN included.
    pub fn end(&self) -> i64 {
        self.at + self.payload.len() as i64 + i64::from(self.is_fin)
    }

    /// Whether it takes room in the stream.
    pub fn takes_space(&self) -> bool {
        self.kind == Kind::Open || self.end() > self.at
    }

    /// The frame.
    pub fn encode(&self, plan: &FlowPlan) -> Vec<u8> {
        let (side, payload) = (plan.side, &self.payload[..]);
        let frame = match plan.carried {
            Carried::Tcp => self.segment(plan),
            Carried::Udp => udp(side, false, plan.guest_port, plan.peer_port, payload),
            Carried::Echo => echo(side, false, plan.peer_port, payload),
            Carried::Gre => ip_frame(side, false, 47, 64, 0, payload),
            Carried::Arp => arp(payload),
            Carried::Lldp => [&PEER_MAC[..], &GUEST_MAC, &[0x88, 0xcc], payload].concat(),
        };
        tagged(self.with_noise(plan, frame), plan.tags)
    }

    fn segment(&self, plan: &FlowPlan) -> Vec<u8> {
        let isn = self.own_isn.unwrap_or(plan.isn(self.connection));
        let place = isn.wrapping_add(1).wrapping_add(self.at as u32);
        let segment = Segment::new(plan.side)
            .ports(plan.guest_port, plan.peer_port)
            .ttl(self.ttl);
        let fin = if self.is_fin { FIN } else { 0 };
        let ecn = if self.options == 2 { ECE } else { 0 };
        let ack = 8 + self.attempt * 1000;
        let segment = match self.kind {
            Kind::Open if plan.twin.is_some() => segment.flags(SYN | ecn).seq(isn),
            Kind::Open => segment.flags(SYN | ecn).seq(isn).ack(ack),
            Kind::Data => segment.flags(fin).seq(place).ack(ack),
            Kind::Reset => segment.flags(RST).seq(place).ack(ack),
        };
        let segment = match self.kind {
            Kind::Open => segment.option(&[2, 4, 5, 180 + (self.options & 1), 1, 3, 3, 7]),
            _ => segment,
        };
        segment
            .timestamps(u32::from(self.noise), 1)
            .payload(&self.payload)
            .bytes()
    }

    /// Changes what may rightly differ.
    fn with_noise(&self, plan: &FlowPlan, mut frame: Vec<u8>) -> Vec<u8> {
        let [high, low] = self.noise.to_be_bytes();
        match (plan.carried, plan.side) {
            (Carried::Arp | Carried::Lldp, _) => {}
            (_, Side::V4) => {
                frame[18..20].copy_from_slice(&[high, low]);
                frame[22] = self.ttl;
                frame[24..26].fill(0);
                let sum = !colo_compare::wire::checksum::ones_sum(&frame[14..34]);
                frame[24..26].copy_from_slice(&sum.to_be_bytes());
            }
            (_, Side::V6) => {
                frame[16..18].copy_from_slice(&[high, low]);
                frame[21] = self.ttl;
            }
        }
        frame
    }
}

fn arp(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&GUEST_MAC);
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0]);
    // Request or answer, then who asks for whom.
    frame.push(1 + payload.first().map_or(0, |byte| byte & 1));
    frame.extend_from_slice(&GUEST_MAC);
    frame.extend_from_slice(&[10, 77, 0, 10, 0, 0, 0, 0, 0, 0, 10, 77, 0, 1]);
    frame
}

/// 802.1Q, and 802.1ad around it.
fn tagged(frame: Vec<u8>, tags: u16) -> Vec<u8> {
    let inner: &[u8] = &[0x81, 0, 0, 5];
    let outer: &[u8] = &[0x88, 0xa8, 0, 9];
    let tags: &[&[u8]] = match tags {
        0 => &[],
        1 => &[inner],
        _ => &[outer, inner],
    };
    [&frame[..12], &tags.concat(), &frame[12..]].concat()
}

/// A frame of the client of a flow: what it acknowledges, in the PVM's stream.
pub fn client_frame(plan: &FlowPlan, connection: u32, ack: Option<i64>) -> Vec<u8> {
    let to_guest = Segment::new(plan.side)
        .to_guest()
        .ports(plan.guest_port, plan.peer_port);
    let frame = match (plan.carried, ack) {
        (Carried::Tcp, Some(ack)) => {
            let place = plan
                .isn(connection)
                .wrapping_add(1)
                .wrapping_add(ack as u32);
            to_guest.seq(8).ack(place).flags(ACK).bytes()
        }
        (Carried::Tcp, None) => to_guest.flags(SYN).seq(7).bytes(),
        (Carried::Udp, _) => udp(plan.side, true, plan.guest_port, plan.peer_port, b"?"),
        (Carried::Echo, _) => echo(plan.side, true, plan.peer_port, b"?"),
        (Carried::Gre, _) => ip_frame(plan.side, true, 47, 64, 0, b"?"),
        (Carried::Arp | Carried::Lldp, _) => [&GUEST_MAC[..], &PEER_MAC, &[0x88, 0xb5, 1]].concat(),
    };
    tagged(frame, plan.tags)
}
