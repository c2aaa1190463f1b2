//! The sending side: buffers, a queue for each stream, what the open checkpoint has on each.
//!
//! Chunks that are *laid* lie in one buffer, one behind the other, and leave with the next one in a single send: on the wire
//! they are what they would be otherwise.
//!
//! Invariants: at most one send of a stream is under way, so its bytes stay in order however short a send is; a buffer
//! is free, claimed by the owner, or held by `operations` until the kernel is done with it (rule 15); what is laid is of the
//! first stream.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use super::bulk::Bulk;
use super::counters::Counters;
use super::error::{ChannelError, Step};
use super::frame::{HEADER_BYTES, Header, Kind, Totals};
use super::memory::Buffer;
use super::operations::Operations;

/// The stream of what is laid.
pub(super) const LAID_STREAM: usize = 0;
/// Below it, pinning pages costs more than copying them.
const ZERO_COPY_MIN_BYTES: usize = 32 << 10;

/// A chunk on its way.
#[derive(Debug)]
struct Queued {
    index: u32,
    bytes: usize,
    sent: usize,
    chunks: u64,
}

/// Chunks in the claimed buffer that leave with the next one.
#[derive(Debug, Clone, Copy, Default)]
struct Laid {
    bytes: usize,
    chunks: u64,
    /// So many of the bytes lie before the bulk of one of them; the others are behind it.
    head: Option<usize>,
}

#[derive(Debug)]
struct Lane {
    queue: VecDeque<Queued>,
    queued_bytes: usize,
    /// A send of the first one is under way.
    busy: bool,
    zero_copy: bool,
    /// Buffers that were sent with SEND_ZC and are still the kernel's: the peer has not taken them.
    unreturned: usize,
    /// Last time that something moved, or that there was nothing to move.
    since: Instant,
    sequence: u32,
    totals: Totals,
}

/// What is to be sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    free: Vec<Buffer>,
    claimed: Option<Buffer>,
    laid: Laid,
    /// What is to lie behind the claimed buffer's bytes.
    pub(super) bulk: Bulk,
    lanes: Vec<Lane>,
    next: usize,
    attempt: u32,
    /// The epoch of the open checkpoint.
    pub(super) open: Option<u64>,
    pub(super) generation: u64,
}

impl Outgoing {
    pub(super) fn new(
        streams: usize,
        buffers: Vec<Buffer>,
        zero_copy: bool,
        generation: u64,
    ) -> Self {
        let since = Instant::now();
        let lane = |_| Lane {
            queue: VecDeque::with_capacity(buffers.len()),
            queued_bytes: 0,
            busy: false,
            zero_copy,
            unreturned: 0,
            since,
            sequence: 0,
            totals: Totals::default(),
        };
        let lanes = (0..streams).map(lane).collect();
        Self {
            free: buffers,
            claimed: None,
            laid: Laid::default(),
            bulk: Bulk::default(),
            lanes,
            next: 0,
            attempt: 0,
            open: None,
            generation,
        }
    }

    /// True if a buffer is claimed now.
    pub(super) fn claim(&mut self) -> bool {
        if self.claimed.is_none() {
            self.claimed = self.free.pop();
        }
        self.claimed.is_some()
    }

    /// A buffer could be claimed.
    pub(super) fn has_free(&self) -> bool {
        self.claimed.is_some() || !self.free.is_empty()
    }

    /// The claimed buffer's place for a payload; empty without a claim.
    pub(super) fn payload(&mut self) -> &mut [u8] {
        let from = self.laid.bytes + HEADER_BYTES;
        let buffer = self.claimed.as_deref_mut().unwrap_or_default();
        buffer.get_mut(from..).unwrap_or_default()
    }

    /// Chunks wait in the claimed buffer for the next one.
    pub(super) fn has_laid(&self) -> bool {
        self.laid.chunks > 0
    }

    /// A new checkpoint is open.
    pub(super) fn open(&mut self, epoch: u64) {
        self.attempt += 1;
        self.open = Some(epoch);
        for lane in &mut self.lanes {
            (lane.sequence, lane.totals) = (0, Totals::default());
        }
    }

    /// The open one is over.
    pub(super) fn close(&mut self) {
        self.open = None;
    }

    /// What the open checkpoint has on a stream.
    pub(super) fn totals(&self, stream: usize) -> Totals {
        self.lanes[stream].totals
    }

    /// One of them has a bulk; it is the only one of its buffer, and little may lie behind it.
    pub(super) fn has_laid_bulk(&self) -> bool {
        self.laid.head.is_some()
    }

    /// The stream with the least to send, unless something is laid already.
    pub(super) fn shortest(&mut self) -> usize {
        if self.has_laid() {
            return LAID_STREAM;
        }
        let count = self.lanes.len();
        let rotated = (0..count).map(|i| (self.next + i) % count);
        let stream = rotated
            .min_by_key(|&i| self.lanes[i].queued_bytes)
            .unwrap_or(0);
        self.next = (stream + 1) % count;
        stream
    }

    /// Puts a header before the claimed buffer's payload and the chunk into a stream's queue, behind what is laid there; gives
    /// false without a claim.
    pub(super) fn queue(
        &mut self,
        operations: &mut Operations,
        stream: usize,
        kind: Kind,
        chunk: (u64, u32, usize),
    ) -> bool {
        let laid = self.lay(stream, kind, chunk);
        if laid {
            self.queue_laid(operations, stream);
        }
        laid
    }

    /// Puts a header before the claimed buffer's payload; the chunk leaves with the next one. Gives false without a claim, or
    /// room.
    pub(super) fn lay(
        &mut self,
        stream: usize,
        kind: Kind,
        (epoch, items, length): (u64, u32, usize),
    ) -> bool {
        let chunk = self.claimed.as_deref_mut().unwrap_or_default();
        let chunk = chunk.get_mut(self.laid.bytes..).unwrap_or_default();
        let Some((head, payload)) = chunk.split_first_chunk_mut::<HEADER_BYTES>() else {
            return false;
        };
        let Some(payload) = payload.get(..length) else {
            return false;
        };
        let lane = &mut self.lanes[stream];
        let bulk = match self.laid.head {
            None => self.bulk.length(),
            Some(_) => 0,
        };
        let loose = matches!(kind, Kind::Sync | Kind::Ahead);
        let header = Header {
            kind: kind as u16,
            length: (length + bulk) as u32,
            stream: stream as u16,
            generation: self.generation,
            epoch,
            attempt: if loose { 0 } else { self.attempt },
            sequence: if loose { 0 } else { lane.sequence },
            items,
            payload_crc: crc32fast::hash(payload),
            bulk: bulk as u32,
        };
        *head = header.to_bytes();
        if !loose {
            lane.sequence += 1;
        }
        if kind.is_content() {
            lane.totals.add_chunk(kind, items);
        }
        self.laid.bytes += HEADER_BYTES + length;
        self.laid.chunks += 1;
        if bulk > 0 {
            self.laid.head = Some(self.laid.bytes);
        }
        true
    }

    /// Puts what is laid into a stream's queue.
    pub(super) fn queue_laid(&mut self, operations: &mut Operations, stream: usize) {
        let Laid {
            bytes,
            chunks,
            head,
        } = std::mem::take(&mut self.laid);
        let Some(buffer) = self.claimed.take_if(|_| chunks > 0) else {
            return;
        };
        let lane = &mut self.lanes[stream];
        if lane.queue.is_empty() {
            lane.since = Instant::now();
        }
        let with_bulk = bytes + self.bulk.length();
        let index = operations.hold_with(buffer, head.unwrap_or(bytes)..bytes, &mut self.bulk);
        lane.queue.push_back(Queued {
            index,
            bytes: with_bulk,
            sent: 0,
            chunks,
        });
        lane.queued_bytes += with_bulk;
    }

    /// Lets every idle stream with something to send begin.
    pub(super) fn start(
        &mut self,
        operations: &mut Operations,
        counters: &mut Counters,
    ) -> Result<(), ChannelError> {
        for (stream, lane) in self.lanes.iter_mut().enumerate() {
            let Some(first) = lane.queue.front().filter(|_| !lane.busy) else {
                continue;
            };
            let range = first.sent..first.bytes;
            let zero_copy = lane.zero_copy && range.len() >= ZERO_COPY_MIN_BYTES;
            counters.zero_copy_sends += u64::from(zero_copy);
            let started = operations.send_range(stream, first.index, range, zero_copy);
            started.map_err(|source| failed(stream, source))?;
            lane.busy = true;
        }
        Ok(())
    }

    /// A send has ended.
    pub(super) fn sent(
        &mut self,
        operations: &mut Operations,
        stream: usize,
        result: io::Result<usize>,
        counters: &mut Counters,
    ) -> Result<(), ChannelError> {
        let lane = &mut self.lanes[stream];
        lane.busy = false;
        let Some(first) = lane.queue.front_mut() else {
            return Ok(());
        };
        let bytes = match result {
            Ok(0) => return Err(failed(stream, io::ErrorKind::WriteZero.into())),
            Ok(bytes) => bytes,
            Err(e) if is_passing(&e) => 0,
            Err(e) if lane.zero_copy && is_refusal(&e) => {
                lane.zero_copy = false;
                counters.zero_copy_off += 1;
                tracing::debug!("page channel: stream {stream} is sent with copies: {e}");
                0
            }
            Err(source) => return Err(failed(stream, source)),
        };
        if bytes > 0 {
            lane.since = Instant::now();
        }
        first.sent += bytes;
        lane.queued_bytes -= bytes;
        counters.sent_bytes += bytes as u64;
        if first.sent < first.bytes {
            counters.short_sends += 1;
            return Ok(());
        }
        counters.sent_chunks += first.chunks;
        let index = first.index;
        lane.queue.pop_front();
        // With SEND_ZC the kernel may still read it: it comes back with the notification.
        match operations.take(index) {
            Some(buffer) => self.free.push(buffer),
            None => lane.unreturned += 1,
        }
        Ok(())
    }

    /// The kernel is done with the memory of a SEND_ZC.
    pub(super) fn notified(
        &mut self,
        operations: &mut Operations,
        stream: usize,
        (index, copied): (u32, bool),
        counters: &mut Counters,
    ) {
        let lane = &mut self.lanes[stream];
        if copied {
            counters.zero_copy_copied += 1;
            if lane.zero_copy {
                lane.zero_copy = false;
                counters.zero_copy_off += 1;
                tracing::debug!(
                    "page channel: stream {stream}: the kernel copies, so it is told to at once"
                );
            }
        }
        // One that is still in the queue (the rest of a short send) stays there.
        if !lane.queue.iter().any(|queued| queued.index == index)
            && let Some(buffer) = operations.take(index)
        {
            self.free.push(buffer);
            lane.unreturned = lane.unreturned.saturating_sub(1);
            lane.since = Instant::now();
        }
    }

    /// Everything was handed to the kernel.
    pub(super) fn is_drained(&self) -> bool {
        self.lanes.iter().all(|lane| lane.queue.is_empty())
    }

    /// Since when a stream waits for the peer to take something.
    pub(super) fn waiting_since(&self, stream: usize) -> Option<Instant> {
        let lane = &self.lanes[stream];
        let waits = !lane.queue.is_empty() || lane.unreturned > 0;
        waits.then_some(lane.since)
    }
}

fn failed(stream: usize, source: io::Error) -> ChannelError {
    let step = Step::SendChunk;
    ChannelError::Socket {
        stream,
        step,
        source,
    }
}

fn is_passing(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}

/// SEND_ZC can't be had: not with this socket, flag or amount of memory.
fn is_refusal(e: &io::Error) -> bool {
    let code = e.raw_os_error();
    matches!(
        code,
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOMEM | libc::ENOBUFS | libc::EFAULT)
    )
}
