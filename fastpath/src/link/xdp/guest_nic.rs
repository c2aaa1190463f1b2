//! The link's datagrams through the NIC that carries the guest's frames, where a host has one NIC for both.
//!
//! Invariants: the sockets are the NIC's; this port holds slots that the pool has lent and that are in its table: those with
//! received frames until they are released or become tokens, and a stock to write into what is to be sent. What it gives back
//! goes to the NIC first. Frames change hands in [`DatagramPort::take_in`] and [`DatagramPort::hand_over`] only.
//!
//! Does not make the kernel send: the NIC does that for the guest's frames and these.

use std::collections::VecDeque;

use colo_bpf::Mac;
use colo_compare::{Frames, Token};

use super::chunks::{Chunks, PoolMemory};
use super::{ETHERNET_BYTES, SEND_CHUNKS, XDP_SLOTS_MAX, write_frame};
use crate::frame::FramePool;
use crate::link::port::{DatagramPort, PortAddress, Slot};
use crate::nic::{LinkFrame, LinkShare, Nic, Sent};

/// Frames taken at a time: what one look at the channel takes.
const RECEIVED_MAX: usize = 256;
/// Of the pool's slots, one in so many at most holds received frames, and is in stock to send from; together no more than
/// `XDP_SLOTS_MAX`.
const RECEIVE_SHARE: usize = 8;
const SEND_SHARE: usize = 32;
/// As long as fewer than one in so many are free, no more is put in stock than what sending cannot do without.
const SPARE_SHARE: usize = 16;
const SMALLEST_CHUNK: usize = 2048;

/// A port on the guest's NIC.
#[derive(Debug)]
pub struct GuestNicPort {
    share: LinkShare,
    pool: PoolMemory,
    chunks: Chunks,
    peer: Mac,
    mtu: usize,
    /// By slot: where the datagram lies.
    places: Box<[(u64, usize)]>,
    /// By slot: whether it is this port's now.
    lent: Box<[bool]>,
    received: VecDeque<LinkFrame>,
    /// How many slots have received frames.
    held: usize,
    released: Vec<u32>,
    stock: Vec<u32>,
    stock_target: usize,
    /// Written, with their lengths.
    written: VecDeque<(u32, usize)>,
    /// What the NIC had no room for.
    waiting: Option<Token>,
    errors: u64,
}

impl GuestNicPort {
    /// On a NIC whose frames lie in the slots of `pool`.
    pub fn new(share: LinkShare, pool: &PoolMemory) -> Self {
        let slots = pool.slots();
        let stock_target = SEND_CHUNKS.min(slots / SEND_SHARE);
        let chunk_bytes = pool.chunk_bytes().unwrap_or(SMALLEST_CHUNK);
        let sent_max = chunk_bytes - ETHERNET_BYTES;
        Self {
            peer: share.mac,
            mtu: share.mtu.min(sent_max),
            share,
            pool: pool.clone(),
            chunks: Chunks::of_pool(pool, chunk_bytes),
            places: vec![(0, 0); slots].into_boxed_slice(),
            lent: vec![false; slots].into_boxed_slice(),
            received: VecDeque::with_capacity(RECEIVED_MAX),
            held: 0,
            released: Vec::with_capacity(slots),
            stock: Vec::with_capacity(stock_target),
            stock_target,
            written: VecDeque::with_capacity(stock_target),
            waiting: None,
            errors: 0,
        }
    }

    fn fill_stock(&mut self, frames: &mut FramePool) {
        let spare = self.pool.slots() / SPARE_SHARE;
        // What was sent before is free again first: without that no acknowledgement would leave.
        let needed = self.stock_target / 2;
        while self.stock.len() < self.stock_target
            && (frames.free_slots() > spare || self.stock.len() < needed)
        {
            let Some((slot, _)) = frames.lend() else {
                return;
            };
            self.lent[slot as usize] = true;
            self.stock.push(slot);
        }
    }

    /// Slots with received datagrams at most.
    fn held_max(&self) -> usize {
        (self.pool.slots() / RECEIVE_SHARE).min(XDP_SLOTS_MAX - SEND_CHUNKS)
    }

    /// The NIC takes it, or has no room now.
    fn give(&mut self, nic: &mut dyn Nic, frames: &mut FramePool, token: Token) -> bool {
        match nic.send(frames, token) {
            Sent::Done => {}
            Sent::Refused(_) => self.errors += 1,
            Sent::Full(token) => {
                self.waiting = Some(token);
                return false;
            }
        }
        true
    }
}

impl DatagramPort for GuestNicPort {
    fn address(&self) -> PortAddress {
        PortAddress::Xdp(self.share.mac)
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn set_peer(&mut self, peer: PortAddress) {
        if let PortAddress::Xdp(mac) = peer {
            self.peer = mac;
        }
    }

    fn has_room(&self) -> bool {
        !self.stock.is_empty()
    }

    fn send(&mut self, head: &[u8], payload: &[u8]) -> bool {
        let len = ETHERNET_BYTES + head.len() + payload.len();
        if len > self.mtu + ETHERNET_BYTES {
            return false;
        }
        let Some(slot) = self.stock.pop() else {
            return false;
        };
        let offset = self.chunks.offset_of(slot as usize);
        let frame = self.chunks.get_mut(offset, len);
        write_frame(frame, [&self.peer, &self.share.mac], head, payload);
        self.written.push_back((slot, len));
        true
    }

    fn flush(&mut self) {}

    fn receive(&mut self) -> Option<Slot> {
        while let Some(LinkFrame { slot, start, len }) = self.received.pop_front() {
            let len = len.saturating_sub(ETHERNET_BYTES);
            if let Some(place) = self.places.get_mut(slot as usize).filter(|_| len > 0) {
                let offset = self.chunks.offset_of(slot as usize);
                *place = (offset + (start + ETHERNET_BYTES) as u64, len);
                return Some(Slot(slot));
            }
            self.errors += 1;
            self.release(Slot(slot));
        }
        None
    }

    fn bytes(&self, slot: &Slot) -> &[u8] {
        let (offset, len) = self.places[slot.0 as usize];
        self.chunks.get(offset, len)
    }

    fn release(&mut self, slot: Slot) {
        self.held -= 1;
        self.released.push(slot.0);
    }

    fn shares_nic(&self) -> bool {
        true
    }

    fn take_in(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) {
        if !self.pool.is_of(frames) {
            return;
        }
        for slot in &self.released {
            self.lent[*slot as usize] = false;
        }
        nic.take_link_slots(frames, &mut self.released);
        self.fill_stock(frames);
        let room = self.held_max().saturating_sub(self.held);
        let before = self.received.len();
        let max = RECEIVED_MAX.min(before + room);
        nic.receive_link(frames, &mut self.received, max);
        for frame in self.received.range(before..) {
            self.lent[frame.slot as usize] = true;
        }
        self.held += self.received.len() - before;
    }

    fn has_written(&self) -> bool {
        !self.written.is_empty() || self.waiting.is_some()
    }

    fn hand_over(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) -> bool {
        if let Some(token) = self.waiting.take()
            && !self.give(nic, frames, token)
        {
            return true;
        }
        while let Some((slot, len)) = self.written.pop_front() {
            self.lent[slot as usize] = false;
            // The frame was written to the start of its slot.
            let Some(token) = frames.adopt(slot, 0, len) else {
                self.errors += 1;
                continue;
            };
            if !self.give(nic, frames, token) {
                return true;
            }
        }
        false
    }

    fn adopt(
        &mut self,
        slot: Slot,
        start: usize,
        len: usize,
        frames: &mut FramePool,
    ) -> Result<Token, Slot> {
        let (offset, received) = self.places[slot.0 as usize];
        let within = (offset - self.chunks.offset_of(slot.0 as usize)) as usize + start;
        let inside = start + len <= received && within + len <= frames.slot_bytes();
        // The NIC gets another slot for it.
        let Some((fresh, _)) = inside.then(|| frames.lend()).flatten() else {
            return Err(slot);
        };
        self.held -= 1;
        self.lent[slot.0 as usize] = false;
        self.lent[fresh as usize] = true;
        self.released.push(fresh);
        frames.adopt(slot.0, within, len).ok_or(slot)
    }

    fn copy_in(&mut self, datagram: &[u8], frames: &mut FramePool) -> Option<Slot> {
        let fits = datagram.len() <= self.pool.slot_bytes() && self.held < self.held_max();
        if !fits || !self.pool.is_of(frames) {
            return None;
        }
        let (slot, _) = frames.lend()?;
        self.lent[slot as usize] = true;
        self.held += 1;
        let offset = self.chunks.offset_of(slot as usize);
        self.chunks
            .get_mut(offset, datagram.len())
            .copy_from_slice(datagram);
        self.places[slot as usize] = (offset, datagram.len());
        Some(Slot(slot))
    }

    fn leave(&mut self, frames: &mut FramePool) {
        self.received.clear();
        self.written.clear();
        self.stock.clear();
        self.released.clear();
        for (slot, lent) in (0..).zip(&mut self.lent) {
            if std::mem::take(lent) {
                frames.give_back(slot);
            }
        }
        if let Some(token) = self.waiting.take() {
            frames.release(token);
        }
    }

    /// The NIC waits for its sockets itself.
    fn poll_fds(&self, _fds: &mut Vec<libc::pollfd>) {}

    fn errors(&self) -> u64 {
        self.errors
    }
}
