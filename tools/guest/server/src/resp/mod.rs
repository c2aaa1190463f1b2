//! One client connection of the key-value store: bytes in, commands executed in order, replies out.
//!
//! Invariants: replies do not depend on how the bytes are split; a connection that does not read
//! its replies is not read from either; after a protocol error the connection gets redis's error
//! and is closed.

pub(crate) mod reply;
pub(crate) mod scan;

#[cfg(test)]
mod tests;

use crate::kv;
use crate::outbox::Outbox;
use crate::world::World;
use alloc::vec::Vec;
use scan::{ProtocolError, Scan, Scanner};

/// Unfinished input up to this size needs no room in the common budget.
const FREE_INPUT: usize = 16 * 1024;
/// A buffer that grew beyond this is given back once it is empty.
const KEEP_CAPACITY: usize = 8 * 1024;

/// What a command wants done with its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    Continue,
    Close,
}

/// A connection's unfinished input.
#[derive(Default)]
pub(crate) struct Resp {
    scanner: Scanner,
    pending: Vec<u8>,
    /// `pending` may hold a complete command that had to wait for room in the outbox.
    stalled: bool,
}

impl Resp {
    /// Takes all of `src` and executes what is complete, as long as the outbox is ready.
    pub fn input(&mut self, src: &[u8], outbox: &mut Outbox, world: &mut World) {
        if self.pending.is_empty() {
            let used = self.execute(src, outbox, world);
            self.keep(&src[used..], outbox, world);
            return;
        }
        self.keep(src, outbox, world);
        let pending = core::mem::take(&mut self.pending);
        let used = self.execute(&pending, outbox, world);
        self.pending = pending;
        self.pending.drain(..used);
        if self.pending.is_empty() && self.pending.capacity() > KEEP_CAPACITY {
            self.pending = Vec::new();
        }
    }

    /// True when [`Resp::input`] with no bytes makes progress once the outbox is ready.
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Heap bytes held.
    pub fn held(&self) -> usize {
        self.pending.capacity() + self.scanner.held()
    }

    /// Executes the commands at the front of `text`; gives the number of bytes they took.
    fn execute(&mut self, text: &[u8], outbox: &mut Outbox, world: &mut World) -> usize {
        let mut used = 0;
        self.stalled = false;
        loop {
            if outbox.is_closing() {
                return text.len();
            }
            if !outbox.ready() {
                self.stalled = used < text.len();
                return used;
            }
            let rest = &text[used..];
            match self.scanner.scan(rest) {
                Ok(Scan::More) => return used,
                Ok(Scan::Command(len)) => {
                    let args = self.scanner.args(rest);
                    if args.len() > 0 && kv::execute(args, world, outbox.bytes()) == After::Close {
                        outbox.close();
                    }
                    self.scanner.restart();
                    used += len;
                }
                Err(error) => refuse(error, outbox),
            }
        }
    }

    fn keep(&mut self, rest: &[u8], outbox: &mut Outbox, world: &mut World) {
        if outbox.is_closing() || rest.is_empty() {
            return;
        }
        let total = self.pending.len() + rest.len();
        if total > self.pending.capacity() && total > FREE_INPUT && !world.can_hold(total) {
            return refuse(ProtocolError::Command, outbox);
        }
        self.pending.extend_from_slice(rest);
    }
}

fn refuse(error: ProtocolError, outbox: &mut Outbox) {
    let mut parts = [
        &b"ERR Protocol error: "[..],
        error.text().as_bytes(),
        b"",
        b"",
    ];
    let byte;
    if let ProtocolError::Dollar(got) = error {
        byte = [got];
        parts[2] = &byte;
        parts[3] = b"'";
    }
    reply::error(outbox.bytes(), &parts);
    outbox.close();
}
