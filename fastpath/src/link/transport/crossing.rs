//! Datagrams that come to another shard than the one whose channel they belong to.
//!
//! The NIC chooses the queue that a frame of the link's comes by, one for all of them where it sees no more than the
//! EtherType, and each queue is one shard's. Each end chooses the key of what it is sent, so the key says the shard: who
//! receives a datagram hands it on, as a copy, to the shard that has told the peer this key.
//!
//! Invariants: what does not have the key of another shard of this host is judged here, as it is without shards, and the
//! owner judges what was handed to it as if it had received it. Nobody waits for another shard: what finds no room is dropped
//! and counted, and the peer sends it again; so a channel that is not read stops no other.
//!
//! Wakes nobody: the worker does, at the end of its batch.

use std::collections::VecDeque;

use super::{Datagrams, RECEIVE_MAX};
use crate::frame::FramePool;
use crate::link::datagram::Header;
use crate::link::port::Slot;
use crate::shard::{Kind, SHARDS_MAX, Seat};

/// Longest datagram that crosses: no slot or chunk that the kernel receives into is longer.
pub(crate) const DATAGRAM_BYTES_MAX: usize = 4096;

const _: () = assert!(SHARDS_MAX.is_power_of_two());

/// The keys that one host's shards have chosen for a session: each tells its own to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkKeys {
    first: u64,
    shards: usize,
}

impl LinkKeys {
    /// For so many shards, from a random number.
    pub fn new(random: u64, shards: usize) -> Self {
        let first = random & !(SHARDS_MAX as u64 - 1);
        Self { first, shards }
    }

    /// That of a shard.
    pub fn of(&self, shard: usize) -> u64 {
        self.first + shard as u64
    }

    /// Whose key this is.
    fn owner(&self, key: u64) -> Option<usize> {
        let shard = key.wrapping_sub(self.first);
        (shard < self.shards as u64).then_some(shard as usize)
    }
}

/// What a channel that is one of several knows of the others.
#[derive(Debug)]
pub(in crate::link) struct Crossing {
    keys: LinkKeys,
    shard: usize,
    /// Datagrams of this shard, and the transports whose slots they lie in.
    arrived: VecDeque<(usize, Slot)>,
}

impl Crossing {
    pub(in crate::link) fn new(keys: LinkKeys, shard: usize) -> Self {
        Self {
            keys,
            shard,
            arrived: VecDeque::with_capacity(2 * RECEIVE_MAX),
        }
    }

    /// The other shard that a datagram belongs to.
    fn owner_elsewhere(&self, datagram: &[u8]) -> Option<usize> {
        let owner = self.keys.owner(Header::key_of(datagram)?);
        owner.filter(|owner| *owner != self.shard)
    }
}

impl Datagrams {
    /// Sorts what has come by whom it belongs to, and takes what others have received for this shard. Gives whether anything
    /// crossed; `None`: nothing ever does.
    pub(in crate::link) fn cross(
        &mut self,
        seat: &mut Seat,
        frames: &mut FramePool,
    ) -> Option<bool> {
        let before = self.crossings();
        let mut ports = self.ports.iter();
        if !ports.any(|port| port.address().kind().crosses()) {
            return None;
        }
        self.hand_on(seat)?;
        self.take_crossed(seat, frames);
        Some(self.crossings() != before)
    }

    fn crossings(&self) -> u64 {
        self.stats.crossed_out + self.stats.crossed_in + self.stats.crossing_drops
    }

    /// What has come here goes to its owners.
    fn hand_on(&mut self, seat: &mut Seat) -> Option<()> {
        let crossing = self.crossing.as_mut()?;
        for (index, port) in self.ports.iter_mut().enumerate() {
            if !port.address().kind().crosses() {
                continue;
            }
            for _ in crossing.arrived.len()..RECEIVE_MAX {
                let Some(slot) = port.receive() else { break };
                let datagram = port.bytes(&slot);
                let Some(owner) = crossing.owner_elsewhere(datagram) else {
                    crossing.arrived.push_back((index, slot));
                    continue;
                };
                match seat.send(owner, Kind::Link, 0, datagram) {
                    true => self.stats.crossed_out += 1,
                    false => self.stats.crossing_drops += 1,
                }
                port.release(slot);
            }
        }
        Some(())
    }

    /// What others have received for this shard.
    fn take_crossed(&mut self, seat: &mut Seat, frames: &mut FramePool) {
        let Some(crossing) = &mut self.crossing else {
            return;
        };
        let mut ports = self.ports.iter_mut().enumerate();
        let port = ports.find(|(_, port)| port.address().kind().crosses());
        let Some((index, port)) = port else { return };
        while crossing.arrived.len() < 2 * RECEIVE_MAX
            && let Some((from, entry)) = seat.first(Kind::Link)
        {
            match port.copy_in(entry.frame, frames) {
                Some(slot) => {
                    crossing.arrived.push_back((index, slot));
                    self.stats.crossed_in += 1;
                }
                None => self.stats.crossing_drops += 1,
            }
            seat.took(from, Kind::Link);
        }
    }

    /// Whether what comes by a transport is sorted before it is taken.
    pub(super) fn is_sorted(&self, index: usize) -> bool {
        self.crossing.is_some() && self.ports[index].address().kind().crosses()
    }

    /// The next datagram that was sorted.
    pub(super) fn next_arrived(&mut self) -> Option<(usize, Slot)> {
        self.crossing.as_mut()?.arrived.pop_front()
    }

    /// Forgets what was sorted, whose slots are the pool's again.
    pub(super) fn forget_arrived(&mut self) {
        if let Some(crossing) = &mut self.crossing {
            crossing.arrived.clear();
        }
    }
}
