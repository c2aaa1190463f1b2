//! What a NIC does when its link, its queues or the NIC itself go, and when they come back.
//!
//! Invariants: a slot that the kernel may still write goes back to the pool only when it has let go
//! of it.
//!
//! Does not find out that something has changed; the watch does.

use std::time::Duration;

use colo_compare::Frames;
use tracing::{info, warn};

use super::XdpNic;
use super::common::Attachment;
use super::queue::Use;
use super::watch::Seen;
use crate::clock::now_us;
use crate::frame::FramePool;
use crate::nic::Nic;

/// Between two attempts to use a NIC that was lost.
pub(super) const RETRY_US: u64 = 50_000;

impl XdpNic {
    /// Closes all sockets. The kernel no longer writes into the slots it had, except a NIC that
    /// does it by itself, which is stopped a little later.
    pub(super) fn close_queues(&mut self, frames: &mut FramePool) {
        let zero_copy = self.queues.iter().any(|queue| queue.socket.is_zero_copy());
        for queue in self.queues.drain(..) {
            queue.close(frames);
        }
        self.attachment = None;
        if self.shard == 0 {
            self.common.release();
        }
        self.copies = None;
        for (slot, place) in (0..).zip(&mut self.uses) {
            match std::mem::take(place) {
                Use::Elsewhere => {}
                Use::Lent(_) => self.parked.push(Use::Lent(slot)),
                sent => {
                    self.stats.tx_lost_frames.add(1);
                    self.parked.push(sent);
                }
            }
        }
        if !zero_copy {
            self.unpark(frames);
        }
    }

    pub(super) fn unpark(&mut self, frames: &mut FramePool) {
        for place in self.parked.drain(..) {
            match place {
                Use::Elsewhere => {}
                Use::Lent(slot) => frames.give_back(slot),
                Use::Sent(_, token, _) => frames.release(token),
            }
        }
    }

    /// Acts on what the watch has seen.
    pub(super) fn look(&mut self, frames: &mut FramePool, seen: &Seen) {
        let name = &self.config.interface;
        if self.has_link != seen.has_link {
            self.has_link = seen.has_link;
            self.common.set_link(seen.has_link);
            if seen.has_link {
                info!("{name}: the link is back");
            } else {
                self.stats.link_losses.add(1);
                warn!("{name}: the link is gone");
            }
        }
        if let Err(e) = self.set_host_addresses(&seen.addresses) {
            warn!("{}: {e}", self.config.interface);
        }
        if self.retry_at_us.is_some() {
            self.retry_at_us = Some(0);
            return;
        }
        let bound = self.attachment.map_or(0, |attachment| attachment.queues);
        let is_same = seen.index == Some(self.interface.index());
        if !is_same || seen.rx_queues < bound {
            self.lose(frames);
        } else if seen.rx_queues > bound {
            self.common.has_queues(seen.rx_queues);
            self.add_queues(frames, seen.rx_queues);
        }
    }

    /// Heeds what another end has changed.
    pub(super) fn heed(&mut self, frames: &mut FramePool) {
        self.heeded = self.common.heed(self.shard);
        self.heed_filter();
        let now = self.common.attachment();
        let number = |attachment: Option<Attachment>| attachment.map(|a| a.number);
        if self.shard == 0 {
            // Another end has found that its queues are not reached.
            if now.is_none() && self.attachment.is_some() {
                self.lose(frames);
            }
            return;
        }
        self.has_link = self.common.has_link();
        if number(now) != number(self.attachment) {
            self.close_queues(frames);
            self.retry_at_us = now.map(|_| 0);
        } else if let Some(now) = now
            && self.attachment != Some(now)
        {
            self.add_queues(frames, now.queues);
        }
    }

    fn add_queues(&mut self, frames: &mut FramePool, queues: u32) {
        let before = self.queues.len();
        let added = self.open_share(frames, queues, self.mode, Duration::ZERO);
        if let Err(e) = added {
            warn!("{}: {e}", self.config.interface);
            self.stats.return_failures.add(1);
            return self.lose(frames);
        }
        if let Some(attachment) = &mut self.attachment {
            attachment.queues = queues;
        }
        let added = self.queues.len() - before;
        self.stats.queues_added.add(added as u64);
        info!("{}: {}", self.config.interface, self.describe());
    }

    pub(super) fn lose(&mut self, frames: &mut FramePool) {
        warn!(
            "{}: lost; it is used again when it is back",
            self.config.interface
        );
        self.stats.nic_losses.add(1);
        self.close_queues(frames);
        self.retry_at_us = Some(0);
    }

    /// Tries to use a lost NIC again, in the mode that was chosen.
    pub(super) fn come_back(&mut self, frames: &mut FramePool) {
        let back = match self.shard {
            0 => self.open_queues(frames, self.mode, Duration::ZERO),
            _ => self.follow(frames, Duration::ZERO),
        };
        match back {
            Ok(()) => {
                self.retry_at_us = None;
                self.failure = None;
                if self.attachment.is_none() {
                    // The first end is not back yet; it tells when it is.
                    return;
                }
                self.stats.nic_returns.add(1);
                info!("{}: back, {}", self.config.interface, self.describe());
            }
            Err(e) => {
                if self.shard != 0 {
                    self.close_queues(frames);
                }
                self.stats.return_failures.add(1);
                let why = e.to_string();
                if self.failure.as_ref() != Some(&why) {
                    warn!("{}: still lost: {why}", self.config.interface);
                    self.failure = Some(why);
                }
                self.retry_at_us = Some(now_us() + RETRY_US);
            }
        }
    }
}
