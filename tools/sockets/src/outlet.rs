//! The output: spans of the slab that are to be written, in order.
//!
//! Invariants: what was released is written whole and once, or the run ends with an error; frames
//! that lie side by side leave as one span; many spans leave with one system call.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::ops::Range;

use colo_compare::Token;

use crate::address::Socket;
use crate::error::SocketsError;
use crate::slab::{BlockId, SLOTS, Slab};

/// Spans of one system call.
const SPANS_PER_WRITE: usize = 64;

#[derive(Debug)]
struct Span {
    block: BlockId,
    range: Range<usize>,
}

/// The writing end.
#[derive(Debug)]
pub(crate) struct Outlet {
    socket: Socket,
    spans: VecDeque<Span>,
    /// Bytes written.
    position: u64,
    blocked: bool,
}

impl Outlet {
    pub(crate) fn new(socket: Socket) -> Self {
        Self {
            socket,
            spans: VecDeque::with_capacity(SLOTS),
            position: 0,
            blocked: false,
        }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether the socket takes nothing more at present.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Takes a released frame.
    #[inline]
    pub(crate) fn push(&mut self, token: Token, slab: &mut Slab) {
        let (block, range) = slab.take_out(token);
        match self.spans.back_mut() {
            Some(last) if last.range.end == range.start && last.block == block => {
                last.range.end = range.end;
                slab.unpin(block);
            }
            _ => self.spans.push_back(Span { block, range }),
        }
    }

    /// Takes bytes that are to leave and have no token. Most often they follow the last ones.
    #[inline(always)]
    pub(crate) fn push_range(&mut self, range: Range<usize>, slab: &mut Slab) {
        let block = Slab::block_of(range.start);
        match self.spans.back_mut() {
            Some(last) if last.range.end == range.start && last.block == block => {
                last.range.end = range.end;
            }
            _ => {
                slab.pin(block);
                self.spans.push_back(Span { block, range });
            }
        }
    }

    /// Writes what the socket takes.
    pub(crate) fn flush(&mut self, slab: &mut Slab) -> Result<(), SocketsError> {
        self.blocked = false;
        while !self.spans.is_empty() {
            match self.write(slab) {
                Ok(n) => self.written(n, slab),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    break;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(SocketsError::Write {
                        socket: self.socket.name.clone(),
                        at: self.position,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn write(&self, slab: &Slab) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); SPANS_PER_WRITE];
        let mut count = 0;
        for (slice, span) in slices.iter_mut().zip(&self.spans) {
            *slice = IoSlice::new(slab.bytes(span.range.clone()));
            count += 1;
        }
        (&self.socket.file).write_vectored(&slices[..count])
    }

    fn written(&mut self, mut n: usize, slab: &mut Slab) {
        self.position += n as u64;
        while let Some(span) = self.spans.front_mut() {
            if n < span.range.len() {
                span.range.start += n;
                return;
            }
            n -= span.range.len();
            slab.unpin(span.block);
            self.spans.pop_front();
        }
    }
}
