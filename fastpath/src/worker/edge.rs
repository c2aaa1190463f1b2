//! What a role works with: frames, the NIC on one side, the guest on the other.
//!
//! Invariants: a frame between the two is always a token of the pool; when the pool is empty,
//! frames stay where they are (NIC queue, guest ring).
//!
//! Does not decide what goes where; the role does.

use std::io;
use std::sync::Arc;

use colo_compare::{Frames, Token};

use crate::frame::{FramePool, LINK_HEADER_MAX};
use crate::nic::{Filter, Nic, Sent};
use crate::stats::WorkerStats;

use super::port::{Delivery, GuestPort};

/// Everything the worker owns besides its role.
pub struct Edge {
    /// The frames of this worker.
    pub frames: FramePool,
    nic: Box<dyn Nic>,
    nic_blocked: bool,
    pub(super) port: GuestPort,
    stats: Arc<WorkerStats>,
}

impl Edge {
    pub(super) fn new(
        frames: FramePool,
        nic: Box<dyn Nic>,
        port: GuestPort,
        stats: Arc<WorkerStats>,
    ) -> Self {
        Self {
            frames,
            nic,
            nic_blocked: false,
            port,
            stats,
        }
    }

    /// The next frame from the NIC, if there is one and a slot for it.
    pub fn nic_receive(&mut self) -> Option<Token> {
        if self.frames.free_slots() == 0 {
            self.stats.frames_exhausted.add(1);
            return None;
        }
        let frame_max = usize::from(self.nic.mtu()) + LINK_HEADER_MAX;
        let (nic, stats) = (&mut self.nic, &self.stats);
        self.frames.fill(|slot| {
            loop {
                match nic.receive(slot) {
                    Ok(None) => return None,
                    Ok(Some(len)) if len > frame_max => stats.nic_rx_oversize.add(1),
                    Ok(Some(len)) => {
                        stats.nic_rx_frames.add(1);
                        return Some(len);
                    }
                    Err(_) => {
                        stats.nic_rx_errors.add(1);
                        return None;
                    }
                }
            }
        })
    }

    /// Sends a frame. `false`: the NIC has no room; keep the token and try again later.
    pub fn nic_send(&mut self, token: &Token) -> bool {
        match self.nic.send(self.frames.bytes(token)) {
            Ok(Sent::Done) => self.stats.nic_tx_frames.add(1),
            Ok(Sent::WouldBlock) => {
                self.stats.nic_tx_blocked.add(1);
                self.nic_blocked = true;
                return false;
            }
            // Refused for good (interface down, frame too long): lost, as on a wire.
            Err(_) => self.stats.nic_tx_errors.add(1),
        }
        true
    }

    /// Whether the guest has a receive buffer.
    pub fn guest_has_room(&mut self) -> bool {
        self.port.has_room()
    }

    /// Whether the guest has something to send.
    pub fn guest_has_output(&mut self) -> bool {
        self.port.has_output()
    }

    /// Whether a driver is there.
    pub fn guest_is_active(&self) -> bool {
        self.port.is_active()
    }

    /// Puts a frame into the guest's receive queue. The token stays the caller's.
    pub fn guest_deliver(&mut self, token: &Token) -> Delivery {
        self.port.deliver(self.frames.bytes(token))
    }

    /// The next frame from the guest, if there is one and a slot for it. Its buffer is the guest's
    /// again.
    pub fn guest_take(&mut self) -> Option<Token> {
        if !self.port.has_output() {
            return None;
        }
        let frame_max = usize::from(self.nic.mtu()) + LINK_HEADER_MAX;
        if self.frames.free_slots() == 0 {
            self.stats.frames_exhausted.add(1);
            return None;
        }
        let port = &mut self.port;
        self.frames.fill(|slot| port.take(slot, frame_max))
    }

    /// Gives a slot back.
    pub fn release(&mut self, token: Token) {
        self.frames.release(token);
    }

    /// Replaces the NIC's filter.
    pub fn set_filter(&mut self, filter: Filter) -> io::Result<()> {
        self.nic.set_filter(filter)
    }

    /// The worker's counters.
    pub fn stats(&self) -> &WorkerStats {
        &self.stats
    }

    pub(super) fn nic_poll(&mut self, wants_frames: bool) -> libc::pollfd {
        let mut events = 0;
        if wants_frames {
            events |= libc::POLLIN;
        }
        if std::mem::take(&mut self.nic_blocked) {
            events |= libc::POLLOUT;
        }
        // A negative descriptor is skipped: no interest must not mean waking for errors.
        let fd = if events == 0 { -1 } else { self.nic.poll_fd() };
        libc::pollfd {
            fd,
            events,
            revents: 0,
        }
    }
}
