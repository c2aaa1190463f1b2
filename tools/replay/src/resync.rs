//! Where the SVM's byte stream goes on after a divergence.
//!
//! In reality the SVM goes on as a copy of the PVM after each checkpoint. A capture goes on from the
//! SVM's own state, so its numbers may be off by the difference of two messages' lengths, or not
//! at all when one side was only late. The next bytes decide: when those of the side that lags
//! equal what the other side has sent at that place, the numbers stand; otherwise the stream of the
//! SVM goes on where that of the PVM goes on (the PVM's next number minus the SVM's is added).
//!
//! Invariant: nothing here changes what the comparator finds, only the numbers it is given.

use colo_compare::seq;
use colo_compare::wire::Tcp;
use colo_compare::wire::tcp::FIN;

use crate::capture::Record;

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

    /// Whether the two have other contents somewhere in `from..to`.
    fn differs_from(&self, other: &Self, from: u32, to: u32) -> bool {
        let from = seq::max(from, seq::max(self.seq, other.seq));
        let end = seq::min(to, seq::min(self.end(), other.end()));
        let part = |of: &Self| {
            let at = from.wrapping_sub(of.seq) as usize;
            let n = end.wrapping_sub(from) as usize;
            &of.bytes[at..at + n]
        };
        if seq::lt(from, end) && part(self) != part(other) {
            return true;
        }
        // One stream ends where the other goes on.
        let ends_within = |a: &Self, b: &Self| {
            let end = a.end();
            a.fin && seq::le(b.seq, end) && seq::lt(end, seq::min(b.end(), to))
        };
        ends_within(self, other) || ends_within(other, self)
    }
}

/// The two sides' next numbers at a checkpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gap {
    /// The PVM's.
    pub(crate) pvm: u32,
    /// The SVM's, as translated so far.
    pub(crate) svm: u32,
}

impl Gap {
    /// What is added to the translation when the numbers do not stand.
    fn shift(self) -> u32 {
        self.pvm.wrapping_sub(self.svm)
    }
}

/// A decision that the next bytes will bring.
#[derive(Debug, Default)]
pub(crate) enum Resync<'a> {
    /// There is none to take.
    #[default]
    Settled,
    /// The PVM had sent more, namely this.
    Behind {
        /// Where both were.
        gap: Gap,
        /// What of the PVM's output the SVM may still send.
        pvm: Vec<Bytes<'a>>,
    },
    /// The SVM had sent more.
    Ahead {
        /// Where both were.
        gap: Gap,
        /// What it has sent beyond the PVM, and since.
        svm: Vec<Record<'a>>,
    },
}

impl<'a> Resync<'a> {
    /// After a checkpoint that a divergence of this flow made necessary.
    pub(crate) fn after(gap: Gap, pvm: Vec<Bytes<'a>>) -> Self {
        if seq::lt(gap.svm, gap.pvm) {
            Self::Behind { gap, pvm }
        } else if seq::lt(gap.pvm, gap.svm) {
            let svm = Vec::new();
            Self::Ahead { gap, svm }
        } else {
            Self::Settled
        }
    }

    /// The SVM has sent `next`. Gives what is added to the translation, once it is decided.
    pub(crate) fn svm_sent(&mut self, next: &Bytes<'a>) -> u32 {
        let Self::Behind { gap, pvm } = self else {
            return 0;
        };
        if seq::le(next.end(), gap.svm) && !next.fin {
            // It says again what it has said.
            return 0;
        }
        let differs = |sent: &Bytes<'_>| next.differs_from(sent, gap.svm, gap.pvm);
        let shift = match pvm.iter().any(differs) {
            true => gap.shift(),
            false => 0,
        };
        *self = Self::Settled;
        shift
    }

    /// The PVM has sent `next`. Once it is decided, gives what is added to the translation, and
    /// the SVM's segments that go on from there. `offset` is the translation so far.
    pub(crate) fn pvm_sent(
        &mut self,
        next: &Bytes<'a>,
        offset: u32,
        parse: impl Fn(&Record<'a>) -> Option<Tcp>,
    ) -> Option<(u32, Vec<Record<'a>>)> {
        let Self::Ahead { gap, svm } = self else {
            return None;
        };
        if seq::le(next.end(), gap.pvm) && !next.fin {
            return None;
        }
        let gap = *gap;
        let mut early = std::mem::take(svm);
        *self = Self::Settled;
        let bytes = |record: &Record<'a>| Some(Bytes::of(record, &parse(record)?, offset));
        let differs = |record: &Record<'a>| {
            bytes(record).is_some_and(|early| next.differs_from(&early, gap.pvm, gap.svm))
        };
        if !early.iter().any(differs) {
            return Some((0, early));
        }
        // What is left of the longer message stands for nothing.
        early.retain(|record| bytes(record).is_some_and(|early| seq::lt(gap.svm, early.end())));
        Some((gap.shift(), early))
    }
}
