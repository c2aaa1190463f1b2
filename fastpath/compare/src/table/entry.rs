//! One flow: what the PVM holds in it, what the SVM has sent, and what its next frame waits for.
//!
//! Invariant: a flow of an earlier generation holds nothing once it was brought up to date.
//!
//! Does not compare, and does not find other flows.

use crate::flow::Protocol;
use crate::list::{Ends, NIL};
use crate::stream::Stream;
use crate::wheel::Timer;

/// What the next frame of a flow waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Wait {
    /// Equal output of the SVM.
    #[default]
    Peer,
    /// The secondary's acknowledgement of input (rule 6).
    InputAck,
    /// A fresh heartbeat (rule 18).
    Lease,
    /// A checkpoint, because a policy says so.
    Policy,
    /// The next commit: the flow has diverged.
    Commit,
}

/// What happened in a flow, as bits.
pub(crate) mod seen {
    /// The PVM has sent something in this epoch.
    pub(crate) const PVM: u8 = 1;
    /// The SVM has sent something in this epoch.
    pub(crate) const SVM: u8 = 2;
    /// It was used since eviction last looked at it.
    pub(crate) const USE: u8 = 4;
    /// TCP: the guest has closed its side; TCP: the peer has.
    pub(crate) const GUEST_CLOSED: u8 = 8;
    pub(crate) const PEER_CLOSED: u8 = 16;
    /// It is a TCP flow.
    pub(crate) const TCP: u8 = 32;
    /// It is in the list of those that wait for the secondary's word.
    pub(crate) const WAITING: u8 = 64;
    /// Frames of both guests left by twos, and nothing else has looked at the flow since: it is at rest, and no
    /// output of the SVM is unmatched. TCP: all its numbers have come to the same place.
    pub(crate) const STEADY: u8 = 128;
}

/// Neighbours in the list of flows that wait for the secondary's word.
#[derive(Debug, Clone, Copy)]
pub(super) struct Links {
    pub(super) prev: u32,
    pub(super) next: u32,
}

pub(super) const UNLINKED: Links = Links {
    prev: NIL,
    next: NIL,
};

#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) last_input_seq: u64,
    pub(super) generation: u32,
    /// What the PVM has produced and has not left, in that order.
    pub(crate) held: Ends,
    /// What the SVM has sent; for TCP sorted by place, history included.
    pub(crate) svm: Ends,
    /// TCP: SYNs and resets of the SVM that have not been matched.
    pub(crate) control: Ends,
    /// TCP: the first of `svm` that is not reported. Otherwise: the one that equals the next frame.
    pub(crate) mark: u32,
    pub(crate) stream: Stream,
    pub(crate) used_s: u32,
    pub(super) timer: Timer,
    pub(super) waiting: Links,
    pub(crate) wait: Wait,
    pub(crate) seen: u8,
    pub(crate) policy: u16,
}

impl Flow {
    pub(super) fn new(generation: u32, protocol: Protocol, policy: u16) -> Self {
        let tcp = if protocol == Protocol::Tcp {
            seen::TCP
        } else {
            0
        };
        Self {
            last_input_seq: 0,
            generation,
            held: Ends::EMPTY,
            svm: Ends::EMPTY,
            control: Ends::EMPTY,
            mark: NIL,
            stream: Stream::default(),
            used_s: 0,
            timer: Timer::OFF,
            waiting: UNLINKED,
            wait: Wait::Peer,
            seen: seen::USE | tcp,
            policy,
        }
    }

    /// A frame has come; `what` says of whom.
    #[inline]
    pub(crate) fn use_now(&mut self, now_us: u64, what: u8) {
        self.seen |= seen::USE | what;
        self.used_s = (now_us / 1_000_000) as u32;
    }

    /// Both sides have sent another frame, by twos.
    #[inline(always)]
    pub(crate) fn use_again(&mut self, used_s: u32) {
        self.seen |= seen::USE;
        self.used_s = used_s;
    }

    pub(crate) fn has_seen(&self, what: u8) -> bool {
        self.seen & what == what
    }

    /// Whether exactly one side has sent something in this epoch.
    pub(crate) fn is_one_sided(&self) -> bool {
        self.has_seen(seen::PVM) != self.has_seen(seen::SVM)
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.has_seen(seen::TCP)
    }

    /// It is in the list of those that wait for the secondary's word.
    pub(crate) fn is_waiting(&self) -> bool {
        self.has_seen(seen::WAITING)
    }

    /// Both sides have sent something in this epoch, so neither has opened a connection of its own,
    /// and nothing of the PVM's is held.
    #[inline(always)]
    pub(crate) fn is_at_rest(&self) -> bool {
        let both = seen::PVM | seen::SVM;
        self.seen & (both | seen::WAITING) == both
            && self.held.is_empty()
            && self.wait == Wait::Peer
    }

    /// Whether time can bring something about.
    pub(crate) fn has_deadlines(&self) -> bool {
        let has_surplus = if self.is_tcp() {
            !self.control.is_empty()
        } else {
            !self.svm.is_empty()
        };
        !self.held.is_empty() || has_surplus
    }

    /// SVM output that has had no PVM counterpart.
    pub(crate) fn has_unmatched_svm(&self) -> bool {
        if self.is_tcp() {
            self.mark != NIL || !self.control.is_empty()
        } else {
            !self.svm.is_empty()
        }
    }

    /// A new epoch is compared: output of the old one is forgotten, a commit covers it (rule 8).
    pub(super) fn renew(&mut self, generation: u32) {
        self.generation = generation;
        (self.held, self.svm, self.control) = (Ends::EMPTY, Ends::EMPTY, Ends::EMPTY);
        self.mark = NIL;
        self.timer = Timer::OFF;
        self.waiting = UNLINKED;
        self.wait = Wait::Peer;
        self.seen &= !(seen::PVM | seen::SVM | seen::WAITING | seen::STEADY);
        self.stream.rebase();
    }
}
