//! The link between two processes: three ordered channels with delays of their own, that can stall and end, and whose page
//! streams can be opened anew.
//!
//! Invariants: a channel delivers in order and nothing twice; what stalls is delivered after healing, unless the
//! receiver has closed by then; of page streams that were torn nothing more arrives.

use std::rc::Rc;

use crate::guest::{MachineState, PageSet};
use crate::host::AheadChunk;
use crate::prng::Prng;

/// Which of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    Control,
    Packets,
    Pages,
    /// The handshake of page streams that are opened anew, on connections of its own.
    Dial,
}

/// A captured machine.
#[derive(Debug, Clone)]
pub struct Image {
    /// For the secondary behind this one.
    pub link: usize,
    pub epoch: u64,
    /// The union of both dirty sets, as the PVM has it, without what went ahead.
    pub pages: PageSet,
    pub state: MachineState,
    /// The union's other pages, which went ahead.
    pub names: Vec<u8>,
    /// Of the whole machine.
    pub digest: u64,
    pub pending: Vec<Vec<u8>>,
    pub record: Vec<u8>,
}

impl Image {
    /// The numbers of its pages, a bit each.
    pub fn page_set(&self) -> u64 {
        self.pages.iter().fold(0, |set, (n, _)| set | 1 << n)
    }
}

/// What travels.
#[derive(Debug, Clone)]
pub enum LinkMsg {
    /// Connected.
    Up,
    /// Closed or reset.
    Down,
    /// An encoded control message.
    Control(Vec<u8>),
    Input {
        epoch: u64,
        seq: u64,
        frame: Vec<u8>,
    },
    InputAck {
        up_to: u64,
    },
    Output {
        epoch: u64,
        seq: u64,
        frame: Vec<u8>,
    },
    /// The headers of an output, and the digest of the rest.
    Digest {
        epoch: u64,
        seq: u64,
        headers: Vec<u8>,
        payload_len: u16,
        digest: u128,
    },
    /// The bytes of a digest are needed.
    Fetch {
        seq: u64,
    },
    Released {
        seq: u64,
    },
    PendingReleased {
        epoch: u64,
    },
    CaughtUp {
        epoch: u64,
    },
    CheckpointWanted,
    /// On the page streams with this number; those that the link began with are 0.
    Pages {
        opened: u64,
        msg: PageMsg,
    },
    /// The secondary opens page streams anew, with this number.
    Dial {
        opened: u64,
    },
    /// The primary has taken them.
    Dialled {
        opened: u64,
    },
    /// The page channel stood still for too long.
    PagesStalled,
}

/// What travels over page streams.
#[derive(Debug, Clone)]
pub enum PageMsg {
    /// A round of a synchronisation.
    Live(Rc<PageSet>),
    /// Pages that a later checkpoint may name.
    Ahead(AheadChunk),
    /// A part of a checkpoint; the last one makes it whole.
    Chunk {
        index: u64,
        of: u64,
        image: Rc<Image>,
    },
    /// Something without a head that makes sense.
    Damaged,
    /// They have ended.
    End,
}

/// How it behaves.
#[derive(Debug, Clone)]
pub struct LinkPlan {
    pub delay_us: [u64; 4],
    pub jitter_us: [u64; 4],
}

/// One connection of all channels between two processes.
#[derive(Debug)]
pub struct Link {
    /// Incarnations of the processes, by host.
    pub ends: [u64; 2],
    /// Whether this end still listens: control and pages; packets.
    pub open: [(bool, bool); 2],
    /// Nothing arrives at this host for now.
    pub cut: [bool; 2],
    /// For this host, in order of sending.
    pub stalled: [Vec<(Channel, LinkMsg)>; 2],
    /// Page streams that were torn: all below this number.
    pub torn: u64,
    /// The next thing that reaches this host over page streams is damaged.
    pub damages: [bool; 2],
    /// Until when nothing reaches this host over page streams, and what should have.
    pub pages_stall_us: [u64; 2],
    pub pages_stalled: [Vec<LinkMsg>; 2],
    last_us: [[u64; 4]; 2],
    plan: LinkPlan,
}

impl Link {
    pub fn new(ends: [u64; 2], plan: LinkPlan) -> Self {
        Self {
            ends,
            open: [(true, true); 2],
            cut: [false; 2],
            stalled: [Vec::new(), Vec::new()],
            torn: 0,
            damages: [false; 2],
            pages_stall_us: [0; 2],
            pages_stalled: [Vec::new(), Vec::new()],
            last_us: [[0; 4]; 2],
            plan,
        }
    }

    /// When a message that is sent now arrives at host `to`.
    pub fn arrival(&mut self, now: u64, to: usize, channel: Channel, chance: &mut Prng) -> u64 {
        let n = channel as usize;
        let at = now + self.plan.delay_us[n] + chance.below(self.plan.jitter_us[n] + 1);
        let at = at.max(self.last_us[to][n]);
        self.last_us[to][n] = at;
        at
    }
}
