//! The SVM's output: stored until the primary has released its equal, and sent as bytes or as digests.
//!
//! Invariants: an output is sent once as itself or as a digest, and after a digest once more as bytes when the
//! primary asks; it is kept whole until it is reported released (rule 9), however it was sent.

use super::SecondaryPath;
use crate::action::SecondaryAction;
use crate::digest::{DIGEST_HEADERS_MAX, DigestKey};
use crate::frames::{Frames, Token};
use crate::wire::Packet;

#[derive(Debug)]
pub(super) struct Stored {
    pub(super) svm_seq: u64,
    /// Of the payload, in two halves.
    digest: [u64; 2],
    pub(super) token: Token,
    /// 0 where the bytes travel, and no digest.
    header_len: u16,
    payload_len: u16,
}

impl SecondaryPath {
    /// What is stored is of the present epoch: a commit drops the rest. What the primary waits for
    /// goes first.
    pub(super) fn next_send(&mut self) -> Option<SecondaryAction> {
        let epoch = self.epoch;
        while let Some(svm_seq) = self.fetched.pop_front() {
            if self.position(svm_seq).is_some() {
                return Some(SecondaryAction::SendOutput { epoch, svm_seq });
            }
        }
        let &Stored {
            svm_seq,
            digest: [low, high],
            header_len,
            payload_len,
            ..
        } = self.next_unsent()?;
        self.unsent_svm_seq = svm_seq + 1;
        if header_len == 0 {
            return Some(SecondaryAction::SendOutput { epoch, svm_seq });
        }
        self.stats.digests += 1;
        Some(SecondaryAction::SendDigest {
            epoch,
            svm_seq,
            header_len,
            payload_len,
            digest: u128::from(low) | u128::from(high) << 64,
        })
    }

    fn next_unsent(&self) -> Option<&Stored> {
        let newest = self.outputs.back()?;
        if newest.svm_seq < self.unsent_svm_seq {
            return None;
        }
        let at = self
            .outputs
            .partition_point(|stored| stored.svm_seq < self.unsent_svm_seq);
        self.outputs.get(at)
    }

    /// Where digests are asked for, a large plain payload travels as one: SYN, FIN, RST, fragments
    /// and what is no TCP or UDP travel as they are.
    pub(super) fn stored<F: Frames + ?Sized>(
        &self,
        frames: &F,
        packet: &Packet,
        svm_seq: u64,
        token: Token,
    ) -> Stored {
        let (header_len, end) = (packet.payload_at(), packet.end);
        let payload_len = end.saturating_sub(header_len);
        let is_large = usize::from(payload_len) >= self.limits.digest_min_bytes.max(1);
        let mut stored = Stored {
            svm_seq,
            digest: [0; 2],
            token,
            header_len: 0,
            payload_len,
        };
        if let Some(key) = &self.digest_key
            && packet.is_digestible()
            && is_large
            && usize::from(header_len) <= DIGEST_HEADERS_MAX
        {
            let (at, n) = (usize::from(header_len), usize::from(payload_len));
            let digest = frames.digest(&stored.token, at, n, key);
            stored.digest = [digest as u64, (digest >> 64) as u64];
            stored.header_len = header_len;
        }
        stored
    }

    /// From now on the SVM's output travels as digests where that saves something, or as bytes.
    pub fn set_digests(&mut self, key: Option<DigestKey>) {
        self.digest_key = key;
    }

    /// The primary needs the bytes of an output of which it has the digest: they are sent, once.
    /// What it has reported released is not here any more, and nobody waits for it.
    pub fn fetch(&mut self, svm_seq: u64) {
        let stored = self.position(svm_seq).map(|at| &mut self.outputs[at]);
        match stored.filter(|stored| stored.header_len != 0) {
            Some(stored) => {
                stored.header_len = 0;
                self.stats.fetched += 1;
                if svm_seq < self.unsent_svm_seq {
                    self.fetched.push_back(svm_seq);
                }
            }
            None => self.stats.fetched_in_vain += 1,
        }
    }

    /// The stored output of that number, in the PVM's space.
    pub fn output(&self, svm_seq: u64) -> Option<&Token> {
        self.position(svm_seq).map(|at| &self.outputs[at].token)
    }

    fn position(&self, svm_seq: u64) -> Option<usize> {
        self.outputs
            .binary_search_by_key(&svm_seq, |stored| stored.svm_seq)
            .ok()
    }

    /// The primary has released what this output stands for (rule 9).
    pub fn handle_released<F: Frames + ?Sized>(&mut self, frames: &mut F, svm_seq: u64) {
        let stored = self
            .position(svm_seq)
            .and_then(|at| self.outputs.remove(at));
        stored
            .into_iter()
            .for_each(|stored| frames.release(stored.token));
    }
}
