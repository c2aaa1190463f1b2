//! The connections of the guest, those that a host has taken over with, and the rules for some of them.

use colo_compare::testing::{Segment, Side};
use colo_compare::wire::tcp::{ACK, SYN};
use colo_compare::{Frames, Policy, PolicyAction, PrimaryPath, Rule, SecondaryPath};

use super::{SLOTS, limits};
use crate::fixed::Pool;

/// Connections; more than there are places for flows.
pub const CONNECTIONS: u64 = 24;

/// Those that the path has inherited.
pub const INHERITED: u64 = 4;

/// One connection's numbers, as the guest counts.
#[derive(Clone, Copy, Default)]
pub struct Connection {
    pub isn: u32,
    pub sent: u32,
    /// What the client's numbers are ahead.
    pub offset: u32,
}

pub fn first_isn(c: u64) -> u32 {
    u32::MAX - 30 + c as u32
}

/// A translation of the first connections: half of them known, half still to be learnt.
pub const OFFSET: u32 = 5000;

pub fn side(c: u64) -> Side {
    [Side::V4, Side::V6][(c % 2) as usize]
}

pub fn guest_port(c: u64) -> u16 {
    match c {
        9 | 10 => HELD_PORT,
        11 | 12 => RELEASED_PORT,
        13..=16 => IGNORED_PORT,
        _ => 80,
    }
}

pub fn segment(c: u64) -> Segment {
    let segment = Segment::new(side(c)).ports(guest_port(c), 40_000 + c as u16);
    segment.ack(c as u32 + 1)
}

/// Guest ports of flows with a rule.
pub const HELD_PORT: u16 = 81;

pub const RELEASED_PORT: u16 = 82;

pub const IGNORED_PORT: u16 = 83;

pub fn policy() -> Policy {
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

/// The record of a host that took over with open connections.
pub fn inherited_record() -> Vec<u8> {
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
