//! The part of an edge that exchanges frames with other shards.
//!
//! Invariants: a role sees only frames of its own shard; a frame of another's is read only when its
//! owner has room for it, whoever that is; frames for the guest are delivered in the order in which
//! they were handed over, and one that another worker delivers counts as delivered when that has said
//! so (rule 4). What led to a frame of the guest's has been confirmed before the role gets the frame.
//!
//! Does not decide who owns what ([`crate::shard::owner`]).

use std::collections::VecDeque;

use colo_compare::{Frames, HEADER_MAX, Token};

use super::super::role::BATCH;
use super::{Delivery, Edge, Handed, Stays};
use crate::frame::CopyCause;
use crate::link::PacketLink;
use crate::shard::{Kind, LANE_FRAMES, Outcome, Seat};
use crate::stages::Stage;

/// What a worker that is one of several keeps for it.
#[derive(Debug)]
pub(super) struct Crossing {
    seat: Seat,
    /// Frames that another worker is delivering, oldest first, and which worker that is.
    awaiting: VecDeque<Token>,
    awaiting_from: usize,
    /// Frames that it gave back; they go before all others.
    again: VecDeque<Token>,
    /// It has begun to give back: the rest follows.
    is_returning: bool,
    /// Frames of these that were delivered here.
    done: VecDeque<(Delivery, Token)>,
    /// Slots for what is on its way from the guest when the epoch ends.
    reserve: Vec<u32>,
    own_first: bool,
    has_worked: bool,
    /// The role has a channel that datagrams cross to; found out again before each sleep.
    reads_link: bool,
}

impl Crossing {
    pub(super) fn new(seat: Seat) -> Self {
        Self {
            awaiting: VecDeque::with_capacity(LANE_FRAMES),
            awaiting_from: seat.server(),
            again: VecDeque::with_capacity(LANE_FRAMES),
            is_returning: false,
            done: VecDeque::with_capacity(LANE_FRAMES),
            reserve: Vec::with_capacity(seat.guest_tx_max()),
            own_first: false,
            has_worked: false,
            reads_link: false,
            seat,
        }
    }

    /// Whether a frame handed over now can only come behind those that were before.
    fn keeps_order(&self, server: usize) -> bool {
        self.awaiting.is_empty()
            || (self.awaiting_from == server && self.awaiting.len() < LANE_FRAMES)
    }

    /// Hands a frame to the worker that delivers it. `false`: it has no room.
    fn hand_over(&mut self, server: usize, stamp_ns: u64, frame: &[u8]) -> bool {
        let sent =
            self.keeps_order(server) && self.seat.send(server, Kind::Deliver, stamp_ns, frame);
        if sent {
            self.awaiting_from = server;
        }
        sent
    }
}

impl Edge {
    /// Whether this is one of several shards.
    pub(in crate::worker) fn is_sharded(&self) -> bool {
        self.crossing.is_some()
    }

    /// Which shard this is: 0 when there is only one.
    pub fn shard(&self) -> usize {
        self.crossing.as_ref().map_or(0, |c| c.seat.shard())
    }

    /// How many shards there are.
    pub fn shards(&self) -> usize {
        self.crossing.as_ref().map_or(1, |c| c.seat.shards())
    }

    /// Begins a batch: looks what came from the others, delivers for them, and hands over again what
    /// they gave back. `serves`: the guest's queues may be touched.
    pub(in crate::worker) fn begin_batch(&mut self, serves: bool) {
        self.look();
        if serves {
            self.deliver_for_others(false);
            self.hand_over_again();
        }
        self.fill_reserve();
    }

    /// Looks what came from the others; done before each batch.
    pub(crate) fn look(&mut self) {
        if let Some(crossing) = &mut self.crossing {
            crossing.seat.look();
            crossing.own_first = !crossing.own_first;
        }
    }

    /// Whether anything crossed since the last call.
    pub(in crate::worker) fn has_crossed(&mut self) -> bool {
        let crossing = self.crossing.as_mut();
        crossing.is_some_and(|crossing| std::mem::take(&mut crossing.has_worked))
    }

    pub(super) fn receive_of_shard(&mut self) -> Option<Token> {
        match self.own_first() {
            true => self.receive_own().or_else(|| self.crossed(Kind::Nic)),
            false => self.crossed(Kind::Nic).or_else(|| self.receive_own()),
        }
    }

    pub(super) fn take_of_shard(&mut self, stays: Stays) -> Option<Token> {
        match self.own_first() {
            true => self.take_own(stays).or_else(|| self.crossed(Kind::GuestTx)),
            false => self.crossed(Kind::GuestTx).or_else(|| self.take_own(stays)),
        }
    }

    /// A frame of the guest that another worker has taken for this shard. It was taken in the epoch
    /// that ends, so it finds a slot also when no other frame does.
    pub fn guest_take_crossed(&mut self) -> Option<Token> {
        if self.frames.free_slots() == 0
            && let Some(crossing) = &mut self.crossing
            && crossing.seat.has(Kind::GuestTx)
            && let Some(slot) = crossing.reserve.pop()
        {
            self.frames.give_back(slot);
        }
        self.crossed(Kind::GuestTx)
    }

    fn own_first(&self) -> bool {
        self.crossing.as_ref().is_some_and(|c| c.own_first)
    }

    /// The next frame of this shard from its own NIC.
    fn receive_own(&mut self) -> Option<Token> {
        for _ in 0..BATCH {
            if !self.may_read(Kind::Nic) {
                return None;
            }
            let token = self.receive_any()?;
            match self.owner_of(&token) {
                None => return Some(token),
                Some(owner) => self.cross(owner, Kind::Nic, token),
            }
        }
        None
    }

    /// The next frame of this shard from its own queue of the guest.
    fn take_own(&mut self, stays: Stays) -> Option<Token> {
        for _ in 0..BATCH {
            if !self.reads_guest() {
                return None;
            }
            let token = self.take_any(stays)?;
            if self.owner_of(&token).is_none() {
                return Some(token);
            }
            // A guest may have written its header since; the copy decides.
            self.frames.settle_frame(&token, CopyCause::Crossing);
            match self.owner_of(&token) {
                None => return Some(token),
                Some(owner) => self.cross(owner, Kind::GuestTx, token),
            }
        }
        None
    }

    /// Whether a frame can be read whoever owns it.
    fn may_read(&mut self, kind: Kind) -> bool {
        let Some(crossing) = &mut self.crossing else {
            return true;
        };
        let may = crossing.seat.all_have_room(kind);
        if !may {
            self.stats.crossing_waits.add(1);
        }
        may
    }

    /// Whether frames from the NIC can be read at present.
    pub(in crate::worker) fn reads_nic(&mut self) -> bool {
        self.may_read(Kind::Nic)
    }

    /// Whether this worker's queue of the guest is read at present. It is not while others deliver for
    /// this shard, so that nothing overtakes their confirmation; the guest does not use it then.
    pub(in crate::worker) fn reads_guest(&mut self) -> bool {
        let awaits = self
            .crossing
            .as_ref()
            .is_some_and(|c| !c.awaiting.is_empty());
        !awaits && self.may_read(Kind::GuestTx)
    }

    /// Who owns a frame, if it is another shard.
    fn owner_of(&self, token: &Token) -> Option<usize> {
        let seat = &self.crossing.as_ref()?.seat;
        let owner = seat.owner(self.frames.glance(token, &mut [0; HEADER_MAX]));
        (owner != seat.shard()).then_some(owner)
    }

    /// Copies a frame to its owner, who has room.
    fn cross(&mut self, owner: usize, kind: Kind, token: Token) {
        if let Some(crossing) = &mut self.crossing {
            let stamp_ns = self.frames.stamped_ns(&token);
            let sent = crossing
                .seat
                .send(owner, kind, stamp_ns, self.frames.bytes(&token));
            debug_assert!(sent, "read without room at its owner");
            crossing.has_worked = true;
            self.stats.crossed_out_frames.add(1);
        }
        self.frames.release(token);
    }

    /// A frame of this shard that another worker has read.
    fn crossed(&mut self, kind: Kind) -> Option<Token> {
        let crossing = self.crossing.as_mut()?;
        let (from, entry) = crossing.seat.first(kind)?;
        let Some(token) = self.frames.from_bytes(entry.frame) else {
            self.stats.frames_exhausted.add(1);
            return None;
        };
        self.frames.stamp(&token, entry.stamp_ns);
        crossing.seat.took(from, kind);
        self.stats.crossed_in_frames.add(1);
        Some(token)
    }

    /// Whether the guest has room for a frame of this shard.
    pub(super) fn guest_has_room_for_shard(&mut self) -> bool {
        match &mut self.crossing {
            None => self.port.has_room(),
            Some(crossing) if !crossing.again.is_empty() => false,
            Some(_) => self.server_has_room(),
        }
    }

    fn server_has_room(&mut self) -> bool {
        let Some(crossing) = &mut self.crossing else {
            return false;
        };
        let server = crossing.seat.server();
        if !crossing.keeps_order(server) {
            return false;
        }
        match server == crossing.seat.shard() {
            true => self.port.has_room(),
            false => crossing.seat.has_room(server, Kind::Deliver),
        }
    }

    pub(super) fn deliver_for_shard(&mut self, token: Token) -> Handed {
        let Some(crossing) = &mut self.crossing else {
            return self.deliver_here(token);
        };
        if !crossing.again.is_empty() {
            return Handed::Now(Delivery::NoRoom, token);
        }
        self.deliver_or_hand_over(token)
    }

    fn deliver_or_hand_over(&mut self, token: Token) -> Handed {
        let Some(crossing) = &mut self.crossing else {
            return self.deliver_here(token);
        };
        let server = crossing.seat.server();
        if server == crossing.seat.shard() {
            return match crossing.awaiting.is_empty() {
                true => self.deliver_here(token),
                false => Handed::Now(Delivery::NoRoom, token),
            };
        }
        let stamp_ns = self.frames.stamped_ns(&token);
        if !crossing.hand_over(server, stamp_ns, self.frames.bytes(&token)) {
            return Handed::Now(Delivery::NoRoom, token);
        }
        crossing.awaiting.push_back(token);
        crossing.has_worked = true;
        self.stats.crossed_out_frames.add(1);
        Handed::Later
    }

    /// Delivers what others hand over for the guest's queue of this worker, as long as there is room;
    /// if the guest does not use the queue, it goes back.
    fn deliver_for_others(&mut self, finally: bool) {
        let is_active = self.crossing.as_ref().is_some_and(|c| c.seat.is_active());
        for from in 0..self.shards() {
            self.deliver_for(from, !is_active, finally);
        }
    }

    /// The same when an epoch ends: what finds no room goes back to its owner, and all of it does when
    /// the guest's queues may not be touched.
    pub(in crate::worker) fn deliver_last(&mut self, serves: bool) {
        match serves {
            true => self.deliver_for_others(true),
            false => (0..self.shards()).for_each(|from| self.deliver_for(from, true, true)),
        }
    }

    fn deliver_for(&mut self, from: usize, mut gives_back: bool, finally: bool) {
        let Some(crossing) = &mut self.crossing else {
            return;
        };
        for _ in 0..LANE_FRAMES {
            let Some(entry) = crossing.seat.next_from(from, Kind::Deliver) else {
                return;
            };
            let delivery = match gives_back || !self.port.has_room() {
                true => Delivery::NoRoom,
                false => self.port.deliver(entry.frame),
            };
            let outcome = match delivery {
                Delivery::Done => Outcome::Done,
                Delivery::TooSmall => Outcome::TooSmall,
                Delivery::NoRoom if gives_back || finally => {
                    // Nothing overtakes it.
                    gives_back = true;
                    Outcome::NoRoom
                }
                Delivery::NoRoom => return,
            };
            // Before the guest is shown the frame and can answer it.
            crossing.seat.confirm(from, outcome);
            crossing.has_worked = true;
            self.stats.crossed_in_frames.add(1);
        }
    }

    /// The next frame that was handed over ([`Handed::Later`]) and of which it is known now what
    /// became of it: [`Delivery::Done`] or [`Delivery::TooSmall`].
    pub fn poll_delivered(&mut self) -> Option<(Delivery, Token)> {
        loop {
            let crossing = self.crossing.as_mut()?;
            if let Some(done) = crossing.done.pop_front() {
                return Some(done);
            }
            if crossing.awaiting.is_empty() {
                return None;
            }
            let outcome = crossing.seat.confirmed(crossing.awaiting_from)?;
            let token = crossing.awaiting.pop_front()?;
            crossing.is_returning |= outcome == Outcome::NoRoom;
            crossing.is_returning &= !crossing.awaiting.is_empty();
            let delivery = match outcome {
                Outcome::Done => Delivery::Done,
                Outcome::TooSmall => Delivery::TooSmall,
                Outcome::NoRoom => {
                    self.stats.crossing_returns.add(1);
                    crossing.again.push_back(token);
                    continue;
                }
            };
            if delivery == Delivery::Done {
                self.record(Stage::NicToGuest, self.frames.stamped_ns(&token));
            }
            return Some((delivery, token));
        }
    }

    /// Tries once more what was given back, in order.
    fn hand_over_again(&mut self) {
        loop {
            let Some(crossing) = &mut self.crossing else {
                return;
            };
            if crossing.is_returning {
                return;
            }
            let Some(token) = crossing.again.pop_front() else {
                return;
            };
            let handed = match self.server_has_room() {
                true => self.deliver_or_hand_over(token),
                false => Handed::Now(Delivery::NoRoom, token),
            };
            let Some(crossing) = &mut self.crossing else {
                return;
            };
            match handed {
                Handed::Later => {}
                Handed::Now(Delivery::NoRoom, token) => {
                    crossing.again.push_front(token);
                    return;
                }
                Handed::Now(delivery, token) => crossing.done.push_back((delivery, token)),
            }
        }
    }

    /// Forgets frames for the guest that were given back, and what others took from it for this shard:
    /// a checkpoint has put another guest in its place.
    pub fn forget_crossed(&mut self) {
        self.look();
        if let Some(crossing) = &mut self.crossing {
            while let Some((from, _)) = crossing.seat.first(Kind::GuestTx) {
                crossing.seat.took(from, Kind::GuestTx);
            }
            for token in crossing.again.drain(..) {
                self.frames.release(token);
            }
        }
    }

    /// What the link's sockets have received goes to the shards that it belongs to.
    pub(super) fn cross_link(&mut self, link: &mut PacketLink) {
        let Some(crossing) = &mut self.crossing else {
            return;
        };
        let crossed = link.cross(&mut crossing.seat, &mut self.frames);
        crossing.reads_link = crossed.is_some();
        crossing.has_worked |= crossed.unwrap_or(false);
    }

    /// Whether frames were handed over of which nothing is known yet, or that came back.
    pub fn has_undelivered(&self) -> bool {
        let crossing = self.crossing.as_ref();
        crossing.is_some_and(|c| !c.awaiting.is_empty() || !c.again.is_empty())
    }

    /// Keeps slots back for what may be on its way here when the epoch ends.
    fn fill_reserve(&mut self) {
        let Some(crossing) = &mut self.crossing else {
            return;
        };
        while crossing.reserve.len() < crossing.seat.guest_tx_max()
            && let Some((slot, _)) = self.frames.lend()
        {
            crossing.reserve.push(slot);
        }
    }

    /// Wakes other shards that have something to do now.
    pub(super) fn ring_others(&mut self) {
        if let Some(crossing) = &mut self.crossing {
            crossing.seat.ring();
        }
    }

    /// About to sleep: the others ring from now on. `false`: there is work, and they do not.
    pub(in crate::worker) fn may_sleep(
        &mut self,
        wants_nic: bool,
        wants_guest: bool,
        serves: bool,
    ) -> bool {
        let Some(crossing) = &mut self.crossing else {
            return true;
        };
        let reads_link = std::mem::take(&mut crossing.reads_link);
        let seat = &mut crossing.seat;
        seat.lie_down();
        let has_work = reads_link && seat.has(Kind::Link)
            || wants_nic && seat.has(Kind::Nic)
            || wants_guest && seat.has(Kind::GuestTx)
            || seat.is_fed()
            || !crossing.awaiting.is_empty() && seat.has_confirmation(crossing.awaiting_from)
            || !crossing.done.is_empty()
            || serves && seat.has(Kind::Deliver) && (!seat.is_active() || self.port.has_room());
        let has_again = serves && !crossing.again.is_empty() && !crossing.is_returning;
        if has_work || has_again && self.server_has_room() {
            self.get_up();
            return false;
        }
        true
    }

    /// Awake again.
    pub(in crate::worker) fn get_up(&mut self) {
        if let Some(crossing) = &self.crossing {
            crossing.seat.get_up();
        }
    }
}

#[cfg(test)]
#[path = "crossing_tests.rs"]
mod tests;
