//! One queue of the NIC: its socket, and which slots the kernel has.
//!
//! Invariants: a slot is in at most one of: the pool, a ring, the hands of a token's holder; the
//! table of uses says which ring; a frame comes up whole or not at all. The pieces of one frame
//! complete one after the other (af_xdp.rst, multi-buffer). The first of them tells the frame: by the slot
//! that it lies in, or, where a frame begins in the guest, by its place among those under way.
//!
//! Does not know programs, links or modes.

use std::collections::VecDeque;
use std::io;

use colo_compare::{Frames, Token};

use crate::frame::FramePool;
use crate::nic::share::LinkFrame;
use crate::ring::xsk::{Descriptor, Kick, Received, Rx, TxRing, XskReceiver, XskSocket, kick_all};

use super::stats::XdpNicStats;
use super::strays::Strays;

/// Most pieces of a frame: the kernel's limit is MAX_SKB_FRAGS (17) and the first.
pub(super) const PIECES_MAX: usize = 16;

/// System calls for one batch at most; in copy mode each sends up to 32 frames.
const KICKS_MAX: u32 = 32;

/// Where a slot is.
#[derive(Debug, Default)]
pub(super) enum Use {
    /// Not in a ring.
    #[default]
    Elsewhere,
    /// Lent to the fill ring of this queue, or received and not taken yet.
    Lent(u32),
    /// Sent from, by this queue, in so many pieces.
    Sent(u32, Token, u32),
}

/// A bound queue.
#[derive(Debug)]
pub(super) struct Queue {
    /// For the link's frames, out of the same fill ring. Closed first.
    pub(super) link: Option<XskReceiver>,
    pub(super) socket: XskSocket,
    /// Where the socket's memory starts in the area.
    base: u64,
    /// Slots that the fill ring should have.
    fill_target: u32,
    /// What it should have beside them while the link's frames come, too.
    pub(super) link_chunks: u32,
    lent: u32,
    /// The rest of a frame of the link in several pieces is of no use.
    link_spoilt: bool,
    /// A frame whose last piece has not come.
    partial: Option<Token>,
    /// The frame that is coming is of no use.
    spoilt: bool,
    /// A frame that is completed in part: its slot, and pieces to come.
    completing: Option<(u32, u32)>,
    /// Frames under way that begin in the guest.
    strays: Strays,
    in_flight: u32,
}

impl Queue {
    /// A queue that may have `sends` frames under way at most.
    pub(super) fn new(socket: XskSocket, base: u64, fill_target: u32, sends: usize) -> Self {
        Self {
            link: None,
            socket,
            base,
            fill_target,
            link_chunks: 0,
            lent: 0,
            link_spoilt: false,
            partial: None,
            spoilt: false,
            completing: None,
            strays: Strays::with_capacity(sends),
            in_flight: 0,
        }
    }

    /// Frames that the kernel has not given back.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Slots that the kernel has to receive into.
    pub(super) fn lent(&self) -> u32 {
        self.lent
    }

    /// Lends slots to the kernel up to the target; `spare` stay with the pool.
    pub(super) fn refill(
        &mut self,
        frames: &mut FramePool,
        uses: &mut [Use],
        spare: usize,
    ) -> io::Result<()> {
        let target = self.fill_target + self.link_chunks;
        let wanted = target.saturating_sub(self.lent);
        if wanted == 0 {
            return Ok(());
        }
        let room = self.socket.fill_free(wanted).min(wanted);
        let mut filled = 0;
        while filled < room && frames.free_slots() > spare {
            let Some((slot, offset)) = frames.lend() else {
                break;
            };
            let accepted = self.socket.fill((offset as u64).wrapping_sub(self.base));
            if !matches!(accepted, Ok(true)) || slot as usize >= uses.len() {
                frames.give_back(slot);
                break;
            }
            uses[slot as usize] = Use::Lent(self.socket.queue());
            filled += 1;
        }
        if filled > 0 {
            self.lent += filled;
            self.socket.submit_fill();
            if self.socket.fill_needs_wakeup() {
                self.socket.wake_rx()?;
            }
        }
        Ok(())
    }

    /// The same as [`Self::receive`]. With frames of the link on the queue no more is taken than can be replaced, and that
    /// is done at once: the link needs what is in the fill ring to make room at all.
    pub(super) fn receive_replaced(
        &mut self,
        frames: &mut FramePool,
        uses: &mut [Use],
        out: &mut VecDeque<Token>,
        max: usize,
        stats: &XdpNicStats,
    ) -> usize {
        if self.link_chunks == 0 {
            return self.receive(frames, uses, out, max, stats);
        }
        let lent = self.lent;
        let taken = self.receive(frames, uses, out, max.min(frames.free_slots()), stats);
        let replaced = (lent - self.lent) as usize;
        let spare = frames.free_slots().saturating_sub(replaced);
        // What the kernel does not hear of now it hears of with the next flush.
        let _ = self.refill(frames, uses, spare);
        taken
    }

    /// Takes frames of the link until `out` has `max`.
    pub(super) fn receive_link(
        &mut self,
        frames: &mut FramePool,
        uses: &mut [Use],
        out: &mut VecDeque<LinkFrame>,
        max: usize,
        stats: &XdpNicStats,
    ) {
        let Some(mut link) = self.link.take() else {
            return;
        };
        while out.len() < max {
            let Some(rx) = link.receive() else { break };
            let (piece, more) = match rx {
                Rx::Piece(piece) => (Some(piece), piece.more),
                Rx::Bad { more } => (None, more),
            };
            let is_whole = !std::mem::replace(&mut self.link_spoilt, more) && !more;
            let place = piece.and_then(|piece| self.take_lent(frames, uses, piece));
            match place {
                Some((slot, start, len)) if is_whole => {
                    stats.link_frames.add(1);
                    out.push_back(LinkFrame { slot, start, len });
                }
                dropped => {
                    // Once for all pieces of a frame.
                    stats.link_spoilt_frames.add(u64::from(!more));
                    if let Some((slot, ..)) = dropped {
                        frames.give_back(slot);
                    }
                }
            }
        }
        link.release_rx();
        self.link = Some(link);
    }

    /// Takes whole frames, `max` at most.
    pub(super) fn receive(
        &mut self,
        frames: &mut FramePool,
        uses: &mut [Use],
        out: &mut VecDeque<Token>,
        max: usize,
        stats: &XdpNicStats,
    ) -> usize {
        let mut taken = 0;
        while taken < max {
            let Some(rx) = self.socket.receive() else {
                break;
            };
            let more = match rx {
                Rx::Piece(piece) => {
                    match self.adopt(frames, uses, piece) {
                        Some(token) => self.join(frames, token, stats),
                        None => self.spoil(frames),
                    }
                    piece.more
                }
                Rx::Bad { more } => {
                    self.spoil(frames);
                    more
                }
            };
            if more {
                continue;
            }
            if std::mem::take(&mut self.spoilt) {
                stats.spoilt_frames.add(1);
            } else if let Some(token) = self.partial.take() {
                out.push_back(token);
                taken += 1;
            }
        }
        self.socket.release_rx();
        taken
    }

    /// The slot of a received piece, as a frame of its own.
    fn adopt(
        &mut self,
        frames: &mut FramePool,
        uses: &mut [Use],
        piece: Received,
    ) -> Option<Token> {
        let (slot, start, len) = self.take_lent(frames, uses, piece)?;
        frames.adopt(slot, start, len)
    }

    /// The slot that a received piece lies in, no longer in a ring, and where in it.
    fn take_lent(
        &mut self,
        frames: &FramePool,
        uses: &mut [Use],
        piece: Received,
    ) -> Option<(u32, usize, usize)> {
        let (slot, within) = frames.slot_at(usize::try_from(piece.chunk + self.base).ok()?)?;
        let place = uses.get_mut(slot as usize)?;
        if !matches!(place, Use::Lent(queue) if *queue == self.socket.queue()) || within != 0 {
            return None;
        }
        *place = Use::Elsewhere;
        self.lent -= 1;
        let start = (piece.offset - piece.chunk) as usize;
        Some((slot, start, piece.len as usize))
    }

    /// Puts a piece behind those that came before it.
    fn join(&mut self, frames: &mut FramePool, piece: Token, stats: &XdpNicStats) {
        if self.spoilt {
            frames.release(piece);
            return;
        }
        match self.partial.take() {
            None => self.partial = Some(piece),
            Some(first) => {
                stats.rx_gathered_pieces.add(1);
                if frames.append(&first, piece) {
                    self.partial = Some(first);
                } else {
                    frames.release(first);
                    self.spoilt = true;
                }
            }
        }
    }

    fn spoil(&mut self, frames: &mut FramePool) {
        self.spoilt = true;
        if let Some(token) = self.partial.take() {
            frames.release(token);
        }
    }

    /// Queues a frame whose first piece lies in `slot`, or in the guest, if `slot` is the frame's own. Gives the
    /// token back when there is no room.
    pub(super) fn send(
        &mut self,
        frames: &FramePool,
        uses: &mut [Use],
        slot: u32,
        token: Token,
        pieces: &[Descriptor],
    ) -> Result<(), Token> {
        let count = pieces.len() as u32;
        let Some(place @ Use::Elsewhere) = uses.get_mut(slot as usize) else {
            return Err(token);
        };
        if self.socket.tx_free(count) < count {
            return Err(token);
        }
        for piece in pieces {
            // The caller has made them fit.
            let accepted = self.socket.send(Descriptor {
                offset: piece.offset.wrapping_sub(self.base),
                ..*piece
            });
            debug_assert_eq!(accepted, Ok(true));
        }
        if let Some(first) = pieces.first()
            && slot_at(frames, first.offset).is_none()
        {
            self.strays.add(first.offset, slot);
        }
        *place = Use::Sent(self.socket.queue(), token, count);
        self.in_flight += 1;
        Ok(())
    }

    /// Makes the kernel send what is queued, and takes back what it has sent.
    pub(super) fn push_out(
        &mut self,
        frames: &mut FramePool,
        uses: &mut [Use],
        has_link: bool,
        stats: &XdpNicStats,
    ) -> io::Result<()> {
        if self.in_flight == 0 {
            return Ok(());
        }
        self.socket.submit_tx();
        let mut sending = Sending {
            queue: self,
            frames,
            uses,
            stats,
        };
        let kicks = kick_all(&mut sending, if has_link { KICKS_MAX } else { 0 });
        sending.reap();
        stats.tx_kicks.add(u64::from(kicks.calls));
        stats.tx_kicks_in_vain.add(u64::from(kicks.in_vain));
        stats.tx_dropped_frames.add(u64::from(kicks.dropped));
        kicks.failure.map_or(Ok(()), Err)
    }

    fn reap(&mut self, frames: &mut FramePool, uses: &mut [Use], stats: &XdpNicStats) -> u32 {
        let mut reaped = 0;
        while let Some(offset) = self.socket.complete() {
            reaped += 1;
            let (slot, left) = match self.completing.take() {
                Some((slot, left)) => (slot, left),
                None => match self.sent_from(frames, uses, offset + self.base) {
                    Some((slot, pieces)) => (slot, pieces),
                    None => {
                        stats.strange_completions.add(1);
                        continue;
                    }
                },
            };
            if left > 1 {
                self.completing = Some((slot, left - 1));
            } else if let Use::Sent(_, token, _) = std::mem::take(&mut uses[slot as usize]) {
                frames.release(token);
                self.in_flight -= 1;
            }
        }
        self.socket.release_completions();
        reaped
    }

    /// The frame whose first piece lies at `offset`, and how many pieces it has.
    fn sent_from(&mut self, frames: &FramePool, uses: &[Use], offset: u64) -> Option<(u32, u32)> {
        // Bit 0 may have been lost on the way, which is of the same slot.
        let slot = slot_at(frames, offset).or_else(|| self.strays.take(offset))?;
        match uses.get(slot as usize)? {
            Use::Sent(by, _, pieces) if *by == self.socket.queue() => Some((slot, *pieces)),
            _ => None,
        }
    }

    /// Gives up what is in parts; the slots that the kernel has are found in the table.
    pub(super) fn close(mut self, frames: &mut FramePool) {
        self.spoil(frames);
    }
}

/// A queue while it sends, with all that a completion needs.
struct Sending<'a> {
    queue: &'a mut Queue,
    frames: &'a mut FramePool,
    uses: &'a mut [Use],
    stats: &'a XdpNicStats,
}

impl TxRing for Sending<'_> {
    fn pending(&mut self) -> u32 {
        self.queue.socket.tx_pending()
    }

    fn needs_wakeup(&self) -> bool {
        self.queue.socket.tx_needs_wakeup()
    }

    fn kick(&mut self) -> io::Result<Kick> {
        self.queue.socket.kick_tx()
    }

    fn reap(&mut self) -> u32 {
        self.queue.reap(self.frames, self.uses, self.stats)
    }
}

/// The slot at an offset into the area, if there is one.
fn slot_at(frames: &FramePool, offset: u64) -> Option<u32> {
    Some(frames.slot_at(usize::try_from(offset).ok()?)?.0)
}
