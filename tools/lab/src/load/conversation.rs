//! What a connection of the load generator says and expects, apart from sockets and clocks.
//!
//! Invariants: every byte that a conversation is given is either expected or counted as wrong; a
//! conversation survives its connection ([`Conversation::hang_up`]) and then knows which of its requests
//! have an unknown outcome.
//!
//! Does not open connections and measures nothing.

use super::facts::Facts;

/// The protocols, for reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Http,
    Resp,
    Echo,
}

/// The peer's bytes cannot be followed any more; the connection is given up. Counted as wrong.
#[derive(Debug)]
pub(crate) struct Broken(pub(crate) String);

/// One connection's requests and what must come back. At most one `ask` is outstanding.
pub(crate) trait Conversation {
    fn kind(&self) -> Kind;

    /// Appends the next request or requests. Gives how many answers are expected.
    fn ask(&mut self, facts: &mut Facts, out: &mut Vec<u8>) -> usize;

    /// Restarts the audit of everything that was acknowledged.
    fn begin_audit(&mut self);

    /// Like [`Self::ask`], with the next requests of the audit; 0 when it is over.
    fn audit(&mut self, facts: &mut Facts, out: &mut Vec<u8>) -> usize;

    /// Takes bytes from the peer. Gives how many answers they completed.
    fn hear(&mut self, facts: &mut Facts, bytes: &[u8]) -> Result<usize, Broken>;

    /// The connection ended, perhaps with requests unanswered.
    fn hang_up(&mut self, facts: &mut Facts);

    /// The client wants to close the connection now and open another.
    fn leaving(&mut self) -> bool {
        false
    }
}
