//! What a connection still has to put into its socket: bytes, then at most one page made on the
//! fly.
//!
//! Invariants: bytes come out in the order they went in; a page is queued only behind all bytes,
//! and nothing is queued behind a page that is not yet sent.

use crate::pages::Page;
use alloc::vec::Vec;

/// Above this many unsent bytes a service takes no further request of the connection.
pub(crate) const READY_BELOW: usize = 16 * 1024;
/// A buffer that grew beyond this is given back once it is empty.
const KEEP_CAPACITY: usize = 8 * 1024;

/// Unsent output of one connection.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
    page: Page,
    closing: bool,
}

impl Outbox {
    /// Where replies are appended. Only while [`Outbox::ready`].
    pub fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Queues a page behind the bytes.
    pub fn send_page(&mut self, page: Page) {
        self.page = page;
    }

    /// Closes the connection once everything is sent; later requests are ignored.
    pub fn close(&mut self) {
        self.closing = true;
    }

    pub fn is_closing(&self) -> bool {
        self.closing
    }

    pub fn is_empty(&self) -> bool {
        self.sent == self.bytes.len() && self.page.is_empty()
    }

    /// True when the next request may be executed. It depends on what the client has acknowledged,
    /// hence on input frames only.
    pub fn ready(&self) -> bool {
        !self.closing && self.page.is_empty() && self.bytes.len() - self.sent < READY_BELOW
    }

    /// Moves output into `out`; gives the number of bytes.
    pub fn fill(&mut self, out: &mut [u8]) -> usize {
        let n = out.len().min(self.bytes.len() - self.sent);
        out[..n].copy_from_slice(&self.bytes[self.sent..self.sent + n]);
        self.sent += n;
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
            if self.bytes.capacity() > KEEP_CAPACITY {
                self.bytes = Vec::new();
            }
        }
        n + self.page.fill(&mut out[n..])
    }

    /// Heap bytes held.
    pub fn held(&self) -> usize {
        self.bytes.capacity()
    }

    /// Forgets everything, for the next connection.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}
