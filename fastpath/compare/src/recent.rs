//! The flows that went by last, by what names them on the wire: one look here, and no key has to be put together.
//!
//! Invariants: an entry names the flow in the table that has its name; a flow that leaves the table leaves here first.
//! The memory is taken at the start.
//!
//! Does not know all flows: two whose names fall together take turns, so a look that finds nothing says nothing.

use alloc::vec;
use alloc::vec::Vec;

use crate::flow::{FlowKey, Protocol};
use crate::list::NIL;
use crate::table::FlowId;
use crate::wire::{TCP_PROTOCOL, UDP_PROTOCOL};

const INDEX_BITS: u32 = 11;
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
/// Protocol and source address, in the word that holds them.
const NAME_MASK: u64 = 0xffff_ffff_0000_ff00;

/// Protocol and ends of an untagged IPv4 packet with ports, which its sender is the guest of, in the words of its
/// header: protocol and source address; destination address and ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WireName([u64; 2]);

impl WireName {
    const NONE: Self = Self([0; 2]);

    /// By the words, in the order of memory, that begin with the time to live and with the destination address.
    #[inline(always)]
    pub(crate) fn new(from_ttl: u64, from_destination: u64) -> Self {
        Self([from_ttl & NAME_MASK, from_destination])
    }

    /// `None` for a flow whose packets have no such name.
    fn of(key: &FlowKey) -> Option<Self> {
        let protocol = match key.protocol() {
            Protocol::Tcp => TCP_PROTOCOL,
            Protocol::Udp => UDP_PROTOCOL,
            _ => return None,
        };
        let (guest, peer) = key.ipv4_ends()?;
        let (guest, peer) = (guest.to_be_bytes(), peer.to_be_bytes());
        let (port, peer_port) = (
            key.guest_port().to_be_bytes(),
            key.peer_port().to_be_bytes(),
        );
        let mut words = [[0; 8]; 2];
        words[0][1] = protocol;
        words[0][4..].copy_from_slice(&guest);
        words[1][..4].copy_from_slice(&peer);
        words[1][4..6].copy_from_slice(&port);
        words[1][6..].copy_from_slice(&peer_port);
        Some(Self(words.map(u64::from_le_bytes)))
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    name: WireName,
    id: FlowId,
}

const EMPTY: Entry = Entry {
    name: WireName::NONE,
    id: NIL,
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Recent {
    entries: Vec<Entry>,
    seed: u64,
}

impl Recent {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            entries: vec![EMPTY; 1 << INDEX_BITS],
            seed,
        }
    }

    #[inline(always)]
    fn place(&self, name: &WireName) -> usize {
        let mixed = (name.0[0] ^ self.seed).wrapping_add(name.0[1]);
        (mixed.wrapping_mul(MULTIPLIER) >> (u64::BITS - INDEX_BITS)) as usize
    }

    #[inline(always)]
    pub(crate) fn find(&self, name: &WireName) -> Option<FlowId> {
        let entry = self.entries.get(self.place(name))?;
        (entry.name == *name).then_some(entry.id)
    }

    pub(crate) fn remember(&mut self, name: WireName, id: FlowId) {
        let place = self.place(&name);
        self.entries[place] = Entry { name, id };
    }

    /// The flow leaves the table.
    pub(crate) fn forget(&mut self, key: &FlowKey) {
        let Some(name) = WireName::of(key) else {
            return;
        };
        let place = self.place(&name);
        if self.entries[place].name == name {
            self.entries[place] = EMPTY;
        }
    }

    pub(crate) fn clear(&mut self) {
        self.entries.fill(EMPTY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Direction;
    use crate::testing::{Segment, Side, udp};
    use crate::wire::parse;

    fn word(frame: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(frame[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn a_name_on_the_wire_is_that_of_the_key() {
        let mut recent = Recent::new(7);
        let frames = [
            Segment::new(Side::V4).ports(80, 40_000).ttl(9).bytes(),
            udp(Side::V4, false, 80, 40_000, b"of another protocol"),
            Segment::new(Side::V4).ports(40_000, 80).bytes(),
        ];
        let name = |frame: &[u8]| WireName::new(word(frame, 22), word(frame, 30));
        for (id, frame) in frames.iter().enumerate() {
            recent.remember(name(frame), id as FlowId);
        }
        for (id, frame) in frames.iter().enumerate() {
            let key = parse(frame, frame.len(), Direction::FromGuest).key;
            assert_eq!(WireName::of(&key), Some(name(frame)));
            assert_eq!(recent.find(&name(frame)), Some(id as FlowId));
            recent.forget(&key);
            assert_eq!(recent.find(&name(frame)), None);
        }
        let v6 = Segment::new(Side::V6).bytes();
        assert_eq!(
            WireName::of(&parse(&v6, v6.len(), Direction::FromGuest).key),
            None
        );
        recent.remember(name(&frames[0]), 1);
        recent.clear();
        assert_eq!(recent.find(&name(&frames[0])), None);
    }
}
