//! What the primary's checkpoint thread does between checkpoints: it looks at the dirty log and sends pages ahead, one
//! small chunk at a time, and an order comes before each.
//!
//! Does not decide what is sent: `checkpoint::ahead` does.

use std::sync::mpsc::{Receiver, RecvTimeoutError};

use super::{CaptureCommand, CaptureEvent, CaptureThread};
use crate::checkpoint::ahead::primary::Ahead;
use crate::checkpoint::outbound::{AheadError, AheadStep};
use crate::checkpoint::pages::PageBitmap;

impl CaptureThread {
    /// Pages may be sent ahead to a secondary that keeps so much of them.
    pub(super) fn prepare_ahead(&mut self, ahead_mib: usize) {
        let pages = self.machine.ram().page_count();
        if let Some(session) = &mut self.session {
            let ahead = Ahead::new(pages, ahead_mib, self.settings.ahead);
            session.outbound.set_ahead(ahead);
        }
    }

    /// The next order; `None` when nobody gives any more.
    pub(super) fn next_command(
        &mut self,
        commands: &Receiver<CaptureCommand>,
    ) -> Option<CaptureCommand> {
        if let Some(deferred) = self.deferred.pop_front() {
            return Some(deferred);
        }
        loop {
            let session = self.session.as_ref().filter(|session| !session.is_broken);
            let Some(wait) = session.and_then(|session| session.outbound.ahead_wait()) else {
                return commands.recv().ok();
            };
            match commands.recv_timeout(wait) {
                Ok(command) => return Some(command),
                Err(RecvTimeoutError::Timeout) => self.step_ahead(),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn step_ahead(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        let machine = &self.machine;
        let take = |set: &mut PageBitmap| machine.take_dirty(set);
        let step = session
            .outbound
            .step_ahead(machine.ram(), &mut self.carry, take);
        match step {
            Ok(AheadStep::Round(Some(news))) => self.post.send(CaptureEvent::Ahead(news)),
            Ok(AheadStep::Round(None) | AheadStep::Chunk) => {}
            Err(AheadError::Log(e)) => {
                tracing::warn!("no pages are sent ahead of checkpoints any more: {e}");
                session.outbound.set_ahead(None);
            }
            Err(AheadError::Send(e)) if e.is_broken_stream() => self.streams_broken(e.to_string()),
            Err(AheadError::Send(e)) => {
                self.session = None;
                self.link_down(e.to_string());
            }
        }
    }
}
