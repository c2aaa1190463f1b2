//! A channel that goes on over other streams, in the place of ones that broke.
//!
//! Invariants: a generation that was known stays known (rule 18); counts only grow; the memory that the old ring has locked is
//! let go before the new one locks its own, so that one channel's worth of RLIMIT_MEMLOCK is enough.
//!
//! Does not open streams, and brings nothing along that was under way.

use std::net::{Shutdown, TcpStream};

use super::{ChannelError, PageChannel, Settings};

impl PageChannel {
    /// Goes on over other connected sockets, with nothing under way. Where pages are to land is to be said again. After an
    /// error nothing goes over this channel, until this is called again.
    pub fn reopen(&mut self, sockets: Vec<TcpStream>) -> Result<(), ChannelError> {
        let known = self.outgoing.generation.max(self.assembly.generation());
        let settings = Settings {
            generation: known,
            ..self.settings
        };
        self.close();
        let mut channel = Self::new(sockets, settings)?;
        channel.counted = self.counters();
        *self = channel;
        Ok(())
    }

    /// Ends all operations, and lets go of what they have locked.
    fn close(&mut self) {
        // A socket that is closed already has none.
        for socket in &self.sockets {
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.operations.close();
    }
}

impl Drop for PageChannel {
    fn drop(&mut self) {
        self.close();
    }
}
