//! The SVM's digests on the primary's end of the page channel, as they come in.
//!
//! Invariants: only the list of the stop that the checkpoint follows counts; that list ends once, whole or not, and
//! whatever ends it, nobody waits for more of it.
//!
//! Does not read the channel and does not wait.

use super::SendError;
use crate::checkpoint::channel::{Chunk, Kind};
use crate::checkpoint::codec::{SvmDigests, SvmPage};
use crate::checkpoint::pages::PageBitmap;
use crate::checkpoint::stop::StopNumber;

/// The digests of one stop.
#[derive(Debug)]
pub(super) struct DigestList {
    pages: SvmDigests,
    epoch: u64,
    /// Whose digests are awaited.
    awaited: Option<StopNumber>,
    /// The list that comes at present is that one.
    is_it: bool,
    is_over: bool,
    bytes: u64,
}

impl DigestList {
    /// Of a guest of so many pages; none is awaited.
    pub(super) fn new(pages: usize) -> Self {
        Self {
            pages: SvmDigests::new(pages),
            epoch: 0,
            awaited: None,
            is_it: false,
            is_over: true,
            bytes: 0,
        }
    }

    /// The checkpoint of `epoch` follows this stop, before which the SVM had written `dirty`.
    pub(super) fn begin(
        &mut self,
        epoch: u64,
        stop: Option<StopNumber>,
        dirty: &PageBitmap,
    ) -> Result<(), SendError> {
        self.pages.begin(dirty)?;
        (self.epoch, self.awaited) = (epoch, stop);
        self.is_it = false;
        self.is_over = stop.is_none();
        self.bytes = 0;
        Ok(())
    }

    /// What is known of the SVM's page.
    pub(super) fn at(&self, number: u64) -> SvmPage {
        self.pages.at(number)
    }

    /// Something of it has come, and not all.
    pub(super) fn has_begun(&self) -> bool {
        self.is_it
    }

    /// Nothing more of it will come.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Bytes of digests that came.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A chunk of some list.
    pub(super) fn take(&mut self, chunk: &Chunk<'_>) -> Result<(), SendError> {
        match chunk.kind {
            // One of an SVM that has run on since says nothing of it.
            Kind::Begin => {
                let number = StopNumber::from_bytes(chunk.payload);
                self.is_it = !self.is_over && number.is_some() && number == self.awaited;
            }
            Kind::Digests if self.is_it => {
                self.pages.accept(chunk.payload)?;
                self.bytes += chunk.payload.len() as u64;
            }
            _ => {}
        }
        Ok(())
    }

    /// The list that came is whole.
    pub(super) fn complete(&mut self) -> Result<(), SendError> {
        if !std::mem::take(&mut self.is_it) {
            return Ok(());
        }
        self.is_over = true;
        match self.pages.is_complete() {
            true => Ok(()),
            false => Err(SendError::DamagedDigests("some did not come".to_owned())),
        }
    }

    /// A list of `epoch` was spoilt or given up: what is left of it is not delivered. It may be spoilt before it has said
    /// whose it is; one of another epoch is of another stop, and its own comes yet.
    pub(super) fn spoil(&mut self, epoch: u64, reason: String) -> Result<(), SendError> {
        if self.is_over || !self.is_it && epoch != self.epoch {
            return Ok(());
        }
        (self.is_it, self.is_over) = (false, true);
        Err(SendError::DamagedDigests(reason))
    }
}
