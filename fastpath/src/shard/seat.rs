//! A worker's place among the shards: the rings to and from each of the others.
//!
//! Invariants: each kind of frame has a ring of its own, so that none waits behind one that waits for
//! something else; a confirmation always finds room, because there are never more frames on their
//! way to a guest's queue than one ring holds.
//!
//! Does not touch queues, NICs or slots.

use std::sync::atomic::{Ordering, fence};

use super::{ShardGroup, owner};
use crate::link::DATAGRAM_BYTES_MAX;
use crate::ring::spsc::{Entry, Receiver, Sender, lane};

/// Frames of one kind on their way from one shard to another at most.
pub(crate) const LANE_FRAMES: usize = 128;
/// Datagrams of the link on their way from one shard to another at most.
const LANE_DATAGRAMS: usize = 256;

/// Why a frame crosses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Taken from the NIC by another than its owner.
    Nic,
    /// Taken from the guest by another than its owner; the guest has its buffer again.
    GuestTx,
    /// For the guest, from its owner to the worker that serves the guest's queue.
    Deliver,
    /// A datagram of the link's, received by another than the shard whose channel it belongs to.
    Link,
}

const KINDS: usize = 4;

/// What became of a [`Kind::Deliver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// In the guest's memory.
    Done,
    /// Given back: it was not delivered.
    NoRoom,
    /// The guest's buffer was too small; lost.
    TooSmall,
}

impl Outcome {
    fn word(self) -> u32 {
        self as u32
    }

    fn of_word(word: u32) -> Self {
        match word {
            0 => Self::Done,
            1 => Self::NoRoom,
            _ => Self::TooSmall,
        }
    }
}

/// The rings to one of the others.
#[derive(Debug)]
struct To {
    frames: [Sender; KINDS],
    confirmations: Sender,
}

/// The rings from one of the others.
#[derive(Debug)]
struct From {
    frames: [Receiver; KINDS],
    confirmations: Receiver,
}

/// One worker's ends of all rings.
#[derive(Debug)]
pub(crate) struct Seat {
    group: ShardGroup,
    shard: usize,
    active_pairs: usize,
    /// By shard; `None` at its own place.
    to: Box<[Option<To>]>,
    from: Box<[Option<From>]>,
    /// Shards, by bit, for which there is something new, and from which something was taken.
    filled: u32,
    emptied: u32,
    /// Whose frames are looked at first.
    turn: usize,
}

/// The seats of all workers of a group, for frames of up to `frame_bytes_max`.
pub(crate) fn seats(group: &ShardGroup, frame_bytes_max: usize) -> Vec<Seat> {
    let shards = group.shards();
    let mut seats: Vec<Seat> = (0..shards)
        .map(|shard| Seat {
            group: group.clone(),
            shard,
            active_pairs: group.active_pairs(),
            to: (0..shards).map(|_| None).collect(),
            from: (0..shards).map(|_| None).collect(),
            filled: 0,
            emptied: 0,
            turn: 0,
        })
        .collect();
    for near in 0..shards {
        for far in (0..shards).filter(|&far| far != near) {
            let [a, b, c] = [(); 3].map(|()| lane(LANE_FRAMES as u32, frame_bytes_max));
            let d = lane(LANE_DATAGRAMS as u32, DATAGRAM_BYTES_MAX);
            let (confirmations, confirmed) = lane(LANE_FRAMES as u32, 0);
            seats[near].to[far] = Some(To {
                frames: [a.0, b.0, c.0, d.0],
                confirmations,
            });
            seats[far].from[near] = Some(From {
                frames: [a.1, b.1, c.1, d.1],
                confirmations: confirmed,
            });
        }
    }
    seats
}

impl Seat {
    /// Which shard this is.
    pub(crate) fn shard(&self) -> usize {
        self.shard
    }

    /// The shard that a frame belongs to.
    pub(crate) fn owner(&self, (header, len): (&[u8], usize)) -> usize {
        owner(header, len, self.to.len() as u32) as usize
    }

    /// The worker that serves the guest's queue for this shard's frames.
    pub(crate) fn server(&self) -> usize {
        self.shard % self.active_pairs
    }

    /// Whether the guest uses this worker's pair.
    pub(crate) fn is_active(&self) -> bool {
        self.shard < self.active_pairs
    }

    /// Frames of the guest that may be on their way here.
    pub(crate) fn guest_tx_max(&self) -> usize {
        (self.to.len() - 1) * LANE_FRAMES
    }

    /// Begins a batch: only what the others have put in until now is taken in it. Confirmations are
    /// looked at last: whatever led to a frame that this batch sees has been confirmed in it.
    pub(crate) fn look(&mut self) {
        self.active_pairs = self.group.active_pairs();
        self.turn = (self.turn + 1) % self.to.len();
        for from in self.from.iter_mut().flatten() {
            from.frames.iter_mut().for_each(Receiver::refresh);
        }
        for from in self.from.iter_mut().flatten() {
            from.confirmations.refresh();
        }
    }

    /// Whether every other shard has room for a frame of this kind.
    pub(crate) fn all_have_room(&mut self, kind: Kind) -> bool {
        let mut others = self.to.iter_mut().flatten();
        others.all(|to| to.frames[kind as usize].has_room())
    }

    /// Whether one of the others has.
    pub(crate) fn has_room(&mut self, to: usize, kind: Kind) -> bool {
        self.to[to]
            .as_mut()
            .is_some_and(|to| to.frames[kind as usize].has_room())
    }

    /// Sends a frame to one of the others. `false`: it has no room.
    pub(crate) fn send(&mut self, to: usize, kind: Kind, stamp_ns: u64, frame: &[u8]) -> bool {
        let Some(lanes) = &mut self.to[to] else {
            return false;
        };
        let sent = lanes.frames[kind as usize].push(0, stamp_ns, frame);
        self.filled |= u32::from(sent) << to;
        sent
    }

    /// A frame from one of the others, in turn, and from whom.
    pub(crate) fn first(&self, kind: Kind) -> Option<(usize, Entry<'_>)> {
        let shards = self.from.len();
        (0..shards).find_map(|n| {
            let at = (self.turn + n) % shards;
            let entry = self.from[at].as_ref()?.frames[kind as usize].front()?;
            Some((at, entry))
        })
    }

    /// The next frame from one of the others.
    pub(crate) fn next_from(&self, from: usize, kind: Kind) -> Option<Entry<'_>> {
        self.from[from].as_ref()?.frames[kind as usize].front()
    }

    /// That frame was taken.
    pub(crate) fn took(&mut self, from: usize, kind: Kind) {
        if let Some(lanes) = &mut self.from[from] {
            lanes.frames[kind as usize].pop();
            self.emptied |= 1 << from;
        }
    }

    /// Says what became of the oldest [`Kind::Deliver`] of one of the others, and takes it.
    pub(crate) fn confirm(&mut self, from: usize, outcome: Outcome) {
        if let Some(lanes) = &mut self.to[from] {
            let sent = lanes.confirmations.push(outcome.word(), 0, &[]);
            debug_assert!(sent, "more on their way than a ring holds");
            self.filled |= 1 << from;
        }
        self.took(from, Kind::Deliver);
    }

    /// What became of the oldest frame that `server` was sent, if it has said so.
    pub(crate) fn confirmed(&mut self, server: usize) -> Option<Outcome> {
        let lane = &mut self.from[server].as_mut()?.confirmations;
        let outcome = Outcome::of_word(lane.front()?.word);
        lane.pop();
        Some(outcome)
    }

    /// Number of shards.
    pub(crate) fn shards(&self) -> usize {
        self.to.len()
    }

    /// Ends a batch: wakes those who sleep and have something to do now.
    pub(crate) fn ring(&mut self) {
        if self.filled | self.emptied == 0 {
            return;
        }
        // Pairs with the fence of `Doorbell::lie_down` and, for `take_starved`, that of
        // `Sender::look_for_room`.
        fence(Ordering::SeqCst);
        for (at, from) in self.from.iter().enumerate() {
            let Some(from) = from else { continue };
            let fed = self.emptied & 1 << at != 0
                && from
                    .frames
                    .iter()
                    .fold(false, |any, lane| lane.take_starved() | any);
            if fed || self.filled & 1 << at != 0 {
                self.group.doorbell(at).ring();
            }
        }
        (self.filled, self.emptied) = (0, 0);
    }

    /// This worker is about to sleep: the others ring from now on. What came before is seen by the
    /// look that follows.
    pub(crate) fn lie_down(&mut self) {
        self.group.doorbell(self.shard).lie_down();
        self.look();
    }

    /// It does not sleep, or not any more.
    pub(crate) fn get_up(&self) {
        self.group.doorbell(self.shard).get_up();
    }

    /// Whether there is a frame of this kind, as of the last look.
    pub(crate) fn has(&self, kind: Kind) -> bool {
        let mut lanes = self.from.iter().flatten();
        lanes.any(|from| !from.frames[kind as usize].is_empty())
    }

    /// Whether `server` has said what became of a frame, as of the last look.
    pub(crate) fn has_confirmation(&self, server: usize) -> bool {
        let lanes = self.from[server].as_ref();
        lanes.is_some_and(|from| !from.confirmations.is_empty())
    }

    /// Whether one that had no room has some now.
    pub(crate) fn is_fed(&mut self) -> bool {
        let mut lanes = self.to.iter_mut().flatten();
        lanes.any(|to| to.frames.iter_mut().any(Sender::is_fed))
    }
}
