//! What the reference comparator says, and which of its rules can be bent.

use std::collections::BTreeSet;

use colo_compare::Right;

use crate::message::Message;

/// A rule that is left out or bent, to see that the comparison of the comparators finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// The fast comparator says "equal" always.
    AlwaysEqual,
    /// Nothing waits for the secondary's acknowledgement of input.
    NoAckRule,
    /// What needs no counterpart needs no heartbeat either.
    NoLease,
    /// The end of a stream is not compared.
    NoFin,
    /// Header fields are not compared.
    NoHeaders,
    /// Options of a SYN are not compared.
    NoSynOptions,
    /// A reset needs no counterpart.
    NoReset,
    /// What the SVM said before a commit counts after it.
    EpochsMixed,
    /// Retransmissions leave without being compared.
    FreeRetransmissions,
    /// What the client has acknowledged is compared all the same.
    NoUna,
    /// What a commit covers is compared all the same.
    NoBase,
    /// The SVM's newest datagram is taken first.
    LastInFirstOut,
    /// The SVM's datagrams must come in the PVM's order.
    NoReorder,
    /// Comparison deadlines run from the commit on, not from the end of the backlog.
    DeadlineFromCommit,
    /// An abort lets comparison go on.
    AbortIgnored,
    /// Reports precede what they report by a byte.
    EarlyReport,
    /// Numbers that wrap are taken for small ones.
    WrapUnsafe,
    /// Identification and flow label count.
    NoiseCounts,
    /// Policies are not read.
    NoPolicy,
}

/// Groups of causes that the rules tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Payload, length or header.
    Contents,
    Flags,
    SynOptions,
    Deadline,
    AckDeadline,
    Lag,
    Extra,
    OutboundTuple,
    HoldFull,
    Aborted,
    Policy,
}

/// What the next frame of a flow may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The SVM has said the same.
    Matched,
    /// It needs no counterpart.
    Free,
    /// The SVM has not said enough yet.
    Wait,
    Differs(Class),
}

/// A frame of the SVM.
#[derive(Debug, Clone)]
pub struct Said {
    pub svm_seq: u64,
    pub message: Message,
    pub at_us: u64,
}

/// What was decided about the contents of a flow.
#[derive(Debug, Default)]
pub struct Notes {
    /// Numbers of SVM frames all of which has left.
    pub reports: Vec<u64>,
    /// Numbers about which the rules do not say whether they are reported.
    pub open_reports: BTreeSet<u64>,
}

/// What an event brought about.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Number of the frame and the right by which it leaves, in order.
    pub released: Vec<(u64, Right)>,
    pub notes: Notes,
    pub pending_released: Option<u64>,
    /// Any one of these is the reason of a checkpoint request; none: no request.
    pub requests: Vec<Class>,
    pub divergences: Vec<(usize, Class)>,
}
