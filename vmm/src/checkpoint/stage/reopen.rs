//! Streams of pages that broke on the secondary: what was under way is forgotten, and the thread goes on over others.
//!
//! Invariants: nothing of what came over the old streams is left, neither of a checkpoint nor ahead of one; the last order for
//! digests is carried out afterwards, whether it comes meanwhile or was carried out over the old streams, where nobody may have
//! read them: the primary waits for the end of the list even if the checkpoint is off. The others are of stops that are over.

use std::net::TcpStream;

use super::{Over, StageCommand, StageEvent, StageThread};

impl StageThread {
    /// Tells that the streams are of no use, and waits for others.
    pub(super) fn go_on(&mut self, reason: String) -> Result<(), Over> {
        self.open = None;
        self.ordered = self.ordered.take().or(self.listed.take());
        self.staging.clear();
        self.area.clear();
        self.post.send(StageEvent::StreamsBroken { reason });
        loop {
            match self.commands.recv() {
                Err(_) => return Err(Over::Quietly),
                Ok(StageCommand::Reopen(streams)) => return self.reopen(streams),
                Ok(digests @ StageCommand::Digests { .. }) => self.ordered = Some(digests),
                // Nothing is staged.
                Ok(StageCommand::Apply { .. } | StageCommand::Discard) => {}
            }
        }
    }

    fn reopen(&mut self, streams: Vec<TcpStream>) -> Result<(), Over> {
        self.channel.reopen(streams)?;
        self.channel.land_in(self.staging.landings());
        let waker = self.channel.waker();
        self.post.send(StageEvent::Reopened { waker });
        Ok(())
    }
}
