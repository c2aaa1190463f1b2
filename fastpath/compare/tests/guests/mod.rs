//! Two guests that open connections, send the same or each for itself, and what a divergence of theirs is.
#![allow(dead_code)] // Each test binary uses a part.

use colo_compare::testing::{Segment, Side, echo, udp};
use colo_compare::wire::tcp::{ACK, RST, SYN};
use colo_compare::{Cause, Right};

use super::pair::{Pair, data};

/// One of the two guests.
#[derive(Clone, Copy, PartialEq)]
pub enum Vm {
    Pvm,
    Svm,
}

pub const VMS: [Vm; 2] = [Vm::Pvm, Vm::Svm];

impl Vm {
    pub fn other(self) -> Self {
        match self {
            Self::Pvm => Self::Svm,
            Self::Svm => Self::Pvm,
        }
    }

    pub fn sends(self, pair: &mut Pair, bytes: &[u8]) {
        match self {
            Self::Pvm => pair.pvm(bytes),
            Self::Svm => pair.svm(bytes),
        }
    }
}

pub fn syn(side: Side, seq: u32) -> Vec<u8> {
    let segment = Segment::new(side).to_guest();
    segment.flags(SYN).seq(seq).bytes()
}

pub fn syn_ack(side: Side, seq: u32, ack: u32) -> Vec<u8> {
    let segment = Segment::new(side).flags(SYN | ACK);
    segment.seq(seq).ack(ack).bytes()
}

pub fn reset(side: Side, seq: u32, ack: u32) -> Vec<u8> {
    let segment = Segment::new(side).flags(RST | ACK);
    segment.seq(seq).ack(ack).bytes()
}

pub fn both_send(pair: &mut Pair, bytes: &[u8]) {
    VMS.iter().for_each(|vm| vm.sends(pair, bytes));
}

/// A pair that has a connection whose first data byte is at `isn + 1`.
pub fn connect(pair: &mut Pair, side: Side, isn: u32) {
    pair.input(&syn(side, 7));
    both_send(pair, &syn_ack(side, isn, 8));
    assert_eq!(pair.rights(), [Right::Match]);
}

/// Everything that may be asserted of a divergence: nothing left, it was found now, a commit lets
/// what is held leave.
pub fn assert_diverged(mut pair: Pair, cause: Cause, held: usize) {
    assert_eq!(pair.rights(), []);
    assert_eq!(pair.causes, [cause]);
    assert_eq!(pair.path.held_frames(), held);
    let epoch = pair.cut();
    pair.commit(epoch);
    assert_eq!(pair.rights(), vec![Right::Checkpoint; held]);
    pair.close();
}

/// A frame of each kind, all of flows from guest port 80 or without ports.
pub fn one_of_each(side: Side) -> [Vec<u8>; 3] {
    [
        data(side, 10, b"stream"),
        udp(side, false, 80, 9000, b"datagram"),
        echo(side, false, 1, b"echo"),
    ]
}
