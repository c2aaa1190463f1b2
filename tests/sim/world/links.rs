//! The link between two hosts: made when a secondary starts, delayed, cut, healed, closed.

use super::*;

impl World {
    /// Sends over a link from `host`.
    pub fn link_send(&mut self, link: usize, host: usize, channel: Channel, msg: LinkMsg) {
        let to = 1 - host;
        let at = self.links[link].arrival(self.now, to, channel, &mut self.chance);
        self.at(
            at,
            Event::Link {
                link,
                to,
                channel,
                msg,
            },
        );
    }

    pub(super) fn arrive(&mut self, n: usize, to: usize, channel: Channel, msg: LinkMsg) {
        let link = &mut self.links[n];
        if link.cut[to] || !link.stalled[to].is_empty() {
            link.stalled[to].push((channel, msg));
            return;
        }
        let open = match channel {
            Channel::Packets => link.open[to].1,
            Channel::Control | Channel::Pages | Channel::Dial => link.open[to].0,
        };
        let Some(msg) = self.over_streams(n, to, channel, msg) else {
            return;
        };
        if open {
            let inc = self.links[n].ends[to];
            self.host_event(self.now, to, inc, HostEvent::Link(n, channel, msg));
        }
    }

    pub(super) fn heal(&mut self, n: usize, to: usize) {
        self.links[n].cut[to] = false;
        for (channel, msg) in std::mem::take(&mut self.links[n].stalled[to]) {
            self.arrive(n, to, channel, msg);
        }
    }

    /// One end closes its sockets.
    pub fn close(&mut self, link: usize, host: usize, with_packets: bool) {
        let open = &mut self.links[link].open[host];
        let told = !open.0;
        *open = (false, open.1 && !with_packets);
        if !told {
            self.link_send(link, host, Channel::Control, LinkMsg::Down);
            self.link_send(link, host, Channel::Packets, LinkMsg::Down);
        }
    }

    /// A fresh secondary starts beside a primary that has none.
    pub(super) fn join(&mut self) {
        if self.plan.respawn {
            self.later(50_000, Event::Join);
        }
        let waits = |host: &Host| host.process.as_ref().is_some_and(Process::wants_secondary);
        let Some(primary) = (0..2).find(|&n| waits(&self.hosts[n])) else {
            return;
        };
        let host = 1 - primary;
        if self.hosts[host].process.is_some() || self.hosts[host].may_start_us > self.now {
            return;
        }
        self.incarnations += 1;
        let inc = self.incarnations;
        self.hosts[host].process = Some(Process::secondary(&self.plan, inc, host));
        self.hosts[host].paused_until_us = 0;
        self.hosts[host].gap_us = 0;
        let mut ends = [inc; 2];
        ends[primary] = self.hosts[primary].process.as_ref().map_or(0, |p| p.inc);
        self.links.push(Link::new(ends, self.plan.link.clone()));
        let link = self.links.len() - 1;
        self.outcome.joins += 1;
        self.trace(|| format!("{} starts as secondary {inc}", NAMES[host]));
        self.link_send(link, 0, Channel::Control, LinkMsg::Up);
        self.link_send(link, 1, Channel::Control, LinkMsg::Up);
    }
}
