//! Datagrams of the packet channel as Ethernet frames of their own type, through AF_XDP sockets on the link's interface.
//!
//! The chunks are the port's own, or slots of the worker's frame pool: then a received frame becomes a token where it lies.
//!
//! Invariants: every chunk is in exactly one place: free to receive, in a fill ring, received, free to send, or in the tx ring,
//! or else it is the pool's, and the pool gets back all that it has lent; the XDP program takes the link's frames and passes
//! everything else to the host, so that TCP goes on beside them; it leaves the interface with this value.
//!
//! With several shards each has a port, with sockets on the queues q with q % shards == shard, behind one program. A frame for
//! another shard is passed on above ([`super::transport::crossing`]).
//!
//! Looks at no datagram: what comes from elsewhere is the reliable layer's to refuse.

mod chunks;
mod guest_nic;
mod interface;
mod open;
mod shared;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use colo_bpf::{LINK_ETHERTYPE, Mac, XdpError, XdpProgram};
use colo_compare::Token;

use super::port::{DatagramPort, PortAddress, Slot, WakeUps};
use crate::frame::FramePool;
use crate::ring::xsk::{
    Descriptor, InterfaceError, Kick, Kicks, Rx, TxRing, XskError, XskSocket, kick_all,
};
use chunks::Chunks;

pub use chunks::PoolMemory;
pub use guest_nic::GuestNicPort;
pub use interface::interface_of;
use shared::Loan;

const ETHERNET_BYTES: usize = 14;
/// Chunks to send from.
const SEND_CHUNKS: usize = 256;
const RING_ENTRIES: u32 = 1024;

/// Slots of a pool that a port borrows at most, to send from and to receive into.
pub const XDP_SLOTS_MAX: usize = SEND_CHUNKS + RING_ENTRIES as usize;
/// The kernel sends so many frames in one call at most, in copy mode.
const KICK_FRAMES: u32 = 32;

/// Why the link has no AF_XDP.
#[derive(Debug, thiserror::Error)]
pub enum XdpPortError {
    /// The address is on no interface.
    #[error("no interface has the link's address {0}")]
    NoInterface(std::net::IpAddr),
    /// The interface.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// A socket or its memory.
    #[error(transparent)]
    Xsk(#[from] XskError),
    /// The XDP program.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// Each shard needs a queue to send from.
    #[error(
        "{queues} receive queues are too few for host.shards = {shards}: ethtool -L {interface} combined {shards}"
    )]
    FewQueues {
        /// The interface.
        interface: String,
        /// How many it has.
        queues: u32,
        /// How many it needs.
        shards: usize,
    },
    /// The guest's NIC, which is the link's, too, does not take its packets.
    #[error("shard {0} has no end of the guest's NIC")]
    NoEnd(usize),
    /// The pool is too small to lend so many slots.
    #[error("host.frame_slots = {slots} are too few for {queues} queues; raise it")]
    FewSlots {
        /// How many there are.
        slots: usize,
        /// For how many queues.
        queues: u32,
    },
    /// Slots below the smallest chunk.
    #[error("frame slots of less than 2048 bytes are too small for AF_XDP")]
    SmallSlots,
    /// Addresses or memory.
    #[error("{0}")]
    System(#[from] io::Error),
}

#[derive(Debug)]
struct Queue {
    socket: XskSocket,
    /// Chunks in its fill ring and its rx ring.
    lent: usize,
    /// The rest of a frame in several pieces is of no use.
    spoilt: bool,
}

/// The link's AF_XDP sockets, one for each receive queue of its interface, or each of a shard's share of them.
#[derive(Debug)]
pub struct XdpPort {
    /// Dropped first: without it no more frames come.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is held"))]
    program: Arc<XdpProgram>,
    queues: Vec<Queue>,
    turn: usize,
    fill_target: usize,
    chunks: Chunks,
    /// By chunk: where the datagram lies.
    places: Box<[(u64, usize)]>,
    free: Vec<u32>,
    sendable: VecDeque<u32>,
    /// With the pool's memory.
    loan: Option<Loan>,
    pool_refusals: u64,
    mac: Mac,
    peer: Mac,
    mtu: usize,
    wake_ups: WakeUps,
    errors: u64,
}

impl XdpPort {
    /// Gives free chunks to the fill rings.
    fn refill(&mut self) {
        for queue in &mut self.queues {
            queue.socket.release_rx();
            let wanted = self.fill_target.saturating_sub(queue.lent);
            // Below half is soon enough.
            if wanted * 2 < self.fill_target {
                continue;
            }
            let room = queue.socket.fill_free(wanted as u32) as usize;
            for _ in 0..wanted.min(room) {
                let Some(chunk) = self.free.pop() else { break };
                let offset = self.chunks.offset_of(chunk as usize);
                if !matches!(queue.socket.fill(offset), Ok(true)) {
                    self.free.push(chunk);
                    break;
                }
                queue.lent += 1;
            }
            queue.socket.submit_fill();
            if !queue.socket.fill_needs_wakeup() {
                continue;
            }
            self.wake_ups.asked += 1;
            self.wake_ups.made += 1;
            if let Err(e) = queue.socket.wake_rx() {
                tracing::debug!("packet channel: AF_XDP: {e}");
                self.errors += 1;
            }
        }
    }

    /// Makes the kernel send what it was given, and takes back the chunks whose frames have left. What stays in the ring
    /// is sent with what comes next.
    fn push_out(&mut self) {
        let Some(queue) = self.queues.first_mut() else {
            return;
        };
        queue.socket.submit_tx();
        let calls_max = queue.socket.tx_pending().div_ceil(KICK_FRAMES) + 1;
        let mut sending = Sending {
            socket: &mut queue.socket,
            chunks: &self.chunks,
            sendable: &mut self.sendable,
        };
        let kicks = kick_all(&mut sending, calls_max);
        sending.reap();
        self.note(&kicks);
    }

    fn note(&mut self, kicks: &Kicks) {
        self.wake_ups.made += u64::from(kicks.calls);
        self.wake_ups.asked += u64::from(kicks.asked);
        self.wake_ups.in_vain += u64::from(kicks.in_vain);
        self.errors += u64::from(kicks.dropped);
        if let Some(e) = &kicks.failure {
            tracing::debug!("packet channel: AF_XDP: {e}");
            self.errors += 1;
        }
    }

    fn receive_from(&mut self, index: usize) -> Option<Slot> {
        let queue = &mut self.queues[index];
        loop {
            let piece = match queue.socket.receive()? {
                Rx::Piece(piece) => piece,
                Rx::Bad { more } => {
                    queue.spoilt = more;
                    self.errors += 1;
                    continue;
                }
            };
            queue.lent = queue.lent.saturating_sub(1);
            let chunk = self.chunks.index_of(piece.chunk) as u32;
            let spoilt = std::mem::replace(&mut queue.spoilt, piece.more);
            if self.loan.as_ref().is_some_and(|loan| !loan.has(chunk)) {
                self.errors += 1;
                continue;
            }
            let len = (piece.len as usize).saturating_sub(ETHERNET_BYTES);
            if spoilt || piece.more || len == 0 {
                self.free.push(chunk);
                self.errors += 1;
                continue;
            }
            self.places[chunk as usize] = (piece.offset + ETHERNET_BYTES as u64, len);
            return Some(Slot(chunk));
        }
    }
}

/// The queue that sends, with its chunks.
struct Sending<'a> {
    socket: &'a mut XskSocket,
    chunks: &'a Chunks,
    sendable: &'a mut VecDeque<u32>,
}

impl TxRing for Sending<'_> {
    fn pending(&mut self) -> u32 {
        self.socket.tx_pending()
    }

    fn needs_wakeup(&self) -> bool {
        self.socket.tx_needs_wakeup()
    }

    fn kick(&mut self) -> io::Result<Kick> {
        self.socket.kick_tx()
    }

    fn reap(&mut self) -> u32 {
        let before = self.sendable.len();
        while let Some(offset) = self.socket.complete() {
            self.sendable.push_back(self.chunks.index_of(offset) as u32);
        }
        self.socket.release_completions();
        (self.sendable.len() - before) as u32
    }
}

/// A datagram of the link as a frame of just that length, `to` and `from` these addresses.
fn write_frame(frame: &mut [u8], [to, from]: [&Mac; 2], head: &[u8], payload: &[u8]) {
    let body = ETHERNET_BYTES + head.len();
    frame[..6].copy_from_slice(to);
    frame[6..12].copy_from_slice(from);
    frame[12..ETHERNET_BYTES].copy_from_slice(&LINK_ETHERTYPE.to_be_bytes());
    frame[ETHERNET_BYTES..body].copy_from_slice(head);
    frame[body..].copy_from_slice(payload);
}

impl DatagramPort for XdpPort {
    fn address(&self) -> PortAddress {
        PortAddress::Xdp(self.mac)
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
        !self.sendable.is_empty()
    }

    fn send(&mut self, head: &[u8], payload: &[u8]) -> bool {
        let len = ETHERNET_BYTES + head.len() + payload.len();
        if len > self.mtu + ETHERNET_BYTES {
            return false;
        }
        let Some(chunk) = self.sendable.pop_front() else {
            return false;
        };
        let offset = self.chunks.offset_of(chunk as usize);
        let frame = self.chunks.get_mut(offset, len);
        write_frame(frame, [&self.peer, &self.mac], head, payload);
        let piece = Descriptor {
            offset,
            len: len as u32,
            more: false,
        };
        // The ring has an entry for each chunk.
        let sent = matches!(self.queues[0].socket.send(piece), Ok(true));
        if !sent {
            self.sendable.push_back(chunk);
        }
        sent
    }

    fn flush(&mut self) {
        self.push_out();
        self.refill();
    }

    fn receive(&mut self) -> Option<Slot> {
        for _ in 0..self.queues.len() {
            if let Some(slot) = self.receive_from(self.turn) {
                return Some(slot);
            }
            self.turn = (self.turn + 1) % self.queues.len();
        }
        None
    }

    fn bytes(&self, slot: &Slot) -> &[u8] {
        let (offset, len) = self.places[slot.0 as usize];
        self.chunks.get(offset, len)
    }

    fn release(&mut self, slot: Slot) {
        self.free.push(slot.0);
    }

    fn borrow_slots(&mut self, frames: &mut FramePool) {
        self.borrow_from(frames);
    }

    fn adopt(
        &mut self,
        slot: Slot,
        start: usize,
        len: usize,
        frames: &mut FramePool,
    ) -> Result<Token, Slot> {
        self.adopt_into(slot, start, len, frames)
    }

    fn copy_in(&mut self, datagram: &[u8], _frames: &mut FramePool) -> Option<Slot> {
        if datagram.len() > self.chunks.chunk_bytes() {
            return None;
        }
        let chunk = self.free.pop()?;
        let offset = self.chunks.offset_of(chunk as usize);
        self.chunks
            .get_mut(offset, datagram.len())
            .copy_from_slice(datagram);
        self.places[chunk as usize] = (offset, datagram.len());
        Some(Slot(chunk))
    }

    fn leave(&mut self, frames: &mut FramePool) {
        self.leave_pool(frames);
    }

    fn pool_refusals(&self) -> u64 {
        self.pool_refusals
    }

    fn poll_fds(&self, fds: &mut Vec<libc::pollfd>) {
        // Before the pool has lent any, none comes back either.
        let can_send = self.loan.as_ref().is_none_or(Loan::can_send);
        let sending = can_send && self.sendable.is_empty();
        for (index, queue) in self.queues.iter().enumerate() {
            let out = match index == 0 && sending {
                true => libc::POLLOUT,
                false => 0,
            };
            fds.push(libc::pollfd {
                fd: queue.socket.poll_fd(),
                events: libc::POLLIN | out,
                revents: 0,
            });
        }
    }

    fn errors(&self) -> u64 {
        let lost = self.queues.iter().filter_map(|queue| {
            let counted = queue.socket.statistics().ok()?;
            Some(counted.rx_dropped + counted.rx_ring_full + counted.fill_ring_empty)
        });
        self.errors + lost.sum::<u64>()
    }

    fn calls(&self) -> u64 {
        self.wake_ups.made
    }

    fn wake_ups(&self) -> WakeUps {
        self.wake_ups
    }

    #[cfg(test)]
    fn stop_receiving(&mut self) {
        let nothing = colo_bpf::LinkChannel::default();
        if let Some(program) = Arc::get_mut(&mut self.program) {
            let _ = program.set_link_channel(nothing);
        }
    }
}
