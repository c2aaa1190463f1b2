//! What the SVM sends: put beside what the PVM holds.
//!
//! Invariant: a frame that finds no room, or belongs to an epoch that is over, changes nothing: the
//! secondary still has it, and what waits for it goes on waiting.

use super::PrimaryPath;
use crate::action::Action;
use crate::cause::{Cause, Divergence};
use crate::flat::Hash;
use crate::flow::{Direction, FlowKey};
use crate::frames::{Frames, Token};
use crate::ledger::{Payload, SvmFrame};
use crate::list::NIL;
use crate::policy::{Opener, PolicyAction};
use crate::table::{DEFERRED, FlowId, seen};
use crate::wire::{self, Packet};

impl PrimaryPath {
    /// Takes a frame that the SVM sent in `epoch`, in the PVM's guest space; or the bytes that an
    /// [`crate::Action::Fetch`] of this number has asked for, which take the digest's place.
    pub fn handle_svm_output<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        epoch: u64,
        svm_seq: u64,
        token: Token,
    ) {
        if self.ledger.is_answer(svm_seq) {
            self.take_bytes(now_us, frames, svm_seq, token);
        } else {
            self.take_svm(now_us, frames, epoch, (svm_seq, token), None);
        }
    }

    /// Takes the headers of a frame that the SVM sent in `epoch`, in the PVM's guest space, and the
    /// digest of the `payload_len` bytes behind them.
    #[allow(
        clippy::too_many_arguments,
        reason = "a message of the link, field by field"
    )]
    pub fn handle_svm_digest<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        epoch: u64,
        svm_seq: u64,
        token: Token,
        payload_len: u16,
        digest: u128,
    ) {
        self.ledger.stats.digests += 1;
        let digest = Some((payload_len, digest));
        self.take_svm(now_us, frames, epoch, (svm_seq, token), digest);
    }

    #[inline(always)]
    fn take_svm<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        epoch: u64,
        (svm_seq, token): (u64, Token),
        digest: Option<(u16, u128)>,
    ) {
        self.ledger.stats.svm_output += 1;
        if !self.paired || epoch < self.comparing || (self.frozen && epoch == self.comparing) {
            // The next commit, or the takeover, decides about what it would have released.
            self.ledger.stats.svm_stale += 1;
            frames.release(token);
            return;
        }
        if self.limits.canary_equal {
            frames.release(token);
            self.ledger.report_svm(svm_seq);
            return;
        }
        let is_full = self.ledger.svm.len() >= self.limits.max_svm_frames;
        if is_full && !self.drop_history(frames) {
            // The secondary still stores it; only the comparison lacks it, so output stays held.
            self.ledger.stats.svm_overflow += 1;
            frames.release(token);
            self.request(Divergence::plain(Cause::OutputOverflow, None));
            return;
        }
        let behind = digest.map_or(0, |(payload_len, _)| usize::from(payload_len));
        let (header, len) = frames.view(&token);
        let packet = wire::parse(header, len + behind, Direction::FromGuest);
        if let Some((payload_len, _)) = digest
            && !fits_digest(frames, &token, &packet, payload_len)
        {
            self.ledger.stats.bad_digests += 1;
            frames.release(token);
            self.ledger.act(Action::Fetch { svm_seq });
            return;
        }
        let digest = digest.map(|(_, digest)| digest);
        let place = self.flows.find(&packet.key);
        let mut token = token;
        if epoch == self.comparing
            && let Some(id) = place.1
            && self.match_exactly(now_us, frames, id, &packet, (svm_seq, &mut token, digest))
        {
            return;
        }
        let frame = SvmFrame {
            packet: packet.layout,
            token,
            epoch,
            svm_seq,
            at_us: now_us,
            flow: DEFERRED,
            incarnation: 0,
            reported: false,
            payload: digest.map_or(Payload::Bytes, Payload::digest_of),
        };
        if epoch > self.comparing {
            // Only the epoch that follows the cut can send before its commit is known here.
            self.ledger.svm.push_back(&mut self.deferred_svm, frame);
        } else {
            self.compare_svm(now_us, frames, place, &packet.key, frame);
        }
    }

    /// Puts the bytes of a frame where only their digest was.
    #[cold]
    fn take_bytes<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        svm_seq: u64,
        token: Token,
    ) {
        let packet = self.parse(frames, &token, Direction::FromGuest);
        let id = self.flows.id_of(&packet.key);
        let flow = id.and_then(|id| self.flows.get_mut(id));
        let (Some(id), Some(flow)) = (id, flow) else {
            frames.release(token);
            return;
        };
        let at = {
            let mut all = self.ledger.svm.iter(&flow.svm);
            let place = all.find(|(_, frame)| frame.svm_seq == svm_seq);
            place.map_or(NIL, |(at, _)| at)
        };
        let frame = self.ledger.svm.get_mut(at);
        let is_wanted = |frame: &&mut SvmFrame| {
            frame.payload != Payload::Bytes && frame.packet == packet.layout
        };
        let Some(frame) = frame.filter(is_wanted) else {
            // Its flow has no use for it any more.
            frames.release(token);
            return;
        };
        frames.release(core::mem::replace(&mut frame.token, token));
        frame.payload = Payload::Bytes;
        let divergence = match frame.packet.tcp {
            Some(_) => flow.bytes_came(at, &mut self.ledger, frames),
            None => None,
        };
        match divergence {
            Some(divergence) => self.diverge(id, divergence),
            None => self.pump(now_us, frames, id),
        }
    }

    /// Gives up one segment that has left long ago, so that new output of the SVM finds room: a
    /// retransmission of it is then held rather than compared. False when there is none.
    pub(super) fn drop_history<F: Frames + ?Sized>(&mut self, frames: &mut F) -> bool {
        let nodes = self.ledger.svm.nodes();
        for _ in 0..nodes {
            let next = self.history_hand + 1;
            self.history_hand = if next < nodes { next } else { 0 };
            let at = self.history_hand;
            let Some(frame) = self.ledger.svm.get(at).filter(|frame| frame.reported) else {
                continue;
            };
            let flow = self.flows.history_mut(frame.flow);
            if let Some(flow) = flow.filter(|flow| flow.is_tcp()) {
                flow.drop_history(at, &mut self.ledger, frames);
                return true;
            }
        }
        false
    }

    pub(super) fn compare_svm<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        place: (Hash, Option<FlowId>),
        key: &FlowKey,
        mut frame: SvmFrame,
    ) {
        let name = (key, frame.packet.tcp.map(|tcp| tcp.flags));
        let id = self.place_hashed(now_us, frames, place, name, Opener::Guest);
        let Some((id, flow)) = id.and_then(|id| Some((id, self.flows.get_mut(id)?))) else {
            frames.release(frame.token);
            self.request(Divergence::plain(Cause::TableFull, Some(*key)));
            return;
        };
        flow.use_now(now_us, seen::SVM);
        let may_be_opener = flow.last_input_seq == 0;
        frame.flow = id;
        match self.policy.action_of(flow.policy) {
            PolicyAction::Compare | PolicyAction::IgnoreBytes { .. } => {}
            // Nobody waits for it: the flow is not protected.
            PolicyAction::Release => {
                self.ledger.report_svm(frame.svm_seq);
                frames.release(frame.token);
                return;
            }
            // The secondary keeps it until the commit.
            PolicyAction::Hold => {
                frames.release(frame.token);
                return;
            }
        }
        let divergence = if frame.packet.tcp.is_some() {
            flow.svm_segment(frame, &mut self.ledger, frames)
        } else {
            self.ledger.svm.push_back(&mut flow.svm, frame);
            None
        };
        match divergence {
            Some(divergence) => self.diverge(id, divergence),
            None => self.pump(now_us, frames, id),
        }
        if may_be_opener {
            self.check_openers(id);
        }
    }
}

/// Whether the headers of a frame are all that its token holds, and say that so many bytes
/// follow as a digest can stand for.
fn fits_digest<F: Frames + ?Sized>(
    frames: &F,
    token: &Token,
    packet: &Packet,
    payload_len: u16,
) -> bool {
    let at = packet.payload_at();
    packet.is_digestible()
        && usize::from(at) == frames.len(token)
        && packet.end.checked_sub(at) == Some(payload_len)
}
