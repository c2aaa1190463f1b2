//! Pages ahead, on the primary's end of the page channel: chunks between checkpoints, names within one.
//!
//! Invariants: a chunk is made only when the channel takes it at once, so nobody waits for the link here; a page is named
//! behind the checkpoint's own pages, when most of the SVM's digests have come, and is dropped where the SVM has the same.
//!
//! Does not decide which pages: [`Ahead`] does.

use std::time::{Duration, Instant};

use colo_fastpath::ring::{GuestRam, MemoryError};

use super::{Outbound, SendError};
use crate::checkpoint::ahead::primary::{Ahead, FillError};
use crate::checkpoint::ahead::wire::NameList;
use crate::checkpoint::ahead::{AheadCounters, EPOCH};
use crate::checkpoint::channel::Kind;
use crate::checkpoint::codec::{PageDigest, SvmPage};
use crate::checkpoint::pages::PageBitmap;

/// What the link is taken to carry until it was measured: pages ahead are no reason to fill a slow one.
const UNMEASURED_BYTES_PER_S: u64 = 128 << 20;

/// What a step has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AheadStep {
    /// The log was read; this was counted since the last time, if anything was.
    Round(Option<AheadCounters>),
    /// A chunk went to the link, or nothing did.
    Chunk,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum AheadError<E> {
    /// The log could not be read.
    #[error("the dirty log: {0}")]
    Log(E),
    /// The page channel or guest memory.
    #[error(transparent)]
    Send(#[from] SendError),
}

impl From<FillError<MemoryError>> for SendError {
    fn from(e: FillError<MemoryError>) -> Self {
        match e {
            FillError::Read(e) => e.into(),
            FillError::Encode(e) => e.into(),
        }
    }
}

impl Outbound {
    /// Pages may be sent ahead from the next commit on; or not any more.
    pub fn set_ahead(&mut self, ahead: Option<Ahead>) {
        self.ahead = ahead;
    }

    /// How long there is nothing to do ahead of the next checkpoint; `None`: until the one in flight has ended.
    pub fn ahead_wait(&self) -> Option<Duration> {
        let at = self.ahead.as_ref()?.next_at()?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    /// Looks at the log with `take`, or sends one chunk, whichever is due.
    pub fn step_ahead<E>(
        &mut self,
        ram: &GuestRam,
        owed: &mut PageBitmap,
        take: impl FnOnce(&mut PageBitmap) -> Result<(), E>,
    ) -> Result<AheadStep, AheadError<E>> {
        let now = Instant::now();
        let Some(ahead) = &mut self.ahead else {
            return Ok(AheadStep::Chunk);
        };
        if ahead.is_round_due(now) {
            ahead.round(owed, now, take).map_err(AheadError::Log)?;
            return Ok(AheadStep::Round(ahead.take_news()));
        }
        let buffer = self.channel.try_next_buffer().map_err(SendError::from)?;
        let Some(buffer) = buffer else {
            ahead.put_off(now);
            return Ok(AheadStep::Chunk);
        };
        let read = |number: u64, page: &mut _| ram.copy_page_out(number as usize, page);
        let filled = ahead.fill_chunk(buffer, self.chooser.key(), read);
        let filled = filled.map_err(SendError::from)?;
        if filled.pages > 0 {
            self.channel
                .submit_loose(Kind::Ahead, EPOCH, filled.pages, filled.length)
                .map_err(SendError::from)?;
            let measured = self.measured.unwrap_or(UNMEASURED_BYTES_PER_S);
            let rate = ahead.bytes_per_s(measured);
            ahead.chunk_sent(filled.length, rate, now);
        }
        Ok(AheadStep::Chunk)
    }

    /// A capture is made; the log says what was written since it was read last. Gives how many of the owed pages the
    /// secondary has already.
    pub fn captured(&mut self, written: &PageBitmap) -> u64 {
        self.ahead.as_mut().map_or(0, |ahead| {
            ahead.captured(written);
            ahead.sent().count() as u64
        })
    }

    /// What of the union of both dirty sets a capture has to keep.
    pub fn to_keep<'a>(&'a mut self, union: &'a PageBitmap) -> &'a PageBitmap {
        match &mut self.ahead {
            Some(ahead) => ahead.to_keep(union),
            None => union,
        }
    }

    /// Names what the secondary has of the checkpoint. Gives how long it waited for digests.
    pub(super) fn send_names(
        &mut self,
        is_off: &mut impl FnMut() -> bool,
    ) -> Result<Duration, SendError> {
        // Back in any case: after an abort the fill goes on counting.
        let Some(mut ahead) = self.ahead.take() else {
            return Ok(Duration::ZERO);
        };
        let sent = self.send_names_of(&mut ahead, is_off);
        self.ahead = Some(ahead);
        sent
    }

    fn send_names_of(
        &mut self,
        ahead: &mut Ahead,
        is_off: &mut impl FnMut() -> bool,
    ) -> Result<Duration, SendError> {
        let mut waited = Duration::ZERO;
        let mut names = NameList::new(self.chunk_bytes);
        let (relied_on, history) = ahead.relied_on();
        for (number, digest) in relied_on {
            if self.list.at(number) == SvmPage::Pending {
                self.channel.send_laid().map_err(SendError::from)?;
            }
            waited += self.await_digest(number, is_off)?;
            let is_equal = self.svm_has(number, digest);
            history.learn(number, is_equal);
            if is_equal {
                self.names.equal_pages += 1;
                continue;
            }
            self.names.used_pages += 1;
            self.cache.supersede(number);
            names.push(number as u32, digest);
            if names.is_full() {
                self.submit_names(&mut names, is_off)?;
            }
        }
        if names.count() > 0 {
            self.submit_names(&mut names, is_off)?;
        }
        Ok(waited)
    }

    /// Whether the stopped SVM has these bytes; if so, they are dropped. The page of the last commit stays known if it is
    /// the same.
    fn svm_has(&mut self, number: u64, digest: PageDigest) -> bool {
        let base = self.cache.get(number).map(|base| base.digest);
        let has = match self.list.at(number) {
            SvmPage::Dirty(svm) => svm == digest,
            SvmPage::Clean => base == Some(digest),
            SvmPage::Pending => false,
        };
        if has && base != Some(digest) {
            self.cache.supersede(number);
        }
        has
    }

    fn submit_names(
        &mut self,
        names: &mut NameList,
        is_off: &mut impl FnMut() -> bool,
    ) -> Result<(), SendError> {
        self.await_buffer(is_off)?;
        let count = names.count();
        let bytes = names.finish();
        let length = bytes.len();
        self.channel.next_buffer()?[..length].copy_from_slice(bytes);
        self.channel.submit(Kind::Named, count, length)?;
        names.clear();
        Ok(())
    }
}
