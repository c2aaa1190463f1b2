//! One TCP connection as both captures have it: the translation from the SVM's sequence numbers to
//! the PVM's.
//!
//! Invariants: numbers are learnt from the two SYNs (or SYN-ACKs) of the same connection, which is
//! what production learns through the client's first acknowledgement; without them they are taken
//! as they are. Connections between the same ports are counted on both sides (*incarnations*).
//! What waits here is bounded.
//!
//! Does not compare anything that leaves.

use std::collections::VecDeque;

use colo_compare::wire::Tcp;
use colo_compare::wire::tcp::{ACK, RST, SYN};
use colo_compare::{Offsets, seq};

use crate::capture::Record;
use crate::resync::{Bytes, Found, Resync};

/// Connections of the PVM between the same ports that the SVM may lag behind.
const OPENINGS_MAX: usize = 16;
/// Segments of the SVM that may wait for the PVM, in one flow.
const WAITING_MAX: usize = 1024;

/// What one side has sent, in its own numbers.
#[derive(Debug, Default)]
struct Numbers {
    isn: Option<u32>,
    incarnation: u32,
    /// After the last byte of this incarnation.
    next: Option<u32>,
}

impl Numbers {
    /// True when the segment opens another connection.
    fn note(&mut self, tcp: &Tcp) -> bool {
        let opens = tcp.has(SYN) && self.isn != Some(tcp.seq);
        if opens {
            self.incarnation += 1;
            (self.isn, self.next) = (Some(tcp.seq), None);
        }
        if tcp.takes_space() && !tcp.has(RST) {
            self.next = Some(seq::max_known(tcp.end(), self.next));
        }
        opens
    }
}

/// A connection that the PVM opened or accepted.
#[derive(Debug, Clone, Copy)]
struct Opening {
    incarnation: u32,
    isn: u32,
    /// What a SYN-ACK acknowledges: it names the client's connection.
    ack: Option<u32>,
    epoch: u64,
}

/// What is to be done with a segment of the SVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate<'a> {
    /// It goes to the comparator, translated.
    Forward(Offsets),
    /// It waits for the PVM.
    Wait,
    /// It is known again where the stream goes on: these, the segment among them, are to be decided
    /// about before any other.
    GoOn(Vec<Record<'a>>),
    /// A checkpoint covers what it stands for.
    Covered,
}

/// Payload or FIN.
fn is_data(tcp: &Tcp) -> bool {
    tcp.takes_space() && !tcp.has(SYN) && !tcp.has(RST)
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Stream<'a> {
    pvm: Numbers,
    svm: Numbers,
    openings: VecDeque<Opening>,
    offset: u32,
    is_learnt: bool,
    /// Segments of the SVM that came before the PVM's handshake.
    waiting: Vec<Record<'a>>,
    /// After a divergence.
    resync: Option<Box<Resync<'a>>>,
    /// Resets of the PVM that left by a checkpoint before the SVM had sent its own.
    resets_covered: u32,
}

impl<'a> Stream<'a> {
    /// Takes note of what the PVM sends. Gives segments of the SVM that waited for it.
    pub(crate) fn pvm_sends(
        &mut self,
        record: &Record<'a>,
        tcp: &Tcp,
        epoch: u64,
    ) -> Vec<Record<'a>> {
        if self.pvm.note(tcp) {
            self.openings.push_back(Opening {
                incarnation: self.pvm.incarnation,
                isn: tcp.seq,
                ack: tcp.has(ACK).then_some(tcp.ack),
                epoch,
            });
            if self.openings.len() > OPENINGS_MAX {
                self.openings.pop_front();
            }
            self.learn();
        } else if self.pvm.incarnation == 0 && tcp.takes_space() {
            // The PVM's capture has no handshake.
            self.is_learnt = true;
        }
        let mut awaited = match self.is_learnt {
            true => std::mem::take(&mut self.waiting),
            false => Vec::new(),
        };
        if let Some(resync) = self.resync.as_mut().filter(|_| is_data(tcp))
            && let Some(found) = resync.pvm_sends(Bytes::of(record, tcp, 0))
        {
            awaited.extend(self.is_found(found));
        }
        awaited
    }

    /// The pair's translation, as the handshake gives it (rule 2).
    fn learn(&mut self) {
        let of_this = |opening: &&Opening| opening.incarnation == self.svm.incarnation;
        let opening = self.openings.iter().find(of_this);
        if let (false, Some(opening), Some(isn)) = (self.is_learnt, opening, self.svm.isn) {
            self.offset = opening.isn.wrapping_sub(isn);
            self.is_learnt = true;
        }
    }

    /// Decides about a segment that the SVM sends, or that has waited.
    pub(crate) fn svm_sends(&mut self, record: &Record<'a>, tcp: &Tcp, epoch: u64) -> Fate<'a> {
        if self.svm.note(tcp) {
            self.svm_opens(tcp);
        }
        if self.svm.incarnation > 0 && self.svm.incarnation < self.covered(epoch) {
            return Fate::Covered;
        }
        if tcp.has(RST) && self.resets_covered > 0 {
            self.resets_covered -= 1;
            return Fate::Covered;
        }
        let unknown = !self.is_learnt && self.svm.incarnation > 0 && !tcp.has(SYN);
        if unknown && self.waiting.len() < WAITING_MAX {
            self.waiting.push(*record);
            return Fate::Wait;
        }
        if let Some(resync) = self.resync.as_mut().filter(|_| is_data(tcp)) {
            return match resync.svm_sends(record, Bytes::of(record, tcp, self.offset)) {
                Some(found) => Fate::GoOn(self.is_found(found)),
                None => Fate::Wait,
            };
        }
        Fate::Forward(self.offsets())
    }

    /// It is known where the SVM's stream goes on. Gives what of it goes on.
    fn is_found(&mut self, found: Found<'a>) -> Vec<Record<'a>> {
        self.resync = None;
        self.offset = self.offset.wrapping_add(found.shift);
        found.early
    }

    fn svm_opens(&mut self, tcp: &Tcp) {
        // Both guests answer the same SYN of the client, unless the captures are of two runs. An
        // answer that one of them never gave would make the count wrong.
        let is_same = |opening: &&Opening| {
            let is_next = opening.incarnation >= self.svm.incarnation;
            is_next && tcp.has(ACK) && opening.ack == Some(tcp.ack)
        };
        if let Some(opening) = self.openings.iter().find(is_same) {
            self.svm.incarnation = opening.incarnation;
        }
        (self.offset, self.is_learnt, self.resets_covered) = (0, false, 0);
        self.resync = None;
        self.waiting.clear();
        self.learn();
    }

    /// The PVM's connection at the last commit: earlier ones are history.
    fn covered(&self, epoch: u64) -> u32 {
        let covered = self.openings.iter().filter(|opening| opening.epoch < epoch);
        covered
            .map(|opening| opening.incarnation)
            .max()
            .unwrap_or(0)
    }

    /// Which connection between its ports the SVM is in.
    pub(crate) fn svm_incarnation(&self) -> u32 {
        self.svm.incarnation
    }

    /// The translation of what the SVM sends now.
    pub(crate) fn offsets(&self) -> Offsets {
        Offsets {
            seq: self.offset,
            ts: 0,
        }
    }

    /// Whether both are in the same connection, as far as the captures tell.
    fn is_same(&self) -> bool {
        let (pvm, svm) = (self.pvm.incarnation, self.svm.incarnation);
        pvm == svm || svm == 0 || (pvm == 0 && self.is_learnt)
    }

    /// Whether the PVM has sent everything up to `end` (in the PVM's numbers) of the connection that
    /// the SVM is in.
    fn pvm_has_sent(&self, end: u32) -> bool {
        match self.is_same() {
            true => self.pvm.next.is_some_and(|next| seq::le(end, next)),
            false => self.svm.incarnation < self.pvm.incarnation,
        }
    }

    /// Whether a segment of the SVM's connection `incarnation` that was not matched before a
    /// checkpoint stands for something that the PVM has not sent yet. It was a divergence of this
    /// flow that made the checkpoint necessary, if `diverged`: then that is not told by numbers.
    pub(crate) fn goes_on(&mut self, tcp: &Tcp, incarnation: u32, diverged: bool) -> bool {
        if incarnation < self.svm.incarnation {
            return false;
        }
        if tcp.has(RST) {
            let covered = self.resets_covered > 0;
            self.resets_covered -= u32::from(covered);
            return !covered && !diverged;
        }
        if diverged && self.is_same() {
            return is_data(tcp);
        }
        !self.pvm_has_sent(tcp.end().wrapping_add(self.offset))
    }

    /// A reset of the PVM has left by a checkpoint; the SVM's own will come.
    pub(crate) fn reset_is_covered(&mut self) {
        self.resets_covered += 1;
    }

    /// A divergence of this flow made a checkpoint necessary, by which `pvm` left; the SVM's
    /// counterpart of what comes after the first `over` segments may still come. Of what the SVM had
    /// sent, `svm` is not matched. Gives what of it goes on after the checkpoint.
    pub(crate) fn diverged(
        &mut self,
        pvm: &[Bytes<'a>],
        over: usize,
        svm: &[(Record<'a>, Tcp)],
    ) -> Vec<Record<'a>> {
        let next = (self.is_same(), self.pvm.next, self.svm.next);
        let (true, Some(pvm_next), Some(svm_next)) = next else {
            // The SVM is in the next connection between these ports.
            return svm.iter().map(|(record, _)| *record).collect();
        };
        let svm_next = svm_next.wrapping_add(self.offset);
        let of = |(record, tcp): &(Record<'a>, Tcp)| (*record, Bytes::of(record, tcp, self.offset));
        let svm: Vec<_> = svm.iter().map(of).collect();
        // Other messages can add up to the same length.
        let is_same_place = || svm.is_empty() || svm.iter().any(|(_, bytes)| bytes.is_in(pvm));
        if pvm_next == svm_next && is_same_place() {
            return Vec::new();
        }
        let pvm = pvm.get(over..).unwrap_or_default();
        let resync = Resync::after((pvm_next, svm_next), pvm, svm);
        if let Some(found) = resync.covered() {
            return self.is_found(found);
        }
        self.resync = Some(Box::new(resync));
        Vec::new()
    }

    /// What of the SVM waits since a divergence: nothing else does, then.
    pub(crate) fn take_waiting(&mut self) -> Vec<Record<'a>> {
        let resync = self.resync.take();
        resync.map_or_else(Vec::new, |resync| resync.into_waiting())
    }

    /// Segments of the SVM for which nothing of the PVM came, at the end of both captures; from now
    /// on nothing waits.
    pub(crate) fn give_up_waiting(&mut self) -> usize {
        self.take_waiting().len() + std::mem::take(&mut self.waiting).len()
    }

    /// Whether the SVM's stream goes beyond that of the PVM.
    pub(crate) fn svm_surplus(&self) -> bool {
        let Some(svm) = self.svm.next else {
            return false;
        };
        match self.pvm.next {
            Some(pvm) => self.is_same() && seq::lt(pvm, svm.wrapping_add(self.offset)),
            None => true,
        }
    }
}
