//! The link's packet channel on a NIC that carries the guest's frames: a second socket on each queue, to which the program
//! leads the link's frames.
//!
//! Invariants: both sockets of a queue receive into chunks of one fill ring, which the link can count on: it is filled with
//! more chunks than the guest's rx ring holds, what the guest's frames take of it is replaced at once or not taken, and what
//! the link gives back is lent again first. So neither starves the other, whoever stops reading. What the channel sends
//! leaves by [`Nic::send`], in order with the guest's frames.
//!
//! Does not read the frames.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Weak;

use colo_bpf::Mac;
use tracing::{info, warn};

use super::queue::Queue;
use super::{XdpNic, XdpNicError};
use crate::frame::FramePool;
use crate::nic::share::{LinkFrame, LinkShare};
use crate::nic::{Nic, poll_for};
use crate::ring::xsk::XskReceiver;

const ETHERNET_BYTES: usize = 14;
/// Of the slots, so many parts are for the link, divided by the queues; in chunks for one queue at least and at most.
pub(super) const SHARE: usize = 8;
const CHUNKS_MIN: usize = 8;
const CHUNKS_MAX: usize = 512;

/// The link's use of this NIC.
#[derive(Debug)]
pub(super) struct LinkUse {
    holder: Weak<()>,
    /// Whether anybody takes the frames already.
    is_read: bool,
}

impl LinkUse {
    fn is_over(&self) -> bool {
        self.holder.strong_count() == 0
    }

    pub(super) fn is_read(&self) -> bool {
        self.is_read
    }
}

impl XdpNic {
    /// Lets the link's frames through, to whoever holds what this gives.
    pub(super) fn share(&mut self, frames: &mut FramePool) -> Result<LinkShare, XdpNicError> {
        self.end_share_that_is_over(frames);
        let name = self.config.interface.clone();
        if self.link.is_some() {
            return Err(XdpNicError::Shared { interface: name });
        }
        let (Some(memory), false) = (&self.memory, self.queues.is_empty()) else {
            return Err(XdpNicError::Lost { interface: name });
        };
        let received_max = memory.whole.received_bytes_max() as usize - ETHERNET_BYTES;
        let mtu = (self.interface.mtu()? as usize).min(received_max);
        let mac: Mac = self.interface.mac()?;
        let (share, holder) = LinkShare::new(mac, mtu);
        self.link = Some(LinkUse {
            holder,
            is_read: false,
        });
        let opened = self.open_link_sockets();
        let opened = opened.and_then(|()| self.common.lead_link(self.shard, true));
        if let Err(e) = opened {
            self.end_share(frames);
            return Err(e);
        }
        self.lend_to_link(frames, self.spare());
        info!("{name}: {}", self.describe());
        Ok(share)
    }

    /// The link's socket on each queue that has none.
    pub(super) fn open_link_sockets(&mut self) -> Result<(), XdpNicError> {
        if self.link.is_none() {
            return Ok(());
        }
        let (slots, queues) = (self.uses.len(), self.queues.len());
        let chunks = (slots / SHARE / queues.max(1)).min(CHUNKS_MAX);
        if chunks < CHUNKS_MIN {
            return Err(XdpNicError::FewSlots {
                interface: self.config.interface.clone(),
                slots,
                queues: queues as u32,
            });
        }
        // No more waits for the link than what the fill ring has for it.
        let entries = 1 << chunks.ilog2();
        for queue in &mut self.queues {
            let link = match queue.link.take() {
                Some(link) => link,
                None => XskReceiver::beside(&queue.socket, entries)?,
            };
            let number = queue.socket.queue();
            let link = queue.link.insert(link);
            let program = &mut self.common.control().program;
            program.set_link_socket(number, link.as_fd())?;
            // A ring that was made for fewer queues keeps its size, and its part.
            queue.link_chunks = link.entries();
        }
        Ok(())
    }

    /// Ends the share if its holder has let go.
    pub(super) fn end_share_that_is_over(&mut self, frames: &mut FramePool) {
        if self.link.as_ref().is_some_and(LinkUse::is_over) {
            self.end_share(frames);
            info!("{}: {}", self.config.interface, self.describe());
        }
    }

    /// The sockets stay, for the next share: what the kernel puts into one last is not lost with it.
    pub(super) fn end_share(&mut self, frames: &mut FramePool) {
        self.link = None;
        let name = &self.config.interface;
        if let Err(e) = self.common.lead_link(self.shard, false) {
            warn!("{name}: {e}");
        }
        let mut rest = VecDeque::new();
        for queue in &mut self.queues {
            let number = queue.socket.queue();
            let removed = self.common.control().program.remove_link_socket(number);
            if let Err(e) = removed {
                warn!("{name}: {e}");
            }
            queue.link_chunks = 0;
            queue.receive_link(frames, &mut self.uses, &mut rest, usize::MAX, &self.stats);
        }
        for frame in rest {
            frames.give_back(frame.slot);
        }
    }

    pub(super) fn receive_link_frames(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<LinkFrame>,
        max: usize,
    ) {
        let Some(link) = &mut self.link else { return };
        link.is_read = true;
        for queue in &mut self.queues {
            queue.receive_link(frames, &mut self.uses, out, max, &self.stats);
        }
    }

    pub(super) fn take_link_slots_back(&mut self, frames: &mut FramePool, slots: &mut Vec<u32>) {
        if slots.is_empty() {
            return;
        }
        let spare = self.spare().min(frames.free_slots());
        for slot in slots.drain(..) {
            frames.give_back(slot);
        }
        self.lend_to_link(frames, spare);
    }

    fn lend_to_link(&mut self, frames: &mut FramePool, spare: usize) {
        // All that comes for the link may come by one queue, whose ring the others must not be filled from.
        let emptiest = self.queues.iter_mut().min_by_key(|queue| queue.lent());
        if let Some(queue) = emptiest {
            // What the kernel does not hear of now it hears of with the next flush.
            let _ = queue.refill(frames, &mut self.uses, spare);
        }
        for queue in &mut self.queues {
            let _ = queue.refill(frames, &mut self.uses, spare);
        }
    }

    /// An eighth of the slots stays for what the guest sends.
    pub(super) fn spare(&self) -> usize {
        self.uses.len() / 8
    }

    /// Adds the descriptors of the link's sockets.
    pub(super) fn link_poll_fds(&self) -> impl Iterator<Item = libc::pollfd> {
        let is_read = self.link.as_ref().is_some_and(LinkUse::is_read);
        let queues = self.queues.iter().filter(move |_| is_read);
        let fds = queues.filter_map(|queue: &Queue| Some(queue.link.as_ref()?.poll_fd()));
        fds.filter_map(|fd| poll_for(fd, true, false))
    }

    /// Frames of the link that the kernel dropped for want of room.
    pub(super) fn link_drops(&self) -> u64 {
        let links = self.queues.iter().filter_map(|queue| queue.link.as_ref());
        let counted = links.filter_map(|link| link.statistics().ok());
        counted.map(|c| c.rx_dropped + c.rx_ring_full).sum()
    }
}
