//! Page streams that end, are damaged or stall while the rest of the link is whole.
//!
//! Invariant: both ends of a stream hear of its end, behind what of it still arrives; a stall ends, or one end loses patience.

use super::*;
use crate::link::PageMsg;

/// What goes wrong with page streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamFault {
    /// They end; what is under way is lost, or arrives before.
    End { lossy: bool },
    /// The next thing that reaches the target is damaged.
    Damage,
    /// Nothing reaches the target for so long.
    Stall(u64),
}

impl World {
    /// What arrives of a message at a host; `None`: nothing, or not yet.
    pub(super) fn over_streams(
        &mut self,
        n: usize,
        to: usize,
        channel: Channel,
        msg: LinkMsg,
    ) -> Option<LinkMsg> {
        let (now, link) = (self.now, &mut self.links[n]);
        let LinkMsg::Pages { opened, msg } = msg else {
            return Some(msg);
        };
        debug_assert_eq!(channel, Channel::Pages);
        let is_end = matches!(msg, PageMsg::End);
        if opened < link.torn && !is_end {
            return None;
        }
        if !is_end && (now < link.pages_stall_us[to] || !link.pages_stalled[to].is_empty()) {
            link.pages_stalled[to].push(LinkMsg::Pages { opened, msg });
            return None;
        }
        let is_damaged = !is_end && std::mem::take(&mut link.damages[to]);
        let msg = if is_damaged { PageMsg::Damaged } else { msg };
        Some(LinkMsg::Pages { opened, msg })
    }

    pub(super) fn hit_streams(&mut self, host: usize, p: &Process, fault: StreamFault) {
        let Some(link) = p.link else { return };
        match fault {
            StreamFault::End { lossy } => {
                let opened = p.streams_opened();
                self.end_streams(link, opened, lossy);
            }
            StreamFault::Damage => self.links[link].damages[host] = true,
            StreamFault::Stall(us) => {
                let until_us = self.now + us;
                let stall_us = &mut self.links[link].pages_stall_us[host];
                *stall_us = until_us.max(*stall_us);
                let patience_us = self.plan.stall_us;
                if us > patience_us {
                    self.later(patience_us, Event::StreamsTested(link, host));
                }
                self.later(us, Event::StreamsMove(link, host));
            }
        }
    }

    /// The streams with this number and those before end, at both ends.
    pub fn end_streams(&mut self, link: usize, opened: u64, lossy: bool) {
        if lossy {
            let torn = &mut self.links[link].torn;
            *torn = (opened + 1).max(*torn);
        }
        for host in 0..2 {
            let msg = PageMsg::End;
            self.link_send(link, host, Channel::Pages, LinkMsg::Pages { opened, msg });
        }
    }

    /// A stall has lasted for as long as a page channel waits: whoever waits for something gives up.
    pub(super) fn test_streams(&mut self, n: usize, to: usize) {
        let link = &self.links[n];
        if link.pages_stall_us[to] <= self.now || link.pages_stalled[to].is_empty() {
            return;
        }
        // The sender with what does not go, or the receiver with half a checkpoint.
        let host = if self.chance.chance(500) { to } else { 1 - to };
        self.outcome.streams_stalled += 1;
        let (inc, msg) = (self.links[n].ends[host], LinkMsg::PagesStalled);
        let event = HostEvent::Link(n, Channel::Control, msg);
        self.host_event(self.now, host, inc, event);
    }

    /// A stall is over.
    pub(super) fn move_streams(&mut self, n: usize, to: usize) {
        if self.links[n].pages_stall_us[to] > self.now {
            return;
        }
        for msg in std::mem::take(&mut self.links[n].pages_stalled[to]) {
            self.arrive(n, to, Channel::Pages, msg);
        }
    }
}
