//! Where the SVM's byte stream goes on after a divergence.
//!
//! In reality the SVM goes on as a copy of the PVM after each checkpoint. A capture goes on from the
//! SVM's own state, so its numbers may be off by the difference of two messages' lengths, or not
//! at all when one side was only late. Contents decide: the next bytes of either side are looked for
//! in what the other side has sent and a checkpoint has covered or not, at the place where they
//! belong by number first; a few equal bytes are no evidence. What is not found anywhere differs again; then the SVM's stream goes on
//! where the PVM's goes on (the PVM's next number minus the SVM's is added).
//!
//! Invariants: nothing here changes what the comparator finds, only the numbers it is given; the
//! lists are bounded.

use colo_compare::seq;
use colo_compare::wire::Tcp;
use colo_compare::wire::tcp::FIN;

use crate::capture::Record;

/// Segments of a side that are looked at.
const SEGMENTS_MAX: usize = 1024;
/// Equal bytes that are no accident: fewer are found in any long stream.
const EVIDENCE: usize = 8;
/// The same for whole segments: a short answer, such as `OK` and a line end.
const EVIDENCE_WHOLE: usize = 4;

/// Payload that lies in a capture, in the PVM's numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes<'a> {
    seq: u32,
    bytes: &'a [u8],
    fin: bool,
}

impl<'a> Bytes<'a> {
    /// The payload of a segment whose numbers are moved by `offset`.
    pub(crate) fn of(record: &Record<'a>, tcp: &Tcp, offset: u32) -> Self {
        let at = usize::from(tcp.payload_at);
        Self {
            seq: tcp.payload_seq().wrapping_add(offset),
            bytes: &record.frame[at..at + usize::from(tcp.payload_len)],
            fin: tcp.has(FIN),
        }
    }

    fn moved(&self, by: u32) -> Self {
        Self {
            seq: self.seq.wrapping_add(by),
            ..*self
        }
    }

    /// Whether they were sent by the other side too, with the same numbers.
    pub(crate) fn is_in(&self, sent: &[Bytes<'a>]) -> bool {
        self.is_among(sent.iter().copied())
    }

    fn is_among(&self, sent: impl Iterator<Item = Bytes<'a>>) -> bool {
        let equal = equal_by_number(self, sent);
        equal.is_some_and(|equal| is_evidence(equal, equal == self.bytes.len()))
    }

    /// Whether the other side has sent something else with the same numbers.
    fn differs(&self, mut sent: impl Iterator<Item = Bytes<'a>>) -> bool {
        sent.any(|sent| {
            let (ours, theirs) = self.overlap(&sent);
            ours != theirs
        })
    }

    fn end(&self) -> u32 {
        self.seq.wrapping_add(self.bytes.len() as u32)
    }

    /// The bytes of both where they overlap by number.
    fn overlap(&self, other: &Self) -> (&'a [u8], &'a [u8]) {
        let from = seq::max(self.seq, other.seq);
        let end = seq::min(self.end(), other.end());
        if !seq::lt(from, end) {
            return (&[], &[]);
        }
        let part = |of: &Self| {
            let at = from.wrapping_sub(of.seq) as usize;
            &of.bytes[at..at + end.wrapping_sub(from) as usize]
        };
        (part(self), part(other))
    }
}

/// Where the start of `next` is found in what the other side has sent, if that is no accident.
fn place_of<'a>(next: &Bytes<'a>, sent: impl Iterator<Item = Bytes<'a>> + Clone) -> Option<u32> {
    if next.is_among(sent.clone()) {
        return Some(next.seq);
    }
    if next.bytes.is_empty() {
        return sent.filter(|sent| sent.fin).map(|sent| sent.end()).last();
    }
    let mut from = sent;
    loop {
        let start = from.clone().next()?.seq;
        if begins(next.bytes, start, from.clone()) {
            return Some(start);
        }
        from.next();
    }
}

/// Bytes of `next` that are the same in what the other side has sent with the same numbers; `None`
/// when one of them is not, or none of them was sent.
fn equal_by_number<'a>(next: &Bytes<'a>, sent: impl Iterator<Item = Bytes<'a>>) -> Option<usize> {
    let mut equal = 0;
    for (ours, theirs) in sent.map(|sent| next.overlap(&sent)) {
        if ours != theirs {
            return None;
        }
        equal += ours.len();
    }
    (equal > 0).then_some(equal)
}

/// Whether so many equal bytes tell where a stream goes on; they are whole segments, or not.
fn is_evidence(equal: usize, is_whole: bool) -> bool {
    equal >= EVIDENCE || (is_whole && equal >= EVIDENCE_WHOLE)
}

/// Whether the stream of `sent` has these bytes at `start`, as far as it goes.
fn begins<'a>(bytes: &[u8], start: u32, sent: impl Iterator<Item = Bytes<'a>>) -> bool {
    let (mut rest, mut at, mut is_whole) = (bytes, start, true);
    for segment in sent {
        let n = rest.len().min(segment.bytes.len());
        if segment.seq != at || n == 0 {
            break;
        }
        if rest[..n] != segment.bytes[..n] {
            return false;
        }
        is_whole = n == segment.bytes.len();
        (rest, at) = (&rest[n..], segment.end());
    }
    is_evidence(bytes.len() - rest.len(), is_whole && rest.is_empty())
}

/// The SVM's translation from now on, and what of it goes on.
#[derive(Debug)]
pub(crate) struct Found<'a> {
    /// What is added to the translation.
    pub(crate) shift: u32,
    /// What the SVM had sent of it, oldest first.
    pub(crate) early: Vec<Record<'a>>,
}

/// A flow after a divergence, until it is known where the SVM's stream goes on.
#[derive(Debug)]
pub(crate) struct Resync<'a> {
    /// The PVM's next number at the checkpoint.
    pvm_next: u32,
    /// The SVM's, as translated so far.
    svm_next: u32,
    /// What the checkpoint covers of the PVM, and what it has sent since.
    pvm: Vec<Bytes<'a>>,
    pvm_goes_on: bool,
    /// What the SVM has sent and the comparator has not got.
    svm: Vec<(Record<'a>, Bytes<'a>)>,
    /// How much of it is older than the checkpoint.
    svm_old: usize,
}

impl<'a> Resync<'a> {
    /// After a checkpoint by which `pvm` left. The SVM had sent `svm`, and it is not matched.
    pub(crate) fn after(
        (pvm_next, svm_next): (u32, u32),
        pvm: &[Bytes<'a>],
        svm: Vec<(Record<'a>, Bytes<'a>)>,
    ) -> Self {
        Self {
            pvm_next,
            svm_next,
            pvm: pvm.iter().copied().take(SEGMENTS_MAX).collect(),
            pvm_goes_on: false,
            svm_old: svm.len(),
            svm,
        }
    }

    /// Tells how the SVM goes on, if a part of what it had sent is covered by the checkpoint and
    /// nothing that came after it says otherwise.
    pub(crate) fn covered(&self) -> Option<Found<'a>> {
        let pvm = || self.pvm.iter().copied();
        self.svm.iter().enumerate().find_map(|(n, (_, bytes))| {
            let shift = place_of(bytes, pvm())?.wrapping_sub(bytes.seq);
            let rest = &self.svm[n + 1..];
            let contradicts = |(_, bytes): &(_, Bytes<'a>)| bytes.moved(shift).differs(pvm());
            let mut found = self.found(n, shift);
            found.early.extend(rest.iter().map(|(record, _)| *record));
            (!rest.iter().any(contradicts)).then_some(found)
        })
    }

    /// The SVM sends this, which is the last of what goes on so far, once it is known.
    pub(crate) fn svm_sends(&mut self, record: &Record<'a>, bytes: Bytes<'a>) -> Option<Found<'a>> {
        let place = place_of(&bytes, self.pvm.iter().copied());
        self.svm.push((*record, bytes));
        if let Some(place) = place {
            let last = self.svm.len() - 1;
            return Some(self.found(last, place.wrapping_sub(bytes.seq)));
        }
        if self.pvm_goes_on || self.svm.len() == SEGMENTS_MAX {
            return Some(self.guessed(self.svm.len() - 1));
        }
        None
    }

    /// The PVM sends this. Tells how the SVM goes on from there, once that is known.
    pub(crate) fn pvm_sends(&mut self, bytes: Bytes<'a>) -> Option<Found<'a>> {
        if seq::le(bytes.end(), self.pvm_next) && !bytes.fin {
            // It says again what it has said.
            return None;
        }
        let place = place_of(&bytes, self.svm.iter().map(|(_, bytes)| *bytes));
        if let Some(place) = place {
            let goes_on =
                |sent: &Bytes<'_>| seq::lt(place, sent.end()) || (sent.fin && place == sent.end());
            let early = self.svm.iter().filter(|(_, sent)| goes_on(sent));
            return Some(Found {
                shift: bytes.seq.wrapping_sub(place),
                early: early.map(|(record, _)| *record).collect(),
            });
        }
        if self.svm.len() > self.svm_old {
            return Some(self.guessed(self.svm_old));
        }
        self.pvm_goes_on = true;
        if self.pvm.len() < SEGMENTS_MAX {
            self.pvm.push(bytes);
        }
        None
    }

    /// The place of a segment is known. What came just before it and is the same there was too short
    /// to tell.
    fn found(&self, last: usize, shift: u32) -> Found<'a> {
        let (record, bytes) = &self.svm[last];
        let mut early = vec![*record];
        let mut next = bytes.moved(shift);
        for (record, bytes) in self.svm[..last].iter().rev() {
            let bytes = bytes.moved(shift);
            let is_same = equal_by_number(&bytes, self.pvm.iter().copied()).is_some();
            if bytes.end() != next.seq || !is_same {
                break;
            }
            early.push(*record);
            next = bytes;
        }
        early.reverse();
        Found { shift, early }
    }

    /// The place cannot be told from contents: the SVM goes on with the segment `from`. Where the
    /// numbers say, if they are not contradicted, or else where the PVM goes on.
    fn guessed(&self, from: usize) -> Found<'a> {
        let goes_on = &self.svm[from..];
        let agrees = |bytes: &Bytes<'a>| equal_by_number(bytes, self.pvm.iter().copied()).is_some();
        let shift = match goes_on.first() {
            Some((_, bytes)) if agrees(bytes) => 0,
            _ => self.pvm_next.wrapping_sub(self.svm_next),
        };
        Found {
            shift,
            early: goes_on.iter().map(|(record, _)| *record).collect(),
        }
    }

    /// What the SVM has sent and the comparator has not got.
    pub(crate) fn into_waiting(self) -> Vec<Record<'a>> {
        self.svm.into_iter().map(|(record, _)| record).collect()
    }
}
