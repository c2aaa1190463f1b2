//! What the SVM sends: put beside what the PVM holds.
//!
//! Invariant: a frame that finds no room, or belongs to an epoch that is over, changes nothing: the
//! secondary still has it, and what waits for it goes on waiting.

use super::PrimaryPath;
use crate::cause::{Cause, Divergence};
use crate::flat::Hash;
use crate::flow::{Direction, FlowKey};
use crate::frames::{Frames, Token};
use crate::ledger::SvmFrame;
use crate::policy::{Opener, PolicyAction};
use crate::table::{DEFERRED, FlowId, seen};

impl PrimaryPath {
    /// Takes a frame that the SVM sent in `epoch`, in the PVM's guest space.
    pub fn handle_svm_output<F: Frames + ?Sized>(
        &mut self,
        now_us: u64,
        frames: &mut F,
        epoch: u64,
        svm_seq: u64,
        token: Token,
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
        let packet = self.parse(frames, &token, Direction::FromGuest);
        let place = self.flows.find(&packet.key);
        let mut token = token;
        if epoch == self.comparing
            && let Some(id) = place.1
            && self.match_exactly(now_us, frames, id, &packet, (svm_seq, &mut token))
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
        };
        if epoch > self.comparing {
            // Only the epoch that follows the cut can send before its commit is known here.
            self.ledger.svm.push_back(&mut self.deferred_svm, frame);
        } else {
            self.compare_svm(now_us, frames, place, &packet.key, frame);
        }
    }

    /// Gives up one segment that has left long ago, so that new output of the SVM finds room: a
    /// retransmission of it is then held rather than compared. False when there is none.
    fn drop_history<F: Frames + ?Sized>(&mut self, frames: &mut F) -> bool {
        let nodes = self.ledger.svm.nodes();
        for _ in 0..nodes {
            self.history_hand = (self.history_hand + 1) % nodes;
            let at = self.history_hand;
            let Some(frame) = self.ledger.svm.get(at).filter(|frame| frame.reported) else {
                continue;
            };
            let flow = self.flows.get_mut(frame.flow);
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
