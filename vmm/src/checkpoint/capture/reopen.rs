//! Streams of pages that broke: the checkpoint in flight fails, and the next one waits until the secondary has opened others.
//!
//! Invariants: a capture is not begun without streams to send it over; who waits for them hears that the checkpoint is off,
//! and waits no longer than a moment: then the session is given up.
//!
//! Does not open anything: the secondary dials, the control thread hands them over.

use std::net::TcpStream;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::{CaptureCommand, CaptureEvent, CaptureThread};

/// The secondary has noticed by then, and has dialled.
const PATIENCE: Duration = Duration::from_secs(3);

impl CaptureThread {
    /// Nothing more goes over the streams that there are.
    pub(super) fn streams_broken(&mut self, reason: String) {
        let Some(session) = self.session.as_mut().filter(|session| !session.is_broken) else {
            return;
        };
        session.is_broken = true;
        self.post.send(CaptureEvent::StreamsBroken {
            session: self.session_number,
            opened: session.opened,
            reason,
        });
    }

    /// There are others.
    pub(super) fn reopen(&mut self, streams: Vec<TcpStream>, opened: u64) {
        let Some(session) = &mut self.session else {
            return;
        };
        match session.outbound.reopen(streams) {
            Ok(()) => (session.opened, session.is_broken) = (opened, false),
            Err(e) => {
                self.session = None;
                self.link_down(e.to_string());
            }
        }
    }

    /// Waits for streams that are being opened; false if the checkpoint is off already, with streams or without, or there is
    /// no session any more: then the guest is not stopped for it.
    pub(super) fn has_streams(&mut self, commands: &Receiver<CaptureCommand>) -> bool {
        let until = Instant::now() + PATIENCE;
        let ends =
            |c: &CaptureCommand| matches!(c, CaptureCommand::Aborted | CaptureCommand::Detach);
        loop {
            self.deferred.extend(commands.try_iter());
            if self.deferred.iter().any(ends) {
                return false;
            }
            if !self.session.as_ref().is_some_and(|s| s.is_broken) {
                return true;
            }
            let is_reopen = |c: &CaptureCommand| matches!(c, CaptureCommand::Reopen { .. });
            let at = self.deferred.iter().position(is_reopen);
            if let Some(CaptureCommand::Reopen { streams, opened }) =
                at.and_then(|at| self.deferred.remove(at))
            {
                self.reopen(streams, opened);
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            match commands.recv_timeout(left) {
                Ok(command) => self.deferred.push_back(command),
                Err(_) => {
                    self.session = None;
                    let ms = PATIENCE.as_millis();
                    let reason = format!(
                        "page channel: its streams broke and were not opened anew within {ms} ms"
                    );
                    self.link_down(reason);
                    return false;
                }
            }
        }
    }
}
