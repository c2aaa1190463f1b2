//! Live rounds to a joining secondary: all memory that is in use, then what became dirty meanwhile, as often as the control
//! core asks for it.
//!
//! Invariants: no page is touched that the guest never touched, so a synchronisation takes none of the primary's memory and
//! costs what is in use, not what the guest could have; a page that is written to after the first look at what is in use is
//! in the dirty log of the next round (rule 15), because the log was switched on before; an order waits for a chunk at
//! most, and what a round that was called off has not sent belongs to what follows.
//!
//! Does not decide whether another round follows, or how fast the guest may run.

use std::net::TcpStream;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use super::super::codec::PageKey;
use super::super::outbound::{Outbound, SendError};
use super::super::stabilise::Stabiliser;
use super::records::Records;
use super::{CaptureCommand, CaptureEvent, CaptureThread, Session};
use crate::snapshot;

impl CaptureThread {
    /// A secondary has joined: everything that is in use goes to it.
    pub(super) fn begin_sync(
        &mut self,
        streams: Vec<TcpStream>,
        generation: u64,
        key: [u8; 16],
        commands: &Receiver<CaptureCommand>,
    ) {
        self.session = None;
        self.carry.clear();
        self.in_flight.clear();
        match self.open_session(streams, generation, key) {
            Ok(session) => {
                self.session = Some(session);
                self.sync_round(commands);
            }
            Err(reason) => self.link_down(reason),
        }
    }

    pub(super) fn open_session(
        &mut self,
        streams: Vec<TcpStream>,
        generation: u64,
        key: [u8; 16],
    ) -> Result<Session, String> {
        let machine = &self.machine;
        let ram = machine.ram();
        let outbound = Outbound::new(streams, ram.page_count(), key, &self.settings.outbound);
        let mut outbound = outbound.map_err(|e| e.to_string())?;
        outbound.set_generation(generation);
        let view = machine.guest_view().cloned();
        let stabiliser = Stabiliser::new(ram.clone(), view, self.settings.arena_pages);
        let mut stabiliser = stabiliser.map_err(|e| e.to_string())?;
        stabiliser.digest_with(PageKey::new(key));
        machine.set_dirty_logging(true).map_err(|e| e.to_string())?;
        // A joining secondary has zeros everywhere: holes are there already.
        let found = ram.find_data(self.carry.words_mut());
        found.map_err(|e| e.to_string())?;
        Ok(Session {
            outbound,
            stabiliser,
            records: Records::of(machine),
            opened: 0,
            is_broken: false,
        })
    }

    /// Sends what is owed, and tells what came to be owed meanwhile.
    pub(super) fn sync_round(&mut self, commands: &Receiver<CaptureCommand>) {
        // A link that failed was told of.
        let Some(mut session) = self.session.take() else {
            return;
        };
        std::mem::swap(&mut self.carry, &mut self.in_flight);
        let begun = Instant::now();
        let machine = self.machine.clone();
        let (deferred, snapshots) = (&mut self.deferred, &mut self.snapshots);
        let is_off = || {
            loop {
                match commands.try_recv() {
                    // The guest may stand still for it: no capture is under way.
                    Ok(CaptureCommand::Snapshot { request, config }) => {
                        snapshots.serve(request, |path| snapshot::begin(&machine, &config, path));
                    }
                    Ok(command) => deferred.push_back(command),
                    Err(TryRecvError::Empty) => return deferred.iter().any(ends_round),
                    Err(TryRecvError::Disconnected) => return true,
                }
            }
        };
        let pages = self.in_flight.iter();
        let sent = session.outbound.sync(machine.ram(), pages, is_off);
        let failure = match sent {
            Ok(sent_pages) => {
                self.in_flight.clear();
                match machine.take_dirty(&mut self.carry) {
                    Ok(()) => {
                        self.session = Some(session);
                        return self.post.send(CaptureEvent::SyncRound {
                            sent_pages,
                            dirty_pages: self.carry.count() as u64,
                            took_us: begun.elapsed().as_micros() as u64,
                        });
                    }
                    Err(e) => e.to_string(),
                }
            }
            Err(SendError::CalledOff) => {
                self.carry.merge(&self.in_flight);
                self.in_flight.clear();
                self.session = Some(session);
                return;
            }
            Err(e) => e.to_string(),
        };
        // The channel and what is kept for it go.
        drop(session);
        self.link_down(failure);
    }
}

/// Nobody waits for a round any more that one of these follows; a snapshot that a checkpoint has deferred waits on.
fn ends_round(command: &CaptureCommand) -> bool {
    match command {
        CaptureCommand::Snapshot { .. }
        | CaptureCommand::Committed { .. }
        | CaptureCommand::Reopen { .. } => false,
        CaptureCommand::Sync { .. }
        | CaptureCommand::SyncRound
        | CaptureCommand::Capture { .. }
        | CaptureCommand::Aborted
        | CaptureCommand::Detach => true,
    }
}

#[cfg(test)]
#[path = "live_tests.rs"]
mod tests;
