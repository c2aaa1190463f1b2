//! Where the SVM's byte stream goes on after a divergence.
//!
//! In reality the SVM goes on as a copy of the PVM after each checkpoint. A capture goes on from the
//! SVM's own state, so its numbers may be off by the difference of two messages' lengths, or not
//! at all when one side was only late. Contents decide: the next bytes of either side are looked for
//! in what the other side has sent and a checkpoint has covered or not, at the place where they
//! belong by number first. What is not found anywhere differs again; then the SVM's stream goes on
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

/// Where the start of `next` is found in what the other side has sent.
fn place_of<'a>(next: &Bytes<'a>, sent: impl Iterator<Item = Bytes<'a>> + Clone) -> Option<u32> {
    let mut overlaps = sent
        .clone()
        .map(|sent| next.overlap(&sent))
        .filter(|(part, _)| !part.is_empty())
        .peekable();
    if overlaps.peek().is_some() && overlaps.all(|(a, b)| a == b) {
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

/// Whether the stream of `sent` has these bytes at `start`, as far as it goes.
fn begins<'a>(mut bytes: &[u8], start: u32, sent: impl Iterator<Item = Bytes<'a>>) -> bool {
    let (mut at, whole) = (start, bytes.len());
    for segment in sent {
        let n = bytes.len().min(segment.bytes.len());
        if segment.seq != at || n == 0 {
            break;
        }
        if bytes[..n] != segment.bytes[..n] {
            return false;
        }
        (bytes, at) = (&bytes[n..], segment.end());
    }
    bytes.len() < whole
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
    /// After a checkpoint by which `pvm` left. `None` when both sides are at the same place.
    pub(crate) fn after(pvm_next: u32, svm_next: u32, mut pvm: Vec<Bytes<'a>>) -> Option<Self> {
        pvm.truncate(SEGMENTS_MAX);
        (pvm_next != svm_next).then(|| Self {
            pvm_next,
            svm_next,
            pvm,
            pvm_goes_on: false,
            svm: Vec::new(),
            svm_old: 0,
        })
    }

    /// The SVM had sent this before the checkpoint; it is not matched.
    pub(crate) fn svm_had_sent(&mut self, record: &Record<'a>, bytes: Bytes<'a>) -> Option<u32> {
        let shift = self.svm_sends(record, bytes);
        self.svm_old = self.svm.len();
        shift
    }

    /// The SVM sends this. Gives what is added to the translation, once that is known.
    pub(crate) fn svm_sends(&mut self, record: &Record<'a>, bytes: Bytes<'a>) -> Option<u32> {
        let place = place_of(&bytes, self.pvm.iter().copied());
        if let Some(place) = place {
            return Some(place.wrapping_sub(bytes.seq));
        }
        if self.pvm_goes_on || self.svm.len() == SEGMENTS_MAX {
            return Some(self.shift());
        }
        self.svm.push((*record, bytes));
        None
    }

    /// The PVM sends this. Gives what is added to the translation, and the SVM's segments that go
    /// on from there, once that is known.
    pub(crate) fn pvm_sends(&mut self, bytes: Bytes<'a>) -> Option<(u32, Vec<Record<'a>>)> {
        if seq::le(bytes.end(), self.pvm_next) && !bytes.fin {
            // It says again what it has said.
            return None;
        }
        let place = place_of(&bytes, self.svm.iter().map(|(_, bytes)| *bytes));
        if let Some(place) = place {
            let goes_on =
                |sent: &Bytes<'_>| seq::lt(place, sent.end()) || (sent.fin && place == sent.end());
            let early = self.svm.iter().filter(|(_, sent)| goes_on(sent));
            let early = early.map(|(record, _)| *record).collect();
            return Some((bytes.seq.wrapping_sub(place), early));
        }
        let new = &self.svm[self.svm_old..];
        if !new.is_empty() {
            return Some((
                self.shift(),
                new.iter().map(|(record, _)| *record).collect(),
            ));
        }
        self.pvm_goes_on = true;
        if self.pvm.len() < SEGMENTS_MAX {
            self.pvm.push(bytes);
        }
        None
    }

    fn shift(&self) -> u32 {
        self.pvm_next.wrapping_sub(self.svm_next)
    }

    /// What the SVM has sent and the comparator has not got.
    pub(crate) fn into_waiting(self) -> Vec<Record<'a>> {
        self.svm.into_iter().map(|(record, _)| record).collect()
    }
}
