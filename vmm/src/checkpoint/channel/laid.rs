//! Chunks that leave together: a small checkpoint is few calls of the kernel, and few wake-ups of the receiver.
//!
//! Invariants: on the wire chunks are what they would be alone; one buffer has what is laid, and what it has is sent before
//! another one is given out, or nothing is left of half of it; pages that are lent are the last but for the checkpoint's end.
//!
//! Does not decide what is worth laying.

use std::sync::Arc;
use std::time::Duration;

use super::frame::Kind;
use super::send::LAID_STREAM;
use super::{ChannelError, Keeper, NO_BUFFER, PageChannel};

impl PageChannel {
    /// As [`Self::begin`], but it leaves with the first chunk: see [`Self::lay`].
    pub fn lay_begin(&mut self, epoch: u64, payload: &[u8]) -> Result<(), ChannelError> {
        if self.outgoing.open.is_some() {
            return Err(ChannelError::Usage(
                "a checkpoint is open already; end or abort it",
            ));
        }
        if payload.len() > self.settings.chunk_bytes {
            return Err(ChannelError::Usage("more than a chunk holds"));
        }
        self.outgoing.open(epoch);
        // The receiver begins with that of the first stream, whatever comes before on others.
        for stream in (0..self.sockets.len()).rev() {
            self.next_buffer()?[..payload.len()].copy_from_slice(payload);
            let chunk = (epoch, 0, payload.len());
            match stream {
                LAID_STREAM => self.lay_chunk(Kind::Begin, chunk)?,
                _ => self.send_chunk(stream, Kind::Begin, chunk)?,
            }
        }
        Ok(())
    }

    /// As [`Self::submit`], but the chunk, and what was laid before it, leaves with the next one, in one send. As long as
    /// something is laid, [`Self::next_buffer`] gives what is left of its buffer, which is half of one or more. Whoever submits
    /// nothing after it has to [`Self::flush`].
    pub fn lay(&mut self, kind: Kind, items: u32, length: usize) -> Result<(), ChannelError> {
        let epoch = self.open_for(kind)?;
        self.lay_chunk(kind, (epoch, items, length))
    }

    /// As [`Self::submit_lent`], for the last pages of a checkpoint: they leave with its end, in one send, if nothing else comes
    /// before that.
    pub fn lay_lent(
        &mut self,
        items: u32,
        length: usize,
        keeper: &Arc<dyn Keeper>,
        slots: (&[u32], usize),
    ) -> Result<(), ChannelError> {
        self.lend(length, keeper, slots)?;
        let laid = self.lay(Kind::Pages, items, length);
        if laid.is_err() {
            self.outgoing.bulk.clear();
        }
        laid
    }

    /// Sends what is laid when it fills half of its buffer.
    fn lay_chunk(&mut self, kind: Kind, chunk: (u64, u32, usize)) -> Result<(), ChannelError> {
        if !self.outgoing.lay(LAID_STREAM, kind, chunk) {
            return Err(NO_BUFFER);
        }
        if self.outgoing.payload().len() >= self.settings.chunk_bytes / 2 {
            return Ok(());
        }
        self.send_laid()
    }

    /// For the few bytes of an end, which fit behind whatever is laid.
    pub(super) fn buffer_behind_laid(&mut self) -> Result<&mut [u8], ChannelError> {
        match self.outgoing.has_laid() {
            true => Ok(self.outgoing.payload()),
            false => self.next_buffer(),
        }
    }

    /// What is laid leaves now.
    pub fn send_laid(&mut self) -> Result<(), ChannelError> {
        self.outgoing.queue_laid(&mut self.operations, LAID_STREAM);
        self.turn(Duration::ZERO)
    }
}
