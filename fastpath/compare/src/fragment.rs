//! Fragments of one IP packet, compared as what they make up together.
//!
//! Invariants: nothing is copied and no memory is taken: the two sides' pieces are walked side by
//! side. Pieces count as equal only when every byte of every piece of either side equals the other
//! side's byte at that place, and both know where the packet ends or neither: pieces that overlap
//! must agree. The SVM's pieces are reported when the last of the PVM's has left.
//!
//! Does not put packets together for delivery: fragments leave as the guest cut them. A packet that
//! one side cut and the other did not is a divergence.

use crate::cause::{Cause, Divergence};
use crate::frames::{Frames, Token};
use crate::ledger::{Ledger, SvmFrame};
use crate::list::Lists;
use crate::stream::Content;
use crate::table::{Flow, Held};
use crate::wire::{Fragment, Layout, header_difference};

/// Most waiting fragments of one flow that are looked at, per side: two packets of 64 KiB in pieces
/// of an Ethernet frame, and some.
const PIECES_MAX: usize = 128;

/// One piece of a packet.
struct Piece<'a> {
    token: &'a Token,
    packet: &'a Layout,
    fragment: Fragment,
}

impl Piece<'_> {
    fn end(&self) -> usize {
        self.fragment.offset() + usize::from(self.packet.end - self.packet.l4)
    }

    fn holds(&self, at: usize) -> bool {
        (self.fragment.offset()..self.end()).contains(&at)
    }

    /// Where in the frame byte `at` of the packet is.
    fn place(&self, at: usize) -> usize {
        usize::from(self.packet.l4) + at - self.fragment.offset()
    }
}

fn piece<'a>(token: &'a Token, packet: &'a Layout, id: u32) -> Option<Piece<'a>> {
    let fragment = packet.fragment.filter(|fragment| fragment.id == id)?;
    Some(Piece {
        token,
        packet,
        fragment,
    })
}

/// All undecided pieces of one packet on one side.
trait Side {
    fn pieces(&self) -> impl Iterator<Item = Piece<'_>>;

    fn holder(&self, at: usize) -> Option<Piece<'_>> {
        self.pieces().find(|piece| piece.holds(at))
    }

    /// Where the packet ends, once its last piece is here.
    fn last_end(&self) -> Option<usize> {
        let last = self.pieces().find(|piece| !piece.fragment.more);
        last.map(|piece| piece.end())
    }
}

struct Pvm<'a> {
    held: &'a Lists<Held>,
    flow: &'a Flow,
    id: u32,
}

struct Svm<'a> {
    svm: &'a Lists<SvmFrame>,
    flow: &'a Flow,
    id: u32,
}

impl Side for Pvm<'_> {
    fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let all = self.held.iter(&self.flow.held).take(PIECES_MAX);
        all.filter(|(_, held)| held.matched_to.is_none())
            .filter_map(|(_, held)| piece(&held.token, &held.packet, self.id))
    }
}

impl Side for Svm<'_> {
    fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let all = self.svm.iter(&self.flow.svm).take(PIECES_MAX);
        all.filter(|(_, frame)| !frame.reported)
            .filter_map(|(_, frame)| piece(&frame.token, &frame.packet, self.id))
    }
}

/// How the undecided pieces of a packet compare with those of one of the SVM's.
enum Verdict {
    /// Each byte of either side has an equal one.
    Equal,
    /// Something is missing on one side.
    Open,
    Differs(Divergence),
}

/// Judges the packet that the flow's next fragment is part of: the SVM's identification of an equal
/// one, or what is different when `window` packets of the SVM are. `None` while that is open.
fn judge<F: Frames + ?Sized>(
    flow: &Flow,
    pvm: &Pvm<'_>,
    svm: &Lists<SvmFrame>,
    window: usize,
    frames: &F,
) -> Option<Result<u32, Divergence>> {
    let (mut seen, mut first, mut tried) = (0, None, None);
    for (_, frame) in svm.iter(&flow.svm).take(PIECES_MAX) {
        let id = match frame.packet.fragment {
            // Pieces of one packet mostly come together; to try one twice does no harm.
            Some(fragment) if !frame.reported && tried != Some(fragment.id) => fragment.id,
            _ => continue,
        };
        tried = Some(id);
        let other = Svm { svm, flow, id };
        match compare_both(pvm, &other, frames) {
            Verdict::Equal => return Some(Ok(id)),
            Verdict::Open => {}
            Verdict::Differs(divergence) => {
                first = first.or(Some(divergence));
                seen += 1;
            }
        }
    }
    first.filter(|_| seen >= window).map(Err)
}

fn compare_both<F: Frames + ?Sized>(pvm: &Pvm<'_>, svm: &Svm<'_>, frames: &F) -> Verdict {
    match (compare(pvm, svm, frames), compare(svm, pvm, frames)) {
        (Verdict::Equal, Verdict::Equal) if pvm.last_end() == svm.last_end() => Verdict::Equal,
        (Verdict::Differs(divergence), _) | (_, Verdict::Differs(divergence)) => {
            Verdict::Differs(divergence)
        }
        _ => Verdict::Open,
    }
}

/// Compares each byte of each piece of `a` with the byte of `b` at that place.
fn compare<F: Frames + ?Sized>(a: &impl Side, b: &impl Side, frames: &F) -> Verdict {
    let differs = |cause, offset, x: (&Token, u16, usize), y: (&Token, u16, usize)| {
        let plain = Divergence::plain(cause, None);
        Verdict::Differs(plain.showing(frames, offset, Some(x), Some(y)))
    };
    let mut verdict = Verdict::Equal;
    let Some(first) = b.pieces().next() else {
        return Verdict::Open;
    };
    for piece in a.pieces() {
        let headers = (frames.header(piece.token), frames.header(first.token));
        let header = header_difference(headers.0, piece.packet, headers.1, first.packet);
        if header.is_some() || piece.fragment.protocol != first.fragment.protocol {
            let at = header.unwrap_or(0) as usize;
            let (x, y) = (piece.packet.end, first.packet.end);
            let sides = ((piece.token, x, at), (first.token, y, at));
            return differs(Cause::Header, at, sides.0, sides.1);
        }
        if let Some(b_end) = b.last_end()
            && (piece.end() > b_end || (!piece.fragment.more && piece.end() != b_end))
        {
            return Verdict::Differs(Divergence::plain(Cause::Length, None));
        }
        let mut at = piece.fragment.offset();
        while at < piece.end() {
            let Some(other) = b.holder(at) else {
                verdict = Verdict::Open;
                break;
            };
            let n = piece.end().min(other.end()) - at;
            let (x, y) = (piece.place(at), other.place(at));
            if let Some(offset) = frames.first_difference(piece.token, x, other.token, y, n) {
                let x = (piece.token, piece.packet.end, x + offset);
                let y = (other.token, other.packet.end, y + offset);
                return differs(Cause::Payload, at + offset, x, y);
            }
            at += n;
        }
    }
    verdict
}

impl Flow {
    /// Judges the flow's next frame as part of its packet. `None` while something is missing.
    pub(crate) fn judge_fragment<F: Frames + ?Sized>(
        &self,
        head: u32,
        held: &mut Lists<Held>,
        svm: &mut Lists<SvmFrame>,
        window: usize,
        frames: &F,
    ) -> Option<Content> {
        let head = held.get(head)?;
        let id = head.packet.fragment?.id;
        if head.matched_to.is_some() {
            return Some(Content::Matched);
        }
        let pvm = Pvm {
            held,
            flow: self,
            id,
        };
        match judge(self, &pvm, svm, window, frames)? {
            Ok(other) => {
                self.decide(id, other, held, svm);
                Some(Content::Matched)
            }
            Err(divergence) => Some(Content::Differs(divergence)),
        }
    }

    /// Marks all pieces of a packet, so that the rest leaves when its turn comes: on the SVM's
    /// side with the identification that the PVM gave it.
    fn decide(&self, id: u32, other: u32, held: &mut Lists<Held>, svm: &mut Lists<SvmFrame>) {
        let is_of = |packet: &Layout, id| packet.fragment.is_some_and(|f| f.id == id);
        // Only pieces that were looked at: those behind them may be of a later packet with the same
        // identification.
        let (mut at, mut looked_at) = (self.held.head, 0);
        while looked_at < PIECES_MAX
            && let Some(frame) = held.get_mut(at)
        {
            looked_at += 1;
            if is_of(&frame.packet, id) {
                frame.matched_to = Some(id);
            }
            at = held.next(at);
        }
        let (mut at, mut looked_at) = (self.svm.head, 0);
        while looked_at < PIECES_MAX
            && let Some(frame) = svm.get_mut(at)
        {
            looked_at += 1;
            if is_of(&frame.packet, other) && !frame.reported {
                (frame.reported, frame.incarnation) = (true, id);
            }
            at = svm.next(at);
        }
    }

    /// A piece of the decided packet `id` has left: after the last one the SVM's are settled.
    pub(crate) fn fragment_left<F: Frames + ?Sized>(
        &mut self,
        id: u32,
        held: &Lists<Held>,
        ledger: &mut Ledger,
        frames: &mut F,
    ) {
        let is_decided = |held: &Held| held.matched_to == Some(id);
        if held.iter(&self.held).any(|(_, held)| is_decided(held)) {
            return;
        }
        let mut at = self.svm.head;
        while let Some(frame) = ledger.svm.get(at) {
            let next = ledger.svm.next(at);
            if frame.reported && frame.incarnation == id {
                ledger.settle_svm(&mut self.svm, at, frames);
            }
            at = next;
        }
    }
}
