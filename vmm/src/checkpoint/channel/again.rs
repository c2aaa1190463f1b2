//! A channel that goes on over other streams, in the place of ones that broke.
//!
//! Invariants: a generation that was known stays known (rule 18); counts only grow.
//!
//! Does not open streams, and brings nothing along that was under way.

use std::net::TcpStream;

use super::{ChannelError, PageChannel, Settings};

impl PageChannel {
    /// The same over other connected sockets, with nothing under way. Where pages are to land is to be said again.
    pub fn over(&self, sockets: Vec<TcpStream>) -> Result<Self, ChannelError> {
        let known = self.outgoing.generation.max(self.assembly.generation());
        let settings = Settings {
            generation: known,
            ..self.settings
        };
        let mut channel = Self::new(sockets, settings)?;
        channel.counted = self.counters();
        Ok(channel)
    }
}
