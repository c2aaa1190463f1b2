//! Puts checkpoints together from chunks of several streams (sans-IO).
//!
//! Invariants: a checkpoint is complete when each stream has ended it and had what its End says, in order; at most one
//! is open (rule 7), and the first stream opens it; what is wrong with one spoils that one, and what still comes of it is skipped; a generation never
//! goes back (rule 18).

use std::time::Instant;

use super::counters::Counters;
use super::error::ChannelError;
use super::frame::{Header, Kind, Totals};

/// What to do with a chunk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is for the owner.
    Deliver(Kind),
    /// It was for the assembly.
    Absorb,
    /// It was the last one of its checkpoint.
    Complete { epoch: u64, totals: Totals },
    /// The sender has given the checkpoint up.
    Aborted { epoch: u64 },
    /// The checkpoint is spoilt.
    Damaged { epoch: u64, reason: String },
}

/// One stream's share of the open checkpoint.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    begun: bool,
    ended: bool,
    sequence: u32,
    totals: Totals,
}

#[derive(Debug)]
struct Open {
    attempt: u32,
    epoch: u64,
    generation: u64,
    since: Instant,
    shares: Vec<Share>,
}

/// Checkpoints coming in.
#[derive(Debug)]
pub(super) struct Assembly {
    streams: usize,
    open: Option<Open>,
    /// Attempts up to this one are over.
    over: u32,
    generation: u64,
}

impl Assembly {
    pub(super) fn new(streams: usize, generation: u64) -> Self {
        Self {
            streams,
            open: None,
            over: 0,
            generation,
        }
    }

    /// Refuses what is older from now on.
    pub(super) fn raise_generation(&mut self, generation: u64) {
        self.generation = self.generation.max(generation);
    }

    /// What is older is refused.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Since when more is expected on a stream.
    pub(super) fn expected_since(&self, stream: usize) -> Option<Instant> {
        let open = self.open.as_ref()?;
        (!open.shares[stream].ended).then_some(open.since)
    }

    /// True for a chunk of the next checkpoint on a stream that has ended this one: the others come first. And for one that
    /// would begin a checkpoint on another stream than the first: what went loose before it is on that one.
    pub(super) fn must_wait(&self, stream: usize, header: &Header) -> bool {
        let Some(open) = &self.open else {
            return stream > 0 && header.attempt > self.over;
        };
        header.attempt > open.attempt && (stream > 0 || open.shares[stream].ended)
    }

    /// The open checkpoint, if this chunk begins another one before the end: its sender has dropped it. To be asked
    /// before [`Self::chunk`].
    pub(super) fn superseded(&mut self, header: &Header) -> Option<Verdict> {
        let open = self.open.as_ref()?;
        if header.attempt <= open.attempt || header.generation < self.generation {
            return None;
        }
        let reason = format!("another one (epoch {}) began before its end", header.epoch);
        let epoch = open.epoch;
        Some(self.damaged(epoch, reason))
    }

    /// The next chunk of a stream; `intact` says that the payload's checksum is right.
    pub(super) fn chunk(
        &mut self,
        stream: usize,
        header: &Header,
        payload: &[u8],
        intact: bool,
        counters: &mut Counters,
        now: Instant,
    ) -> Result<Verdict, ChannelError> {
        let kind = Kind::from_wire(header.kind);
        if matches!(kind, Some(Kind::Sync | Kind::Ahead)) {
            return self.loose_chunk(stream, header, intact, counters);
        }
        if kind.is_none() && header.attempt == 0 {
            counters.unknown_chunks += 1;
            return Ok(Verdict::Absorb);
        }
        if header.attempt <= self.over
            || self
                .open
                .as_ref()
                .is_some_and(|o| header.attempt < o.attempt)
        {
            counters.stale_chunks += 1;
            return Ok(Verdict::Absorb);
        }
        let spoil = |this: &mut Self, reason| {
            let epoch = this.open.as_ref().map_or(header.epoch, |open| open.epoch);
            this.over = this.over.max(header.attempt);
            Ok(this.damaged(epoch, reason))
        };
        if header.generation < self.generation {
            counters.old_generation_chunks += 1;
            let reason = format!(
                "generation {}, but {} is known",
                header.generation, self.generation
            );
            return spoil(self, reason);
        }
        if self.open.is_none() {
            if kind != Some(Kind::Begin) {
                return spoil(
                    self,
                    format!(
                        "it begins with a chunk of kind {} on stream {stream}",
                        header.kind
                    ),
                );
            }
            self.raise_generation(header.generation);
            self.open = Some(Open {
                attempt: header.attempt,
                epoch: header.epoch,
                generation: header.generation,
                since: now,
                shares: vec![Share::default(); self.streams],
            });
        }
        match self.open_chunk(stream, header, payload, intact, kind) {
            Ok(verdict) => Ok(verdict),
            Err(reason) => spoil(self, reason),
        }
    }

    /// A chunk that belongs to no checkpoint.
    fn loose_chunk(
        &mut self,
        stream: usize,
        header: &Header,
        intact: bool,
        counters: &mut Counters,
    ) -> Result<Verdict, ChannelError> {
        let ahead = header.kind == Kind::Ahead as u16;
        let reason = if header.generation < self.generation {
            counters.old_generation_chunks += 1;
            format!(
                "of generation {}, but {} is known",
                header.generation, self.generation
            )
        } else if !intact {
            "have a wrong checksum".to_owned()
        } else {
            self.raise_generation(header.generation);
            return Ok(Verdict::Deliver(if ahead {
                Kind::Ahead
            } else {
                Kind::Sync
            }));
        };
        match ahead {
            true => Ok(Verdict::Damaged {
                epoch: header.epoch,
                reason: format!("pages sent ahead {reason}"),
            }),
            false => Err(ChannelError::Sync { stream, reason }),
        }
    }

    /// A chunk of the open checkpoint; fails with what is wrong.
    fn open_chunk(
        &mut self,
        stream: usize,
        header: &Header,
        payload: &[u8],
        intact: bool,
        kind: Option<Kind>,
    ) -> Result<Verdict, String> {
        let open = self.open.as_mut().ok_or("it is not open")?;
        let sequence = header.sequence;
        if (header.epoch, header.generation) != (open.epoch, open.generation) {
            return Err(format!(
                "a chunk of epoch {} and generation {} inside epoch {} and generation {}",
                header.epoch, header.generation, open.epoch, open.generation
            ));
        }
        if !intact {
            return Err(format!(
                "chunk {sequence} of stream {stream} has a wrong checksum"
            ));
        }
        let Some(kind) = kind else {
            return Err(format!(
                "chunk of unknown kind {}; update this host",
                header.kind
            ));
        };
        let share = &mut open.shares[stream];
        if sequence != share.sequence || share.ended || share.begun != (sequence > 0) {
            return Err(format!(
                "chunk {} of stream {stream} is missing, {sequence} came",
                share.sequence
            ));
        }
        share.sequence += 1;
        match kind {
            Kind::Begin if sequence == 0 => {
                share.begun = true;
                let begun = open.shares.iter().filter(|s| s.begun).count();
                Ok(if begun == 1 {
                    Verdict::Deliver(kind)
                } else {
                    Verdict::Absorb
                })
            }
            _ if sequence == 0 => Err(format!("stream {stream} does not begin it")),
            Kind::State | Kind::Pages | Kind::Named | Kind::Digests => {
                share.totals.add_chunk(kind, header.items);
                Ok(Verdict::Deliver(kind))
            }
            Kind::End if payload != share.totals.to_bytes() => Err(format!(
                "stream {stream} had {:?}, its End says otherwise",
                share.totals
            )),
            Kind::End => {
                share.ended = true;
                Ok(self.complete())
            }
            Kind::Abort => {
                let epoch = open.epoch;
                self.close();
                Ok(Verdict::Aborted { epoch })
            }
            Kind::Sync | Kind::Ahead | Kind::Begin => {
                Err(format!("a chunk of kind {kind:?} inside it"))
            }
        }
    }

    fn complete(&mut self) -> Verdict {
        let Some(open) = self
            .open
            .as_ref()
            .filter(|o| o.shares.iter().all(|s| s.ended))
        else {
            return Verdict::Absorb;
        };
        let mut totals = Totals::default();
        open.shares.iter().for_each(|s| totals.merge(&s.totals));
        let epoch = open.epoch;
        self.close();
        Verdict::Complete { epoch, totals }
    }

    fn damaged(&mut self, epoch: u64, reason: String) -> Verdict {
        self.close();
        Verdict::Damaged { epoch, reason }
    }

    fn close(&mut self) {
        if let Some(open) = self.open.take() {
            self.over = self.over.max(open.attempt);
        }
    }
}
