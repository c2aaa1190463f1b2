//! The datagram side of the packet channel: which transport carries what this end says, and when TCP does again.
//!
//! ```text
//!   TCP ──offers──> TCP, probing ──answer──> datagrams ──silence, though TCP answers──> TCP, probing again later
//! ```
//!
//! Each direction moves on its own. A mark in the TCP stream says from which unit on datagrams carry it; when TCP carries it
//! again, the units that were not acknowledged come first, with their numbers, and a mark ends them. So no message is lost,
//! repeated or reordered by a move.
//!
//! Invariants: units go as datagrams only after a datagram as long as any has been answered, and only while TCP is heard: a
//! host that is cut off for the control channel is cut off for packets, too (rule 18). A transport is given up when the peer
//! has answered over TCP, after each of [`SILENCES`] timeouts, and nothing was heard by datagrams: a peer that has no
//! processor for a while gets its turns, and a few lost datagrams are no broken path. What may come by another shard,
//! which another worker looks at, has longer.
//!
//! Does not interpret messages.

pub(super) mod crossing;
mod probing;

use std::ops::Range;

use colo_compare::Token;

use super::datagram::{HEADER_BYTES, Kind};
use super::heard::PeerHeard;
use super::msg::{HEAD_BYTES, Head};
use super::offer::{self, Offer};
use super::port::{DatagramPort, PortKind, Slot};
use super::reliable::{Heard, RECEIVE_WINDOW, RING_BYTES, Reliable, UNITS_MAX};
use super::stats::LinkStats;
use super::stream::Stream;
use crate::frame::FramePool;
use crate::nic::Nic;
use crossing::Crossing;
use probing::Probing;
#[cfg(test)]
pub(super) use probing::{HEALTHY_US, REST_MAX_US, REST_MIN_US};

/// Kinds of messages between the two link layers; unknown to earlier versions, which skip them.
pub(super) mod kind {
    /// Transports of this end.
    pub(in crate::link) const OFFER: u8 = 16;
    /// From here on units, `seq` the first.
    pub(in crate::link) const TO_UNITS: u8 = 17;
    /// Unit `seq`; `epoch` 1: the message goes on in the next.
    pub(in crate::link) const UNIT: u8 = 18;
    /// From here on messages again; `seq` the number that the next unit will have.
    pub(in crate::link) const TO_STREAM: u8 = 19;
    /// Is anybody there?
    pub(in crate::link) const PING: u8 = 20;
    /// Yes; `seq` of the question.
    pub(in crate::link) const PONG: u8 = 21;
}

/// While nothing may be said, it is looked this often whether that has ended: nobody is woken for what the control
/// channel hears.
const SILENT_LOOKS_US: u64 = 5_000;
/// Questions over TCP while one answer is good.
const PINGS_PER_PATIENCE: u64 = 3;
/// Timeouts after which the peer answered over TCP and not by datagrams, before TCP carries them.
const SILENCES: u32 = 4;
/// So long datagrams that may come by another shard are not answered though TCP is, before TCP carries them.
const CROSSING_SILENCE_US: u64 = 50_000;
/// Datagrams taken from a transport at a time.
const RECEIVE_MAX: usize = 256;
/// What pushes beyond [`Datagrams::has_room`] find room in without more memory.
const OVERFLOW_BYTES: usize = 1 << 20;
/// What goes back to TCP at most, without more memory.
pub(super) const TAKEN_BACK_MAX: usize = RING_BYTES + OVERFLOW_BYTES + (UNITS_MAX + 2) * HEAD_BYTES;

static ZEROS: [u8; 1 << 14] = [0; 1 << 14];

/// Since datagrams were heard last.
#[derive(Debug, Default)]
struct Silence {
    /// The question that is open, and after which timeout it was asked.
    ping: Option<u64>,
    round: u32,
    /// Questions that were answered, and when the first of them was.
    answered: u32,
    answered_us: u64,
}

#[derive(Debug)]
pub(super) struct Datagrams {
    ports: Vec<Box<dyn DatagramPort>>,
    pub(super) core: Reliable,
    /// Transports that both ends have, as indices of `ports` and longest payloads, the best first.
    common: Vec<(usize, usize)>,
    peer_window: u16,
    /// What carries what this end says; `None`: TCP.
    carrier: Option<usize>,
    /// Where the peer was heard last: acknowledgements go there.
    heard_on: Option<usize>,
    probing: Probing,
    /// A transport whose probe was answered.
    confirmed: Option<usize>,
    /// What was asked over TCP because datagrams are not answered.
    silence: Silence,
    /// The last question over TCP, and the last answer.
    pings: u64,
    pong: u64,
    next_ping_us: u64,
    /// Looks at the transports, and how many there had been when the answer came.
    looks: u64,
    pong_looks: u64,
    /// When TCP was heard last, and how long that is good for.
    stream_heard_us: u64,
    patience_us: u64,
    /// Where the peer is heard, too.
    pub(super) control: Option<PeerHeard>,
    /// TCP was silent for too long: nothing was sent since.
    silenced: bool,
    /// When that was looked at last.
    silence_looked_us: u64,
    /// Messages that found no room, in order.
    overflow: Vec<u8>,
    /// With several shards.
    pub(super) crossing: Option<Crossing>,
    pub(super) stats: LinkStats,
}

impl Datagrams {
    pub(super) fn new(ports: Vec<Box<dyn DatagramPort>>, key: u64, patience_us: u64) -> Self {
        Self {
            ports,
            core: Reliable::new(key),
            common: Vec::new(),
            peer_window: 0,
            carrier: None,
            heard_on: None,
            probing: Probing::new(),
            confirmed: None,
            silence: Silence::default(),
            pings: 0,
            pong: 0,
            next_ping_us: 0,
            looks: 0,
            pong_looks: 0,
            stream_heard_us: 0,
            patience_us,
            control: None,
            silenced: false,
            silence_looked_us: 0,
            overflow: Vec::with_capacity(OVERFLOW_BYTES),
            crossing: None,
            stats: LinkStats::default(),
        }
    }

    /// Tells the peer what there is.
    pub(super) fn offer(&self, stream: &mut Stream) {
        let body = offer::encode(self.core.our_key(), RECEIVE_WINDOW as u16, &self.ports);
        say(stream, kind::OFFER, 0, 0, &body);
    }

    /// The peer's offer has come.
    pub(super) fn take_offer(&mut self, now_us: u64, offer: &Offer) {
        self.core.set_peer_key(offer.key);
        self.peer_window = offer.window;
        self.common.clear();
        for (index, port) in self.ports.iter_mut().enumerate() {
            let kind = port.address().kind();
            let theirs = |t: &&offer::Offered| t.address.kind() == kind;
            let Some(theirs) = offer.transports.iter().find(theirs) else {
                continue;
            };
            let mtu = port.mtu().min(theirs.mtu).min(ZEROS.len());
            // Less is no Ethernet.
            if let Some(payload_max) = mtu.checked_sub(HEADER_BYTES).filter(|len| *len >= 256) {
                port.set_peer(theirs.address);
                self.common.push((index, payload_max));
            }
        }
        let ports = &self.ports;
        self.common
            .sort_by_key(|(index, _)| std::cmp::Reverse(ports[*index].address().kind()));
        self.probing.begin(now_us);
    }

    /// Whether units, not messages in the stream, carry what this end says.
    pub(super) fn carries(&self) -> bool {
        self.carrier.is_some()
    }

    /// What carries it.
    pub(super) fn carrier(&self) -> Option<PortKind> {
        self.carrier.map(|index| self.ports[index].address().kind())
    }

    /// Takes a message to say.
    pub(super) fn push(&mut self, head: &[u8], body: &[u8]) {
        if !self.overflow.is_empty() || !self.core.sender.push(head, body) {
            self.stats.overflowed += 1;
            self.overflow.extend_from_slice(head);
            self.overflow.extend_from_slice(body);
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.overflow.is_empty() && self.core.sender.has_room()
    }

    /// True while something is kept back only because a transport has no room.
    pub(super) fn has_unsent(&self) -> bool {
        self.carrier.is_some() && self.core.sender.can_send()
    }

    /// A question over TCP was answered.
    pub(super) fn take_pong(&mut self, now_us: u64, answered: u64) {
        self.pong = answered;
        self.pong_looks = self.looks;
        self.look_for_silence(now_us);
        self.stream_heard_us = now_us;
        self.look_for_silence(now_us);
    }

    /// When the peer was heard last over TCP, here or on the control channel.
    fn heard_us(&self) -> u64 {
        let control_us = self.control.as_ref().map_or(0, PeerHeard::last_us);
        self.stream_heard_us.max(control_us)
    }

    /// Whether datagrams may be sent, as far as TCP says (rule 18).
    fn look_for_silence(&mut self, now_us: u64) -> bool {
        self.silence_looked_us = now_us;
        let silent = self.carrier.is_some() && now_us >= self.heard_us() + self.patience_us;
        if std::mem::replace(&mut self.silenced, silent) && !silent {
            // Datagrams were not even sent: that they were not answered says nothing about them.
            self.core.sender.heard();
            self.silence = Silence::default();
        }
        !silent
    }

    /// Takes what has come. True if there was anything.
    pub(super) fn fill(&mut self, now_us: u64) -> bool {
        let mut any = false;
        self.looks += 1;
        while let Some((index, slot)) = self.next_arrived() {
            any = true;
            self.take_datagram(now_us, index, slot);
        }
        for index in 0..self.ports.len() {
            if self.is_sorted(index) {
                continue;
            }
            self.ports[index].look();
            for _ in 0..RECEIVE_MAX {
                let Some(slot) = self.ports[index].receive() else {
                    break;
                };
                any = true;
                self.take_datagram(now_us, index, slot);
            }
        }
        any
    }

    fn take_datagram(&mut self, now_us: u64, index: usize, slot: Slot) {
        let bytes = self.ports[index].bytes(&slot);
        self.stats.datagrams_received += 1;
        self.stats.received_bytes += bytes.len() as u64;
        let (heard, unused) = self.core.handle(now_us, index, slot, bytes);
        if let Some(slot) = unused {
            self.ports[index].release(slot);
        }
        match heard {
            Heard::Dropped => {}
            Heard::Peer => {
                self.heard_on = Some(index);
                self.silence = Silence::default();
                self.probing.heard(now_us);
            }
            // Without the peer's offer there is no key to answer with; it asks again.
            Heard::Probe(_) if self.common.is_empty() => {}
            Heard::Probe(question) => {
                self.heard_on.get_or_insert(index);
                let head = self.core.probe(Kind::ProbeAnswer, question, &[]);
                self.send(index, &head, &[]);
                self.ports[index].flush();
            }
            Heard::ProbeAnswer(question) => {
                if self.probing.is_valid(question) {
                    self.confirmed = Some(index);
                }
            }
        }
    }

    /// Where a transport receives.
    #[cfg(test)]
    pub(super) fn address(&self, port: usize) -> super::port::PortAddress {
        self.ports[port].address()
    }

    /// When the next question about a transport is due.
    #[cfg(test)]
    pub(super) fn next_probe_us(&self) -> u64 {
        self.probing.due_us()
    }

    /// A transport receives nothing any more.
    #[cfg(test)]
    pub(super) fn stop_receiving(&mut self, port: usize) {
        self.ports[port].stop_receiving();
    }

    /// What was received in a slot.
    pub(super) fn bytes(&self, port: usize, slot: &Slot) -> &[u8] {
        self.ports[port].bytes(slot)
    }

    /// Gives a slot back.
    pub(super) fn release(&mut self, port: usize, slot: Slot) {
        self.ports[port].release(slot);
    }

    /// Lets the transports take slots of the pool that they lack; one through the guest's NIC takes what has come there.
    pub(super) fn take_in(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) {
        self.ports
            .iter_mut()
            .for_each(|port| port.take_in(nic, frames));
    }

    /// Whether a transport has what has come only after [`Self::take_in`].
    pub(super) fn shares_nic(&self) -> bool {
        self.ports.iter().any(|port| port.shares_nic())
    }

    /// Whether what was flushed leaves with [`Self::hand_over`].
    pub(super) fn has_written(&self) -> bool {
        self.ports.iter().any(|port| port.has_written())
    }

    /// A transport through the guest's NIC gives it what is to leave. True: it has no room for all of it now.
    pub(super) fn hand_over(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) -> bool {
        let mut waits = false;
        for port in &mut self.ports {
            waits |= port.hand_over(nic, frames);
        }
        waits
    }

    /// Makes a part of what was received a frame where it lies.
    pub(super) fn adopt(
        &mut self,
        port: usize,
        slot: Slot,
        range: Range<usize>,
        frames: &mut FramePool,
    ) -> Result<Token, Slot> {
        self.ports[port].adopt(slot, range.start, range.len(), frames)
    }

    /// Gives all slots of the pool back. Nothing is sent or received any more.
    pub(super) fn leave(&mut self, frames: &mut FramePool) {
        self.forget_arrived();
        self.ports.iter_mut().for_each(|port| port.leave(frames));
    }

    /// Sends what may be sent; moves to datagrams or back to TCP when that is due.
    pub(super) fn flush(&mut self, now_us: u64, stream: &mut Stream) {
        self.core.handle_timeout(now_us);
        let alive = self.look_for_silence(now_us);
        self.probe(now_us);
        self.move_over(now_us, stream);
        self.move_back(now_us, stream);
        self.ask_stream(now_us, stream);
        self.drain_overflow();
        let Some(index) = self.carrier.or(self.heard_on).filter(|_| alive) else {
            return self.flush_ports();
        };
        while self.ports[index].has_room() {
            let Some(outgoing) = self.core.poll(now_us) else {
                break;
            };
            self.stats.datagrams_sent += 1;
            self.stats.sent_bytes += (HEADER_BYTES + outgoing.payload.len()) as u64;
            self.ports[index].send(&outgoing.head, outgoing.payload);
        }
        self.flush_ports();
    }

    fn flush_ports(&mut self) {
        for port in &mut self.ports {
            port.flush();
        }
    }

    pub(super) fn deadline_us(&self) -> Option<u64> {
        let probing = self.carrier.is_none() && !self.common.is_empty();
        let probe_us = match probing {
            true => Some(self.probing.due_us()),
            false => self.ping_due_us(),
        };
        let core_us = match self.silenced {
            true => Some(self.silence_looked_us + SILENT_LOOKS_US),
            false => self.core.deadline_us(),
        };
        [probe_us, core_us].into_iter().flatten().min()
    }

    pub(super) fn poll_fds(&self, fds: &mut Vec<libc::pollfd>) {
        self.ports.iter().for_each(|port| port.poll_fds(fds));
    }

    /// The counters, complete.
    pub(super) fn stats(&self) -> LinkStats {
        let sender = &self.core.sender;
        let dropped = &self.core.dropped;
        LinkStats {
            retransmitted: sender.stats.retransmitted,
            timeouts: sender.stats.timeouts,
            split: sender.stats.split,
            rtt_us: sender.smoothed_us(),
            truncated: dropped.truncated,
            foreign: dropped.foreign,
            damaged: dropped.damaged,
            duplicates: dropped.duplicate,
            out_of_window: dropped.beyond,
            send_errors: self.ports.iter().map(|port| port.errors()).sum(),
            receive_drops: self.ports.iter().map(|port| port.receive_drops()).sum(),
            pool_refusals: self.ports.iter().map(|port| port.pool_refusals()).sum(),
            datagram_calls: self.ports.iter().map(|port| port.calls()).sum(),
            wake_ups_asked: self.ports.iter().map(|port| port.wake_ups().asked).sum(),
            wake_ups_in_vain: self.ports.iter().map(|port| port.wake_ups().in_vain).sum(),
            ..self.stats
        }
    }

    /// Asks whether a transport works, when it is time.
    fn probe(&mut self, now_us: u64) {
        if self.carrier.is_some() {
            return;
        }
        let Some((transport, question)) = self.probing.ask(now_us, self.common.len()) else {
            return;
        };
        let (index, payload_max) = self.common[transport];
        let padding = &ZEROS[..payload_max];
        let head = self.core.probe(Kind::Probe, question, padding);
        self.send(index, &head, padding);
    }

    /// To datagrams, once a probe was answered.
    fn move_over(&mut self, now_us: u64, stream: &mut Stream) {
        let Some(index) = self.confirmed.take().filter(|_| self.carrier.is_none()) else {
            return;
        };
        let Some(&(_, payload_max)) = self.common.iter().find(|(i, _)| *i == index) else {
            return;
        };
        let kind = self.ports[index].address().kind();
        tracing::info!("packet channel: over {} from now on", kind.name());
        say(
            stream,
            kind::TO_UNITS,
            0,
            self.core.sender.next_number(),
            &[],
        );
        self.core.sender.begin(payload_max, self.peer_window);
        self.carrier = Some(index);
        self.silence = Silence::default();
        self.probing.carries(now_us);
        self.stream_heard_us = now_us;
        self.next_ping_us = now_us;
    }

    /// Whether the peer answers over TCP and not by datagrams. One question follows each timeout.
    fn is_silent(&mut self, now_us: u64) -> bool {
        let rounds = self.core.sender.rounds();
        let silence = &mut self.silence;
        // The peer says the same over datagrams before it answers over TCP: that is looked for once more.
        let has_looked = self.looks > self.pong_looks;
        if silence.ping.is_some_and(|ping| self.pong >= ping) && has_looked {
            if silence.answered == 0 {
                silence.answered_us = now_us;
            }
            silence.answered += 1;
            silence.ping = None;
        }
        if silence.ping.is_none() && rounds > silence.round {
            silence.ping = Some(self.pings + 1);
            silence.round = rounds;
            self.next_ping_us = now_us;
        }
        // With several shards that says only what the worker of one does; datagrams wait for others, too.
        let patience_us = if self.crossing.is_some() {
            CROSSING_SILENCE_US
        } else {
            0
        };
        silence.answered >= SILENCES && now_us >= silence.answered_us + patience_us
    }

    /// Back to TCP, when the peer answers there and is not heard here.
    fn move_back(&mut self, now_us: u64, stream: &mut Stream) {
        let Some(index) = self.carrier else { return };
        if self.core.sender.rounds() == 0 || !self.is_silent(now_us) {
            return;
        }
        let name = self.ports[index].address().kind().name();
        tracing::warn!(
            "packet channel: datagrams over {name} are not answered, TCP is; going on over TCP"
        );
        self.stats.fallbacks += 1;
        self.core.sender.take_back(|number, more, bytes| {
            say(stream, kind::UNIT, u64::from(more), number, bytes);
        });
        say(
            stream,
            kind::TO_STREAM,
            0,
            self.core.sender.next_number(),
            &[],
        );
        stream.push(&self.overflow, &[]);
        self.overflow.clear();
        self.carrier = None;
        self.probing.given_up(now_us);
    }

    /// When the peer is to be asked over TCP. Where it is heard on the control channel, only if it is not answering.
    fn ping_due_us(&self) -> Option<u64> {
        self.carrier?;
        let Some(control) = self
            .control
            .as_ref()
            .filter(|_| self.silence.ping.is_none())
        else {
            return Some(self.next_ping_us);
        };
        let quiet_us = control.last_us() + self.patience_us / PINGS_PER_PATIENCE;
        let sends = self.core.sender.is_busy() || !self.overflow.is_empty();
        sends.then(|| self.next_ping_us.max(quiet_us))
    }

    /// Whether TCP still works is to be known while nothing else goes over it.
    fn ask_stream(&mut self, now_us: u64, stream: &mut Stream) {
        if self.ping_due_us().is_some_and(|due_us| due_us <= now_us) {
            self.pings += 1;
            self.next_ping_us = now_us + self.patience_us / PINGS_PER_PATIENCE;
            say(stream, kind::PING, 0, self.pings, &[]);
        }
    }

    fn drain_overflow(&mut self) {
        if self.carrier.is_none() || self.overflow.is_empty() {
            return;
        }
        let mut at = 0;
        while let Ok(Some(head)) = Head::read(&self.overflow[at..]) {
            let end = at + HEAD_BYTES + head.len;
            if !self.core.sender.push(&self.overflow[at..end], &[]) {
                break;
            }
            at = end;
        }
        self.overflow.drain(..at);
    }

    fn send(&mut self, index: usize, head: &[u8], payload: &[u8]) {
        if self.ports[index].send(head, payload) {
            self.stats.datagrams_sent += 1;
            self.stats.sent_bytes += (head.len() + payload.len()) as u64;
        }
    }
}

/// Puts a message of the link layers into the stream.
pub(super) fn say(stream: &mut Stream, kind: u8, epoch: u64, seq: u64, body: &[u8]) {
    let len = body.len();
    let head = Head {
        kind,
        epoch,
        seq,
        len,
    };
    stream.push(&head.to_bytes(), body);
}
