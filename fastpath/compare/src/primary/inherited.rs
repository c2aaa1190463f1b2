//! Input that a new primary took over from its time as secondary: not delivered yet, or not
//! acknowledged by the guest yet (rule 5).
//!
//! Invariants: undelivered input comes first and in order; all of it is in the guest's space; the
//! memory is the secondary's, no more is taken.

use alloc::collections::VecDeque;

use crate::flow::{Direction, FlowKey};
use crate::frames::{Frames, Token};
use crate::limits::Limits;
use crate::retain::Retain;
use crate::secondary::Queued;
use crate::stats::PrimaryStats;
use crate::wire::tcp::{ACK, RST};
use crate::wire::{self, Packet, Tcp};

#[derive(Debug, Default)]
pub(crate) struct Inherited {
    /// Copies that have a kept original, or need none.
    ready: Option<Token>,
    queue: VecDeque<Queued>,
    retain: Retain,
}

impl Inherited {
    pub(crate) fn new(ready: Option<Token>, queue: VecDeque<Queued>, retain: Retain) -> Self {
        Self {
            ready,
            queue,
            retain,
        }
    }

    pub(super) fn poll_deliver<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        limits: &Limits,
        stats: &mut PrimaryStats,
        frames: &mut F,
    ) -> Option<Token> {
        if let Some(token) = self.ready.take() {
            return Some(token);
        }
        let Some(queued) = self.queue.pop_front() else {
            let retain = &mut self.retain;
            let copy = retain.poll_due(now_us, limits.redeliver_us, frames)?;
            stats.redelivered += 1;
            return Some(copy);
        };
        let Queued {
            epoch,
            input_seq,
            token,
        } = queued;
        let packet = wire::parse(
            frames.header(&token),
            frames.len(&token),
            Direction::ToGuest,
        );
        let kept = packet.tcp.filter(|tcp| tcp.takes_space() && !tcp.has(RST));
        let Some(tcp) = kept else {
            self.heard(frames.header(&token), &packet);
            return Some(token);
        };
        let due_us = now_us + limits.redeliver_us;
        match self.retain.keep(frames, packet.key, &tcp, token, due_us) {
            Ok(copy) => Some(copy),
            Err(token) => {
                self.queue.push_front(Queued {
                    epoch,
                    input_seq,
                    token,
                });
                None
            }
        }
    }

    /// Whether nothing waits for the guest's acknowledgement.
    #[inline]
    pub(super) fn retains_nothing(&self) -> bool {
        self.retain.len() == 0
    }

    pub(super) fn undelivered(&mut self, token: Token) {
        self.ready = Some(token);
    }

    /// Takes note of a packet of the peer, in the guest's space.
    pub(super) fn heard(&mut self, header: &[u8], packet: &Packet) {
        if let Some(tcp) = packet.tcp {
            self.retain.heard(&packet.key, header, &tcp);
        }
    }

    #[inline(always)]
    pub(super) fn guest_sent<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        limits: &Limits,
        packet: &Packet,
        frames: &mut F,
    ) {
        let Some(tcp) = packet.tcp.filter(|_| !self.retains_nothing()) else {
            return;
        };
        self.segment_sent(now_us, limits, (&packet.key, &tcp), frames);
    }

    #[cold]
    fn segment_sent<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        limits: &Limits,
        (key, tcp): (&FlowKey, &Tcp),
        frames: &mut F,
    ) {
        if tcp.has(RST) {
            self.retain.forget(key, frames);
        } else if tcp.has(ACK) {
            self.retain
                .covered(now_us, limits.redeliver_us, key, tcp.ack, frames);
        }
    }

    /// The peer reset the connection with this sequence number.
    pub(super) fn reset<F: Frames + ?Sized>(&mut self, key: &FlowKey, seq: u32, frames: &mut F) {
        self.retain.reset(key, seq, frames);
    }

    pub(super) fn next_due_us(&self) -> Option<u64> {
        if self.ready.is_some() || !self.queue.is_empty() {
            return Some(0);
        }
        self.retain.next_due_us()
    }

    pub(super) fn close<F: Frames + ?Sized>(&mut self, frames: &mut F) {
        self.ready
            .take()
            .into_iter()
            .for_each(|token| frames.release(token));
        self.queue
            .drain(..)
            .for_each(|queued| frames.release(queued.token));
        self.retain.clear(frames);
    }
}
