//! What goes to the guest: frames from the NIC, their mirroring, and the secondary's word on them.
//!
//! Invariants: input is mirrored in the order in which the PVM got it (rule 4); what the guest
//! acknowledges leaves only when the secondary keeps it (rule 5).

use super::PrimaryPath;
use crate::action::Action;
use crate::flow::{Direction, FlowKey};
use crate::frames::{Frames, Token};
use crate::policy::Opener;
use crate::table::{FlowId, seen};
use crate::wire::Packet;
use crate::wire::tcp::{ACK, FIN, RST};

impl PrimaryPath {
    /// Takes a frame from the NIC and gives it back in the guest's space, to be put in guest_rx.
    pub fn handle_nic<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: Token,
    ) -> Token {
        let retains_nothing = self.inherited.retains_nothing();
        if self.client.len() == 0 && retains_nothing {
            return token;
        }
        self.client.expire(now_us);
        let mut packet = self.parse(frames, &token, Direction::ToGuest);
        let header = frames.header_mut(&token);
        let learnt = self.client.inbound(now_us, header, &mut packet);
        if !retains_nothing {
            self.inherited.heard(header, &packet);
        }
        if learnt && self.paired {
            self.note_learnt(now_us, frames, packet.key);
        }
        token
    }

    /// The frame has been put in guest_rx: in a pair it is mirrored, in this order (rule 4).
    /// Frames that the full ring did not take are the shell's to release.
    pub fn handle_delivered<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        token: Token,
    ) {
        let packet = self.parse(frames, &token, Direction::ToGuest);
        if let Some(tcp) = packet.tcp.filter(|tcp| tcp.has(RST)) {
            self.inherited.reset(&packet.key, tcp.seq, frames);
        }
        if !self.paired || self.buffering {
            frames.release(token);
            return;
        }
        self.input_seq += 1;
        if let Some(id) = self.place(now_us, frames, &packet, Opener::Peer) {
            self.note_input(now_us, frames, id, &packet);
        }
        self.ledger.stats.mirrored += 1;
        self.ledger.act(Action::Mirror {
            epoch: self.epoch,
            input_seq: self.input_seq - self.session_base,
            token,
        });
    }

    fn note_input<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        id: FlowId,
        packet: &Packet,
    ) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.use_now(now_us, 0);
        flow.last_input_seq = self.input_seq;
        let Some(tcp) = packet.tcp else { return };
        if tcp.flags & (FIN | RST) != 0 {
            flow.seen |= seen::PEER_CLOSED;
        }
        if tcp.has(ACK) {
            flow.acknowledged(tcp.ack, &mut self.ledger, frames);
            if !flow.held.is_empty() {
                self.pump(now_us, frames, id);
            }
        }
    }

    /// The secondary keeps all input up to this number (rule 5).
    pub fn handle_input_ack<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        up_to: u64,
    ) {
        let up_to = up_to.saturating_add(self.session_base);
        if up_to > self.input_ack && up_to <= self.input_seq {
            self.input_ack = up_to;
            self.pump_waiting(now_us, frames);
        }
    }

    /// Input that this host inherited at its takeover, to be put in guest_rx before anything from
    /// the NIC; afterwards [`PrimaryPath::handle_delivered`] or [`PrimaryPath::undelivered`].
    pub fn poll_deliver<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
    ) -> Option<Token> {
        self.inherited
            .poll_deliver(now_us, &self.limits, &mut self.ledger.stats, frames)
    }

    /// The full guest_rx did not take what [`PrimaryPath::poll_deliver`] gave.
    pub fn undelivered(&mut self, token: Token) {
        self.inherited.undelivered(token);
    }

    /// A handshake that is learnt while a secondary follows: the flow's output waits for a commit,
    /// because a takeover before it would have to learn the same again, from the same first ACK.
    fn note_learnt<F: Frames + ?Sized>(&mut self, now_us: u64, frames: &mut F, key: FlowKey) {
        self.learnt.push((self.epoch, key));
        if self.epoch == self.comparing && !self.frozen {
            self.hold_until_commit(now_us, frames, key);
        }
    }
}
