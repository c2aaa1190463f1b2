//! The clients' network: a switch that learns where the guest is, with loss, repetition and reordering until it calms down.
//!
//! Invariant: the *one voice* checker stands where frames leave a host.

use colo_compare::testing::GUEST_MAC;
use colo_compare::{Direction, Protocol, wire};

use super::*;
use crate::client::addressee;

impl World {
    pub(super) fn plan_client(&mut self, n: usize) {
        let at = self.tcp[n].deadline().unwrap_or(u64::MAX).max(self.now);
        if at < self.tcp_at[n] {
            self.tcp_at[n] = at;
            self.at(at, Event::Client(n));
        }
    }

    pub(super) fn run_client(&mut self, n: usize) {
        if self.tcp_at[n] <= self.now {
            self.tcp_at[n] = u64::MAX;
        }
        let mut out = Vec::new();
        self.tcp[n].wake(self.now, &mut self.oracle, &mut out);
        self.client_frames(out);
        self.plan_client(n);
    }

    pub(super) fn plan_datagrams(&mut self, n: usize) {
        let at = self.datagrams[n]
            .deadline()
            .unwrap_or(u64::MAX)
            .max(self.now);
        if at < self.datagrams_at[n] {
            self.datagrams_at[n] = at;
            self.at(at, Event::Datagrams(n));
        }
    }

    pub(super) fn run_datagrams(&mut self, n: usize) {
        if self.datagrams_at[n] <= self.now {
            self.datagrams_at[n] = u64::MAX;
        }
        let mut out = Vec::new();
        self.datagrams[n].wake(self.now, &self.oracle, &mut out);
        self.client_frames(out);
        self.plan_datagrams(n);
    }

    fn client_frames(&mut self, frames: Vec<Vec<u8>>) {
        for frame in frames {
            for delay in self.transit() {
                self.later(delay, Event::ToGuest(frame.clone()));
            }
        }
    }

    /// When the copies of a frame arrive, after now.
    fn transit(&mut self) -> Vec<u64> {
        let (net, chance) = (&self.plan.net, &mut self.chance);
        let calm = self.now > self.plan.calm_us;
        let mut delay = net.delay_us + chance.below(net.jitter_us + 1);
        if calm {
            return vec![delay];
        }
        if chance.chance(net.loss) {
            return Vec::new();
        }
        if chance.chance(net.reorder) {
            delay += chance.below(20_000);
        }
        if chance.chance(net.duplicate) {
            return vec![delay, delay + chance.below(30_000)];
        }
        vec![delay]
    }

    pub(super) fn reach_guest(&mut self, frame: Vec<u8>) {
        self.trace(|| format!("in {}", show(&frame)));
        let ports = match self.guest_port {
            Some(host) => host..=host,
            None => 0..=1,
        };
        for host in ports {
            let event = HostEvent::Frame(frame.clone());
            self.host_event(self.now, host, 0, event);
        }
    }

    /// A frame leaves a host's NIC: the *one voice* checker stands here.
    pub fn nic_frame(&mut self, host: usize, frame: &[u8]) {
        let speaks = self.record.holder == NAMES[host];
        // What the comparator or the lease let go just before the word of the arbiter.
        let residue_us = self.plan.timing.detection_us() * 5 / 4 + 5_000;
        let lost = self.hosts[host].lost_holder_us;
        if !speaks && lost.is_none_or(|at| self.now > at + residue_us) {
            let holder = &self.record.holder;
            let text = format!(
                "{} sends, {holder} holds since {lost:?}: {}",
                NAMES[host],
                show(frame)
            );
            self.fail("one voice", text);
        }
        if frame[6..12] == GUEST_MAC {
            self.guest_port = Some(host);
        }
        for delay in self.transit() {
            self.later(delay, Event::ToClients(frame.to_vec()));
        }
    }

    pub(super) fn reach_clients(&mut self, frame: &[u8]) {
        let Some((protocol, port)) = addressee(frame, &mut self.oracle) else {
            return;
        };
        match protocol {
            Protocol::Tcp => {
                if let Some(n) = self.tcp.iter().position(|c| c.owns(port)) {
                    self.tcp[n].receive(self.now, frame, &mut self.oracle);
                    self.run_client(n);
                }
            }
            Protocol::Udp => {
                if let Some(n) = self.datagrams.iter().position(|c| c.owns(port)) {
                    self.datagrams[n].receive(frame, &mut self.oracle);
                    self.run_datagrams(n);
                }
            }
            _ => self.datagrams.iter_mut().for_each(|c| c.pong(port)),
        }
    }
}

/// A frame in a line.
pub fn show(frame: &[u8]) -> String {
    let direction = if frame[6..12] == GUEST_MAC {
        Direction::FromGuest
    } else {
        Direction::ToGuest
    };
    let packet = wire::parse(frame, frame.len(), direction);
    let tcp = packet.tcp.map(|t| {
        format!(
            " seq {:x} ack {:x} flags {:02x} len {}",
            t.seq, t.ack, t.flags, t.payload_len
        )
    });
    let ts = packet.tcp.and_then(|t| t.timestamps(frame));
    let ts = ts.map(|(val, ecr)| format!(" ts {val:x} {ecr:x}"));
    let ends = format!(
        "{direction:?} {:?} {} {}:{}",
        packet.key.protocol(),
        packet.key.guest_port(),
        packet.key.peer(),
        packet.key.peer_port()
    );
    format!(
        "{ends}{}{}",
        tcp.unwrap_or_default(),
        ts.unwrap_or_default()
    )
}
